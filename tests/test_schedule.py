"""Learning rates against Alg. 1 in exact arithmetic, and where captures fall."""

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagenet_swa.schedule import constant_lr, cyclical_lr, is_capture, learning_rate

LR_MAX, LR_MIN = 1e-3, 1e-5


def rate_of_algorithm_1(i: int, c: int) -> Fraction:
    """alpha(i) of sec. 3.1 for i = 1, 2, ... from the given floats without any rounding."""
    t = Fraction((i - 1) % c + 1, c)
    return (1 - t) * Fraction(LR_MAX) + t * Fraction(LR_MIN)


def cyclical(step: int, cycle_steps: int) -> float:
    return learning_rate(step, schedule="cyclical", cycle_steps=cycle_steps, lr_max=LR_MAX, lr_min=LR_MIN)


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
    given_rate = learning_rate(step, schedule="constant", cycle_steps=cycle_steps, lr_max=LR_MAX, lr_min=LR_MIN)
    assert given_rate == constant_lr(step, lr_max=LR_MAX) == LR_MAX


@pytest.mark.parametrize("schedule", ["cyclical", "constant"])
def test_negative_step_is_refused(schedule: str):
    """A negative step has no learning rate and is no capture."""
    with pytest.raises(ValueError, match="cannot be negative, got -1"):
        learning_rate(-1, schedule=schedule, cycle_steps=2, lr_max=LR_MAX, lr_min=LR_MIN)
    with pytest.raises(ValueError, match="cannot be negative, got -1"):
        is_capture(-1, cycle_steps=2)


@pytest.mark.parametrize("cycle_steps", [0, -3])
@pytest.mark.parametrize("step", [0, 3])
def test_cycle_without_steps_is_refused(cycle_steps: int, step: int):
    """A cycle has at least one step, for the rate as for the captures."""
    with pytest.raises(ValueError, match=f"cycle_steps must be at least 1, got {cycle_steps}"):
        cyclical(step, cycle_steps)
    with pytest.raises(ValueError, match=f"cycle_steps must be at least 1, got {cycle_steps}"):
        is_capture(step, cycle_steps=cycle_steps)


def test_unknown_schedule_is_refused():
    """An unknown schedule is named, with the known ones."""
    with pytest.raises(ValueError, match="unknown schedule 'cosine'; wanted 'cyclical' or 'constant'"):
        learning_rate(0, schedule="cosine", cycle_steps=2, lr_max=LR_MAX, lr_min=LR_MIN)
