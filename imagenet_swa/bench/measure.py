"""The measurement itself: candidates take turns, prefetched batches are drained, then a block is timed."""

import gc
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from imagenet_swa.bench.alternatives import Mode, Stream
from imagenet_swa.bench.results import Block
from imagenet_swa.config import InputError


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A loader in one mode, ready to be started."""

    mode: Mode
    name: str
    output: str
    open: Callable[[int], Stream]
    """A stream of batches for a round; longer than a block and its warm-up."""
    capacity: int
    """Upper bound of the batches that may be ready before the first is asked for."""


def cpu_seconds() -> float:
    """CPU time so far of this process and of all its descendants, running or ended.

    Workers that still run are not among what the system reports for children, only those that were waited for.
    """
    ended = os.times()
    total = time.process_time() + ended.children_user + ended.children_system
    return total + sum(_cpu_seconds_of_descendants())


def _cpu_seconds_of_descendants() -> Iterator[float]:
    """Of each that runs, with what it waited for; nothing on systems without /proc."""
    children: dict[int, list[tuple[int, int]]] = {}  # of each process: their numbers and clock ticks
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_bytes().rpartition(b") ")[2].split()  # what is before may hold spaces, it is the program's name
        except OSError:  # ended meanwhile
            continue
        ticks = sum(int(field) for field in fields[11:15])  # utime, stime, and the same of ended children
        children.setdefault(int(fields[1]), []).append((int(path.parent.name), ticks))
    waiting = [os.getpid()]
    while waiting:
        for process, ticks in children.get(waiting.pop(), ()):
            waiting.append(process)
            yield ticks / os.sysconf("SC_CLK_TCK")


def settle() -> None:
    """Wait until a GPU, where there is one, has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_block(
    stream: Stream, *, num_drained: int, num_timed: int, clock: Callable[[], float], cpu_clock: Callable[[], float]
) -> tuple[int, float, float]:
    """Images, seconds and CPU seconds of `num_timed` batches, after `num_drained` that nobody counts.

    What a loader had prepared before the clock started costs nothing within the block: once as many batches are taken as
    may have lain ready, each further one was worked for.

    Raises:
        EOFError: the stream ends too early.
    """

    def take(number: int) -> int:
        num_images = 0
        for _ in range(number):
            batch = next(stream, None)
            if batch is None:
                raise EOFError("its stream ended within the block")
            num_images += len(batch[0])
        return num_images

    take(num_drained)
    settle()
    start, cpu_start = clock(), cpu_clock()
    num_images = take(num_timed)
    settle()
    return num_images, clock() - start, cpu_clock() - cpu_start


def rotated(candidates: Sequence[Candidate], number: int) -> list[Candidate]:
    """The candidates in their order of round `number`: each goes first in turn."""
    start = number % max(1, len(candidates))
    return [*candidates[start:], *candidates[:start]]


def measure(
    candidates: Sequence[Candidate],
    *,
    rounds: int,
    num_timed: int,
    record: Callable[[Block], None],
    fail: Callable[[Candidate, str], None],
    clock: Callable[[], float] = time.perf_counter,
    cpu_clock: Callable[[], float] = cpu_seconds,
) -> None:
    """Give every candidate a block of `num_timed` batches per round; one that fails is left out from there on.

    A loader is built for its block and torn down after it, so that none works, or holds the caches, while another is timed;
    paused ones would first fill up what they prefetch. Round 0 is not recorded: it brings the files into memory, the
    libraries too, and writes what some loaders read.
    """
    running = list(candidates)
    for number in range(rounds + 1):
        for candidate in rotated(running, number):
            stream = None
            try:
                stream = candidate.open(number)
                measured = time_block(
                    stream, num_drained=candidate.capacity, num_timed=num_timed, clock=clock, cpu_clock=cpu_clock
                )
            except Exception as error:  # whatever somebody's loader raises
                running.remove(candidate)
                fail(candidate, f"failed: {one_line(error)}")
                continue
            finally:
                if stream is not None:
                    stream.close()
                del stream
                gc.collect()
            if number:
                num_images, seconds, cpu = measured
                who = {"mode": candidate.mode, "candidate": candidate.name, "round": number}
                record(Block(**who, num_images=num_images, seconds=seconds, cpu_seconds=cpu))


def empty_folder(folder: Path) -> Path:
    """For what has to be written to be measured. Its name is fixed, so that a run removes what a killed one left."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}; set bench.output to another") from None
    return folder


def one_line(error: Exception) -> str:
    """An error's message, or its kind where it has none, as a line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
