"""Indices kept in files: found, refused when older than the data, whole whoever writes them at the same time."""

import os
import resource
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from conftest import PROJECT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sources import as_folder, as_list, as_shards, write, write_tar

from imagenet_swa.config import InputError
from imagenet_swa.data import index_cache
from imagenet_swa.data.index import ImageIndex, load_index, make_index, save_index
from imagenet_swa.data.index_cache import build_index, find_index, index_path, read_quarantine
from imagenet_swa.data.sampling import epoch_order
from imagenet_swa.data.sources import Source

if TYPE_CHECKING:
    from s3_server import Bucket

pytest_plugins = ["s3_server"]

ARRANGEMENTS = pytest.mark.parametrize("arrange", [as_folder, as_list, as_shards])
Arrange = Callable[[Path], Source]


def fails(call: Callable[..., object], *arguments: object, **options: object) -> str:
    """The message of the InputError that the call raises, which must be one line."""
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(a: ImageIndex | None, b: ImageIndex | None) -> bool:
    """Whether two indices agree in everything."""
    assert a is not None
    assert b is not None
    locations = [index.location(i) for index in (a, b) for i in range(len(index))]
    return (a.fingerprint, a.classes, a.shards, a.root) == (b.fingerprint, b.classes, b.shards, b.root) and (
        locations[: len(a)] == locations[len(a) :]
    )


# -------------------------------------------------------------------------------------------------------- found again


@ARRANGEMENTS
@pytest.mark.parametrize("beside", [True, False])
def test_an_index_is_found_again(tmp_path: Path, arrange: Arrange, beside: bool):
    """What was built is found, the same in everything, beside the data or in a folder of its own; before, nothing is."""
    source = arrange(tmp_path / "data" / "train")
    folder = None if beside else tmp_path / "kept" / "here"
    assert find_index(source, folder) is None
    built, path = build_index(source, folder, num_classes=3)
    assert path == Path(index_path(source, folder))
    assert path.parent == (folder or Path(source.list_file or source.path).parent)
    assert [p.name for p in path.parent.iterdir() if "index" in p.name] == [path.name]
    assert same(find_index(source, folder), built)


def test_two_sources_have_two_files(tmp_path: Path):
    """Splits, lists and patterns with the same last name have files of their own in a common folder; slashes do not count."""
    sources = [
        Source("train", "/a/train"),
        Source("train", "/b/train"),
        Source("train", "/a/train", "/a/list.txt"),
        Source("train", "/a/train", "/b/list.txt"),
        Source("train", "/a/train-{0..9}.tar"),
        Source("train", "/a/train-*.tar"),
        Source("train", "s3://bucket/train-*.tar"),
    ]
    assert len({index_path(source, tmp_path) for source in sources}) == len(sources)
    assert index_path(Source("train", "/a/train/"), tmp_path) == index_path(sources[0], tmp_path)
    for source in sources:
        assert Path(index_path(source, tmp_path)).parent == tmp_path


def test_an_index_of_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A relative path's index is found from the same place, and the index of the same folder by its full path."""
    as_folder(tmp_path / "train")
    monkeypatch.chdir(tmp_path)
    for folder in (None, tmp_path / "kept"):
        build_index(Source("train", "train"), folder, num_classes=3)
        assert find_index(Source("train", "train"), folder) is not None
        assert find_index(Source("train", str(tmp_path / "train")), folder) is not None


# ----------------------------------------------------------------------------------------- noticed, and not mistaken


CHANGES = {
    "added": lambda root: write(root, {"ant/new.jpg": b"new"}),
    "removed": lambda root: (root / "ant/1.jpg").unlink(),
    "renamed": lambda root: (root / "ant/1.jpg").rename(root / "ant/other.jpg"),
    "moved to another class": lambda root: (root / "ant/1.jpg").rename(root / "bee/1b.jpg"),
    "added below": lambda root: write(root, {"cat/deep/new.jpg": b"new"}),
    "removed below": lambda root: (root / "cat/deep/3.jpg").unlink(),
    "class added": lambda root: write(root, {"dog/1.jpg": b"dog"}),
    "class removed": lambda root: shutil.rmtree(root / "bee"),
    "class renamed": lambda root: (root / "bee").rename(root / "wasp"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_class_folders_are_noticed(tmp_path: Path, change: str):
    """Files or classes that come, go or change their names make the index old, and the message says what to do."""
    source = as_folder(tmp_path / "train")
    build_index(source, None, num_classes=3)
    CHANGES[change](tmp_path / "train")
    message = fails(find_index, source, None)
    assert "is older than the data" in message
    assert "imagenet-swa index --rebuild" in message
    num_classes = sum(path.is_dir() for path in (tmp_path / "train").iterdir())
    build_index(source, None, num_classes=num_classes)
    assert find_index(source, None) is not None


@ARRANGEMENTS
def test_copies_and_new_times_are_no_change(tmp_path: Path, arrange: Arrange):
    """Data that are touched, or copied with their index to another place and time, keep their index."""
    source = arrange(tmp_path / "a" / "train")
    built, _ = build_index(source, None, num_classes=3)
    for path in (tmp_path / "a").rglob("*"):
        os.utime(path, (1e9, 1e9))
    assert same(find_index(source, None), built)
    if source.list_file is not None:  # its paths start from data.train, see below
        return
    subprocess.run(["cp", "-r", str(tmp_path / "a"), str(tmp_path / "b")], check=True)
    moved = Source(
        "train",
        source.path.replace(str(tmp_path / "a"), str(tmp_path / "b")),
        source.list_file and source.list_file.replace(str(tmp_path / "a"), str(tmp_path / "b")),
    )
    copied = find_index(moved, None)
    assert copied is not None
    assert copied.fingerprint == built.fingerprint
    assert [copied.read(i) for i in range(len(copied))] == [built.read(i) for i in range(len(built))]


def test_files_that_are_no_images_are_no_change(tmp_path: Path):
    """A text file beside the images leaves the index valid."""
    source = as_folder(tmp_path / "train")
    build_index(source, None, num_classes=3)
    write(tmp_path / "train", {"ant/notes.txt": b"notes"})
    assert find_index(source, None) is not None


def test_a_replaced_file_is_noticed_when_it_is_read(tmp_path: Path):
    """Another size of a file under an old name is an error when it is read."""
    source = as_folder(tmp_path / "train")
    build_index(source, None, num_classes=3)
    write(tmp_path / "train", {"ant/1.jpg": b"another length"})
    index = find_index(source, None)
    assert index is not None
    with pytest.raises(OSError, match="changed since"):
        index.read(0)


def test_a_changed_list_is_noticed(tmp_path: Path):
    """Another label, order or line of a list makes the index old."""
    source = as_list(tmp_path / "train")
    assert source.list_file is not None
    build_index(source, None, num_classes=3)
    before = Path(source.list_file).read_bytes()
    lines = before.splitlines(keepends=True)
    for changed in (before.replace(b" 0", b" 1", 1), b"".join(reversed(lines)), b"".join(lines[:-1]), before + lines[0]):
        Path(source.list_file).write_bytes(changed)
        assert "has another content" in fails(find_index, source, None)
    Path(source.list_file).unlink()
    assert "cannot read the list" in fails(find_index, source, None)


def test_changed_shards_are_noticed(tmp_path: Path):
    """A shard more or less, cut, longer, or with other members of the same total length makes the index old."""
    source = as_shards(tmp_path / "train")
    build_index(source, None, num_classes=3)
    shards = sorted((tmp_path / "train").glob("*.tar"))
    content = shards[0].read_bytes()
    for changed, words in (
        (content[:-512], "had"),
        (content + bytes(512), "had"),
        (content.replace(b"bee/", b"eel/"), "damaged"),  # the headers' sums are wrong
    ):
        shards[0].write_bytes(changed)
        assert words in fails(find_index, source, None)
    shards[0].write_bytes(content)
    assert find_index(source, None) is not None
    shutil.copy(shards[0], tmp_path / "train" / "new.tar")
    assert "older than the data" in fails(find_index, source, None)
    (tmp_path / "train" / "new.tar").unlink()
    shards[1].unlink()
    assert "older than the data" in fails(find_index, source, None)


MEMBERS = [("a.jpg", b"x" * 600), ("a.cls", b"1"), ("b.jpg", b"y" * 600), ("b.cls", b"2")]
RELABELLED = [("a.jpg", b"x" * 600), ("a.cls", b"2"), ("b.jpg", b"y" * 600), ("b.cls", b"1")]
RENAMED = [("c.jpg", b"x" * 600), ("c.cls", b"1"), *MEMBERS[2:]]


def test_relabelled_shards_are_noticed(tmp_path: Path):
    """Other labels, names or an order in a shard of the same size make the index old; the same bytes again do not."""
    path = write_tar(tmp_path / "train" / "0.tar", MEMBERS)
    source = Source("train", str(path.parent))
    build_index(source, None, num_classes=3)
    original = path.read_bytes()
    for members in (RELABELLED, RENAMED, MEMBERS[2:] + MEMBERS[:2]):
        content = write_tar(tmp_path / "other.tar", members).read_bytes()
        assert len(content) == len(original)
        path.write_bytes(content)
        assert f"{path} has other members or labels" in fails(find_index, source, None)
    path.write_bytes(original)
    assert find_index(source, None) is not None


def test_relabelled_shards_in_s3_are_noticed(tmp_path: Path, bucket: "Bucket"):
    """So it is with objects."""
    path = write_tar(tmp_path / "train" / "0.tar", MEMBERS)
    source = Source("train", bucket.put_folder(path.parent, "train"))
    build_index(source, tmp_path / "kept", num_classes=3)
    write_tar(path, RELABELLED)
    for members, is_same in ((RELABELLED, False), (MEMBERS, True)):
        time.sleep(1.1)  # times in S3 are whole seconds
        for method, what in (("POST", "moto-api/reset"), ("PUT", bucket.name)):  # the server lets nobody write over an object
            urllib.request.urlopen(urllib.request.Request(f"{os.environ['AWS_ENDPOINT_URL']}/{what}", method=method)).close()
        bucket.put("train/0.tar", write_tar(path, members).read_bytes())
        if is_same:
            assert find_index(source, tmp_path / "kept") is not None
        else:
            assert "0.tar has other members or labels" in fails(find_index, source, tmp_path / "kept")


def test_a_list_for_another_folder_is_noticed(tmp_path: Path):
    """A list's index holds for the folder that its paths started from, however that is written; files are compared by size."""
    source = as_list(tmp_path / "train")
    build_index(source, None, num_classes=3)
    (tmp_path / "other").mkdir()
    assert find_index(Source("train", f"{tmp_path}/other/../train/", source.list_file), None) is not None
    message = fails(find_index, Source("train", str(tmp_path / "other"), source.list_file), None)
    assert f"it was built for paths below {tmp_path / 'train'}" in message
    write(tmp_path / "train", {"bee/1.jpg": b"another length"})
    assert "bee/1.jpg had 1 bytes, now has 14" in fails(find_index, source, None)
    (tmp_path / "train" / "bee" / "1.jpg").unlink()
    assert "bee/1.jpg is gone" in fails(find_index, source, None)
    assert find_index(Source("train", source.path, source.list_file, missing_ok=True), None) is not None


def test_both_splits_shards_in_one_folder(tmp_path: Path):
    """Each split of a folder with the shards of both has its index file, beside the data and elsewhere."""
    for split, label in (("train", 1), ("validation", 2)):
        write_tar(tmp_path / "wds" / f"imagenet1k-{split}-0.tar", [("a.jpg", b"x" * label), ("a.cls", b"%d" % label)])
    sources = [Source(split, str(tmp_path / "wds")) for split in ("train", "val")]
    assert index_path(sources[0], None) == str(tmp_path / "wds.train.index.arrow")
    for folder in (None, tmp_path / "kept"):
        built = [build_index(source, folder, num_classes=3)[0] for source in sources]
        assert [index.labels.tolist() for index in built] == [[1], [2]]
        assert all(same(find_index(source, folder), index) for source, index in zip(sources, built, strict=True))


def test_another_kind_of_data_is_noticed(tmp_path: Path):
    """Class folders where shards were, and the reverse, make the index old."""
    source = as_shards(tmp_path / "train")
    build_index(source, None, num_classes=3)
    write(tmp_path / "train", {"ant/1.jpg": b"1"})
    assert "made of shards, now it is folder" in fails(find_index, source, None)


# ----------------------------------------------------------------------------------------------- who writes, and where


RACE = """
import sys, time
from pathlib import Path
from imagenet_swa.data.index_cache import build_index, find_index
from imagenet_swa.data.sources import Source
source, folder = Source("train", sys.argv[1]), Path(sys.argv[2])
while time.time() < float(sys.argv[3]):
    pass
for _ in range(40):
    build_index(source, folder, num_classes=3)
    assert len(find_index(source, folder)) == 7
"""


def test_processes_that_build_at_once_leave_one_whole_index(tmp_path: Path):
    """Three processes that build and read the same index over and over never meet half of one, and leave one file."""
    source = as_folder(tmp_path / "train")
    arguments = [sys.executable, "-c", RACE, source.path, str(tmp_path / "kept"), str(time.time() + 2)]
    processes = [subprocess.Popen(arguments, cwd=PROJECT, stderr=subprocess.PIPE) for _ in range(3)]
    errors = [process.communicate(timeout=60)[1].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], errors
    assert len(list((tmp_path / "kept").iterdir())) == 1
    assert find_index(source, tmp_path / "kept") is not None


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Beside data in a read-only folder no index is built, before anything is scanned; the way out is named."""
    source = as_folder(tmp_path / "train")
    monkeypatch.setattr(os, "access", lambda path, mode: not (mode & os.W_OK and Path(path) == tmp_path))
    monkeypatch.setattr(index_cache, "scan", lambda *_, **__: pytest.fail("scanned in vain"))
    message = fails(build_index, source, None, num_classes=3)
    assert f"cannot write {tmp_path / 'train.index.arrow'}; set data.index to a folder that can be written" in message


def test_where_no_index_can_be(tmp_path: Path):
    """A folder in S3 and a path below a file are refused for an index, before anything is read."""
    source = as_folder(tmp_path / "train")
    (tmp_path / "file").touch()
    assert "data.index is in S3; set it to a local folder" in fails(build_index, source, Path("s3://bucket/x"), num_classes=3)
    assert "data.index is in S3" in fails(find_index, source, Path("s3://bucket/x"))
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        assert f"{tmp_path / 'file'} is a file; set data.index to a folder" in fails(build_index, source, folder, num_classes=3)


def test_the_index_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`.` means the folder by its own name: its index lies beside it, not in it."""
    as_folder(tmp_path / "train")
    monkeypatch.chdir(tmp_path / "train")
    _, path = build_index(Source("train", "."), None, num_classes=3)
    assert path == tmp_path / "train.index.arrow"
    assert find_index(Source("train", str(tmp_path / "train")), None) is not None


def test_data_in_s3(tmp_path: Path, bucket: "Bucket"):
    """Shards in S3 need a local folder for their index, or one that was put beside them; changes there are noticed."""
    local = as_shards(tmp_path / "train")
    source = Source("train", bucket.put_folder(tmp_path / "train", "train"))
    assert find_index(source, None) is None
    assert "set data.index to a local folder" in fails(build_index, source, None, num_classes=3)
    built, path = build_index(source, tmp_path / "kept", num_classes=3)
    assert same(find_index(source, tmp_path / "kept"), built)
    beside = bucket.put("train.index.arrow", path.read_bytes())
    assert beside == index_path(source, None)
    assert same(find_index(source, None), built)
    here, _ = build_index(local, tmp_path / "here", num_classes=3)
    assert here.fingerprint == built.fingerprint
    assert [here.read(i) for i in range(len(here))] == [built.read(i) for i in range(len(built))]


# ----------------------------------------------------------------------------------------------------------- quarantine


def test_quarantine_lists(tmp_path: Path):
    """Lines of the split give their names as bytes; comments, blank lines and the other split's give none."""
    file = tmp_path / "quarantine.tsv"
    file.write_bytes(b"# comment\n\ntrain\ta b.jpg\tcut\tshort\nval\tc.jpg\tempty\r\n  \ntrain\t\xff.jpg\n")
    assert read_quarantine(file, "train") == [b"a b.jpg", b"\xff.jpg"]
    assert read_quarantine(file, "val") == [b"c.jpg"]


@pytest.mark.parametrize("line", [b"a.jpg", b"train a.jpg cut", b"test\ta.jpg\tcut", b"train", b"\xff\xd8\xff"])
def test_other_lines_are_refused(tmp_path: Path, line: bytes):
    """A line of another form is refused with file and number, whichever split is asked for."""
    file = tmp_path / "quarantine.tsv"
    file.write_bytes(b"train\ta.jpg\tcut\n" + line + b"\n")
    for split in ("train", "val"):
        assert f"{file}:2: wanted `train` or `val`, a name and a reason, separated by tabs" in fails(read_quarantine, file, split)


def test_an_unreadable_quarantine_list(tmp_path: Path):
    """A list that is not there, and a folder, are refused by name."""
    assert "cannot read the quarantine list" in fails(read_quarantine, tmp_path / "nowhere", "train")
    assert str(tmp_path) in fails(read_quarantine, tmp_path, "train")


@settings(deadline=None, max_examples=100)
@given(content=st.binary(max_size=80))
def test_any_bytes_are_a_quarantine_list_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes):
    """Whatever a file holds, it gives names or is refused in one line."""
    file = tmp_path_factory.getbasetemp() / "any.tsv"
    file.write_bytes(b"train\t" + content)
    try:
        names = read_quarantine(file, "train")
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert all(isinstance(name, bytes) for name in names)


# ------------------------------------------------------------------------------------------------------------ all of it


def test_an_index_as_large_as_imagenet(tmp_path: Path):
    """1,281,167 names are saved, loaded and shuffled as they are, and take no more than a few hundred MB."""
    num_images = 1_281_167
    labels = np.sort(np.random.default_rng(0).integers(0, 1000, num_images))
    names = [f"n{label:08}/n{label:08}_{i}.JPEG".encode() for i, label in enumerate(labels)]
    index = make_index("/data/train", names, labels, np.arange(num_images))
    save_index(index, {"kind": "folder"}, tmp_path / "train.index.arrow")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loaded, state = load_index(str(tmp_path / "train.index.arrow"), "/data/train")
    assert state == {"kind": "folder"}
    assert loaded.fingerprint == index.fingerprint
    assert loaded.names.equals(index.names)
    assert (loaded.labels == labels).all()
    order = epoch_order(num_images, seed=0, epoch=1)
    assert (np.sort(order) == np.arange(num_images)).all()
    assert loaded.name(int(order[0])) == names[order[0]].decode()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 600
