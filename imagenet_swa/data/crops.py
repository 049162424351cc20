"""What is to be decoded of each encoded image, and what the decoded pixels are resized to."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from imagenet_swa.config import Preprocessing
from imagenet_swa.data.encoded import EncodedBatch
from imagenet_swa.data.restart import take_segments
from imagenet_swa.data.sampling import (
    CropDraws,
    Indices,
    central_crops,
    crop_windows,
    draw_crops,
    padded_crops,
    regions_under_crops,
    room_for_crops,
)

MAX_RESIZED_SIDE = 2**24  # pixels; beyond, the longer side of a resized image fits no decoder
TOO_THIN = "too long and thin to be resized"
_FILTER_RADIUS = {"bilinear": 1.0, "bicubic": 2.0}


@dataclass(frozen=True, kw_only=True)
class EncodedCrops:
    """n images on their way to the network.

    A decoded window stands at `origins` in a picture of `sizes`; that picture is resized to `resized`, and the network sees
    the square at `offsets` of it. In training the picture is the random crop alone, so that its borders are borders; in
    evaluation and for padded crops it is the whole image. A padded crop resizes nothing and may reach beyond the picture,
    where all is black.

    Attributes:
        indices: (n,) numbers in the index.
        images: n arrays of encoded bytes: whole files, or the segments under a window.
        windows: (n, 4) top, left, height, width of what to decode of `images`.
        origins, sizes, resized, offsets: (n, 2) pixels down and across.
        flips: (n,) whether to mirror.
        bad: numbers of images that were asked for and left out, and why.
    """

    indices: Indices
    images: list[NDArray[np.uint8]]
    windows: NDArray[np.int64]
    origins: NDArray[np.int64]
    sizes: NDArray[np.int64]
    resized: NDArray[np.int64]
    offsets: NDArray[np.int64]
    flips: NDArray[np.bool_]
    bad: dict[int, str]

    def __len__(self) -> int:
        return len(self.indices)

    def at(self, kept: list[int], bad: dict[int, str]) -> "EncodedCrops":
        """Those at the given places of the batch."""
        arrays = {name: getattr(self, name)[kept] for name in ("indices", "windows", "origins", "sizes", "resized", "offsets")}
        return EncodedCrops(images=[self.images[k] for k in kept], flips=self.flips[kept], bad=bad, **arrays)

    def without(self, bad: dict[int, str]) -> "EncodedCrops":
        """The batch less the bad images, which it notes."""
        kept = [position for position, i in enumerate(self.indices) if int(i) not in bad]
        return self.at(kept, self.bad | {i: reason for i, reason in bad.items() if i in self.indices})

    def with_segments(self, allocate: Callable[[int], NDArray[np.uint8]]) -> "EncodedCrops":
        """The same pixels from fewer bytes where an image's restart markers allow it; `allocate` gives memory."""
        images, windows = take_segments(self.images, self.windows, allocate)
        arrays = {name: getattr(self, name) for name in ("indices", "origins", "sizes", "resized", "offsets", "flips", "bad")}
        return EncodedCrops(images=images, windows=windows, **arrays)


def training_crops(found: EncodedBatch, preprocessing: Preprocessing, *, seed: int, epoch: int) -> EncodedCrops:
    """Random crops with the windows and flips that (seed, epoch, index) give the images."""
    if preprocessing.train_crop == "padded":
        return _padded_crops(found, preprocessing, seed=seed, epoch=epoch)
    p, n = preprocessing, len(found.indices)
    draws = training_draws(found.indices, p, seed=seed, epoch=epoch)
    windows = crop_windows(draws, found.heights, found.widths, aspect=p.crop_aspect)
    return EncodedCrops(
        indices=found.indices,
        images=found.images,
        windows=windows,
        origins=np.zeros((n, 2), np.int64),
        sizes=windows[:, 2:],
        resized=np.full((n, 2), p.image_size),
        offsets=np.zeros((n, 2), np.int64),
        flips=draws.flip,
        bad=found.bad,
    )


def training_draws(indices: Indices, preprocessing: Preprocessing, *, seed: int, epoch: int) -> CropDraws:
    """What (seed, epoch, index) decide about images of whatever sizes."""
    p = preprocessing
    return draw_crops(indices, seed=seed, epoch=epoch, area=p.crop_area, aspect=p.crop_aspect, horizontal_flip=p.horizontal_flip)


def have_no_crop(heights: NDArray[np.int64], widths: NDArray[np.int64], preprocessing: Preprocessing) -> NDArray[np.bool_]:
    """Which images (n,) are smaller than a padded crop, their border included."""
    p = preprocessing
    return room_for_crops(heights, widths, padding=p.padding, image_size=p.image_size).min(axis=1) < 0


def why_no_crop(height: int, width: int, preprocessing: Preprocessing) -> str:
    """The reason in words."""
    p = preprocessing
    return (
        f"too small for a padded crop: {height} x {width} pixels and {p.padding} of border on each side hold no {p.image_size} x "
        f"{p.image_size} (preprocessing.padding, preprocessing.image_size)"
    )


def _padded_crops(found: EncodedBatch, preprocessing: Preprocessing, *, seed: int, epoch: int) -> EncodedCrops:
    """Windows of the images within a black border, nothing resized, all of each image to decode."""
    p = preprocessing
    if (bad := have_no_crop(found.heights, found.widths, p)).any():
        sizes = zip(found.indices[bad].tolist(), found.heights[bad].tolist(), found.widths[bad].tolist(), strict=True)
        found = found.without({i: why_no_crop(height, width, p) for i, height, width in sizes})
    draws = training_draws(found.indices, p, seed=seed, epoch=epoch)
    sizes = np.stack([found.heights, found.widths], axis=1)
    return EncodedCrops(
        indices=found.indices,
        images=found.images,
        windows=np.concatenate([0 * sizes, sizes], axis=1),
        origins=0 * sizes,
        sizes=sizes,
        resized=sizes,
        offsets=padded_crops(draws, found.heights, found.widths, padding=p.padding, image_size=p.image_size),
        flips=draws.flip,
        bad=found.bad,
    )


def evaluation_crops(found: EncodedBatch, preprocessing: Preprocessing) -> EncodedCrops:
    """Resize of the shorter side and central crop, with only that part of an image to decode which decides the crop."""
    p, n = preprocessing, len(found.indices)
    sizes = np.stack([found.heights, found.widths], axis=1)
    resized, offsets = central_crops(found.heights, found.widths, resize=p.resize, image_size=p.image_size)
    if (too_thin := (resized >= MAX_RESIZED_SIDE).any(axis=1)).any():
        return evaluation_crops(found.without({int(i): TOO_THIN for i in found.indices[too_thin]}), p)
    radius = _FILTER_RADIUS[p.interpolation]
    windows = regions_under_crops(sizes, resized, offsets, image_size=p.image_size, filter_radius=radius)
    return EncodedCrops(
        indices=found.indices,
        images=found.images,
        windows=windows,
        origins=windows[:, :2].copy(),
        sizes=sizes,
        resized=resized,
        offsets=offsets,
        flips=np.zeros(n, bool),
        bad=found.bad,
    )
