"""The list of images of a split: path and label of each, in a fixed order, and the fingerprint of that list."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from imagenet_swa.config import InputError
from imagenet_swa.data import imagenet

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True, kw_only=True)
class ImageIndex:
    """N images in a fixed order. An image's number here is its identity: order, crops and predictions refer to it.

    `relative_paths` (N,) are file-system bytes below `root`; `labels` (N,) int64; `classes` the class folders' names
    in label order, None when a list gave the labels. `root` is empty for made-up images.
    """

    root: Path
    relative_paths: pa.BinaryArray
    labels: NDArray[np.int64]
    classes: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        """Path of image `index`."""
        return os.path.join(self.root, os.fsdecode(self.relative_paths[int(index)].as_py()))

    def fingerprint(self) -> str:
        """SHA-256 over names, labels and their order; where the folder lies does not matter."""
        digest = hashlib.sha256(str(len(self)).encode())
        for buffer in self.relative_paths.buffers()[1:]:
            digest.update(buffer)
        digest.update(np.ascontiguousarray(self.labels).tobytes())
        return digest.hexdigest()


def _make(root: Path, paths: list[bytes], labels: list[int], classes: tuple[str, ...] | None) -> ImageIndex:
    return ImageIndex(
        root=root, relative_paths=pa.array(paths, pa.large_binary()), labels=np.array(labels, np.int64), classes=classes
    )


def index_folder(root: Path) -> ImageIndex:
    """A folder with one sub-folder per class, read by torchvision's ImageFolder rules.

    Classes are the sorted names of the sub-folders; images lie at any depth below them, sorted by folder, then by name.

    Raises:
        InputError: no such folder, no class folders, or a class without images.
    """
    if not root.is_dir():
        raise InputError(f"no such folder: {root}; wanted one with a sub-folder of images per class")
    classes = tuple(sorted(entry.name for entry in os.scandir(root) if entry.is_dir()))
    if not classes:
        raise InputError(f"{root} has no sub-folders; wanted one per class, or a list file of `path label` lines beside it")
    with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
        files = list(pool.map(lambda name: _images_below(root, name), classes))
    empty = [name for name, found in zip(classes, files, strict=True) if not found]
    if empty:
        raise InputError(f"{root}: no images for {len(empty)} of {len(classes)} classes, the first is {empty[0]!r}")
    labels = [label for label, found in enumerate(files) for _ in found]
    return _make(root, [path for found in files for path in found], labels, classes)


def _images_below(root: Path, class_name: str) -> list[bytes]:
    found = []
    for folder, _, names in sorted(os.walk(root / class_name, followlinks=True)):
        inside = os.path.relpath(folder, root)
        found += [os.path.join(inside, name) for name in sorted(names) if name.lower().endswith(EXTENSIONS)]
    return [os.fsencode(path) for path in found]


def index_list(list_file: Path, root: Path, num_classes: int) -> ImageIndex:
    """A text file with a line `path label` per image, paths relative to `root`, in the file's order.

    Raises:
        InputError: unreadable or empty list, a line of another form, a label outside 0 .. num_classes - 1, or no image
            where the first or last line says (the others are found out when they are read).
    """
    try:
        lines = list_file.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"cannot read the list {list_file}: {error.strerror}") from None
    paths, labels = [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        path, _, label = line.strip().rpartition(b" ")
        if not path or not label.isdigit():
            raise InputError(f"{list_file}:{number}: wanted `path label`, got {_start_of(line)}")
        if len(label) > 9 or int(label) >= num_classes:
            raise InputError(f"{list_file}:{number}: label {_start_of(label)} is not in 0..{num_classes - 1} (model.num_classes)")
        paths.append(path.strip())
        labels.append(int(label))
    if not paths:
        raise InputError(f"{list_file} lists no images; wanted a line `path label` for each")
    index = _make(root, paths, labels, None)
    for position in (0, len(index) - 1):
        if not os.path.isfile(index.path(position)):
            raise InputError(f"{list_file} names {index.path(position)}, which is not there; its paths start from {root}")
    return index


def _start_of(text: bytes) -> str:
    """Text from a file that may be no list at all, short enough for a message."""
    return repr(os.fsdecode(text[:60])) + ("..." if len(text) > 60 else "")


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


def check_same_classes(train: ImageIndex, val: ImageIndex) -> None:
    """Raise InputError where the two splits' class folders differ."""
    if train.classes is not None and val.classes is not None and train.classes != val.classes:
        different = sorted(set(train.classes) ^ set(val.classes))
        raise InputError(
            f"{train.root} and {val.root} have different class folders, such as {different[0]!r}; "
            f"both need the same, since their sorted names give the labels"
        )
