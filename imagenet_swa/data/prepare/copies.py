"""One image's bytes as a copy: smaller, with restart markers, or as they were; and how far a copy's pixels are from it."""

import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from imagenet_swa.data.encoded import FORMATS
from imagenet_swa.data.restart import add_restart_markers

EVALUATION_RESIZE, EVALUATION_SIZE = 256, 224
MCU_PIXELS = 64  # between restart markers
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)

Outcome = Literal["unchanged", "small", "not_smaller", "re_encoded"]


class UndecodableError(ValueError):
    """An image that Pillow cannot decode; the message is the reason."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is done to an image, see `PrepareSettings`."""

    shorter_side: int | None
    quality: int
    keep_small: bool
    restart_markers: bool


@dataclass(frozen=True)
class Copy:
    """An image's new bytes, what became of its old ones, and whether restart markers were added to the result."""

    data: bytes
    outcome: Outcome
    restart_markers: bool = False


def make_copy(data: bytes, recipe: Recipe) -> Copy:
    """The copy of an encoded image.

    Raises:
        UndecodableError: only where it has to be decoded.
        ArithmeticError: the pixels of a copy with restart markers are not those of what it was made of.
    """
    copy = Copy(data, "unchanged") if recipe.shorter_side is None else _shrink(data, recipe.shorter_side, recipe)
    if not recipe.restart_markers:
        return copy
    marked = add_restart_markers(copy.data, pixels=MCU_PIXELS)
    if marked is None:
        return copy
    if not np.array_equal(np.asarray(_decode(copy.data)), np.asarray(_decode(marked))):
        raise ArithmeticError("a copy with restart markers decodes to other pixels")
    return Copy(marked, copy.outcome, restart_markers=True)


def _shrink(data: bytes, shorter_side: int, recipe: Recipe) -> Copy:
    """torchvision's sizes. The loaders ignore EXIF, so pixels stay unrotated and the copy is without."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            shorter = min(file.size)
            if recipe.keep_small and shorter <= shorter_side:
                return Copy(data, "small")
            image = file.copy() if file.mode == "L" else file.convert("RGB")
    except _UNREADABLE as error:
        raise UndecodableError(_reason(error)) from None
    if shorter > shorter_side:
        width, height = (side * shorter_side // shorter for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    image.info.clear()  # comments and the like, which Pillow would copy
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=recipe.quality, subsampling="4:2:0", optimize=True)
    smaller = buffer.getvalue()
    if recipe.keep_small and len(smaller) >= len(data):
        return Copy(data, "not_smaller")
    return Copy(smaller, "re_encoded")


def _decode(data: bytes) -> Image.Image:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            return file.convert("RGB")
    except _UNREADABLE as error:
        raise UndecodableError(_reason(error)) from None


def _reason(error: BaseException) -> str:
    text = "not an image of a known format" if isinstance(error, Image.UnidentifiedImageError) else str(error)
    return " ".join(text.split())[:160]


def pixel_difference(source: bytes, copy: bytes) -> tuple[int, int]:
    """Sum and maximum of the absolute differences in grey levels, through the evaluation's resize and central crop."""
    one, other = (evaluation_pixels(data).astype(np.int16) for data in (source, copy))
    difference = np.abs(one - other)
    return int(difference.sum()), int(difference.max())


def evaluation_pixels(data: bytes) -> np.ndarray:
    """(224, 224, 3) uint8: shorter side to 256, bilinear, central crop, as torchvision's evaluation has it."""
    image = _decode(data)
    shorter = min(image.size)
    width, height = (side * EVALUATION_RESIZE // shorter for side in image.size)
    left, top = (round((side - EVALUATION_SIZE) / 2) for side in (width, height))
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image.crop((left, top, left + EVALUATION_SIZE, top + EVALUATION_SIZE)))
