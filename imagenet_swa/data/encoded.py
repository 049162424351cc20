"""Encoded images in memory: read ahead from files, shards or S3, checked as far as that is cheap, with their sizes."""

import io
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from imagenet_swa.data import storage
from imagenet_swa.data.buffers import Buffers
from imagenet_swa.data.index import ImageIndex
from imagenet_swa.data.restart import jpeg_sizes
from imagenet_swa.data.sampling import Indices

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")  # what all loaders read, whatever a file's name says
_END_OF_IMAGE = b"\xff\xd9"
PNG_END = b"IEND\xaeB`\x82"
# A PNG of 8-bit colour whose pixels follow its header at once: signature, IHDR (height, width), its check sum, IDAT's length.
_PLAIN_PNG = struct.Struct(">8s8sII5sI4x4s")
_PNG_START, _IHDR_START, _COLOURS = b"\x89PNG\r\n\x1a\n", b"\0\0\0\x0dIHDR", b"\x08\x02\0\0\0"
NO_END = "cut short: its end is missing"
TURNED_TIFF = "a TIFF that asks to be turned, which decoders do each in their way; save it upright"
_TIFF_STARTS = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")  # the last two of files that may exceed 4 GB
_ORIENTATION = 0x0112
_MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 2**60)  # Pillow refuses more, as do all loaders
_TAIL = 1024  # bytes at the end of a JPEG in which its end is looked for
MAX_BYTES = 2**29  # of one image
_IMAGES_PER_TASK = 8
_REMOTE_READERS = 64  # requests to S3 under way: at 20 ms each, 3,000 a second

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class EncodedBatch:
    """n images as they lie in their files, and what was wrong with others of the batch.

    Attributes:
        indices: (n,) their numbers in the index.
        images: n arrays of bytes.
        heights, widths: (n,) pixels, as the header says, not turned by EXIF.
        bad: numbers of images that cannot be used, and why.
    """

    indices: Indices
    images: list[NDArray[np.uint8]]
    heights: NDArray[np.int64]
    widths: NDArray[np.int64]
    bad: dict[int, str]

    def without(self, bad: dict[int, str]) -> "EncodedBatch":
        """The batch less these images, which it notes."""
        kept = [k for k, i in enumerate(self.indices) if int(i) not in bad]
        images = [self.images[k] for k in kept]
        return EncodedBatch(self.indices[kept], images, self.heights[kept], self.widths[kept], self.bad | bad)


class EncodedImages:
    """Reads images of an index in threads, whose waiting and system calls do not hold Python's lock."""

    def __init__(self, index: ImageIndex, num_threads: int, buffers: Buffers | None = None) -> None:
        self._index = index
        self._buffers = buffers or Buffers(num_kept=4)
        self._remote = storage.is_remote(index.root)
        self._pool = ThreadPoolExecutor(max(_REMOTE_READERS if self._remote else 8, num_threads), "read")

    def read_batch(self, indices: Indices) -> EncodedBatch:
        """Read and check the images of a batch. What is wrong with one never raises; it is in `bad`."""
        numbers = [int(i) for i in indices]
        sizes = self._index.sizes[indices]
        if self._remote or (sizes < 0).any() or (sizes > MAX_BYTES).any():
            found = [image for part in self._pool.map(self._read_some, self._parts(numbers)) for image in part]
        else:
            ends = np.cumsum(sizes + 1).tolist()
            room = self._buffers.take((ends[-1] if ends else 0,), np.uint8)
            slots = [(i, room[end - size - 1 : end]) for i, size, end in zip(numbers, sizes.tolist(), ends, strict=True)]
            found = [image for part in self._pool.map(self._read_into_slots, self._parts(slots)) for image in part]
        return _with_sizes(numbers, found)

    def _parts(self, items: list[T]) -> list[list[T]]:
        size = 1 if self._remote else _IMAGES_PER_TASK
        return [items[start : start + size] for start in range(0, len(items), size)]

    def _read_some(self, numbers: list[int]) -> list[NDArray[np.uint8] | str]:
        """Bytes of each image, or why there are none."""
        found: list[NDArray[np.uint8] | str] = []
        for i in numbers:
            try:
                if self._index.sizes[i] > MAX_BYTES:
                    raise storage.ReadError(f"{self._index.sizes[i]:,} bytes, more than any image has")
                found.append(np.frombuffer(self._index.read(i), np.uint8))
            except storage.ReadError as error:
                found.append(str(error))
        return found

    def _read_into_slots(self, slots: list[tuple[int, NDArray[np.uint8]]]) -> list[NDArray[np.uint8] | str]:
        """The same for local files whose sizes are known, into memory that is used again; a slot has one byte too many."""
        found: list[NDArray[np.uint8] | str] = []
        for i, slot in slots:
            path, offset, size = self._index.location(i)
            try:
                storage.read_into(path, slot.data, offset=offset, size=size)
                found.append(slot[:size])
            except storage.ReadError as error:
                found.append(str(error))
        return found

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _with_sizes(numbers: list[int], found: Sequence[NDArray[np.uint8] | str]) -> EncodedBatch:
    bad = {i: data for i, data in zip(numbers, found, strict=True) if isinstance(data, str)}
    kept = [(i, data) for i, data in zip(numbers, found, strict=True) if not isinstance(data, str)]
    heights, widths = jpeg_sizes([image for _, image in kept])
    for position, (i, image) in enumerate(kept):
        is_whole_jpeg = heights[position] > 0 and image[-2:].tobytes() == _END_OF_IMAGE
        if not is_whole_jpeg or heights[position] * widths[position] > _MAX_PIXELS:
            data = image.tobytes()
            size = _size_of_plain_png(data) or _examine(data, is_jpeg=bool(heights[position]))
            if isinstance(size, str):
                bad[i] = size
            else:
                heights[position], widths[position] = size
    good = np.array([i not in bad for i, _ in kept], bool)
    return EncodedBatch(
        indices=np.array([i for i, _ in kept if i not in bad], np.int64),
        images=[image for i, image in kept if i not in bad],
        heights=heights[good],
        widths=widths[good],
        bad={i: bad[i] for i in numbers if i in bad},
    )


def _size_of_plain_png(data: bytes) -> tuple[int, int] | None:
    """What `_examine` says of the commonest PNGs, in a thirtieth of the time, which counts where images are small; else None."""
    if not (data.startswith(_PNG_START) and data.endswith(PNG_END) and len(data) >= _PLAIN_PNG.size + len(PNG_END)):
        return None
    _, header, width, height, kind, check_sum, first = _PLAIN_PNG.unpack_from(data)
    is_plain = (header, kind, first) == (_IHDR_START, _COLOURS, b"IDAT") and check_sum == zlib.crc32(data[12:29])
    return (height, width) if is_plain and 0 < width * height <= _MAX_PIXELS else None


def _examine(data: bytes, *, is_jpeg: bool) -> tuple[int, int] | str:
    """Height and width of what is no JPEG with its end in place, or why it cannot be used.

    A JPEG without an end is decoded as a whole, and so is a TIFF, which has none: DALI, which decodes no further than a crop
    reaches, would take one that was cut for good.
    """
    reason = why_undecodable(data, whole=(is_jpeg and _END_OF_IMAGE not in data[-_TAIL:]) or data.startswith(_TIFF_STARTS))
    if reason is not None:
        return reason
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return image.height, image.width


def why_ambiguous(image: Image.Image, data: bytes) -> str | None:
    """Why Pillow and DALI would not show the same picture of an image that Pillow opened; None if they would."""
    if image.format == "PNG" and PNG_END not in data:  # Pillow would decode it, DALI does not
        return NO_END
    if image.format == "TIFF" and image.getexif().get(_ORIENTATION, 1) != 1:
        return TURNED_TIFF
    return None


def why_undecodable(data: bytes, *, whole: bool = True) -> str | None:
    """Why Pillow cannot open an image, or with `whole` cannot decode it to its end; None if it can."""
    if not data:
        return "the file is empty"
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if (reason := why_ambiguous(image, data)) is not None:
                return reason
            if whole:
                image.load()
    except UnidentifiedImageError:
        return f"not an image of a known format; it starts with {data[:8]!r}"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return " ".join(str(error).split())[:160]
    return None
