"""What all ranks of a run tell each other in each step: one small all-reduce, read a step later on a GPU."""

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from imagenet_swa.config import StopRequested
from imagenet_swa.runtime import Runtime

T = TypeVar("T")


@dataclass(frozen=True)
class Wishes:
    """What this rank wants from all."""

    stop: bool = False
    save: bool = False
    give_up: bool = False


@dataclass(frozen=True)
class Verdict:
    """What all ranks said about a step, the same on every rank.

    Attributes:
        loss: sum of what each rank gave.
        num_left_out: bad images on all ranks.
        num_not_finite: ranks whose loss or gradient was not finite.
        stop, save, give_up: whether any rank wished it.
    """

    loss: float
    num_left_out: int
    num_not_finite: int
    stop: bool
    save: bool
    give_up: bool


GOES_ON = "the same command goes on"
_LEFT_OUT, _NOT_FINITE = 1, 2  # places in the vector, which has the order of `Verdict`


class Agreement:
    """The votes of the steps whose verdicts have not been read yet.

    Reading the newest verdict would make the host wait for the GPU in each step. With `lag` 1 the verdict of a step is read
    after the next one has been launched.
    """

    def __init__(self, runtime: Runtime, *, lag: int) -> None:
        self._runtime, self._lag = runtime, lag
        self._votes: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque()
        self._poison = torch.zeros((), device=runtime.device)

    def vote(
        self,
        wishes: Wishes,
        *,
        loss: torch.Tensor | None = None,
        num_left_out: int = 0,
        is_finite: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Add this rank's vote on a step to the others'; returns their sum, (6,) float64 on the device, unread."""
        numbers = torch.tensor([0, num_left_out, 0, wishes.stop, wishes.save, wishes.give_up], dtype=torch.float64)
        device = self._runtime.device
        vector = numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers
        if loss is not None:
            vector[0] = loss
        if is_finite is not None:
            vector[_NOT_FINITE] = (~is_finite).double()
        vector = self._runtime.sum(vector)
        self._poison = torch.maximum(self._poison, (vector[_NOT_FINITE] > 0).float())
        self._votes.append(_read_later(vector))
        return vector

    @property
    def poison(self) -> torch.Tensor:
        """() on the device: 1 from the first step on that was not finite on any rank. Fused optimizers skip their update where
        this is their `found_inf`.
        """
        return self._poison

    def verdicts(self, *, all_of_them: bool = False) -> list[Verdict]:
        """Those not read yet, oldest first, but the last `lag`; waits for them."""
        found = []
        while len(self._votes) > (0 if all_of_them else self._lag):
            vector, event = self._votes.popleft()
            if event is not None:
                event.synchronize()
            loss, num_left_out, num_not_finite, *wishes = vector.tolist()
            found.append(Verdict(loss, int(num_left_out), int(num_not_finite), *(wish > 0 for wish in wishes)))
        return found


def share_of_good(vector: torch.Tensor, num_images: int) -> torch.Tensor:
    """num_images / images that were not left out, () on the device: what turns a sum over those into their mean."""
    return num_images / (num_images - vector[_LEFT_OUT])


def _read_later(vector: torch.Tensor) -> tuple[torch.Tensor, "torch.cuda.Event | None"]:
    if vector.device.type != "cuda":
        return vector, None
    host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
    host.copy_(vector, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event


def until_stopped(items: Iterable[T], num_rounds: int, runtime: Runtime, *, what: str, alone: bool = False) -> Iterator[T]:
    """The items of this rank, at most `num_rounds`, which is the same on all ranks; after each round they agree whether to go
    on. `alone`: without the others. `what` this rank does, others who wait for it are told.

    Raises:
        StopRequested: on every rank in the same round, which is that of the request or the one after it.
    """
    agreement = None if alone else Agreement(runtime, lag=int(runtime.device.type == "cuda"))
    rounds = iter(items)
    for number in range(num_rounds):
        if (item := next(rounds, None)) is not None:
            yield item
        stop = runtime.wants_to_stop(f"{what}, batch {number + 1}")
        if agreement is not None:
            agreement.vote(Wishes(stop=stop))
            stop = any(verdict.stop for verdict in agreement.verdicts())
        if stop:
            raise StopRequested(f"{why_stopped(runtime)} in {what}; {GOES_ON}")
    yield from rounds  # lets a stream come to its end


def why_stopped(runtime: Runtime) -> str:
    """What this rank or any other was asked to stop by."""
    return f"by {runtime.stop.reason or 'a request to another process'}"
