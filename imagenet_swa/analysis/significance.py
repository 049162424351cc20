"""Whether a difference between two networks is more than chance: over the images of a test set, and over seeds. numpy, SciPy."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

MAX_DISTINCT = 256  # values whose counts are drawn instead of the images themselves
MAX_DRAWN = 2**24  # images drawn at a time, to bound the memory


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean and where it may lie, in the unit of the values.

    Attributes:
        level: share of the intervals made this way that hold the true mean, such as 0.95.
        num_values: images or seeds that it comes from.
    """

    mean: float
    low: float
    high: float
    level: float
    num_values: int


@dataclass(frozen=True, kw_only=True)
class McNemar:
    """Two networks on the same N images.

    Attributes:
        num_only_a: images that only the first has right (the test's b).
        num_only_b: images that only the second has right (the test's c).
        p_value: how often networks that are equally good differ at least as much, two-sided, exact.
    """

    num_images: int
    num_only_a: int
    num_only_b: int
    p_value: float


def mcnemar(correct_a: ArrayLike, correct_b: ArrayLike) -> McNemar:
    """McNemar's exact test: of the images that one network alone has right, each would be either's with probability 1/2.

    Args:
        correct_a: (N,) booleans, whether the first network has the image right.
        correct_b: (N,) booleans of the second network, the same images in the same order.

    Raises:
        ValueError: other shapes, no image, or something else than true and false.
    """
    a, b = _booleans(correct_a), _booleans(correct_b)
    if len(a) != len(b):
        raise ValueError(f"wanted the same images for both networks, got {len(a)} and {len(b)}")
    from scipy.stats import binomtest

    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    p_value = float(binomtest(only_a, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0
    return McNemar(num_images=len(a), num_only_a=only_a, num_only_b=only_b, p_value=p_value)


def paired_bootstrap(differences: ArrayLike, *, seed: int, num_resamples: int = 10_000, level: float = 0.95) -> Interval:
    """Percentile interval of the mean difference under resampling of the images with replacement.

    Where few values occur, as -1, 0 and 1 in a difference of hits, the numbers of their draws are multinomial: the very same
    bootstrap without drawing any image.

    Args:
        differences: (N,), one per image: what the second network has over the first, a mean over seeds where there are several.
        seed: of the resampling.

    Raises:
        ValueError: no image, a value that is not finite, no resample, or a level outside 0..1.
    """
    values = _finite(differences)
    if num_resamples < 1:
        raise ValueError(f"wanted at least 1 resample, got {num_resamples}")
    tail = _tail(level)
    means = _resampled_means(values, np.random.default_rng(seed), num_resamples)
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(mean=float(values.mean()), low=float(low), high=float(high), level=level, num_values=len(values))


def t_interval(values: Sequence[float] | NDArray[np.float64], *, level: float = 0.95) -> Interval | None:
    """Student's interval of the mean over independent seeds, which need not be in the same order of size as the spread over
    images; None with a single seed, which says nothing about others.

    Raises:
        ValueError: no value, one that is not finite, or a level outside 0..1.
    """
    numbers = _finite(values)
    tail = _tail(level)
    if len(numbers) == 1:
        return None
    from scipy.stats import t

    mean, error = float(numbers.mean()), float(numbers.std(ddof=1) / np.sqrt(len(numbers)))
    half = float(t.ppf(1 - tail, len(numbers) - 1)) * error
    return Interval(mean=mean, low=mean - half, high=mean + half, level=level, num_values=len(numbers))


def _resampled_means(values: NDArray[np.float64], random: np.random.Generator, num_resamples: int) -> NDArray[np.float64]:
    num_values = len(values)
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= MAX_DISTINCT:
        return random.multinomial(num_values, counts / num_values, size=num_resamples) @ distinct / num_values
    means = np.empty(num_resamples)
    at_a_time = max(1, MAX_DRAWN // num_values)
    for start in range(0, num_resamples, at_a_time):
        block = means[start : start + at_a_time]
        block[:] = values[random.integers(num_values, size=(len(block), num_values))].mean(axis=1)
    return means


def _booleans(values: ArrayLike) -> NDArray[np.bool_]:
    array = np.asarray(values)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"wanted an answer per image, a vector, got shape {array.shape}")
    if not np.isin(array, (0, 1)).all():
        raise ValueError("wanted whether each image is right, true or false, got other values")
    return array.astype(bool)


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"wanted at least one value, a vector, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError("wanted finite values, got infinity or not a number")
    return array


def _tail(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    return (1 - level) / 2
