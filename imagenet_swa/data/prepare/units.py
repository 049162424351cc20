"""What `prepare` writes, unit by unit: tar shards or files in folders, and the journal of what is finished."""

import fcntl
import hashlib
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from imagenet_swa.config import InputError, require
from imagenet_swa.data import storage
from imagenet_swa.data.prepare.archives import Item, key_of

FORMAT = "imagenet-swa prepare 1"
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
        key, extension = key_of(name), os.path.splitext(name)[1]
        unit.num_renamed += key + extension != name
        if self._file is None:
            self._file = self._partial(unit).open("wb")
        _write_member(self._file, key + extension, data)
        _write_member(self._file, f"{key}.cls", str(label).encode())
        self._digest.add(key + extension, label, data)
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
        _flush(self._file)
        unit.num_file_bytes = self._file.tell()
        self._file.close()
        self._file = None
        self._partial(unit).rename(self._partial(unit).with_suffix(""))
        _flush_folder(self._folder)

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

    def is_whole(self, unit: Unit) -> bool:
        """Whether a committed unit is still there."""
        path = None if unit.file is None else self._folder.parent / unit.file
        return path is None or (path.is_file() and path.stat().st_size == unit.num_file_bytes)

    def begin_after(self, _units: list[Unit]) -> None:
        """Nothing has to be cut back."""

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
        if "/" not in name:
            folder = self._class_folders[label] if self._class_folders else f"{label:04d}"
            name = f"{folder}/{name}"
        require("\n" not in name and name == name.strip(), f"image {name!r} cannot stand in a list; rename it")
        path = self._folder / name
        if path.parent not in self._made:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._made.add(path.parent)
        partial = path.with_name(f"{path.name}.partial")
        try:
            partial.write_bytes(data)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        self._lines.append(os.fsencode(name) + f" {label}\n".encode())
        self._digest.add(name, label, data)
        unit.num_images += 1
        unit.num_bytes += len(data)

    def commit(self, unit: Unit) -> None:
        """Wait until all is on the disk, the list's part too."""
        assert self._list is not None
        self._list.write(b"".join(self._lines))
        _flush(self._list)
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
        _flush_folder(self._folder.parent)

    def is_whole(self, unit: Unit) -> bool:
        """Whether the list up to a committed unit is still there."""
        return any(path.exists() and path.stat().st_size >= unit.num_file_bytes for path in (self.list_file, self._partial_list))

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


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Journal:
    """`prepare-train.journal`: a line with the settings, then one per finished unit. Holds a lock while it is open."""

    def __init__(self, folder: Path, split: str) -> None:
        self.units: list[Unit] = []
        self._path = folder / f"prepare-{split}.journal"
        self._file: IO[bytes] | None = None

    def __enter__(self) -> "Journal":
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a+b")
        except OSError as error:
            raise InputError(f"cannot write {self._path}: {storage.reason_of(error)}; choose another output") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise InputError(
                f"another prepare is writing to {self._path.parent}; wait for it, or choose another output"
            ) from None
        return self

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        self._file.close()

    @property
    def num_consumed(self) -> int:
        """Images of the source that the finished units are made of."""
        return sum(unit.num_consumed for unit in self.units)

    def begin(self, identity: dict[str, Any], output: ShardOutput | FolderOutput) -> None:
        """Find out what is finished, and make the output ready for what comes next.

        Raises:
            InputError: made with other settings, of another source, or not by `prepare`.
        """
        assert self._file is not None
        self._file.seek(0)
        whole, lines = 0, []
        for line in self._file.readlines():
            if not line.endswith(b"\n"):  # cut off in the middle of writing
                break
            try:
                lines.append(json.loads(line))
            except ValueError:
                raise InputError(f"{self._path} is damaged in line {len(lines) + 1}; choose a new or empty output") from None
            whole += len(line)
        self._file.truncate(whole)
        if not lines:
            strange = output.strange_files()
            require(not strange, f"{self._path.parent} holds files such as {(strange or [''])[0]}; choose a new or empty output")
            self._append({"format": FORMAT, "identity": identity})
        else:
            self._check(lines[0], identity)
        for line in lines[1:]:
            unit = Unit(**line | {"counts": Counter(line["counts"])})
            if unit.number != len(self.units):  # written again after an earlier one was lost
                self.units = self.units[: unit.number]
            self.units.append(unit)
        for number, unit in enumerate(self.units):
            if not output.is_whole(unit):
                self.units = self.units[:number]
                break
        output.begin_after(self.units)

    def _check(self, first: dict[str, Any], identity: dict[str, Any]) -> None:
        require(first.get("format") == FORMAT, f"{self._path} is of another version; choose a new or empty output")
        then = first["identity"]
        for name in dict.fromkeys([*then, *identity]):
            if then.get(name) != identity.get(name):
                raise InputError(
                    f"{self._path.parent} holds a prepare with {name} {_short(then.get(name))}, now it is "
                    f"{_short(identity.get(name))}; give the same, or choose a new or empty output"
                )

    def add(self, unit: Unit) -> None:
        """Note that a unit is finished."""
        self._append(vars(unit))
        self.units.append(unit)

    def _append(self, entry: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(json.dumps(entry).encode() + b"\n")
        _flush(self._file)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
