"""CIFAR from its binary version, against records that the tests put together themselves."""

import gzip
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from conftest import index_folder, one_line
from numpy.typing import NDArray
from PIL import Image

from imagenet_swa.data.cifar import DATASETS, DataFile
from imagenet_swa.data.prepare import cifar
from imagenet_swa.data.prepare.cifar import ImportResult, ImportSettings, import_dataset
from imagenet_swa.data.sources import Track, untracked

Name = Literal["cifar10", "cifar100"]
NAMES: tuple[Name, ...] = ("cifar10", "cifar100")
every_dataset = pytest.mark.parametrize("name", NAMES)
PER_FILE = 30
SUPERCLASSES = """
aquatic mammals: beaver dolphin otter seal whale
fish: aquarium_fish flatfish ray shark trout
flowers: orchid poppy rose sunflower tulip
food containers: bottle bowl can cup plate
fruit and vegetables: apple mushroom orange pear sweet_pepper
household electrical devices: clock keyboard lamp telephone television
household furniture: bed chair couch table wardrobe
insects: bee beetle butterfly caterpillar cockroach
large carnivores: bear leopard lion tiger wolf
large man-made outdoor things: bridge castle house road skyscraper
large natural outdoor scenes: cloud forest mountain plain sea
large omnivores and herbivores: camel cattle chimpanzee elephant kangaroo
medium-sized mammals: fox porcupine possum raccoon skunk
non-insect invertebrates: crab lobster snail spider worm
people: baby boy girl man woman
reptiles: crocodile dinosaur lizard snake turtle
small mammals: hamster mouse rabbit shrew squirrel
trees: maple_tree oak_tree palm_tree pine_tree willow_tree
vehicles 1: bicycle bus motorcycle pickup_truck train
vehicles 2: lawn_mower rocket streetcar tank tractor
"""

# ---------------------------------------------------------------------------------------------------------- helpers


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both data sets with files of thirty images."""
    for name, dataset in list(DATASETS.items()):
        splits = {split: tuple(DataFile(file.name, PER_FILE) for file in files) for split, files in dataset.splits.items()}
        monkeypatch.setitem(DATASETS, name, replace(dataset, splits=splits))


def pictures(name: Name, file: str) -> tuple[NDArray[np.uint8], list[int]]:
    """(30, 32, 32, 3) and labels, not sorted."""
    random = np.random.default_rng([len(name), *file.encode()])
    labels = random.integers(0, 10 if name == "cifar10" else 100, PER_FILE).tolist()
    return random.integers(0, 256, (PER_FILE, 32, 32, 3)).astype(np.uint8), labels


def records(name: Name, file: str) -> bytes:
    """As the data set's page describes them: (coarse and) fine label, 1,024 bytes of red, of green, of blue, row by row."""
    images, labels = pictures(name, file)
    parts = []
    for image, label in zip(images, labels, strict=True):
        parts.append(bytes([label]) if name == "cifar10" else bytes([label % 20, label]))
        parts += [bytes(image[row, :, channel].tolist()) for channel in range(3) for row in range(32)]
    return b"".join(parts)


def original(name: Name) -> dict[str, bytes]:
    """The files of the binary version by name."""
    dataset = DATASETS[name]
    files = {file.name: records(name, file.name) for file in dataset.data_files}
    files[dataset.names_file] = ("\n".join(dataset.classes) + "\n\n").encode()
    return files | {"readme.html": b"<html>", "coarse_label_names.txt": b"people\n"}


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def tar_of(files: Iterable[tuple[str, bytes | str]]) -> bytes:
    """A tar file of these members; text makes a symbolic link."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            if isinstance(content, str):
                member.type, member.linkname = tarfile.SYMTYPE, content
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def source_of(kind: str, name: Name, folder: Path) -> Path:
    """The original as a folder, within a folder, or as an archive."""
    files, inner = original(name), DATASETS[name].folder
    if kind == "folder":
        return write_folder(folder / "bins", files)
    if kind == "folder within":
        write_folder(folder / "data" / inner, files)
        return folder / "data"
    tar = tar_of((f"{inner}/{file}", content) for file, content in reversed(files.items()))
    path = folder / f"archive.{kind}"
    path.write_bytes(gzip.compress(tar, 1) if kind == "tar.gz" else tar)
    return path


def imported(
    name: Name,
    source: Path,
    output: Path,
    track: Track[Any] = untracked,
    say: Callable[[str], None] = lambda _: None,
) -> ImportResult:
    return import_dataset(ImportSettings(dataset=name, source=source, output=output), track, say)


def refusal(name: Name, source: Path, output: Path) -> str:
    return one_line(lambda: imported(name, source, output))


def tree(folder: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ----------------------------------------------------------------------------------------------------------- pixels


@every_dataset
@pytest.mark.parametrize("kind", ["folder", "folder within", "tar.gz", "tar"])
def test_every_pixel_and_label_is_the_originals(tmp_path: Path, name: Name, kind: str) -> None:
    """Decoded, each PNG is its record, in the folder of its class, by the name of its position; labels of class folders are
    the original ones.
    """
    result = imported(name, source_of(kind, name, tmp_path), tmp_path / "out")
    dataset = DATASETS[name]
    for split, files in dataset.splits.items():
        parts = [pictures(name, file.name) for file in files]
        images, labels = np.concatenate([part for part, _ in parts]), [label for _, some in parts for label in some]
        assert result.num_images[split] == len(images) == len(list((tmp_path / "out" / split).glob("*/*.png")))
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            with Image.open(tmp_path / "out" / split / dataset.classes[label] / f"{number:05d}.png") as file:
                assert file.format == "PNG" and file.mode == "RGB"
                np.testing.assert_array_equal(np.asarray(file), image)
        present = sorted(set(labels))
        if len(present) == len(dataset.classes):  # empty class folders are no class folders to the index
            index = index_folder(tmp_path / "out" / split)
            assert {index.name(i)[-9:-4]: label for i, label in enumerate(index.labels.tolist())} == {
                f"{number:05d}": label for number, label in enumerate(labels)
            }
    assert tuple(flag.partition("=")[0] for flag in result.flags) == ("--data.train", "--data.val", "--model.num_classes")


def test_the_layout_is_the_published_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """50,000 and 10,000 images, records of 3,073 and 3,074 bytes; sorted class names are those of the superclass table."""
    monkeypatch.undo()
    for name, size in (("cifar10", 3073), ("cifar100", 3074)):
        dataset = DATASETS[name]
        assert {split: sum(file.num_images for file in files) for split, files in dataset.splits.items()} == {
            "train": 50_000,
            "val": 10_000,
        }
        assert dataset.record_size == size and list(dataset.classes) == sorted(dataset.classes)
    table = [line.partition(": ")[2].split() for line in SUPERCLASSES.strip().splitlines()]
    assert sorted(name for names in table for name in names) == list(DATASETS["cifar100"].classes)
    assert [file.name for file in DATASETS["cifar10"].data_files] == [f"data_batch_{k}.bin" for k in range(1, 6)] + [
        "test_batch.bin"
    ]


def test_progress_and_result_are_told(tmp_path: Path) -> None:
    """The progress bar is told the number of images, and the user how many there are of each class and how to use them."""
    asked, said = [], []

    def track(items: Iterable[Any], number: int, what: str) -> Iterable[Any]:
        asked.append((number, what))
        return items

    imported("cifar10", source_of("folder", "cifar10", tmp_path), tmp_path / "out", track=track, say=said.append)
    assert asked == [(5 * PER_FILE, "train: images"), (PER_FILE, "val: images")]
    labels = [label for k in range(1, 6) for label in pictures("cifar10", f"data_batch_{k}.bin")[1]]
    counts = [labels.count(label) for label in range(10)]
    assert said[0] == f"train: 150 images, {min(counts)} to {max(counts)} of each class, written"
    assert said[2] == f"to use it: --data.train={tmp_path}/out/train --data.val={tmp_path}/out/val --model.num_classes=10"


# ------------------------------------------------------------------------------------------------------ class names


@every_dataset
def test_class_names_are_the_files_or_the_known_ones(tmp_path: Path, name: Name) -> None:
    """The file of names decides; without it, the original names do."""
    dataset, files = DATASETS[name], original(name)
    own = [f"c{label:02d}" for label in range(len(dataset.classes))]
    imported(name, write_folder(tmp_path / "own", files | {dataset.names_file: "\n".join(own).encode()}), tmp_path / "out 1")
    assert sorted(os.listdir(tmp_path / "out 1" / "train")) == own
    del files[dataset.names_file]
    imported(name, write_folder(tmp_path / "none", files), tmp_path / "out 2")
    assert sorted(os.listdir(tmp_path / "out 2" / "val")) == list(dataset.classes)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("b a c d e f g h i j", "not sorted"),
        ("../../stolen b c d e f g h i j", "letters, digits"),
        (". b c d e f g h i j", "letters, digits"),
        ("/tmp/stolen b c d e f g h i j", "letters, digits"),
        ("a b c", "holds 3 names; wanted 10"),
        ("a a b c d e f g h i", "10 different"),
        ("a b c d e f g h i j " * 10_000, "wanted 10"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_class_names_that_cannot_be_folders_in_label_order(tmp_path: Path, names: str, words: str, kind: str) -> None:
    """Names that sort otherwise, lead elsewhere or are too few or many are refused, and nothing is written."""
    files = original("cifar10") | {"batches.meta.txt": names.replace(" ", "\n").encode()}
    if kind == "folder":
        source = write_folder(tmp_path / "deep" / "bins", files)
    else:
        source = write_folder(tmp_path / "deep", {"a.tar": tar_of(files.items())}) / "a.tar"
    before = tree(tmp_path)
    message = refusal("cifar10", source, tmp_path / "deep" / "out")
    assert words in message and "batches.meta.txt" in message
    assert tree(tmp_path) == before and not (tmp_path / "deep" / "out").exists()


# --------------------------------------------------------------------------------------------------- broken sources


def changed(name: Name, file: str, content: bytes | None) -> dict[str, bytes]:
    files = original(name)
    if content is None:
        del files[file]
    else:
        files[file] = content
    return files


def with_byte(data: bytes, place: int, value: int) -> bytes:
    return data[:place] + bytes([value]) + data[place + 1 :]


def broken_sources() -> dict[str, tuple[Name, dict[str, bytes], tuple[str, ...]]]:
    one, hundred = records("cifar10", "data_batch_2.bin"), records("cifar100", "train.bin")
    python = {f"data_batch_{k}": b"\x80\x04" for k in range(1, 6)} | {"test_batch": b"\x80\x04", "batches.meta": b"\x80\x04"}
    binary = "cifar-10-binary.tar.gz"
    return {
        "cut": ("cifar10", changed("cifar10", "data_batch_2.bin", one[:-1]), ("data_batch_2.bin", "92,189 bytes", "92,190")),
        "a record less": ("cifar10", changed("cifar10", "data_batch_2.bin", one[:-3073]), ("data_batch_2.bin", "30 records")),
        "longer": ("cifar10", changed("cifar10", "data_batch_2.bin", one + one[:3073]), ("data_batch_2.bin", "95,263")),
        "empty": ("cifar10", changed("cifar10", "test_batch.bin", b""), ("test_batch.bin", "0 bytes")),
        "label": (
            "cifar10",
            changed("cifar10", "data_batch_2.bin", with_byte(one, 7 * 3073, 10)),
            ("record 7 of data_batch_2.bin", "label 10", "0..9"),
        ),
        "fine label": (
            "cifar100",
            changed("cifar100", "train.bin", with_byte(hundred, 2 * 3074 + 1, 100)),
            ("record 2 of train.bin", "label 100", "0..99"),
        ),
        "coarse label": (
            "cifar100",
            changed("cifar100", "train.bin", with_byte(hundred, 3 * 3074, 20)),
            ("record 3 of train.bin", "label 20", "0..19"),
        ),
        "missing": ("cifar10", changed("cifar10", "data_batch_4.bin", None), ("no data_batch_4.bin", binary)),
        "Python": ("cifar10", python, ("version for Python", "not read", binary)),
        "Python's 100": (
            "cifar100",
            {"train": b"\x80\x04", "test": b"\x80\x04", "meta": b"\x80\x04"},
            ("CIFAR-100's version for Python", "cifar-100-binary.tar.gz"),
        ),
        "MATLAB": ("cifar10", {"data_batch_1.mat": b"MATLAB"}, ("version for MATLAB", binary)),
        "other": ("cifar10", original("cifar100"), ("is CIFAR-100", "as cifar100")),
        "other way": ("cifar100", original("cifar10"), ("is CIFAR-10;", "as cifar10")),
        "nothing": ("cifar10", {"notes.txt": b""}, ("no data_batch_1.bin", binary)),
    }


BROKEN = (
    *("cut", "a record less", "longer", "empty", "label", "fine label", "coarse label", "missing"),
    *("Python", "Python's 100", "MATLAB", "other", "other way", "nothing"),
)


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("packed", [False, True])
def test_broken_and_other_sources_are_refused(tmp_path: Path, kind: str, packed: bool) -> None:
    """What is not the whole binary version is refused in one line that says what is wrong and what to download; nothing is
    written.
    """
    sources = broken_sources()
    assert set(sources) == set(BROKEN)
    name, files, words = sources[kind]
    source = write_folder(tmp_path / "source", {"a.tar": tar_of(files.items())} if packed else files)
    message = refusal(name, source / "a.tar" if packed else source, tmp_path / "out")
    for word in (*words, str(source)) if "label" not in kind else words:
        assert word in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("folder", ["cifar-10-batches-py", "cifar-10-batches-mat"])
def test_folders_of_other_versions_are_known_by_name(tmp_path: Path, folder: str) -> None:
    """The folder above an unpacked other version is told apart too."""
    write_folder(tmp_path / folder, {})
    assert "CIFAR-10's version for" in refusal("cifar10", tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[: len(data) // 2], "cut short"),
        (lambda data: data[:-4], "cut short"),
        (lambda data: with_byte(data, len(data) - 8, data[-8] ^ 1), "damaged"),
        (lambda data: with_byte(data, len(data) // 2, data[len(data) // 2] ^ 255), "damaged"),
        (lambda _: b"<html>404 Not Found</html>" * 100, "no tar archive"),
        (lambda _: b"", "no tar archive"),
    ],
)
def test_damaged_archives_are_refused(tmp_path: Path, damage: Any, words: str) -> None:
    """An archive that is cut short anywhere, or whose check sum is wrong, is refused whatever its members say."""
    source = source_of("tar.gz", "cifar10", tmp_path)
    source.write_bytes(damage(source.read_bytes()))
    message = refusal("cifar10", source, tmp_path / "out")
    assert words in message and "cifar-10-binary.tar.gz" in message and not (tmp_path / "out").exists()


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    """A wrong path is named."""
    message = refusal("cifar10", tmp_path / "nothing", tmp_path / "out")
    assert f"no such file or folder: {tmp_path}/nothing" in message and "cifar-10-binary.tar.gz" in message


# -------------------------------------------------------------------------------------------------- hostile archives


def test_an_archive_writes_nothing_by_itself(tmp_path: Path) -> None:
    """Members that lead out of a folder, links and devices change nothing anywhere; only known names are read."""
    evil: list[tuple[str, bytes | str]] = [
        ("../stolen", b"stolen"),
        (f"{tmp_path}/stolen", b"stolen"),
        ("cifar-10-batches-bin/link", "/etc/passwd"),
        *((f"../../{file}", content) for file, content in original("cifar10").items()),
    ]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(tar_of(evil))
    imported("cifar10", tmp_path / "in" / "a.tar", tmp_path / "in" / "out")
    assert sorted(os.listdir(tmp_path)) == ["in"] and sorted(os.listdir(tmp_path / "in")) == ["a.tar", "out"]
    assert sorted(os.listdir(tmp_path / "in" / "out")) == ["import.json", "train", "val"]


def test_a_link_is_no_data_file(tmp_path: Path) -> None:
    """A link by the name of a data file is not followed."""
    secret = write_folder(tmp_path / "secret", {"data_batch_1.bin": records("cifar10", "data_batch_1.bin")})
    files: dict[str, bytes | str] = dict(original("cifar10"))
    files["data_batch_1.bin"] = str(secret / "data_batch_1.bin")
    (tmp_path / "a.tar").write_bytes(tar_of(files.items()))
    assert "has no data_batch_1.bin" in refusal("cifar10", tmp_path / "a.tar", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    """Two members of one name leave open which is meant."""
    files = [*original("cifar10").items(), ("more/data_batch_3.bin", records("cifar10", "data_batch_1.bin"))]
    (tmp_path / "a.tar").write_bytes(tar_of(files))
    assert "data_batch_3.bin twice" in refusal("cifar10", tmp_path / "a.tar", tmp_path / "out")


# ------------------------------------------------------------------------------------------------------- the output


def test_an_output_with_something_else_is_refused(tmp_path: Path) -> None:
    """A folder with other files, the source itself, a file and another import's folder stay as they are."""
    source = source_of("folder", "cifar10", tmp_path)
    write_folder(tmp_path / "full", {"thesis.tex": b"work of years"})
    write_folder(tmp_path / "named" / "train" / "cat", {"1.png": b"picture"})
    write_folder(tmp_path / "foreign", {"import.json": b"{}"})
    (tmp_path / "file").write_bytes(b"")
    imported("cifar100", source_of("tar", "cifar100", tmp_path), tmp_path / "hundred")
    before = tree(tmp_path)
    for output, words in {
        "full": "such as thesis.tex",
        "named": "such as train",
        "bins": "something else",
        "foreign": "import.json of another import",
        "hundred": "import.json of another import",
        "file": "cannot write to",
    }.items():
        message = refusal("cifar10", source, tmp_path / output)
        assert words in message and str(tmp_path / output) in message and "choose" in message
    assert tree(tmp_path) == before


def test_other_images_of_the_same_data_set_are_another_import(tmp_path: Path) -> None:
    """A folder that was filled from one source takes nothing from another that differs by a single pixel."""
    imported("cifar10", source_of("folder", "cifar10", tmp_path), tmp_path / "out")
    before = tree(tmp_path / "out")
    other = with_byte(records("cifar10", "test_batch.bin"), 5000, 0)
    assert other != records("cifar10", "test_batch.bin")
    source = write_folder(tmp_path / "other", changed("cifar10", "test_batch.bin", other))
    assert "another import" in refusal("cifar10", source, tmp_path / "out")
    assert tree(tmp_path / "out") == before


def test_a_finished_import_is_left_alone(tmp_path: Path) -> None:
    """The same command again, from another place of the same images, rewrites nothing and says so."""
    imported("cifar10", source_of("folder", "cifar10", tmp_path), tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    said: list[str] = []
    imported("cifar10", source_of("tar.gz", "cifar10", tmp_path), tmp_path / "out", say=said.append)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == times
    assert all("there already" in line for line in said[:2])


def test_a_changed_split_is_not_taken_for_the_import(tmp_path: Path) -> None:
    """A split that lost or gained a file is named with the file; one that is gone is written again."""
    source = source_of("folder", "cifar10", tmp_path)
    imported("cifar10", source, tmp_path / "out")
    whole = tree(tmp_path / "out")
    lost = next((tmp_path / "out" / "val").rglob("*.png"))
    lost.unlink()
    message = refusal("cifar10", source, tmp_path / "out")
    assert str(lost.relative_to(tmp_path / "out" / "val")) in message and f"delete {tmp_path}/out/val" in message
    for path in sorted((tmp_path / "out" / "val").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (tmp_path / "out" / "val").rmdir()
    imported("cifar10", source, tmp_path / "out")
    assert tree(tmp_path / "out") == whole
    (tmp_path / "out" / "train" / "cat" / "one more.png").write_bytes(b"")
    assert "cat/one more.png" in refusal("cifar10", source, tmp_path / "out")


# --------------------------------------------------------------------------------------------------- interruptions


class Stop(BaseException):
    """Nobody catches it."""


@pytest.mark.parametrize("num_written", [0, 1, 149, 150, 179])
def test_an_interrupted_import_goes_on(tmp_path: Path, num_written: int) -> None:
    """Wherever it is interrupted, no split is there that is not whole, and the same command ends with the same bytes."""
    source = source_of("folder", "cifar10", tmp_path)
    imported("cifar10", source, tmp_path / "whole")
    left = num_written

    def track(items: Iterable[Any], _number: int, _what: str) -> Iterable[Any]:
        nonlocal left
        for item in items:
            if left == 0:
                raise Stop
            left -= 1
            yield item

    with pytest.raises(Stop):
        imported("cifar10", source, tmp_path / "out", track=track)
    for split, size in (("train", 150), ("val", 30)):
        there = tmp_path / "out" / split
        assert not there.exists() or len(list(there.rglob("*.png"))) == size
    assert (tmp_path / "out" / "train").exists() == (num_written >= 150)
    imported("cifar10", source, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path / "out")) == ["import.json", "train", "val"]


def test_a_killed_import_goes_on(tmp_path: Path) -> None:
    """A process that is killed outright between two images leaves no lock, and the same command goes on."""
    source = source_of("folder", "cifar10", tmp_path)
    script = f"""
import os, sys
from dataclasses import replace
from pathlib import Path
from imagenet_swa.data.cifar import DATASETS, DataFile
from imagenet_swa.data.prepare.cifar import ImportSettings, import_dataset
dataset = DATASETS["cifar10"]
splits = {{split: tuple(DataFile(file.name, {PER_FILE}) for file in files) for split, files in dataset.splits.items()}}
DATASETS["cifar10"] = replace(dataset, splits=splits)
def track(items, number, what):
    for count, item in enumerate(items):
        if count == 40:
            os.kill(os.getpid(), 9)
        yield item
import_dataset(ImportSettings(dataset="cifar10", source=Path({str(source)!r}), output=Path({str(tmp_path / "out")!r})), track)
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == -9
    assert sorted(os.listdir(tmp_path / "out")) == ["import.json", "train.partial"]
    imported("cifar10", source, tmp_path / "out")
    imported("cifar10", source, tmp_path / "whole")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_an_import_killed_at_its_very_start_goes_on(tmp_path: Path, share: float) -> None:
    """A manifest that is cut short, in a folder with nothing else, is one that was being written."""
    source = source_of("folder", "cifar10", tmp_path)
    imported("cifar10", source, tmp_path / "whole")
    manifest = (tmp_path / "whole" / "import.json").read_bytes()
    write_folder(tmp_path / "out", {"import.json": manifest[: int(share * len(manifest))]})
    imported("cifar10", source, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_two_imports_do_not_write_at_a_time(tmp_path: Path) -> None:
    """While one writes, another says so and leaves the folder to it."""
    source, messages = source_of("folder", "cifar10", tmp_path), []

    def track(items: Iterable[Any], _number: int, _what: str) -> Iterable[Any]:
        messages.append(refusal("cifar10", source, tmp_path / "out"))
        return items

    imported("cifar10", source, tmp_path / "out", track=track)
    assert len(messages) == 2 and all("another import is writing" in message for message in messages)
    assert len(list((tmp_path / "out").rglob("*.png"))) == 180


def test_a_full_disk_leaves_no_half_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an image cannot be written, the error comes out and the split does not get its name."""
    source = source_of("folder", "cifar10", tmp_path)
    save, count = Image.Image.save, iter(range(10**6))

    def full(image: Image.Image, *arguments: Any, **options: Any) -> None:
        if next(count) == 70:
            raise OSError(28, "No space left on device")
        save(image, *arguments, **options)

    monkeypatch.setattr(cifar.Image.Image, "save", full)
    with pytest.raises(OSError, match="No space left"):
        imported("cifar10", source, tmp_path / "out")
    assert not (tmp_path / "out" / "train").exists()
    imported("cifar10", source, tmp_path / "out")
    assert len(list((tmp_path / "out" / "train").rglob("*.png"))) == 150
