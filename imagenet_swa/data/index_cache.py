"""Indices kept in files: built once, found again, refused when the data changed."""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

from imagenet_swa.config import InputError
from imagenet_swa.data import storage
from imagenet_swa.data.index import ImageIndex, check_classes, check_labels, load_index, save_index
from imagenet_swa.data.sources import Source, Track, scan, untracked, what_changed
from imagenet_swa.files import existing


def index_path(source: Source, folder: Path | None) -> str:
    """File of a source's index: beside the list, the class folders or the shards, or in the given folder. Of a folder that holds
    the shards of both splits each split has one.

    Raises:
        InputError: the given folder is in S3.
    """
    if folder is not None and folder.parts[:1] == ("s3:",):
        raise InputError("data.index is in S3; set it to a local folder")
    named = source.path if source.list_file is None else source.list_file
    named = named.rstrip("/") if storage.is_remote(named) else os.path.abspath(named)
    parent, name = os.path.split(named)
    name = (re.sub(r"[^\w.-]+", "_", name) or "root") + (f".{source.split}" if source.takes_part else "")
    if folder is None:
        return storage.join(parent, f"{name}.index.arrow")
    return str(folder / f"{name}-{hashlib.sha256(os.fsencode(named)).hexdigest()[:8]}.index.arrow")


def build_index(
    source: Source, folder: Path | None, *, num_classes: int, track: Track[Any] = untracked
) -> tuple[ImageIndex, Path]:
    """Scan a source and write its index's file, which is returned too.

    Raises:
        InputError: see `scan`; labels that cannot be the network's; or the file cannot be written.
    """
    path = index_path(source, folder)
    if storage.is_remote(path):
        raise InputError(f"the index of {source.path} cannot be written beside it; set data.index to a local folder")
    above = existing(Path(path).parent)
    if not above.is_dir():
        raise InputError(f"cannot write {path}: {above} is a file; set data.index to a folder")
    if not os.access(above, os.W_OK):
        raise InputError(f"cannot write {path}; set data.index to a folder that can be written")
    index, state = scan(source, num_classes=num_classes, track=track)
    check_classes(index, source.split, num_classes)
    check_labels(index, source.split, num_classes)
    save_index(index, state, Path(path))
    return index, Path(path)


def find_index(source: Source, folder: Path | None) -> ImageIndex | None:
    """The index that was built earlier, None if none was.

    Raises:
        InputError: damaged, or older than a change of the data.
    """
    path = index_path(source, folder)
    if not (_exists_remotely(path) if storage.is_remote(path) else os.path.exists(path)):
        return None
    index, state = load_index(path, source.root)
    try:
        change = what_changed(index, state, source)
    except (KeyError, TypeError, AttributeError, IndexError) as error:  # of a state that no scan gives
        change = f"it does not say how they looked ({type(error).__name__})"
    if change is not None:
        raise InputError(
            f"the index {path} is older than the data: {change}; restore the data, or build the index again: "
            "imagenet-swa index --rebuild, with the same --data settings"
        )
    return index


def _exists_remotely(path: str) -> bool:
    try:
        return storage.size_of(path) > 0
    except storage.ReadError:
        return False


def read_quarantine(path: Path, split: str) -> list[bytes]:
    """Names of one split's images in a quarantine list, a text file of lines `split, name, reason` separated by tabs.

    Names are those that `ImageIndex.listed_name` gives: `shard:member` where members' names repeat, and %09, %0A, %0D for a
    tab or an end of a line in a name (%25 for a % before such a number).

    Raises:
        InputError: unreadable, or a line of another form.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"cannot read the quarantine list {path}: {error.strerror}") from None
    names = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith(b"#"):
            continue
        fields = line.split(b"\t")
        if len(fields) < 2 or fields[0] not in (b"train", b"val"):
            raise InputError(f"{path}:{number}: wanted `train` or `val`, a name and a reason, separated by tabs")
        if fields[0] == split.encode():
            names.append(fields[1])
    return names
