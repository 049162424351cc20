"""What `prepare` writes, unit by unit: tar shards or files in folders."""

import errno
import hashlib
import itertools
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from imagenet_swa.config import InputError, TrainingError, require
from imagenet_swa.data import storage
from imagenet_swa.data.prepare.archives import Item, key_of
from imagenet_swa.data.shards import NUM_THREADS, scan_shard, shard_pool
from imagenet_swa.files import flush, flush_file

_RECORD = 10_240  # tar files are filled up to a multiple of this


@dataclass
class Unit:
    """A shard, or as many files of a folder, and the numbers of the images in it."""

    number: int
    file: str | None = None
    """The shard's path below the output."""
    num_consumed: int = 0
    """Images of the source that went into it or were left out before its end."""
    num_images: int = 0
    num_bytes: int = 0
    """Of the images alone."""
    num_bytes_before: int = 0
    num_file_bytes: int = 0
    """Of the shard, or of the list up to this unit's end."""
    num_renamed: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    difference_sum: int = 0
    difference_max: int = 0
    bad: list[list[str]] = field(default_factory=list)
    """Name and reason of those left out."""
    digest: str = ""
    """Of names, labels and bytes in their order."""


class _Digest:
    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, name: str, label: int, data: bytes) -> None:
        self._hash.update(os.fsencode(name) + f"\0{label}\0{len(data)}\0".encode())
        self._hash.update(data)

    def hex(self) -> str:
        return self._hash.hexdigest()


def digest_of(images: Sequence[Item]) -> str:
    """The digest of images as they lie on the disk; a text of another kind where one cannot be read."""
    digest = _Digest()
    for name, label, place in images:
        assert not isinstance(place, bytes)
        try:
            data = storage.read(place.path, offset=place.offset, size=place.size)
        except storage.ReadError as error:
            return f"unreadable: {error}"
        digest.add(name, label, data)
    return digest.hex()


class ShardOutput:
    """`train-000000.tar` and so on; an image `folder/key.jpg` is followed by its label `folder/key.cls`.

    WebDataset ends a key at the first dot of the file's name, so other dots become underscores.
    """

    list_file: Path | None = None

    def __init__(self, folder: Path, split: str) -> None:
        self._folder, self._split = folder, split
        self._digest = _Digest()
        self._file: IO[bytes] | None = None

    def begin(self, number: int) -> Unit:
        """The next unit."""
        self._digest = _Digest()
        return Unit(number, f"{self._folder.name}/{self._split}-{number:06d}.tar")

    def add(self, unit: Unit, name: str, label: int, data: bytes) -> None:
        """Append an image."""
        placed = self.placed(name, label)
        unit.num_renamed += placed != name
        if self._file is None:
            self._file = self._partial(unit).open("wb")
        _write_member(self._file, placed, data)
        _write_member(self._file, f"{key_of(name)}.cls", str(label).encode())
        self._digest.add(placed, label, data)
        unit.num_images += 1
        unit.num_bytes += len(data)

    def _partial(self, unit: Unit) -> Path:
        return self._folder / f"{self._split}-{unit.number:06d}.tar.partial"

    def commit(self, unit: Unit) -> None:
        """Give the shard its final name, once it is on the disk; a unit without images has none."""
        unit.digest = self._digest.hex()
        if self._file is None:
            unit.file = None
            return
        end = self._file.tell() + 2 * tarfile.BLOCKSIZE
        self._file.write(bytes(2 * tarfile.BLOCKSIZE + -end % _RECORD))
        flush_file(self._file)
        unit.num_file_bytes = self._file.tell()
        self._file.close()
        self._file = None
        self._partial(unit).rename(self._partial(unit).with_suffix(""))
        flush(self._folder)

    def discard(self) -> None:
        """Leave out what was not committed."""
        if self._file is not None:
            path = Path(self._file.name)
            try:
                self._file.close()
            finally:
                path.unlink(missing_ok=True)
                self._file = None

    def finish(self) -> None:
        """Nothing is left to do."""

    def num_whole(self, units: list[Unit]) -> int:
        """How many of the committed units, from the first on, are still there."""
        return sum(1 for _ in itertools.takewhile(self._is_whole, units))

    def _is_whole(self, unit: Unit) -> bool:
        path = None if unit.file is None else self._folder.parent / unit.file
        return path is None or (path.is_file() and path.stat().st_size == unit.num_file_bytes)

    def begin_after(self, _units: list[Unit]) -> None:
        """Nothing has to be cut back."""

    def placed(self, name: str, _label: int) -> str:
        """The name that an image gets."""
        return key_of(name) + os.path.splitext(name)[1]

    def names(self, units: list[Unit]) -> Iterator[str]:
        """Names of the images of committed units."""
        paths = [str(self._folder.parent / unit.file) for unit in units if unit.file is not None]
        if not paths:
            return
        with shard_pool(paths) as pool:
            try:
                for shard in pool.map(scan_shard, paths):
                    yield from map(os.fsdecode, shard.names)
            except InputError as error:  # which tells to copy it again, but it is our own
                fault = str(error).rpartition(";")[0]
                raise TrainingError(f"{fault}; delete it and run the same command again") from None

    def strange_files(self) -> list[str]:
        """Files that no `prepare` of this split wrote."""
        ours = re.compile(rf"{self._split}-\d{{6}}\.tar(\.partial)?")
        return sorted(entry.name for entry in self._folder.iterdir() if not ours.fullmatch(entry.name))


def _write_member(file: IO[bytes], name: str, data: bytes) -> None:
    """One member, its header the same whenever and by whomever it is written; GNU's form for names above 100 bytes."""
    member = tarfile.TarInfo(name)
    member.size = len(data)  # mode 0644, owner 0 and time 0 are its defaults
    kind = tarfile.USTAR_FORMAT if len(os.fsencode(name)) <= 100 and len(data) < 8**11 else tarfile.GNU_FORMAT
    file.write(member.tobuf(kind, tarfile.ENCODING, "surrogateescape"))
    file.write(data)
    file.write(bytes(-len(data) % tarfile.BLOCKSIZE))


class FolderOutput:
    """A file per image, and beside the folder a list of them; an image without a folder gets its class's."""

    def __init__(self, folder: Path, class_folders: Sequence[str] | None) -> None:
        self._folder, self._class_folders = folder, class_folders
        self._digest = _Digest()
        self.list_file = folder.with_name(f"{folder.name}.txt")
        self._list: IO[bytes] | None = None
        self._lines: list[bytes] = []
        self._made: set[Path] = set()

    @property
    def _partial_list(self) -> Path:
        return self._folder.with_name(f"{self._folder.name}.txt.partial")

    def begin(self, number: int) -> Unit:
        """The next unit."""
        self._digest, self._lines = _Digest(), []
        return Unit(number)

    def add(self, unit: Unit, name: str, label: int, data: bytes) -> None:
        """Write a file, under its name once it is whole."""
        name = self.placed(name, label)
        require("\n" not in name and name == name.strip(), f"image {name!r} cannot stand in a list; rename it")
        try:
            self._write(self._folder / name, data)
        except OSError as error:
            if error.errno not in (errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.EILSEQ):
                raise
            raise InputError(f"image {name[:200]!r} cannot be a file: {storage.reason_of(error)}; rename it") from None
        self._lines.append(os.fsencode(name) + f" {label}\n".encode())
        self._digest.add(name, label, data)
        unit.num_images += 1
        unit.num_bytes += len(data)

    def _write(self, path: Path, data: bytes) -> None:
        if path.parent not in self._made:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._made.add(path.parent)
        partial = path.with_name(f"{path.name}.partial")
        try:
            partial.write_bytes(data)
            partial.replace(path)
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def commit(self, unit: Unit) -> None:
        """Wait until all is on the disk, the list's part too."""
        assert self._list is not None
        self._list.write(b"".join(self._lines))
        flush_file(self._list)
        unit.num_file_bytes = self._list.tell()
        unit.digest = self._digest.hex()
        os.sync()

    def discard(self) -> None:
        """Files that were written are whole, and the same again the next time."""
        if self._list is not None:
            self._list.close()
            self._list = None

    def finish(self) -> None:
        """Give the list its final name."""
        self._partial_list.rename(self.list_file)
        flush(self._folder.parent)

    def num_whole(self, units: list[Unit]) -> int:
        """How many of the committed units, from the first on, are still there: their part of the list, and the files in it."""
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            sizes = pool.map(self._size_of_all, self._lines_of(units))
            return sum(1 for _ in itertools.takewhile(lambda both: both[0].num_bytes == both[1], zip(units, sizes, strict=False)))

    def _size_of_all(self, lines: list[bytes]) -> int:
        """Bytes of the images that lines of the list name; -1 where one is not there."""
        try:
            return sum((self._folder / os.fsdecode(line.rpartition(b" ")[0])).stat().st_size for line in lines)
        except OSError:
            return -1

    def _lines_of(self, units: list[Unit]) -> Iterator[list[bytes]]:
        """Each unit's part of the list, up to the first that is not there."""
        found = [path for path in (self.list_file, self._partial_list) if path.exists()]
        content, start = found[0].read_bytes() if found else b"", 0
        for unit in units:
            lines = content[start : unit.num_file_bytes].split(b"\n")[:-1]
            if len(content) < unit.num_file_bytes or len(lines) != unit.num_images:
                return
            yield lines
            start = unit.num_file_bytes

    def placed(self, name: str, label: int) -> str:
        """The name that an image gets."""
        if "/" in name:
            return name
        return f"{self._class_folders[label] if self._class_folders else f'{label:04d}'}/{name}"

    def names(self, units: list[Unit]) -> Iterator[str]:
        """Names of the images of committed units."""
        return (os.fsdecode(line.rpartition(b" ")[0]) for lines in self._lines_of(units) for line in lines)

    def begin_after(self, units: list[Unit]) -> None:
        """Cut the list to what is finished."""
        if self.list_file.exists():  # of a run that went to its end, or nearly
            self.list_file.rename(self._partial_list)
        self._list = self._partial_list.open("r+b" if units else "wb")
        self._list.truncate(units[-1].num_file_bytes if units else 0)
        self._list.seek(0, os.SEEK_END)

    def strange_files(self) -> list[str]:
        """Anything; asked only where nothing should be there yet."""
        return sorted(entry.name for entry in self._folder.iterdir())
