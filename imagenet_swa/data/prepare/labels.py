"""Labels that stand apart from their images: lists, and the development kit of the official validation archive."""

import io
import os
import tarfile
import zlib
from pathlib import Path
from typing import Any

from imagenet_swa.config import InputError, require
from imagenet_swa.data import imagenet, storage
from imagenet_swa.data.tars import members_of, open_tar

_MAX_BYTES = 16 * 2**20  # of each of the two files
_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"


def read_labels(path: Path, names: list[str], num_classes: int) -> tuple[list[int], bool]:
    """Labels of images in the order of their names, and whether synsets gave them.

    `path` is the official development kit (.tar.gz, or the folder it was unpacked to), or a text file: lines `file label`,
    `file synset`, or one label or synset a line, in the sorted order of the names.

    Raises:
        InputError: unreadable, too few or too many, or something that is no label.
    """
    require(path.exists(), f"no such labels: {path}; wanted a list, or ILSVRC2012_devkit_t12.tar.gz or its folder")
    if path.is_dir() or path.name.endswith((".tar.gz", ".tgz")) or "ground_truth" in path.name:
        return _from_devkit(path, names), True
    try:
        lines = [(number, line.strip()) for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)]
    except (OSError, UnicodeDecodeError) as error:
        reason = storage.reason_of(error) if isinstance(error, OSError) else "not a text file"
        raise InputError(f"cannot read the labels {path}: {reason}") from None
    rows = [(number, line.rsplit(None, 1)) for number, line in lines if line]
    require(bool(rows), f"{path} is empty; wanted a label for each of {len(names):,} images")
    width = len(rows[0][1])
    values = []
    for number, row in rows:
        require(len(row) == width, f"{path}:{number}: not {'`file label`' if width == 2 else 'one label'}, as in the first line")
        values.append(_label(f"{path}:{number}", row[-1], num_classes))
    are_synsets = not rows[0][1][-1].isdecimal()
    if width == 1:
        _check_number(path, len(values), names)
        return values, are_synsets
    by_name: dict[str, int] = {}
    for (number, (name, _)), value in zip(rows, values, strict=True):
        if by_name.setdefault(os.path.basename(name), value) != value:
            raise InputError(f"{path}:{number}: {name} has another label further up")
    missing = [name for name in names if os.path.basename(name) not in by_name]
    require(not missing, f"{path} has no label for {len(missing):,} of {len(names):,} images, such as {(missing or [''])[0]}")
    return [by_name[os.path.basename(name)] for name in names], are_synsets


def _check_number(path: Path, number: int, names: list[str]) -> None:
    require(
        number == len(names),
        f"{path} has {number:,} labels, the archive {len(names):,} images; wanted one for each, in the sorted order of the names",
    )


def _label(where: str, text: str, num_classes: int) -> int:
    synsets = imagenet.synsets()
    if not text.isdecimal() and text not in synsets:
        raise InputError(f"{where}: wanted a label or a synset of ImageNet-1k such as n01440764, got {text[:60]!r}")
    value = int(text[:20]) if text.isdecimal() else synsets.index(text)
    if value >= num_classes:
        hint = f"; is this {_TRUTH}? Its numbers are no class numbers: give the whole development kit" if value == 1000 else ""
        raise InputError(f"{where}: label {text[:60]} is not in 0..{num_classes - 1} (num_classes){hint}")
    return value


# ------------------------------------------------------------------------------------------------- the development kit


def _from_devkit(path: Path, names: list[str]) -> list[int]:
    """The kit's ids are not class numbers: id -> synset -> position among the sorted synsets."""
    truth, meta = _devkit_files(path)
    synset_of = _synsets_by_id(path, meta)
    try:
        ids = [int(line) for line in truth.split()]
    except ValueError:
        raise InputError(f"{path}: {_TRUTH} holds something that is no number; unpack it again") from None
    _check_number(path, len(ids), names)
    positions = {synset: position for position, synset in enumerate(imagenet.synsets())}
    unknown = [number for number in ids if synset_of.get(number) not in positions]
    if unknown:
        raise InputError(f"{path}: {_META} names no synset of ImageNet-1k for id {unknown[0]}; wanted the kit of tasks 1 and 2")
    return [positions[synset_of[number]] for number in ids]


def _devkit_files(path: Path) -> tuple[bytes, bytes]:
    """The contents of the two files that matter."""
    found: dict[str, bytes] = {}
    try:
        if path.is_dir() or "ground_truth" in path.name:
            folder = path if path.is_dir() else path.parent
            for name in (_TRUTH, _META):
                for place in (folder, folder / "data", folder / "ILSVRC2012_devkit_t12" / "data"):
                    if name not in found and (place / name).is_file():
                        found[name] = (place / name).read_bytes()[:_MAX_BYTES]
        else:
            with open_tar(path, "r") as kit:
                for member in members_of(kit):
                    name = os.path.basename(member.name)
                    if name in (_TRUTH, _META) and (file := kit.extractfile(member)) is not None:
                        found[name] = file.read(_MAX_BYTES)
    except (OSError, tarfile.TarError, EOFError, zlib.error, KeyError) as error:  # KeyError: of links to nowhere
        raise InputError(f"cannot read the development kit {path}: {' '.join(str(error).split())}; fetch it again") from None
    missing = [name for name in (_TRUTH, _META) if name not in found]
    if missing:
        raise InputError(
            f"{path} has no data/{missing[0]}; the ids of {_TRUTH} need {_META}: give ILSVRC2012_devkit_t12.tar.gz or the folder "
            "it was unpacked to, or a list of `file label` lines"
        )
    return found[_TRUTH], found[_META]


def _synsets_by_id(path: Path, meta: bytes) -> dict[int, str]:
    """Of the classes without sub-classes, which are the 1,000."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise InputError(
            f"{path}: reading {_META} needs SciPy; run `pip install scipy`, or give a list of `file label` lines instead"
        ) from None
    try:
        table: Any = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        columns = (table[name].tolist() for name in ("ILSVRC2012_ID", "WNID", "num_children"))
        return {int(number): str(synset) for number, synset, children in zip(*columns, strict=True) if children == 0}
    except Exception as error:  # loadmat raises of all kinds on a damaged file
        raise InputError(f"{path}: cannot read {_META}: {type(error).__name__}; unpack the kit again") from None
