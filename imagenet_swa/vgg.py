"""VGG-16 for images of 32 x 32 pixels, as in the paper's CIFAR experiments: 13 convolutions and three linear layers.

The layers and their initial weights are those of the authors' code (its models/vgg.py): torchvision's convolutions, and a
classifier of 512 units in place of 4096.
"""

import math

import torch
from torch import nn

BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of the convolutions between one halving of the image and the next."""


class VGG16(nn.Module):
    """Images (N, 3, 32, 32) -> logits (N, num_classes).

    Args:
        num_classes: number of outputs.
        batch_norm: normalise after every convolution. The paper's network does not.
        width: share of the channels and hidden units, for small variants; 1 is the paper's.
        dropout: share of the classifier's inputs and hidden units that training zeroes.

    Raises:
        ValueError: a width that leaves no channel.
    """

    def __init__(self, num_classes: int, *, batch_norm: bool = False, width: float = 1.0, dropout: float = 0.5) -> None:
        super().__init__()
        if min(round(width * channels) for block in BLOCKS for channels in block) < 1:
            raise ValueError(f"width {width:g} leaves no channels")
        num_hidden = round(width * 512)
        self.features = _convolutions(width, batch_norm=batch_norm)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(num_hidden, num_hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(num_hidden, num_hidden),
            nn.ReLU(inplace=True),
            nn.Linear(num_hidden, num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                _initialise(module)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits; images of another size than 32 x 32 do not fit the classifier."""
        return self.classifier(self.features(images).flatten(1))


def vgg16(num_classes: int, *, width: float = 1.0, dropout: float = 0.5) -> VGG16:
    """The paper's network."""
    return VGG16(num_classes, width=width, dropout=dropout)


def vgg16_bn(num_classes: int, *, width: float = 1.0, dropout: float = 0.5) -> VGG16:
    """The same with BatchNorm after every convolution, which trains faster."""
    return VGG16(num_classes, batch_norm=True, width=width, dropout=dropout)


NETWORKS = {"vgg16": vgg16, "vgg16_bn": vgg16_bn}


def _convolutions(width: float, *, batch_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    num_in = 3
    for block in BLOCKS:
        for channels in block:
            num_out = round(width * channels)
            layers.append(nn.Conv2d(num_in, num_out, kernel_size=3, padding=1))
            if batch_norm:
                layers.append(nn.BatchNorm2d(num_out))
            layers.append(nn.ReLU(inplace=True))
            num_in = num_out
        layers.append(nn.MaxPool2d(kernel_size=2))
    return nn.Sequential(*layers)


def _initialise(convolution: nn.Conv2d) -> None:
    """Weights from N(0, 2 / (kernel area x output channels)), biases zero."""
    area = convolution.kernel_size[0] * convolution.kernel_size[1]
    nn.init.normal_(convolution.weight, std=math.sqrt(2 / (area * convolution.out_channels)))
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)
