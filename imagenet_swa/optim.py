"""SGD and its parameter groups."""

from typing import Any

import torch
from torch import nn

from imagenet_swa.config import InputError, OptimizerConfig


def make_sgd(network: nn.Module, config: OptimizerConfig, *, fused: bool) -> torch.optim.SGD:
    """SGD over the parameters that need gradients; the learning rate is written into it before every step.

    With `decay_norm_and_bias` off, parameters of one dimension (biases, scales and shifts of norms) are not decayed.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    if not parameters:
        raise InputError("the network has no parameters to train")
    exempt = [p for p in parameters if p.ndim <= 1 and not config.decay_norm_and_bias]
    decayed = [p for p in parameters if p.ndim > 1 or config.decay_norm_and_bias]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": exempt, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=0.0,
        momentum=config.momentum,
        nesterov=config.nesterov,
        fused=fused,
    )
    if config.momentum > 0:
        # The fused kernel leaves a buffer that it makes itself unwritten where fp16's loss scale overflows in the first step.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Write the rate into every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def momentum_buffers(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """SGD's momentum by parameter name; parameters that had no step yet are absent. Also of an optimizer that Accelerate has
    wrapped.
    """
    optimizer = bare(optimizer)
    named = {name: optimizer.state.get(p, {}).get("momentum_buffer") for name, p in network.named_parameters()}
    return {name: buffer for name, buffer in named.items() if buffer is not None}


def load_momentum_buffers(network: nn.Module, optimizer: torch.optim.Optimizer, buffers: dict[str, torch.Tensor]) -> None:
    """Put back what `momentum_buffers` gave, on each parameter's device and in its memory order.

    The fused kernel on CPUs walks parameter and momentum as flat memory: another order there means wrong pairs.
    """
    optimizer = bare(optimizer)
    for name, parameter in network.named_parameters():
        if name in buffers:
            optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter.detach()).copy_(buffers[name])


def bare(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside Accelerate's wrapper."""
    return optimizer.optimizer if hasattr(optimizer, "optimizer") else optimizer
