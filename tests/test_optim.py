"""SGD against numpy, its parameter groups, and momentum that survives a checkpoint."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from imagenet_swa.config import InputError, OptimizerConfig
from imagenet_swa.optim import load_momentum_buffers, make_sgd, momentum_buffers, set_learning_rate

BOTH_KERNELS = pytest.mark.parametrize("fused", [False, True])


def network_of_all_kinds() -> nn.Sequential:
    """Parameters of 4, 2 and 1 dimensions: convolution, linear layer, biases and a norm's scale and shift."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 5))


def train(network: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int, lr: float = 0.05) -> None:
    """Steps on images that follow from the step."""
    for step in range(num_steps):
        images = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        network(images).square().mean().backward()
        set_learning_rate(optimizer, lr / (step + 1))
        optimizer.step()


@BOTH_KERNELS
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize("decay_norm_and_bias", [False, True])
def test_steps_are_sgd_by_hand(fused: bool, nesterov: bool, decay_norm_and_bias: bool, momentum: float):
    """Eight steps with given gradients and changing rates equal v <- m v + (g + d w), w <- w - lr v, in numpy's float64."""
    network = nn.ParameterDict({"matrix": torch.randn(3, 4), "bias": torch.randn(4)})
    config = OptimizerConfig(momentum=momentum, nesterov=nesterov, weight_decay=0.1, decay_norm_and_bias=decay_norm_and_bias)
    optimizer = make_sgd(network, config, fused=fused)
    weights = {name: p.detach().double().numpy().copy() for name, p in network.items()}
    velocity = {name: np.zeros_like(w) for name, w in weights.items()}
    random = np.random.default_rng(0)
    for lr in np.linspace(0.1, 0.01, 8):
        for name, parameter in network.items():
            gradient = random.normal(size=tuple(parameter.shape)).astype(np.float32)
            parameter.grad = torch.from_numpy(gradient.copy())
            decay = 0.1 if name == "matrix" or decay_norm_and_bias else 0.0
            total = gradient.astype(np.float64) + decay * weights[name]
            velocity[name] = momentum * velocity[name] + total
            direction = total + momentum * velocity[name] if nesterov else velocity[name]
            weights[name] = weights[name] - lr * direction
        set_learning_rate(optimizer, float(lr))
        optimizer.step()
    for name, parameter in network.items():
        np.testing.assert_allclose(parameter.detach().numpy(), weights[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay_norm_and_bias", [False, True])
def test_groups_hold_every_parameter_once(decay_norm_and_bias: bool):
    """Each trainable parameter is in one group; without decay_norm_and_bias those of one dimension are not decayed."""
    network = network_of_all_kinds()
    network[1].weight.requires_grad_(False)
    optimizer = make_sgd(network, OptimizerConfig(weight_decay=0.3, decay_norm_and_bias=decay_norm_and_bias), fused=False)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == sum(len(group["params"]) for group in optimizer.param_groups)
    found = {name: decay[id(p)] for name, p in network.named_parameters() if id(p) in decay}
    exempt = 0.3 if decay_norm_and_bias else 0.0
    assert found == {"0.weight": 0.3, "0.bias": exempt, "1.bias": exempt, "4.weight": 0.3, "4.bias": exempt}
    assert all(group["params"] for group in optimizer.param_groups)


def test_the_paper_decays_everything():
    """By default all parameters are decayed by 1e-4, with momentum 0.9, as in the paper."""
    (group,) = make_sgd(network_of_all_kinds(), OptimizerConfig(), fused=False).param_groups
    assert (group["weight_decay"], group["momentum"], group["nesterov"]) == (1e-4, 0.9, False)


def test_learning_rate_reaches_every_group():
    """The learning rate is written into all groups; before that it is 0, so that a forgotten one changes nothing."""
    optimizer = make_sgd(network_of_all_kinds(), OptimizerConfig(decay_norm_and_bias=False), fused=False)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 0.0]
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


@BOTH_KERNELS
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_momentum_survives_a_checkpoint(fused: bool, memory_format: torch.memory_format):
    """Weights and momentum that went through contiguous host memory continue exactly like the uninterrupted ones, in either
    memory order and with either kernel; without the momentum they do not.
    """
    network = network_of_all_kinds().to(memory_format=memory_format)
    optimizer = make_sgd(network, OptimizerConfig(), fused=fused)
    train(network, optimizer, 3)
    saved = {name: buffer.to("cpu", copy=True).contiguous() for name, buffer in momentum_buffers(network, optimizer).items()}
    assert list(saved) == [name for name, _ in network.named_parameters()]
    resumed, forgetful = copy.deepcopy(network), copy.deepcopy(network)
    train(network, optimizer, 3)

    resumed_optimizer = make_sgd(resumed, OptimizerConfig(), fused=fused)
    load_momentum_buffers(resumed, resumed_optimizer, saved)
    train(resumed, resumed_optimizer, 3)
    for one, other in zip(resumed.parameters(), network.parameters(), strict=True):
        assert torch.equal(one, other)

    train(forgetful, make_sgd(forgetful, OptimizerConfig(), fused=fused), 3)
    assert not any(torch.equal(one, other) for one, other in zip(forgetful.parameters(), network.parameters(), strict=True))


def test_loaded_momentum_owns_its_memory():
    """Steps after loading do not change what was loaded, and saving gives it back."""
    network = network_of_all_kinds()
    optimizer = make_sgd(network, OptimizerConfig(), fused=False)
    saved = {name: torch.full_like(p, 0.5) for name, p in network.named_parameters()}
    load_momentum_buffers(network, optimizer, saved)
    for name, buffer in momentum_buffers(network, optimizer).items():
        assert torch.equal(buffer, saved[name])
        assert not buffer.requires_grad
    train(network, optimizer, 1)
    assert all((buffer == 0.5).all() for buffer in saved.values())


def test_momentum_starts_at_zero():
    """Before the first step every parameter's momentum is zero, in the parameter's own memory order."""
    net = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    buffers = momentum_buffers(net, make_sgd(net, OptimizerConfig(), fused=True))
    assert buffers.keys() == dict(net.named_parameters()).keys()
    for name, parameter in net.named_parameters():
        assert not buffers[name].any()
        assert buffers[name].stride() == parameter.stride()


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_in_the_first_step_leaves_no_trace(fused):
    """fp16's loss scaler may skip the very first step; the second one is then the first step of SGD by hand."""
    torch.manual_seed(0)
    net = nn.Linear(5, 3)
    start = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    optimizer = make_sgd(net, OptimizerConfig(momentum=0.9, weight_decay=0.0), fused=fused)
    set_learning_rate(optimizer, 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for is_overflow in (True, False):
        optimizer.zero_grad()
        scaler.scale(net(torch.ones(2, 5)).square().sum()).backward()
        if is_overflow:
            for parameter in net.parameters():
                assert parameter.grad is not None
                parameter.grad.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update()
        if is_overflow:
            assert all(torch.equal(parameter, start[name]) for name, parameter in net.named_parameters())
    reference = nn.Linear(5, 3)
    reference.load_state_dict(start)
    reference(torch.ones(2, 5)).square().sum().backward()
    for name, parameter in net.named_parameters():
        gradient = dict(reference.named_parameters())[name].grad
        assert gradient is not None
        torch.testing.assert_close(parameter.detach(), start[name] - 0.1 * gradient)


def test_network_without_trainable_parameters_is_refused():
    """A network with nothing to train is the user's mistake, not a crash in torch."""
    with pytest.raises(InputError, match="no parameters to train"):
        make_sgd(network_of_all_kinds().requires_grad_(False), OptimizerConfig(), fused=False)
