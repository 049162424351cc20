#!/usr/bin/env bash
# The runs of a grid one after the other, then their table and plot.
#
#   bash launch/study.sh [--num_processes N] GRID [--section.setting VALUE ...]
#   bash launch/study.sh configs/study/fig6.yaml --data.train /data/cifar100/train --data.val /data/cifar100/val
#
# Settings after the grid go to every run. The same command goes on where it was stopped and leaves
# alone what is finished. A run that fails stops none of the others; a signal or Ctrl-C stops all (exit code 85).
set -euo pipefail

fail() {
    echo "study.sh: $1" >&2
    exit 2
}

processes=()
if [ "${1:-}" = --num_processes ]; then
    [[ ${2:-} =~ ^[1-9][0-9]*$ ]] || fail "--num_processes wants a number of at least 1, got '${2:-}'"
    processes=(--num_processes "$2")
    shift 2
fi
if [ $# -lt 1 ] || [ ! -f "$1" ]; then
    fail "no such grid: ${1:-(none given)}; usage: study.sh [--num_processes N] GRID [--setting VALUE ...]"
fi
grid=$1
shift
for word in "$@"; do
    case $word in --output | --output=*) fail "the grid names each run's folder; leave --output out" ;; esac
done
command -v imagenet-swa >/dev/null || fail "no imagenet-swa on the PATH; activate the environment that has it"
launch=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/stoppable.sh
source "$launch/stoppable.sh"

unfinished=$(imagenet-swa study "$grid" --unfinished)  # checks all runs' settings before the first starts
count=$(wc -w <<<"$unfinished")
position=0
failed=()
for number in $unfinished; do
    position=$((position + 1))
    lines=$(imagenet-swa study "$grid" --flags "$number")
    mapfile -t arguments <<<"$lines"
    echo "== $position of $count: ${arguments[*]} =="
    code=0
    stoppable bash "$launch/single_node.sh" "${processes[@]}" "${arguments[@]}" "$@" || code=$?
    if [ "$code" -eq 85 ] || [ "$code" -eq 130 ]; then
        exit "$code" # stopped as asked: the others are not wanted either
    elif [ "$code" -ne 0 ]; then
        failed+=("${arguments[1]#--output=} (exit code $code)")
    fi
done
code=0
imagenet-swa study "$grid" || code=1
if [ "${#failed[@]}" -gt 0 ]; then
    echo "study.sh: ${#failed[@]} of $count runs failed:" >&2
    printf '  %s\n' "${failed[@]}" >&2
    exit 1
fi
exit "$code"
