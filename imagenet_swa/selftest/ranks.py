"""Start the processes of a run without a launcher, strike them with signals, see them end."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

MARKER = "IMAGENET_SWA_SELFTEST"
_IMPORT_SECONDS = 300.0
_LOOK_SECONDS = 0.004


class Mother:
    """The process that forks those of the runs (mother.py), and what it tells of them. A context manager.

    Attributes:
        pid: its process number.
        codes: exit codes of all children that have ended, by process number; minus the signal where one ended it.
    """

    def __init__(self, marker: str, hash_seed: int) -> None:
        one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "imagenet_swa.selftest.mother"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | one_thread | {MARKER: marker, "PYTHONHASHSEED": str(hash_seed), "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )
        self.pid = self._process.pid
        self.codes: dict[int, int] = {}
        self._unread = b""
        self._answers: list[int] = []
        self._answer(_IMPORT_SECONDS)

    def __enter__(self) -> "Mother":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()  # it kills its children
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def fork(self, arguments: Sequence[str], environment: dict[str, str], log: Path) -> int:
        """Start `imagenet-swa ARGUMENTS`; returns its process number."""
        self._tell({"arguments": list(arguments), "environment": environment, "log": str(log)})
        return self._answer(60.0)

    def send(self, number: int, pid: int) -> None:
        """Send a signal to a child, if it has not ended."""
        self._tell({"signal": int(number), "pid": pid})

    def listen(self, seconds: float = 0.0) -> None:
        """Take notice of what it tells, waiting for news so long."""
        assert self._process.stdout is not None
        while select.select([self._process.stdout], [], [], seconds)[0]:
            received = os.read(self._process.stdout.fileno(), 65536)
            if not received:
                raise RuntimeError(f"the process that starts the runs has ended with {self._process.wait()}")
            *lines, self._unread = (self._unread + received).split(b"\n")
            for line in map(json.loads, lines):
                if "ended" in line:
                    self.codes[line["ended"]] = line["code"]
                else:
                    self._answers.append(line["pid"])
                    self.codes.pop(line["pid"], None)  # an older child had the same number
            seconds = 0.0

    def _tell(self, order: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()

    def _answer(self, seconds: float) -> int:
        until = time.monotonic() + seconds
        while not self._answers:
            self.listen(max(0.0, until - time.monotonic()))
            if time.monotonic() > until:
                raise RuntimeError(f"the process that starts the runs gave no answer in {seconds:g} s")
        return self._answers.pop(0)


def marked_processes(marker: str) -> list[int]:
    """Processes that inherited the marker in their environment, zombies left out."""
    wanted, found = f"{MARKER}={marker}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile, or is somebody else's
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


class Ranks:
    """The processes of one attempt at a run.

    Attributes:
        pids: process numbers by rank.
        started: when, on the monotonic clock.
    """

    def __init__(self, mothers: Sequence[Mother], arguments: Sequence[str], folder: Path, log: Path) -> None:
        """Rank r is a child of mothers[r], writes its status into `folder`, and appends what it prints to `log`."""
        self._mothers, self._status = mothers, folder
        folder.mkdir(parents=True, exist_ok=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        shared = {
            "WORLD_SIZE": str(len(mothers)),
            "LOCAL_WORLD_SIZE": str(len(mothers)),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "IMAGENET_SWA_STATUS": str(folder),
        }
        places = [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(len(mothers))]
        self.started = time.monotonic()
        self.pids = [mother.fork(arguments, place, log) for mother, place in zip(mothers, places, strict=True)]

    @property
    def codes(self) -> list[int | None]:
        """Exit codes by rank, minus the signal where one killed it; None of what still runs."""
        for mother in set(self._mothers):
            mother.listen()
        return [mother.codes.get(pid) for mother, pid in zip(self._mothers, self.pids, strict=True)]

    def ask(self, number: int, ranks: Sequence[int]) -> None:
        """A signal to some ranks, at once, from somebody who wants the run to stop: who passes it on leaves a note."""
        (self._status / "asked").touch()
        self.send(number, ranks)

    def send(self, number: int, ranks: Sequence[int]) -> None:
        """A signal to some ranks, at once; without the note a TERM is the launcher's, whose other ranks were lost."""
        for rank in ranks:
            self._mothers[rank].send(number, self.pids[rank])

    def phase(self, rank: int) -> str:
        """What a rank says that it does: starting, training, batchnorm, evaluation, waiting to write, finishing."""
        return self._told_by(rank).get("phase", "starting")

    def last_words(self) -> tuple[str | None, ...]:
        """The one line that each rank had to say at its end."""
        return tuple(self._told_by(rank).get("message") for rank in range(len(self.pids)))

    def _told_by(self, rank: int) -> dict[str, Any]:
        try:
            return json.loads((self._status / f"rank-{rank}.json").read_text())
        except (OSError, ValueError):  # it has said nothing yet
            return {}

    def is_writing(self) -> bool:
        """Whether files are being written in the background."""
        return (self._status / "writing").exists()

    def wait(self, seconds: float, condition: Callable[[], bool] = lambda: False) -> bool:
        """Until the condition holds, or all have ended, for so long at most; returns whether the condition held."""
        until = time.monotonic() + seconds
        while None in self.codes and time.monotonic() < until:
            if condition():
                return True
            time.sleep(_LOOK_SECONDS)
        return False


def end_left_over(marker: str, spared: Sequence[int], seconds: float) -> list[int]:
    """Kill the processes with the marker, but those spared, that have not ended after so long; returns their numbers."""
    until = time.monotonic() + seconds
    while (pids := sorted(set(marked_processes(marker)) - set(spared))) and time.monotonic() < until:
        time.sleep(0.05)
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return pids


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
