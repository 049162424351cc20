"""What `verify` finds, against what Pillow and DALI do with the very same files."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from conftest import preprocessing, write
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from imagenet_swa.config import Config, DataConfig, InputError, ModelConfig
from imagenet_swa.data import imagenet
from imagenet_swa.data.encoded import FORMATS
from imagenet_swa.data.findings import KINDS, UNDECODABLE, VerifyResult, tell
from imagenet_swa.data.index import ImageIndex, make_index
from imagenet_swa.data.index_cache import build_index, read_quarantine
from imagenet_swa.data.sources import Source, scan
from imagenet_swa.data.torch_loader import TorchvisionLoader
from imagenet_swa.data.verify import VerifySettings, _mapping, check_labels_and_counts, verify

if TYPE_CHECKING:
    from s3_server import Bucket

pytest_plugins = ["s3_server"]

QUICK, FULL = False, True


def pixels(height: int, width: int, seed: int = 0) -> Image.Image:
    smooth = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3)).astype(np.uint8)
    return Image.fromarray(smooth).resize((width, height))


def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_orientation(number: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    return encoded(pixels(60, 80, seed=20 + number), exif=exif)


def sixteen_bits() -> Image.Image:
    return Image.fromarray(np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16)


def with_large_exif() -> bytes:
    """A JPEG whose picture starts 60 kB into the file, as cameras' files do."""
    return encoded(pixels(60, 80, seed=7), comment=b"x" * 60_000)


GOOD = encoded(pixels(200, 240))
assert len(GOOD) > 5200  # more than what a quick look reads at once

# name: (content, kinds that are found; None where there is nothing to find)
FILES: dict[str, tuple[bytes, set[str]]] = {
    "good.jpg": (GOOD, set()),
    "large_exif.jpg": (with_large_exif(), set()),
    "empty.jpg": (b"", {"empty"}),
    "cut_in_header.jpg": (GOOD[:100], {"cut_short"}),
    "cut_after_magic.jpg": (GOOD[:2], {"cut_short"}),
    "cut_in_picture.jpg": (GOOD[: len(GOOD) * 2 // 3], {"cut_short"}),
    "cut_at_the_end.jpg": (encoded(pixels(200, 240, seed=2))[:-2], {"cut_short"}),
    "cut_and_padded.jpg": (GOOD[:4000] + bytes(5000), {"undecodable", "cut_short", "no_end"}),  # see the test
    "cut_png.png": (encoded(pixels(200, 240), "PNG")[:-3000], {"cut_short"}),
    "cut_webp.webp": (encoded(pixels(60, 80), "WEBP")[:-300], {"undecodable"}),
    "cut_bmp.bmp": (encoded(pixels(60, 80), "BMP")[:-300], {"cut_short"}),
    "cut_ppm.ppm": (encoded(pixels(60, 80), "PPM")[:-300], {"cut_short"}),
    "cut_tif.tif": (encoded(pixels(60, 80), "TIFF")[:-300], {"cut_short", "not_an_image"}),
    "page.jpg": (b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>", {"not_an_image"}),
    "text.jpg": (b"This image is no longer available.\n" * 300, {"not_an_image"}),
    "noise.jpg": (np.random.default_rng(1).bytes(9000), {"not_an_image"}),
    "leading_garbage.jpg": (b"\0\0\0\0" + GOOD, {"not_an_image"}),
    "gif.jpg": (encoded(pixels(60, 80), "GIF"), {"refused_format"}),
    "jpeg2000.jpg": (encoded(pixels(60, 80), "JPEG2000"), {"refused_format"}),
    "icon.png": (encoded(pixels(64, 64), "ICO", sizes=[(64, 64)]), {"refused_format"}),
    "really_a.JPEG": (encoded(pixels(60, 80, seed=3), "PNG"), {"other_format"}),
    "really_webp.jpg": (encoded(pixels(60, 80, seed=3), "WEBP"), {"other_format"}),
    "as_png.png": (encoded(pixels(200, 240, seed=4), "PNG"), set()),
    "as_webp.webp": (encoded(pixels(60, 80, seed=4), "WEBP"), set()),
    "as_bmp.bmp": (encoded(pixels(60, 80, seed=4), "BMP"), set()),
    "as_ppm.ppm": (encoded(pixels(60, 80, seed=4), "PPM"), set()),
    "as_tif.tif": (encoded(pixels(60, 80, seed=4), "TIFF"), set()),
    "grey.jpg": (encoded(pixels(60, 80, seed=5).convert("L")), {"grey"}),
    "cmyk.jpg": (encoded(pixels(60, 80, seed=5).convert("CMYK")), {"cmyk"}),
    "palette.png": (encoded(pixels(60, 80, seed=5).convert("P"), "PNG"), {"palette"}),
    "transparent.png": (encoded(pixels(60, 80, seed=5).convert("RGBA"), "PNG"), {"transparent"}),
    "black_and_white.png": (encoded(pixels(60, 80, seed=5).convert("1"), "PNG"), {"grey"}),
    "sixteen.png": (encoded(sixteen_bits(), "PNG"), {"grey", "sixteen_bits"}),
    "progressive.jpg": (encoded(pixels(200, 240, seed=6), progressive=True), {"progressive"}),
    "upright.jpg": (with_orientation(1), set()),
    "turned.jpg": (with_orientation(6), {"turned"}),
    "mirrored.jpg": (with_orientation(2), {"turned"}),
    "small.jpg": (encoded(pixels(31, 80, seed=8)), {"small"}),
    "not_small.jpg": (encoded(pixels(32, 80, seed=8)), set()),
    "narrow.jpg": (encoded(pixels(401, 40, seed=8)), {"narrow"}),
    "not_narrow.jpg": (encoded(pixels(400, 40, seed=8)), set()),
    "large.png": (encoded(Image.new("L", (10_001, 40)), "PNG"), {"large", "grey", "narrow"}),
    "not_large.png": (encoded(Image.new("RGB", (10_000, 1000)), "PNG"), set()),
    "trailing.jpg": (encoded(pixels(60, 80, seed=9)) + b"\0" * 7, {"trailing_bytes"}),
    "long_trail.jpg": (encoded(pixels(200, 240, seed=10)) + b"\n" * 6000, {"trailing_bytes"}),
    "trailing_png.png": (encoded(pixels(60, 80, seed=9), "PNG") + b"\0" * 7, {"trailing_bytes"}),
    "no_end.png": (encoded(pixels(60, 80, seed=11), "PNG")[:-12], {"cut_short"}),
}
NAMES = sorted(FILES)


def decodes(data: bytes) -> bool:
    """Whether the torchvision loader's own calls bring an image's pixels about; DALI wants a PNG's end marker too."""
    if data.startswith(b"\x89PNG") and b"IEND\xaeB`\x82" not in data:
        return False
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            file.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False
    return True


def config_of(train: Path | str, val: Path | str, *, num_classes: int = 1, **data: object) -> Config:
    chosen = DataConfig(train=str(train), val=str(val), **data)  # pyright: ignore[reportArgumentType]
    return Config(data=chosen, model=ModelConfig(num_classes=num_classes))


def quiet(_line: str) -> None:
    """No output."""


def look(config: Config, output: Path, full: bool = QUICK, num_workers: int = 0) -> VerifyResult:
    return verify(config, VerifySettings(full=full, output=output, num_workers=num_workers), say=quiet)


def kinds_of(result: VerifyResult, split: str) -> dict[str, set[str]]:
    """What was found for each name."""
    kinds: dict[str, set[str]] = {}
    for finding in result.findings.values():
        if finding.split == split:
            for name, _ in finding.examples:
                kinds.setdefault(name, set()).add(finding.kind)
    return kinds


def one_good(tmp_path: Path) -> Path:
    return write(tmp_path / "one_good", {"ant/only.jpg": encoded(pixels(50, 50, seed=99))})


def as_folder(root: Path) -> dict[str, Any]:
    write(root, {f"ant/{name}": content for name, (content, _) in FILES.items()})
    return {"train": str(root)}


def as_list(root: Path) -> dict[str, Any]:
    write(root, {f"ant/{name}": content for name, (content, _) in FILES.items()})
    (root / "list.txt").write_text("".join(f"ant/{name} 0\n" for name in NAMES))
    return {"train": str(root), "train_list": str(root / "list.txt")}


def as_shards(root: Path) -> dict[str, Any]:
    root.mkdir(parents=True)
    for shard in range(3):
        with tarfile.open(root / f"train-{shard}.tar", "w") as tar:
            for name in NAMES[shard::3]:
                for member, content in ((f"ant/{name}", FILES[name][0]), (f"ant/{name.partition('.')[0]}.cls", b"0")):
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return {"train": str(root)}


# ------------------------------------------------------------------------------------------------- every kind of image


@pytest.mark.parametrize("full", [QUICK, FULL], ids=["quick", "full"])
@pytest.mark.parametrize("arrange", [as_folder, as_list, as_shards])
def test_every_kind_of_file_is_told(tmp_path: Path, arrange: Callable[[Path], dict[str, Any]], full: bool):
    """Of every file exactly that is said which is odd about it, from folders, lists and shards, read in part or decoded."""
    data = arrange(tmp_path / "train")
    result = look(config_of(val=one_good(tmp_path), **data), tmp_path / "out", full)
    found = kinds_of(result, "train")
    for name, (content, wanted) in FILES.items():
        about = found.get(f"ant/{name}", set()) - {"duplicates", "listed_twice"}
        if name in ("cut_and_padded.jpg", "cut_tif.tif"):  # what becomes of these is the decoder's choice
            assert about
            assert about <= wanted, name
        else:
            assert about == wanted, name
        assert bool(about & set(UNDECODABLE)) == (not decodes(content)), name
    assert dict(result.findings["train", "trailing_bytes"].examples) == {
        "ant/trailing.jpg": "7 bytes",
        "ant/trailing_png.png": "7 bytes",
        "ant/long_trail.jpg": "6,000 bytes",
    }
    assert not result.healthy
    assert result.summaries["train"]["images"] == len(FILES)
    assert sum(result.summaries["train"]["formats"].values()) == sum(decodes(content) for content, _ in FILES.values())


@pytest.mark.parametrize("full", [QUICK, FULL], ids=["quick", "full"])
def test_the_quarantine_list_names_what_cannot_be_decoded(tmp_path: Path, full: bool):
    """Decoding fails for every image of the list and for no other; without the listed ones a loader meets no error."""
    data = as_folder(tmp_path / "train")
    config = config_of(val=one_good(tmp_path), **data)
    look(config, tmp_path / "out", full)
    listed = read_quarantine(tmp_path / "out" / "quarantine.tsv", "train")
    assert sorted(listed) == sorted(f"ant/{name}".encode() for name in NAMES if not decodes(FILES[name][0]))
    assert read_quarantine(tmp_path / "out" / "quarantine.tsv", "val") == []
    index = scan(Source("train", data["train"]), num_classes=1)[0].without(listed)
    assert len(index) == sum(decodes(content) for content, _ in FILES.values())
    loader = TorchvisionLoader(
        index, preprocessing(), seed=0, device=torch.device("cpu"), num_workers=0, prefetch=2, channels_last=False
    )
    seen = [batch.indices for batch in loader.evaluation_stream([np.array([i]) for i in range(len(index))])]
    assert len(np.concatenate(seen)) == len(index)


def test_dali_decodes_what_is_not_listed():
    """DALI's decoder takes every image that the quarantine list leaves."""
    fn = pytest.importorskip("nvidia.dali.fn")
    from nvidia.dali.pipeline import Pipeline

    good = [np.frombuffer(content, np.uint8) for content, kinds in FILES.values() if decodes(content) and "large" not in kinds]
    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None)
    with pipeline:
        pipeline.set_outputs(fn.decoders.image(fn.external_source(source=[[image] for image in good], cycle=False)))
    pipeline.build()
    shapes = [pipeline.run()[0][0].shape() for _ in good]
    assert len(shapes) == len(good)
    assert min(min(shape) for shape in shapes) > 0


CUT = {
    "jpeg": GOOD,
    "progressive": encoded(pixels(60, 80), progressive=True),
    "png": encoded(pixels(60, 80), "PNG"),
    "bmp": encoded(pixels(60, 80), "BMP"),
}


@settings(deadline=None, max_examples=80)
@given(data=st.data())
def test_a_file_cut_anywhere(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    """Cut after any byte, zeros in place of the rest or not, a file is listed if and only if Pillow (DALI, for PNG) fails."""
    original = CUT[data.draw(st.sampled_from(sorted(CUT)))]
    length = data.draw(st.integers(0, len(original)) | st.integers(len(original) - 20, len(original)))
    padding = data.draw(st.sampled_from([0, 0, 1, 2000]))
    content = original[:length] + bytes(padding)
    root = tmp_path_factory.mktemp("cut")
    train = write(root / "train", {"ant/x.jpg": content})
    result = look(config_of(train, one_good(root)), root / "out")
    assert (bool(result.quarantine), result.healthy) == (not decodes(content), decodes(content))


def test_a_quick_look_reads_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of good JPEGs of any length, of the same length too, a quick look reads a few KiB each; a full one reads all."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 900, 3)).astype(np.uint8))
    contents = [encoded(noise, comment=comment) for comment in (b"one", b"two")]
    assert len(contents[0]) == len(contents[1])
    train = write(tmp_path / "train", {"ant/a.jpg": contents[0], "ant/b.jpg": contents[1]})
    read: list[int] = []
    original = os.pread
    monkeypatch.setattr(os, "pread", lambda *arguments: read.append(len(part := original(*arguments))) or part)
    look(config_of(train, one_good(tmp_path)), tmp_path / "out")
    quick, read[:] = sum(read), []
    look(config_of(train, one_good(tmp_path)), tmp_path / "out", FULL)
    assert quick < 3 * 8192 < 2 * len(contents[0]) <= sum(read)


@pytest.mark.parametrize("full", [QUICK, FULL], ids=["quick", "full"])
def test_s3_is_told_as_local_files_are(tmp_path: Path, bucket: "Bucket", full: bool):
    """Shards and a list in S3 give the findings and the quarantine list of the same files here; a missing object is named."""
    local = as_list(tmp_path / "train")
    as_shards(tmp_path / "shards")
    here = look(config_of(val=one_good(tmp_path), **local), tmp_path / "here", full)
    prefix, shards = bucket.put_folder(tmp_path / "train", "files"), bucket.put_folder(tmp_path / "shards", "shards")
    listed = bucket.put("list.txt", Path(local["train_list"]).read_bytes() + b"ant/gone.jpg 0\n")
    remote: list[dict[str, Any]] = [{"train": prefix, "train_list": listed}, {"train": shards}]
    for number, data in enumerate(remote):
        there = look(config_of(val=one_good(tmp_path), **data), tmp_path / f"there{number}", full)
        gone = [entry for entry in there.quarantine if entry[1] == "ant/gone.jpg"]
        assert gone == ([("train", "ant/gone.jpg", "missing: no such file or object")] if "train_list" in data else [])
        assert sorted(entry for entry in there.quarantine if entry not in gone) == sorted(here.quarantine)
        kinds = {name: found - {"missing"} for name, found in kinds_of(there, "train").items()}
        for name, found in kinds_of(here, "train").items():
            assert kinds[name] == found, name


# ------------------------------------------------------------------------------------------- missing, changed, unreadable


def test_missing_files_of_a_list(tmp_path: Path):
    """Every image that a list names and that is not there is found and put into quarantine, not the first alone."""
    train = write(tmp_path / "train", {"a.jpg": GOOD})
    (tmp_path / "list.txt").write_text("gone.jpg 0\na.jpg 0\nalso/gone.jpg 0\n")
    config = config_of(train, one_good(tmp_path), train_list=str(tmp_path / "list.txt"))
    result = look(config, tmp_path / "out")
    assert kinds_of(result, "train") == {"gone.jpg": {"missing"}, "also/gone.jpg": {"missing"}}
    assert read_quarantine(tmp_path / "out" / "quarantine.tsv", "train") == [b"gone.jpg", b"also/gone.jpg"]


def test_a_link_to_nothing(tmp_path: Path):
    """A dangling link in a class folder is a missing image."""
    train = write(tmp_path / "train", {"ant/a.jpg": GOOD})
    (train / "ant" / "b.jpg").symlink_to(tmp_path / "nowhere.jpg")
    result = look(config_of(train, one_good(tmp_path)), tmp_path / "out")
    assert kinds_of(result, "train") == {"ant/b.jpg": {"missing"}}


def test_what_cannot_be_read_is_no_case_for_quarantine(tmp_path: Path):
    """A link to itself, as a missing right or a bad disk, is an error whose remedy is not to leave images out."""
    train = write(tmp_path / "train", {"a.jpg": GOOD})
    (train / "b.jpg").symlink_to(train / "b.jpg")
    (tmp_path / "list.txt").write_text("a.jpg 0\nb.jpg 0\n")
    result = look(config_of(train, one_good(tmp_path), train_list=str(tmp_path / "list.txt")), tmp_path / "out")
    assert kinds_of(result, "train") == {"b.jpg": {"unreadable"}}
    assert "symbolic links" in result.findings["train", "unreadable"].examples[0][1]
    assert not result.healthy
    assert result.quarantine == []


def test_a_file_that_changed_since_it_was_indexed(tmp_path: Path):
    """Another size than the index says is an error, as it is in training; the image is looked at all the same."""
    train = write(tmp_path / "train", {"ant/a.jpg": GOOD, "ant/b.jpg": GOOD})
    build_index(Source("train", str(train)), None, num_classes=1)
    (train / "ant" / "b.jpg").write_bytes(FILES["grey.jpg"][0])
    result = look(config_of(train, one_good(tmp_path)), tmp_path / "out")
    assert kinds_of(result, "train") == {"ant/b.jpg": {"changed", "grey"}}
    assert not result.healthy
    assert result.quarantine == []


def test_an_index_older_than_the_data(tmp_path: Path):
    """Names that changed since the index was built are an error; the images are listed anew and looked at."""
    train = write(tmp_path / "train", {"ant/a.jpg": GOOD})
    build_index(Source("train", str(train)), None, num_classes=1)
    write(train, {"ant/b.jpg": b""})
    result = look(config_of(train, one_good(tmp_path)), tmp_path / "out")
    assert result.count("stale_index", "train") == 1
    assert kinds_of(result, "train")["ant/b.jpg"] == {"empty"}


def test_a_split_that_cannot_be_listed_does_not_hide_the_other(tmp_path: Path):
    """A missing folder is an error of its split; the other is looked at, and the results are written."""
    val = write(tmp_path / "val", {"ant/a.jpg": b""})
    result = look(config_of(tmp_path / "nowhere", val), tmp_path / "out")
    assert result.count("unusable", "train") == 1
    assert result.count("empty", "val") == 1
    assert "no such folder" in (tmp_path / "out" / "verify.md").read_text()


def test_all_broken_shards_are_named(tmp_path: Path):
    """Each shard that cannot be indexed is an error with its own reason."""
    as_shards(tmp_path / "train")
    shards = sorted((tmp_path / "train").iterdir())
    shards[0].write_bytes(shards[0].read_bytes()[:5000])
    shards[2].write_bytes(b"<html>")
    result = look(config_of(tmp_path / "train", one_good(tmp_path)), tmp_path / "out")
    assert [name for name, _ in result.findings["train", "unusable"].examples] == [str(shards[0]), str(shards[2])]


# ------------------------------------------------------------------------------------------------------- duplicates


@pytest.mark.parametrize("full", [QUICK, FULL], ids=["quick", "full"])
@settings(deadline=None, max_examples=15)
@given(train=st.lists(st.integers(0, 5), min_size=1, max_size=6), val=st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_copies_are_found(tmp_path_factory: pytest.TempPathFactory, full: bool, train: list[int], val: list[int]):
    """Of files with the same bytes, each after the first in a split is a duplicate, each of val that train has is a leak."""
    middle = bytearray(GOOD)
    middle[len(GOOD) // 2] ^= 1  # same length, same first and last bytes
    contents = [GOOD, bytes(middle), FILES["grey.jpg"][0], FILES["as_png.png"][0], b"no image", GOOD + b"\0"]
    root = tmp_path_factory.mktemp("copies")
    for split, chosen in (("train", train), ("val", val)):
        write(root / split, {f"ant/{number}.jpg": contents[which] for number, which in enumerate(chosen)})
    result = look(config_of(root / "train", root / "val"), root / "out", full)
    hashes = {split: [hashlib.sha256(contents[k]).digest() for k in chosen] for split, chosen in (("train", train), ("val", val))}
    for split, found in hashes.items():
        repeated = {f"ant/{i}.jpg" for i, digest in enumerate(found) if digest in found[:i]}
        assert {name for name, kinds in kinds_of(result, split).items() if "duplicates" in kinds} == repeated
    leaked = {f"ant/{i}.jpg" for i, digest in enumerate(hashes["val"]) if digest in hashes["train"]}
    assert set(kinds_of(result, "train and val")) - {str(root / "val"), str(root / "train")} == leaked
    assert result.count("mostly_leaked") == (len(leaked) > len(val) / 2)
    assert result.count("leak") == len(leaked)


def test_copies_alone_do_not_fail(tmp_path: Path):
    """A leak is a warning and a copy a note: training does not stumble over either; missing and empty files are no copies."""
    train = write(tmp_path / "train", {"ant/a.jpg": GOOD, "ant/b.jpg": GOOD})
    val = write(tmp_path / "val", {"ant/c.jpg": GOOD, "ant/d.jpg": FILES["grey.jpg"][0]})
    result = look(config_of(train, val), tmp_path / "out")
    assert result.healthy
    assert (result.count("duplicates"), result.count("leak")) == (1, 1)
    write(train, {"ant/a.jpg": b"", "ant/b.jpg": b""})
    assert look(config_of(train, val), tmp_path / "out").count("duplicates") == 0


@pytest.mark.parametrize(("num_shared", "healthy"), [(2, True), (3, False)])
def test_a_validation_set_that_is_mostly_train_is_an_error(tmp_path: Path, num_shared: int, healthy: bool):
    """Where more than half of val is in train too, accuracies mean nothing, and the result is not healthy."""
    own = {f"ant/{i}.jpg": encoded(pixels(40, 40, seed=i)) for i in range(4)}
    others = {f"ant/{i}.jpg": encoded(pixels(40, 40, seed=10 + i)) for i in range(num_shared, 4)}
    train, val = write(tmp_path / "train", own | others), write(tmp_path / "val", own)
    result, lines = look(config_of(train, val), tmp_path / "out"), list[str]()
    assert result.healthy is healthy
    tell(result, tmp_path / "out", lines.append)
    told = any(f"{val} has {num_shared} of its 4 images in train too; set data.val" in line for line in lines)
    assert told is not healthy


def test_copies_with_two_labels(tmp_path: Path):
    """Copies in two classes are said to have two labels."""
    train = write(tmp_path / "train", {"ant/a.jpg": GOOD, "bee/b.jpg": GOOD})
    val = write(tmp_path / "val", {"ant/c.jpg": FILES["turned.jpg"][0], "bee/d.jpg": FILES["grey.jpg"][0]})
    result = look(config_of(train, val, num_classes=2), tmp_path / "out")
    assert result.findings["train", "duplicates"].examples == [("bee/b.jpg", "the same as ant/a.jpg, with label 1 and 0")]


# ------------------------------------------------------------------------------------------------- labels and counts


def imagenet_like(counts: Iterable[int], split: str, named: str = "{synset}/{synset}_{i}.JPEG") -> ImageIndex:
    """An index that has, without any files, so many images of each class."""
    counts = list(counts)
    synsets = imagenet.synsets()
    names = [named.format(synset=synsets[c], i=i, c=c).encode() for c in range(len(counts)) for i in range(counts[c])]
    labels = np.repeat(np.arange(len(counts)), counts)
    return make_index(split, names, labels, np.ones(len(labels), np.int64), synsets if all(counts) else None)


def counted(index: ImageIndex, split: str, num_classes: int = 1000) -> VerifyResult:
    result = VerifyResult(full=False)
    check_labels_and_counts({split: index}, num_classes, result)
    return result


def test_whole_validation_set():
    """50 images of each class are ImageNet's; one more or less anywhere is an error with the class's name."""
    assert counted(imagenet_like([50] * 1000, "val"), "val").findings == {}
    for change in (-1, 1):
        result = counted(imagenet_like([50] * 7 + [50 + change] + [50] * 992, "val"), "val")
        examples = result.findings["val", "wrong_count"].examples
        assert examples[0] == ("val", f"{50_000 + change:,} images, ImageNet-1k has 50,000")
        assert examples[1:] == [(imagenet.synsets()[7], f"{50 + change} images of class 7, wanted 50")]
        assert not result.healthy
    moved = counted(imagenet_like([51, 49] + [50] * 998, "val"), "val")
    assert moved.count("wrong_count") == 2


def test_whole_training_set():
    """1,281,167 images with 732 to 1,300 of each class are ImageNet's; other numbers are errors."""
    counts = [1300] * 1000
    surplus = 1300 * 1000 - imagenet.NUM_TRAIN
    for label in range(1000):
        counts[label] -= (taken := min(surplus, 568))
        surplus -= taken
    short = "{c}/{i}"
    assert sum(counts) == imagenet.NUM_TRAIN
    assert counted(imagenet_like(counts, "train", short), "train").findings == {}
    counts[-1], counts[0] = 1301, counts[0] - 1
    result = counted(imagenet_like(counts, "train", short), "train")
    assert [name for name, _ in result.findings["train", "wrong_count"].examples] == [imagenet.synsets()[k] for k in (0, 999)]


def test_a_part_of_imagenet_is_noted():
    """Fewer images or classes, given by a list, are a note, no error; another number of classes is nothing to compare."""
    for counts in ([5] * 1000, [50] * 999 + [0], [0, 3]):
        result = counted(imagenet_like(counts, "val"), "val")
        if all(counts):
            assert {kind for _, kind in result.findings} == {"subset"}
        assert result.healthy
        assert result.count("subset") == 1
    assert counted(make_index("x", [b"a"], [1], [1]), "val", num_classes=10).findings == {}


def test_labels_that_contradict_names():
    """A label that is not its name's WordNet id's is an error, in folders' and files' names; other names say nothing."""
    first, second = imagenet.synsets()[:2]
    names = [f"{first}/a.jpg", f"train/{second}_7.JPEG", f"{second}.jpg", f"x{first}/a.jpg", "n99999999/a.jpg", f"{first}/b.jpg"]
    index = make_index("x", [name.encode() for name in names], [1, 0, 0, 5, 5, 0], [1] * 6)
    result = counted(index, "train")
    assert result.findings["train", "wrong_label"].examples == [
        (names[0], "has label 1, its name says 0"),
        (names[1], "has label 0, its name says 1"),
    ]


def test_classes_that_cannot_be_right(tmp_path: Path):
    """Folders that are not the network's classes, and splits with different folders, are errors."""
    train = write(tmp_path / "train", {"ant/a.jpg": GOOD, "bee/a.jpg": FILES["turned.jpg"][0]})
    val = write(tmp_path / "val", {"ant/a.jpg": FILES["grey.jpg"][0], "cat/a.jpg": FILES["cmyk.jpg"][0]})
    result = look(config_of(train, val, num_classes=3), tmp_path / "out")
    assert [split for split, kind in result.findings if kind == "classes"] == ["train", "val", "train and val"]
    assert not result.healthy


def test_a_name_twice_in_a_list(tmp_path: Path):
    """An image that a list names twice is noted with how often."""
    train = write(tmp_path / "train", {"a.jpg": GOOD})
    (tmp_path / "list.txt").write_text("a.jpg 0\na.jpg 0\n")
    result = look(config_of(train, one_good(tmp_path), train_list=str(tmp_path / "list.txt")), tmp_path / "out")
    assert result.findings["train", "listed_twice"].examples == [("a.jpg", "2 times")]


# ------------------------------------------------------------------------------------------------- quarantine, results


def test_with_its_own_quarantine_nothing_is_wrong(tmp_path: Path):
    """With data.quarantine set to the list, the same images are noted, not errors; the list stays the same."""
    data = as_folder(tmp_path / "train")
    look(config_of(val=one_good(tmp_path), **data), tmp_path / "out")
    before = (tmp_path / "out" / "quarantine.tsv").read_bytes()
    config = config_of(val=one_good(tmp_path), quarantine=tmp_path / "out" / "quarantine.tsv", **data)
    result = look(config, tmp_path / "out")
    assert result.healthy
    assert result.count("quarantined") == sum(not decodes(content) for content, _ in FILES.values())
    assert (tmp_path / "out" / "quarantine.tsv").read_bytes() == before
    assert result.count("needless_quarantine") == 0


def test_members_of_one_name_in_several_shards(tmp_path: Path):
    """Of members with one name in several shards only the bad ones are listed, left out, and known when listed again."""
    contents = [GOOD, b"no image", FILES["grey.jpg"][0], b""]
    for number, content in enumerate(contents):
        (tmp_path / "shards").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / f"shards/s-{number}.tar", "w") as tar:
            for name, data in (("0.jpg", content), ("0.cls", b"0")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    config = config_of(tmp_path / "shards", one_good(tmp_path))
    result = look(config, tmp_path / "out")
    assert [name for _, name, _ in result.quarantine] == ["s-1.tar:0.jpg", "s-3.tar:0.jpg"]
    assert result.count("listed_twice") == 0
    index, _ = scan(Source("train", str(tmp_path / "shards")), num_classes=1)
    rest = index.without(read_quarantine(tmp_path / "out/quarantine.tsv", "train"))
    assert [rest.read(i) for i in range(len(rest))] == [contents[0], contents[2]]
    data = replace(config.data, quarantine=tmp_path / "out/quarantine.tsv")
    again = look(replace(config, data=data), tmp_path / "again")
    assert again.healthy
    assert (again.count("quarantined"), again.count("needless_quarantine")) == (2, 0)


def test_needless_quarantine(tmp_path: Path):
    """Images that the quarantine list leaves out though they are good or not there are noted."""
    train = write(tmp_path / "train", {"ant/a.jpg": GOOD, "ant/b.jpg": FILES["turned.jpg"][0]})
    (tmp_path / "list.tsv").write_text("train\tant/a.jpg\tugly\ntrain\tant/gone.jpg\t\nval\tant/a.jpg\n")
    result = look(config_of(train, one_good(tmp_path), quarantine=tmp_path / "list.tsv"), tmp_path / "out")
    assert result.healthy
    assert set(kinds_of(result, "train")) - {"ant/b.jpg"} == {"ant/a.jpg", "ant/gone.jpg"}
    assert result.count("needless_quarantine", "train") == 2


def test_names_of_any_bytes(tmp_path: Path):
    """Bad images with any names are listed, ones that are not UTF-8 by their bytes, and the list leaves them all out."""
    folder = os.fsencode(tmp_path / "train" / "ant")
    (tmp_path / "train" / "ant").mkdir(parents=True)
    for name in (b"\xff\xfe.jpg", b"tab\there.jpg", "été.jpg".encode()):
        with open(folder + b"/" + name, "wb"):  # noqa: PTH123 - a path of bytes
            pass
    result = look(config_of(tmp_path / "train", one_good(tmp_path)), tmp_path / "out")
    listed = read_quarantine(tmp_path / "out" / "quarantine.tsv", "train")
    assert listed == [b"ant/tab%09here.jpg", "ant/été.jpg".encode(), b"ant/\xff\xfe.jpg"]
    config = config_of(tmp_path / "train", one_good(tmp_path), quarantine=tmp_path / "out" / "quarantine.tsv")
    assert look(config, tmp_path / "again").count("quarantined") == 3
    index, _ = scan(Source("train", str(tmp_path / "train")), num_classes=1)
    assert len(index.without(listed)) == 0
    assert result.count("empty") == 3
    json.loads((tmp_path / "out" / "verify.json").read_text())


def test_processes_change_nothing(tmp_path: Path):
    """Worker processes and this process alone write the same files to the last byte, in the order of the index."""
    data = as_folder(tmp_path / "train")
    config = config_of(val=one_good(tmp_path), **data)
    for workers in (0, 2):
        result = look(config, tmp_path / f"out{workers}", FULL, workers)
        assert [name for _, name, _ in result.quarantine] == sorted(name for _, name, _ in result.quarantine)
    for name in ("quarantine.tsv", "verify.json", "verify.md"):
        assert (tmp_path / "out0" / name).read_bytes() == (tmp_path / "out2" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "out2").iterdir()) == ["quarantine.tsv", "verify.json", "verify.md"]


def test_a_worker_that_dies():
    """A worker process that the system kills ends the command with one line, not with a trace."""
    function: Any = os._exit
    tasks: Any = [1]
    with pytest.raises(InputError, match="died, perhaps for want of memory; set verify"), _mapping(1) as mapping:
        list(mapping(function, tasks))


def test_one_split_alone(tmp_path: Path):
    """A split that is not named is not looked at, and not missed."""
    write(tmp_path / "data", {"ant/a.jpg": GOOD, "ant/b.jpg": b""})
    for split in ("train", "val"):
        data = DataConfig(**{split: str(tmp_path / "data")})  # pyright: ignore[reportArgumentType]
        result = look(Config(data=data, model=ModelConfig(num_classes=1)), tmp_path / "out")
        assert list(result.summaries) == [split]
        assert {finding.split for finding in result.findings.values()} == {split}
        assert [entry[:2] for entry in result.quarantine] == [(split, "ant/b.jpg")]


def test_a_statement_about_a_split_has_no_count(tmp_path: Path):
    """What is said of a split as a whole is said without a number of cases; small data are told in MB."""
    result = VerifyResult(full=False)
    result.add("train", "subset", "p/train", "154 images of 1,281,167")
    result.add("train", "grey", "a.jpg")
    result.summaries["train"] = {"images": 154, "classes": 3, "bytes": 12_345_678}
    lines: list[str] = []
    tell(result, tmp_path, lines.append)
    assert lines[0] == "train: 154 images, 3 classes, 12.3 MB"
    assert "[note] train: not the whole of ImageNet-1k: p/train 154 images of 1,281,167" in lines
    assert "[note] train: grey images: 1, the first is a.jpg" in lines


KILLED = """
import os, signal
from pathlib import Path
from imagenet_swa.config import Config, DataConfig, ModelConfig
from imagenet_swa.data.verify import VerifySettings, verify

def killed(items, number, what):
    for item in items:
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    config = Config(data=DataConfig(train="{train}"), model=ModelConfig(num_classes=1))
    verify(config, VerifySettings(output=Path("{output}"), num_workers=2), track=lambda items, number, what: (
        killed(items, number, what) if "hundreds" in what else items))
"""


def test_workers_end_with_a_killed_command(tmp_path: Path):
    """After kill -9 of the command no process of its session is left."""
    train = write(tmp_path / "train", {"ant/a.jpg": GOOD})
    script = tmp_path / "script.py"
    script.write_text(KILLED.format(train=train, output=tmp_path / "out"))
    process = subprocess.Popen([sys.executable, script], start_new_session=True)
    assert process.wait(timeout=60) == -signal.SIGKILL
    deadline = time.monotonic() + 20
    with pytest.raises(ProcessLookupError):
        while True:
            os.killpg(process.pid, 0 if time.monotonic() < deadline else signal.SIGKILL)
            assert time.monotonic() < deadline, "workers outlived the process that started them"
            time.sleep(0.1)


def test_what_is_written_and_said(tmp_path: Path):
    """The JSON has every finding with its count and names, the report and the terminal a line for each, errors first."""
    data, lines = as_folder(tmp_path / "train"), []
    settings = VerifySettings(output=tmp_path / "out", num_workers=0)
    result = verify(config_of(val=one_good(tmp_path), **data), settings, say=lines.append)
    about = json.loads((tmp_path / "out" / "verify.json").read_text())
    report = (tmp_path / "out" / "verify.md").read_text()
    assert [(f["kind"], f["count"]) for f in about["findings"]] == [(f.kind, f.count) for f in result.ordered()]
    assert about["num_quarantined"] == sum(not decodes(content) for content, _ in FILES.values())
    assert about["healthy"] is False
    for finding in result.ordered():
        assert f"- {finding.split}: {KINDS[finding.kind][1]}: {finding.count}" in report
        assert finding.examples[0][0] in report
    severities = [line.split("]")[0][1:] for line in lines if line.startswith("[")]
    assert severities == sorted(severities, key=["error", "warning", "note"].index)
    assert any(line.startswith("quarantine: ") and "quarantine.tsv" in line for line in lines)


def test_made_up_images_and_nothing_at_all_are_refused(tmp_path: Path):
    """Without data there is nothing to verify, and a folder that cannot be made is named."""
    for data, words in (
        (DataConfig(synthetic=True), "data.synthetic is set"),
        (DataConfig(), "^no images to verify: set data.train, data.val, or both$"),
    ):
        with pytest.raises(InputError, match=words):
            look(Config(data=data), tmp_path / "out")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot make the folder"):
        look(config_of(one_good(tmp_path), one_good(tmp_path)), tmp_path / "file" / "out")
    with pytest.raises(InputError, match=r"verify\.num_workers must be 0 or more"):
        VerifySettings(num_workers=-1)


@pytest.mark.realdata
@pytest.mark.parametrize("full", [QUICK, FULL], ids=["quick", "full"])
def test_real_images_are_good(real_data: Path, tmp_path: Path, full: bool):
    """Among real ImageNet images nothing is wrong; grey and turned ones are those that Pillow says are."""
    lists = {f"{split}_list": str(real_data / f"{split}.txt") for split in ("train", "val")}
    config = config_of(real_data / "train", real_data / "val", num_classes=1000, **lists)
    result = look(config, tmp_path / "out", full)
    assert result.healthy
    assert result.quarantine == []
    wanted: dict[str, int] = {"grey": 0, "turned": 0}
    for path in [*(real_data / "train").rglob("*.JPEG"), *(real_data / "val").rglob("*.JPEG")]:
        with Image.open(path) as image:
            wanted["grey"] += image.mode == "L"
            wanted["turned"] += (image._getexif() or {}).get(0x0112, 1) in range(2, 9)  # pyright: ignore[reportAttributeAccessIssue]
    assert {kind: result.count(kind) for kind in wanted} == wanted
