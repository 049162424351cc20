"""What `prepare` reads: the sources of `sources.py`, the official archives, other tar files, the Hub's parquet files."""

import os
import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from imagenet_swa.config import InputError, require
from imagenet_swa.data import imagenet, storage
from imagenet_swa.data.index import ImageIndex, Location, check_classes, check_labels, make_index
from imagenet_swa.data.prepare.labels import read_labels
from imagenet_swa.data.prepare.parquet import ParquetImages, parquet_files
from imagenet_swa.data.sources import EXTENSIONS, Source, Track, scan, untracked
from imagenet_swa.data.tars import Bounded, members_of, open_tar

_CONTROL = re.compile(r"[\x00\x1b]")  # what no file can be called, and what terminals obey
_BYTES_PER_IMAGE = 115_439  # of ILSVRC2012_img_train.tar, headers included


class Item(NamedTuple):
    """One image of a source: its name below the source's root, its label, and its bytes or where they lie."""

    name: str
    label: int
    content: Location | bytes


@dataclass(frozen=True, kw_only=True)
class Origin:
    """The images of a source in a fixed order. `items(n)` are those from the n-th on."""

    words: str
    """What it is, for people."""
    identity: dict[str, Any]
    """What tells it from another source; another path to the same images has the same."""
    num_images: int
    """An estimate where counting would mean to read all of it."""
    items: Callable[[int], Iterator[Item]]
    folders: tuple[str, ...] | None = None
    """Names of the classes' folders in label order where the source tells them, for images that lie in none."""


def open_origin(
    path: str,
    *,
    split: str,
    list_file: str | None = None,
    labels: Path | None = None,
    num_classes: int = imagenet.NUM_CLASSES,
    track: Track[Any] = untracked,
) -> Origin:
    """Find out what a source is.

    Raises:
        InputError: not there, of an unknown kind, cut short, or with labels that do not fit.
    """
    if list_file is None:
        path = _official_archive_in(path, split)
        _check_split(path, split)
    tables = [] if list_file is not None else parquet_files(path, split)
    archive = list_file is None and path.endswith(".tar") and not any(sign in path for sign in "*?[{") and _holds_no_labels(path)
    require(
        labels is None or archive, f"labels {labels} are for a tar archive without labels, but {path} is none; leave labels out"
    )
    if tables:
        images = ParquetImages(tables, num_classes)
        words = f"{len(tables)} parquet files"
        return Origin(
            words=words,
            identity=images.identity,
            num_images=len(images),
            items=lambda start: (Item(*row) for row in images.rows(start)),
        )
    if archive:
        return _from_archive(path, split, labels, num_classes)
    if list_file is None and (archives := _class_archives_in(path)):
        return _from_class_archives(path, archives, split, num_classes, track)
    if path.endswith((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")):
        raise InputError(f"{path} is compressed; unpack it first, and give the .tar file or the folder")
    try:
        index, state = scan(Source(split, path, list_file), num_classes=num_classes, track=track)
        words = {"list": "a list of files", "shards": f"{len(index.shards)} shards", "folder": "class folders"}[state["kind"]]
        return _from_index(index, words, split, num_classes)
    except InputError as error:  # in the words of this command's settings
        text = str(error).replace(f"data.{split}_list", "list_file").replace("model.num_classes", "num_classes")
        raise InputError(text.replace(f"data.{split}", "source")) from None


def _from_index(index: ImageIndex, words: str, split: str, num_classes: int, folders: tuple[str, ...] | None = None) -> Origin:
    check_classes(index, split, num_classes)
    check_labels(index, split, num_classes)
    names = [os.fsdecode(name) for name in index.names.to_pylist()]
    if index.shard_numbers is not None and len(index.shards) > 1 and len({key_of(name) for name in names}) < len(names):
        stems = [os.path.splitext(shard)[0] for shard in index.shards]  # keys are a shard's own, and may come again in the next
        names = [f"{stems[shard]}/{name}" for shard, name in zip(index.shard_numbers, names, strict=True)]
    _check_names(index.root, names)

    def items(start: int) -> Iterator[Item]:
        for number in range(start, len(index)):
            yield Item(names[number], int(index.labels[number]), index.location(number))

    identity = {"images": len(index), "fingerprint": index.fingerprint}
    return Origin(words=words, identity=identity, num_images=len(index), items=items, folders=index.classes or folders)


def _check_names(root: str, names: list[str]) -> None:
    """Refuse at once what would fail after hours."""
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(key_of(name), name)
        if other is not name:
            what = "lists an image twice:" if other == name else "holds two images that would get one name:"
            raise InputError(f"{root} {what} {other} and {name}; remove or rename one")


def key_of(name: str) -> str:
    """What an image's name has to differ in from all others': all but extension, dots counting as underscores.

    WebDataset ends a key at the first dot of a file's name.

    Raises:
        InputError: a name that is no file of a known kind below a folder.
    """
    folder, slash, base = name.rpartition("/")
    stem, extension = os.path.splitext(base)
    is_below = not name.startswith("/") and ".." not in folder.split("/") and not _CONTROL.search(name)
    if not is_below or extension.lower() not in EXTENSIONS:
        kinds = ", ".join(EXTENSIONS)
        raise InputError(f"image {name[:200]!r}: wanted a path below the source's folder that ends with one of {kinds}")
    return folder + slash + stem.replace(".", "_")


# ------------------------------------------------------------------------------------------------------------- archives


def _official_archive_in(path: str, split: str) -> str:
    """The split's official archive in a folder of them."""
    archive = os.path.join(path, f"ILSVRC2012_img_{split}.tar")
    return archive if not storage.is_remote(path) and os.path.isfile(archive) else path


def _check_split(path: str, split: str) -> None:
    """Refuse an official file of the other split."""
    other, starts = ("val", "ILSVRC2012_img_val|validation-") if split == "train" else ("train", "ILSVRC2012_img_train|train-")
    inside = [] if storage.is_remote(path) or not Path(path).is_dir() else os.listdir(path)
    for name in [os.path.basename(path), *(inside if all(name.startswith("ILSVRC2012_") for name in inside) else [])]:
        if re.match(starts, name) and name.endswith((".tar", ".parquet")):
            raise InputError(f"{name} in {path} is the {other} split, but split is {split}; add --split {other}")


def _class_archives_in(path: str) -> list[str]:
    """Names of a folder's tar files where these are named by synsets, as the official train archive unpacked once has them."""
    if storage.is_remote(path) or not Path(path).is_dir():
        return []
    with os.scandir(path) as entries:
        found = list(entries)
    names = sorted(entry.name for entry in found if entry.name.endswith(".tar"))
    known = set(imagenet.synsets())
    if not names or any(entry.is_dir() for entry in found) or any(name.removesuffix(".tar") not in known for name in names):
        return []
    return names if _holds_no_labels(os.path.join(path, names[0])) else []


def _from_class_archives(path: str, archives: list[str], split: str, num_classes: int, track: Track[Any]) -> Origin:
    """A folder of tar files named by synsets, such as n01440764.tar."""
    positions = {synset: label for label, synset in enumerate(imagenet.synsets())}
    names, labels, sizes, shards, offsets = [], [], [], [], []
    for shard, archive in enumerate(track(archives, len(archives), f"{split}: class archives")):
        synset = archive.removesuffix(".tar")
        for member in _members(os.path.join(path, archive)):
            if _is_image(member.name):
                names.append(os.fsencode(f"{synset}/{os.path.basename(member.name)}"))
                labels.append(positions[synset])
                sizes.append(member.size)
                shards.append(shard)
                offsets.append(member.offset_data)
    require(bool(names), f"{path} holds {len(archives)} tar files without images; wanted those of the official train archive")
    places = {"shards": tuple(archives), "shard_numbers": np.array(shards, np.int32), "offsets": np.array(offsets, np.int64)}
    index = make_index(path, names, labels, sizes, **places)
    return _from_index(index, f"{len(archives)} archives of a class each", split, num_classes, imagenet.synsets())


def _from_archive(path: str, split: str, labels: Path | None, num_classes: int) -> Origin:
    """A tar of tars, a tar of class folders, or a tar of images whose labels stand elsewhere."""
    if _first_files(path)[0].endswith(".tar"):
        require(labels is None, f"{path} holds a tar file per class, which gives the labels; leave labels out")
        size = storage.size_of(path)
        identity = {"archive": os.path.basename(path), "bytes": size}
        number = max(1, round(size / _BYTES_PER_IMAGE))

        def items(start: int) -> Iterator[Item]:
            for count, item in enumerate(_nested_items(path, num_classes)):
                if count >= start:
                    yield item

        words = "an archive of one archive per class"
        return Origin(words=words, identity=identity, num_images=number, items=items, folders=imagenet.synsets())
    members = [member for member in _members(path) if _is_image(member.name)]
    require(bool(members), f"{path} holds no images; wanted class folders, a tar file per class, or images and their labels")
    classes, folders = None, None
    labels = labels or _devkit_beside(path)
    if labels is not None:
        members.sort(key=lambda member: member.name)
        names = [member.name for member in members]
        if len({name.rpartition("/")[0] for name in names}) == 1:  # all in one folder, which is no class
            names = [os.path.basename(name) for name in names]
        numbers, are_synsets = read_labels(labels, names, num_classes)
        folders = imagenet.synsets() if are_synsets else None
        words = "an archive of images with labels from elsewhere"
    else:
        members, names, numbers, classes = _classes_of(path, members)
        words = "an archive of class folders"
    index = make_index(
        path.rpartition("/")[0] or ("/" if path.startswith("/") else "."),
        [os.fsencode(name) for name in names],
        numbers,
        [member.size for member in members],
        classes,
        shards=(os.path.basename(path),),
        shard_numbers=np.zeros(len(members), np.int32),
        offsets=np.array([member.offset_data for member in members], np.int64),
    )
    return _from_index(index, words, split, num_classes, folders)


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not os.path.basename(name).startswith("._")  # macOS adds such


def _classes_of(path: str, members: list[tarfile.TarInfo]) -> tuple[list[tarfile.TarInfo], list[str], list[int], tuple[str, ...]]:
    """Members in ImageFolder's order, their names below the folder of class folders, their labels, and the classes."""
    folders = [member.name.split("/")[:-1] for member in members]
    depth = 0  # of folders that hold all of them
    for one, other in zip(min(folders), max(folders), strict=False):
        if one != other:
            break
        depth += 1
    if any(len(folder) == depth for folder in folders):
        raise InputError(
            f"{path} holds images without class folders, such as {members[0].name}; give labels: a list of `file label` lines, "
            "or for the official validation archive ILSVRC2012_devkit_t12.tar.gz"
        )
    ordered = sorted(members, key=lambda m: (m.name.split("/")[depth], m.name.rpartition("/")[0], os.fsencode(m.name)))
    names = ["/".join(member.name.split("/")[depth:]) for member in ordered]
    classes = tuple(sorted({name.split("/")[0] for name in names}))
    label = {name: number for number, name in enumerate(classes)}
    return ordered, names, [label[name.split("/")[0]] for name in names], classes


def _devkit_beside(path: str) -> Path | None:
    """The development kit in the folder of the official validation archive."""
    if storage.is_remote(path) or not os.path.basename(path).startswith("ILSVRC2012_img_val"):
        return None
    found = [Path(path).with_name(name) for name in ("ILSVRC2012_devkit_t12.tar.gz", "ILSVRC2012_devkit_t12")]
    return next((devkit for devkit in found if devkit.exists()), None)


def _nested_items(path: str, num_classes: int) -> Iterator[Item]:
    """Images of a tar of tars such as n01440764.tar, in one pass over the headers; where their bytes lie, not the bytes."""
    positions = {synset: label for label, synset in enumerate(imagenet.synsets())}
    with storage.open_to_read(path) as file:
        for outer in _members(path):
            synset = os.path.basename(outer.name).removesuffix(".tar")
            if not outer.name.endswith(".tar") or synset not in positions or positions[synset] >= num_classes:
                raise InputError(
                    f"{path} holds {outer.name}; wanted tar files named by ImageNet-1k's synsets, such as n01440764.tar, "
                    f"with classes in 0..{num_classes - 1} (num_classes)"
                )
            for inner in _members(f"{path}:{outer.name}", file, outer.offset_data, outer.size):
                if _is_image(inner.name):
                    name = f"{synset}/{os.path.basename(inner.name)}"
                    yield Item(name, positions[synset], Location(path, outer.offset_data + inner.offset_data, inner.size))


class _Part:
    """A part of a file as a file, for `tarfile`; the position is kept here, since several read the same file."""

    def __init__(self, file: Any, start: int, size: int) -> None:
        self._file, self._start, self._size, self._position = file, start, size, 0

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, whence: int = os.SEEK_SET) -> int:
        assert whence == os.SEEK_SET
        self._position = position
        return position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._position)
        self._file.seek(self._start + self._position)
        data = self._file.read(left if size < 0 else min(size, left))
        self._position += len(data)
        return data


def _members(path: str, file: Any = None, start: int = 0, size: int | None = None) -> Iterator[tarfile.TarInfo]:
    """The files in a tar file, or in one that lies within an open file.

    Raises:
        InputError: unreadable, compressed, or cut short.
    """
    end = 0
    try:
        if file is None:
            size = storage.size_of(path)
            with storage.open_to_read(path) as opened:
                yield from _members(path, opened, 0, size)
            return
        assert size is not None
        part: Any = Bounded(_Part(file, start, size))
        with open_tar(part) as tar:
            archive: Any = tar
            for member in members_of(tar):
                archive.members = []  # or it would keep all of them
                if member.isfile():
                    end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                    yield member
    except tarfile.TarError as error:
        what = "compressed, or no tar file" if "invalid header" in str(error) else f"cut short or damaged ({error})"
        raise InputError(f"cannot read the archive {path}: {what}; copy it again") from None
    except OSError as error:
        reason = error if isinstance(error, storage.ReadError) else storage.reason_of(error)
        raise InputError(f"cannot read the archive {path}: {reason}") from None
    if size < end + tarfile.BLOCKSIZE:  # an archive ends with blocks of zeros
        raise InputError(f"the archive {path} is cut short: {size} bytes, its last member ends at {end}; copy it again")


def _first_files(path: str) -> list[str]:
    """Names of the first files in a tar file, more than belong to one image."""
    members = _members(path)
    names = [member.name for member, _ in zip(members, range(64), strict=False)]
    require(bool(names), f"{path} is an archive without files; wanted images")
    return names


def _holds_no_labels(path: str) -> bool:
    """Whether a tar file is not a shard, which has its labels beside its images."""
    return not any(name.endswith((".cls", ".json")) for name in _first_files(path))
