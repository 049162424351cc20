"""Real processes below launch/supervise.py: a stand-in for a rank, and what must be true after every ending."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from conftest import PROJECT

# python RANK BEHAVIOUR_OF_RANK_0 BEHAVIOUR_OF_RANK_1 ...; notes beginning, signals and restart in the file `note-RANK` of $NOTES.
RANK = """
import os, signal, sys, time
from pathlib import Path
from imagenet_swa import status

rank, restart = int(os.environ.get("RANK", 0)), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
words = sys.argv[1 + rank].split("|")
signals = []

def note(*words):
    with (Path(os.environ["NOTES"]) / f"note-{rank}").open("a") as file:
        print(*words, file=file)

def hear(number, _):
    signals.append(number)
    note(signal.Signals(number).name)
    if words[0] == "asked":
        note("by launcher:", status.by_launcher())
        if not status.by_launcher():
            end(1, "rank 1 has gone", lost_others=True)

def end(code, message, **more):
    status.end(code, message, **more)
    sys.exit(code)

if words[0] in ("late", "deaf first"):
    if words[0] == "deaf first":
        status.begin()
    note("up")
    time.sleep(1)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
    signal.signal(number, hear)
if words[0] == "unborn":
    sys.exit(3)
status.begin()
note("begun", restart)
status.phase("training")
if words[0] == "end":
    end(int(words[1]), words[2] or None, restart_may_help="again" in words)
if words[0] == "lost":
    time.sleep(0.3)
    end(1, words[1], lost_others=True)
if words[0] in ("crash", "crash once") and (words[0] == "crash" or restart == 0):
    os.kill(os.getpid(), signal.SIGKILL)
if words[0] == "crash once" or (words[0] == "wait once" and restart > 0):
    end(0, None)
deadline = time.monotonic() + 30
while time.monotonic() < deadline and (not signals or words[0] in ("deaf", "asked")):
    time.sleep(0.02)
end(85, "imagenet-swa: stopped by " + signal.Signals(signals[0]).name) if signals else end(1, "no signal came")
"""

# python -c LAUNCHER N RANK BEHAVIOUR...; like accelerate's: any failure becomes 1, after a word of its own.
LAUNCHER = """
import os, subprocess, sys
number = int(sys.argv[1])
ranks = [
    subprocess.Popen(
        [sys.executable, *sys.argv[2:]],
        env=os.environ | {"RANK": str(r), "LOCAL_RANK": str(r), "LOCAL_WORLD_SIZE": str(number)},
        start_new_session=True,
    )
    for r in range(number)
]
codes = [rank.wait() for rank in ranks]
if any(codes):
    print("ChildFailedError: noise", file=sys.stderr)
    sys.exit(1)
"""


def processes_with(marker: str) -> list[int]:
    """Ids of running processes that have the text in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if marker.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def wait_until(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Wait for something that must come soon."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"{what}: not so after {seconds} s")
        time.sleep(0.02)


class Launched:
    """A command with everything that it starts; temporary files go to `folder/tmp`, notes of stand-in ranks to `folder`."""

    def __init__(self, folder: Path, command: Sequence[str | Path], **environment: str) -> None:
        self.folder, self.marker = folder, f"SWA_TEST_{uuid.uuid4().hex}"
        (folder / "tmp").mkdir(exist_ok=True)
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        plain = {
            "PATH": path,
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(PROJECT),
        }
        ours = {"TMPDIR": str(folder / "tmp"), "NOTES": str(folder), self.marker: "1"}
        self.process = subprocess.Popen(
            list(map(str, command)),
            cwd=PROJECT,
            env=os.environ | plain | ours | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def notes(self, rank: int = 0) -> list[str]:
        """Lines that a stand-in rank wrote."""
        path = self.folder / f"note-{rank}"
        return path.read_text().splitlines() if path.exists() else []

    def wait_for(self, line: str, *ranks: int) -> None:
        """Wait until these ranks have written the line."""
        wait_until(lambda: all(line in self.notes(rank) for rank in ranks), f"{line!r} of ranks {ranks}")

    def send(self, number: int) -> None:
        """A signal for the command alone."""
        self.process.send_signal(number)

    def finish(self, seconds: float = 60) -> tuple[int, list[str]]:
        """Exit code and lines on stderr, of an end after which no process and no temporary file is left."""
        try:
            _, screen = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            for pid in processes_with(self.marker):
                os.kill(pid, signal.SIGKILL)
            pytest.fail(f"still running after {seconds} s\n{self.process.communicate()[1][-4000:]}")
        assert processes_with(self.marker) == [], screen
        left = {path.name for path in (self.folder / "tmp").iterdir()}
        assert left <= {f"torchinductor_{os.getuid()}"}, screen  # compiled kernels are for the next run too
        return self.process.returncode, screen.splitlines()
