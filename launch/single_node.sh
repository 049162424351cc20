#!/usr/bin/env bash
# One machine, one process per GPU (one process where there is none).
#
#   bash launch/single_node.sh [--num_processes N] configs/resnet50.yaml [--section.setting VALUE ...]
#
# CUDA_VISIBLE_DEVICES=0,1 keeps it to those GPUs. On a machine without GPUs the N processes share the CPU cores and talk
# through gloo. MAIN_PROCESS_PORT names the port they meet at, by default any free one.
set -euo pipefail

fail() {
    echo "single_node.sh: $1" >&2
    exit 2
}

num_processes=
if [ "${1:-}" = --num_processes ]; then
    [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || fail "--num_processes wants a number of at least 1, got '${2:-}'"
    num_processes=$2
    shift 2
fi
if [ $# -lt 1 ] || [ ! -f "$1" ]; then
    fail "no such configuration: ${1:-(none given)}; usage: single_node.sh [--num_processes N] CONFIG [--setting VALUE ...]"
fi
config=$1
shift
command -v accelerate >/dev/null || fail "no accelerate on the PATH; activate the environment that has imagenet-swa"

if [ -z "$num_processes" ]; then
    num_gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
    num_processes=$((num_gpus > 0 ? num_gpus : 1))
fi
threads=${OMP_NUM_THREADS:-$(($(nproc) / num_processes))}

# A configuration file of our own, so that accelerate takes nothing from the one in the user's home. The type of
# eight_gpus.yaml, MULTI_GPU, is the launcher that starts N processes, with GPUs or without; --cpu would start one whatever
# the number.
launch=$(dirname "${BASH_SOURCE[0]}")
arguments=(--num_processes "$num_processes" --num_cpu_threads_per_process "$((threads > 0 ? threads : 1))")
if [ "$num_processes" -gt 1 ]; then
    arguments+=(--config_file "$launch/accelerate/eight_gpus.yaml" --main_process_port "${MAIN_PROCESS_PORT:-0}")
else
    # After an error the program's own message is enough, without the launcher's traceback.
    arguments+=(--config_file "$launch/accelerate/one_process.yaml" --quiet)
fi
exec accelerate launch "${arguments[@]}" -m imagenet_swa.train --config "$config" "$@"
