"""Significance against SciPy, sums over all outcomes and simulation."""

from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from imagenet_swa.analysis import significance
from imagenet_swa.analysis.significance import mcnemar, paired_bootstrap, t_interval


def answers(both: int, only_a: int, only_b: int, neither: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Whether two networks are right on images of which so many are of each kind, in random order."""
    counts = (both, only_a, only_b, neither)
    order = np.random.default_rng(seed).permutation(sum(counts))
    return np.repeat([1, 1, 0, 0], counts).astype(bool)[order], np.repeat([1, 0, 1, 0], counts).astype(bool)[order]


# -------------------------------------------------------------------------------------------------------------- McNemar


@given(st.integers(0, 40), st.integers(0, 60), st.integers(0, 60), st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_mcnemar_is_the_sum_over_outcomes(both: int, only_a: int, only_b: int, neither: int):
    """The p-value is the probability, by counting coin tosses, of a split at least as uneven."""
    if both + only_a + only_b + neither == 0:
        return
    found = mcnemar(*answers(both, only_a, only_b, neither))
    n = only_a + only_b
    as_uneven = sum(comb(n, k) for k in range(n + 1) if abs(2 * k - n) >= abs(only_a - only_b))
    assert (found.num_images, found.num_only_a, found.num_only_b) == (both + n + neither, only_a, only_b)
    assert found.p_value == pytest.approx(as_uneven / 2**n, rel=1e-9)


def test_mcnemar_is_scipys():
    """A gain of 0.4 points of 50,000 images of which 5 % change sides: SciPy's binomial test, near its normal approximation."""
    found = mcnemar(*answers(38_000, 1_150, 1_350, 9_500))
    assert found.p_value == pytest.approx(stats.binomtest(1_150, 2_500).pvalue)
    assert found.p_value == pytest.approx(2 * stats.norm.sf((200 - 1) / np.sqrt(2_500)), rel=0.02)


def test_mcnemar_does_not_care_who_is_first():
    """Exchanging the networks exchanges the counts and keeps the p-value."""
    a, b = answers(10, 3, 11, 5)
    there, back = mcnemar(a, b), mcnemar(b, a)
    assert (there.num_only_a, there.num_only_b, there.p_value) == (back.num_only_b, back.num_only_a, back.p_value)


def test_equal_networks_differ_by_chance():
    """Where no image tells the networks apart, the p-value is 1."""
    a, _ = answers(7, 0, 0, 3)
    assert mcnemar(a, a).p_value == 1
    assert mcnemar([0, 1, 1], [0, 1, 1]).num_only_a == 0


def test_mcnemar_keeps_its_level():
    """Of pairs of equally good networks at most 5 % (and sampling error) are called different at the level 0.05."""
    random = np.random.default_rng(3)
    p_values = []
    for only_a, only_b in random.multinomial(1_000, [0.05, 0.05, 0.9], size=400)[:, :2]:
        p_values.append(mcnemar(*answers(0, only_a, only_b, 1_000)).p_value)
    share = np.mean(np.array(p_values) < 0.05)
    assert 0.005 < share < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 400)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        ([True], [True, False], "the same images for both networks, got 1 and 2"),
        ([], [], r"got shape \(0,\)"),
        ([[True]], [[True]], r"got shape \(1, 1\)"),
        ([0, 2], [0, 1], "true or false"),
        ([0.0, np.nan], [0, 1], "true or false"),
    ],
)
def test_what_mcnemar_does_not_take(a, b, words: str):
    """Other images, none, or no answers are named."""
    with pytest.raises(ValueError, match=words):
        mcnemar(a, b)


# ------------------------------------------------------------------------------------------------------------ bootstrap


@pytest.mark.parametrize("num_networks", [1, 3, 5])
def test_the_bootstrap_covers(num_networks: int):
    """Of the intervals for test sets drawn from one population, 90 % hold the population's mean, whatever the mean over seeds."""
    random = np.random.default_rng(num_networks)
    covered, num_sets = 0, 300
    for number in range(num_sets):
        hits = random.choice([-1, 0, 1], p=[0.04, 0.86, 0.1], size=(num_networks, 400))
        found = paired_bootstrap(hits.mean(0), seed=number, num_resamples=500, level=0.9)
        covered += found.low <= 0.06 <= found.high
    assert abs(covered / num_sets - 0.9) < 4 * np.sqrt(0.9 * 0.1 / num_sets)


def test_counts_are_the_bootstrap_itself(monkeypatch: pytest.MonkeyPatch):
    """Drawing the counts of the values gives the distribution that drawing the images gives, quantile by quantile."""
    differences = np.repeat([-1.0, 0.0, 1.0], [30, 850, 120])
    random = np.random.default_rng(0)
    by_counts = significance._resampled_means(differences, random, 20_000)
    monkeypatch.setattr(significance, "MAX_DISTINCT", 0)
    monkeypatch.setattr(significance, "MAX_DRAWN", 3_000_000)  # several blocks
    by_images = significance._resampled_means(differences, random, 20_000)
    largest_gap, _ = np.array(stats.ks_2samp(by_counts, by_images))
    assert largest_gap < 0.02
    assert by_counts.std() == pytest.approx(differences.std() / np.sqrt(1_000), rel=0.03)
    assert by_images.std() == pytest.approx(differences.std() / np.sqrt(1_000), rel=0.03)


def test_the_bootstrap_of_many_values_is_scipys():
    """For values that hardly repeat, such as differences of log-likelihood, the interval is that of scipy.stats.bootstrap."""
    differences = np.random.default_rng(5).gamma(2.0, size=500) - 1.5
    found = paired_bootstrap(differences, seed=1, num_resamples=8_000)
    wanted = stats.bootstrap(
        (differences,), np.mean, method="percentile", n_resamples=8_000, rng=np.random.default_rng(2)
    ).confidence_interval
    assert found.mean == pytest.approx(differences.mean())
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=0.012)


def test_the_interval_of_fifty_thousand_images():
    """The yardstick of ImageNet: 0.8 points with 5 % of the images changing sides are known to about 0.1 points."""
    a, b = answers(37_000, 1_050, 1_450, 10_500)
    found = paired_bootstrap(b.astype(int) - a.astype(int), seed=0)
    assert found.mean == pytest.approx(0.008)
    error = np.sqrt(0.05 - 0.008**2) / np.sqrt(50_000)
    assert (found.low, found.high) == pytest.approx((0.008 - 1.96 * error, 0.008 + 1.96 * error), abs=1e-4)
    assert (found.level, found.num_values) == (0.95, 50_000)


def test_the_bootstrap_repeats():
    """The same seed gives the same interval, another seed another one."""
    differences = np.random.default_rng(0).choice([-1, 0, 1], size=300)
    assert paired_bootstrap(differences, seed=4) == paired_bootstrap(differences, seed=4)
    assert paired_bootstrap(differences, seed=4) != paired_bootstrap(differences, seed=5)


def test_no_difference_no_width():
    """Images that all differ by the same amount leave no doubt; none that differs gives 0 to 0."""
    assert paired_bootstrap(np.zeros(100), seed=0).low == paired_bootstrap(np.zeros(100), seed=0).high == 0
    one = paired_bootstrap([0.5], seed=0)
    assert (one.mean, one.low, one.high, one.num_values) == (0.5, 0.5, 0.5, 1)


@pytest.mark.parametrize(
    ("values", "how", "words"),
    [
        ([], {}, "at least one value"),
        ([[1.0]], {}, r"got shape \(1, 1\)"),
        ([1.0, np.nan], {}, "finite values"),
        ([1.0], {"num_resamples": 0}, "at least 1 resample, got 0"),
        ([1.0], {"level": 95}, "between 0 and 1, got 95"),
    ],
)
def test_what_the_bootstrap_does_not_take(values, how: dict[str, float], words: str):
    """No images, numbers that are none, no resamples and a level in per cent are named."""
    with pytest.raises(ValueError, match=words):
        paired_bootstrap(values, seed=0, **how)  # pyright: ignore[reportArgumentType]


# ----------------------------------------------------------------------------------------------------------------- seeds


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=10), st.sampled_from([0.5, 0.9, 0.95]))
@settings(max_examples=50, deadline=None)
def test_seeds_give_students_interval(values: list[float], level: float):
    """The interval holds every mean that a one-sample t-test at that level does not reject, and ends where it begins to."""
    found = t_interval(values, level=level)
    assert found is not None
    assert found.mean == pytest.approx(np.mean(values), abs=1e-12)
    if np.std(values) > 1e-6:
        for end in (found.low, found.high):
            assert stats.ttest_1samp(values, end)[1] == pytest.approx(1 - level, rel=1e-4)
    assert found.low <= found.mean <= found.high


def test_one_seed_has_no_interval():
    """A single seed says nothing about the others; equal seeds leave no width."""
    assert t_interval([0.3]) is None
    assert t_interval([0.25, 0.25]) is not None
    assert t_interval([0.25, 0.25]).low == 0.25  # pyright: ignore[reportOptionalMemberAccess]
    with pytest.raises(ValueError, match="at least one value"):
        t_interval([])
    with pytest.raises(ValueError, match="between 0 and 1"):
        t_interval([0.3], level=1.0)
