"""Files that are whole or not there: written aside, flushed to the disk, renamed."""

import hashlib
import io
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import IO, Any


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file aside, flush it to disk, rename it: readers see the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    if partial.is_symlink():  # which somebody laid there, and which would be followed
        partial.unlink()
    try:
        write_flushed(partial, content.encode(errors="backslashreplace") if isinstance(content, str) else content)
        partial.replace(path)
    except OSError:
        with suppress(OSError):  # such as for a full disk, which needs the room
            partial.unlink(missing_ok=True)
        raise
    flush(path.parent)


def save_figure(figure: Any, path: Path, *, dpi: int) -> None:
    """Write a matplotlib figure as a PNG in the same way; its texts are names, not formulas between dollar signs."""
    for text in figure.findobj(lambda artist: hasattr(artist, "set_parse_math")):
        text.set_parse_math(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=dpi, format="png")
    write_atomically(path, buffer.getvalue())


def write_flushed(path: Path, content: bytes) -> str:
    """Write a file and flush it to disk; returns the SHA-256 of what was to be written."""
    with path.open("wb", buffering=0) as file:
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[file.write(rest) :]
            flush_file(file)
        except OSError as error:  # which does not say where
            raise OSError(error.errno, error.strerror, str(path)) from None
    return hashlib.sha256(content).hexdigest()


def drop_from_cache(path: Path) -> None:
    """Make the next reader of a flushed file read it from the disk."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def remove_left_overs(*folders: Path) -> None:
    """Delete what interrupted writes left aside in these folders, those that exist."""
    for folder in folders:
        for path in folder.glob("*.partial"):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def flush_file(file: IO[bytes]) -> None:
    """Wait until an open file's bytes are on the disk."""
    file.flush()
    os.fsync(file.fileno())


def flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())
