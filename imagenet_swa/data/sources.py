"""Reads what a user names (class folders, a list file, tar shards; local or in S3) into an index, and notices later changes."""

import hashlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from imagenet_swa.config import DataConfig, InputError
from imagenet_swa.data import storage
from imagenet_swa.data.index import ImageIndex, make_index
from imagenet_swa.data.shards import EXTENSIONS, NUM_THREADS, changed_shard, fault_of, scan_shard, shard_pool

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
        if self.list_file is not None:
            return "list"
        prepare = f"run `imagenet-swa prepare {self.path} FOLDER` first and set data.{self.split} to a folder of its result"
        if self.path.endswith((".parquet", ".tar.gz", ".tgz", ".zip")) or Path(self.path).name.startswith("ILSVRC2012_img"):
            raise InputError(f"{self.path} has no random access to its images; {prepare}")
        if self.path.endswith(".tar"):
            return "shards"
        if storage.is_remote(self.path):
            try:
                if _tars_in(self.path):
                    return "shards"
            except storage.ReadError as error:
                raise InputError(f"cannot list the shards {self.path}: {error}") from None
            raise InputError(f"{self.path} holds no .tar shards; wanted some, or data.{self.split}_list with objects below it")
        if not os.path.isdir(self.path):
            raise InputError(
                f"no such folder: {self.path}; wanted one with a sub-folder of images per class, or tar shards such as "
                f"'{self.path}/train-*.tar'"
            )
        with os.scandir(self.path) as entries:
            found = list(entries)
        if any(entry.is_dir() for entry in found):
            return "folder"
        if any(entry.name.endswith(".tar") for entry in found):
            return "shards"
        if any(entry.name.endswith(".parquet") for entry in found):
            raise InputError(f"{self.path} holds parquet files, which have no random access to their images; {prepare}")
        return "folder"

    @property
    def root(self) -> str:
        """What the index's names start from: the folder, or the one that the shards lie in."""
        if self.list_file is None and self.path.endswith(".tar"):
            return self.path.rpartition("/")[0] or "."
        return self.path


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
    if source.kind == "list":
        return _scan_list(source, num_classes, track)
    return _scan_shards(source, track) if source.kind == "shards" else _scan_folder(source, track)


def what_changed(index: ImageIndex, state: dict[str, Any], source: Source) -> str | None:
    """Where the source differs from what it was when it was indexed, None if nowhere that a quick look reaches.

    Class folders: names of files, in the folders whose own time changed. List: its bytes. Shards: number, sizes, and the
    header of one member each. Sizes of single files are compared when they are read.
    """
    if state["kind"] != source.kind:
        return f"it was made of {state['kind']}, now it is {source.kind}"
    if source.kind == "list":
        assert source.list_file is not None
        return None if _digest_of(_list_bytes(source.list_file)) == state["digest"] else f"{source.list_file} has another content"
    if source.kind == "shards":
        return _changed_shards(index, state, source)
    return _changed_folders(index, state)


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
        tasks = pool.map(partial(_files_below, os.fsencode(root)), map(os.fsencode, classes))
        found = list(track(tasks, len(classes), f"{source.split}: class folders"))
    empty = [name for name, (names, _, _) in zip(classes, found, strict=True) if not names]
    if empty:
        raise InputError(f"{root}: no images for {len(empty)} of {len(classes)} classes, the first is {empty[0]!r}")
    index = make_index(
        root,
        [name for names, _, _ in found for name in names],
        np.repeat(np.arange(len(classes)), [len(names) for names, _, _ in found]),
        np.concatenate([sizes for _, sizes, _ in found]),
        classes,
    )
    times = {folder: time for _, _, folders in found for folder, time in folders.items()}
    return index, {"kind": "folder", "folder_times": times}


def _files_below(root: bytes, top: bytes, *, with_sizes: bool = True) -> tuple[list[bytes], np.ndarray, dict[str, int]]:
    """Names below the root and sizes of the images of one class, and the modification time of every folder among them."""
    waiting, folders = [top], {}
    while waiting:
        folder = waiting.pop()
        path = os.path.join(root, folder)
        time, files = os.stat(path).st_mtime_ns, []
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_dir():
                    waiting.append(os.path.join(folder, entry.name))
                elif entry.name.lower().endswith(_EXTENSION_BYTES):
                    files.append((entry.name, _size(entry) if with_sizes else storage.WHOLE))
        folders[folder] = time, sorted(files)
    ordered = sorted(folders.items(), key=lambda item: os.fsdecode(item[0]))
    names = [os.path.join(folder, name) for folder, (_, files) in ordered for name, _ in files]
    sizes = np.array([size for _, (_, files) in ordered for _, size in files], np.int64)
    return names, sizes, {os.fsdecode(folder): time for folder, (time, _) in ordered}


_EXTENSION_BYTES = tuple(extension.encode() for extension in EXTENSIONS)


def _size(entry: os.DirEntry[bytes]) -> int:
    """-1 for a link to nothing, which the loader names when it is read."""
    try:
        return entry.stat().st_size
    except OSError:
        return storage.WHOLE


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
            names, _, _ = _files_below(os.fsencode(root), os.fsencode(name), with_sizes=False)
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
    names, labels = _parse_list(source.list_file, content, num_classes)
    sizes = np.full(len(names), storage.WHOLE, np.int64)
    if not storage.is_remote(source.path):
        starts = range(0, len(names), 4096)
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            tasks = pool.map(lambda start: _sizes_of(source.path, names[start : start + 4096]), starts)
            parts = list(track(tasks, len(starts), f"{source.split}: thousands of files"))
        sizes = np.concatenate(parts)
        if (missing := np.flatnonzero(sizes == storage.WHOLE)).size and not source.missing_ok:
            path = os.path.join(source.path, os.fsdecode(names[missing[0]]))
            more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
            raise InputError(f"{source.list_file} names {path}{more}, not there; its paths start from {source.path}")
    return make_index(source.path, names, labels, sizes), {"kind": "list", "digest": _digest_of(content)}


def _list_bytes(list_file: str) -> bytes:
    try:
        return storage.read(list_file)
    except storage.ReadError as error:
        raise InputError(f"cannot read the list {list_file}: {error}") from None


def _parse_list(list_file: str, content: bytes, num_classes: int) -> tuple[list[bytes], list[int]]:
    names, labels = [], []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        path, _, label = line.strip().rpartition(b" ")
        if not path or not label.isdigit():
            raise InputError(f"{list_file}:{number}: wanted `path label`, got {_start_of(line)}")
        if len(label) > 9 or int(label) >= num_classes:
            raise InputError(f"{list_file}:{number}: label {_start_of(label)} is not in 0..{num_classes - 1} (model.num_classes)")
        names.append(path.strip())
        labels.append(int(label))
    if not names:
        raise InputError(f"{list_file} lists no images; wanted a line `path label` for each")
    return names, labels


def _start_of(text: bytes) -> str:
    """Text from a file that may be no list at all, short enough for a message."""
    return repr(os.fsdecode(text[:60])) + ("..." if len(text) > 60 else "")


def _sizes_of(root: str, names: Sequence[bytes]) -> np.ndarray:
    folder = os.fsencode(root)
    sizes = np.full(len(names), storage.WHOLE, np.int64)
    for number, name in enumerate(names):
        try:
            sizes[number] = os.stat(os.path.join(folder, name)).st_size
        except (OSError, ValueError):  # ValueError: a zero byte in the name
            continue
    return sizes


def _digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


# -------------------------------------------------------------------------------------------------------------- shards


def _tars_in(folder: str) -> list[str]:
    return [path for path in storage.list_files(folder) if path.endswith(".tar")]


def _scan_shards(source: Source, track: Track[Any]) -> tuple[ImageIndex, dict[str, Any]]:
    """WebDataset's layout: members `key.jpg`, and `key.cls` with the label as text or `key.json` with {"label": ...}."""
    try:
        paths = storage.expand(source.path) if source.path.endswith(".tar") else _tars_in(source.path)
    except storage.ReadError as error:
        raise InputError(f"cannot list the shards {source.path}: {error}") from None
    if not paths:
        raise InputError(
            f"no shards match {source.path}; wanted tar files (quote the pattern, so that the shell leaves it alone)"
        )
    with shard_pool(paths) as pool:
        found = list(track(pool.map(scan_shard, paths), len(paths), f"{source.split}: shards"))
    numbers = np.repeat(np.arange(len(paths), dtype=np.int32), [len(shard.names) for shard in found])
    index = make_index(
        source.root,
        [name for shard in found for name in shard.names],
        [label for shard in found for label in shard.labels],
        [size for shard in found for size in shard.sizes],
        shards=_names_of_shards(source, paths),
        shard_numbers=numbers,
        offsets=np.array([offset for shard in found for offset in shard.offsets], np.int64),
    )
    if not len(index):
        raise InputError(f"{source.path} holds no images; wanted members such as n01440764_10026.jpg beside n01440764_10026.cls")
    return index, {"kind": "shards", "shard_bytes": [shard.num_bytes for shard in found]}


def _shard_paths(source: Source) -> list[str]:
    try:
        paths = storage.expand(source.path) if source.path.endswith(".tar") else _tars_in(source.path)
    except storage.ReadError as error:
        raise InputError(f"cannot list the shards {source.path}: {error}") from None
    if not paths:
        raise InputError(
            f"no shards match {source.path}; wanted tar files (quote the pattern, so that the shell leaves it alone)"
        )
    return paths


def _names_of_shards(source: Source, paths: list[str]) -> tuple[str, ...]:
    return tuple(path.removeprefix(source.root).lstrip("/") if source.root != "." else path for path in paths)


def broken_shards(source: Source) -> list[tuple[str, str]]:
    """Path and fault of every shard that cannot be indexed; none where the source is something else, or cannot be listed."""
    try:
        paths = _shard_paths(source) if source.kind == "shards" else []
    except InputError:
        return []
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return [(path, fault) for path, fault in zip(paths, pool.map(fault_of, paths), strict=True) if fault is not None]


def _changed_shards(index: ImageIndex, state: dict[str, Any], source: Source) -> str | None:
    assert index.shard_numbers is not None and index.offsets is not None
    now = _names_of_shards(source, _shard_paths(source))
    if now != index.shards:
        return f"shards came or went, such as {min(set(now) ^ set(index.shards), default='the order of all')}"
    last = np.searchsorted(index.shard_numbers, np.arange(len(index.shards)), side="right") - 1  # numbers ascend
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        images = [int(image) if index.shard_numbers[image] == shard else None for shard, image in enumerate(last)]
        complaints = pool.map(partial(changed_shard, index), range(len(images)), state["shard_bytes"], images)
        return next((complaint for complaint in complaints if complaint is not None), None)
