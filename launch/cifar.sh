#!/usr/bin/env bash
# One row of the paper's Table 1, or a small relative of it: for each seed plain SGD over its budget, then SWA from weights of that
# run, by the configurations configs/cifar/RECIPE-sgd.yaml and RECIPE-swa.yaml; at the end a table of all runs.
#
#   bash launch/cifar.sh small-vgg16 --data /data/cifar10
#   bash launch/cifar.sh cifar100-vgg16 --data /data/cifar100 --seeds 3 --output /scratch/vgg16 --speed.precision bf16
#
#   --data DIR     folder with the classes' folders below train/ and val/ (`imagenet-swa import` makes it)
#   --seeds N      seeds 0..N-1 (default: 1)
#   --output DIR   holds sgd-SEED and swa-SEED (default: runs/cifar/RECIPE)
#
# Further settings, as --section.setting VALUE, go to all runs. The same command goes on where an earlier one stopped: what is
# finished is not run again. A signal or Ctrl-C stops it (exit code 85). NUM_PROCESSES sets the number of processes, by default the number of GPUs, or 1.
set -euo pipefail
launch=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
configs=$launch/../configs/cifar
# shellcheck source=launch/stoppable.sh
source "$launch/stoppable.sh"

fail() {
    echo "cifar.sh: $1" >&2
    exit 2
}

recipes() {
    local names=("$configs"/*-swa.yaml)
    names=("${names[@]##*/}")
    echo "${names[@]%-swa.yaml}"
}

recipe=${1:-}
if [ -z "$recipe" ] || [ ! -f "$configs/$recipe-sgd.yaml" ] || [ ! -f "$configs/$recipe-swa.yaml" ]; then
    fail "no such recipe: ${recipe:-(none given)}; wanted one of $(recipes)"
fi
shift
seeds=1 output=runs/cifar/$recipe settings=()
while [ $# -gt 0 ]; do
    case $1 in
        --data | --seeds | --output) [ -n "${2:-}" ] || fail "$1 wants a value" ;;&
        --data)
            if [ ! -d "$2/train" ] || [ ! -d "$2/val" ]; then
                fail "--data wants a folder with train/ and val/, got '$2'"
            fi
            settings+=(--data.train "$2/train" --data.val "$2/val")
            shift 2
            ;;
        --seeds)
            [[ $2 =~ ^[1-9][0-9]*$ ]] || fail "--seeds wants a number of at least 1, got '$2'"
            seeds=$2
            shift 2
            ;;
        --output)
            output=$2
            shift 2
            ;;
        *) # a setting, and its value where there is one
            settings+=("$1")
            shift
            ;;
    esac
done
command -v imagenet-swa >/dev/null || fail "no imagenet-swa on the PATH; activate the environment that has it"

# The SWA configuration names the capture that it starts from, as .../sgd-0/captures/NAME.
capture=$(sed -n 's|^  weights: .*/sgd-0/\(captures/[^ ]*\).*|\1|p' "$configs/$recipe-swa.yaml")
processes=()
[ -z "${NUM_PROCESSES:-}" ] || processes=(--num_processes "$NUM_PROCESSES")

runs=()
for ((seed = 0; seed < seeds; seed++)); do
    sgd=$output/sgd-$seed swa=$output/swa-$seed
    echo "== $recipe, seed $seed: SGD =="
    stoppable bash "$launch/single_node.sh" "${processes[@]}" "$configs/$recipe-sgd.yaml" \
        --seed "$seed" --output "$sgd" "${settings[@]}"
    echo "== $recipe, seed $seed: SWA from $sgd/$capture =="
    stoppable bash "$launch/single_node.sh" "${processes[@]}" "$configs/$recipe-swa.yaml" \
        --model.weights "$sgd/$capture" --seed "$seed" --output "$swa" "${settings[@]}"
    runs+=("$sgd" "$swa")
done
echo "== $recipe: all runs =="
imagenet-swa report "${runs[@]}"
