"""The list of images of a split: where each lies and its label, in a fixed order; its fingerprint; its file."""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from imagenet_swa.config import InputError
from imagenet_swa.data import imagenet, storage
from imagenet_swa.files import flush_file
from imagenet_swa.plain import parse_json

FORMAT = "imagenet-swa index 1"
_COLUMNS = {"name": pa.large_binary(), "label": pa.int64(), "size": pa.int64(), "shard": pa.int32(), "offset": pa.int64()}


class Location(NamedTuple):
    """Where an image's bytes are; `size` may be `storage.WHOLE`."""

    path: str
    offset: int
    size: int


@dataclass(frozen=True, kw_only=True)
class ImageIndex:
    """N images in a fixed order. An image's number here is its identity: order, crops and predictions refer to it.

    `names` (N,) are file-system bytes: paths below `root`, or members' names in tar shards. `labels` (N,) int64; `sizes`
    (N,) int64 bytes, -1 where nobody asked. `classes` are the class folders' names in label order, None when something
    else gave the labels. With shards, `shards` are their names below `root`, `shard_numbers` (N,) int32 and `offsets` (N,)
    int64 the place of an image's bytes. `root` is empty for made-up images.
    """

    root: str
    names: pa.LargeBinaryArray
    labels: NDArray[np.int64]
    sizes: NDArray[np.int64]
    classes: tuple[str, ...] | None
    shards: tuple[str, ...] = ()
    shard_numbers: NDArray[np.int32] | None = None
    offsets: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Name of image `index` below the root or in its shard."""
        return os.fsdecode(self.names[int(index)].as_py())

    def location(self, index: int) -> Location:
        """Where image `index` lies."""
        size = int(self.sizes[index])
        if self.shard_numbers is None or self.offsets is None:
            return Location(storage.join(self.root, self.name(index)), 0, size)
        return Location(storage.join(self.root, self.shards[self.shard_numbers[index]]), int(self.offsets[index]), size)

    def path(self, index: int) -> str:
        """Image `index` for people and messages: its path, or `shard:member`."""
        path = self.location(index).path
        return path if self.shard_numbers is None else f"{path}:{self.name(index)}"

    def listed_name(self, index: int) -> str:
        """Image `index` in lists of bad images, which `without` takes: its name, or `shard:member` in an index where members'
        names repeat; tabs and ends of lines are written as in addresses, %09, %0A and %0D.
        """
        return os.fsdecode(_UNLISTABLE.sub(lambda found: b"%%%02X" % ord(found[0]), self._unique_name(int(index))))

    def _unique_name(self, index: int) -> bytes:
        name = self.names[index].as_py()
        if self.shard_numbers is None or not self._names_repeat:
            return name
        return os.fsencode(self.shards[self.shard_numbers[index]]) + b":" + name

    @cached_property
    def _names_repeat(self) -> bool:
        return pc.count_distinct(self.names).as_py() < len(self)  # pyright: ignore[reportAttributeAccessIssue]  # made at run time

    def read(self, index: int) -> bytes:
        """The encoded image. Raises `storage.ReadError`."""
        path, offset, size = self.location(index)
        return storage.read(path, offset=offset, size=size)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over names, labels, sizes and their order; where the images lie, and in how many shards, does not matter."""
        digest = hashlib.sha256(str(len(self)).encode())
        for buffer in pa.concat_arrays([self.names]).buffers()[1:]:  # of a slice, offsets and bytes would be the whole's
            digest.update(buffer)
        for numbers in (self.labels, self.sizes):
            digest.update(np.ascontiguousarray(numbers).data)
        return digest.hexdigest()

    def without(self, names: Iterable[bytes]) -> "ImageIndex":
        """The same images in the same order, less those of these names, as `listed_name` writes them."""
        unwanted = {_LISTED.sub(lambda found: bytes([int(found[1], 16)]), name) for name in names}
        if self.shard_numbers is not None and self._names_repeat:
            kept = np.flatnonzero([self._unique_name(i) not in unwanted for i in range(len(self))])
        else:
            kept = np.flatnonzero([name not in unwanted for name in self.names.to_pylist()])
        return self if len(kept) == len(self) else self.take(kept)

    def take(self, kept: NDArray[np.int64]) -> "ImageIndex":
        """The images at the given places, in that order."""
        rest = replace(
            self,
            names=self.names.take(pa.array(kept)),
            labels=self.labels[kept],
            sizes=self.sizes[kept],
            shard_numbers=None if self.shard_numbers is None else self.shard_numbers[kept],
            offsets=None if self.offsets is None else self.offsets[kept],
        )
        vars(rest)["_names_repeat"] = self._names_repeat  # an image is listed under the same name as in the whole index
        return rest


_UNLISTABLE = re.compile(rb"[\t\n\r]|%(?=09|0A|0D|25)")  # % only where it would read as one of these
_LISTED = re.compile(rb"%(09|0A|0D|25)")


def make_index(
    root: str,
    names: list[bytes],
    labels: list[int] | NDArray[np.int64],
    sizes: list[int] | NDArray[np.int64],
    classes: tuple[str, ...] | None = None,
    **shards: Any,
) -> ImageIndex:
    """An index from Python lists."""
    return ImageIndex(
        root=root,
        names=pa.array(names, pa.large_binary()),
        labels=np.asarray(labels, np.int64),
        sizes=np.asarray(sizes, np.int64),
        classes=classes,
        **shards,
    )


# ---------------------------------------------------------------------------------------------------- the index's file


def save_index(index: ImageIndex, source: dict[str, Any], path: Path) -> None:
    """An Arrow file, written aside under a name of this process's own, flushed and renamed: whoever else writes the same
    index at the same time writes the same bytes, and readers see a whole file or none.

    `source` says what the images were read from and how that looked; `load_index` gives it back.

    Raises:
        InputError: the file cannot be written.
    """
    about = {
        "format": FORMAT,
        "fingerprint": index.fingerprint,
        "classes": index.classes,
        "shards": index.shards,
        "source": source,
    }
    about["digest"] = _digest_of_rest(about, index)
    columns: dict[str, Any] = {"name": index.names, "label": index.labels, "size": index.sizes}
    if index.shard_numbers is not None:
        columns |= {"shard": index.shard_numbers, "offset": index.offsets}
    table = pa.table(columns).replace_schema_metadata({"imagenet_swa": json.dumps(about)})
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(table, partial)
        partial.replace(path)
    except OSError as error:
        raise InputError(
            f"cannot write the index {path}: {storage.reason_of(error)}; set data.index to a folder that can be written"
        ) from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _what_is_impossible(index: ImageIndex, about: dict[str, Any]) -> str | None:
    """What no `save_index` writes: a file may have its fingerprint and still be made to harm."""
    columns = [index.labels, index.sizes, *(c for c in (index.shard_numbers, index.offsets) if c is not None)]
    if index.names.null_count or any(column.dtype.kind != "i" for column in columns):
        return "values are missing"
    lowest = (0, storage.WHOLE, 0, 0)
    if len(index) and any(int(column.min()) < low for column, low in zip(columns, lowest, strict=False)):
        return "a label, size or place is negative"
    if index.shard_numbers is not None and len(index) and int(index.shard_numbers.max()) >= len(index.shards):
        return "an image is in a shard that there is not"
    texts = [*index.shards, *(index.classes or ())]
    if not isinstance(about["source"], dict) or not all(isinstance(text, str) for text in texts):
        return "it does not say what it was made of"
    places = index.names if index.shard_numbers is None else pa.array(map(os.fsencode, index.shards), pa.large_binary())
    if (number := first_outside(index.root, places)) is not None:
        return f"{places[number].as_py()[:100]!r} leads out of {index.root}"
    return None


def _write(table: pa.Table, path: Path) -> None:
    with path.open("wb") as file:
        with pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table.combine_chunks())
        flush_file(file)


def _digest_of_rest(about: dict[str, Any], index: ImageIndex) -> str:
    """SHA-256 over what an index's file holds beside what its fingerprint covers."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for numbers in (index.shard_numbers, index.offsets):
        digest.update(b"" if numbers is None else numbers.tobytes())
    return digest.hexdigest()


def load_index(path: str, root: str) -> tuple[ImageIndex, dict[str, Any]]:
    """The index in a file, for images that lie below `root`, and its `source`.

    Raises:
        InputError: no index of this version, or damaged.
    """
    again = "build it again: imagenet-swa index --rebuild, with the same --data settings"
    try:
        if storage.is_remote(path):
            table = pa.ipc.open_file(pa.py_buffer(storage.read(path))).read_all()
        else:
            table = pa.ipc.open_file(pa.memory_map(path)).read_all()
        table.validate(full=True)
        about = parse_json((table.schema.metadata or {}).get(b"imagenet_swa", b"{}"))
        digest = about.pop("digest", None)
        if about.get("format") != FORMAT:
            raise InputError(f"{path} is not an index of this version; {again}")
        if any(field.type != _COLUMNS[field.name] for field in table.schema):
            raise InputError(f"the index {path} is damaged: a column has another type; {again}")
        columns = {name: table.column(name).combine_chunks() for name in table.column_names}
        index = ImageIndex(
            root=root,
            names=columns["name"],
            labels=columns["label"].to_numpy(),
            sizes=columns["size"].to_numpy(),
            classes=None if about["classes"] is None else tuple(about["classes"]),
            shards=tuple(about["shards"]),
            shard_numbers=columns["shard"].to_numpy() if "shard" in columns else None,
            offsets=columns["offset"].to_numpy() if "offset" in columns else None,
        )
        if index.fingerprint != about["fingerprint"] or digest != _digest_of_rest(about, index):
            raise InputError(f"the index {path} is damaged: its content does not have its fingerprint; {again}")
        if (problem := _what_is_impossible(index, about)) is not None:
            raise InputError(f"the index {path} is damaged: {problem}; {again}")
    except PermissionError:
        raise InputError(f"cannot read the index {path}: permission denied; give yourself the right to read it") from None
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot read the index {path}: {' '.join(str(error).split())[:160]}; {again}") from None
    return index, about["source"]


# ------------------------------------------------------------------------------------------------- labels and classes


def check_classes(index: ImageIndex, split: str, num_classes: int) -> None:
    """Refuse a folder whose class numbers cannot be the network's.

    Reading class folders numbers the classes that are present; with some of ImageNet's classes, or with folders named
    0..999 (which sort as text), nearly every label would be wrong without a sign.

    Raises:
        InputError: with the reason and the way out.
    """
    if index.classes is None:
        return
    way_out = f"give data.{split}_list, a file of `path label` lines with the network's own labels"
    known = set(imagenet.synsets())
    if len(index.classes) != num_classes:
        subset = f", a subset of ImageNet's {len(known)}" if set(index.classes) < known else ""
        raise InputError(
            f"{index.root} has {len(index.classes)} class folders{subset}, but the network has {num_classes} outputs: numbering "
            f"the folders 0..{len(index.classes) - 1} would give wrong labels; {way_out}, or set model.num_classes"
        )
    if all(name.isdecimal() for name in index.classes) and [int(name) for name in index.classes] != list(range(num_classes)):
        raise InputError(
            f"{index.root}: folders named by numbers are labelled in text order ({', '.join(index.classes[:3])}, ...), "
            f"not the labels that their names say; {way_out}"
        )
    looks_like_imagenet = num_classes == imagenet.NUM_CLASSES and not known.isdisjoint(index.classes)
    if looks_like_imagenet and index.classes != imagenet.synsets():
        strange = sorted(set(index.classes) - known)
        raise InputError(f"{index.root}: class folder {strange[0]!r} is not one of ImageNet-1k's synsets; {way_out}")


def check_labels(index: ImageIndex, split: str, num_classes: int) -> None:
    """Raise InputError where a label is no output of the network."""
    if len(index) and int(index.labels.max()) >= num_classes:
        worst = int(index.labels.argmax())
        raise InputError(
            f"data.{split}: {index.path(worst)} has label {index.labels[worst]}, not in 0..{num_classes - 1} (model.num_classes)"
        )


def first_outside(root: str, names: pa.LargeBinaryArray) -> int | None:
    """The number of the first name that leads out of a local folder, by `..` or from `/`, or holds a zero byte; None: no such.

    By the name alone: links inside the folder are its owner's and may lead anywhere.
    """
    if storage.is_remote(root):
        return None
    suspicious = pc.match_substring_regex(names, r"^/|(^|/)\.\.(/|$)|\x00")  # pyright: ignore[reportAttributeAccessIssue]
    folder = os.fsencode(os.path.join(os.path.normpath(Path(root).absolute()), ""))
    for number in np.flatnonzero(suspicious.to_numpy(zero_copy_only=False)).tolist():
        name = names[number].as_py()
        if b"\0" in name or not os.path.normpath(os.path.join(folder, name)).startswith(folder):
            return number
    return None


def check_same_classes(train: ImageIndex, val: ImageIndex) -> None:
    """Raise InputError where the two splits' class folders differ, or where both are the same images."""
    if train.classes is not None and val.classes is not None and train.classes != val.classes:
        different = sorted(set(train.classes) ^ set(val.classes))
        raise InputError(
            f"{train.root} and {val.root} have different class folders, such as {different[0]!r}; "
            f"both need the same, since their sorted names give the labels"
        )
    sizes_known = bool((train.sizes != storage.WHOLE).all())  # else equal names in two places may be different images
    if train.root and len(train) and train.fingerprint == val.fingerprint and (sizes_known or train.root == val.root):
        raise InputError(
            f"data.train and data.val are the same images, {len(train):,} of equal names, labels and sizes in {train.root} "
            f"and {val.root}; set data.val to the validation images"
        )
