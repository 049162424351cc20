"""What every loader yields, and the interface that all loaders share."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from imagenet_swa.config import InputError
from imagenet_swa.data.index import ImageIndex
from imagenet_swa.data.sampling import Indices


@dataclass(frozen=True)
class Batch:
    """n images, ready for the network.

    Attributes:
        images: (n, 3, H, W) float32, normalised, channels_last unless switched off, on the loader's device.
        labels: (n,) int64 on the same device.
        indices: (n,) int64 in host memory, the images' numbers in the index.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: Indices


class ImageLoader(Protocol):
    """Turns lists of image numbers into batches. Keeps no position and no random state: the lists say it all."""

    index: ImageIndex

    def training_stream(self, batches: Iterable[Indices], *, epoch: int) -> Iterator[Batch]:
        """The listed images with the crops and flips that (seed, epoch, index) give them, a batch per list."""
        ...

    def evaluation_stream(self, batches: Iterable[Indices]) -> Iterator[Batch]:
        """The listed images resized and centrally cropped, a batch per list."""
        ...


class BadImageError(InputError):
    """An image file that cannot be read or decoded, named with the reason."""

    concerns_one_rank = True

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"cannot decode the image {path}: {reason}; repair it, or take it out of the folder or list")
        self._arguments = path, reason

    def __reduce__(self) -> tuple[type["BadImageError"], tuple[str, str]]:
        """Decoding processes send it to the training process; exceptions alone remember only their message."""
        return type(self), self._arguments


def labels_on(device: torch.device, labels: NDArray[np.int64]) -> torch.Tensor:
    """(n,) int64 labels on the device."""
    return torch.from_numpy(labels).to(device, non_blocking=True)
