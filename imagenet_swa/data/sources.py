"""Reads what a user names (class folders, a list file, tar shards; local or in S3) into an index, and notices later changes."""

import hashlib
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa

from imagenet_swa.config import DataConfig, InputError
from imagenet_swa.data import storage
from imagenet_swa.data.index import ImageIndex, first_outside, make_index
from imagenet_swa.data.lists import parse_list, start_of
from imagenet_swa.data.shards import (
    EXTENSIONS,
    NUM_THREADS,
    changed_shards,
    fault_of,
    index_of_shards,
    root_of_pattern,
    shards_in,
    shards_of_pattern,
)
from imagenet_swa.plain import printable

_ENDINGS = tuple(extension.encode() for extension in EXTENSIONS)
T = TypeVar("T")
Track = Callable[[Iterable[T], int, str], Iterable[T]]  # (items, their number, what they are) -> the same items


def untracked(items: Iterable[T], _number: int, _what: str) -> Iterable[T]:
    """No progress bar."""
    return items


def progress_bar(items: Iterable[T], number: int, what: str) -> Iterable[T]:
    """A progress bar on the terminal while the items are gone through, nothing where stderr is none."""
    from rich.console import Console
    from rich.progress import track

    return track(items, what, number, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())


@dataclass(frozen=True)
class Source:
    """The images of a split as the user named them: `path`, and a list file of `path label` lines where there is one."""

    split: str
    path: str
    list_file: str | None = None
    missing_ok: bool = False  # whether the list may name files that are not there; their sizes are -1

    @property
    def kind(self) -> Literal["list", "shards", "folder"]:
        """A list file; tar shards, by a pattern or as a folder that holds nothing but files; or class folders.

        Raises:
            InputError: what has to go through `imagenet-swa prepare` first, or S3 without list and shards.
        """
        for setting, value in ((self.split, self.path), (f"{self.split}_list", self.list_file)):
            if value is not None and not value.strip():
                raise InputError(f"data.{setting} is an empty text; name a folder, shards or a list")
        if self.list_file is not None:
            return "list"
        if self.is_pattern:
            return "shards"
        if storage.is_remote(self.path):
            return self._kind_in_s3()
        with storage.explained():
            return self._kind_of_folder()

    @property
    def is_pattern(self) -> bool:
        """Whether the path names tar files. Raises InputError: an archive that has to be unpacked or prepared first."""
        if self.list_file is not None or (not storage.is_remote(self.path) and os.path.isdir(self.path)):
            return False
        if self.path.endswith((".tar.gz", ".tgz", ".zip")):
            raise InputError(f"{self.path} is compressed, without random access to its images; unpack it first")
        if self.path.endswith(".parquet") or re.fullmatch(r"ILSVRC2012_img.*\.tar", Path(self.path).name):
            raise InputError(f"{self.path} has no random access to its images; {self._prepare}")
        return self.path.endswith(".tar")

    @property
    def takes_part(self) -> bool:
        """Whether this is a folder of shards that holds the other split's shards as well."""
        try:
            return self.kind == "shards" and not self.is_pattern and shards_in(self.path, self.split)[1]
        except InputError:
            return False

    @property
    def _prepare(self) -> str:
        return f"run `imagenet-swa prepare {self.path} FOLDER` first and set data.{self.split} to a folder of its result"

    def _kind_in_s3(self) -> Literal["shards"]:
        if re.search(r"[*?\[{]", self.path):
            raise InputError(f"{self.path} is a pattern that does not end in .tar; wanted one such as s3://bucket/train-*.tar")
        if shards_in(self.path, self.split)[0]:
            return "shards"
        raise InputError(f"{self.path} holds no .tar shards; wanted some, or data.{self.split}_list with objects below it")

    def _kind_of_folder(self) -> Literal["shards", "folder"]:
        wanted = f"wanted a folder with a sub-folder of images per class, or tar shards such as '{self.path}/train-*.tar'"
        if os.path.isfile(self.path):
            raise InputError(
                f"{self.path} is a file; wanted class folders or .tar shards (a list goes to data.{self.split}_list)"
            )
        if not os.path.isdir(self.path):
            if re.search(r"[*?\[{]", self.path):
                raise InputError(f"{self.path} is a pattern that does not end in .tar; wanted one such as 'shards/train-*.tar'")
            raise InputError(f"no such folder: {self.path}; {wanted}")
        with os.scandir(self.path) as entries:
            found = list(entries)
        if any(entry.is_dir() for entry in found):
            return "folder"
        if any(entry.name.endswith(".tar") for entry in found):
            return "shards"
        if any(entry.name.endswith(".parquet") for entry in found):
            raise InputError(f"{self.path} holds parquet files, which have no random access to their images; {self._prepare}")
        return "folder"

    @property
    def root(self) -> str:
        """What the index's names start from: the folder, or one that all shards lie in or below."""
        return root_of_pattern(self.path) if self.is_pattern else self.path


def source_of(data: DataConfig, split: str) -> Source:
    """The images of a split as the configuration names them. Raises InputError where it names none."""
    path, list_file = getattr(data, split), getattr(data, f"{split}_list")
    if path is None:
        raise InputError(f"data.{split} is not set: pass --data.{split} FOLDER, or --data.synthetic to run without data")
    return Source(split, path, list_file, missing_ok=data.on_bad_image == "skip" or data.quarantine is not None)


def scan(source: Source, *, num_classes: int, track: Track[Any] = untracked) -> tuple[ImageIndex, dict[str, Any]]:
    """The index of a source, and how the source looked, for `what_changed`.

    Raises:
        InputError: nothing there, or something that is no image list, no class folder, no tar shard with labels.
    """
    kind = source.kind
    with storage.explained():
        if kind == "list":
            return _scan_list(source, num_classes, track)
        return _scan_shards(source, track) if kind == "shards" else _scan_folder(source, track)


def what_changed(index: ImageIndex, state: dict[str, Any], source: Source) -> str | None:
    """Where the source differs from what it was when it was indexed, None if nowhere that a quick look reaches.

    Class folders: names of files, in the folders whose own time changed. List: its bytes, its root, sizes of some files.
    Shards: number, sizes, and all headers and labels of those whose time changed. Other sizes are compared when files are read.
    """
    kind = source.kind
    if state["kind"] != kind:
        return f"it was made of {state['kind']}, now it is {kind}"
    with storage.explained():
        if kind == "list":
            return _changed_list(index, state, source)
        return changed_shards(index, state, _shard_paths(source)) if kind == "shards" else _changed_folders(index, state)


# ------------------------------------------------------------------------------------------------------ class folders


def _scan_folder(source: Source, track: Track[Any]) -> tuple[ImageIndex, dict[str, Any]]:
    """torchvision's ImageFolder rules: classes are the sorted names of the sub-folders; images lie at any depth below them,
    sorted by folder, then by name.
    """
    root = source.path
    with os.scandir(root) as entries:
        classes = tuple(sorted(entry.name for entry in entries if entry.is_dir()))
    if not classes:
        raise InputError(f"{root} has no sub-folders; wanted one per class, tar shards, or data.{source.split}_list")
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        tasks = pool.map(partial(storage.files_below, os.fsencode(root), endings=_ENDINGS), map(os.fsencode, classes))
        found = list(track(tasks, len(classes), f"{source.split}: class folders"))
    empty = [name for name, (names, _, _) in zip(classes, found, strict=True) if not names]
    if empty:
        first = f"{root}: no images for {len(empty)} of {len(classes)} classes, the first is {empty[0]!r}"
        raise InputError(f"{first}; remove it, or put images into it")
    index = make_index(
        root,
        [name for names, _, _ in found for name in names],
        np.repeat(np.arange(len(classes)), [len(names) for names, _, _ in found]),
        np.concatenate([sizes for _, sizes, _ in found]),
        classes,
    )
    times = {folder: time for _, _, folders in found for folder, time in folders.items()}
    return index, {"kind": "folder", "folder_times": times}


def _changed_folders(index: ImageIndex, state: dict[str, Any]) -> str | None:
    root, classes = index.root, index.classes or ()
    now = tuple(sorted(entry.name for entry in os.scandir(root) if entry.is_dir()))
    if now != classes:
        return f"class folders came or went, such as {min(set(now) ^ set(classes))!r}"
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        times = pool.map(partial(_time_of, root), state["folder_times"])
        moved = {f.split(os.sep)[0] for (f, then), time in zip(state["folder_times"].items(), times, strict=True) if time != then}
    if not moved:
        return None
    first = np.searchsorted(index.labels, np.arange(len(classes) + 1))  # labels ascend in an index of class folders
    for label, name in enumerate(classes):
        if name in moved:
            names, _, _ = storage.files_below(os.fsencode(root), os.fsencode(name), _ENDINGS, with_sizes=False)
            then = index.names.slice(first[label], first[label + 1] - first[label]).to_pylist()
            if names != then:
                different = sorted(set(names) ^ set(then))
                return f"files came or went, such as {os.fsdecode(different[0])}" if different else f"{name} has another order"
    return None


def _time_of(root: str, folder: str) -> int:
    try:
        return os.stat(os.path.join(root, folder)).st_mtime_ns
    except OSError:
        return 0


# --------------------------------------------------------------------------------------------------------------- lists


def _scan_list(source: Source, num_classes: int, track: Track[Any]) -> tuple[ImageIndex, dict[str, Any]]:
    """A line `path label` per image, paths relative to the root, in the file's order."""
    assert source.list_file is not None
    content = _list_bytes(source.list_file)
    names, labels = parse_list(source.list_file, content, num_classes)
    if (outside := first_outside(source.path, pa.array(names, pa.large_binary()))) is not None:
        way_out = f"not below {source.path}; set data.{source.split} to a folder that all its images lie below"
        raise InputError(f"{source.list_file} names {start_of(names[outside])}, {way_out}")
    sizes = _listed_sizes(source, names, track)
    if (missing := np.flatnonzero(sizes == storage.WHOLE)).size and not source.missing_ok:
        path = printable(storage.join(source.path, os.fsdecode(names[missing[0]]))[:500])
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise InputError(f"{source.list_file} names {path}{more}, not there; its paths start from {source.path}")
    state = {"kind": "list", "digest": hashlib.sha256(content).hexdigest(), "root": _absolute(source.path)}
    return make_index(source.path, names, labels, sizes), state


def _listed_sizes(source: Source, names: Sequence[bytes], track: Track[Any]) -> np.ndarray:
    """Bytes of each, -1 of those that are not there."""
    if storage.is_remote(source.path):
        try:
            found = storage.sizes_below(source.path)
        except storage.ReadError as error:
            raise InputError(f"cannot list {source.path}: {error}") from None
        return np.array([found.get(os.fsdecode(name), storage.WHOLE) for name in names], np.int64)
    starts = range(0, len(names), 4096)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        tasks = pool.map(lambda start: _sizes_of(source, names[start : start + 4096]), starts)
        return np.concatenate(list(track(tasks, len(starts), f"{source.split}: thousands of files")))


def _absolute(path: str) -> str:
    return path.rstrip("/") if storage.is_remote(path) else os.path.abspath(path)


def _changed_list(index: ImageIndex, state: dict[str, Any], source: Source) -> str | None:
    assert source.list_file is not None
    if hashlib.sha256(_list_bytes(source.list_file)).hexdigest() != state["digest"]:
        return f"{source.list_file} has another content"
    if state.get("root") != _absolute(source.path):
        return f"it was built for paths below {state.get('root')}"
    if storage.is_remote(source.path) or source.missing_ok:  # bad files are then left out one by one
        return None
    some = np.linspace(0, len(index) - 1, min(64, len(index))).astype(np.int64)
    now = _sizes_of(source, [index.names[int(i)].as_py() for i in some])
    for i, size in zip(some, now, strict=True):
        if index.sizes[i] not in (storage.WHOLE, size):
            what = "is gone" if size == storage.WHOLE else f"had {index.sizes[i]} bytes, now has {size}"
            return f"{index.path(i)} {what}"
    return None


def _list_bytes(list_file: str) -> bytes:
    try:
        return storage.read(list_file)
    except storage.ReadError as error:
        raise InputError(f"cannot read the list {list_file}: {error}") from None


def _sizes_of(source: Source, names: Sequence[bytes]) -> np.ndarray:
    folder = os.fsencode(source.path)
    sizes = np.full(len(names), storage.WHOLE, np.int64)
    for number, name in enumerate(names):
        try:
            found = os.stat(os.path.join(folder, name))
        except (OSError, ValueError):  # ValueError: a zero byte in the name
            continue
        if not stat.S_ISREG(found.st_mode):
            what = "folder" if stat.S_ISDIR(found.st_mode) else "device or pipe"
            path = printable(storage.join(source.path, os.fsdecode(name)))
            raise InputError(f"{source.list_file} names the {what} {path}; wanted an image in each line")
        sizes[number] = found.st_size
    return sizes


# -------------------------------------------------------------------------------------------------------------- shards


def _shard_paths(source: Source) -> list[str]:
    return shards_of_pattern(source.path) if source.is_pattern else shards_in(source.path, source.split)[0]


def _scan_shards(source: Source, track: Track[Any]) -> tuple[ImageIndex, dict[str, Any]]:
    """WebDataset's layout, see `index_of_shards`."""
    paths = _shard_paths(source)
    index, state = index_of_shards(source.root, paths, lambda shards: track(shards, len(paths), f"{source.split}: shards"))
    if not len(index):
        raise InputError(f"{source.path} holds no images; wanted members such as n01440764_10026.jpg beside n01440764_10026.cls")
    return index, state


def broken_shards(source: Source) -> list[tuple[str, str]]:
    """Path and fault of every shard that cannot be indexed; none where the source is something else, or cannot be listed."""
    try:
        paths = _shard_paths(source) if source.kind == "shards" else []
    except InputError:
        return []
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return [(path, fault) for path, fault in zip(paths, pool.map(fault_of, paths), strict=True) if fault is not None]
