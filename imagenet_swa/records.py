"""What a run writes down while it runs: metrics.jsonl, train.log, the terminal, trackers. Main process only."""

import json
import math
import os
import resource
import sys
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from imagenet_swa.config import Config, InputError
from imagenet_swa.files import flush, write_atomically
from imagenet_swa.runtime import Runtime

T = TypeVar("T")


class Records:
    """Lines for people and machines. Every method may be called on every rank; only rank 0 writes."""

    def __init__(self, folder: Path, runtime: Runtime) -> None:
        self._folder = folder
        self._runtime = runtime
        self._unwritten: dict[str, list[str]] = {"train.log": [], "metrics.jsonl": []}  # lines that the disk refused
        self._lock = threading.Lock()  # the thread that writes checkpoints says things too
        self._console = _Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """A line on the terminal and, with the time, in train.log."""
        if self._runtime.is_main:
            with suppress(OSError):  # a terminal that has gone, a log on a full disk: no reason to end a run
                self._console.print(text, markup=False)
            self._append("train.log", f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}")

    def log(self, kind: str, *, step: int, **values: Any) -> None:
        """A line of metrics.jsonl: the kind of line, the step, and the values, null for one that is not finite; numbers go to
        the trackers too.
        """
        if self._runtime.is_main:
            # JSON has no infinity and no NaN.
            sayable = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
            self._append("metrics.jsonl", json.dumps({"kind": kind, "step": step, **sayable}))
        # An evaluation's curve is that of one network: evaluation/swa/top1.
        prefix = f"{kind}/{values['name']}" if "name" in values else kind
        numbers = {f"{prefix}/{name}": value for name, value in values.items() if isinstance(value, int | float)}
        self._runtime.accelerator.log(numbers, step=step)

    def forget_after(self, step: int, evaluated: Collection[tuple[str, int]] = ()) -> list[dict[str, Any]]:
        """Drop the lines of metrics.jsonl that a resumed run is about to write again: those of later steps, and of evaluations
        other than `evaluated`, (name, step) each. Returns the rest.
        """
        path = self._folder / "metrics.jsonl"
        if not (self._runtime.is_main and path.exists()):
            return []
        lines = [line for line in path.read_text(errors="replace").splitlines() if _step_of(line) <= step]
        found = [(line, json.loads(line)) for line in lines]
        kept = [
            (line, values)
            for line, values in found
            if values.get("kind") != "evaluation" or (values.get("name"), values["step"]) in evaluated
        ]
        write_atomically(path, "".join(line + "\n" for line, _ in kept))
        return [values for _, values in kept]

    def flush(self) -> None:
        """Wait until all lines are on the disk. Raises OSError where it refuses some."""
        if self._runtime.is_main:
            for name in self._unwritten:
                with self._lock:
                    self._write(name)
                flush(self._folder / name)  # training may go on saying things meanwhile

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator["Ticker"]:
        """A progress bar with the time left while the block runs; nothing where the output is no terminal."""
        if not (self._runtime.is_main and sys.stderr.isatty()):
            yield Ticker(None, None)
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
        with Progress(*columns, *times, console=self._console, transient=True) as bar:
            yield Ticker(bar, bar.add_task(title, total=total, note=""))

    def _append(self, name: str, line: str) -> None:
        with self._lock:
            self._unwritten[name].append(line)
            with suppress(OSError):  # whoever saves a checkpoint hears of it
                self._write(name)

    def _write(self, name: str) -> None:
        """Append the lines that wait, whole or not at all."""
        path, text = self._folder / name, "".join(line + "\n" for line in self._unwritten[name]).encode()
        with path.open("ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                rest = memoryview(text)
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError as error:
                os.ftruncate(file.fileno(), size)
                raise OSError(error.errno, error.strerror, str(path)) from None
        self._unwritten[name].clear()


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Whoever read the output has gone; rich would end the program."""


class Ticker:
    """Moves a progress bar, if there is one."""

    def __init__(self, bar: Progress | None, task: Any) -> None:
        self._bar, self._task = bar, task

    def advance(self, amount: int = 1) -> None:
        """So much more is done."""
        if self._bar is not None:
            self._bar.advance(self._task, amount)

    def follow(self, stream: Iterable[T]) -> Iterator[T]:
        """The stream's items; the bar moves after each."""
        for item in stream:
            yield item
            self.advance()

    def note(self, text: str) -> None:
        """What stands behind the bar."""
        if self._bar is not None:
            self._bar.update(self._task, note=text)


@contextmanager
def no_progress(_total: int) -> Iterator[Ticker]:
    """What shows no bar."""
    yield Ticker(None, None)


def claim_folder(config: Config, runtime: Runtime) -> None:
    """Create the run folder; with `resume: never`, refuse one that holds a run."""
    taken = runtime.from_main((config.output / "config.yaml").exists() if runtime.is_main else None)
    if taken and config.resume == "never":
        raise InputError(f"{config.output} already holds a run and resume is never; choose another output, or resume auto")
    runtime.on_main(partial(_make_folder, config.output))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot create the run folder {folder}: {error.strerror}") from None


def _step_of(line: str) -> float:
    """The step of a line; a line that a killed run left half-written counts as never reached."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")


def memory_mib(device: torch.device) -> float:
    """Most memory used so far, MiB: of the GPU, or of this process where there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
