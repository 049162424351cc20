"""Learning rates against Alg. 1 in exact arithmetic, and where captures fall."""

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagenet_swa.config import SwaConfig
from imagenet_swa.schedule import Schedule, constant_lr, cyclical_lr, make_schedule

LR_MAX, LR_MIN = 1e-3, 1e-5


def rate_of_algorithm_1(i: int, c: int) -> Fraction:
    """alpha(i) of sec. 3.1 for i = 1, 2, ... from the given floats without any rounding."""
    t = Fraction((i - 1) % c + 1, c)
    return (1 - t) * Fraction(LR_MAX) + t * Fraction(LR_MIN)


def schedule(name: Any, cycle_steps: int, **changes: Any) -> Schedule:
    return Schedule(
        **{"name": name, "cycle_steps": cycle_steps, "budget_steps": 100, "lr_max": LR_MAX, "lr_min": LR_MIN} | changes
    )


def cyclical(step: int, cycle_steps: int) -> float:
    return schedule("cyclical", cycle_steps).learning_rate(step)


def is_capture(step: int, cycle_steps: int) -> bool:
    return schedule("cyclical", cycle_steps).is_capture(step)


@pytest.mark.parametrize("cycle_steps", [1, 2, 5005])
def test_cyclical_rate_is_algorithm_1(cycle_steps: int):
    """The update after `step` finished ones has the rate alpha(step + 1) of the paper, to rounding."""
    for step in range(2 * cycle_steps + 3):
        wanted = rate_of_algorithm_1(step + 1, cycle_steps)
        # Four roundings, each of at most half an ulp of a number not above lr_max.
        assert abs(Fraction(cyclical(step, cycle_steps)) - wanted) <= 4 * Fraction(2) ** -53 * Fraction(LR_MAX)


def test_cycle_of_four_by_hand():
    """Four steps from 1 to 0 go 3/4, 1/2, 1/4, 0 and jump back: just under the maximum first, the minimum last."""
    rates = [cyclical_lr(step, cycle_steps=4, lr_max=1.0, lr_min=0.0) for step in range(6)]
    assert rates == [0.75, 0.5, 0.25, 0.0, 0.75, 0.5]


@given(
    cycle_steps=st.integers(1, 100_000),
    cycle=st.integers(1, 50),
    rates=st.tuples(st.floats(0, 10), st.floats(0, 10)).map(sorted),
)
def test_update_before_a_capture_has_exactly_the_minimum(cycle_steps: int, cycle: int, rates: list[float]):
    """The last update of every cycle is made at lr_min to the last bit, whatever the cycle and the rates."""
    lr_min, lr_max = rates
    last_step = cycle * cycle_steps - 1
    assert cyclical_lr(last_step, cycle_steps=cycle_steps, lr_max=lr_max, lr_min=lr_min) == lr_min
    assert is_capture(last_step + 1, cycle_steps=cycle_steps)


@pytest.mark.parametrize("cycle_steps", [2, 3, 5005])
def test_rate_falls_strictly_within_a_cycle_and_jumps_between_cycles(cycle_steps: int):
    """Within a cycle each rate is below the one before and below lr_max; the next cycle starts like the first."""
    first, second = ([cyclical(start + k, cycle_steps) for k in range(cycle_steps)] for start in (0, cycle_steps))
    assert all(later < earlier for earlier, later in itertools.pairwise(first))
    assert LR_MIN < first[0] < LR_MAX
    assert second == first


@given(cycle_steps=st.integers(1, 60))
def test_captures_are_the_multiples_of_the_cycle(cycle_steps: int):
    """Captures follow the updates cycle_steps, 2 cycle_steps, ... and no others; step 0, the pretrained weights, is none."""
    captures = {step for step in range(241) if is_capture(step, cycle_steps=cycle_steps)}
    assert captures == set(range(cycle_steps, 241, cycle_steps))


@given(step=st.integers(0, 10**9), cycle_steps=st.integers(1, 10**6))
def test_constant_rate_is_the_maximum_always(step: int, cycle_steps: int):
    """The constant schedule gives lr_max at every step, also where the cyclical formula would give lr_min."""
    assert schedule("constant", cycle_steps).learning_rate(step) == constant_lr(step, lr_max=LR_MAX) == LR_MAX


# ------------------------------------------------------------------------------------------------- the other schedules


@pytest.mark.parametrize("steps_per_epoch", [1, 7, 390])
def test_shake_shakes_cycle_is_the_papers_formula(steps_per_epoch: int):
    """At the start of every epoch the rate is 0.1 (1 + cos(pi (1600 + epoch mod 100) / 1800)), the appendix's."""
    swa = SwaConfig(
        num_epochs=300,
        schedule="cosine",
        lr_max=0.2,
        lr_min=0,
        cycle_epochs=100,
        budget_epochs=1800,
        cosine_start_epoch=1600,
        report_epochs=(),
    )
    cycle = make_schedule(swa, steps_per_epoch=steps_per_epoch)
    epochs = np.arange(300)
    wanted = 0.1 * (1 + np.cos(np.pi * (1600 + epochs % 100) / 1800))
    assert [cycle.learning_rate(int(epoch) * steps_per_epoch) for epoch in epochs] == pytest.approx(wanted, rel=1e-12)


def test_cosine_is_by_default_the_end_of_its_annealing():
    """Without a start a cycle of c epochs goes over the last c of the budget, and one as long as the budget over all of it."""
    for cycle_epochs in (5, 20):
        swa = SwaConfig(num_epochs=20, schedule="cosine", lr_max=0.3, lr_min=0, cycle_epochs=cycle_epochs, report_epochs=())
        cycle = make_schedule(swa, steps_per_epoch=3)
        wanted = 0.15 * (1 + np.cos(np.pi * np.arange(60) / 60))[-3 * cycle_epochs :]
        assert [cycle.learning_rate(step) for step in range(3 * cycle_epochs)] == pytest.approx(wanted, rel=1e-12)


@given(budget=st.integers(1, 1000), rates=st.tuples(st.floats(0, 10), st.floats(0, 10)).map(sorted), data=st.data())
def test_three_part_rate_is_the_line_through_its_corners(budget: int, rates: list[float], data: st.DataObject):
    """Between (0, max), (B/2, max), (0.9 B, min), (B, min) and beyond, the SGD baseline's rate is numpy's interpolation."""
    lr_min, lr_max = rates
    step = data.draw(st.integers(0, 2 * budget))
    wanted = np.interp(step / budget, [0.0, 0.5, 0.9, 1.0], [lr_max, lr_max, lr_min, lr_min])
    rate = schedule("three_part", 1, budget_steps=budget, lr_max=lr_max, lr_min=lr_min).learning_rate(step)
    assert rate == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@settings(deadline=None)
@given(half=st.integers(1, 500), cycle=st.integers(0, 5), rates=st.tuples(st.floats(0, 10), st.floats(0, 10)).map(sorted))
def test_triangle_is_lowest_where_it_is_captured(half: int, cycle: int, rates: list[float]):
    """A triangular cycle of 2 h steps is the line through (0, max), (h, min), (2 h, max), with its capture at h."""
    lr_min, lr_max = rates
    triangle = schedule("triangular", 2 * half, lr_max=lr_max, lr_min=lr_min)
    steps = np.arange(2 * half)
    got = [triangle.learning_rate(int(step) + 2 * half * cycle) for step in steps]
    wanted = np.interp(steps + 1, [0, half, 2 * half], [lr_max, lr_min, lr_max])
    assert got == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    captures = [step for step in range(1, 2 * half * (cycle + 1) + 1) if triangle.is_capture(step)]
    assert captures == [half + 2 * half * k for k in range(cycle + 1)]
    assert triangle.learning_rate(captures[0] - 1) == lr_min


@given(cycle_steps=st.integers(1, 40), step=st.integers(0, 200), name=st.sampled_from(["cyclical", "constant", "triangular"]))
def test_last_capture_is_the_last_one(cycle_steps: int, step: int, name: str):
    """The last capture up to a step is the largest capture that is not after it, 0 where there is none."""
    cycle = schedule(name, 2 * cycle_steps)
    assert cycle.last_capture(step) == max([s for s in range(step + 1) if cycle.is_capture(s)], default=0)


def test_cycle_in_steps():
    """cycle_steps sets c in steps whatever an epoch is; cycle_epochs in epochs."""
    assert make_schedule(SwaConfig(cycle_steps=7), steps_per_epoch=10).cycle_steps == 7
    assert make_schedule(SwaConfig(cycle_epochs=5), steps_per_epoch=10).cycle_steps == 50


@pytest.mark.parametrize("name", ["cyclical", "constant", "triangular", "cosine", "three_part"])
def test_rates_do_not_depend_on_the_unit_of_time(name: Any):
    """Twice as many steps an epoch give, at the same share of the run, the same rates up to one step's change."""
    swa = SwaConfig(num_epochs=12, schedule=name, lr_max=1.0, lr_min=0.1, cycle_epochs=4, report_epochs=())
    coarse, fine = (make_schedule(swa, steps_per_epoch=steps) for steps in (100, 200))
    for step in range(1200):
        assert fine.learning_rate(2 * step + 1) == pytest.approx(coarse.learning_rate(step), abs=0.01)


# ------------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", ["cyclical", "constant", "triangular", "cosine", "three_part"])
def test_negative_step_is_refused(name: str):
    """A negative step has no learning rate and is no capture."""
    with pytest.raises(ValueError, match="cannot be negative, got -1"):
        schedule(name, 2).learning_rate(-1)
    with pytest.raises(ValueError, match="cannot be negative, got -1"):
        schedule(name, 2).is_capture(-1)


@pytest.mark.parametrize("cycle_steps", [0, -3])
@pytest.mark.parametrize("step", [0, 3])
def test_cycle_without_steps_is_refused(cycle_steps: int, step: int):
    """A cycle has at least one step, for the rate as for the captures."""
    with pytest.raises(ValueError, match=f"at least 1 step, got {cycle_steps}"):
        cyclical(step, cycle_steps)
    with pytest.raises(ValueError, match=f"at least 1 step, got {cycle_steps}"):
        is_capture(step, cycle_steps=cycle_steps)


def test_cycle_that_leaves_its_annealing_is_refused():
    """A cosine's cycle cannot go on where the annealing has ended."""
    with pytest.raises(ValueError, match="from step 80 to 110 leaves the annealing of 100"):
        schedule("cosine", 30, start_step=80).learning_rate(0)
    assert math.isfinite(schedule("cosine", 20, start_step=80).learning_rate(19))
