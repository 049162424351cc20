"""Learning rates as pure functions of the step. Nothing to save, nothing to step.

`step` counts finished updates, 0 before the first; the paper's i is step + 1.
"""

import math
from dataclasses import dataclass

from imagenet_swa.config import SwaConfig
from imagenet_swa.config.training import ScheduleName


def cyclical_lr(step: int, *, cycle_steps: int, lr_max: float, lr_min: float) -> float:
    """Sec. 3.1: t(i) = (mod(i - 1, c) + 1) / c and alpha(i) = (1 - t) lr_max + t lr_min: linear from just under `lr_max` to
    exactly `lr_min`, then a jump back up.

    Args:
        step: finished updates.
        cycle_steps: c, updates per cycle.
    """
    _check(step, cycle_steps)
    t = (step % cycle_steps + 1) / cycle_steps
    return (1 - t) * lr_max + t * lr_min


def constant_lr(step: int, *, lr_max: float) -> float:
    """`lr_max` at every step. The cyclical formula with c = 1 would give `lr_min` throughout, so this is its own rule."""
    _check(step)
    return lr_max


def triangular_lr(step: int, *, cycle_steps: int, lr_max: float, lr_min: float) -> float:
    """The cycle of Fast Geometric Ensembling (Garipov et al. 2018, sec. 4), for sec. 3.5: with t as in `cyclical_lr`, from
    `lr_max` linearly to `lr_min` at t = 1/2 and back to `lr_max` at t = 1.
    """
    _check(step, cycle_steps)
    t = (step % cycle_steps + 1) / cycle_steps
    return (1 - 2 * t) * lr_max + 2 * t * lr_min if t <= 0.5 else (2 - 2 * t) * lr_min + (2 * t - 1) * lr_max


def cosine_lr(step: int, *, cycle_steps: int, start_step: int, budget_steps: int, lr_max: float) -> float:
    """Each cycle repeats a piece of one cosine annealing: lr_max / 2 (1 + cos(pi (start + mod(step, c)) / budget)).

    The paper's cycle for Shake-Shake (its appendix) has lr_max = 0.2, c = 100, start = 1600 and budget = 1800 epochs; a start
    of 0 and c = budget are the annealing itself.
    """
    _check(step, cycle_steps)
    if start_step + cycle_steps > budget_steps:
        raise ValueError(f"a cycle from step {start_step} to {start_step + cycle_steps} leaves the annealing of {budget_steps}")
    return lr_max / 2 * (1 + math.cos(math.pi * (start_step + step % cycle_steps) / budget_steps))


def three_part_lr(step: int, *, budget_steps: int, lr_max: float, lr_min: float) -> float:
    """The SGD baseline's rate (appendix): `lr_max` for half the budget, linear to `lr_min` at 0.9 of it, then `lr_min`. It falls
    with every step, in the authors' code with every epoch.
    """
    _check(step, budget_steps)
    share = min(max((step / budget_steps - 0.5) / 0.4, 0.0), 1.0)
    return (1 - share) * lr_max + share * lr_min


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When a run has which rate and when its weights are captured.

    Attributes:
        cycle_steps: c, updates from one capture to the next.
        budget_steps: updates in which a falling rate falls.
        start_step: where a cosine's cycle starts in its annealing.
    """

    name: ScheduleName
    cycle_steps: int
    budget_steps: int
    lr_max: float
    lr_min: float
    start_step: int = 0

    def learning_rate(self, step: int) -> float:
        """The rate of the update after `step` finished ones."""
        match self.name:
            case "cyclical":
                return cyclical_lr(step, cycle_steps=self.cycle_steps, lr_max=self.lr_max, lr_min=self.lr_min)
            case "constant":
                return constant_lr(step, lr_max=self.lr_max)
            case "triangular":
                return triangular_lr(step, cycle_steps=self.cycle_steps, lr_max=self.lr_max, lr_min=self.lr_min)
            case "cosine":
                return cosine_lr(
                    step,
                    cycle_steps=self.cycle_steps,
                    start_step=self.start_step,
                    budget_steps=self.budget_steps,
                    lr_max=self.lr_max,
                )
            case "three_part":
                return three_part_lr(step, budget_steps=self.budget_steps, lr_max=self.lr_max, lr_min=self.lr_min)

    def is_capture(self, step: int) -> bool:
        """Whether the weights after `step` finished updates are captured: mod(i, c) = 0 (Alg. 1), where the rate is lowest; in
        the middle of a triangular cycle.
        """
        _check(step, self.cycle_steps)
        return step > 0 and self.last_capture(step) == step

    def last_capture(self, step: int) -> int:
        """The latest step up to this one at which weights were captured, 0 if there was none."""
        _check(step, self.cycle_steps)
        at = self.cycle_steps // 2 if self.name == "triangular" else 0
        return max(step - (step - at) % self.cycle_steps, 0)


def make_schedule(swa: SwaConfig, *, steps_per_epoch: int) -> Schedule:
    """The settings in steps."""
    cycle_steps = swa.cycle_steps or swa.cycle_epochs * steps_per_epoch
    budget_steps = (swa.budget_epochs or swa.num_epochs) * steps_per_epoch
    start = swa.cosine_start_epoch
    return Schedule(
        name=swa.schedule,
        cycle_steps=cycle_steps,
        budget_steps=budget_steps,
        lr_max=swa.lr_max,
        lr_min=swa.lr_min,
        start_step=budget_steps - cycle_steps if start is None else start * steps_per_epoch,
    )


def _check(step: int, num_steps: int = 1) -> None:
    if step < 0:
        raise ValueError(f"step counts finished updates and cannot be negative, got {step}")
    if num_steps < 1:
        raise ValueError(f"a cycle or budget has at least 1 step, got {num_steps}")
