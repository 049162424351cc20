"""Single tar shards as WebDataset lays them out: their images, labels and offsets, and whether they are whole."""

import json
import multiprocessing
import os
import tarfile
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any

from imagenet_swa.config import InputError
from imagenet_swa.data import storage
from imagenet_swa.data.index import ImageIndex

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
NUM_THREADS = 16  # more than cores: on network file systems each answer takes long
_BLOCK = 512  # a tar archive is made of these


@dataclass(frozen=True)
class Shard:
    """The images of one tar file: names, labels, where their bytes start and how many they are; the file's bytes."""

    names: list[bytes]
    labels: list[int]
    offsets: list[int]
    sizes: list[int]
    num_bytes: int


def scan_shard(path: str) -> Shard:
    """Read a shard's headers and labels.

    Raises:
        InputError: unreadable, compressed, cut short, or an image without a label.
    """
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    unclear: dict[str, str] = {}  # key and name of what would be an image if its key ended at another dot
    try:
        num_bytes = storage.size_of(path)
        with storage.open_to_read(path) as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, base = member.name.rpartition("/")
                key, _, extension = base.partition(".")
                key = f"{folder}/{key}" if folder else key
                if f".{extension.lower()}" in EXTENSIONS:
                    if key in images:
                        raise InputError(f"{path}: two images have the key {key}: {images[key].name} and {member.name}")
                    images[key] = member
                elif extension in ("cls", "json"):
                    label = _label_of(tar.extractfile(member), extension)
                    if extension == "cls" or key not in labels:
                        labels.update({} if label is None else {key: label})
                elif extension == "tar":
                    raise InputError(
                        f"{path} holds tar files, as the official archive does; run `imagenet-swa prepare` on it first"
                    )
                elif extension.lower().endswith(EXTENSIONS):
                    unclear[key] = member.name
            _check_end(path, file, tar.offset)
    except tarfile.TarError as error:
        kind = "compressed, or no tar file" if "invalid header" in str(error) or "not a" in str(error) else str(error)
        raise InputError(f"cannot read the shard {path}: {kind}; copy or write it again") from None
    except OSError as error:
        reason = error if isinstance(error, storage.ReadError) else storage.reason_of(error)
        raise InputError(f"cannot read the shard {path}: {reason}") from None
    if lost := sorted(unclear.keys() - images.keys()):
        raise InputError(
            f"{path}: {unclear[lost[0]]} has a dot in its key, which ends at the first dot; write the shards with other keys"
        )
    unlabelled = sorted(images.keys() - labels.keys())
    if unlabelled:
        raise InputError(
            f"{path}: {images[unlabelled[0]].name} has no label, nor have {len(unlabelled) - 1} others; wanted a member "
            f"{unlabelled[0]}.cls with a number or .json with a label (an official archive goes through `imagenet-swa prepare`)"
        )
    members = images.values()
    return Shard(
        [os.fsencode(member.name) for member in members],
        [labels[key] for key in images],
        [member.offset_data for member in members],
        [member.size for member in members],
        num_bytes,
    )


def _check_end(path: str, file: IO[bytes], end: int) -> None:
    """Where tarfile stops reading, at blocks of zeros or at anything that is no header, an archive has to end."""
    file.seek(end)
    rest = file.read(2**20)
    if len(rest) < _BLOCK or any(rest[:_BLOCK]):
        raise InputError(f"the shard {path} is cut short or damaged: its last whole member ends at byte {end}; copy it again")
    if any(rest):
        raise InputError(f"the shard {path} goes on after its end, as joined tar files do; write it again as one")


def _label_of(file: Any, extension: str) -> int | None:
    """The label that a `.cls` or `.json` member holds, None if it holds none."""
    text = file.read()
    try:
        value = int(text) if extension == "cls" else json.loads(text).get("label")
    except (ValueError, AttributeError):
        return None
    return value if type(value) is int and value >= 0 else None  # not true or false


def changed_shard(index: ImageIndex, shard: int, num_bytes: int, image: int | None) -> str | None:
    """Size of a shard, and whether the header before one image's bytes still names it."""
    path = storage.join(index.root, index.shards[shard])
    try:
        now = storage.size_of(path)
        if now != num_bytes:
            return f"{path} had {num_bytes} bytes, now has {now}"
        if image is not None:
            header = storage.read_range(path, index.location(image).offset - _BLOCK, _BLOCK)
            name = header[:100].rstrip(b"\0")  # of a long name only its end or its start
            whole = os.fsencode(index.name(image))
            if not (whole.endswith(name) or whole.startswith(name)):
                return f"{path} has other members"
    except storage.ReadError as error:
        return f"{path}: {error}"
    return None


def fault_of(path: str) -> str | None:
    """Why a shard cannot be indexed, None if it can."""
    try:
        scan_shard(path)
    except InputError as error:
        return str(error)
    return None


def shard_pool(paths: list[str]) -> Executor:
    """Processes where reading headers is Python's work, threads where it is waiting for S3 or hardly worth a process."""
    if storage.is_remote(paths[0]) or len(paths) < 8:
        return ThreadPoolExecutor(NUM_THREADS)
    return ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("forkserver"))
