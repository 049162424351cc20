"""The averages that the captures of one run can make: which weights go in with which share, and the greedy soup's choice.

An average is known by its coefficients, one for the pretrained weights and one for each capture in the order of training; two
averages with the same shares are the same network, whatever they are called.
"""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

from torch import nn

from imagenet_swa.analysis.captures import RunWeights
from imagenet_swa.config import require
from imagenet_swa.models import Weights

Members = tuple[int, ...]


@dataclass(frozen=True)
class Recipe:
    """One network of the table.

    Attributes:
        kind: pretrained, capture, with_pretrained, captures_only, ema, lawa, uniform_soup, greedy_soup, ensemble.
        title: for people.
        num_captures: how many captures of the run it knows of.
        coefficients: (1 + n,) parts of the pretrained weights and of captures 1..n; what counts is their share of the sum.
    """

    kind: str
    title: str
    num_captures: int
    coefficients: tuple[float, ...]

    @property
    def is_average(self) -> bool:
        """Whether it has weights that need BatchNorm statistics: the pretrained ones and the captures have their own."""
        return self.kind not in ("pretrained", "capture", "ensemble")

    @property
    def shares(self) -> tuple[float, ...]:
        """(1 + n,) the coefficients, which sum to 1."""
        exact = [Fraction(coefficient) for coefficient in self.coefficients]
        return tuple(float(part / sum(exact)) for part in exact)


def single(kind: str, title: str, number: int, num_captures: int) -> Recipe:
    """The pretrained weights (number 0), or a capture, as they are."""
    return Recipe(kind, title, number, tuple(float(i == number) for i in range(num_captures + 1)))


def prefix(k: int, num_captures: int, *, include_pretrained: bool) -> Recipe:
    """The equal-weight average of the first k captures; with the pretrained weights as its first model it is Alg. 1 after k
    cycles.
    """
    kind, title = ("with_pretrained", "Alg. 1") if include_pretrained else ("captures_only", "captures only")
    coefficients = (float(include_pretrained), *(float(i < k) for i in range(num_captures)))
    return Recipe(kind, f"{title}, {k}", k, coefficients)


def exponential(decay: float, num_captures: int) -> Recipe:
    """The exponential moving average over the captures w_1..w_n, started from the pretrained weights:
    a_0 = pretrained, a_k = decay a_(k-1) + (1 - decay) w_k, in closed form
    a_n = decay^n pretrained + sum over k of (1 - decay) decay^(n - k) w_k.
    """
    n = num_captures
    coefficients = (decay**n, *((1 - decay) * decay ** (n - k) for k in range(1, n + 1)))
    return Recipe("ema", f"EMA, decay {decay:g}", n, coefficients)


def latest(size: int, num_captures: int) -> Recipe:
    """The equal-weight average of the last `size` captures (LAWA: Kaddour 2022, arXiv:2209.14981)."""
    coefficients = (0.0, *(float(i >= num_captures - size) for i in range(num_captures)))
    return Recipe("lawa", f"LAWA, last {size}", num_captures, coefficients)


def soup_of(members: Members, num_captures: int) -> Recipe:
    """The equal-weight average of the captures with these numbers, counted from 0."""
    coefficients = (0.0, *(float(i in members) for i in range(num_captures)))
    return Recipe("greedy_soup", f"greedy soup of {len(members)}", num_captures, coefficients)


def recipes_of(
    num_captures: int, *, ema_decays: Sequence[float] = (), lawa_sizes: Sequence[int] = (), soup: Members = ()
) -> list[Recipe]:
    """All rows of the table: pretrained, captures, both averages of the first k captures, exponential ones, the last few (sizes
    that there are captures for), the uniform soup, the greedy one if it was chosen, the ensemble.
    """
    n = num_captures
    everyone = tuple(range(n))
    return [
        single("pretrained", "pretrained", 0, n),
        *(single("capture", f"capture {k}", k, n) for k in range(1, n + 1)),
        *(prefix(k, n, include_pretrained=True) for k in range(1, n + 1)),
        *(prefix(k, n, include_pretrained=False) for k in range(1, n + 1)),
        *(exponential(decay, n) for decay in ema_decays),
        *(latest(size, n) for size in lawa_sizes if size <= n),
        replace(soup_of(everyone, n), kind="uniform_soup", title="uniform soup"),
        *([soup_of(soup, n)] if soup else []),
        replace(soup_of(everyone, n), kind="ensemble", title=f"ensemble of {n}"),
    ]


def distinct(recipes: Sequence[Recipe]) -> tuple[list[Recipe], dict[Recipe, list[Recipe]]]:
    """The recipes without averages that are the same as one before, and those, by the recipe that is kept."""
    kept: list[Recipe] = []
    also: dict[Recipe, list[Recipe]] = {}
    first: dict[tuple[float, ...], Recipe] = {}
    for recipe in recipes:
        if recipe.is_average and recipe.shares in first:
            also.setdefault(first[recipe.shares], []).append(recipe)
            continue
        kept.append(recipe)
        if recipe.is_average:
            first[recipe.shares] = recipe
    return kept, also


def averaged_run(folder: Path, *, at_least: int = 1) -> RunWeights:
    """A finished run that has all the captures of its average.

    Raises:
        InputError: no run, one that averages nothing, or one with captures missing or too few.
    """
    run = RunWeights.load(folder)
    require(
        run.averages,
        f"{folder} averaged nothing: swa.start_epoch is its number of epochs, which is plain SGD; name a run with an average",
    )
    num_captures = len(run.captures)
    require(
        num_captures >= at_least,
        f"{folder} has {num_captures} capture, wanted at least {at_least}: a longer run, or shorter cycles (swa.cycle_epochs)",
    )
    require(run.pretrained_path.is_file(), f"{folder} is not complete: pretrained.safetensors is missing")
    return run


# ------------------------------------------------------------------------------------------------------ the weights


def averaged_names(network: nn.Module) -> set[str]:
    """The names that an average averages: floating-point parameters, as in `averaging.WeightAverage`."""
    return {name for name, parameter in network.named_parameters(remove_duplicate=False) if parameter.is_floating_point()}


def weighted_mean(models: Sequence[Callable[[], Weights]], coefficients: Sequence[float], names: Set[str]) -> Weights:
    """The mean of the models by their coefficients, added up in float64 and rounded once to fp32; what is not in `names`
    (counters, BatchNorm statistics, which an average needs recomputed) is that of the last model with a share.

    Args:
        models: read one after the other, those without a share not at all.
    """
    total = sum(coefficients)
    added: Weights = {}
    latest_weights: Weights = {}
    for load, coefficient in zip(models, coefficients, strict=True):
        if coefficient:
            latest_weights = load()
            for name in names:
                part = latest_weights[name].double() * coefficient
                added[name] = added[name] + part if name in added else part
    return {name: (added[name] / total).float() if name in names else tensor for name, tensor in latest_weights.items()}


# -------------------------------------------------------------------------------------------------- the greedy soup


@dataclass(frozen=True)
class Trial:
    """A capture that was offered to the soup.

    Attributes:
        capture: its number, counted from 0.
        num_correct: held-out images that the soup with it has right.
        added: whether it stayed.
    """

    capture: int
    num_correct: int
    added: bool


def greedy_soup(num_captures: int, score: Callable[[Sequence[Members]], Sequence[int]]) -> tuple[Members, list[Trial]]:
    """The greedy soup (Wortsman et al. 2022, arXiv:2203.05482, Recipe 1): captures are offered in the order of their own
    held-out accuracy, the best first and the earlier one of equals, and stay if the soup's does not fall.

    Args:
        score: the number of held-out images that the average of the captures of each given set, numbers ascending, has right.

    Returns:
        The numbers of the soup's captures, ascending, and what was tried, the best single capture first.
    """
    alone = score([(k,) for k in range(num_captures)])
    first, *others = sorted(range(num_captures), key=lambda k: -alone[k])
    soup, best = (first,), alone[first]
    trials = [Trial(first, best, True)]
    for k in others:
        larger = tuple(sorted((*soup, k)))
        (num_correct,) = score([larger])
        trials.append(Trial(k, num_correct, num_correct >= best))
        if num_correct >= best:
            soup, best = larger, num_correct
    return soup, trials
