"""`prepare`: laws checked with Python's tarfile, torchvision's ImageFolder and transforms, and by killing real processes."""

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet
from torchvision import transforms
from torchvision.datasets import ImageFolder

from imagenet_swa.config import InputError, TrainingError
from imagenet_swa.data import native
from imagenet_swa.data import prepare as prepare_module
from imagenet_swa.data.imagenet import synsets
from imagenet_swa.data.index import load_index
from imagenet_swa.data.index_cache import find_index
from imagenet_swa.data.prepare import PrepareResult, PrepareSettings, prepare
from imagenet_swa.data.prepare.archives import open_origin
from imagenet_swa.data.sources import Source, scan
from imagenet_swa.data.workers import in_order

if TYPE_CHECKING:
    from s3_server import Bucket

pytest_plugins = ["s3_server"]

CLASSES = (synsets()[3], synsets()[0], synsets()[999])  # not in class order

needs_kernels = pytest.mark.skipif(native.library() is None, reason="the compiled part is not there")


def settings(source: object, output: Path, **changes: Any) -> PrepareSettings:
    return PrepareSettings(source=str(source), output=output, **{"num_workers": 0, **changes})


def quietly(source: object, output: Path, **changes: Any) -> PrepareResult:
    return prepare(settings(source, output, **changes), say=lambda _line: None)


def jpeg(seed: int, size: tuple[int, int] = (64, 48), mode: str = "RGB", **options: Any) -> bytes:
    """Smooth noise, which compresses as photographs do."""
    random = np.random.default_rng(seed)
    width, height = size
    small = random.integers(0, 256, (height // 32 + 2, width // 32 + 2, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    image = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).convert(mode)
    image.save(buffer, options.pop("format", "JPEG"), **({"quality": 95} | options))
    return buffer.getvalue()


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def tar_bytes(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), 1_300_000_000
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def images_of(output: Path, split: str = "train") -> dict[str, tuple[int, bytes]]:
    """Name -> label and bytes, in order, as any reader of WebDataset's layout pairs them."""
    members = {}
    for path in sorted((output / split).glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None and member.name not in members
                members[member.name] = file.read()
    return {
        name: (int(members[f"{name.rpartition('.')[0]}.cls"]), data)
        for name, data in members.items()
        if not name.endswith(".cls")
    }


def tree(folder: Path, *, but: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Name -> bytes of all files; of an index, which remembers times and places too, the fingerprint and where images lie."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): _content(path) for path in files if path.suffix not in but}


def _content(path: Path) -> bytes:
    if not path.name.endswith(".index.arrow"):
        return path.read_bytes()
    index, _ = load_index(str(path), "")
    places = () if index.offsets is None else index.offsets.tolist()
    return f"{index.fingerprint} {index.shards} {places}".encode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three class folders of 4 images each, of many shapes; their names sort otherwise than their sizes."""
    files = {
        f"{name}/{name}_{4 - i}.JPEG": jpeg(10 * c + i, (60 + 9 * i, 90 - 8 * c))
        for c, name in enumerate(("ant", "bee", "cat"))
        for i in range(4)
    }
    files["bee/deeper/grey.jpg"] = jpeg(77, (70, 50), "L")
    return write_files(tmp_path / "source", files)


# ------------------------------------------------------------------------------------------------------- what is written


def test_shards_hold_the_folder(folder: Path, tmp_path: Path) -> None:
    """Names, labels, bytes and order are ImageFolder's, and so is the fingerprint the folder's."""
    result = quietly(folder, tmp_path / "out", num_classes=3)
    expected = {
        os.path.relpath(path, folder): (label, Path(path).read_bytes()) for path, label in ImageFolder(str(folder)).samples
    }
    written = images_of(tmp_path / "out")
    assert list(written.items()) == list(expected.items())
    index, _ = scan(Source("train", str(folder)), num_classes=3)
    assert result.index.fingerprint == index.fingerprint
    found = find_index(Source("train", str(tmp_path / "out" / "train")), None)
    assert found is not None and found.fingerprint == index.fingerprint
    assert [found.read(i) for i in range(len(found))] == [data for _, data in expected.values()]
    assert result.flags == (f"--data.train={tmp_path}/out/train",)


def test_folder_output_is_the_folder(folder: Path, tmp_path: Path) -> None:
    """Files in class folders have ImageFolder's labels and the source's bytes, and their list gives the same fingerprint."""
    result = quietly(folder, tmp_path / "out", num_classes=3, format="folder")
    before, after = ImageFolder(str(folder)), ImageFolder(str(tmp_path / "out" / "train"))
    assert [label for _, label in before.samples] == [label for _, label in after.samples]
    assert tree(folder) == tree(tmp_path / "out" / "train")
    index, _ = scan(Source("train", str(folder)), num_classes=3)
    found = find_index(Source("train", str(tmp_path / "out" / "train"), str(tmp_path / "out" / "train.txt")), None)
    assert found is not None and found.fingerprint == index.fingerprint == result.index.fingerprint
    assert result.flags[1] == f"--data.train_list={tmp_path}/out/train.txt"


def test_list_order_and_labels(folder: Path, tmp_path: Path) -> None:
    """A list's order and labels are kept, not the folders'."""
    lines = ["cat/cat_1.JPEG 7", "ant/ant_4.JPEG 2", "bee/deeper/grey.jpg 9"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    quietly(folder, tmp_path / "out", list_file=str(tmp_path / "list.txt"), num_classes=10)
    assert [f"{name} {label}" for name, (label, _) in images_of(tmp_path / "out").items()] == lines


def test_bytes_do_not_depend_on_workers(folder: Path, tmp_path: Path) -> None:
    """No worker, one and three write the same files to the last byte, the report and the index too."""
    for number in (0, 1, 3):
        quietly(folder, tmp_path / str(number) / "out", num_classes=3, shorter_side=40, num_workers=number)
    assert tree(tmp_path / "0") == tree(tmp_path / "1") == tree(tmp_path / "3")
    with tarfile.open(tmp_path / "0/out/train/train-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}


def test_shards_end_by_size(tmp_path: Path) -> None:
    """A shard ends with the image that fills it, and together they hold all images in order."""
    sizes = [700_000, 300_000, 60_000, 2_000_000, 1, 5]
    files = {f"a/{i}.jpg": os.urandom(size) for i, size in enumerate(sizes)}
    quietly(write_files(tmp_path / "source", files), tmp_path / "out", num_classes=1, shard_size=1)
    counts = []
    for path in sorted((tmp_path / "out/train").iterdir()):
        with tarfile.open(path) as tar:
            counts.append(len(tar.getnames()) // 2)
    assert counts == [3, 1, 2]
    assert {name: data for name, (_, data) in images_of(tmp_path / "out").items()} == files


def test_shards_to_shards(folder: Path, tmp_path: Path) -> None:
    """Shards of shards have the same images; keys that come again in another shard get the shard's name."""
    quietly(folder, tmp_path / "one", num_classes=3)
    quietly(tmp_path / "one" / "train", tmp_path / "two")
    assert images_of(tmp_path / "one") == images_of(tmp_path / "two")
    files = [{"0.jpg": jpeg(i), "0.cls": b"%d" % i} for i in range(2)]
    write_files(tmp_path / "same", {f"s-{i}.tar": tar_bytes(content) for i, content in enumerate(files)})
    quietly(f"{tmp_path}/same/s-*.tar", tmp_path / "three")
    assert images_of(tmp_path / "three") == {f"s-{i}/0.jpg": (i, content["0.jpg"]) for i, content in enumerate(files)}


LONG = "n" * 90 + "/" + "x" * 120 + ".jpg"


@pytest.mark.parametrize("name", [LONG, "ä/日本.jpg", "a b/c d.JPEG", "a/._b.png", "a/b.PnG"])
@pytest.mark.parametrize("form", ["shards", "folder"])
def test_odd_names(tmp_path: Path, name: str, form: Any) -> None:
    """Long, foreign, spaced and hidden names come through, and the index that remembers them is found again."""
    source = write_files(tmp_path / "source", {name: b"bytes", "z/z.jpg": b"z"})
    changes: dict[str, Any] = {"list_file": _list(tmp_path, f"z/z.jpg 1\n{name} 5"), "format": form}
    expected = name.replace("._", "__") if form == "shards" else name
    index = quietly(source, tmp_path / "out", **changes).index
    assert (index.name(1), index.read(1), index.labels.tolist()) == (expected, b"bytes", [1, 5])
    list_file = str(tmp_path / "out/train.txt") if form == "folder" else None
    assert find_index(Source("train", str(tmp_path / "out/train"), list_file), None) is not None


def test_shard_of_one_image(tmp_path: Path) -> None:
    """The index of a shard that holds a single image is found again."""
    quietly(write_files(tmp_path / "source", {"a/1.jpg": b"bytes"}), tmp_path / "out", num_classes=1)
    assert find_index(Source("train", str(tmp_path / "out/train")), None) is not None


def test_dots_in_names(tmp_path: Path) -> None:
    """WebDataset cuts a name at its first dot: others become underscores, counted, unless two names become one."""
    source = write_files(tmp_path / "source", {"a.b/x.y.JPEG": b"1", "a.b/z.jpg": b"2"})
    result = quietly(source, tmp_path / "out", num_classes=1)
    assert list(images_of(tmp_path / "out")) == ["a.b/x_y.JPEG", "a.b/z.jpg"]
    assert result.report["renamed"] == 1
    write_files(source, {"a.b/x_y.png": b"3"})
    with pytest.raises(InputError, match=r"a\.b/x\.y\.JPEG and a\.b/x_y\.png"):
        quietly(source, tmp_path / "again", num_classes=1)


# -------------------------------------------------------------------------------------------------------------- archives


@pytest.fixture
def train_archive(tmp_path: Path) -> tuple[Path, dict[str, tuple[int, bytes]]]:
    """A tar of a tar per class as the official one, and its images."""
    contents = {name: {f"{name}_{i}.JPEG": jpeg(i + 5 * c) for i in (12, 3, 7)} for c, name in enumerate(CLASSES)}
    path = tmp_path / "official" / "ILSVRC2012_img_train.tar"
    write_files(path.parent, {path.name: tar_bytes({f"{name}.tar": tar_bytes(files) for name, files in contents.items()})})
    label = {name: position for position, name in enumerate(sorted(synsets()))}
    return path, {f"{name}/{file}": (label[name], data) for name, files in contents.items() for file, data in files.items()}


def test_official_train_archive(train_archive: Any, tmp_path: Path) -> None:
    """Labels are the positions of the archive's synsets among all 1,000, whichever of them are there."""
    path, expected = train_archive
    quietly(path, tmp_path / "out")
    assert list(images_of(tmp_path / "out").items()) == list(expected.items())
    quietly(path.parent, tmp_path / "by_folder", num_workers=2)
    assert tree(tmp_path / "out" / "train") == tree(tmp_path / "by_folder" / "train")


def test_class_archives_in_a_folder(train_archive: Any, tmp_path: Path) -> None:
    """The train archive unpacked once, a folder of a tar file per class, gives what the archive gives, in the synsets' order."""
    path, expected = train_archive
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path / "classes", filter="data")
    quietly(tmp_path / "classes", tmp_path / "out", num_workers=1)
    assert images_of(tmp_path / "out") == expected
    synsets_of = [name.split("/")[0] for name in images_of(tmp_path / "out")]
    assert synsets_of == sorted(synsets_of)
    last = tmp_path / "classes" / f"{CLASSES[2]}.tar"
    last.write_bytes(last.read_bytes()[:-11_000])
    with pytest.raises(InputError, match=r"n15075141\.tar.*cut short"):
        quietly(tmp_path / "classes", tmp_path / "again")


def test_official_files_of_the_other_split_are_refused(train_archive: Any, val_archive: Path, hub: Any, tmp_path: Path) -> None:
    """An official file whose name tells another split than `split` is refused with the flag that helps, alone or in a folder."""
    shutil.copytree(val_archive.parent, tmp_path / "val_alone", ignore=shutil.ignore_patterns("*train*"))
    table = hub[0] / "data/validation-00000-of-00001.parquet"
    for source, split, other in (
        (val_archive, "train", "val"),
        (train_archive[0], "val", "train"),
        (tmp_path / "val_alone", "train", "val"),
        (table, "train", "val"),
    ):
        with pytest.raises(InputError, match=f"is the {other} split, but split is {split}; add --split {other}"):
            quietly(source, tmp_path / "out", split=split)
        assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("keep", ["half", "last block", "one block less", "two classes"])
def test_cut_archives(train_archive: Any, tmp_path: Path, keep: str) -> None:
    """A cut archive is refused wherever the cut lies."""
    path, _ = train_archive
    data = path.read_bytes()
    last = len(data.rstrip(b"\0"))
    last += -last % 512  # of the last image; blocks of zeros of the inner, then of the outer archive follow
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2].offset
    path.write_bytes(
        data[: {"half": len(data) // 2, "last block": last, "one block less": last - 512, "two classes": third}[keep]]
    )
    with pytest.raises(InputError, match=r"cut short.*copy it again"):
        quietly(path, tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.tar"))


NUM_VAL = 6
VAL_SYNSETS = [synsets()[i] for i in (65, 970, 230, 809, 0, 999)]


@pytest.fixture
def val_archive(tmp_path: Path) -> Path:
    """A flat archive whose members are not sorted."""
    files = {f"ILSVRC2012_val_{i + 1:08d}.JPEG": jpeg(i) for i in (3, 0, 5, 1, 2, 4)}
    write_files(tmp_path / "official", {"ILSVRC2012_img_val.tar": tar_bytes(files)})
    return tmp_path / "official" / "ILSVRC2012_img_val.tar"


@pytest.fixture
def devkit(tmp_path: Path) -> Path:
    """The development kit's folder; its ids are another order than the synsets', and it has classes with sub-classes."""
    from scipy.io import savemat

    order = np.random.default_rng(1).permutation(1000)
    rows = [(number + 1, synsets()[position], 0) for number, position in enumerate(order)]
    rows += [(1001, "n00001740", 2), (1002, "n00002137", 7)]
    table = np.zeros((len(rows), 1), [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")])
    for i, row in enumerate(rows):
        table[i, 0] = row
    id_of = {synset: number for number, synset, _ in rows}
    data = tmp_path / "kit" / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    savemat(data / "meta.mat", {"synsets": table})
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{id_of[synset]}\n" for synset in VAL_SYNSETS))
    return data.parent


def _labels(kind: str, folder: Path, devkit: Path) -> Path:
    """The same labels in every form."""
    if kind == "kit folder":
        return devkit
    if kind == "ground truth":
        return devkit / "data" / "ILSVRC2012_validation_ground_truth.txt"
    if kind == "kit archive":
        with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
            tar.add(devkit, "ILSVRC2012_devkit_t12")
        return folder / "ILSVRC2012_devkit_t12.tar.gz"
    numbers = [str(synsets().index(name)) for name in VAL_SYNSETS]
    values = VAL_SYNSETS if "synset" in kind else numbers
    files = [f"ILSVRC2012_val_{i + 1:08d}.JPEG " if "file" in kind else "" for i in range(NUM_VAL)]
    lines = [file + value for file, value in zip(files, values, strict=True)]
    (folder / "labels.txt").write_text("\n".join(reversed(lines) if "file" in kind else lines))
    return folder / "labels.txt"


@pytest.mark.parametrize("kind", ["kit folder", "kit archive", "ground truth", "file label", "file synset", "label", "synset"])
def test_official_validation_archive(val_archive: Path, devkit: Path, tmp_path: Path, kind: str) -> None:
    """The development kit and every form of list give the same labels to the images in the order of their names."""
    quietly(val_archive, tmp_path / "out", split="val", labels=_labels(kind, tmp_path, devkit))
    expected = [(f"ILSVRC2012_val_{i + 1:08d}.JPEG", synsets().index(VAL_SYNSETS[i]), jpeg(i)) for i in range(NUM_VAL)]
    assert [(name, label, data) for name, (label, data) in images_of(tmp_path / "out", "val").items()] == expected


def test_validation_folder_tree(val_archive: Path, devkit: Path, tmp_path: Path) -> None:
    """Written as files, the validation images lie in their synsets' folders; a kit beside the archive is found."""
    shutil.copytree(devkit, val_archive.with_name(devkit.name))
    quietly(val_archive.parent, tmp_path / "out", split="val", format="folder")
    samples = ImageFolder(str(tmp_path / "out" / "val")).samples
    assert {(Path(path).parent.name, Path(path).name) for path, _ in samples} == {
        (synset, f"ILSVRC2012_val_{i + 1:08d}.JPEG") for i, synset in enumerate(VAL_SYNSETS)
    }


def test_archive_of_class_folders(folder: Path, tmp_path: Path) -> None:
    """A tar of a folder, whatever stands above its classes and in whatever order, is the folder."""
    write_files(folder, {f"bee/{name}.jpg": b"x" for name in ("deeper/a/1", "deeper-still/1", "deeper/Z", "Z", "é")})
    index, _ = scan(Source("train", str(folder)), num_classes=3)
    for number, above in enumerate(("", "./", "data/train/")):
        path = write_files(tmp_path, {f"{number}.tar": tar_bytes({above + n: d for n, d in reversed(tree(folder).items())})})
        assert quietly(path / f"{number}.tar", tmp_path / f"out{number}", num_classes=3).index.fingerprint == index.fingerprint


def write_parquet(path: Path, rows: Sequence[tuple[str | None, bytes | None, int]], rows_per_group: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(
        {
            "image": pa.array(
                [{"bytes": data, "path": name} for name, data, _ in rows], pa.struct({"bytes": pa.binary(), "path": pa.string()})
            ),
            "label": pa.array([label for _, _, label in rows], pa.int64()),
        }
    )
    parquet.write_table(table, path, row_group_size=rows_per_group)
    return path


@pytest.fixture
def hub(tmp_path: Path) -> tuple[Path, dict[str, tuple[int, bytes]]]:
    """A folder as the Hub's repository, with three splits; and the train split's images."""
    rows = [(f"{CLASSES[i % 3]}_{i}_{CLASSES[i % 3]}.JPEG", jpeg(i), 7 * i % 1000) for i in range(11)]
    for number, part in enumerate((rows[:7], rows[7:])):
        write_parquet(tmp_path / "hub" / "data" / f"train-0000{number}-of-00002.parquet", part)
    write_parquet(tmp_path / "hub/data/validation-00000-of-00001.parquet", [("v.JPEG", jpeg(50), 1), (None, jpeg(51), 2)])
    write_parquet(tmp_path / "hub/data/test-00000-of-00001.parquet", [("t.JPEG", jpeg(52), -1)])
    return tmp_path / "hub", {name: (label, data) for name, data, label in rows}


def test_parquet(hub: Any, tmp_path: Path) -> None:
    """A split's rows in the order of the files; a row without a name gets its number."""
    path, expected = hub
    quietly(path, tmp_path / "out")
    assert list(images_of(tmp_path / "out").items()) == list(expected.items())
    quietly(path / "data", tmp_path / "out", split="val")
    assert images_of(tmp_path / "out", "val") == {"v.JPEG": (1, jpeg(50)), "00000001.jpg": (2, jpeg(51))}
    quietly(f"{path}/data/train-*1-of-*.parquet", tmp_path / "part")
    assert list(images_of(tmp_path / "part").items()) == list(expected.items())[7:]


def test_every_source_can_start_anywhere(folder: Path, hub: Any, train_archive: Any, val_archive: Path, devkit: Path) -> None:
    """The images from the n-th on are those of the whole from the n-th on, for every n and kind of source."""
    sources: list[tuple[Any, dict[str, Any]]] = [
        (folder, {"num_classes": 3}),
        (hub[0], {}),
        (train_archive[0], {}),
        (val_archive, {"labels": devkit, "split": "val"}),
    ]
    for path, options in sources:
        origin = open_origin(str(path), **{"split": "train", **options})
        everything = list(origin.items(0))
        assert len(everything) >= 6
        for start in range(len(everything) + 1):
            assert list(origin.items(start)) == everything[start:]


def test_s3(folder: Path, hub: Any, train_archive: Any, tmp_path: Path, bucket: "Bucket") -> None:
    """Shards, parquet files, an archive and a list give the same output from S3 as from the disk."""
    quietly(folder, tmp_path / "made", num_classes=3)
    list_file = _list(tmp_path, "ant/ant_1.JPEG 0\ncat/cat_2.JPEG 2\n")
    cases: list[tuple[str, Path, dict[str, Any]]] = [
        (bucket.put_folder(tmp_path / "made" / "train", "shards"), tmp_path / "made" / "train", {}),
        (bucket.put_folder(hub[0] / "data", "hub"), hub[0] / "data", {}),
        (bucket.put("ILSVRC2012_img_train.tar", train_archive[0].read_bytes()), train_archive[0], {}),
        (bucket.put_folder(folder, "folder"), folder, {"list_file": list_file}),
    ]
    for number, (url, path, options) in enumerate(cases):
        quietly(path, tmp_path / f"local{number}", **options)
        quietly(url, tmp_path / f"remote{number}", **options, num_workers=number % 2)
        assert tree(tmp_path / f"local{number}" / "train") == tree(tmp_path / f"remote{number}" / "train")


# ------------------------------------------------------------------------------------------------------------- shrinking


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """One class of images of every sort."""
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated
    files = {
        "large.JPEG": jpeg(1, (300, 401)),
        "wide.JPEG": jpeg(2, (333, 100)),
        "exact.JPEG": jpeg(3, (120, 100)),
        "small.JPEG": jpeg(4, (90, 70)),
        "thrifty.JPEG": jpeg(5, (110, 104), quality=5),  # takes more bytes at 90
        "grey.JPEG": jpeg(6, (200, 210), "L"),
        "four.JPEG": jpeg(7, (200, 150), "CMYK"),
        "turned.JPEG": jpeg(8, (200, 140), exif=exif),
        "picture.png": jpeg(9, (150, 150), format="PNG"),
        "clear.png": jpeg(10, (150, 160), "RGBA", format="PNG"),
    }
    return write_files(tmp_path / "mixed", {f"a/{name}": data for name, data in files.items()})


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def test_shrinking(mixed: Path, tmp_path: Path) -> None:
    """Re-encoded are exactly the images above the size that gain by it, to torchvision's size, grey ones grey, none rotated."""
    result = quietly(mixed, tmp_path / "out", num_classes=1, shorter_side=100)
    written = {name: data for name, (_, data) in images_of(tmp_path / "out").items()}
    before = {os.path.splitext(name)[0]: data for name, data in tree(mixed).items()}
    after = {os.path.splitext(name)[0]: data for name, data in written.items()}
    kept = {name for name, data in after.items() if data == before[name]}
    assert kept == {"a/wide", "a/exact", "a/small", "a/thrifty"}
    assert {name for name in written if not name.endswith(".JPEG")} == {"a/picture.jpg", "a/clear.jpg"}
    for name in after.keys() - kept:
        image, source = opened(after[name]), opened(before[name])
        resized = transforms.Resize(100, transforms.InterpolationMode.LANCZOS)(source.convert("RGB"))
        assert (image.format, image.size, image.mode) == ("JPEG", resized.size, "L" if name == "a/grey" else "RGB")
        assert not image.getexif()
        assert len(after[name]) < len(before[name])
        difference = np.abs(np.asarray(image.convert("RGB"), int) - np.asarray(resized, int))
        assert difference.mean() < 8, name  # JPEG at quality 90 of saturated noise; rotated or inverted it is ten times that
    report = result.report
    assert (report["re_encoded"], report["kept_small"], report["kept_not_smaller"]) == (6, 3, 1)
    assert report["bytes_before"] == sum(map(len, before.values()))
    assert report["bytes_after"] == sum(map(len, after.values()))


def test_keep_small_off(mixed: Path, tmp_path: Path) -> None:
    """Without keep_small every image is re-encoded, none enlarged."""
    result = quietly(mixed, tmp_path / "out", num_classes=1, shorter_side=100, keep_small=False)
    assert result.report["re_encoded"] == len(result.index) == 10
    sizes = {name: opened(data).size for name, (_, data) in images_of(tmp_path / "out").items()}
    assert sizes["a/small.JPEG"] == (90, 70) and min(sizes["a/large.JPEG"]) == 100


@pytest.mark.parametrize("num_compared", [10, 3, 0])
def test_measured_difference(mixed: Path, tmp_path: Path, num_compared: int) -> None:
    """The reported mean and maximum are those of torchvision's evaluation transform over the re-encoded images compared."""
    report = quietly(mixed, tmp_path / "out", num_classes=1, shorter_side=100, num_compared=num_compared).report
    evaluation = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    before = sorted(tree(mixed).items())
    after = {os.path.splitext(name)[0]: data for name, (_, data) in images_of(tmp_path / "out").items()}
    differences = []
    for number, (name, source) in enumerate(before):
        copy = after[os.path.splitext(name)[0]]
        chosen = {10: range(10), 3: (0, 4, 7), 0: ()}[num_compared]
        if copy != source and number in chosen:
            one, other = (np.asarray(evaluation(opened(data).convert("RGB")), int) for data in (source, copy))
            differences.append(np.abs(one - other))
    assert report["re_encoded_compared"] == len(differences)
    if not differences:
        assert report["difference_mean"] is None and report["difference_max"] is None
    else:
        assert report["difference_mean"] == pytest.approx(np.mean([d.mean() for d in differences]), rel=1e-9)
        assert report["difference_max"] == max(d.max() for d in differences)
    assert json.loads((tmp_path / "out/prepare-train.json").read_text()) == report


@needs_kernels
def test_restart_markers(mixed: Path, tmp_path: Path) -> None:
    """Copies with restart markers decode to the source's pixels, bit for bit; what is no JPEG keeps its bytes."""
    write_files(mixed, {"a/stages.JPEG": jpeg(20, (90, 90), progressive=True)})
    report = quietly(mixed, tmp_path / "out", num_classes=1, restart_markers=True).report
    before = tree(mixed)
    written = images_of(tmp_path / "out")
    assert written.keys() == before.keys()
    changed = {name for name, (_, data) in written.items() if data != before[name]}
    assert changed == {name for name in before if name.endswith("JPEG") and "stages" not in name}
    for name in changed:
        assert b"\xff\xdd\x00\x04" in written[name][1]  # DRI
        assert np.array_equal(np.asarray(opened(before[name])), np.asarray(opened(written[name][1])))
    assert (report["restart_markers"], report["without_restart_markers"]) == (len(changed), len(before) - len(changed))


def test_restart_markers_that_change_a_pixel(mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy whose pixels differ is never written."""
    monkeypatch.setattr("imagenet_swa.data.prepare.copies.add_restart_markers", lambda _data, pixels: jpeg(99, (64, pixels)))
    with pytest.raises(TrainingError, match=r"a/exact\.JPEG: a copy with restart markers decodes to other pixels"):
        quietly(mixed, tmp_path / "out", list_file=_list(tmp_path, "a/exact.JPEG 0"), restart_markers=True)
    assert not list((tmp_path / "out" / "train").iterdir())


@needs_kernels
def test_both_shrunk_and_marked(mixed: Path, tmp_path: Path) -> None:
    """With both, markers are added to the shrunk image."""
    for name, marked in (("plain", False), ("marked", True)):
        quietly(mixed, tmp_path / name, num_classes=1, shorter_side=100, restart_markers=marked)
    plain, marked = images_of(tmp_path / "plain"), images_of(tmp_path / "marked")
    assert all(np.array_equal(np.asarray(opened(plain[n][1])), np.asarray(opened(marked[n][1]))) for n in plain)
    assert sum(plain[name] != marked[name] for name in plain) == 10


# --------------------------------------------------------------------------------------- interruptions, second processes


def test_workers_keep_the_order() -> None:
    """Whatever an item takes, results come in the items' order, and few items are taken before they are needed."""
    taken: list[int] = []

    def items() -> Iterable[int]:
        for number in range(120):
            taken.append(number)
            yield 20_000 if number % 7 == 0 else number

    results = in_order(math.factorial, items(), 2, chunk=1)
    assert next(results) == math.factorial(20_000)
    assert len(taken) <= 8
    assert list(results) == [math.factorial(20_000 if number % 7 == 0 else number) for number in range(1, 120)]


def test_killed_worker() -> None:
    """A worker that is killed ends the work with a word."""
    with pytest.raises(TrainingError, match="a worker process was killed"):
        list(in_order(os._exit, [1], 1))


SCRIPT = """
import os, resource, signal, sys
from pathlib import Path
from imagenet_swa.data import prepare
from imagenet_swa.data.prepare import journal

def ends_at(items, number, what):
    for count, item in enumerate(items):
        if count == {kill_at} and what.endswith("images"):
            os.kill(os.getpid(), signal.SIGKILL)
        yield item

def killed(self, unit):
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    if {kill_in_add}:
        journal.Journal.add = killed
    if {limit}:
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
    try:
        prepare.prepare(prepare.PrepareSettings(**{settings}), track=ends_at)
    except OSError as error:
        sys.exit(f"OSError {{error.errno}}")
"""


def start(
    tmp_path: Path, of: PrepareSettings, *, kill_at: int = -1, kill_in_add: bool = False, limit: int = 0
) -> subprocess.Popen[str]:
    text = SCRIPT.format(
        kill_at=kill_at, kill_in_add=kill_in_add, limit=limit, settings=repr(vars(of)).replace("PosixPath", "Path")
    )
    script = tmp_path / "script.py"
    script.write_text(text)
    return subprocess.Popen([sys.executable, script], text=True, stderr=subprocess.PIPE, start_new_session=True)


def wait_for_the_last(process: subprocess.Popen[str]) -> None:
    """Until no process of the command's session is left, for at most 20 seconds."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail("workers outlived the process that started them")


@pytest.fixture(scope="module")
def several_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of random bytes that fill three shards of a MiB and a part of a fourth."""
    random = np.random.default_rng(5)
    files = {f"{'abc'[i % 3]}/{i:02d}.jpg": random.bytes(150_000 + 1000 * i) for i in range(20)}
    return write_files(tmp_path_factory.mktemp("several"), files)


@pytest.mark.parametrize("form", ["shards", "folder"])
def test_killed_and_started_again(several_shards: Path, tmp_path: Path, form: Any) -> None:
    """Killed in the middle of a shard, and between a shard and its note, the same command ends with the same bytes."""
    changes: dict[str, Any] = {"num_classes": 3, "shard_size": 1, "format": form}
    quietly(several_shards, tmp_path / "whole" / "out", **changes)
    again = settings(several_shards, tmp_path / "parts" / "out", **changes)
    for number, kill_at, kill_in_add in ((2, 3, False), (0, 9, False), (0, -1, True)):
        process = start(tmp_path, replace(again, num_workers=number), kill_at=kill_at, kill_in_add=kill_in_add)
        assert process.wait(timeout=60) == -signal.SIGKILL, process.stderr and process.stderr.read()
        wait_for_the_last(process)
        assert not (tmp_path / "parts/out/train.index.arrow").exists()
        for path in (tmp_path / "parts/out/train").rglob("*.tar"):
            assert path.read_bytes() == (tmp_path / "whole/out/train" / path.name).read_bytes()
    lines: list[str] = []
    worked: list[int] = []

    def track(items: Iterable[Any], number: int, what: str) -> Iterable[Any]:
        worked.extend([number] if what.endswith("images") else [])
        return items

    prepare(again, track=track, say=lines.append)
    assert any(line.startswith("going on after ") for line in lines)
    assert 0 < worked[0] < 20
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")


def test_done_is_checked_again(several_shards: Path, tmp_path: Path) -> None:
    """The same command after the end works on no image, reads all back, and changes nothing."""
    changes: dict[str, Any] = {"num_classes": 3, "shard_size": 1}
    quietly(several_shards, tmp_path / "out", **changes)
    before = tree(tmp_path / "out")
    quietly(several_shards, tmp_path / "out", **changes)
    assert tree(tmp_path / "out") == before
    shard = tmp_path / "out/train/train-000001.tar"
    damaged = bytearray(shard.read_bytes())
    damaged[100_000] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(TrainingError, match=r"train-000001\.tar reads back differently.*delete train/train-000001\.tar"):
        quietly(several_shards, tmp_path / "out", **changes)
    shard.unlink()
    quietly(several_shards, tmp_path / "out", **changes)
    assert tree(tmp_path / "out", but=(".journal",)) == {n: d for n, d in before.items() if not n.endswith(".journal")}


def test_a_shard_that_is_no_archive_any_more_has_a_way_out(several_shards: Path, tmp_path: Path) -> None:
    """A finished shard with a damaged header is named, and deleting it, as the message says, mends it."""
    changes: dict[str, Any] = {"num_classes": 3, "shard_size": 1}
    quietly(several_shards, tmp_path / "out", **changes)
    before = tree(tmp_path / "out/train")
    shard = tmp_path / "out/train/train-000002.tar"
    shard.write_bytes(bytes([255]) * 512 + shard.read_bytes()[512:])
    with pytest.raises(TrainingError, match=r"train-000002\.tar.*; delete it and run the same command again$"):
        quietly(several_shards, tmp_path / "out", **changes)
    shard.unlink()
    quietly(several_shards, tmp_path / "out", **changes)
    assert tree(tmp_path / "out/train") == before


@pytest.mark.parametrize("gone", ["one file", "the folder", "the list"])
def test_lost_files_are_made_again(several_shards: Path, tmp_path: Path, gone: str) -> None:
    """Whatever of a finished folder of files is deleted, the same command makes it again, to the last byte."""
    changes: dict[str, Any] = {"num_classes": 3, "shard_size": 1, "format": "folder"}
    quietly(several_shards, tmp_path / "out", **changes)
    before = tree(tmp_path / "out", but=(".journal", ".arrow"))
    if gone == "one file":
        (tmp_path / "out/train/b/10.jpg").unlink()
    elif gone == "the folder":
        shutil.rmtree(tmp_path / "out/train")
    else:
        (tmp_path / "out/train.txt").unlink()
    quietly(several_shards, tmp_path / "out", **changes)
    assert tree(tmp_path / "out", but=(".journal", ".arrow")) == before


def test_a_damaged_file_has_a_way_out(several_shards: Path, tmp_path: Path) -> None:
    """A file of other bytes is found, and what the message says to delete mends it."""
    changes: dict[str, Any] = {"num_classes": 3, "shard_size": 1, "format": "folder"}
    quietly(several_shards, tmp_path / "out", **changes)
    before = tree(tmp_path / "out/train")
    path = tmp_path / "out/train/c/17.jpg"
    path.write_bytes(bytes(path.stat().st_size))
    with pytest.raises(TrainingError, match=r"reads back differently.*delete (\S+) and run") as caught:
        quietly(several_shards, tmp_path / "out", **changes)
    Path(str(caught.value).partition("; delete ")[2].partition(" and run")[0]).unlink()
    quietly(several_shards, tmp_path / "out", **changes)
    assert tree(tmp_path / "out/train") == before


@pytest.mark.parametrize("form", ["shards", "folder"])
def test_equal_names_are_refused_after_an_interruption(tmp_path: Path, form: Any) -> None:
    """Two images of one name are refused however often the command stops and is started again."""
    rows = [(f"a/{i:02d}.jpg", os.urandom(400_000), 0) for i in range(12)]
    for number in range(2):
        write_parquet(tmp_path / f"hub/train-0000{number}-of-00002.parquet", rows)
    for _ in range(3):
        with pytest.raises(InputError, match=r"two images would get the name a/00\.jpg"):
            quietly(tmp_path / "hub", tmp_path / "out", shard_size=1, format=form)


def test_full_disk(several_shards: Path, tmp_path: Path) -> None:
    """A disk that takes no more leaves no half file, and with room the same command goes on to the same bytes."""
    changes: dict[str, Any] = {"num_classes": 3, "shard_size": 1}
    quietly(several_shards, tmp_path / "whole" / "out", **changes)
    again = settings(several_shards, tmp_path / "parts" / "out", **changes)
    process = start(tmp_path, again, limit=1_100_000)  # below the size of a shard
    assert process.wait(timeout=60) == 1
    assert process.stderr is not None and "OSError 27" in process.stderr.read()
    assert not list((tmp_path / "parts/out/train").iterdir())
    prepare(again, say=lambda _line: None)
    assert tree(tmp_path / "parts") == tree(tmp_path / "whole")


def test_interrupt_leaves_nothing_half(several_shards: Path, tmp_path: Path) -> None:
    """Ctrl-C leaves whole shards only."""

    def interrupted(items: Iterable[Any], _number: int, what: str) -> Iterable[Any]:
        for count, item in enumerate(items):
            if count == 10 and what.endswith("images"):
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        prepare(settings(several_shards, tmp_path / "out", num_classes=3, shard_size=1), track=interrupted)
    assert [path.name for path in (tmp_path / "out/train").iterdir()] == ["train-000000.tar"]


def test_second_process_is_refused(several_shards: Path, tmp_path: Path) -> None:
    """While one prepare writes, another one to the same output is refused, and one of the other split is not."""
    refusals = []

    def meanwhile(items: Iterable[Any], _number: int, what: str) -> Iterable[Any]:
        if what == "train: images":
            quietly(several_shards, tmp_path / "out", num_classes=3, split="val")
            with pytest.raises(InputError, match="another prepare is writing") as caught:
                quietly(several_shards, tmp_path / "out", num_classes=3)
            refusals.append(caught)
        return items

    prepare(settings(several_shards, tmp_path / "out", num_classes=3), track=meanwhile, say=lambda _line: None)
    assert refusals and len(images_of(tmp_path / "out", "val")) == len(images_of(tmp_path / "out")) == 20


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"shorter_side": 40}, "shorter_side None, now it is 40"),
        ({"format": "folder"}, "format shards, now it is folder"),
        ({"shard_size": 2}, "shard_size 1, now it is 2"),
    ],
)
def test_other_settings_are_refused(folder: Path, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    """An output goes on with its own settings only; how it is worked on may change."""
    quietly(folder, tmp_path / "out", num_classes=3, shard_size=1)
    before = tree(tmp_path / "out")
    with pytest.raises(InputError, match=words):
        quietly(folder, tmp_path / "out", **({"num_classes": 3, "shard_size": 1} | change))
    assert tree(tmp_path / "out") == before
    quietly(folder, tmp_path / "out", num_classes=3, shard_size=1, num_compared=1, on_bad_image="skip")


def test_another_source_is_refused(folder: Path, tmp_path: Path) -> None:
    """An output goes on with its own images only."""
    quietly(folder, tmp_path / "out", num_classes=3)
    write_files(folder, {"ant/new.jpg": b"new"})
    with pytest.raises(InputError, match=r"source's images 13, now it is 14.*empty output"):
        quietly(folder, tmp_path / "out", num_classes=3)


def test_damaged_journal(folder: Path, tmp_path: Path) -> None:
    """A journal's unfinished last line is forgotten, a damaged line is refused."""
    quietly(folder, tmp_path / "out", num_classes=3)
    before = tree(tmp_path / "out")
    journal = tmp_path / "out/prepare-train.journal"
    journal.write_bytes(before[journal.name][:-20])
    quietly(folder, tmp_path / "out", num_classes=3)
    assert tree(tmp_path / "out") == before
    journal.write_bytes(b"x" + before[journal.name])
    with pytest.raises(InputError, match="damaged in line 1"):
        quietly(folder, tmp_path / "out", num_classes=3)


def test_foreign_files_are_refused(folder: Path, tmp_path: Path) -> None:
    """Files that prepare did not write are not taken for its own."""
    write_files(tmp_path / "out/train", {"holiday.tar": b"mine"})
    with pytest.raises(InputError, match=r"holiday\.tar; choose a new or empty output"):
        quietly(folder, tmp_path / "out", num_classes=3)


# ------------------------------------------------------------------------------------------------------------- bad input


def _list(tmp_path: Path, text: str) -> str:
    (tmp_path / "list.txt").write_text(text)
    return str(tmp_path / "list.txt")


def test_bad_images(mixed: Path, tmp_path: Path) -> None:
    """An image that cannot be decoded stops with its name, or is left out, named, counted, up to the limit."""
    write_files(mixed, {"a/bad.JPEG": b"no image", "a/cut.JPEG": jpeg(30, (400, 300))[:5000]})
    changes: dict[str, Any] = {"num_classes": 1, "shorter_side": 100}
    with pytest.raises(InputError, match=r"bad image a/bad\.JPEG: not an image"):
        quietly(mixed, tmp_path / "out", **changes)
    with pytest.raises(InputError, match=r"a/cut\.JPEG: .*number 2, max_bad_images allows 1"):
        quietly(mixed, tmp_path / "out", **changes, on_bad_image="skip", max_bad_images=1)
    result = quietly(mixed, tmp_path / "out", **changes, on_bad_image="skip")
    assert [name for name, _ in result.report["bad"]] == ["a/bad.JPEG", "a/cut.JPEG"]
    assert len(result.index) == 10 and len(images_of(tmp_path / "out")) == 10
    assert len(quietly(mixed, tmp_path / "copies", num_classes=1).index) == 12  # nothing is decoded where bytes are kept


def test_vanished_image(folder: Path, tmp_path: Path) -> None:
    """An image that is gone when its turn comes stops with its name."""

    def gone(items: Iterable[Any], _number: int, what: str) -> Iterable[Any]:
        if what == "train: images":
            (folder / "bee/bee_1.JPEG").unlink()
        return items

    with pytest.raises(InputError, match=r"bee/bee_1\.JPEG: no such file"):
        prepare(settings(folder, tmp_path / "out", num_classes=3), track=gone)


def _case(make: Callable[[Path], dict[str, Any]], words: str) -> Any:
    return pytest.param(make, words, id=make.__name__)


def missing(t: Path) -> dict[str, Any]:
    return {"source": f"{t}/nowhere"}


def missing_tar(t: Path) -> dict[str, Any]:
    return {"source": f"{t}/nowhere.tar"}


def missing_parquet(t: Path) -> dict[str, Any]:
    return {"source": f"{t}/nowhere-*.parquet"}


def compressed(t: Path) -> dict[str, Any]:
    write_files(t, {"a.tar.gz": b"x"})
    return {"source": f"{t}/a.tar.gz"}


def no_tar(t: Path) -> dict[str, Any]:
    write_files(t, {"a.tar": b"no archive" * 100})
    return {"source": f"{t}/a.tar"}


def subset(t: Path) -> dict[str, Any]:
    write_files(t / "s", {f"{name}/1.jpg": b"x" for name in CLASSES})
    return {"source": f"{t}/s"}


def inside(t: Path) -> dict[str, Any]:
    write_files(t / "s", {"a/1.jpg": b"x"})
    return {"source": f"{t}/s", "output": t / "s" / "out", "num_classes": 1}


def onto_itself(t: Path) -> dict[str, Any]:
    write_files(t / "s", {"train/a/1.jpg": b"x"})
    return {"source": f"{t}/s/train", "output": t / "s", "num_classes": 1}


def below_a_file(t: Path) -> dict[str, Any]:
    write_files(t, {"s/a/1.jpg": b"x", "file": b""})
    return {"source": f"{t}/s", "output": t / "file" / "out", "num_classes": 1}


def list_with_gif(t: Path) -> dict[str, Any]:
    write_files(t, {"s/a/1.gif": b"x"})
    return {"source": f"{t}/s", "list_file": _list(t, "a/1.gif 0")}


def list_leaves_folder(t: Path) -> dict[str, Any]:
    write_files(t, {"s/a/1.jpg": b"x", "b.jpg": b"x"})
    return {"source": f"{t}/s", "list_file": _list(t, "../b.jpg 0")}


def list_twice(t: Path) -> dict[str, Any]:
    write_files(t, {"s/a/1.jpg": b"x"})
    return {"source": f"{t}/s", "list_file": _list(t, "a/1.jpg 0\na/1.jpg 0")}


def list_label(t: Path) -> dict[str, Any]:
    write_files(t, {"s/a/1.jpg": b"x"})
    return {"source": f"{t}/s", "list_file": _list(t, "a/1.jpg 1000")}


def useless_labels(t: Path) -> dict[str, Any]:
    write_files(t, {"s/a/1.jpg": b"x"})
    return {"source": f"{t}/s", "num_classes": 1, "labels": Path(_list(t, "0"))}


def flat(t: Path) -> dict[str, Any]:
    write_files(t, {"v.tar": tar_bytes({"1.jpg": b"x", "2.jpg": b"x"})})
    return {"source": f"{t}/v.tar"}


def too_few_labels(t: Path) -> dict[str, Any]:
    return flat(t) | {"labels": Path(_list(t, "3\n"))}


def no_label_for_one(t: Path) -> dict[str, Any]:
    return flat(t) | {"labels": Path(_list(t, "1.jpg 3\n"))}


def unknown_synset(t: Path) -> dict[str, Any]:
    return flat(t) | {"labels": Path(_list(t, "n01440764\nn99999999\n"))}


def ids_for_labels(t: Path) -> dict[str, Any]:
    return flat(t) | {"labels": Path(_list(t, "490\n1000\n"))}


def truth_alone(t: Path) -> dict[str, Any]:
    write_files(t, {"ILSVRC2012_validation_ground_truth.txt": b"490\n361\n"})
    return flat(t) | {"labels": t / "ILSVRC2012_validation_ground_truth.txt"}


def broken_meta(t: Path) -> dict[str, Any]:
    write_files(t / "kit/data", {"ILSVRC2012_validation_ground_truth.txt": b"490\n361\n", "meta.mat": b"no matrix"})
    return flat(t) | {"labels": t / "kit"}


def other_nested(t: Path) -> dict[str, Any]:
    write_files(t, {"n.tar": tar_bytes({"dogs.tar": tar_bytes({"1.jpg": b"x"})})})
    return {"source": f"{t}/n.tar"}


def other_schema(t: Path) -> dict[str, Any]:
    parquet.write_table(pa.table({"img": [b"x"], "label": [1]}), t / "train.parquet")
    return {"source": f"{t}/train.parquet"}


def no_parquet(t: Path) -> dict[str, Any]:
    write_files(t, {"train.parquet": b"PAR1 and no more"})
    return {"source": f"{t}/train.parquet"}


def test_split(t: Path) -> dict[str, Any]:
    return {"source": str(write_parquet(t / "test.parquet", [("a.jpg", b"x", -1)]))}


test_split.__test__ = False  # pyright: ignore[reportFunctionMemberAccess]  # a case, named after what it holds


def parquet_paths(t: Path) -> dict[str, Any]:
    return {"source": str(write_parquet(t / "train.parquet", [("a.jpg", None, 1)]))}


def parquet_missing_files(t: Path) -> dict[str, Any]:
    write_parquet(t / "h/train-00000-of-00294.parquet", [("a.jpg", b"x", 1)])
    return {"source": f"{t}/h"}


def parquet_other_split(t: Path) -> dict[str, Any]:
    write_parquet(t / "h/train-00000-of-00001.parquet", [("a.jpg", b"x", 1)])
    return {"source": f"{t}/h", "split": "val"}


def parquet_twice(t: Path) -> dict[str, Any]:
    return {"source": str(write_parquet(t / "train.parquet", [("a.jpg", b"x", 1), ("a.png", b"y", 1)]))}


def remote_output(t: Path) -> dict[str, Any]:
    return {"source": f"{t}", "output": Path("s3://bucket/out")}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        _case(remote_output, "wanted a local folder"),
        _case(missing, "no such folder"),
        _case(missing_tar, r"nowhere\.tar: no such file"),
        _case(missing_parquet, "no files match .*quote the pattern"),
        _case(compressed, "compressed; unpack it first"),
        _case(no_tar, "compressed, or no tar file"),
        _case(subset, "3 class folders, a subset.*wrong labels; give list_file"),
        _case(inside, "inside the source .*choose another output"),
        _case(onto_itself, "is to be written; choose another output"),
        _case(below_a_file, "cannot write .*not a directory; choose another output"),
        _case(list_with_gif, r"1\.gif'.*ends with one of"),
        _case(list_leaves_folder, r"list\S* names '\.\./b\.jpg', not below .*; set source to a folder"),
        _case(list_twice, r"lists an image twice: a/1\.jpg"),
        _case(list_label, r"1000' is not in 0\.\.999 \(num_classes\)"),
        _case(useless_labels, "leave labels out"),
        _case(flat, r"without class folders, such as 1\.jpg; give labels.*devkit"),
        _case(too_few_labels, "has 1 labels, the archive 2 images"),
        _case(no_label_for_one, r"no label for 1 of 2 images, such as 2\.jpg"),
        _case(unknown_synset, r"list\.txt:2: wanted a label or a synset.*'n99999999'"),
        _case(ids_for_labels, "label 1000 is not in.*no class numbers: give the whole development kit"),
        _case(truth_alone, r"has no data/meta\.mat.*or a list of"),
        _case(broken_meta, r"cannot read meta\.mat"),
        _case(other_nested, r"holds dogs\.tar; wanted tar files named by ImageNet-1k's synsets"),
        _case(other_schema, r"columns img: binary, label: int64; wanted image: struct<bytes: binary, path: string>, label"),
        _case(no_parquet, "cannot read the parquet file.*fetch it again"),
        _case(test_split, r"row 0 has no label \(-1\), as the Hub's test split"),
        _case(parquet_paths, "holds no image bytes"),
        _case(parquet_missing_files, "holds 1 of 00294 parquet files"),
        _case(parquet_other_split, r"none whose name starts with 'val'; set split"),
        _case(parquet_twice, r"two images would get the name a\.png"),
    ],
)
def test_bad_input(tmp_path: Path, make: Callable[[Path], dict[str, Any]], words: str) -> None:
    """Unusable input is one line: what, got, wanted, what next; and leaves no images."""
    arguments = {"output": tmp_path / "out"} | make(tmp_path)
    with pytest.raises(InputError, match=words) as caught:
        quietly(**arguments)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.glob("out/*/*"))


def test_without_scipy(val_archive: Path, devkit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without SciPy the development kit's reader says what to install or to give."""
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(InputError, match=r"pip install scipy.*or give a list"):
        quietly(val_archive, tmp_path / "out", split="val", labels=devkit)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"source": ""}, "source is empty"),
        ({"quality": 0}, r"quality must be 1\.\.95, got 0"),
        ({"quality": 100}, r"quality must be 1\.\.95, got 100"),
        ({"shorter_side": 0}, "shorter_side must be at least 1, got 0"),
        ({"shard_size": 0}, "shard_size must be at least 1"),
        ({"num_workers": -1}, "num_workers must be 0 or more"),
        ({"num_compared": -1}, "num_compared must be 0 or more"),
        ({"list_file": "a", "labels": Path("b")}, "exclude each other"),
    ],
)
def test_bad_settings(changes: dict[str, Any], words: str) -> None:
    """A value out of range is refused when it is given."""
    with pytest.raises(InputError, match=words):
        PrepareSettings(**({"source": "a", "output": Path("b")} | changes))


def test_no_sentence_without_its_number(folder: Path, tmp_path: Path) -> None:
    """What was not done is not talked about."""
    lines: list[str] = []
    prepare(settings(folder, tmp_path / "out", num_classes=3), say=lines.append)
    text = "\n".join(lines)
    assert "13 images" in text and f"--data.train={tmp_path}/out/train" in text
    assert not any(word in text for word in ("re-encoded", "grey levels", "restart", "renamed", "left out"))


def test_settings_are_documented() -> None:
    """Every setting has its text and stands on the list of what matters to the bytes, or of what does not."""
    source = Path(prepare_module.__file__).read_text()
    for name in PrepareSettings.__dataclass_fields__:
        assert source.split(f"\n    {name}: ", 1)[1].split("\n", 2)[1].startswith('    """'), name


# ------------------------------------------------------------------------------------------------------------ real images


@pytest.mark.realdata
def test_real_images(real_data: Path, tmp_path: Path) -> None:
    """Real images shrunk to 400 pixels differ little in the network's eyes, by what torchvision's transforms measure."""
    lines = (real_data / "train.txt").read_text().splitlines()[::3]
    list_file = _list(tmp_path, "\n".join(lines))
    report = quietly(real_data / "train", tmp_path / "out", list_file=list_file, shorter_side=400).report
    evaluation = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    differences = []
    for name, (_, data) in images_of(tmp_path / "out").items():
        source = (real_data / "train" / name).read_bytes()
        if source != data:
            one, other = (np.asarray(evaluation(opened(d).convert("RGB")), int) for d in (source, data))
            differences.append(np.abs(one - other).mean())
            assert min(opened(data).size) == 400 < min(opened(source).size)
        else:
            assert min(opened(data).size) <= 400 or report["kept_not_smaller"]
    assert report["re_encoded"] == len(differences) > 0
    assert report["difference_mean"] == pytest.approx(np.mean(differences))
    assert report["difference_mean"] < 3 and report["ratio"] < 1
