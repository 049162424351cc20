"""Copies of JPEGs that can be decoded in part: the same coefficients, cut by restart markers (native/restart.c).

A loader that crops at random decodes whole images to throw most of them away. Of such a copy it takes the segments under
its window, a small JPEG whose pixels are those of the whole to the last bit.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imagenet_swa.config import InputError
from imagenet_swa.data import native

Bytes = NDArray[np.uint8]
Integers = NDArray[np.int64]

_BEFORE_FRAME_SIZE = 5  # a frame header's marker, length and precision
_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_NOT_FRAMES = (0xC4, 0xC8, 0xCC)  # DHT, JPG and DAC, among the markers of frame headers


def add_restart_markers(jpeg: bytes, *, pixels: int = 64) -> bytes | None:
    """A JPEG with the same coefficients that `take_segments` can take parts of.

    They divide a row of blocks evenly and are up to `pixels` wide; wider where that would make them a quarter as wide or less.
    Huffman tables are made anew, the best for the image; all other segments, and whatever follows the image, are kept.
    None where there is no such copy, and the image is to be used as it is: not a sequential Huffman JPEG of 8 bits in one
    scan, damaged, of more than 32,761 parts, or with one of more than 65,535 bytes. The copy was read again and compared
    before it is returned.

    Raises:
        InputError: the package was installed without a C compiler.
    """
    function = _function("restart_copy", ctypes.c_void_p)
    if function is None:
        raise InputError(
            "restart_markers needs the compiled part of imagenet_swa: install a C compiler (gcc or clang) and reinstall"
        )
    size = ctypes.c_int64()
    address = function(jpeg, ctypes.c_int64(len(jpeg)), ctypes.c_int64(pixels), ctypes.byref(size))
    if not address:
        return None
    try:
        return ctypes.string_at(address, size.value)
    finally:
        native.library().restart_free(ctypes.c_void_p(address))  # pyright: ignore[reportOptionalMemberAccess]


def jpeg_sizes(images: Sequence[Bytes]) -> tuple[Integers, Integers]:
    """Heights and widths of n encoded images, (n,) each; both 0 where an image is not a JPEG whose header tells them."""
    function = _function("restart_sizes", None)
    if function is None:
        sizes = np.array([_size_from_header(image) for image in images], np.int64).reshape(-1, 2)
        return sizes[:, 0].copy(), sizes[:, 1].copy()
    images, pointers, lengths = _addresses(images)
    heights, widths = np.empty((2, len(images)), np.int64)
    function(_pointer(pointers), _pointer(lengths), ctypes.c_int64(len(images)), _pointer(heights), _pointer(widths))
    return heights, widths


def take_segments(
    images: Sequence[Bytes], windows: Integers, allocate: Callable[[int], Bytes] = lambda size: np.empty(size, np.uint8)
) -> tuple[list[Bytes], Integers]:
    """Small JPEGs with the pixels under windows (n, 4) as top, left, height, width, and the windows within them.

    An image that is not a copy from `add_restart_markers`, or is needed whole, stays as it is, and so does its window.
    The small ones are views of one array that `allocate` gives for a number of bytes.
    """
    function = _function("restart_gather", None)
    if function is None:
        return list(images), windows
    originals, pointers, lengths = _addresses(images)
    windows = np.array(windows, np.int64, order="C")
    assert windows.shape == (len(originals), 4), windows.shape
    arena = allocate(int(lengths.sum()))
    sizes = np.empty_like(lengths)
    function(
        _pointer(pointers),
        _pointer(lengths),
        ctypes.c_int64(len(originals)),
        _pointer(windows),
        _pointer(arena),
        _pointer(sizes),
    )
    ends = np.cumsum(sizes).tolist()
    parts = zip(images, sizes.tolist(), ends, strict=True)
    return [arena[end - size : end] if size else image for image, size, end in parts], windows


def _function(name: str, result: Any) -> Callable[..., Any] | None:
    """A compiled function, which ctypes calls without Python's lock; None where nothing was compiled."""
    library = native.library()
    if library is None:
        return None
    function = getattr(library, name)
    function.restype = result
    return function


def _pointer(array: NDArray[Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.__array_interface__["data"][0])


def _addresses(images: Sequence[Bytes]) -> tuple[list[Bytes], NDArray[np.uint64], Integers]:
    """The images with their bytes in a row, which the caller keeps alive, their addresses and their lengths."""
    arrays = [np.ascontiguousarray(image, np.uint8).ravel() for image in images]
    addresses = np.array([array.__array_interface__["data"][0] for array in arrays], np.uint64)
    return arrays, addresses, np.array([array.size for array in arrays], np.int64)


def _size_from_header(image: Bytes) -> tuple[int, int]:
    """Height and width from the first frame header (ITU-T T.81, B.1.1 and B.2.2), as restart_sizes finds them."""
    data = np.ascontiguousarray(image, np.uint8).ravel().data
    if bytes(data[:2]) != b"\xff\xd8":
        return 0, 0
    position = 2
    while len(data) - position >= 4 and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        length = int.from_bytes(data[position + 2 : position + 4], "big")
        if marker < 0xC0 or 0xD0 <= marker <= _END_OF_IMAGE or marker == _SCAN or not 2 <= length <= len(data) - position - 2:
            break
        if marker <= 0xCF and marker not in _NOT_FRAMES:
            start = position + _BEFORE_FRAME_SIZE
            height, width = (int.from_bytes(data[at : at + 2], "big") for at in (start, start + 2))
            return (height, width) if length >= 8 and height and width else (0, 0)
        position += 2 + length
    return 0, 0
