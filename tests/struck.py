"""Runs that tests strike at a chosen moment: real processes, each with a spy in it that notes its batches and can kill it."""

import json
import os
import shutil
import signal
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import PROJECT

from imagenet_swa.selftest.ranks import Mother, Ranks, end_left_over
from imagenet_swa.selftest.whole import left_overs

PATIENCE = 240.0  # seconds that a start may take on a busy machine
NEVER = "nowhere 0 SIGKILL -"

# Found by Python before any other module. In a process whose environment names SPY, a folder, each batch that a loader yields is
# noted in rank-R.jsonl with the digest of its pixels; SPY_BLOW "WHERE NUMBER SIGNAL RANKS" makes those ranks send themselves a
# signal when they come to something for the (NUMBER + 1)-th time: a batch in a phase, a phase, the middle of a file that is being
# written. SPY_NAP makes each batch take so many seconds more.
SPY = """
import dataclasses, hashlib, importlib.abc, importlib.machinery, json, os, signal, sys, time
from collections import Counter

counts = Counter()


def come_to(where):
    number, counts[where] = counts[where], counts[where] + 1
    place, wanted, name, ranks = os.environ.get("SPY_BLOW", "nowhere 0 SIGKILL -").split()
    is_now = (place, int(wanted)) == (where, number) and os.environ.get("RANK", "0") in ranks.split(",")
    if is_now:
        note(signal=name, phase=where)
    return signal.Signals[name] if is_now else None


def strike(number):
    if number is not None:
        open(f"{os.environ['IMAGENET_SWA_STATUS']}/asked", "w").close()  # as launch/supervise.py does before it passes one on
        os.kill(os.getpid(), number)


def note(**what):
    what["time"] = time.monotonic()
    with open(f"{os.environ['SPY']}/rank-{os.environ.get('RANK', '0')}.jsonl", "a") as file:
        file.write(json.dumps(what) + "\\n")


class Loader:
    def __init__(self, loader):
        self.loader = loader

    def __getattr__(self, name):
        return getattr(self.loader, name)

    def training_stream(self, batches, *, epoch):
        return noted(self.loader.training_stream(batches, epoch=epoch), epoch)

    def evaluation_stream(self, batches):
        return noted(self.loader.evaluation_stream(batches), None)


def noted(stream, epoch):
    from imagenet_swa import status

    for batch in stream:
        phase = status._record["phase"]
        pixels = [hashlib.sha256(image.contiguous().numpy().tobytes()).hexdigest()[:16] for image in batch.images]
        note(phase=phase, epoch=epoch, indices=batch.indices.tolist(), pixels=pixels)
        strike(come_to(phase.replace(" ", "-")))
        time.sleep(float(os.environ.get("SPY_NAP", "0")))
        yield batch


def patch_loaders(module):
    original = module.build_loaders

    def build_loaders(*arguments):
        loaders = original(*arguments)
        return dataclasses.replace(loaders, train=Loader(loaders.train), val=Loader(loaders.val))

    module.build_loaders = build_loaders


def patch_status(module):
    original = module.phase

    def phase(name):
        original(name)
        strike(come_to("begin-" + name.replace(" ", "-")))

    module.phase = phase


def patch_files(module):
    original = module.write_flushed

    def write_flushed(path, content):
        number = come_to("file-" + path.name.removesuffix(".partial"))
        if number is not None:
            path.write_bytes(content[: len(content) // 2])
            strike(number)
        return original(path, content)

    module.write_flushed = write_flushed


PATCHES = {"data.loaders": patch_loaders, "status": patch_status, "files": patch_files}


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        patch = PATCHES.get(name.removeprefix("imagenet_swa."))
        spec = importlib.machinery.PathFinder.find_spec(name, path) if patch and path else None
        if spec is not None:
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (execute(module), "SPY" in os.environ and patch(module))
        return spec


sys.meta_path.insert(0, Finder())
if "IMAGENET_SWA_SELFTEST" in os.environ:  # its semaphores can be told from those of others
    from multiprocessing import process

    process.current_process()._config["semprefix"] = "/" + os.environ["IMAGENET_SWA_SELFTEST"]
"""

SHARED_MEMORY = Path("/dev/shm")


class SpiedMother(Mother):
    """Its children have the spy in them, and besides the environment that is asked for."""

    more: dict[str, str]

    def fork(self, arguments: Sequence[str], environment: dict[str, str], log: Path) -> int:
        return super().fork(arguments, environment | self.more, log)


@dataclass
class Arena:
    """Where runs are started and struck; a folder of its own for each run.

    After each end no process of the run is left, no shared memory, and no temporary file.
    """

    folder: Path
    mother: SpiedMother
    marker: str

    def start(self, run: Path, num_processes: int, flags: Sequence[str], blow: str = "", **more: str) -> "Struck":
        """Start the ranks of a run; `blow` as SPY_BLOW wants it."""
        spied = self.folder / "spied" / run.name
        shutil.rmtree(spied, ignore_errors=True)
        (spied / "tmp").mkdir(parents=True)
        self.mother.more = {"SPY": str(spied), "TMPDIR": str(spied / "tmp"), "SPY_BLOW": blow or NEVER, "SPY_NAP": "0"} | more
        log = self.folder / "logs" / f"{run.name}.log"
        return Struck(self, run, [self.mother] * num_processes, ["train", *flags, f"--output={run}"], spied, log)

    def finish(self, run: Path, num_processes: int, flags: Sequence[str], **more: str) -> "Struck":
        """Start a run and see it finish."""
        start = self.start(run, num_processes, flags, **more)
        codes = start.end()
        assert codes == [0] * num_processes, f"{codes}\n{start.screen()}"
        assert left_overs(run) == []
        return start


class Struck(Ranks):
    """The processes of one start of a run."""

    def __init__(self, arena: Arena, run: Path, mothers: Sequence[Mother], arguments: list[str], spied: Path, log: Path) -> None:
        self._arena, self.run, self._spied, self._log = arena, run, spied, log
        self.status_folder = spied / "status"
        self._old_screen = log.read_text(errors="replace") if log.exists() else ""
        super().__init__(mothers, arguments, self.status_folder, log)

    def notes(self, rank: int = 0, phase: str | None = None) -> list[dict[str, Any]]:
        """What the spy noted of this start: all, or the batches of a phase."""
        path = self._spied / f"rank-{rank}.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        notes = [json.loads(line) for line in lines if line.endswith("\n")]
        return notes if phase is None else [note for note in notes if note["phase"] == phase and "indices" in note]

    def until(self, condition: Callable[["Struck"], object]) -> "Struck":
        """Wait for something that a running run comes to."""
        self.wait(PATIENCE, lambda: bool(condition(self)))
        assert condition(self) and None in self.codes, f"ended with {self.codes}\n{self.screen()}"
        return self

    def kill(self) -> list[int | None]:
        """SIGKILL to all ranks that still run; exit codes of all."""
        self.send(signal.SIGKILL, range(len(self.pids)))
        return self.end()

    def kill_after_blow(self) -> list[int | None]:
        """Wait for the blow and kill the other ranks; exit codes of all."""
        self.wait(PATIENCE, lambda: any(code is not None for code in self.codes))
        return self.kill()

    def send_to_groups(self, number: int) -> None:
        """A signal to the process groups of all ranks, as a terminal sends it."""
        for pid in self.pids:
            os.killpg(pid, number)

    def end(self, seconds: float = PATIENCE) -> list[int | None]:
        """Exit codes of all ranks, once they and all that they started have ended."""
        self.wait(seconds)
        codes = self.codes
        if None in codes:
            self.send(signal.SIGKILL, range(len(self.pids)))
            pytest.fail(f"still running after {seconds} s: {codes}\n{self.screen()}")
        left = end_left_over(self._arena.marker, [self._arena.mother.pid], 15)
        assert left == [], self.screen()
        assert shared_memory_of(self._arena.marker) == []
        if not any(code == -signal.SIGKILL for code in codes):
            assert list((self._spied / "tmp").iterdir()) == []
        return codes

    def screen(self) -> str:
        """What all ranks of this start printed, and what a supervisor would print for them."""
        told = [json.loads(path.read_text())["message"] or "" for path in sorted(self.status_folder.glob("rank-*.json"))]
        return "\n".join([self._log.read_text(errors="replace").removeprefix(self._old_screen), *told])


def shared_memory_of(marker: str) -> list[str]:
    """Names of what processes with the spy left in shared memory."""
    return [path.name for path in SHARED_MEMORY.glob(f"*{marker}*")]


@contextmanager
def arena(folder: Path) -> Iterator[Arena]:
    """A place for runs below the folder; no GPU, one thread."""
    spy, marker = folder / "spy", uuid.uuid4().hex
    spy.mkdir()
    (spy / "sitecustomize.py").write_text(SPY)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{spy}:{PROJECT}", "SPY": str(spy)}.items():
            patch.setenv(name, value)
        mother = SpiedMother(marker, hash_seed=1)
    with mother:
        yield Arena(folder, mother, marker)
