"""What a checkpoint costs: while training goes on, while it waits, and beside what people use instead."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from imagenet_swa.agreement import Wishes
from imagenet_swa.bench.measure import settle
from imagenet_swa.bench.trainee import Trainee
from imagenet_swa.checkpoint import TENSORS, Checkpoints, Snapshot
from imagenet_swa.files import flush
from imagenet_swa.outbox import Outbox

OURS, TORCH, ACCELERATE = "ours, training waits", "torch.save in place", "Accelerator.save_state in place"
_QUIET_TURNS = 2  # before a save, and as many after it
_LOOK_SECONDS = 0.001


@dataclass(frozen=True, kw_only=True)
class SavingRound:
    """One checkpoint behind training steps, one behind a clock, and one of each kind for which training waits; seconds.

    Attributes:
        copying: training stands still while the state is copied to host memory.
        held_up: by how much the steps during the write were slower than those before and after it, all together.
        writing: from the first byte made to the old checkpoint gone, behind training steps.
        step: one with nothing behind it.
        num_steps: steps during the write.
        pause: longest time for which the interpreter did not come back to a thread that sleeps a millisecond at a time.
        waiting: of each kind of saving, all of it while training waits.
    """

    copying: float
    held_up: float
    writing: float
    step: float
    num_steps: int
    pause: float
    waiting: dict[str, float]


class Saving:
    """Measures rounds; the checkpoints lie in a folder, which is the caller's to remove. For all ranks."""

    def __init__(self, trainee: Trainee, folder: Path, *, keep: int, say: Callable[[str], None]) -> None:
        self._trainee, self._runtime, self._folder = trainee, trainee.runtime, folder
        self._checkpoints = Checkpoints(folder / "checkpoints", keep)
        self._outbox = Outbox(max_failures=1, say=say, in_background=self._runtime.is_main)
        self._runtime.accelerator.register_for_checkpointing(_Average(trainee))

    def close(self) -> None:
        """End the thread that writes."""
        self._outbox.close(seconds=60)

    def round(self, number: int) -> SavingRound:
        """Raises OSError where the disk refuses a checkpoint."""
        copying, held_up, writing, step, num_steps = self._behind_steps()
        kinds = [(OURS, self._save_ours), (TORCH, self._save_with_torch), (ACCELERATE, self._save_with_accelerate)]
        turned = [*kinds[number % 3 :], *kinds[: number % 3]]
        waiting = {name: self._seconds(save) for name, save in turned}
        return SavingRound(
            copying=copying,
            held_up=held_up,
            writing=writing,
            step=step,
            num_steps=num_steps,
            pause=self._longest_pause(),
            waiting={name: waiting[name] for name, _ in kinds},
        )

    def sizes(self) -> dict[str, int]:
        """Bytes of each part of a checkpoint, on rank 0."""
        snapshot = self._trainee.snapshot()
        return {part: sum(tensor.nbytes for tensor in getattr(snapshot, part).values()) for part in TENSORS}

    def _behind_steps(self) -> tuple[float, float, float, float, int]:
        trainee = self._trainee
        quiet = [trainee.seconds_per_step(trainee.guarded_step) for _ in range(_QUIET_TURNS)]
        settle()
        start = time.perf_counter()
        letter = _Letter(self._checkpoints, trainee.snapshot())
        copying = time.perf_counter() - start
        start = time.perf_counter()
        self._put(letter)
        num_steps, goes_on = 0, True
        while goes_on:  # until all ranks have heard that rank 0 has written it; on a GPU they hear of a step in the next
            verdicts = trainee.guarded_step(Wishes(save=self._is_writing(letter)))
            num_steps += 1
            goes_on = not verdicts or verdicts[-1].save
        settle()
        seconds = time.perf_counter() - start
        self._runtime.on_main(self._outbox.wait)
        quiet += [trainee.seconds_per_step(trainee.guarded_step) for _ in range(_QUIET_TURNS)]
        step = median(quiet)
        return copying, seconds - num_steps * step, letter.seconds, step, num_steps

    def _longest_pause(self) -> float:
        letter = _Letter(self._checkpoints, self._trainee.snapshot())
        self._put(letter)
        longest = 0.0
        while self._is_writing(letter):
            start = time.perf_counter()
            time.sleep(_LOOK_SECONDS)
            longest = max(longest, time.perf_counter() - start)
        self._runtime.on_main(self._outbox.wait)
        return longest

    def _put(self, letter: "_Letter") -> None:
        if self._runtime.is_main:
            self._outbox.put("checkpoint", letter.write, retry=True)

    def _is_writing(self, letter: "_Letter") -> bool:
        return self._runtime.is_main and self._outbox.failure is None and not letter.is_written.is_set()

    # ------------------------------------------------------------------------------------------- training waits

    def _seconds(self, save: Callable[[], list[Path]]) -> float:
        """How long it takes until all ranks go on; what it left in the system's cache is on the disk before the next begins."""
        self._runtime.barrier()
        settle()
        start = time.perf_counter()
        written = save()
        self._runtime.barrier()
        seconds = time.perf_counter() - start
        for path in written if self._runtime.is_main else ():
            flush(path)
        self._runtime.barrier()
        return seconds

    def _save_ours(self) -> list[Path]:
        snapshot = self._trainee.snapshot()
        self._runtime.on_main(lambda: self._checkpoints.save(snapshot))
        return []

    def _save_with_torch(self) -> list[Path]:
        path = self._folder / "torch.pt"
        if self._runtime.is_main:
            torch.save(self._trainee.in_place(), path)
        return [path]

    def _save_with_accelerate(self) -> list[Path]:
        folder = self._folder / "accelerate"
        self._runtime.accelerator.save_state(str(folder))
        return [path for path in folder.iterdir() if path.is_file()]


class _Letter:
    """A checkpoint to write, and how long that took."""

    def __init__(self, checkpoints: Checkpoints, snapshot: Snapshot) -> None:
        self._checkpoints, self._snapshot = checkpoints, snapshot
        self.is_written = threading.Event()
        self.seconds = 0.0

    def write(self) -> None:
        start = time.perf_counter()
        self._checkpoints.save(self._snapshot)
        self.seconds = time.perf_counter() - start
        self.is_written.set()


class _Average:
    """The average, as Accelerate wants what it is to save as well."""

    def __init__(self, trainee: Trainee) -> None:
        self._trainee = trainee

    def state_dict(self) -> dict[str, Any]:
        return self._trainee.state.average.state()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError  # Accelerate wants the method to be there; the bench loads nothing
