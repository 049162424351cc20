"""The index itself: fingerprints, its file damaged at any byte, images left out, and class orders that cannot be right."""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from conftest import one_line
from hypothesis import given, settings
from hypothesis import strategies as st

from imagenet_swa.config import InputError
from imagenet_swa.data import imagenet, storage
from imagenet_swa.data.index import (
    ImageIndex,
    Location,
    check_classes,
    check_labels,
    check_same_classes,
    load_index,
    make_index,
    save_index,
)


def made_index(
    root: str, names: list[bytes], labels: list[int], classes: tuple[str, ...] | None = None, sizes: list[int] | None = None
) -> ImageIndex:
    return make_index(root, names, labels, sizes if sizes is not None else [10] * len(names), classes)


def in_shards(index: ImageIndex, numbers: list[int]) -> ImageIndex:
    """The same images, in shards of these numbers, one after the other."""
    offsets = 512 + np.cumsum(index.sizes)
    shards = tuple(f"{number}.tar" for number in range(max(numbers, default=0) + 1))
    return replace(index, shards=shards, shard_numbers=np.array(numbers, np.int32), offsets=offsets)


# ---------------------------------------------------------------------------------------------------- fingerprints


def test_fingerprint_follows_names_labels_sizes_and_order():
    """Another name, label, size, order or number is another fingerprint; the root, class names and shards are not."""
    original = made_index("/a", [b"x/1", b"y/2", b"y/3"], [0, 1, 1])
    same = [
        made_index("/elsewhere", [b"x/1", b"y/2", b"y/3"], [0, 1, 1]),
        made_index("/a", [b"x/1", b"y/2", b"y/3"], [0, 1, 1], classes=("x", "y")),
        in_shards(original, [0, 0, 0]),
        in_shards(original, [0, 1, 2]),
        replace(original, names=pa.array([b"gone", b"x/1", b"y/2", b"y/3"], pa.large_binary())[1:]),
    ]
    assert {index.fingerprint for index in same} == {original.fingerprint}
    others = [
        made_index("/a", [b"x/1", b"y/2", b"y/4"], [0, 1, 1]),
        made_index("/a", [b"x/1", b"y/2", b"y/3"], [0, 1, 0]),
        made_index("/a", [b"x/1", b"y/3", b"y/2"], [0, 1, 1]),
        made_index("/a", [b"y/2", b"x/1", b"y/3"], [1, 0, 1]),
        made_index("/a", [b"x/1", b"y/2"], [0, 1]),
        made_index("/a", [b"x/1y", b"/2", b"y/3"], [0, 1, 1]),
        made_index("/a", [b"x/1", b"y/2", b"y/3"], [0, 1, 1], sizes=[10, 10, 11]),
        made_index("/a", [b"x/1", b"y/2", b"y/3"], [0, 1, 1], sizes=[10, 11, 10]),
        made_index("/a", [], []),
    ]
    assert len({original.fingerprint, *(index.fingerprint for index in others)}) == len(others) + 1


# ------------------------------------------------------------------------------------------------ places, leaving out


def test_places_of_images(tmp_path: Path):
    """An image of files lies at its name below the root, one of shards at its offset in its shard; messages tell both."""
    index = made_index(str(tmp_path), [b"x/1", b"y/\xff"], [0, 1], sizes=[10, storage.WHOLE])
    assert index.location(0) == Location(str(tmp_path / "x/1"), 0, 10)
    assert os.fsencode(index.location(1).path) == os.fsencode(tmp_path) + b"/y/\xff"
    assert index.location(1).size == storage.WHOLE
    sharded = in_shards(made_index("s3://bucket/a", [b"x/1", b"x/2"], [0, 1]), [0, 1])
    assert sharded.location(1) == Location("s3://bucket/a/1.tar", 532, 10)
    assert sharded.path(1) == "s3://bucket/a/1.tar:x/2"
    assert index.path(0) == str(tmp_path / "x/1")


@settings(deadline=None)
@given(
    names=st.lists(st.binary(min_size=1, max_size=3), max_size=12),
    unwanted=st.lists(st.binary(min_size=1, max_size=3), max_size=6),
    also=st.lists(st.integers(0, 11), max_size=4),
    sharded=st.booleans(),
)
def test_without_names(names: list[bytes], unwanted: list[bytes], also: list[int], sharded: bool):
    """Leaving out listed names keeps all other images with their labels, sizes and places, in their order."""
    sizes = list(range(1, len(names) + 1))
    index = made_index("/a", names, list(range(len(names))), sizes=sizes)
    index = in_shards(index, [i // 3 for i in range(len(names))]) if sharded and names else index
    chosen = [os.fsencode(index.listed_name(i)) for i in also if i < len(names)]
    kept = index.without(chosen + unwanted)
    away = {names[i] for i in also if i < len(names)} | set(unwanted)
    wanted = [i for i in range(len(names)) if names[i] not in away]
    if sharded and len(set(names)) < len(names):  # each is listed with its shard; none of `unwanted` has one
        away_in_shards = {(i // 3, names[i]) for i in also if i < len(names)}
        wanted = [i for i in range(len(names)) if (i // 3, names[i]) not in away_in_shards]
    assert [os.fsencode(kept.name(k)) for k in range(len(kept))] == [names[i] for i in wanted]
    assert kept.labels.tolist() == wanted
    assert [kept.location(k) for k in range(len(kept))] == [index.location(i) for i in wanted]
    assert kept.fingerprint == made_index("/b", [names[i] for i in wanted], wanted, sizes=[sizes[i] for i in wanted]).fingerprint


def test_names_that_repeat_in_shards_are_listed_with_their_shard():
    """Of two shards' images of one name each is listed, and left out, by itself; afterwards names are listed as before."""
    index = in_shards(made_index("/a", [b"1.jpg", b"2.jpg", b"1.jpg"], [0, 1, 2]), [0, 0, 1])
    assert [index.listed_name(i) for i in range(3)] == ["0.tar:1.jpg", "0.tar:2.jpg", "1.tar:1.jpg"]
    kept = index.without([b"1.tar:1.jpg"])
    assert [kept.location(i) for i in range(2)] == [index.location(0), index.location(1)]
    assert [kept.listed_name(i) for i in range(2)] == ["0.tar:1.jpg", "0.tar:2.jpg"]
    assert len(index.without([b"1.jpg"])) == 3
    once = in_shards(made_index("/a", [b"1.jpg", b"2.jpg"], [0, 1]), [0, 1])
    assert once.listed_name(0) == "1.jpg"
    twice_in_a_list = made_index("/a", [b"1.jpg", b"2.jpg", b"1.jpg"], [0, 1, 2])
    assert len(twice_in_a_list.without([b"1.jpg"])) == 1


@settings(deadline=None)
@given(names=st.lists(st.text(st.sampled_from("%029ADa5\t\n\r\udcff")).map(os.fsencode), min_size=1, max_size=8, unique=True))
def test_listed_names_are_fields_of_a_line(names: list[bytes]):
    """Whatever bytes names hold, listed names have no tab and no end of line, differ, and leave out just their image."""
    index = made_index("/a", names, list(range(len(names))))
    listed = [index.listed_name(i) for i in range(len(names))]
    assert len(set(listed)) == len(names)
    for i, text in enumerate(listed):
        assert not set(text) & set("\t\n\r")
        assert index.without([os.fsencode(text)]).labels.tolist() == [k for k in range(len(names)) if k != i]


# ------------------------------------------------------------------------------------------------------ saved, damaged


NAME = st.binary(max_size=9).filter(lambda name: not name.startswith(b"/") and b".." not in name and b"\0" not in name)


@settings(deadline=None, max_examples=30)
@given(names=st.lists(NAME, max_size=9), classes=st.none() | st.lists(st.text(max_size=5)), sharded=st.booleans())
def test_save_and_load(tmp_path_factory: pytest.TempPathFactory, names: list[bytes], classes: Any, sharded: bool):
    """An index comes back from its file with every name, label, size, place and class, and what its source looked like."""
    index = made_index("/a", names, list(range(len(names))), None if classes is None else tuple(classes), list(range(len(names))))
    index = in_shards(index, sorted(i % 3 for i in range(len(names)))) if sharded and names else index
    path = tmp_path_factory.mktemp("index") / "deep" / "x.index.arrow"
    source = {"kind": "folder", "folder_times": {"\udcff": 2**62}}
    save_index(index, source, path)
    loaded, state = load_index(str(path), "/b")
    assert state == source
    assert loaded.root == "/b"
    assert loaded.fingerprint == index.fingerprint
    assert loaded.names.to_pylist() == names
    assert (loaded.classes, loaded.shards) == (index.classes, index.shards)
    for name in ("labels", "sizes", "shard_numbers", "offsets"):
        before, after = getattr(index, name), getattr(loaded, name)
        assert (before is None) == (after is None)
        assert before is None or (before.dtype == after.dtype and (before == after).all())
    assert [p.name for p in path.parent.iterdir()] == ["x.index.arrow"]


def saved(tmp_path: Path) -> tuple[Path, ImageIndex]:
    index = in_shards(made_index("/a", [b"x/%d" % i for i in range(20)], list(range(20)), ("x", "y")), sorted([0, 1] * 10))
    save_index(index, {"kind": "shards", "shard_bytes": [1, 2]}, tmp_path / "x.index.arrow")
    return tmp_path / "x.index.arrow", index


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A disk that fills up while an index is written leaves the old index, and no half of a new one."""
    path, index = saved(tmp_path)

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    message = one_line(save_index, made_index("/a", [b"other"], [0]), {}, path)
    assert f"cannot write the index {path}: no space left on device; set data.index to a folder" in message
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert load_index(str(path), "/a")[0].fingerprint == index.fingerprint


def test_an_index_below_a_file_or_over_a_folder(tmp_path: Path):
    """Where a file stands for a folder, or a folder for the file, saving is refused with the path."""
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "x.index.arrow", tmp_path / "file" / "y" / "x.index.arrow", tmp_path / "folder"):
        assert f"cannot write the index {path}: " in one_line(save_index, made_index("/a", [b"a"], [0]), {}, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]


def test_an_index_without_the_right_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An index that may not be read is told as that; building it again would not help."""
    path, _ = saved(tmp_path)

    def denied(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(pa, "memory_map", denied)
    message = one_line(load_index, str(path), "/a")
    assert f"cannot read the index {path}: permission denied" in message
    assert "rebuild" not in message


def test_damage_at_any_byte(tmp_path: Path):
    """A byte flipped or the file cut anywhere: a one-line error that says what to do, or all that matters is intact."""
    path, index = saved(tmp_path)
    content = path.read_bytes()
    refused = 0
    for place in range(len(content)):
        flipped = (content[:place] + bytes([content[place] ^ bits]) + content[place + 1 :] for bits in (1, 0xFF))
        for damaged in (content[:place], *flipped):
            path.unlink()  # the old file's memory map must not see the new bytes
            path.write_bytes(damaged)
            try:
                loaded, state = load_index(str(path), "/a")
            except InputError as error:
                refused += 1
                assert "\n" not in str(error)
                assert "imagenet-swa index --rebuild" in str(error)
            else:
                assert loaded.fingerprint == index.fingerprint
                assert [loaded.location(i) for i in range(20)] == [index.location(i) for i in range(20)]
                assert loaded.classes == index.classes
                assert state == {"kind": "shards", "shard_bytes": [1, 2]}
    assert refused > len(content)


def test_what_is_no_index(tmp_path: Path):
    """Text, an empty file, a folder, another Arrow file and a later version are refused by name with the way out."""
    files = {"text": b"text" * 100, "empty": b""}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder").mkdir()
    for name, about in (("other", {}), ("later", {"imagenet_swa": '{"format": "imagenet-swa index 2"}'})):
        table = pa.table({"name": [b"a"]}).replace_schema_metadata(about)
        with pa.ipc.new_file(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    for name in ("text", "empty", "folder", "other", "later", "missing"):
        message = one_line(load_index, str(tmp_path / name), "/a")
        assert str(tmp_path / name) in message
        assert "build it again: imagenet-swa index --rebuild" in message


# --------------------------------------------------------------------------------------------------------- classes


def index_of(classes: list[str] | tuple[str, ...] | None, root: str = "/data/train") -> ImageIndex:
    """An index whose class folders these are, sorted as a folder's are."""
    return made_index(root, [b"a"], [0], None if classes is None else tuple(sorted(classes)))


def test_all_of_imagenets_folders_are_accepted():
    """The 1,000 folders by their WordNet ids are the network's classes."""
    check_classes(index_of(imagenet.synsets()), "train", 1000)


def test_lists_and_other_data_sets_are_accepted():
    """A list brings its own labels; folders of another data set, even 1,000 of them, sort as its network was trained."""
    check_classes(index_of(None), "train", 1000)
    check_classes(index_of(["ant", "bee", "cat"]), "train", 3)
    check_classes(index_of([f"species-{i:04}" for i in range(1000)]), "train", 1000)


@pytest.mark.parametrize("names", [[str(i) for i in range(10)], [f"{i:02}" for i in range(11)], [f"{i:03}" for i in range(1000)]])
def test_numbers_that_sort_by_value_are_accepted(names: list[str]):
    """Folders 0..9, or with leading zeros, sort by value: their labels are right."""
    check_classes(index_of(names), "train", len(names))


@pytest.mark.parametrize("num_classes", [11, 1000])
def test_numbers_that_sort_as_text_are_refused(num_classes: int):
    """Folders 0..10 or 0..999 sort as 0, 1, 10, ...: nearly every label would be wrong."""
    names = [str(i) for i in range(num_classes)]
    message = one_line(check_classes, index_of(names), "val", num_classes)
    assert "in text order (0, 1, 10, ...)" in message
    assert "give data.val_list" in message


def test_superscript_digits_are_just_names():
    """Names that look like digits to Unicode but not to int() are names like any other."""
    check_classes(index_of(["²", "³"]), "train", 2)


def test_part_of_imagenet_is_refused_with_the_reason():
    """Fewer of ImageNet's folders than the network has outputs: the labels would be wrong, and the message says why."""
    message = one_line(check_classes, index_of(imagenet.synsets()[::2]), "train", 1000)
    assert re.search(r"500 class folders, a subset of ImageNet's 1000, but the network has 1000 outputs", message)
    assert "would give wrong labels; give data.train_list" in message


def test_other_number_of_classes_is_refused():
    """Folders of another data set, too many or too few, are not called a part of ImageNet."""
    for names, num_classes in ((["ant", "bee"], 3), (["ant", "bee"], 1), (imagenet.synsets(), 10)):
        message = one_line(check_classes, index_of(names), "train", num_classes)
        assert f"{len(names)} class folders, but the network has {num_classes} outputs" in message
        assert "set model.num_classes" in message


@pytest.mark.parametrize("stranger", ["n00000001", "backup", ".cache", "n99999999"])
def test_stranger_among_imagenets_folders_is_refused(stranger: str):
    """One class folder missing and another in its place shifts labels: the stranger is named, wherever it sorts."""
    names = [*imagenet.synsets()[:500], *imagenet.synsets()[501:], stranger]
    message = one_line(check_classes, index_of(names), "train", 1000)
    assert f"class folder '{stranger}' is not one of ImageNet-1k's synsets" in message


def test_splits_with_different_classes_are_refused():
    """Training and validation folders must have the same names; a list on either side has none to compare."""
    train, val = index_of(["ant", "bee"]), index_of(["ant", "cat"], "/data/val")
    message = one_line(check_same_classes, train, val)
    assert "/data/train and /data/val have different class folders, such as 'bee'" in message
    other = made_index("/data/val", [b"b"], [0], ("ant", "bee"))
    check_same_classes(train, other)
    check_same_classes(train, made_index("/data/list", [b"c"], [0]))
    check_same_classes(made_index("/data/list", [b"c"], [0]), val)


def test_the_same_images_for_both_splits_are_refused():
    """Equal names, labels and sizes are the same images, wherever they lie; of unknown sizes only in the same place."""
    train = made_index("/data/train", [b"a", b"b"], [0, 1])
    message = one_line(check_same_classes, train, made_index("/data/val", [b"a", b"b"], [0, 1]))
    assert "data.train and data.val are the same images" in message
    check_same_classes(train, made_index("/data/val", [b"a", b"b"], [0, 1], sizes=[10, 11]))
    unknown = [made_index(root, [b"a"], [0], sizes=[storage.WHOLE]) for root in ("s3://b/train", "s3://b/val")]
    check_same_classes(unknown[0], unknown[1])
    assert "are the same images" in one_line(check_same_classes, unknown[0], unknown[0])
    check_same_classes(made_index("", [b"a"], [0]), made_index("", [b"a"], [0]))


def test_labels_beyond_the_networks_outputs():
    """The worst label that the network has no output for is named with its image; negative ones do not come about."""
    index = made_index("/data", [b"a", b"b", b"c"], [0, 7, 3])
    check_labels(index, "val", 8)
    message = one_line(check_labels, index, "val", 7)
    assert "data.val: /data/b has label 7, not in 0..6 (model.num_classes)" in message
    check_labels(made_index("/data", [], []), "val", 1)
