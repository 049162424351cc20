"""The torchvision / PIL backend: the same interface and the very same crops as `dali.py`, and its reference in tests."""

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, functional

from imagenet_swa.config import Preprocessing
from imagenet_swa.data.batch import BadImageError, Batch, labels_on
from imagenet_swa.data.index import ImageIndex
from imagenet_swa.data.sampling import Indices, crop_windows, draw_crops

Mode = Literal["train", "evaluation"]
F: Any = functional  # annotated for tensors, also takes PIL images
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")  # what DALI reads too, whatever a file's name says


class TorchvisionLoader:
    """Batches of an index, decoded by PIL in worker processes; see `ImageLoader` for the interface."""

    def __init__(
        self,
        index: ImageIndex,
        preprocessing: Preprocessing,
        *,
        seed: int,
        device: torch.device,
        num_workers: int,
        prefetch: int,
        channels_last: bool = True,
    ) -> None:
        self.index = index
        self._preprocessing = preprocessing
        self._seed = seed
        self._device = device
        self._num_workers = num_workers
        self._prefetch = prefetch
        self._channels_last = channels_last
        mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (preprocessing.mean, preprocessing.std))
        self._mean, self._std = mean * 255, std * 255

    def training_stream(self, batches: Iterable[Indices], *, epoch: int) -> Iterator[Batch]:
        """See `ImageLoader`. Raises BadImageError with the file's name."""
        return self._stream("train", batches, epoch)

    def evaluation_stream(self, batches: Iterable[Indices]) -> Iterator[Batch]:
        """See `ImageLoader`. Raises BadImageError with the file's name."""
        return self._stream("evaluation", batches, epoch=0)

    def _stream(self, mode: Mode, batches: Iterable[Indices], epoch: int) -> Iterator[Batch]:
        batches = [np.asarray(indices, np.int64) for indices in batches]
        decoded = DataLoader(
            _Decoded(self.index, self._preprocessing, mode, self._seed, epoch, batches),
            batch_size=None,
            num_workers=self._num_workers,
            prefetch_factor=self._prefetch if self._num_workers else None,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),  # else each stream would draw from the numbers that dropout comes from
        )
        for result, indices in zip(decoded, batches, strict=True):
            if isinstance(result, BadImageError):
                raise result
            yield self._to_batch(result, indices)

    def _to_batch(self, pixels: torch.Tensor, indices: Indices) -> Batch:
        order = torch.channels_last if self._channels_last else torch.contiguous_format
        images = pixels.to(self._device, non_blocking=True).permute(0, 3, 1, 2).to(torch.float32, memory_format=order)
        images = ((images - self._mean) / self._std).contiguous(memory_format=order)
        return Batch(images, labels_on(self._device, self.index.labels[indices]), indices)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    return str((isinstance(error, OSError) and error.strerror) or error)


class _Decoded(Dataset[torch.Tensor | BadImageError]):
    """Item k is batch k as uint8 pixels (n, H, W, 3), or the error that a file in it raised."""

    def __init__(
        self, index: ImageIndex, preprocessing: Preprocessing, mode: Mode, seed: int, epoch: int, batches: list[Indices]
    ) -> None:
        self._index, self._preprocessing, self._mode = index, preprocessing, mode
        self._seed, self._epoch, self._batches = seed, epoch, batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> torch.Tensor | BadImageError:
        images = []
        for i in self._batches[number]:
            path = self._index.path(i)
            try:
                with Image.open(path, formats=FORMATS) as file:
                    image = file.convert("RGB")
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                return BadImageError(path, _reason(error))
            images.append(self._training_pixels(image, i) if self._mode == "train" else self._evaluation_pixels(image))
        return torch.from_numpy(np.stack(images))

    def _training_pixels(self, image: Image.Image, index: np.int64) -> np.ndarray:
        p = self._preprocessing
        draws = draw_crops(
            np.array([index]),
            seed=self._seed,
            epoch=self._epoch,
            area=p.crop_area,
            aspect=p.crop_aspect,
            horizontal_flip=p.horizontal_flip,
        )
        sizes = np.array([image.height]), np.array([image.width])
        top, left, height, width = map(int, crop_windows(draws, *sizes, aspect=p.crop_aspect)[0])
        size, mode = [p.image_size, p.image_size], InterpolationMode(p.train_interpolation)
        image = F.resized_crop(image, top, left, height, width, size, mode)
        return np.asarray(F.hflip(image) if draws.flip[0] else image)

    def _evaluation_pixels(self, image: Image.Image) -> np.ndarray:
        p = self._preprocessing
        image = F.resize(image, [p.resize], InterpolationMode(p.interpolation))
        return np.asarray(F.center_crop(image, [p.image_size]))
