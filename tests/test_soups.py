"""Which weights go into an average with which share, and the greedy soup's choice: against numpy and brute force."""

from collections.abc import Callable, Sequence
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from imagenet_swa.analysis.soups import (
    Recipe,
    averaged_names,
    distinct,
    exponential,
    greedy_soup,
    latest,
    prefix,
    recipes_of,
    single,
    soup_of,
    weighted_mean,
)
from imagenet_swa.averaging import WeightAverage, capture_weights
from imagenet_swa.models import Weights

NUM_CAPTURES = 6


def network() -> nn.Module:
    """A convolution, BatchNorm, a parameter that two names share, and a buffer."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4), nn.Linear(4, 4))
    net[3].weight = net[2].weight
    net.register_buffer("temperature", torch.tensor(1.0))
    return net


@pytest.fixture(scope="module")
def models() -> list[Weights]:
    """Pretrained weights and captures: every tensor another one in each."""
    torch.manual_seed(0)
    made = []
    for number in range(NUM_CAPTURES + 1):
        net = network()
        for name, tensor in net.state_dict().items():
            tensor.copy_(torch.full_like(tensor, number) if name.endswith("tracked") else torch.randn(tensor.shape))
        made.append(capture_weights(net))
    return made


def mean_by_numpy(models: list[Weights], shares: Sequence[float], name: str) -> np.ndarray:
    """In float64, rounded once."""
    stacked = np.stack([model[name].double().numpy() for model in models])
    return np.tensordot(np.array(shares, np.float64), stacked, 1).astype(np.float32)


def made(recipe: Recipe, models: list[Weights]) -> Weights:
    return weighted_mean([lambda model=model: model for model in models], recipe.coefficients, averaged_names(network()))


def assert_parameters(got: Weights, models: list[Weights], shares: Sequence[float]) -> None:
    names = averaged_names(network())
    assert {"0.weight", "1.weight", "2.weight", "3.weight", "3.bias"} <= names
    for name in names:
        assert got[name].dtype == torch.float32
        np.testing.assert_allclose(got[name].numpy(), mean_by_numpy(models, shares, name), rtol=2e-7, atol=1e-9, err_msg=name)


# ----------------------------------------------------------------------------------------------------------- shares


@pytest.mark.parametrize("k", range(1, NUM_CAPTURES + 1))
@pytest.mark.parametrize("include_pretrained", [True, False])
def test_prefix_is_the_mean_of_the_first_captures(models: list[Weights], k: int, include_pretrained: bool):
    """The average of the first k captures is their mean by numpy; Alg. 1's counts the pretrained weights as one more."""
    members = ([0] if include_pretrained else []) + list(range(1, k + 1))
    shares = [1 / len(members) if i in members else 0.0 for i in range(NUM_CAPTURES + 1)]
    recipe = prefix(k, NUM_CAPTURES, include_pretrained=include_pretrained)
    np.testing.assert_allclose(recipe.shares, shares, rtol=1e-15)
    assert recipe.num_captures == k
    assert_parameters(made(recipe, models), models, shares)


@pytest.mark.parametrize("k", range(1, NUM_CAPTURES + 1))
def test_prefix_is_the_running_average(models: list[Weights], k: int):
    """Summed at once or kept while training, the average of the first k is the same but for the latter's rounding each time."""
    running = WeightAverage(network())
    running.start_from(models[0])
    for model in models[1 : k + 1]:
        running.update(model)
    for include_pretrained in (True, False):
        kept = running.weights(include_pretrained=include_pretrained)
        at_once = made(prefix(k, NUM_CAPTURES, include_pretrained=include_pretrained), models)
        assert kept.keys() == at_once.keys()
        for name in kept:
            torch.testing.assert_close(at_once[name], kept[name], rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("decay", [0.1, 0.5, 0.9])
def test_exponential_average_is_its_recursion(models: list[Weights], decay: float):
    """The closed form is a = decay a + (1 - decay) w at each capture, from the pretrained weights."""
    recipe = exponential(decay, NUM_CAPTURES)
    got = made(recipe, models)
    for name in averaged_names(network()):
        average = models[0][name].double().numpy()
        for model in models[1:]:
            average = decay * average + (1 - decay) * model[name].double().numpy()
        np.testing.assert_allclose(got[name].numpy(), average, rtol=2e-7, atol=1e-8, err_msg=name)
    assert sum(recipe.shares) == pytest.approx(1, abs=1e-15)


@settings(deadline=None)
@given(decay=st.floats(0.001, 0.999), num_captures=st.integers(1, 12))
def test_exponential_shares_fall_by_the_decay(decay: float, num_captures: int):
    """Shares sum to 1; each capture's is the decay times the next one's; the pretrained weights' is decay to the n."""
    shares = exponential(decay, num_captures).shares
    assert sum(shares) == pytest.approx(1, rel=1e-12)
    assert shares[0] == pytest.approx(decay**num_captures, rel=1e-9)
    for earlier, later in pairwise(shares[1:]):
        assert earlier == pytest.approx(decay * later, rel=1e-9)


@pytest.mark.parametrize("size", range(1, NUM_CAPTURES + 1))
def test_lawa_is_the_mean_of_the_last_captures(models: list[Weights], size: int):
    """LAWA of size k is the mean of the last k captures by numpy."""
    shares = [0.0] * (NUM_CAPTURES + 1 - size) + [1 / size] * size
    assert_parameters(made(latest(size, NUM_CAPTURES), models), models, shares)


@settings(deadline=None)
@given(st.sets(st.integers(0, NUM_CAPTURES - 1), min_size=1))
def test_soup_is_the_mean_of_its_members(members: set[int]):
    """A soup's members have equal shares, all others and the pretrained weights none."""
    shares = soup_of(tuple(sorted(members)), NUM_CAPTURES).shares
    assert [i for i, share in enumerate(shares) if share] == [member + 1 for member in sorted(members)]
    assert set(shares) - {0.0} == {1 / len(members)}


def test_what_is_not_averaged_is_the_latest_members(models: list[Weights]):
    """Buffers, statistics and counters are those of the last member that has a share."""
    got = made(soup_of((1, 3), NUM_CAPTURES), models)
    buffers = got.keys() - averaged_names(network())
    assert {"temperature", "1.running_mean", "1.running_var", "1.num_batches_tracked"} == buffers
    for name in buffers:
        assert torch.equal(got[name], models[4][name])
        assert got[name].dtype == models[4][name].dtype


def test_what_has_no_share_is_not_read(models: list[Weights]):
    """Only the models with a share are read, each once."""
    read = []

    def load(number: int) -> Callable[[], Weights]:
        return lambda: read.append(number) or models[number]

    loads = [load(number) for number in range(NUM_CAPTURES + 1)]
    weighted_mean(loads, soup_of((1, 3), NUM_CAPTURES).coefficients, averaged_names(network()))
    assert read == [2, 4]


def test_rounded_once():
    """The sum is one of float64: 2^25 + 1 - 2^25 is 1, which fp32 would lose."""
    loads = [lambda value=value: {"w": torch.tensor([value])} for value in (2.0**25, 1.0, -(2.0**25))]
    assert weighted_mean(loads, (1.0, 1.0, 1.0), {"w"})["w"].item() == np.float32(1 / 3)


# ------------------------------------------------------------------------------------------------------ the whole table


def test_the_table_has_every_row():
    """Pretrained, each capture, two averages per prefix, the exponential ones, LAWA where captures suffice, soups, ensemble."""
    recipes = recipes_of(4, ema_decays=(0.5, 0.9), lawa_sizes=(3, 5), soup=(1, 3))
    kinds = [recipe.kind for recipe in recipes]
    wanted = ["pretrained"] + ["capture"] * 4 + ["with_pretrained"] * 4 + ["captures_only"] * 4 + ["ema"] * 2 + ["lawa"]
    assert kinds == [*wanted, "uniform_soup", "greedy_soup", "ensemble"]
    assert [recipe.is_average for recipe in recipes] == [False] * 5 + [True] * 13 + [False]
    assert len({recipe.title for recipe in recipes}) == len(recipes)


def test_equal_averages_are_one_row_with_all_its_names():
    """The uniform soup, LAWA of all, and a greedy soup that took all are the average of all captures; a capture is not the
    average of itself, which has other BatchNorm statistics.
    """
    recipes, also = distinct(recipes_of(3, ema_decays=(0.5,), lawa_sizes=(2, 3), soup=(0, 1, 2)))
    everything = next(recipe for recipe in recipes if recipe.title == "captures only, 3")
    assert {kept: [other.kind for other in others] for kept, others in also.items()} == {
        everything: ["lawa", "uniform_soup", "greedy_soup"]
    }
    assert [recipe.kind for recipe in recipes].count("capture") == 3
    assert "captures only, 1" in {recipe.title for recipe in recipes}
    assert recipes[-1].kind == "ensemble"


def test_a_single_model_is_itself(models: list[Weights]):
    """The row of a capture has that capture's weights alone."""
    recipe = single("capture", "capture 2", 2, NUM_CAPTURES)
    assert recipe.shares == (0, 0, 1, 0, 0, 0, 0)
    got = made(recipe, models)
    assert all(torch.equal(got[name], models[2][name]) for name in got)


# -------------------------------------------------------------------------------------------------- the greedy soup


def scripted(num_captures: int, seed: int, levels: int) -> dict[tuple[int, ...], int]:
    """A made-up accuracy for every set of captures, with ties where the levels are few."""
    random = np.random.default_rng(seed)
    sets = [s for size in range(1, num_captures + 1) for s in combinations(range(num_captures), size)]
    return {s: int(random.integers(levels)) for s in sets}


def greedy_by_brute_force(accuracy: dict[tuple[int, ...], int], num_captures: int) -> set[int]:
    """Recipe 1 of the paper word by word: at each step the best of the captures not yet offered."""
    offered: list[int] = []
    soup: set[int] = set()
    while len(offered) < num_captures:
        rest = [k for k in range(num_captures) if k not in offered]
        best = max(accuracy[(k,)] for k in rest)
        candidate = min(k for k in rest if accuracy[(k,)] == best)
        offered.append(candidate)
        if not soup or accuracy[tuple(sorted(soup | {candidate}))] >= accuracy[tuple(sorted(soup))]:
            soup.add(candidate)
    return soup


@settings(deadline=None)
@given(num_captures=st.integers(1, 6), seed=st.integers(0, 10_000), levels=st.sampled_from([2, 4, 1000]))
def test_greedy_soup_is_the_papers(num_captures: int, seed: int, levels: int):
    """The choice is that of the paper's recipe, offered best first, kept where the held-out accuracy does not fall."""
    accuracy = scripted(num_captures, seed, levels)
    soup, trials = greedy_soup(num_captures, lambda soups: [accuracy[s] for s in soups])
    assert set(soup) == greedy_by_brute_force(accuracy, num_captures)
    assert list(soup) == sorted(soup)
    assert sorted(trial.capture for trial in trials) == list(range(num_captures))
    assert {trial.capture for trial in trials if trial.added} == set(soup)
    assert accuracy[soup] >= max(accuracy[(k,)] for k in range(num_captures))


def test_greedy_soup_asks_once_for_all_single_captures():
    """The single captures are scored together, so that they can share a pass; then one larger soup at a time."""
    asked: list[list[tuple[int, ...]]] = []

    def score(soups: Sequence[tuple[int, ...]]) -> list[int]:
        asked.append(list(soups))
        return [len(s) for s in soups]  # the larger the better

    assert greedy_soup(3, score)[0] == (0, 1, 2)
    assert asked == [[(0,), (1,), (2,)], [(0, 1)], [(0, 1, 2)]]
