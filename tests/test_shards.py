"""Tar shards: which of a folder belong to a split, patterns with folders, and members that no loader could read."""

import os
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from test_sources import FORMATS, WANTED, as_shards, contents_of, index_of, one_line, write_tar

from imagenet_swa.data.shards import names_of_shards, root_of_pattern
from imagenet_swa.data.sources import Source, scan, what_changed

if TYPE_CHECKING:
    from s3_server import Bucket

pytest_plugins = ["s3_server"]

Members = list[tuple[str, bytes]]


def one_image(label: int) -> Members:
    return [(f"{label}.jpg", b"x" * (label + 1)), (f"{label}.cls", b"%d" % label)]


# ----------------------------------------------------------------------------------------------------- of which split


def both_splits(folder: Path) -> None:
    for shard in range(2):
        write_tar(folder / f"imagenet1k-train-{shard}.tar", one_image(shard))
        write_tar(folder / f"imagenet1k-validation-{shard}.tar", one_image(5 + shard))


def test_a_folder_of_both_splits_gives_each_its_own(tmp_path: Path, bucket: "Bucket"):
    """Of shards named for train and validation in one folder or prefix each split has its own, and only those."""
    both_splits(tmp_path)
    for path in (str(tmp_path), bucket.put_folder(tmp_path, "wds"), bucket.url + "/wds/"):
        assert index_of(Source("train", path), 10).labels.tolist() == [0, 1]
        assert index_of(Source("val", path), 10).labels.tolist() == [5, 6]


def test_a_folder_of_the_other_split_is_refused(tmp_path: Path, bucket: "Bucket"):
    """Shards that are all named for the other split are no shards of this one; a pattern takes what it names."""
    for split, word in (("train", "val"), ("val", "train")):
        folder = tmp_path / word
        folder.mkdir()
        write_tar(folder / f"{word}-0.tar", one_image(1))
        for path in (str(folder), bucket.put_folder(folder, word)):
            message = one_line(index_of, Source(split, path))
            assert f"holds shards of {word}, such as {path}/{word}-0.tar, and none of {split}" in message
            assert len(index_of(Source(split, f"{path}/*.tar"))) == len(index_of(Source(word, path))) == 1


def test_other_names_say_nothing_of_a_split(tmp_path: Path):
    """Words within words and shards named for neither split leave a folder whole."""
    for name, label in (("trainee-0.tar", 0), ("interval-0.tar", 1), ("000.tar", 2), ("train-val-0.tar", 3)):
        write_tar(tmp_path / name, one_image(label))
    for split in ("train", "val"):
        assert sorted(index_of(Source(split, str(tmp_path)), 5).labels.tolist()) == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------------------------ patterns


@pytest.mark.parametrize("pattern", ["part-*/x-*.tar", "part-{0,1}/x-{0..1}.tar", "part-[01]/x-?.tar", "{part-0,part-1}/x-*.tar"])
def test_patterns_with_folders(tmp_path: Path, pattern: str):
    """Signs in the folder's part: names start before the first of them, and every image is found with its bytes."""
    for part in range(2):
        (tmp_path / f"part-{part}").mkdir()
        for shard in range(2):
            write_tar(tmp_path / f"part-{part}" / f"x-{shard}.tar", one_image(2 * part + shard))
    source = Source("train", f"{tmp_path}/{pattern}")
    index, state = scan(source, num_classes=4)
    assert index.root == str(tmp_path)
    assert index.shards == ("part-0/x-0.tar", "part-0/x-1.tar", "part-1/x-0.tar", "part-1/x-1.tar")
    assert contents_of(index) == {f"{i}.jpg": (i, b"x" * (i + 1)) for i in range(4)}
    assert what_changed(index, state, source) is None


def test_roots_of_patterns():
    """The root is a whole folder, also at the top and in the current one."""
    roots = {"/a/b-*.tar": "/a", "/*.tar": "/", "x.tar": ".", "/a/b{0..1}/c.tar": "/a", "s3://bucket/a{0,1}/x.tar": "s3://bucket"}
    assert {pattern: root_of_pattern(pattern) for pattern in roots} == roots
    assert names_of_shards("/", ["/x.tar"]) == ("x.tar",)
    assert names_of_shards(".", ["x.tar"]) == ("x.tar",)


# ------------------------------------------------------------------------------------------------------------- members


@FORMATS
def test_names_of_other_alphabets(tmp_path: Path, kind: int):
    """Members named in any alphabet, in headers of their own, are indexed, and a touched shard stays the same."""
    members = [(f"{key}.{end}", data) for key in ("été", "日本" * 8) for end, data in (("jpg", key.encode()), ("cls", b"1"))]
    path = write_tar(tmp_path / "x.tar", members, kind)
    source = Source("train", str(path))
    index, state = scan(source, num_classes=3)
    assert {name: content for name, (_, content) in contents_of(index).items()} == dict(members[::2])
    os.utime(path, (1e9, 1e9))
    assert what_changed(index, state, source) is None


def test_a_label_without_an_image_is_refused(tmp_path: Path):
    """A labelled member that no loader reads is named, not passed over; captions without labels are."""
    for extra in (
        [("x.gif", b"g"), ("x.cls", b"1")],
        [("x.cls", b"1"), ("x.gif", b"g")],
        [("x.gif", b"g"), ("x.json", b'{"label": 1}')],
    ):
        message = one_line(index_of, write_tar(tmp_path / "x.tar", [*one_image(1), *extra]))
        assert f"{tmp_path / 'x.tar'}: x.gif has a label but is no image that can be read" in message
    assert "x has a label" in one_line(index_of, write_tar(tmp_path / "x.tar", [*one_image(1), ("x.cls", b"1")]))
    fine = [*one_image(1), ("y.txt", b"caption"), ("z.json", b"{}"), ("1.txt", b"caption")]
    assert len(index_of(write_tar(tmp_path / "x.tar", fine))) == 1


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_are_refused(tmp_path: Path, kind: bytes):
    """An image that is a link to another member is named."""
    path = write_tar(tmp_path / "x.tar", [*one_image(1), ("2.cls", b"2")])
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("2.jpg")
        link.type, link.linkname = kind, "1.jpg"
        tar.addfile(link)
    assert f"{path}: 2.jpg is a link or sparse, without bytes of its own" in one_line(index_of, path)


def test_what_macos_adds_is_passed_over(tmp_path: Path):
    """Members `._x.jpg`, which hold no image, neither count nor need a label."""
    members = [("a/._1.jpg", b"mac"), ("a/._1.cls", b"mac"), ("a/1.jpg", b"x"), ("a/1.cls", b"1"), ("._2.jpg", b"mac")]
    assert contents_of(index_of(write_tar(tmp_path / "x.tar", members))) == {"a/1.jpg": (1, b"x")}


@pytest.mark.parametrize("label", [2**31, 2**63, 10**30])
def test_labels_that_are_too_large(tmp_path: Path, label: int):
    """A label that is no number of a class anywhere is refused with its image; the largest that fits is not."""
    for member in (("a.cls", b"%d" % label), ("a.json", b'{"label": %d}' % label)):
        message = one_line(index_of, write_tar(tmp_path / "x.tar", [("a.jpg", b"x"), member]))
        assert "a.jpg has no label from 0 to 2147483647" in message
    fits = write_tar(tmp_path / "x.tar", [("a.jpg", b"x"), ("a.cls", b"2147483647")])
    assert index_of(fits).labels.tolist() == [2**31 - 1]


def test_old_indices_without_times_are_compared_whole(tmp_path: Path):
    """Where an index does not tell its shards' times, all of them are read and compared."""
    source = as_shards(tmp_path / "train")
    index, state = scan(source, num_classes=3)
    del state["shard_times"]
    assert contents_of(index) == WANTED
    assert what_changed(index, state, source) is None
