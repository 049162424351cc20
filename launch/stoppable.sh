#!/usr/bin/env bash
# Sourced by scripts that go on after a run:  stoppable COMMAND [ARGUMENT ...]
# Runs the command, passes on the signals that arrive meanwhile, returns the command's exit code.
#
# bash runs no trap before its foreground command has ended, so that a signal for the script alone would wait for hours. Hence the
# command goes to the background, and `wait`, which traps interrupt, waits for it.

stoppable() {
    local child="" signalled="" code
    trap 'signalled=1; [ -z "$child" ] || kill -INT "$child" 2>/dev/null || :' INT
    # They all mean: save, and stop. Only USR1 means it to srun too, which ends a job at once when it gets TERM.
    trap 'signalled=1; [ -z "$child" ] || kill -USR1 "$child" 2>/dev/null || :' TERM USR1 USR2 HUP
    set -m # a process group of its own: others do not hear INT in the background, and would get a terminal's Ctrl-C twice
    "$@" &
    child=$!
    set +m
    while true; do
        signalled=
        code=0
        wait "$child" || code=$?
        [ -n "$signalled" ] || break # else the signal ended `wait`, not the command
    done
    trap - INT TERM USR1 USR2 HUP
    return "$code"
}
