"""Pillow's antialiased resize with crop, mirror and normalisation in one pass, for images that lie decoded in memory.

Equal to `Image.resize`, then crop, then mirror, to the last bit, in a fraction of the time: only what the crop shows is
computed, without Python's lock. One call uses one thread; give each thread its own slice of a batch.

First across, then down, as Pillow before version 13 always did. Later ones begin with the height where it shrinks much more
than the width, which moves a pixel by one grey level (bilinear) or, beside hard edges, by more (bicubic).
"""

import ctypes
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from imagenet_swa.data.native import library

Interpolation = Literal["bilinear", "bicubic"]

_FILTERS = {"bilinear": 0, "bicubic": 1}
_NO_MEMORY, _BAD_GEOMETRY = 1, 2


@dataclass(frozen=True, kw_only=True)
class PixelAddresses:
    """n decoded images wherever they lie: uint8, RGB interleaved, rows `strides` bytes apart.

    The caller keeps the memory alive and vouches for the numbers: wrong ones read memory that is not there.
    """

    addresses: NDArray[np.uint64]
    """(n,) of the first pixel."""
    sizes: NDArray[np.int64]
    """(n, 2) height, width in pixels."""
    strides: NDArray[np.int64]
    """(n,) bytes from one row to the next, at least 3 * width."""

    def __len__(self) -> int:
        return len(self.addresses)

    def __getitem__(self, part: slice) -> "PixelAddresses":
        return PixelAddresses(addresses=self.addresses[part], sizes=self.sizes[part], strides=self.strides[part])

    @classmethod
    def packed(cls, addresses: ArrayLike, sizes: ArrayLike) -> "PixelAddresses":
        """Images whose rows follow each other without a gap; `sizes` (n, 2) or, with the channels, (n, 3)."""
        both = np.ascontiguousarray(np.asarray(sizes, np.int64)[:, :2])
        return cls(addresses=np.asarray(addresses, np.uint64), sizes=both, strides=3 * both[:, 1])

    @classmethod
    def of(cls, images: Sequence[NDArray[np.uint8]]) -> "PixelAddresses":
        """Of arrays (h, w, 3), which the caller keeps. Windows `image[a:b, c:d]` of such arrays need no copy.

        Raises:
            ValueError: an array of another type, shape or order of pixels.
        """
        addresses = np.empty(len(images), np.uint64)
        sizes = np.empty((len(images), 2), np.int64)
        strides = np.empty(len(images), np.int64)
        for number, image in enumerate(images):
            height, width, channels = image.shape if image.ndim == 3 else (0, 0, 0)
            row = image.strides[0] if height > 1 else 3 * width
            if image.dtype != np.uint8 or channels != 3 or row < 3 * width or image.strides[1:] != (3, 1):
                raise ValueError(
                    f"image {number} is {image.dtype} {image.shape} with strides {image.strides}; "
                    "wanted uint8 (height, width, 3), RGB interleaved, rows from the top down"
                )
            addresses[number] = image.__array_interface__["data"][0]
            sizes[number] = height, width
            strides[number] = row
        return cls(addresses=addresses, sizes=sizes, strides=strides)


def available() -> bool:
    """Whether the compiled part is there; without it `resize_batch` raises RuntimeError."""
    return library() is not None


def resize_batch(
    images: Sequence[NDArray[np.uint8]] | PixelAddresses,
    *,
    resized: ArrayLike,
    offsets: ArrayLike,
    flips: ArrayLike,
    out: NDArray[Any],
    interpolation: Interpolation,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
) -> None:
    """Resize each image, crop it, mirror it, and write it into `out`.

    Args:
        images: n arrays (h, w, 3) uint8 of any sizes, or their addresses.
        resized: (n, 2) or (2,): height and width to which the whole image is resized.
        offsets: (n, 2) or (2,): top and left of the crop in the resized image.
        flips: (n,) or one: mirror the crop left to right.
        out: (n, H, W, 3), C-contiguous; H and W are the crop's. uint8, or float32 for `pixel * scale + bias`, in which the
            pixel is the rounded one that uint8 would have.
        interpolation: "bilinear" or "bicubic", as Pillow's, antialiased.
        scale: (3,) float32, with float32 `out` only; default 1.
        bias: (3,) float32, with float32 `out` only; default 0.

    Raises:
        RuntimeError: the compiled part is not there.
        ValueError: the arguments do not fit together, or a crop reaches beyond the resized image.
        MemoryError: no room for a few rows of intermediate results.
    """
    pixels = images if isinstance(images, PixelAddresses) else PixelAddresses.of(images)
    num_images = len(pixels)
    _check_out(out, num_images, normalised=scale is not None or bias is not None)
    # Names, so that the arrays live until the call is over.
    addresses = np.ascontiguousarray(pixels.addresses, np.uint64)
    sizes = np.ascontiguousarray(pixels.sizes, np.int64)
    strides = np.ascontiguousarray(pixels.strides, np.int64)
    targets, corners = _spread(resized, np.int64, (num_images, 2)), _spread(offsets, np.int64, (num_images, 2))
    mirrored = _spread(flips, np.bool_, (num_images,))
    factors = _spread(1 if scale is None else scale, np.float32, (3,))
    summands = _spread(0 if bias is None else bias, np.float32, (3,))
    as_float = out.dtype == np.float32
    code = _function()(
        num_images,
        addresses.ctypes.data,
        sizes.ctypes.data,
        strides.ctypes.data,
        targets.ctypes.data,
        corners.ctypes.data,
        mirrored.ctypes.data,
        *out.shape[1:3],
        _FILTERS[interpolation],
        factors.ctypes.data if as_float else None,
        summands.ctypes.data if as_float else None,
        out.ctypes.data,
    )
    if code == _NO_MEMORY:
        raise MemoryError(f"no memory to resize {num_images} images to {out.shape[1:3]}")
    if code == _BAD_GEOMETRY:
        raise ValueError(_bad_geometry(sizes, targets, corners, out.shape[1:3]))


def resize_in_threads(
    pool: Executor,
    num_parts: int,
    images: PixelAddresses,
    *,
    resized: NDArray[np.int64],
    offsets: NDArray[np.int64],
    flips: NDArray[np.bool_],
    out: NDArray[Any],
    **options: Any,
) -> None:
    """`resize_batch` of a batch in `num_parts` neighbouring parts at a time."""
    bounds = np.linspace(0, len(images), num_parts + 1).astype(int).tolist()
    parts = [slice(a, b) for a, b in pairwise(bounds) if a < b]
    tasks = [
        pool.submit(resize_batch, images[p], resized=resized[p], offsets=offsets[p], flips=flips[p], out=out[p], **options)
        for p in parts
    ]
    for task in tasks:
        task.result()


@cache
def _function() -> Any:
    compiled = library()
    if compiled is None:
        raise RuntimeError("the compiled part of imagenet_swa is missing: install it again where a C compiler is found")
    function = compiled.imagenet_swa_resize_batch
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    function.argtypes = [number, *[pointer] * 6, number, number, ctypes.c_int, *[pointer] * 3]
    function.restype = ctypes.c_int
    return function


def _spread(values: ArrayLike, kind: type[np.generic], shape: tuple[int, ...]) -> NDArray[Any]:
    return np.ascontiguousarray(np.broadcast_to(np.asarray(values, kind), shape))


def _check_out(out: NDArray[Any], num_images: int, *, normalised: bool) -> None:
    kinds = ("float32",) if normalised else ("uint8", "float32")
    shaped = out.ndim == 4 and out.shape[0] == num_images and out.shape[3] == 3
    if not (shaped and out.dtype.name in kinds and out.flags.c_contiguous and out.flags.writeable):
        raise ValueError(
            f"out is {out.dtype} {out.shape}; wanted {' or '.join(kinds)} ({num_images}, height, width, 3), "
            "C-contiguous, writeable"
        )


def _bad_geometry(sizes: NDArray[np.int64], resized: NDArray[np.int64], offsets: NDArray[np.int64], crop: tuple[int, ...]) -> str:
    bad = ((sizes < 1) | (resized < 1) | (offsets < 0) | (offsets > resized - crop)).any(axis=1)
    if not bad.any():
        return f"a side is 0 or above 2**24: images {sizes.max(initial=0)}, resized {resized.max(initial=0)}, crop {crop}"
    number = int(bad.argmax())
    return (
        f"image {number} of {sizes[number].tolist()} resized to {resized[number].tolist()} has no crop of {list(crop)} "
        f"at {offsets[number].tolist()}"
    )
