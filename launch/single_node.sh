#!/usr/bin/env bash
# One machine, one process per GPU (one process where there is none).
#
#   bash launch/single_node.sh [--num_processes N] configs/resnet50.yaml [--section.setting VALUE ...]
#
# On a machine without GPUs the N processes share the CPU cores and talk through gloo.
set -euo pipefail

num_processes=
if [ "${1:-}" = --num_processes ]; then
    num_processes=${2:-}
    shift 2
fi
if [ $# -lt 1 ] || [ ! -f "$1" ]; then
    echo "single_node.sh: no such configuration: ${1:-(none given)}" >&2
    echo "usage: bash launch/single_node.sh [--num_processes N] CONFIG [--section.setting VALUE ...]" >&2
    exit 2
fi
config=$1
shift

num_gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || num_gpus=0
num_processes=${num_processes:-$((num_gpus > 0 ? num_gpus : 1))}
if ! [[ $num_processes =~ ^[1-9][0-9]*$ ]]; then
    echo "single_node.sh: --num_processes wants a number of at least 1, got '$num_processes'" >&2
    exit 2
fi
threads=${OMP_NUM_THREADS:-$(($(nproc) / num_processes))}

# Everything that accelerate would otherwise take from a file in the user's home is said here. --multi_gpu is the launcher
# that starts N processes, with GPUs or without; --cpu would start one whatever the number.
arguments=(--num_machines 1 --num_processes "$num_processes" --mixed_precision no --dynamo_backend no)
arguments+=(--num_cpu_threads_per_process "$((threads > 0 ? threads : 1))")
if [ "$num_processes" -gt 1 ]; then
    arguments+=(--multi_gpu --main_process_port "${MAIN_PROCESS_PORT:-0}")
fi
exec accelerate launch "${arguments[@]}" -m imagenet_swa.train --config "$config" "$@"
