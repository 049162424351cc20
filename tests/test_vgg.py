"""The VGG-16 of the CIFAR experiments against torchvision's layers, plain functions and arithmetic."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from imagenet_swa.vgg import VGG16, vgg16, vgg16_bn

PUBLISHED_CHANNELS = [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
POOLED_AFTER = [2, 4, 7, 10, 13]  # convolutions


def convolutions(network: nn.Module) -> list[nn.Conv2d]:
    return [module for module in network.modules() if isinstance(module, nn.Conv2d)]


def shape(module: nn.Module) -> tuple[Any, ...]:
    """What a layer is: its type and the numbers that define it."""
    if isinstance(module, nn.Conv2d):
        return (nn.Conv2d, module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding)
    if isinstance(module, nn.MaxPool2d):
        size = module.kernel_size
        return (nn.MaxPool2d, size if isinstance(size, tuple) else (size, size), module.stride, module.padding)
    return (type(module), getattr(module, "num_features", None))


@pytest.mark.parametrize(("ours", "theirs"), [(vgg16, torchvision.models.vgg16), (vgg16_bn, torchvision.models.vgg16_bn)])
def test_the_convolutions_are_torchvisions(ours: Any, theirs: Any):
    """Layer for layer, name for name, the part before the classifier is torchvision's VGG-16."""
    with torch.device("meta"):
        network, reference = ours(10), theirs()
    assert [shape(layer) for layer in network.features] == [shape(layer) for layer in reference.features]
    assert network.features.state_dict().keys() == reference.features.state_dict().keys()


def test_the_names_are_those_of_the_authors_files():
    """Weights of the authors' code fit: `features.N` as in torchvision, and linear layers 1, 4 and 6 of `classifier`."""
    names = vgg16(10).state_dict().keys()
    assert {name for name in names if name.startswith("classifier")} == {
        f"classifier.{number}.{part}" for number in (1, 4, 6) for part in ("weight", "bias")
    }


@pytest.mark.parametrize(("num_classes", "millions"), [(10, 15.25), (100, 15.29)])
def test_number_of_parameters(num_classes: int, millions: float):
    """15.2 M for CIFAR-10 and 15.3 M for CIFAR-100: 9 weights per pair of channels and a bias per channel, then 512 units."""
    pairs = zip([3, *PUBLISHED_CHANNELS], PUBLISHED_CHANNELS, strict=False)
    wanted = sum(9 * before * after + after for before, after in pairs)
    wanted += 2 * (512 * 512 + 512) + 512 * num_classes + num_classes
    got = sum(parameter.numel() for parameter in vgg16(num_classes).parameters())
    assert got == wanted
    assert got / 1e6 == pytest.approx(millions, abs=5e-3)
    with_norms = sum(parameter.numel() for parameter in vgg16_bn(num_classes).parameters())
    assert with_norms == wanted + 2 * sum(PUBLISHED_CHANNELS)


@pytest.mark.parametrize("make", [vgg16, vgg16_bn])
def test_initial_weights(make: Any):
    """Convolutions start from N(0, 2 / (9 x output channels)) with zero biases: mean, spread and fourth moment agree."""
    torch.manual_seed(3)
    for layer in convolutions(make(10)):
        values = layer.weight.detach().flatten().double()
        sigma, tolerance = math.sqrt(2 / (9 * layer.out_channels)), 5 / math.sqrt(len(values))
        assert abs(values.mean() / sigma) < tolerance
        assert abs(values.std() / sigma - 1) < tolerance
        assert abs((values / sigma).pow(4).mean() / 3 - 1) < 4 * tolerance
        assert layer.bias is not None and not layer.bias.any()


@pytest.mark.parametrize("batch_norm", [False, True])
def test_forward_against_plain_functions(batch_norm: bool):
    """Convolve, normalise, rectify, halve after 2, 4, 7, 10 and 13 convolutions, and three linear maps give the same logits."""
    torch.manual_seed(4)
    network = VGG16(7, batch_norm=batch_norm, width=0.125).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2)
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    images = torch.randn(4, 3, 32, 32)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    x = images
    for number, layer in enumerate(convolutions(network), 1):
        x = F.conv2d(x, layer.weight, layer.bias, padding=1)
        if batch_norm:
            n = norms[number - 1]
            x = F.batch_norm(x, n.running_mean, n.running_var, n.weight, n.bias)
        x = x.clamp(min=0)
        if number in POOLED_AFTER:
            x = x.unfold(2, 2, 2).unfold(3, 2, 2).amax(dim=(-1, -2))
    first, second, last = (module for module in network.modules() if isinstance(module, nn.Linear))
    for linear in (first, second):
        x = (x.flatten(1) @ linear.weight.T + linear.bias).clamp(min=0)
    assert torch.allclose(network(images), x @ last.weight.T + last.bias, atol=1e-5)
    assert network(images).shape == (4, 7)


def test_dropout_is_on_the_classifiers_inputs():
    """Training zeroes the share `dropout` of what the first two linear layers see; none without dropout or in evaluation."""
    torch.manual_seed(5)
    network = vgg16(10, width=0.125, dropout=0.25)
    seen: list[torch.Tensor] = []
    for module in network.classifier:
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for layer in network.features:
        layer.register_forward_hook(lambda *hook: torch.ones_like(hook[-1]))  # nothing is zero before the dropout
    network.train()(torch.zeros(500, 3, 32, 32))
    assert (seen[0] == 0).float().mean() == pytest.approx(0.25, abs=0.02)
    assert seen[0].max() == pytest.approx(1 / 0.75)
    images = torch.randn(2, 3, 32, 32)
    for network, random in (
        (vgg16(10, width=0.125, dropout=0.0).train(), False),
        (vgg16(10, width=0.125).eval(), False),
        (vgg16(10, width=0.125).train(), True),
    ):
        assert torch.equal(network(images), network(images)) is not random
    assert [module.p for module in vgg16(10).modules() if isinstance(module, nn.Dropout)] == [0.5, 0.5]
    assert [module.p for module in vgg16_bn(10, dropout=0.3).modules() if isinstance(module, nn.Dropout)] == [0.3, 0.3]


@pytest.mark.parametrize("width", [0.25, 0.5, 1.5])
def test_width(width: float):
    """`width` scales every channel and hidden unit alike, and neither the image's three channels nor the classes."""
    with torch.device("meta"):
        network = vgg16_bn(10, width=width)
    assert [layer.out_channels for layer in convolutions(network)] == [width * channels for channels in PUBLISHED_CHANNELS]
    linear = [module for module in network.modules() if isinstance(module, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linear] == [
        (512 * width, 512 * width),
        (512 * width, 512 * width),
        (512 * width, 10),
    ]


def test_a_width_without_channels():
    """A width that leaves a layer without channels is refused."""
    with pytest.raises(ValueError, match=r"width 0\.001 leaves no channels"):
        vgg16(10, width=0.001)
