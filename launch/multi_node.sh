#!/usr/bin/env bash
# Several machines, one process per GPU: run this command on each of them.
#
#   bash launch/multi_node.sh --num_machines 2 --machine_rank 0 --main_process_ip 10.0.0.1 configs/resnet50.yaml [SETTINGS]
#
# with settings as --section.setting VALUE. What is not given before the configuration is taken from the scheduler's environment:
#   --num_machines      SLURM_NNODES, or NNODES
#   --machine_rank      SLURM_NODEID, or NODE_RANK (0 is the machine that --main_process_ip names)
#   --main_process_ip   MASTER_ADDR, or the first host of SLURM_JOB_NODELIST
#   --main_process_port MASTER_PORT, or 29500
#   --num_processes     per machine: the number of its GPUs, or 1
# The run folder has to be on a file system that all machines share. On machines with several network interfaces,
# NCCL_SOCKET_IFNAME (without GPUs GLOO_SOCKET_IFNAME) names the one that the processes talk through.
set -euo pipefail

fail() {
    echo "multi_node.sh: $1" >&2
    exit 2
}

num_machines=${SLURM_NNODES:-${NNODES:-}}
machine_rank=${SLURM_NODEID:-${NODE_RANK:-}}
main_process_ip=${MASTER_ADDR:-}
main_process_port=${MASTER_PORT:-29500}
num_processes=
while [ $# -gt 0 ]; do
    case $1 in
        --num_machines | --machine_rank | --main_process_ip | --main_process_port | --num_processes)
            [ -n "${2:-}" ] || fail "$1 wants a value"
            printf -v "${1#--}" %s "$2"
            shift 2
            ;;
        *) break ;;
    esac
done
if [ $# -lt 1 ] || [ ! -f "$1" ]; then
    fail "no such configuration: ${1:-(none given)}; usage: multi_node.sh [--num_machines M ...] CONFIG [--setting VALUE ...]"
fi
config=$1
shift
if [ -z "$main_process_ip" ] && [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")  # one a line
    main_process_ip=${hosts%%$'\n'*}
fi

[[ $num_machines =~ ^[1-9][0-9]*$ ]] || fail "how many machines? give --num_machines, or set NNODES; got '$num_machines'"
[[ $machine_rank =~ ^[0-9]+$ ]] ||
    fail "which machine is this? give --machine_rank 0..$((num_machines - 1)), or set NODE_RANK; got '$machine_rank'"
[ "$machine_rank" -lt "$num_machines" ] || fail "--machine_rank $machine_rank is not below --num_machines $num_machines"
[ -n "$main_process_ip" ] || fail "where is machine 0? give --main_process_ip ADDRESS, or set MASTER_ADDR"
[[ $main_process_port =~ ^[1-9][0-9]*$ ]] ||
    fail "--main_process_port wants a number, the same on all machines; got '$main_process_port'"
[[ $num_processes =~ ^([1-9][0-9]*)?$ ]] || fail "--num_processes wants a number of at least 1, got '$num_processes'"
command -v accelerate >/dev/null || fail "no accelerate on the PATH; activate the environment that has imagenet-swa"

if [ -z "$num_processes" ]; then
    num_gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
    num_processes=$((num_gpus > 0 ? num_gpus : 1))
fi
threads=${OMP_NUM_THREADS:-$(($(nproc) / num_processes))}

# A configuration file of our own, so that accelerate takes nothing from the one in the user's home.
exec accelerate launch --config_file "$(dirname "${BASH_SOURCE[0]}")/accelerate/two_nodes.yaml" \
    --num_machines "$num_machines" --machine_rank "$machine_rank" --num_processes "$((num_machines * num_processes))" \
    --main_process_ip "$main_process_ip" --main_process_port "$main_process_port" \
    --num_cpu_threads_per_process "$((threads > 0 ? threads : 1))" \
    -m imagenet_swa.train --config "$config" "$@"
