"""What this rank is doing and how it ended, for whoever started it: a file per rank in the folder IMAGENET_SWA_STATUS.

Neither exit codes nor reasons come through `accelerate launch` whole; launch/supervise.py makes the folder and reads both there.
Without the variable a call does nothing, and none ever raises: a full disk must not end a run here.
"""

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

VARIABLE = "IMAGENET_SWA_STATUS"

_record: dict[str, Any] = {}


def begin() -> None:
    """At the start of the process. Signals are passed on to it as soon as it has handlers for them.

    What an earlier start of the rank said stays beside it, as `before-restart-<RESTART>-rank-<RANK>.json`.
    """
    _record.clear()
    if folder := _folder():
        with suppress(OSError):
            path = folder / f"rank-{_number('RANK')}.json"
            path.rename(folder / f"before-restart-{_number('TORCHELASTIC_RESTART_COUNT')}-{path.name}")
    phase("starting")


def phase(name: str) -> None:
    """What it does from now on: starting, training, batchnorm, evaluation, waiting to write, finishing."""
    _write(phase=name)


def end(code: int, message: str | None, lost_others: bool = False, *, restart_may_help: bool = False) -> None:
    """How the process is about to end.

    Args:
        code: Its exit code.
        message: The one line that it would put last on the screen.
        lost_others: It fails only because another one did.
        restart_may_help: The same failure need not come again, as after an error of a GPU. Launchers do not restart after other
            failures that a rank could tell of; they do after lost others and after a death without words.
    """
    _write(code=code, message=message, lost_others=lost_others, restart_may_help=restart_may_help)


def is_watched() -> bool:
    """Whether whoever started this process shows the message of its end, last on the screen."""
    return _folder() is not None


def by_launcher() -> bool:
    """Whether a SIGTERM comes from the launcher itself, which is about to start all ranks again, not from who asked the
    supervisor to stop the run: that one leaves the file `asked`.
    """
    folder = _folder()
    return folder is not None and not (folder / "asked").exists()


def writing(is_writing: bool) -> None:
    """Whether the background thread of rank 0 writes files now: the file `writing` is there or not."""
    if folder := _folder():
        with suppress(OSError):
            path = folder / "writing"
            path.touch() if is_writing else path.unlink(missing_ok=True)


def _folder() -> Path | None:
    name = os.environ.get(VARIABLE)
    return Path(name) if name else None


def _number(variable: str, default: int = 0) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isascii() and text.isdigit() else default


def _facts() -> dict[str, Any]:
    return {
        "pid": os.getpid(),
        "rank": _number("RANK"),
        "local_rank": _number("LOCAL_RANK"),
        "local_world_size": _number("LOCAL_WORLD_SIZE", 1),
        "host": socket.gethostname(),
        "phase": "starting",
        "restart": _number("TORCHELASTIC_RESTART_COUNT"),
        "code": None,
        "message": None,
        "lost_others": False,
        "restart_may_help": False,
    }


def _write(**changes: Any) -> None:
    folder = _folder()
    if folder is None:
        return
    if not _record:
        _record.update(_facts())
    _record.update(changes, time=time.time())
    with suppress(OSError, ValueError):
        # Not flushed to the disk as a run's files are: no reader outlives the machine, and a busy disk must not hold a step up.
        path = folder / f"rank-{_record['rank']}.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(_record), encoding="utf-8")
        partial.replace(path)
