"""`imagenet-swa import`: CIFAR-10 and CIFAR-100 (Krizhevsky 2009) from their binary version to class folders of PNG files.

Lossless. A split is written aside and renamed once it is whole, so that the same command goes on after an interruption.
"""

import fcntl
import gzip
import hashlib
import json
import os
import re
import shlex
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from imagenet_swa.config import InputError, require
from imagenet_swa.data import storage
from imagenet_swa.data.cifar import DATASETS, HOME, NUM_PIXEL_BYTES, DataFile, Dataset
from imagenet_swa.data.sources import Track, untracked
from imagenet_swa.data.tars import members_of, open_tar
from imagenet_swa.files import flush, flush_file

FORMAT = "imagenet-swa import 1"
MANIFEST = "import.json"
_GZIP_START = b"\x1f\x8b"
_MAX_NAMES_BYTES = 2**16
_CLASS_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True, kw_only=True)
class ImportSettings:
    """What `import` reads and where it writes"""

    dataset: Literal["cifar10", "cifar100"]
    """Which of the two it is."""
    source: Path
    """cifar-10-binary.tar.gz or cifar-100-binary.tar.gz, or a folder with the .bin files of it."""
    output: Path
    """Folder that gets `train/CLASS/NNNNN.png` and `val/CLASS/NNNNN.png` (the test images); NNNNN is an image's position in
    the original."""


@dataclass(frozen=True)
class ImportResult:
    """Number of images by split, and the flags that name them to the other commands."""

    num_images: dict[str, int]
    flags: tuple[str, ...]


@dataclass(frozen=True)
class _Images:
    """Labels (n,) and pixels (n, 32, 32, 3) of a split in the original's order."""

    labels: NDArray[np.uint8]
    pixels: NDArray[np.uint8]

    def names(self, classes: tuple[str, ...]) -> list[str]:
        """Where each image goes below the split's folder."""
        return [f"{classes[label]}/{number:05d}.png" for number, label in enumerate(self.labels.tolist())]


def import_dataset(settings: ImportSettings, track: Track[Any] = untracked, say: Callable[[str], None] = print) -> ImportResult:
    """Write both splits, or the one that is missing.

    Raises:
        InputError: a source that is not the data set's binary version or is damaged, or an output that holds something else.
        OSError: the disk is full.
    """
    dataset = DATASETS[settings.dataset]
    with storage.explained():
        contents = _read(settings.source, dataset)
    classes = _class_names(contents, dataset)
    splits = {split: _images_of(contents, files, dataset) for split, files in dataset.splits.items()}
    identity = {"format": FORMAT, "dataset": settings.dataset, "classes": list(classes), "sha256": _digest(splits)}
    with _output_of(settings.output, identity):
        for split, images in splits.items():
            verb = "there already" if (settings.output / split).exists() else "written"
            if verb == "written":
                _write(images, settings.output / split, classes, track)
            else:
                _check_written(images, settings.output / split, classes)
            counts = np.bincount(images.labels, minlength=len(classes))
            say(f"{split}: {len(images.labels):,} images, {counts.min():,} to {counts.max():,} of each class, {verb}")
    flags = (*(f"--data.{split}={settings.output / split}" for split in splits), f"--model.num_classes={len(classes)}")
    say(f"to use it: {shlex.join(flags)}")
    return ImportResult({split: len(images.labels) for split, images in splits.items()}, flags)


# -------------------------------------------------------------------------------------------------------------- reading


def _read(source: Path, dataset: Dataset) -> dict[str, bytes]:
    """Contents of the data files, and of the file of class names where there is one, by name."""
    require(source.exists(), f"no such file or folder: {source}; wanted {dataset.archive} or its folder")
    sizes = {file.name: file.num_images * dataset.record_size for file in dataset.data_files}
    contents = _read_folder(source, dataset, sizes) if source.is_dir() else _read_archive(source, dataset, sizes)
    for name, size in sizes.items():  # again, of what was read
        _check_size(source, name, len(contents[name]), size, dataset)
    return contents


def _read_folder(source: Path, dataset: Dataset, sizes: dict[str, int]) -> dict[str, bytes]:
    inner = source / dataset.folder
    folder = inner if inner.is_dir() else source
    _check_names(
        source, {path.name for path in folder.iterdir() if path.is_file() or path.name in dataset.other_versions}, dataset
    )
    for name, size in sizes.items():
        _check_size(source, name, (folder / name).stat().st_size, size, dataset)
    return {name: (folder / name).read_bytes() for name in (*sizes, dataset.names_file) if (folder / name).is_file()}


def _read_archive(source: Path, dataset: Dataset, sizes: dict[str, int]) -> dict[str, bytes]:
    """From a tar file, of which nothing is unpacked: the members of known names, once each."""
    contents: dict[str, bytes] = {}
    seen: set[str] = set()
    try:
        with _opened(source) as file:
            with open_tar(file, "r|") as tar:
                for member in members_of(tar):
                    name = PurePosixPath(member.name).name
                    if member.isreg() or name in dataset.other_versions:
                        seen.add(name)
                    if not member.isreg() or name not in (*sizes, dataset.names_file):
                        continue
                    require(name not in contents, f"{source} holds {name} twice; wanted {dataset.archive} as it was published")
                    if name in sizes:
                        _check_size(source, name, member.size, sizes[name], dataset)
                    content = tar.extractfile(member)
                    assert content is not None
                    contents[name] = content.read(sizes.get(name, _MAX_NAMES_BYTES))
            while file.read(2**20):  # to the end, where gzip's check sum stands
                pass
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"{source} is no tar archive, damaged or cut short ({error}); wanted {dataset.archive} from {HOME}, or a folder with "
            "its .bin files"
        ) from None
    _check_names(source, seen, dataset)
    return contents


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes] | gzip.GzipFile]:
    """The bytes of a file, unpacked where it is compressed."""
    with path.open("rb") as file:
        is_compressed = file.read(len(_GZIP_START)) == _GZIP_START
        file.seek(0)
        if not is_compressed:
            yield file
            return
        with gzip.GzipFile(fileobj=file) as unpacked:
            yield unpacked


def _check_names(source: Path, names: set[str], dataset: Dataset) -> None:
    """Refuse what is not this data set's binary version, with the reason, where the names tell it."""
    missing = [file.name for file in dataset.data_files if file.name not in names]
    if not missing:
        return
    wanted = f"{dataset.archive} from {HOME}"
    if others := sorted(names & set(dataset.other_versions)):
        version = dataset.other_versions[others[0]]
        raise InputError(f"{source} is {dataset.title}'s version for {version}, which is not read; download {wanted}")
    for key, other in DATASETS.items():
        if other is not dataset and {file.name for file in other.data_files} <= names:
            raise InputError(f"{source} is {other.title}; import it as {key}, or download {wanted}")
    raise InputError(f"{source} has no {missing[0]}; wanted {wanted}, or a folder with its .bin files")


def _check_size(source: Path, name: str, got: int, wanted: int, dataset: Dataset) -> None:
    if got != wanted:
        raise InputError(
            f"{name} in {source} has {got:,} bytes, wanted {wanted:,}: {wanted // dataset.record_size:,} records of "
            f"{dataset.record_size:,}; it is cut short, or of another data set: download {dataset.archive} from {HOME}"
        )


def _class_names(contents: dict[str, bytes], dataset: Dataset) -> tuple[str, ...]:
    """In label order, which must be the sorted order, since that is how class folders are numbered."""
    if dataset.names_file not in contents:
        return dataset.classes
    names = tuple(contents[dataset.names_file].decode("utf-8", "replace").split())
    number = dataset.num_values[-1]
    require(
        len(names) == number and len(set(names)) == number and all(_CLASS_NAME.fullmatch(name) for name in names),
        f"{dataset.names_file} holds {len(names)} names; wanted {number} different ones of letters, digits, _ and -",
    )
    require(
        list(names) == sorted(names),
        f"{dataset.names_file} is not sorted, and class folders, which are numbered in sorted order, would get other labels; "
        "take the file away to use the original names",
    )
    return names


def _images_of(contents: dict[str, bytes], files: tuple[DataFile, ...], dataset: Dataset) -> _Images:
    """The records of a split's files, labels checked."""
    parts = []
    for file in files:
        records = np.frombuffer(contents[file.name], np.uint8).reshape(-1, dataset.record_size)
        for column, number in enumerate(dataset.num_values):
            if (wrong := np.flatnonzero(records[:, column] >= number)).size:
                raise InputError(
                    f"record {wrong[0]} of {file.name} has the label {records[wrong[0], column]}, wanted 0..{number - 1}; the "
                    f"file is damaged, or not of {dataset.title}: download {dataset.archive} again"
                )
        parts.append(records)
    records = np.concatenate(parts)
    pixels = records[:, -NUM_PIXEL_BYTES:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return _Images(records[:, len(dataset.num_values) - 1], pixels)


def _digest(splits: dict[str, _Images]) -> str:
    digest = hashlib.sha256()
    for images in splits.values():
        digest.update(images.labels.tobytes())
        digest.update(images.pixels.tobytes())
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------------------- writing


@contextmanager
def _output_of(folder: Path, identity: dict[str, Any]) -> Iterator[None]:
    """Hold the folder, which must be empty or of the same import; its manifest says which."""
    path = folder / MANIFEST
    try:
        folder.mkdir(parents=True, exist_ok=True)
        strange = sorted(entry.name for entry in folder.iterdir() if entry.name != MANIFEST)
        require(path.exists() or not strange, _holds(folder, strange))
        file = path.open("a+b")
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {storage.reason_of(error)}; choose another output") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"another import is writing to {folder}; wait for it, or choose another output") from None
        _check_manifest(file, folder, identity)
        yield


def _check_manifest(file: IO[bytes], folder: Path, identity: dict[str, Any]) -> None:
    file.seek(0)
    content = file.read()
    try:
        found = json.loads(content)
    except ValueError:
        found = None
    if found == identity:
        return
    strange = sorted(entry.name for entry in folder.iterdir() if entry.name != MANIFEST)
    begun = json.dumps(identity).encode().startswith(content)  # by an import that was killed in this moment
    require(begun and not strange, _holds(folder, [MANIFEST] if found is None else [f"{MANIFEST} of another import"]))
    file.truncate(0)
    file.write(json.dumps(identity).encode())
    flush_file(file)
    flush(folder)


def _holds(folder: Path, names: list[str]) -> str:
    return f"{folder} holds something else, such as {(names or [''])[0]}; choose a new or empty output"


def _write(images: _Images, folder: Path, classes: tuple[str, ...], track: Track[Any]) -> None:
    """A PNG per image, in a folder aside that gets its name when all are on the disk."""
    partial = folder.with_name(f"{folder.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    for name in classes:
        (partial / name).mkdir(parents=True)
    named = zip(images.names(classes), images.pixels, strict=True)
    for name, pixels in track(named, len(images.labels), f"{folder.name}: images"):
        Image.fromarray(np.ascontiguousarray(pixels)).save(partial / name, "PNG")
    os.sync()
    partial.rename(folder)
    flush(folder.parent)


def _check_written(images: _Images, folder: Path, classes: tuple[str, ...]) -> None:
    """Refuse a finished split to which something was added, or from which something was taken."""
    names, _, _ = storage.files_below(os.fsencode(folder), b"", (b"",), with_sizes=False)
    if different := sorted(set(map(os.fsdecode, names)) ^ set(images.names(classes))):
        raise InputError(f"{folder} changed since it was imported, such as {different[0]}; delete {folder} to import it again")
