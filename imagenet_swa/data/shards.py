"""Tar shards as WebDataset lays them out: which there are, their images, labels and offsets, and whether they are whole."""

import multiprocessing
import os
import re
import tarfile
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from imagenet_swa.config import InputError
from imagenet_swa.data import storage
from imagenet_swa.data.index import ImageIndex, make_index
from imagenet_swa.data.tars import Bounded, members_of, open_tar
from imagenet_swa.data.workers import begin_worker
from imagenet_swa.plain import parse_json

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_MAX_LABEL = 2**20  # bytes of a member with a label
NUM_THREADS = 16  # more than cores: on network file systems each answer takes long
_SPLIT_OF_WORD = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}


@dataclass(frozen=True)
class Shard:
    """The images of one tar file: names, labels, where their bytes start and how many they are; the file's bytes and time."""

    names: list[bytes]
    labels: list[int]
    offsets: list[int]
    sizes: list[int]
    num_bytes: int
    time: int


# ----------------------------------------------------------------------------------------------------- which there are


def shards_in(folder: str, split: str) -> tuple[list[str], bool]:
    """The split's shards in a folder or below a prefix of S3, and whether others lie there too.

    In a folder whose names say `train` and `val` (or `validation`), those of the split count.

    Raises:
        InputError: the folder cannot be listed, or its names say that all of it is the other split.
    """
    try:
        paths = [path for path in storage.list_files(folder, missing_ok=False) if path.endswith(".tar")]
    except storage.ReadError as error:
        raise InputError(f"cannot list the shards {folder}: {error}") from None
    splits = [_split_named_in(path) for path in paths]
    if {"train", "val"} <= set(splits):
        return [path for path, named in zip(paths, splits, strict=True) if named == split], True
    if (other := {"train": "val", "val": "train"}.get(split)) in splits:
        raise InputError(
            f"{folder} holds shards of {other}, such as {paths[splits.index(other)]}, and none of {split}; "
            f"set data.{split} to the shards of {split}, or to a pattern such as '{folder.rstrip('/')}/*.tar' to take these"
        )
    return paths, False


def _split_named_in(path: str) -> str | None:
    words = re.split(r"[^a-z]+", path.rpartition("/")[2].lower())
    named = {_SPLIT_OF_WORD[word] for word in words if word in _SPLIT_OF_WORD}
    return named.pop() if len(named) == 1 else None


def shards_of_pattern(pattern: str) -> list[str]:
    """Raises InputError: none, or they cannot be listed."""
    if storage.is_remote(pattern) and re.match(r"s3://[^/]*[*?\[{]", pattern):
        raise InputError(f"{pattern}: a pattern cannot stand for the bucket; wanted s3://bucket/prefix/train-*.tar")
    try:
        paths = storage.expand(pattern)
    except storage.ReadError as error:
        raise InputError(f"cannot list the shards {pattern}: {error}") from None
    if not paths:
        raise InputError(f"no shards match {pattern}; wanted tar files (quote the pattern, so that the shell leaves it alone)")
    return paths


def root_of_pattern(pattern: str) -> str:
    """The folder that all shards lie in or below: what comes before the first sign of a pattern, up to its last slash."""
    folder, slash, _ = re.split(r"[*?\[{]", pattern, maxsplit=1)[0].rpartition("/")
    return folder or slash or "."


def names_of_shards(root: str, paths: list[str]) -> tuple[str, ...]:
    """Shards' names below the root."""
    return tuple(path if root == "." else path.removeprefix(root).lstrip("/") for path in paths)


# ------------------------------------------------------------------------------------------------------------- reading


def index_of_shards(
    root: str, paths: list[str], track: Callable[[Iterable[Any]], Iterable[Any]]
) -> tuple[ImageIndex, dict[str, Any]]:
    """Members `key.jpg`, and `key.cls` with the label as text or `key.json` with {"label": ...}; and how the shards looked."""
    with shard_pool(paths) as pool:
        found = list(track(pool.map(scan_shard, paths)))
    index = make_index(
        root,
        [name for shard in found for name in shard.names],
        [label for shard in found for label in shard.labels],
        [size for shard in found for size in shard.sizes],
        shards=names_of_shards(root, paths),
        shard_numbers=np.repeat(np.arange(len(paths), dtype=np.int32), [len(shard.names) for shard in found]),
        offsets=np.array([offset for shard in found for offset in shard.offsets], np.int64),
    )
    return index, {
        "kind": "shards",
        "shard_bytes": [shard.num_bytes for shard in found],
        "shard_times": [shard.time for shard in found],
    }


def scan_shard(path: str) -> Shard:
    """Read a shard's headers and labels.

    Raises:
        InputError: unreadable, compressed, cut short, an image without a label, or a label without an image.
    """
    found = _Members(path)
    try:
        num_bytes, time = storage.size_and_time_of(path)
        with storage.open_to_read(path) as file, open_tar(Bounded(file)) as tar:
            for member in members_of(tar):
                found.add(member, tar)
            _check_end(path, file, tar.offset)
    except tarfile.TarError as error:
        kind = "compressed, or no tar file" if "invalid header" in str(error) or "not a" in str(error) else str(error)
        raise InputError(f"cannot read the shard {path}: {kind}; copy or write it again") from None
    except OSError as error:
        reason = error if isinstance(error, storage.ReadError) else storage.reason_of(error)
        raise InputError(f"cannot read the shard {path}: {reason}") from None
    found.check()
    members = found.images.values()
    return Shard(
        [os.fsencode(member.name) for member in members],
        [found.labels[key] for key in found.images],
        [member.offset_data for member in members],
        [member.size for member in members],
        num_bytes,
        time,
    )


class _Members:
    """A shard's members sorted by what they are: images and labels by key, and the names of all others by theirs, once more
    of those that would be images if their keys ended at another dot.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self.images: dict[str, tarfile.TarInfo] = {}
        self.labels: dict[str, int] = {}
        self._others: dict[str, str] = {}
        self._unclear: dict[str, str] = {}

    def add(self, member: tarfile.TarInfo, tar: tarfile.TarFile) -> None:
        """Sort in the next member. Raises InputError for what is an image or a label and cannot be used."""
        folder, _, base = member.name.rpartition("/")
        key, _, extension = base.partition(".")
        key = f"{folder}/{key}" if folder else key
        is_image, is_label = f".{extension.lower()}" in EXTENSIONS, extension in ("cls", "json")
        if base.startswith("._"):  # what macOS adds for its own sake
            return
        if (is_image or is_label) and (member.islnk() or member.issym() or member.issparse()):
            raise InputError(
                f"{self._path}: {member.name} is a link or sparse, without bytes of its own; write the shard with whole "
                "copies (tar --hard-dereference --dereference)"
            )
        if not member.isfile():
            return
        if extension == "tar":
            raise InputError(
                f"{self._path} holds tar files, as the official archive does; run `imagenet-swa prepare` on it first"
            )
        if is_image and key in self.images:
            raise InputError(f"{self._path}: two images have the key {key}: {self.images[key].name} and {member.name}")
        if is_image:
            self.images[key] = member
        elif is_label:
            label = _label_of(tar.extractfile(member), extension)
            if label is not None and (extension == "cls" or key not in self.labels):
                self.labels[key] = label
        else:
            self._others[key] = member.name
            if extension.lower().endswith(EXTENSIONS):
                self._unclear[key] = member.name

    def check(self) -> None:
        """Raise InputError unless every image has a label, every label an image, and no key ends before its last dot."""
        if lost := sorted(self._unclear.keys() - self.images.keys()):
            raise InputError(
                f"{self._path}: {self._unclear[lost[0]]} has a dot in its key, which ends at the first dot; write the "
                "shards with other keys"
            )
        if unlabelled := sorted(self.images.keys() - self.labels.keys()):
            more = f", nor have {len(unlabelled) - 1} others" if len(unlabelled) > 1 else ""
            raise InputError(
                f"{self._path}: {self.images[unlabelled[0]].name} has no label from 0 to {2**31 - 1}{more}; wanted a member "
                f"{unlabelled[0]}.cls with a number or .json with a label (an official archive goes through "
                "`imagenet-swa prepare`)"
            )
        if unseen := sorted(self.labels.keys() - self.images.keys()):
            raise InputError(
                f"{self._path}: {self._others.get(unseen[0], unseen[0])} has a label but is no image that can be read; wanted "
                f"members that end in {' '.join(EXTENSIONS)}; write the shard without it or convert it"
            )


def _check_end(path: str, file: IO[bytes], end: int) -> None:
    """Where tarfile stops reading, at blocks of zeros or at anything that is no header, an archive has to end."""
    file.seek(end)
    rest = file.read(2**20)
    if len(rest) < tarfile.BLOCKSIZE or any(rest[: tarfile.BLOCKSIZE]):
        raise InputError(f"the shard {path} is cut short or damaged: its last whole member ends at byte {end}; copy it again")
    if any(rest):
        raise InputError(f"the shard {path} goes on after its end, as joined tar files do; write it again as one")


def _label_of(file: Any, extension: str) -> int | None:
    """The label that a `.cls` or `.json` member holds, None if it holds none."""
    text = file.read(_MAX_LABEL)
    try:
        value = int(text) if extension == "cls" else parse_json(text).get("label")
    except (ValueError, AttributeError):
        return None
    return value if type(value) is int and 0 <= value < 2**31 else None  # not true or false


def shard_pool(paths: list[str]) -> Executor:
    """Processes where reading headers is Python's work, threads where it is waiting for S3 or hardly worth a process."""
    if storage.is_remote(paths[0]) or len(paths) < 8:
        return ThreadPoolExecutor(NUM_THREADS)
    context = multiprocessing.get_context("forkserver")
    return ProcessPoolExecutor(os.cpu_count(), context, initializer=begin_worker, initargs=(dict(os.environ),))


# ------------------------------------------------------------------------------------------------------- later changes


def changed_shards(index: ImageIndex, state: dict[str, Any], paths: list[str]) -> str | None:
    """Where shards differ from what was indexed: number, sizes, and of those with a new time names, labels, places."""
    now = names_of_shards(index.root, paths)
    if now != index.shards:
        return f"shards came or went, such as {min(set(now) ^ set(index.shards), default='the order of all')}"
    times = state.get("shard_times", [None] * len(paths))
    touched = []
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        try:
            looks = list(pool.map(storage.size_and_time_of, paths))
        except storage.ReadError as error:
            return f"a shard of {index.root}: {error}"
    for shard, (num_bytes, time) in enumerate(looks):
        if num_bytes != state["shard_bytes"][shard]:
            return f"{paths[shard]} had {state['shard_bytes'][shard]} bytes, now has {num_bytes}"
        if time != times[shard]:
            touched.append(shard)
    if not touched:
        return None
    with shard_pool([paths[shard] for shard in touched]) as pool:
        found = pool.map(scan_shard, [paths[shard] for shard in touched])
        return next(
            (f"{paths[s]} has other members or labels" for s, new in zip(touched, found, strict=True) if _differs(index, s, new)),
            None,
        )


def _differs(index: ImageIndex, shard: int, new: Shard) -> bool:
    assert index.shard_numbers is not None and index.offsets is not None
    first, last = np.searchsorted(index.shard_numbers, [shard, shard + 1])  # numbers ascend
    pairs = ((index.labels, new.labels), (index.sizes, new.sizes), (index.offsets, new.offsets))
    same = all(np.array_equal(then[first:last], now) for then, now in pairs)
    return not same or index.names[first:last].to_pylist() != new.names


def fault_of(path: str) -> str | None:
    """Why a shard cannot be indexed, None if it can."""
    try:
        scan_shard(path)
    except InputError as error:
        return str(error)
    return None
