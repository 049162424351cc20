"""Learning rates as pure functions of the step. Nothing to save, nothing to step."""


def cyclical_lr(step: int, *, cycle_steps: int, lr_max: float, lr_min: float) -> float:
    """Learning rate of the update that follows `step` finished updates (sec. 3.1 with i = step + 1).

    t(i) = (mod(i - 1, c) + 1) / c and alpha(i) = (1 - t) lr_max + t lr_min: linear from just under `lr_max` to exactly
    `lr_min`, then a jump back up.

    Args:
        step: finished updates, 0 for the first.
        cycle_steps: c, updates per cycle.
    """
    _check(step, cycle_steps)
    t = (step % cycle_steps + 1) / cycle_steps
    return (1 - t) * lr_max + t * lr_min


def constant_lr(step: int, *, lr_max: float) -> float:
    """`lr_max` at every step. The cyclical formula with c = 1 would give `lr_min` throughout, so this is its own rule."""
    _check(step)
    return lr_max


def learning_rate(step: int, *, schedule: str, cycle_steps: int, lr_max: float, lr_min: float) -> float:
    """The rate that the named schedule, "cyclical" or "constant", gives the update after `step` finished ones."""
    if schedule == "cyclical":
        return cyclical_lr(step, cycle_steps=cycle_steps, lr_max=lr_max, lr_min=lr_min)
    if schedule == "constant":
        return constant_lr(step, lr_max=lr_max)
    raise ValueError(f"unknown schedule {schedule!r}; wanted 'cyclical' or 'constant'")


def is_capture(step: int, *, cycle_steps: int) -> bool:
    """Whether the weights after `step` finished updates go into the average: mod(i, c) = 0 (Alg. 1)."""
    _check(step, cycle_steps)
    return step > 0 and step % cycle_steps == 0


def _check(step: int, cycle_steps: int = 1) -> None:
    if step < 0:
        raise ValueError(f"step counts finished updates and cannot be negative, got {step}")
    if cycle_steps < 1:
        raise ValueError(f"cycle_steps must be at least 1, got {cycle_steps}")
