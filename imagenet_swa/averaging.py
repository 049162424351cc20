"""The equal-weight running average of captured weights (Alg. 1), with and without the pretrained weights in it."""

import torch
from torch import nn

from imagenet_swa.models import Weights


def capture_weights(network: nn.Module) -> Weights:
    """A copy of all parameters and buffers in host memory, floating-point ones in fp32; each owns its memory."""
    captured = {}
    for name, tensor in network.state_dict().items():
        target = torch.float32 if tensor.is_floating_point() else tensor.dtype
        captured[name] = tensor.detach().to("cpu", target, copy=True).contiguous()
    return captured


class WeightAverage:
    """Average of k captures. Floating-point parameters are averaged; buffers (counters, BatchNorm statistics, which the
    average needs recomputed) are those of the latest capture.

    Kept in fp32 in host memory: one copy for the average, one for the pretrained weights.
    """

    def __init__(self, network: nn.Module) -> None:
        """Start with the network's present weights as the pretrained ones, and no capture."""
        self._pretrained = capture_weights(network)
        parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
        self._averaged = {name for name in parameters if self._pretrained[name].is_floating_point()}
        self._average = {name: tensor.clone() for name, tensor in self._pretrained.items()}
        self.num_averaged = 0

    def start_from(self, weights: Weights) -> None:
        """Take these for the pretrained weights and forget all captures."""
        self._pretrained = {name: tensor.clone() for name, tensor in weights.items()}
        self._average = {name: tensor.clone() for name, tensor in weights.items()}
        self.num_averaged = 0

    def update(self, captured: Weights) -> None:
        """Fold in the weights of the end of a cycle: w <- (w n + captured) / (n + 1), n captures before it."""
        n = self.num_averaged
        for name, tensor in captured.items():
            if name in self._averaged:
                self._average[name] = _weighted_mean(self._average[name], n, tensor, 1)
            else:
                self._average[name] = tensor.clone()
        self.num_averaged += 1

    def pretrained(self) -> Weights:
        """The weights that it started with."""
        return {name: tensor.clone() for name, tensor in self._pretrained.items()}

    def weights(self, *, include_pretrained: bool) -> Weights:
        """The average of the captures alone, or as Alg. 1 with the pretrained weights as its first model:
        w_with = (k w_without + pretrained) / (k + 1).

        Raises:
            ValueError: captures alone were asked for, but there is none yet.
        """
        if include_pretrained:
            return {
                name: _weighted_mean(tensor, self.num_averaged, self._pretrained[name], 1)
                if name in self._averaged
                else tensor.clone()
                for name, tensor in self._average.items()
            }
        if self.num_averaged == 0:
            raise ValueError("no weights captured yet; the average of none is undefined")
        return {name: tensor.clone() for name, tensor in self._average.items()}

    def state(self) -> Weights:
        """All it needs to go on, as named tensors; the count is `num_averaged`."""
        pretrained = {f"pretrained/{name}": tensor for name, tensor in self._pretrained.items()}
        return pretrained | {f"average/{name}": tensor for name, tensor in self._average.items()}

    def load_state(self, state: Weights, num_averaged: int) -> None:
        """Go on from what `state` and `num_averaged` were."""
        for kind, target in (("pretrained", self._pretrained), ("average", self._average)):
            for name in target:
                target[name] = state[f"{kind}/{name}"].clone()
        self.num_averaged = num_averaged


def _weighted_mean(a: torch.Tensor, weight_a: int, b: torch.Tensor, weight_b: int) -> torch.Tensor:
    """(weight_a a + weight_b b) / (weight_a + weight_b), computed in float64 and rounded once to fp32."""
    return ((a.double() * weight_a + b.double() * weight_b) / (weight_a + weight_b)).float()
