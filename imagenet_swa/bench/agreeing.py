"""What the guards cost in a step: the agreement of the ranks, and the look at the gradients."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from imagenet_swa.agreement import Agreement, Wishes
from imagenet_swa.bench.measure import settle
from imagenet_swa.bench.trainee import Trainee
from imagenet_swa.stepper import are_finite

_VOTES, _CHECKS = 50, 5  # in a turn


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A step without and with guards, one after the other, and their parts alone; seconds of each.

    Attributes:
        plain, guarded: a whole step.
        agreement: a vote and the verdict on it, for which a step on a GPU does not wait.
        check: whether all gradients are finite.
    """

    plain: float
    guarded: float
    agreement: float
    check: float


def measure_turn(trainee: Trainee, number: int) -> Turn:
    """One turn; the order of the two kinds of steps changes from turn to turn. For all ranks."""
    steps: list[tuple[str, Callable[[], object]]] = [("plain", trainee.plain_step), ("guarded", trainee.guarded_step)]
    seconds = {name: trainee.seconds_per_step(step) for name, step in (steps if number % 2 else steps[::-1])}
    gradients = trainee.gradients()
    agreement = Agreement(trainee.runtime, lag=int(trainee.runtime.device.type == "cuda"))
    loss = torch.zeros((), device=trainee.runtime.device)

    def agree() -> None:
        agreement.vote(Wishes(), loss=loss, is_finite=loss.isfinite())
        agreement.verdicts()

    # The first of each finds what the steps left of the processor's caches.
    return Turn(**seconds, agreement=_seconds_each(agree, _VOTES), check=_seconds_each(lambda: are_finite(gradients), _CHECKS))


def _seconds_each(call: Callable[[], object], number: int) -> float:
    settle()
    start = time.perf_counter()
    for _ in range(number):
        call()
    settle()
    return (time.perf_counter() - start) / number
