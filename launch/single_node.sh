#!/usr/bin/env bash
# One machine, one process per GPU (one process where there is none).
#
#   bash launch/single_node.sh [--num_processes N] [--max_restarts N] configs/resnet50.yaml [--section.setting VALUE ...]
#
# CUDA_VISIBLE_DEVICES=0,1 keeps it to those GPUs. On a machine without GPUs the N processes share the CPU cores and talk
# through gloo. MAIN_PROCESS_PORT names the port they meet at, by default any free one.
#
# A process that is killed or crashes, for want of memory or by a fault of a GPU, brings all back from the last checkpoint, at most
# --max_restarts times. Three (the default) outlive a bad night; what crashes each time costs three starts more. Errors that a
# restart would only repeat end the run at once. A signal or Ctrl-C ends it after a checkpoint.
# Exit codes: 0 finished, 1 failed, 2 unusable input, 85 stopped as asked (the same command goes on), 130 second Ctrl-C.
set -euo pipefail
trap 'exit 85' TERM USR1 USR2 # before anything has begun

fail() {
    echo "single_node.sh: $1" >&2
    exit 2
}

num_processes=
max_restarts=3
while [ "${1:-}" = --num_processes ] || [ "${1:-}" = --max_restarts ]; do
    case $1 in
        --num_processes)
            [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || fail "--num_processes wants a number of at least 1, got '${2:-}'"
            num_processes=$2
            ;;
        --max_restarts)
            [[ ${2:-} =~ ^[0-9]+$ ]] || fail "--max_restarts wants a number, got '${2:-}'"
            max_restarts=$2
            ;;
    esac
    shift 2
done
if [ $# -lt 1 ] || [ ! -f "$1" ]; then
    fail "no such configuration: ${1:-(none given)}; usage: single_node.sh [--num_processes N] [--max_restarts N] CONFIG [--setting VALUE ...]"
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
    supervise=()
    arguments+=(--config_file "$launch/accelerate/eight_gpus.yaml" --main_process_port "${MAIN_PROCESS_PORT:-0}")
    # Else restarted processes find the addresses of those that died, in the store that torch's launcher keeps over all restarts.
    arguments+=(--max_restarts "$max_restarts" --rdzv_backend c10d --rdzv_conf "join_timeout=60,last_call_timeout=1")
    export PET_RDZV_ENDPOINT=localhost:0 PET_LOCAL_ADDR=localhost TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
    export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}" # no stack traces of connections to processes that died
else
    # accelerate does not restart a process that is alone. After an error the program's own message is enough, without its traceback.
    supervise=(--restarts "$max_restarts")
    arguments+=(--config_file "$launch/accelerate/one_process.yaml" --quiet)
fi
exec python "$launch/supervise.py" "${supervise[@]}" accelerate launch "${arguments[@]}" -m imagenet_swa.train --config "$config" "$@"
