"""Tar files that anybody may have written: their members in order, with no header that leads backwards or asks for memory."""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MAX_READ = 16 * 2**20  # bytes at a time; long names and extended headers have less, images are read elsewhere


class Bounded:
    """An open file for `tarfile`, which would ask for as many bytes at once as a header says that its name has."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def tell(self) -> int:
        """The position."""
        return self._file.tell()

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position."""
        return self._file.seek(position, whence)

    def read(self, size: int = -1) -> bytes:
        """Raises tarfile.ReadError: more than any part of a header takes."""
        if not 0 <= size <= _MAX_READ:
            raise tarfile.ReadError(f"a header or label of {size:,} bytes")
        return self._file.read(size)


def open_tar(file: Any, mode: Any = "r:") -> tarfile.TarFile:
    """`tarfile.open`, which reads the first header; of a path, or of an open file.

    Raises:
        tarfile.TarError: see `members_of`.
        OSError: the file cannot be read.
    """
    try:
        return tarfile.open(file, mode) if isinstance(file, Path) else tarfile.open(fileobj=file, mode=mode)
    except (tarfile.TarError, OSError):
        raise
    except Exception as error:
        raise tarfile.ReadError(f"a damaged header: {type(error).__name__}") from None


def members_of(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """The members of an open tar file, each behind the one before it.

    Raises:
        tarfile.TarError: for all that is wrong with headers; `tarfile` itself raises of all kinds, or turns in circles.
        OSError: the file cannot be read.
    """
    last = -1
    while True:
        try:
            member = tar.next()
        except (tarfile.TarError, OSError):
            raise
        except Exception as error:  # int(), nesting, split(), memory: whatever the bytes lead it into
            raise tarfile.ReadError(f"a damaged header: {type(error).__name__}") from None
        if member is None:
            return
        if member.size < 0 or member.offset_data <= last:
            raise tarfile.ReadError(f"a member of {member.size} bytes at byte {member.offset_data}")
        last = member.offset_data
        yield member
