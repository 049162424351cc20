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
#   --max_restarts      how often processes that were lost are started again from the last checkpoint, by default 3 times
#   --rejoin_seconds    how long machines wait for one that is missing before they give up, by default 600
# The run folder has to be on a file system that all machines share. On machines with several network interfaces,
# NCCL_SOCKET_IFNAME (without GPUs GLOO_SOCKET_IFNAME) names the one that the processes talk through.
#
# What brings the run back, each time from the last checkpoint:
#   a process died        nobody: all are started again at once
#   a machine died        starting this command on it, or on another one with its --machine_rank, within --rejoin_seconds
#   machine 0 died        the same; the others cannot go on without the meeting place that its launcher hosts, and wait for it
#   the link was cut      nobody, if it is back within --rejoin_seconds; the processes end after processes.silence_seconds
# Without success the command ends with code 1 on all machines: those that reach machine 0 after --rejoin_seconds, those that do
# not after about twice as long. A scheduler then starts it on all of them.
# Exit codes: 0 finished, 1 failed, 2 unusable input, 85 stopped as asked (the same command goes on), 130 second Ctrl-C.
#
# The same by torchrun, without what supervise.py adds (exit code 85, signals, the last line on the screen):
#   TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun --nnodes 2 --nproc_per_node 8 --max_restarts 3 --rdzv_backend c10d \
#       --rdzv_endpoint 10.0.0.1:29500 --rdzv_id imagenet-swa --rdzv_conf is_host=1 --local_addr THIS_MACHINE \
#       -m imagenet_swa.train --config FILE
# with is_host=0 on all machines but the one that the endpoint names, and the address under which others reach this one.
set -euo pipefail
trap 'exit 85' TERM USR1 USR2 # before anything has begun

fail() {
    echo "multi_node.sh: $1" >&2
    exit 2
}

num_machines=${SLURM_NNODES:-${NNODES:-}}
machine_rank=${SLURM_NODEID:-${NODE_RANK:-}}
main_process_ip=${MASTER_ADDR:-}
main_process_port=${MASTER_PORT:-29500}
num_processes=
max_restarts=3
rejoin_seconds=600
while [ $# -gt 0 ]; do
    case $1 in
        --num_machines | --machine_rank | --main_process_ip | --main_process_port | --num_processes | --max_restarts | --rejoin_seconds)
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
[[ $max_restarts =~ ^[0-9]+$ ]] || fail "--max_restarts wants a number, got '$max_restarts'"
[[ $rejoin_seconds =~ ^[1-9][0-9]*$ ]] || fail "--rejoin_seconds wants a number of at least 1, got '$rejoin_seconds'"
command -v accelerate >/dev/null || fail "no accelerate on the PATH; activate the environment that has imagenet-swa"

if [ -z "$num_processes" ]; then
    num_gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
    num_processes=$((num_gpus > 0 ? num_gpus : 1))
fi
threads=${OMP_NUM_THREADS:-$(($(nproc) / num_processes))}

# c10d, because accelerate's default, static, knows no second meeting: a machine that starts again joins the old one, which is over.
# Who hosts the meeting place is said, for it would be guessed from host names, which need not resolve.
is_host=$((machine_rank == 0))
meeting="is_host=$is_host,join_timeout=$rejoin_seconds,read_timeout=$rejoin_seconds,last_call_timeout=5"
# By default the processes use one store over all restarts, and find the addresses of those that died in it.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# The address under which the other machines reach this one. A UDP socket sends nothing to find it out.
address=$(python -c 'import socket, sys
try:
    (family, kind, protocol, _, address), *_ = socket.getaddrinfo(sys.argv[1], int(sys.argv[2]), type=socket.SOCK_DGRAM)
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        print(probe.getsockname()[0])
except OSError:
    pass' "$main_process_ip" "$main_process_port")
[ -z "$address" ] || export PET_LOCAL_ADDR="${PET_LOCAL_ADDR:-$address}"
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}" # no stack traces of lost connections

# Where machine 0 is lost, so is the launcher here: supervise.py starts it again, to wait for machine 0.
launch=$(dirname "${BASH_SOURCE[0]}")
supervise=(--idle $((rejoin_seconds + 60)))
[ "$machine_rank" = 0 ] || supervise+=(--restarts "$max_restarts")
# A configuration file of our own, so that accelerate takes nothing from the one in the user's home.
exec python "$launch/supervise.py" "${supervise[@]}" accelerate launch --config_file "$launch/accelerate/two_nodes.yaml" \
    --num_machines "$num_machines" --machine_rank "$machine_rank" --num_processes "$((num_machines * num_processes))" \
    --main_process_ip "$main_process_ip" --main_process_port "$main_process_port" \
    --rdzv_backend c10d --rdzv_conf "$meeting" --max_restarts "$max_restarts" \
    --num_cpu_threads_per_process "$((threads > 0 ? threads : 1))" \
    -m imagenet_swa.train --config "$config" "$@"
