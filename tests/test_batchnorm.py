"""BatchNorm statistics against numpy over all the data at once, on one process and on several."""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from timm.layers.norm_act import BatchNormAct2d
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from imagenet_swa.batchnorm import mean_over_ranks, recompute_statistics

Images = NDArray[np.floating]
Layer = nn.modules.batchnorm._BatchNorm


# ---------------------------------------------------------------------------------------------------------- helpers


def some_images(num: int, *, channels: int = 3, size: int = 4, seed: int = 0, dtype: Any = np.float64) -> Images:
    """(num, channels, size, size) whose mean drifts from image to image, so that a split into batches would show."""
    random = np.random.default_rng([seed, num, channels])
    drift = np.linspace(-3, 5, num).reshape(-1, 1, 1, 1)
    return (random.normal(0, 1, (num, channels, size, size)) * [[[[1]], [[5]], [[0.2]]]] + drift).astype(dtype)


def batches_of(images: Images, cuts: list[int]) -> list[torch.Tensor]:
    return [torch.from_numpy(part) for part in np.split(images, cuts) if len(part)]


def moments(values: Images) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and unbiased variance of each channel, the second axis, in float64."""
    axes = (0, *range(2, values.ndim))
    wide = values.astype(np.float64)
    return wide.mean(axis=axes), wide.var(axis=axes, ddof=1)


def statistics(layer: nn.Module) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    assert isinstance(layer, Layer) and layer.running_mean is not None and layer.running_var is not None
    return layer.running_mean.double().numpy(), layer.running_var.double().numpy()


def check_statistics(layer: nn.Module, values: Images, *, rtol: float = 1e-10) -> None:
    """The layer's statistics are those of all values, each once."""
    for got, wanted in zip(statistics(layer), moments(values), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=rtol, atol=rtol)


def spoilt(layer: Layer) -> Layer:
    """The layer with statistics from elsewhere, which must not matter."""
    assert layer.running_mean is not None and layer.running_var is not None and layer.num_batches_tracked is not None
    layer.running_mean.fill_(7)
    layer.running_var.fill_(1e6)
    layer.num_batches_tracked.fill_(123)
    return layer


class Recorder(nn.Module):
    """Passes its input on and keeps a copy."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.detach().clone())
        return x

    def values(self) -> Images:
        return torch.cat(self.seen).to(torch.float64).numpy()


def deep_network(seed: int = 0) -> nn.Sequential:
    """Three BatchNorm layers, one nested, each behind a recorder of its inputs; float64."""
    torch.manual_seed(seed)
    block = nn.Sequential(nn.Conv2d(5, 5, 3, padding=1), Recorder(), nn.BatchNorm2d(5, momentum=None), nn.ReLU())
    return nn.Sequential(
        nn.Conv2d(3, 5, 3),
        Recorder(),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Sequential(block),
        nn.Flatten(),
        nn.Linear(20, 6),
        Recorder(),
        nn.BatchNorm1d(6),
        nn.GroupNorm(2, 6),
        nn.LayerNorm(6),
    ).double()


def layers_with_recorders(network: nn.Module) -> list[tuple[Layer, Recorder]]:
    modules = list(network.modules())
    return [(b, a) for a, b in pairwise(modules) if isinstance(a, Recorder) and isinstance(b, Layer)]


def state(network: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def check_same_state(network: nn.Module, before: dict[str, torch.Tensor], *, but: tuple[str, ...] = ()) -> None:
    for name, tensor in network.state_dict().items():
        if not name.endswith(but or ("no such name",)):
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True, msg=name)


STATISTICS = ("running_mean", "running_var")

# ----------------------------------------------------------------------------------------- the statistics themselves


@st.composite
def splits(draw: st.DrawFn, num: int) -> list[int]:
    return sorted(draw(st.lists(st.integers(1, num - 1), unique=True, max_size=num)))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_statistics_are_those_of_all_images_together(data: st.DataObject) -> None:
    """However images are split into batches, mean and unbiased variance are numpy's over all of them at once."""
    num = data.draw(st.integers(2, 40), "images")
    images = some_images(num, seed=data.draw(st.integers(0, 1000), "seed"))
    layer = spoilt(nn.BatchNorm2d(3)).double()
    assert recompute_statistics([layer], batches_of(images, data.draw(splits(num), "cuts"))) == num
    check_statistics(layer, images)


@settings(max_examples=30, deadline=None)
@given(
    offset=st.floats(1, 1e6), spread=st.floats(1e-3, 1e3), cuts=st.lists(st.integers(1, 63), unique=True, max_size=8).map(sorted)
)
def test_a_small_variance_beside_a_large_mean_is_not_lost(offset: float, spread: float, cuts: list[int]) -> None:
    """The variance keeps its digits where a sum of squares minus a squared sum would cancel them."""
    images = offset + spread * np.random.default_rng(0).normal(size=(64, 3, 2, 2))
    layer = nn.BatchNorm2d(3).double()
    recompute_statistics([layer], batches_of(images, cuts))
    mean, var = moments(images)
    np.testing.assert_allclose(statistics(layer)[0], mean, rtol=1e-14, atol=1e-15 * spread)  # a mean near zero cancels
    rounding = 1e-15 * (1 + offset / spread)  # relative, of the deviations
    np.testing.assert_allclose(statistics(layer)[1], var, rtol=100 * rounding)


def test_single_precision_loses_only_its_own_rounding() -> None:
    """In an fp32 network the error is that of fp32 batch means, and does not grow with the number of batches."""
    images = (100 + 0.1 * np.random.default_rng(0).normal(size=(512, 3, 4, 4))).astype(np.float32)
    for batch_size in (2, 32, 512):
        layer = nn.BatchNorm2d(3)
        recompute_statistics([layer], batches_of(images, list(range(batch_size, 512, batch_size))))
        check_statistics(layer, images, rtol=2e-5)


def test_the_mean_of_batch_variances_would_be_noticed() -> None:
    """Where batches differ in their means, the mean of their variances, which `update_bn` takes, is far too small."""
    images = some_images(24)
    batches = batches_of(images, [4, 8, 12, 16, 20])
    exact, averaged = nn.BatchNorm2d(3).double(), nn.BatchNorm2d(3).double()
    recompute_statistics([exact], batches)
    torch.optim.swa_utils.update_bn(batches, averaged)
    check_statistics(exact, images)
    assert (statistics(averaged)[1] < 0.9 * statistics(exact)[1]).all()


def test_every_image_counts_equally_in_a_short_last_batch() -> None:
    """A batch of 2 after one of 30 counts for 2 images, not for half of all, as it does in `update_bn`."""
    images = some_images(32)
    batches = batches_of(images, [30])
    exact, averaged = nn.BatchNorm2d(3).double(), nn.BatchNorm2d(3).double()
    recompute_statistics([exact], batches)
    torch.optim.swa_utils.update_bn(batches, averaged)
    check_statistics(exact, images)
    assert (np.abs(statistics(averaged)[0] - statistics(exact)[0]) > 1).all()


@pytest.mark.parametrize("seed", range(3))
def test_deeper_layers_see_batches_normalised_by_their_own_statistics(seed: int) -> None:
    """Each layer's statistics are those of what it was really given in a training-mode pass, in the paper's way."""
    network, images = deep_network(seed), some_images(22)
    pairs = layers_with_recorders(network)
    assert len(pairs) == 3
    batches = batches_of(images, [5, 7 + 2 * seed, 15])
    recompute_statistics([network], batches)
    for layer, recorder in pairs:
        check_statistics(layer, recorder.values())
    first, second = pairs[0], pairs[1]
    conv = next(module for module in network[4].modules() if isinstance(module, nn.Conv2d))
    for given_to_second, seen in zip(second[1].seen, first[1].seen, strict=True):
        centred = seen - seen.mean((0, 2, 3), keepdim=True)
        own = centred / (seen.var((0, 2, 3), unbiased=False, keepdim=True) + first[0].eps).sqrt()
        torch.testing.assert_close(conv(own.relu()), given_to_second)


@pytest.mark.parametrize("momentum", [0.1, 0.9, 1.0, 0.0, None])
def test_momentum_and_old_statistics_do_not_matter(momentum: float | None) -> None:
    """Whatever the layer's momentum and its statistics before, NaN and infinity included, the result is the same."""
    images = some_images(9)
    for before in (0.0, float("nan"), float("inf"), -1e30):
        layer = nn.BatchNorm2d(3, momentum=momentum).double()
        assert layer.running_mean is not None and layer.running_var is not None
        layer.running_mean.fill_(before)
        layer.running_var.fill_(before)
        recompute_statistics([layer], batches_of(images, [4]))
        check_statistics(layer, images)
        assert layer.momentum == momentum


@pytest.mark.parametrize(
    "make,shape",
    [
        (lambda: nn.BatchNorm1d(3), (12, 3)),
        (lambda: nn.BatchNorm1d(3), (12, 3, 5)),
        (lambda: nn.BatchNorm3d(3), (12, 3, 2, 3, 4)),
        (lambda: nn.BatchNorm2d(3, affine=False), (12, 3, 2, 2)),
        (lambda: BatchNormAct2d(3), (12, 3, 2, 2)),
    ],
    ids=["BatchNorm1d", "BatchNorm1d of sequences", "BatchNorm3d", "not affine", "timm's BatchNormAct2d"],
)
def test_every_kind_of_batchnorm(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    """BatchNorm layers are found by what they are, not by their name or their number of dimensions."""
    images = np.random.default_rng(0).normal(3, 2, shape)
    layer = make().double()
    recompute_statistics([layer], batches_of(images, [2, 7]))
    check_statistics(layer, images)


def test_a_layer_used_twice_sees_both_inputs() -> None:
    """Statistics of a layer that a forward pass runs twice are those of both its inputs together."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(x) + self.norm(10 * x[: len(x) // 2])[:1]

    images, network = some_images(12), Twice().double()
    recompute_statistics([network], batches_of(images, [4, 8]))
    halves = [10 * part[:2] for part in np.split(images, [4, 8])]
    check_statistics(network.norm, np.concatenate([images, *halves]))


def test_dropout_stays_active() -> None:
    """A layer behind dropout gets the statistics of dropped-out inputs: a larger variance than without."""
    images = np.random.default_rng(0).normal(3, 1, (400, 3, 4, 4))
    network = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm2d(3)).double()
    torch.manual_seed(0)
    recompute_statistics([network], batches_of(images, [100, 300]))
    mean, var = statistics(network[1])
    # x / (1 - p) with probability 1 - p: variance (E x^2) / (1 - p) - (E x)^2
    np.testing.assert_allclose(mean, 3, rtol=0.05)
    np.testing.assert_allclose(var, (1 + 9) / 0.5 - 9, rtol=0.05)


def test_autocast_gives_fp32_statistics_of_what_it_computes() -> None:
    """Under bf16 autocast the statistics stay fp32 and are those of the bf16 activations, all of them."""
    images = some_images(16, dtype=np.float32)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), Recorder(), nn.BatchNorm2d(4))
    recorder = network[1]
    assert isinstance(recorder, Recorder)
    recompute_statistics(
        [network], batches_of(images, [5, 11]), forward_context=lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    )
    assert {tensor.dtype for tensor in recorder.seen} == {torch.bfloat16}
    assert network[2].running_mean.dtype == network[2].running_var.dtype == torch.float32
    check_statistics(network[2], recorder.values(), rtol=1e-4)
    plain = copy.deepcopy(network)
    recompute_statistics([plain], batches_of(images, [5, 11]))
    assert not np.array_equal(statistics(plain[2])[0], statistics(network[2])[0])


def test_several_networks_in_one_pass_equal_separate_passes() -> None:
    """Looking at the images once for three networks gives each what a pass of its own would."""
    networks = [deep_network(0), deep_network(1), nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU()).double()]
    alone = copy.deepcopy(networks)
    images = some_images(15)
    recompute_statistics(networks, (batch for batch in batches_of(images, [4, 9])))
    for network, other in zip(networks, alone, strict=True):
        recompute_statistics([other], batches_of(images, [4, 9]))
        check_same_state(network, other.state_dict())


# --------------------------------------------------------------------------------------------- what is left as it was


def test_only_the_statistics_change() -> None:
    """Weights, counters, momenta, hooks, gradients and every module's own mode are as before."""
    network = deep_network()
    network.train()
    network[4].eval()
    network[2].eval()
    for layer, _ in layers_with_recorders(network):
        spoilt(layer)
    modes = [module.training for module in network.modules()]
    momenta = [layer.momentum for layer, _ in layers_with_recorders(network)]
    before = state(network)
    recompute_statistics([network], batches_of(some_images(12), [5]))
    check_same_state(network, before, but=STATISTICS)
    assert [module.training for module in network.modules()] == modes
    assert [layer.momentum for layer, _ in layers_with_recorders(network)] == momenta == [0.1, None, 0.1]
    assert not any(module._forward_hooks for module in network.modules())
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    for layer, _ in layers_with_recorders(network):
        assert not np.isclose(statistics(layer)[0], 7).any()


def test_a_network_in_evaluation_mode_is_run_in_training_mode() -> None:
    """The mode before does not matter: each batch is normalised by its own statistics."""
    images = some_images(12)
    networks = [deep_network(), deep_network().eval()]
    for network in networks:
        recompute_statistics([network], batches_of(images, [5]))
    check_same_state(networks[0], networks[1].state_dict())
    assert networks[0].training and not networks[1].training


@pytest.mark.parametrize("broken_batch", [0, 1, 2])
def test_an_exception_leaves_everything_as_it_was(broken_batch: int) -> None:
    """Whether images or network fail, first or last: modes, momenta, statistics and counters are those of before."""
    networks = [deep_network(0), deep_network(1).eval()]
    for network in networks:
        for layer, _ in layers_with_recorders(network):
            spoilt(layer)
    networks[0][4].eval()
    modes = [[module.training for module in network.modules()] for network in networks]
    before = [state(network) for network in networks]

    def failing_images() -> Iterator[torch.Tensor]:
        for number, batch in enumerate(batches_of(some_images(12), [4, 8])):
            if number == broken_batch:
                raise OSError("a disk failed")
            yield batch

    batches = batches_of(some_images(12), [4, 8])
    batches[broken_batch] = batches[broken_batch][:, :2]  # two channels where the network takes three
    for images, error in ((failing_images(), OSError), (batches, RuntimeError)):
        with pytest.raises(error):
            recompute_statistics(networks, images)
        for network, before_it, its_modes in zip(networks, before, modes, strict=True):
            check_same_state(network, before_it)
            assert [module.training for module in network.modules()] == its_modes
            assert [layer.momentum for layer, _ in layers_with_recorders(network)] == [0.1, None, 0.1]
            assert not any(module._forward_hooks for module in network.modules())


def test_no_images_are_an_error_and_change_nothing() -> None:
    """Without images there are no statistics: an error, and the old ones stay."""
    network = deep_network()
    before = state(network)
    with pytest.raises(ValueError, match=r"at least two values per channel.* 0 images"):
        recompute_statistics([network], [])
    check_same_state(network, before)


def test_a_layer_that_no_image_reaches_is_an_error_and_changes_nothing() -> None:
    """A layer left out of the forward pass is an error, after which no layer has new statistics."""

    class Partial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    network = Partial().double()
    before = state(network)
    with pytest.raises(ValueError, match=r"at least two values per channel.* 12 images"):
        recompute_statistics([network], batches_of(some_images(12), []))
    check_same_state(network, before)


def test_other_normalisations_are_left_alone() -> None:
    """GroupNorm, LayerNorm, frozen BatchNorm and BatchNorm without moving statistics are as before."""
    network = nn.Sequential(
        nn.GroupNorm(1, 3),
        nn.BatchNorm2d(3, track_running_stats=False),
        FrozenBatchNorm2d(3),
        nn.InstanceNorm2d(3),
        nn.LayerNorm([3, 4, 4]),
    ).double()
    frozen: Any = network[2]
    frozen.running_mean.fill_(2)
    before, images = state(network), batches_of(some_images(12), [5])
    assert recompute_statistics([network], images) == 12
    check_same_state(network, before)
    assert network[1].running_mean is None and network[1].running_var is None


def test_no_gradients_are_tracked() -> None:
    """The pass builds no graph."""
    network = nn.Sequential(nn.Conv2d(3, 3, 1), Recorder(), nn.BatchNorm2d(3)).double()
    enabled: list[bool] = []
    network.register_forward_hook(lambda *_: enabled.append(torch.is_grad_enabled()))
    recompute_statistics([network], batches_of(some_images(8), [3]))
    assert enabled == [False, False] and torch.is_grad_enabled()


def test_the_context_is_entered_for_every_forward_pass() -> None:
    """Each network's pass over each batch runs inside a fresh `forward_context`."""
    num_entered = 0

    def context() -> nullcontext[None]:
        nonlocal num_entered
        num_entered += 1
        return nullcontext()

    networks = [nn.BatchNorm2d(3).double(), nn.BatchNorm2d(3).double()]
    recompute_statistics(networks, batches_of(some_images(9), [3, 6]), forward_context=context)
    assert num_entered == 6


# ------------------------------------------------------------------------------------------------- several processes

NUM_RANKS = 3
# How 30 images are dealt to the ranks of a group, by the number of ranks: cuts, then each rank's batch size.
SHARES: dict[str, tuple[int, list[int], int]] = {
    "one rank": (1, [], 7),
    "two equal ranks": (2, [15], 4),
    "two unequal ranks": (2, [4], 5),
    "three unequal ranks": (3, [3, 17], 6),
    "three ranks, one without images": (3, [14, 14], 8),
    "three ranks, the first without images": (3, [0, 9], 8),
}


def network_for_ranks() -> nn.Sequential:
    """The first layer sees the images themselves, the second what the batches' own statistics made of them."""
    torch.manual_seed(0)
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), Recorder(), nn.BatchNorm2d(4, momentum=None)).double()


def _work_as_rank(rank: int, folder: Path) -> None:
    """One process of a gloo group: all cases of SHARES one after the other, each result into a file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=NUM_RANKS)
    groups = {size: torch.distributed.new_group(list(range(size))) for size in range(1, NUM_RANKS + 1)}

    def sum_in(group: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
            total = tensor.clone()
            torch.distributed.all_reduce(total, group=group)
            return total

        return sum_over_ranks

    for name, (world_size, cuts, batch_size) in SHARES.items():
        if rank >= world_size:
            continue
        images = np.split(some_images(30), cuts)[rank]
        network = network_for_ranks()
        batches = batches_of(images, list(range(batch_size, len(images), batch_size)))
        num_images = recompute_statistics([network], batches, sum_over_ranks=sum_in(groups[world_size]))
        recorder = network[2]
        assert isinstance(recorder, Recorder)
        torch.save((num_images, network.state_dict(), recorder.seen), folder / f"{name}-{rank}.pt")

    network = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm1d(2)).double()
    _set_statistics(network, rank)
    mean_over_ranks(network, sum_in(groups[NUM_RANKS]), NUM_RANKS)
    torch.save(network.state_dict(), folder / f"mean-{rank}.pt")
    torch.distributed.destroy_process_group()


def _set_statistics(network: nn.Module, rank: int) -> None:
    random = torch.Generator().manual_seed(rank)
    for module in network.modules():
        if isinstance(module, Layer) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(generator=random)
            module.running_var.uniform_(0.1, 3, generator=random)


@pytest.fixture(scope="module")
def from_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that three real processes wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(_work_as_rank, NUM_RANKS, folder)
    return folder


@pytest.mark.parametrize("name", SHARES)
def test_ranks_together_have_the_statistics_of_all_images(from_ranks: Path, name: str) -> None:
    """However images are dealt to ranks, every rank ends with numpy's statistics over all of them, bit for bit the same."""
    world_size, _, _ = SHARES[name]
    results = [torch.load(from_ranks / f"{name}-{rank}.pt") for rank in range(world_size)]
    for num_images, state_dict, _ in results:
        assert num_images == 30
        for key, tensor in state_dict.items():
            assert torch.equal(tensor, results[0][1][key]), key
    network = network_for_ranks()
    network.load_state_dict(results[0][1])
    check_statistics(network[0], some_images(30))
    given_to_last = [batch for _, _, seen in results for batch in seen]
    check_statistics(network[3], torch.cat(given_to_last).numpy())


def test_mean_over_ranks(from_ranks: Path) -> None:
    """Each rank ends with the mean over ranks of the moving statistics, the same bits everywhere."""
    networks = [nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm1d(2)).double() for _ in range(NUM_RANKS)]
    for rank, network in enumerate(networks):
        _set_statistics(network, rank)
    results = [torch.load(from_ranks / f"mean-{rank}.pt") for rank in range(NUM_RANKS)]
    for key in results[0]:
        assert all(torch.equal(result[key], results[0][key]) for result in results), key
        before = np.stack([network.state_dict()[key].numpy() for network in networks])
        np.testing.assert_allclose(results[0][key].numpy(), before.mean(axis=0), rtol=1e-12)
        if key.endswith(STATISTICS):
            assert len({array.tobytes() for array in before}) == NUM_RANKS  # the ranks did differ


def test_mean_over_one_rank_changes_nothing() -> None:
    """With one process the moving statistics stay as training left them, and so do layers without any."""
    network = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False), FrozenBatchNorm2d(3))
    _set_statistics(network, 0)
    before = state(network)
    mean_over_ranks(network, lambda tensor: tensor, 1)
    check_same_state(network, before)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """On a GPU the statistics are numpy's to single precision, under bf16 autocast those of the bf16 activations."""
    images = some_images(64, dtype=np.float32)
    batches = [batch.to("cuda:0", memory_format=torch.channels_last) for batch in batches_of(images, [10, 40])]
    layer = nn.BatchNorm2d(3).to("cuda:0")
    assert recompute_statistics([layer], batches) == 64
    check_statistics(layer.cpu(), images, rtol=1e-5)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), Recorder(), nn.BatchNorm2d(4)).to("cuda:0")
    recompute_statistics([network], batches, forward_context=lambda: torch.autocast("cuda", dtype=torch.bfloat16))
    recorder = network[1]
    assert isinstance(recorder, Recorder) and recorder.seen[0].dtype == torch.bfloat16
    recorder.seen = [tensor.cpu() for tensor in recorder.seen]
    check_statistics(network.cpu()[2], recorder.values(), rtol=1e-4)
