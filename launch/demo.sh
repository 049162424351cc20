#!/usr/bin/env bash
# The whole job on data that comes with scikit-learn, by the program and the launcher that a cluster uses.
#
#   bash launch/demo.sh              one run, about half a minute after the installation
#   bash launch/demo.sh --seeds 10   seeds 0..9, then a table of all of them
#   NUM_PROCESSES=2 bash launch/demo.sh
set -euo pipefail
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$project"

seeds=1
if [ $# -gt 0 ]; then
    if [ "$1" != --seeds ] || ! [[ ${2:-} =~ ^[1-9][0-9]*$ ]]; then
        echo "usage: bash launch/demo.sh [--seeds N]" >&2
        exit 2
    fi
    seeds=$2
fi

source launch/setup.sh
source launch/stoppable.sh
setup demo
export PATH="$project/.venv/bin:$PATH"
backend=dali
python -c 'import nvidia.dali' 2>/dev/null || backend=torchvision
python launch/digits.py runs/demo/digits

runs=()
for ((seed = 0; seed < seeds; seed++)); do
    pretrained=runs/demo/pretrained-$seed run=runs/demo/swa-$seed
    rm -rf "$pretrained" "$run"
    echo "== seed $seed: five epochs from random weights, to have a pretrained network =="
    stoppable bash launch/single_node.sh --num_processes "${NUM_PROCESSES:-1}" configs/demo-pretraining.yaml \
        --output "$pretrained" --seed "$seed" --data.backend "$backend" >/dev/null
    echo "== seed $seed: ten cycles of SWA fine-tuning =="
    stoppable bash launch/single_node.sh --num_processes "${NUM_PROCESSES:-1}" configs/demo.yaml \
        --model.weights "$pretrained/captures/epoch-05.safetensors" \
        --output "$run" --seed "$seed" --data.backend "$backend"
    runs+=("$run")
done
if [ "$seeds" -gt 1 ]; then
    imagenet-swa report "${runs[@]}"
fi
