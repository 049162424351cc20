"""The torchvision / PIL backend: the same interface and the very same crops as `dali.py`, and its reference in tests."""

import io
from collections.abc import Generator, Iterable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode, functional

from imagenet_swa import stop
from imagenet_swa.config import Preprocessing
from imagenet_swa.data import storage
from imagenet_swa.data.batch import BadImages, Batch, labels_on
from imagenet_swa.data.crops import MAX_RESIZED_SIDE, TOO_THIN, have_no_crop, training_draws, why_no_crop
from imagenet_swa.data.encoded import FORMATS, why_ambiguous, why_undecodable
from imagenet_swa.data.index import ImageIndex
from imagenet_swa.data.sampling import CropDraws, Indices, crop_windows, padded_crops
from imagenet_swa.data.streams import until_exit

Mode = Literal["train", "evaluation"]
F: Any = functional  # annotated for tensors, also takes PIL images
Decoded = tuple[torch.Tensor, list[int], dict[int, str]]


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
        bad_images: BadImages | None = None,
    ) -> None:
        self.index = index
        self.decoder = "torchvision (PIL)"
        self._bad_images = bad_images or BadImages(index)
        self._preprocessing = preprocessing
        self._seed = seed
        self._device = device
        self._num_workers = num_workers
        self._prefetch = prefetch
        self._channels_last = channels_last
        mean, std = (torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (preprocessing.mean, preprocessing.std))
        self._mean, self._std = mean * 255, std * 255

    def training_stream(self, batches: Iterable[Indices], *, epoch: int) -> Iterator[Batch]:
        """See `ImageLoader`. Raises BadImageError with the file's name, or leaves the image out."""
        return until_exit(self._stream("train", batches, epoch))

    def evaluation_stream(self, batches: Iterable[Indices]) -> Iterator[Batch]:
        """See `ImageLoader`. Raises BadImageError with the file's name, or leaves the image out."""
        return until_exit(self._stream("evaluation", batches, epoch=0))

    def _stream(self, mode: Mode, batches: Iterable[Indices], epoch: int) -> Generator[Batch, None, None]:
        batches = [np.asarray(indices, np.int64) for indices in batches]
        self._bad_images.start_pass()
        decoded = DataLoader(
            _Decoded(self.index, self._preprocessing, mode, self._seed, epoch, batches),
            batch_size=None,
            num_workers=self._num_workers,
            prefetch_factor=self._prefetch if self._num_workers else None,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),  # else each stream would draw from the numbers that dropout comes from
            # S3's client does not work in a copy of a process that has used it.
            multiprocessing_context="forkserver" if self._num_workers and storage.is_remote(self.index.root) else None,
            worker_init_fn=_begin_worker,
        )
        with stop.held_back():  # until the workers, which would die of them, ignore them
            started = iter(decoded)
        try:
            for pixels, kept, bad in started:
                self._bad_images.leave_out(bad, num_good=len(kept) if mode == "train" else None)
                yield self._to_batch(pixels, np.array(kept, np.int64), tuple(bad))
        finally:
            _end_workers(started)

    def _to_batch(self, pixels: torch.Tensor, indices: Indices, left_out: tuple[int, ...]) -> Batch:
        order = torch.channels_last if self._channels_last else torch.contiguous_format
        images = pixels.to(self._device, non_blocking=True).permute(0, 3, 1, 2).to(torch.float32, memory_format=order)
        images = ((images - self._mean) / self._std).contiguous(memory_format=order)
        return Batch(images, labels_on(self._device, self.index.labels[indices]), indices, left_out)


def _end_workers(iterator: Any) -> None:
    """End the worker processes now. The garbage collector, held up by an exception's traceback, would end them late; and as they
    ignore the signal by which Python ends those that are left, this process could wait for them for ever.
    """
    shut_down = getattr(iterator, "_shutdown_workers", None)  # torch has no public way; absent without workers
    if shut_down is not None:
        shut_down()
        for worker in iterator._workers:
            worker.kill()


def _begin_worker(_number: int) -> None:
    stop.ignore_in_child()


class _Decoded(Dataset[Decoded]):
    """Item k is batch k: uint8 pixels (n, H, W, 3), the numbers of those images, and why others could not be decoded."""

    def __init__(
        self, index: ImageIndex, preprocessing: Preprocessing, mode: Mode, seed: int, epoch: int, batches: list[Indices]
    ) -> None:
        self._index, self._preprocessing, self._mode = index, preprocessing, mode
        self._seed, self._epoch, self._batches = seed, epoch, batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> Decoded:
        indices, size = self._batches[number], self._preprocessing.image_size
        draws = training_draws(indices, self._preprocessing, seed=self._seed, epoch=self._epoch)
        pixels, kept, bad = [np.empty((0, size, size, 3), np.uint8)], [], {}
        for position, i in enumerate(indices.tolist()):
            image = self._decoded(i)
            if isinstance(image, str):
                bad[i] = image
                continue
            kept.append(i)
            if self._mode == "train":
                pixels.append(self._training_pixels(image, draws.at(slice(position, position + 1)))[None])
            else:
                pixels.append(self._evaluation_pixels(image)[None])
        return torch.from_numpy(np.concatenate(pixels)), kept, bad

    def _decoded(self, i: int) -> Image.Image | str:
        """The image, or why there is none."""
        try:
            data = self._index.read(i)
        except storage.ReadError as error:
            return str(error)
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as file:
                return why_ambiguous(file, data) or self._why_without_crop(file) or file.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return why_undecodable(data) or " ".join(str(error).split())

    def _why_without_crop(self, image: Image.Image) -> str | None:
        p = self._preprocessing
        if self._mode == "evaluation":
            return TOO_THIN if max(image.size) * p.resize // min(image.size) >= MAX_RESIZED_SIDE else None
        sizes = np.array([image.height]), np.array([image.width])
        return why_no_crop(image.height, image.width, p) if p.train_crop == "padded" and have_no_crop(*sizes, p)[0] else None

    def _training_pixels(self, image: Image.Image, draws: CropDraws) -> np.ndarray:
        p = self._preprocessing
        sizes, size = (np.array([image.height]), np.array([image.width])), p.image_size
        if p.train_crop == "padded":
            top, left = padded_crops(draws, *sizes, padding=p.padding, image_size=size)[0].tolist()
            image = F.crop(image, top, left, size, size)  # black beyond the image
        else:
            window = crop_windows(draws, *sizes, aspect=p.crop_aspect)[0].tolist()
            image = F.resized_crop(image, *window, [size, size], InterpolationMode(p.train_interpolation))
        return np.asarray(F.hflip(image) if draws.flip[0] else image)

    def _evaluation_pixels(self, image: Image.Image) -> np.ndarray:
        p = self._preprocessing
        image = F.resize(image, [p.resize], InterpolationMode(p.interpolation))
        return np.asarray(F.center_crop(image, [p.image_size]))
