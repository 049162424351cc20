"""BatchNorm statistics of fixed weights: exact over all images of a pass and all ranks, several networks in one pass."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import nn

from imagenet_swa.models import batchnorm_layers, mode_of

SumOverRanks = Callable[[torch.Tensor], torch.Tensor]


def recompute_statistics(
    networks: Sequence[nn.Module],
    images: Iterable[torch.Tensor],
    *,
    sum_over_ranks: SumOverRanks = lambda tensor: tensor,
    forward_context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> int:
    """Replace running mean and variance of every BatchNorm layer by those of its inputs over all images.

    The networks run in training mode, as in the paper's code: each batch is normalised by its own statistics and dropout
    stays active. Unlike there, and unlike `torch.optim.swa_utils.update_bn`, the statistics are those of the concatenated
    batches, not a mean of the batches' variances: every image counts once and equally, however the images are split into
    batches and over ranks. The variance is the unbiased one, as in BatchNorm's own moving average.

    Args:
        networks: all see each batch; those without BatchNorm are left alone.
        images: batches (n, 3, H, W) of this rank.
        sum_over_ranks: all-reduce of a float64 tensor.
        forward_context: entered around every forward pass, for autocast.

    Returns:
        Number of images over all ranks.

    Raises:
        ValueError: no images, or a layer that they do not reach; all statistics are then as before.
    """
    num_images = 0
    with ExitStack() as stack:
        moments = [stack.enter_context(_collected_moments(network)) for network in networks]
        with torch.no_grad():
            for batch in images:
                num_images += len(batch)
                for network in networks:
                    with forward_context():
                        network(batch)
    device = next((p.device for network in networks for p in network.parameters()), torch.device("cpu"))
    total = int(sum_over_ranks(torch.tensor([float(num_images)], dtype=torch.float64, device=device)).item())
    merged = [(layer, m.over_ranks(sum_over_ranks)) for of_network in moments for layer, m in of_network.items()]
    if any(m.count < 2 for _, m in merged):
        raise ValueError(
            f"BatchNorm statistics need at least two values per channel; a layer had fewer in a pass over {total} images"
        )
    for layer, layer_moments in merged:
        layer_moments.write_to(layer)
    return total


def mean_over_ranks(network: nn.Module, sum_over_ranks: SumOverRanks, world_size: int) -> None:
    """Replace the moving statistics that each rank kept while training by their mean over ranks, on every rank.

    For captured weights, which are evaluated as SGD left them: all ranks' images count, not rank 0's alone.
    """
    for layer in batchnorm_layers(network).values():
        for statistic in (layer.running_mean, layer.running_var):
            assert statistic is not None
            statistic.copy_(sum_over_ranks(statistic) / world_size)


def statistics_of_ranks(network: nn.Module, sum_over_ranks: SumOverRanks, rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """The moving statistics that each rank keeps while training, by `rank-0/NAME` in host memory, on every rank; they stay as
    they are.
    """
    mine = _moving_statistics(network)
    if not mine:
        return {}
    flat = torch.cat([statistic.flatten() for statistic in mine.values()])
    rows = torch.zeros(world_size, len(flat), dtype=flat.dtype, device=flat.device)
    rows[rank] = flat
    rows = sum_over_ranks(rows).cpu()
    sizes = [statistic.numel() for statistic in mine.values()]
    return {
        f"rank-{number}/{name}": part.clone()
        for number, row in enumerate(rows)
        for name, part in zip(mine, row.split(sizes), strict=True)
    }


def restore_statistics(network: nn.Module, saved: dict[str, torch.Tensor], rank: int, world_size: int) -> None:
    """Put back this rank's moving statistics; where there were other ranks than now, the mean over those. Nothing saved: nothing
    changed.
    """
    num_saved = len({name.partition("/")[0] for name in saved})
    for name, statistic in _moving_statistics(network).items() if saved else ():
        if num_saved == world_size:
            statistic.copy_(saved[f"rank-{rank}/{name}"])
        else:
            statistic.copy_(torch.stack([saved[f"rank-{number}/{name}"] for number in range(num_saved)]).mean(0))


def _moving_statistics(network: nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, layer in batchnorm_layers(network).items():
        assert layer.running_mean is not None and layer.running_var is not None
        found |= {f"{name}.running_mean": layer.running_mean, f"{name}.running_var": layer.running_var}
    return found


class _Moments:
    """Count, mean (C,) and sum of squared deviations (C,) of all values a channel has seen, in float64."""

    def __init__(self, num_channels: int, device: torch.device) -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.mean = torch.zeros(num_channels, dtype=torch.float64, device=device)
        self.deviations = torch.zeros(num_channels, dtype=torch.float64, device=device)

    def add(self, count: int, mean: torch.Tensor, unbiased_var: torch.Tensor) -> None:
        """Merge a batch's moments (Chan, Golub, LeVeque 1983, eq. 2.1)."""
        total = self.count + count
        shift = mean.double() - self.mean
        self.deviations += unbiased_var.double() * (count - 1) + shift**2 * (self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total

    def over_ranks(self, sum_over_ranks: SumOverRanks) -> "_Moments":
        """The moments of all ranks' values together."""
        merged = _Moments(len(self.mean), self.mean.device)
        merged.count = sum_over_ranks(self.count.reshape(1).clone())[0]
        merged.mean = sum_over_ranks(self.mean * self.count) / merged.count
        merged.deviations = sum_over_ranks(self.deviations + self.count * (self.mean - merged.mean) ** 2)
        return merged

    def write_to(self, layer: nn.modules.batchnorm._BatchNorm) -> None:
        assert layer.running_mean is not None and layer.running_var is not None
        layer.running_mean.copy_(self.mean)
        layer.running_var.copy_(self.deviations / (self.count - 1))


@contextmanager
def _collected_moments(network: nn.Module) -> Iterator[dict[nn.modules.batchnorm._BatchNorm, _Moments]]:
    """Training mode in which every BatchNorm layer's batch statistics are collected.

    With momentum 1 a forward pass leaves exactly the batch's own statistics in the layer, where a hook reads them: no
    second pass over the activations. On the way out modes, momenta, statistics and counters are as before.
    """
    layers = list(batchnorm_layers(network).values())
    saved = [(layer.momentum, {k: v.clone() for k, v in layer.named_buffers(recurse=False)}) for layer in layers]
    moments: dict[nn.modules.batchnorm._BatchNorm, _Moments] = {}

    def collect(layer: nn.Module, inputs: tuple[torch.Tensor, ...], _output: object) -> None:
        assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
        assert layer.running_mean is not None and layer.running_var is not None
        moments[layer].add(inputs[0].numel() // inputs[0].shape[1], layer.running_mean, layer.running_var)

    with mode_of(network, training=True), ExitStack() as hooks:
        for layer in layers:
            assert layer.running_mean is not None
            moments[layer] = _Moments(len(layer.running_mean), layer.running_mean.device)
            hooks.callback(layer.register_forward_hook(collect).remove)
            layer.reset_running_stats()  # 0 times an infinity of before would be NaN
            layer.momentum = 1.0
        try:
            yield moments
        finally:
            for layer, (momentum, buffers) in zip(layers, saved, strict=True):
                layer.momentum = momentum
                for name, buffer in buffers.items():
                    getattr(layer, name).copy_(buffer)
