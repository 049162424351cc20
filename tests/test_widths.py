"""Widths of solutions: on curves whose width is known, and against numpy."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagenet_swa.analysis.widths import RISE, Spread, num_wider, paired_difference, summarise, table_rows, width

MAYBE_WIDTHS = st.lists(st.tuples(*[st.none() | st.floats(0.1, 10)] * 2), min_size=1, max_size=12)


@given(st.floats(0, 0.8), st.floats(0.02, 1.0), st.integers(2, 50))
def test_the_width_of_a_straight_line_is_exact(error: float, slope: float, num_steps: int):
    """Where the error rises linearly, the width is rise / slope whatever the steps."""
    distances = np.linspace(0, 1, num_steps + 1)
    assert width(list(distances), list(error + slope * distances)) == pytest.approx(RISE / slope, rel=1e-9)


@given(st.floats(0.02, 50), st.integers(20, 400))
def test_the_width_of_a_parabola_is_found_within_a_step(curvature: float, num_steps: int):
    """On e(0) + a t^2 the width is sqrt(rise / a), at most a step too small: the chord lies above a convex curve."""
    distances = np.linspace(0, 1, num_steps + 1)
    found, truth = width(list(distances), list(0.1 + curvature * distances**2)), math.sqrt(RISE / curvature)
    assert found is not None
    assert truth - 1 / num_steps <= found <= truth + 1e-9


def test_the_width_is_the_first_crossing():
    """A curve that comes back below the limit was left at its first crossing; a dip before it does not count."""
    assert width([0, 1, 2, 3, 4], [0.10, 0.08, 0.12, 0.05, 0.50]) == pytest.approx(1 + 0.03 / 0.04)


def test_a_rise_within_the_limit_is_censored():
    """A curve that reaches the limit and does not exceed it has no width within its range."""
    assert width([0, 1, 2], [0.25, 0.25 + RISE, 0.25 + RISE]) is None
    assert width([0, 1, 2], [0.5, 0.3, 0.4]) is None
    assert width([0, 1, 2], [0.25, 0.25 + RISE, 0.2500001 + RISE]) == pytest.approx(1)


@given(MAYBE_WIDTHS)
def test_spreads_are_numpys(pairs: list[tuple[float | None, float | None]]):
    """Mean and sample standard deviation are numpy's over the directions that have a number; the others are counted."""
    a, b = ([pair[i] for pair in pairs] for i in (0, 1))
    both = [(x, y) for x, y in pairs if x is not None and y is not None]
    for spread, numbers in (
        (Spread.of(a), [x for x in a if x is not None]),
        (paired_difference(a, b), [x - y for x, y in both]),
    ):
        assert spread.num == len(numbers)
        assert spread.num + spread.num_censored == len(pairs)
        assert spread.mean == (pytest.approx(np.mean(numbers), abs=1e-12) if numbers else None)
        assert spread.std == (pytest.approx(np.std(numbers, ddof=1), abs=1e-9) if len(numbers) > 1 else None)


@given(MAYBE_WIDTHS)
def test_a_censored_width_is_wider_than_any_number(pairs: list[tuple[float | None, float | None]]):
    """Counting directions takes a censored width for infinite, so that of two censored ones neither is wider."""
    a, b = ([pair[i] for pair in pairs] for i in (0, 1))
    x, y = (np.array([np.inf if value is None else value for value in side]) for side in (a, b))
    assert num_wider(a, b) == int((x > y).sum())
    assert num_wider(b, a) == int((y > x).sum())


def test_the_summary_compares_every_pair_of_centres():
    """Each centre has its spread and a lower bound with censored widths at the end of the range; each pair its difference."""
    summary = summarise({"swa": [4.0, None, 6.0], "sgd": [1.0, 2.0, None], "last": [1.0, 1.0, 1.0]}, max_distance=8.0)
    swa = summary["centres"]["swa"]
    assert (swa["width"], swa["num"], swa["num_censored"]) == ([4.0, None, 6.0], 2, 1)
    assert (swa["mean"], swa["std"], swa["lower_bound_of_mean"]) == (5.0, pytest.approx(math.sqrt(2)), 6.0)
    pairs = {(pair["of"], pair["minus"]): pair for pair in summary["differences"]}
    assert set(pairs) == {("swa", "sgd"), ("swa", "last"), ("sgd", "last")}
    assert (pairs["swa", "sgd"]["mean"], pairs["swa", "sgd"]["num"], pairs["swa", "sgd"]["num_wider"]) == (3.0, 1, 2)
    assert summary["rise_of_test_error"] == 0.01


def test_the_table_shows_numbers_and_what_is_missing():
    """A row for each centre and each pair; where no direction has a number the row says so."""
    rows = table_rows(summarise({"swa": [None, None], "sgd": [1.0, 3.0]}, max_distance=8.0))
    assert rows == [
        ("swa", "none within range", "8", "2", "2"),
        ("sgd", "2 ± 1.414", "2", "2", "0"),
        ("swa - sgd, paired", "none within range", "", "2 of 2 wider", "2"),
    ]
