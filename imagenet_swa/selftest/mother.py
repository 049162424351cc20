"""`python -m imagenet_swa.selftest.mother`: a process that has imported everything and forks the processes of runs.

A start then takes one second instead of five. The children behave as `python -m imagenet_swa ARGUMENTS` does: their main thread
goes on in this file's last line, and from there through the interpreter's own end. Orders come as lines of JSON on the standard
input, answers go to the standard output; at the end of the input all children are killed.
"""

import importlib
import json
import os
import select
import signal
import sys
from contextlib import suppress
from importlib.util import find_spec
from typing import Any

_MODULES = ["jsonargparse", "imagenet_swa.cli", "imagenet_swa.finetune", "imagenet_swa.data.torch_loader"]
_SECONDS_BETWEEN_LOOKS = 0.005


def wait_for_orders() -> list[str] | None:
    """Fork, signal and report as told. Returns in each child, with its arguments, and in this process at the end, with None."""
    children: set[int] = set()
    unfinished = b""
    _answer({"pid": os.getpid()})
    while True:
        if select.select([0], [], [], _SECONDS_BETWEEN_LOOKS)[0]:
            received = os.read(0, 65536)
            if not received:
                break
            *lines, unfinished = (unfinished + received).split(b"\n")
            for order in map(json.loads, lines):
                if "signal" in order:
                    _send(order["signal"], children & {order["pid"]})
                elif pid := os.fork():
                    children.add(pid)
                    _answer({"pid": pid})
                else:
                    return _become(order)
        for pid in list(children):
            found, state = os.waitpid(pid, os.WNOHANG)
            if found:
                children.discard(pid)
                _answer({"ended": pid, "code": os.waitstatus_to_exitcode(state)})
    _send(signal.SIGKILL, children)
    return None


def _become(order: dict[str, Any]) -> list[str]:
    """Make this child a process of its own, with its environment and its output, and return its arguments."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(nothing, 0)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(nothing)
    os.close(log)
    os.environ.update(order["environment"])
    sys.argv = ["imagenet-swa", *order["arguments"]]
    return order["arguments"]


def _send(number: int, pids: set[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def _answer(what: dict[str, Any]) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


def _import_everything() -> None:
    modules = [*_MODULES, *(["imagenet_swa.data.dali"] if find_spec("nvidia") and find_spec("nvidia.dali") else [])]
    for name in modules:
        importlib.import_module(name)


if __name__ == "__main__":
    _import_everything()
    orders = wait_for_orders()
    if orders is not None:
        from imagenet_swa.cli import main

        sys.exit(main(orders))
