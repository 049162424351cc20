"""Looks at single encoded images: by their first and last bytes, or decoded to the last pixel."""

import hashlib
import io
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from typing import NamedTuple

from PIL import Image

from imagenet_swa.data import storage
from imagenet_swa.data.encoded import FORMATS, PNG_END, why_undecodable
from imagenet_swa.data.index import Location
from imagenet_swa.data.sources import NUM_THREADS

_HEADS = (4096, 2**17)  # first bytes to read: the second where the first end before the picture starts (one JPEG in 20)
_TAIL = 1024  # last bytes, in which an image's end is looked for
_JPEG_END = b"\xff\xd9"
_TRANSPOSING = range(2, 9)  # EXIF orientations other than "as it is"


class Look(NamedTuple):
    """What an image looks like: what is odd about it, a digest to find duplicates by, format and size where it has them."""

    odd: list[tuple[str, str]]  # (kind, detail)
    key: bytes
    format: str
    width: int
    height: int


class _Fetched(NamedTuple):
    """First and last bytes of an image, which are all of it where `head` has `size` bytes; `problem`: why there are none."""

    location: Location
    size: int
    head: bytes = b""
    tail: bytes = b""
    problem: tuple[str, str] | None = None
    odd: tuple[tuple[str, str], ...] = ()

    def first(self, size: int) -> bytes:
        """The image's first bytes, read where `head` has fewer."""
        if len(self.head) >= min(size, self.size):
            return self.head
        return storage.read_range(self.location.path, self.location.offset, min(size, self.size))


def look_at(locations: list[Location], full: bool) -> list[Look]:
    """Look at some images: reading in threads, which mostly wait, the rest one after the other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about EXIF and large images
        return [_examine(fetched, full) for fetched in _threads().map(partial(_fetch, full=full), locations)]


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(NUM_THREADS, "verify")


def _fetch(location: Location, *, full: bool) -> _Fetched:
    path, offset, size = location
    try:
        actual = storage.size_of(path) if offset == 0 else size  # a shard's size was compared with the index's before
        odd = ()
        if size not in (storage.WHOLE, actual):
            odd = (("changed", f"{actual:,} bytes, the index says {size:,}"),)
        wanted = actual if full or actual <= _HEADS[0] + _TAIL else _HEADS[0]
        head = storage.read_range(path, offset, wanted)
        if len(head) != wanted:
            return _Fetched(location, actual, problem=("unreadable", f"{len(head)} of {wanted} bytes could be read"))
        tail = head[-_TAIL:] if wanted == actual else storage.read_range(path, offset + actual - _TAIL, _TAIL)
    except storage.ReadError as error:
        kind = "missing" if str(error) == storage.NOT_THERE else "unreadable"
        return _Fetched(location, 0, problem=(kind, str(error)))
    return _Fetched(location, actual, head, tail, odd=odd)


def _examine(fetched: _Fetched, full: bool) -> Look:
    if fetched.problem is not None:
        return Look([fetched.problem], b"", "", 0, 0)
    if not fetched.size:
        return Look([*fetched.odd, ("empty", "no bytes")], b"", "", 0, 0)
    key = _digest(fetched.head) if full else _digest(b"%d," % fetched.size + fetched.head[: _HEADS[0]] + fetched.tail)
    odd = list(fetched.odd)
    try:
        has_end, trailing = _end_of(fetched)
        about = None if full or not has_end else _about_from_head(fetched)
        if about is None:
            whole = fetched.first(fetched.size)
            bad = why_bad(whole)
            if bad is not None:
                return Look([*odd, bad], key, "", 0, 0)
            about = _about(whole)
            if not has_end:
                has_end, trailing = _end_in(whole, about.format)
    except storage.ReadError as error:
        return Look([*odd, ("unreadable", str(error))], key, "", 0, 0)
    odd += about.odd
    if trailing:
        odd.append(("trailing_bytes", f"{trailing:,} bytes"))
    if not has_end:
        odd.append(("no_end", about.format))
    return Look(odd, key, about.format, about.width, about.height)


def _end_of(fetched: _Fetched) -> tuple[bool, int]:
    """Whether an image has its format's end marker near its end, and the number of bytes that follow it."""
    tail = fetched.tail
    for start, end in ((b"\xff\xd8\xff", _JPEG_END), (b"\x89PNG", PNG_END)):
        if fetched.head.startswith(start) and (found := tail.rfind(end)) >= 0:
            return True, len(tail) - found - len(end)
    return False, 0


def _end_in(whole: bytes, kind: str) -> tuple[bool, int]:
    """The same for an image that decodes; those of other formats tell how long they are, and need no end marker."""
    end = {"JPEG": _JPEG_END, "PNG": PNG_END}.get(kind)
    if end is None:
        return True, 0
    found = whole.rfind(end)
    return found >= 0, len(whole) - found - len(end) if found >= 0 else 0


class _About(NamedTuple):
    """What an image's header says."""

    format: str
    width: int
    height: int
    odd: list[tuple[str, str]]


def _about_from_head(fetched: _Fetched) -> _About | None:
    """By a JPEG's or PNG's first bytes; None where they are not enough, or not good enough."""
    for size in _HEADS:
        with suppress(OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            return _about(fetched.first(size))
    return None


def _about(data: bytes) -> _About:
    """Raises what Pillow raises where the header is incomplete."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        kind = "JPEG" if image.format == "MPO" else image.format or ""  # cameras append further pictures to a JPEG
        is_deep = image.mode.startswith(("I", "F")) or (kind == "PNG" and data[24:25] == b"\x10")
        orientation = 1
        if kind == "JPEG" or "exif" in image.info:
            with suppress(Exception):  # broken EXIF hurts nobody here
                orientation = image.getexif().get(0x0112, 1)
        signs = {
            "grey": image.mode in ("1", "L", "LA") or image.mode.startswith("I;16"),
            "cmyk": image.mode == "CMYK",
            "palette": image.mode in ("P", "PA"),
            "transparent": image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info,
            "sixteen_bits": is_deep,
            "progressive": bool(image.info.get("progressive")),
            "turned": orientation in _TRANSPOSING,
            "small": min(width, height) < 32,
            "large": max(width, height) > 10_000,
            "narrow": max(width, height) > 10 * min(width, height),
        }
        details = {"turned": f"orientation {orientation}"} | dict.fromkeys(("small", "large", "narrow"), f"{width} x {height}")
        return _About(kind, width, height, [(name, details.get(name, image.mode)) for name, is_so in signs.items() if is_so])


# First bytes of formats that loaders refuse, and of those that they read.
_REFUSED = {
    "GIF": rb"GIF8",
    "HEIC or AVIF": rb"....ftyp(?:heic|heix|mif1|avif|avis|hevc)",
    "JPEG 2000": rb"\x00\x00\x00\x0cjP|\xff\x4f\xff\x51",
    "JPEG XL": rb"\x00\x00\x00\x0cJXL|\xff\x0a",
    "Photoshop": rb"8BPS",
    "ICO": rb"\x00\x00\x01\x00",
    "PDF": rb"%PDF",
    "SVG": rb"\s*(?:<\?xml[^>]*>\s*)?<svg",
}
_READ = rb"\xff\xd8|\x89PNG|RIFF....WEBP|BM|P[1-6]\s|II\*\x00|MM\x00\*"


def why_bad(data: bytes) -> tuple[str, str] | None:
    """Kind and reason of an image (not of no bytes) that cannot be decoded to its end, None if it can."""
    reason = why_undecodable(data)
    if reason is None:
        return None
    for name, start in _REFUSED.items():
        if re.match(start, data, re.DOTALL):
            return "refused_format", f"{name}; wanted one of {', '.join(FORMATS)}"
    if re.match(_READ, data, re.DOTALL):
        cut = re.search("runcated|not enough|Reached EOF|cut short", reason) or (
            data[:2] == b"\xff\xd8" and data[-2:] != b"\xff\xd9"
        )
        return ("cut_short" if cut else "undecodable"), reason
    if re.match(rb"\s*<(?:!doctype|html)", data, re.IGNORECASE):
        return "not_an_image", f"a web page: {data[:60]!r}"
    is_text = not re.search(rb"[\x00-\x08\x0e-\x1f\x7f-\xff]", data[:200])
    return "not_an_image", f"{'text' if is_text else 'starts with'}: {data[: 40 if is_text else 8]!r}"


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:16]


def digests_of(locations: list[Location]) -> list[bytes]:
    """SHA-256 of whole images, its first 16 bytes; zeros where one cannot be read."""

    def digest(location: Location) -> bytes:
        try:
            size = storage.size_of(location.path) if location.offset == 0 else location.size
            return _digest(storage.read_range(location.path, location.offset, size))
        except storage.ReadError:
            return bytes(16)

    return list(_threads().map(digest, locations))
