"""What every loader yields, the interface that all loaders share, and what becomes of bad images."""

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from imagenet_swa.config import InputError
from imagenet_swa.data.index import ImageIndex
from imagenet_swa.data.sampling import Indices
from imagenet_swa.plain import printable


@dataclass(frozen=True)
class Batch:
    """n images, ready for the network.

    Attributes:
        images: (n, 3, H, W) float32, normalised, channels_last unless switched off, on the loader's device.
        labels: (n,) int64 on the same device.
        indices: (n,) int64 in host memory, the images' numbers in the index.
        left_out: numbers of images that were asked for and cannot be decoded.
    """

    images: torch.Tensor
    labels: torch.Tensor
    indices: Indices
    left_out: tuple[int, ...] = ()


class ImageLoader(Protocol):
    """Turns lists of image numbers into batches. Keeps no position and no random state: the lists say it all."""

    index: ImageIndex
    decoder: str
    """Who makes the pixels, for people: other decoders and resizes make slightly other ones."""

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
        super().__init__(
            f"cannot decode the image {path}: {reason}; set data.on_bad_image to skip to go on without it, or repair it; for a "
            "new run, take it out or put it into data.quarantine (imagenet-swa verify finds all such images)"
        )


class TooManyBadImagesError(InputError):
    """More images cannot be decoded than the run may leave out."""

    concerns_one_rank = True


class BadImages:
    """What a loader does with bad images: stop, or leave out up to a limit in each pass over the data.

    The first time that an image is left out it is named on stderr, and in a list that `data.quarantine` takes, where the
    run has a folder.
    """

    def __init__(
        self,
        index: ImageIndex,
        policy: Literal["stop", "skip"] = "stop",
        limit: int = 0,
        *,
        split: str = "",
        log: Path | None = None,
        min_good: int = 2,
    ) -> None:
        self._index, self._policy, self._limit, self._split, self._log = index, policy, limit, split, log
        self._min_good = min_good  # BatchNorm cannot do with one
        self._named: set[int] = set()
        self._in_pass: set[int] = set()

    def start_pass(self) -> None:
        """The limit counts from here."""
        self._in_pass = set()

    def leave_out(self, reasons: Mapping[int, str], *, num_good: int | None = None) -> None:
        """Take note of the bad images of a batch; `num_good` of it are left to train on, None in evaluation.

        Raises:
            BadImageError: the policy is to stop.
            TooManyBadImagesError: the pass has had more than the limit, or too few are left.
        """
        for i, reason in reasons.items():
            if self._policy == "stop":
                raise BadImageError(self._path(i), printable(reason))
            self._in_pass.add(i)
            if i not in self._named:
                self._named.add(i)
                self._name(i, reason)
            if len(self._in_pass) > self._limit:
                raise TooManyBadImagesError(
                    f"{len(self._in_pass)} images cannot be decoded, the last is {self._path(i)}: {reason}; that is more "
                    "than data.max_bad_images; look at the data with `imagenet-swa verify`"
                )

        if reasons and num_good is not None and num_good < self._min_good:
            raise TooManyBadImagesError(
                f"{num_good} of {num_good + len(reasons)} images of a batch can be decoded, too few to train on; the last that "
                f"cannot is {self._path(list(reasons)[-1])}; look at the data with `imagenet-swa verify`"
            )

    def _path(self, i: int) -> str:
        return printable(self._index.path(i))

    def _name(self, i: int, reason: str) -> None:
        rank = f" [rank {os.environ['RANK']}]" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        print(f"imagenet-swa: left out{rank}: {self._path(i)}: {printable(reason)}", file=sys.stderr, flush=True)
        if self._log is not None and self._log.parent.is_dir():
            line = f"{self._split}\t{self._index.listed_name(i)}\t{reason}\n"
            with self._log.open("a+", errors="surrogateescape") as file:
                file.seek(0)
                if line not in file.readlines():  # of an interrupted run
                    file.write(line)


def labels_on(device: torch.device, labels: NDArray[np.int64]) -> torch.Tensor:
    """(n,) int64 labels on the device."""
    return torch.from_numpy(labels).to(device, non_blocking=True)
