"""Made-up images on the device: tries a machine or a configuration without data and without a decoder."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch

from imagenet_swa.config import Preprocessing
from imagenet_swa.data.batch import Batch, labels_on
from imagenet_swa.data.index import ImageIndex, make_index
from imagenet_swa.data.sampling import Indices

POOL_SIZE = 64


def synthetic_index(num_images: int, num_classes: int) -> ImageIndex:
    """N images without files; labels go round the classes."""
    labels = np.arange(num_images, dtype=np.int64) % num_classes
    return make_index("", [b"synthetic-%d" % i for i in range(num_images)], labels, np.zeros(num_images, np.int64))


class SyntheticLoader:
    """Image i is picture i mod 64 of a fixed pool of noise, moving on by one each epoch; see `ImageLoader` for the interface."""

    def __init__(
        self, index: ImageIndex, preprocessing: Preprocessing, *, seed: int, device: torch.device, channels_last: bool = True
    ) -> None:
        self.index = index
        self.decoder = "nobody: made up"
        self._device = device
        size = preprocessing.image_size
        pool = torch.randn(POOL_SIZE, 3, size, size, generator=torch.Generator().manual_seed(seed))
        order = torch.channels_last if channels_last else torch.contiguous_format
        self._pool = pool.to(device, memory_format=order)

    def training_stream(self, batches: Iterable[Indices], *, epoch: int) -> Iterator[Batch]:
        """See `ImageLoader`; each epoch shows an image as another picture."""
        return self._stream(batches, shift=epoch)

    def evaluation_stream(self, batches: Iterable[Indices]) -> Iterator[Batch]:
        """See `ImageLoader`."""
        return self._stream(batches, shift=0)

    def _stream(self, batches: Iterable[Indices], shift: int) -> Iterator[Batch]:
        for indices in batches:
            picks = torch.from_numpy((np.asarray(indices) + shift) % POOL_SIZE).to(self._device)
            yield Batch(self._pool[picks], labels_on(self._device, self.index.labels[indices]), np.asarray(indices))
