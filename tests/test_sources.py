"""What a user names, read into an index: against torchvision's ImageFolder, tarfile, and list files with every fault."""

import gzip
import io
import json
import os
import random
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from conftest import one_line, write
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torchvision.datasets import ImageFolder

from imagenet_swa.config import InputError
from imagenet_swa.data import imagenet, storage
from imagenet_swa.data.index import ImageIndex, check_classes
from imagenet_swa.data.sources import Source, broken_shards, scan, what_changed

if TYPE_CHECKING:
    from s3_server import Bucket

pytest_plugins = ["s3_server"]

# Images of three classes, of lengths around the blocks of a tar file.
IMAGES = {
    f"{name}/{path}": bytes([label]) * length
    for label, (name, files) in enumerate(
        {
            "ant": {"1.jpg": 511, "2.JPEG": 512, "10.Png": 513},
            "bee": {"1.jpg": 1, "2.webp": 1025},
            "cat": {"1.jpg": 0, "deep/3.jpg": 10_241},
        }.items()
    )
    for path, length in files.items()
}
CLASSES = ("ant", "bee", "cat")


def make_files(root: Path, *names: str) -> Path:
    """Empty files."""
    return write(root, dict.fromkeys(names, b""))


def label_of(name: str) -> int:
    return CLASSES.index(name.partition("/")[0])


def as_folder(root: Path) -> Source:
    return Source("train", str(write(root, IMAGES)))


def as_list(root: Path) -> Source:
    write(root, IMAGES)
    file = root.parent / f"{root.name}.txt"
    file.write_text("".join(f"{name} {label_of(name)}\n" for name in sorted(IMAGES)))
    return Source("train", str(root), str(file))


def as_shards(root: Path, kind: int = tarfile.GNU_FORMAT, num_shards: int = 2) -> Source:
    root.mkdir(parents=True)
    names = sorted(IMAGES)
    size = -(-len(names) // num_shards)
    for shard in range(num_shards):
        members = [
            member
            for name in names[shard * size : (shard + 1) * size]
            for member in ((key_of(name) + "." + name.rpartition("/")[2].partition(".")[2], IMAGES[name]), cls_of(name))
        ]
        write_tar(root / f"train-{shard}.tar", members, kind)
    return Source("train", str(root))


def key_of(name: str) -> str:
    folder, _, base = name.rpartition("/")
    return f"{folder}/{base.partition('.')[0]}"


def cls_of(name: str) -> tuple[str, bytes]:
    return f"{key_of(name)}.cls", b"%d" % label_of(name)


def write_tar(path: Path, members: list[tuple[str, bytes]], kind: int = tarfile.GNU_FORMAT, mode: Any = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, format=kind) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def index_of(source: Source | Path, num_classes: int = 3) -> ImageIndex:
    return scan(source if isinstance(source, Source) else Source("train", str(source)), num_classes=num_classes)[0]


def samples_of(index: ImageIndex) -> list[tuple[str, int]]:
    return [(index.path(i), int(index.labels[i])) for i in range(len(index))]


def contents_of(index: ImageIndex) -> dict[str, tuple[int, bytes]]:
    """Label and bytes of each image by its name."""
    assert [int(size) for size in index.sizes] == [len(index.read(i)) for i in range(len(index))]
    return {index.name(i): (int(index.labels[i]), index.read(i)) for i in range(len(index))}


WANTED = {name: (label_of(name), content) for name, content in IMAGES.items()}


# ------------------------------------------------------------------------------------------------------ class folders


def test_folder_is_read_as_torchvision_reads_it(tmp_path: Path):
    """Paths, labels, classes and their order are ImageFolder's: nested folders, upper case, spaces, other files and alphabets."""
    make_files(
        tmp_path,
        *("b/1.jpg", "b/10.JPEG", "b/2.Png", "b/deep/a.webp", "b/deep/deeper/z.tif", "b/a/a.bmp", "b/zz.ppm", "b/a.b/c.jpg"),
        *("b/notes.txt", "b/picture.jpg.bak", "b/no_extension", "b/.hidden.jpg", "b/.jpg", "b/with.dots.pgm", "b/gif.gif"),
        *("Class with spaces/image one.jpeg", "Class with spaces/ two.tiff", "été/naïve.jpg", "été/日本.jpg", "A/x.jpg"),
        *("readme.txt", "stray.jpg"),
    )
    (tmp_path / "linked").symlink_to(tmp_path / "b", target_is_directory=True)
    (tmp_path / "A" / "inner link").symlink_to(tmp_path / "été", target_is_directory=True)
    (tmp_path / "A" / "file link.jpg").symlink_to(tmp_path / "b" / "1.jpg")
    (tmp_path / "A" / "image.jpg").mkdir()
    make_files(tmp_path, "A/image.jpg/inner.jpg")
    index = index_of(tmp_path)
    reference = ImageFolder(str(tmp_path))
    assert samples_of(index) == reference.samples
    assert list(index.classes or ()) == reference.classes


PARTS = st.text(st.sampled_from("abAB0 .-_é"), min_size=1, max_size=4).filter(lambda part: part not in (".", ".."))
ENDINGS = st.sampled_from([".jpg", ".JPG", ".jpeg", ".png", ".txt", "", ".jpg.txt"])
FILES = st.tuples(PARTS, st.lists(PARTS, max_size=2), PARTS, ENDINGS)


@settings(deadline=None, max_examples=60)
@given(files=st.lists(FILES, min_size=1, max_size=12))
def test_any_folder_is_read_as_torchvision_reads_it(
    tmp_path_factory: pytest.TempPathFactory, files: list[tuple[str, list[str], str, str]]
):
    """Whatever lies below the class folders, the samples are ImageFolder's, or both refuse the folder."""
    root = tmp_path_factory.mktemp("tree")
    for class_name, folders, stem, ending in files:
        path = root.joinpath(class_name, *folders, stem + ending)
        if not any(parent.is_file() for parent in path.parents) and not path.exists():
            make_files(root, str(path))
    try:
        reference = ImageFolder(str(root))
    except FileNotFoundError:
        assert "no images for" in one_line(index_of, root) or "no sub-folders" in one_line(index_of, root)
    else:
        index = index_of(root)
        assert samples_of(index) == reference.samples
        assert list(index.classes or ()) == reference.classes


def test_names_that_are_not_utf8(tmp_path: Path):
    """File names of any bytes are kept, and the path opens the file."""
    folder = os.fsencode(tmp_path / "class")
    Path(os.fsdecode(folder)).mkdir()
    with open(folder + b"/\xff\xfe.jpg", "wb") as file:  # noqa: PTH123 - a path of bytes
        file.write(b"content")
    index = index_of(tmp_path)
    assert Path(index.path(0)).read_bytes() == index.read(0) == b"content"


def test_sizes_and_contents_of_a_folder(tmp_path: Path):
    """An index of class folders has the files' sizes, and reads their bytes; a link to nothing has no size."""
    index = index_of(as_folder(tmp_path / "train"))
    assert contents_of(index) == WANTED
    (tmp_path / "train" / "ant" / "x.jpg").symlink_to(tmp_path / "nowhere")
    index = index_of(tmp_path / "train")
    assert index.sizes[[index.name(i) for i in range(len(index))].index("ant/x.jpg")] == -1


def test_class_without_images_is_refused(tmp_path: Path):
    """Empty class folders are counted and the first is named: they would shift no label, but the data are not complete."""
    make_files(tmp_path, "ant/1.jpg", "bee/notes.txt", "cat/2.jpg")
    (tmp_path / "dog").mkdir()
    message = one_line(index_of, tmp_path)
    assert "no images for 2 of 4 classes, the first is 'bee'; remove it, or put images into it" in message
    assert str(tmp_path) in message


def test_folder_without_class_folders_is_refused(tmp_path: Path):
    """A missing folder, a file, and a folder of images without classes are refused with what was wanted."""
    make_files(tmp_path / "flat", "1.jpg", "2.jpg")
    assert "no such folder" in one_line(index_of, tmp_path / "nowhere")
    assert "1.jpg is a file; wanted class folders or .tar shards (a list goes to data.train_list)" in one_line(
        index_of, tmp_path / "flat" / "1.jpg"
    )
    assert "is a pattern that does not end in .tar" in one_line(index_of, tmp_path / "train-*")
    assert "data.train is an empty text" in one_line(index_of, Source("train", ""))
    assert "data.val_list is an empty text" in one_line(index_of, Source("val", str(tmp_path), " "))
    assert "has no sub-folders; wanted one per class, tar shards, or data.train_list" in one_line(index_of, tmp_path / "flat")


@pytest.mark.parametrize("name", ["x.parquet", "ILSVRC2012_img_train.tar"])
def test_what_prepare_is_for(tmp_path: Path, name: str):
    """Files without random access and the official archives are refused with the command that unpacks them."""
    message = one_line(index_of, make_files(tmp_path, name) / name)
    assert "no random access" in message
    assert f"imagenet-swa prepare {tmp_path / name}" in message
    assert "set data.train to" in message


@pytest.mark.parametrize("name", ["x.tar.gz", "x.tgz", "x.zip"])
def test_compressed_archives(tmp_path: Path, name: str):
    """What is compressed has to be unpacked, which prepare does not do."""
    message = one_line(index_of, make_files(tmp_path, name) / name)
    assert f"{tmp_path / name} is compressed" in message
    assert "unpack it first" in message


@pytest.mark.parametrize("name", ["ILSVRC2012_img_train", "ILSVRC2012_img_val.tar", "x.tar", "x.zip", "x.parquet"])
def test_a_folder_of_an_archives_name_is_a_folder(tmp_path: Path, name: str):
    """Class folders may lie in a folder of any name."""
    assert contents_of(index_of(as_folder(tmp_path / name))) == WANTED


def test_links_that_lead_back(tmp_path: Path):
    """A link to a folder on its own way is not followed, nor two that lead to each other; other links are."""
    root = Path(as_folder(tmp_path / "train").path)
    (root / "ant" / "self").symlink_to(root / "ant")
    (root / "ant" / "root").symlink_to(root)
    (root / "bee" / "cats").symlink_to(root / "cat")
    (root / "cat" / "bees").symlink_to(root / "bee")
    names = {index.name(i) for index in [index_of(root)] for i in range(len(index))}
    assert names - IMAGES.keys() == {"bee/cats/1.jpg", "bee/cats/deep/3.jpg", "cat/bees/1.jpg", "cat/bees/2.webp"}


def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A link to itself and a folder without the right to read it are refused with the path, in a scan and a later look."""
    root = Path(as_folder(tmp_path / "train").path)
    index, state = scan(Source("train", str(root)), num_classes=3)
    link = root / "ant" / "loop"
    link.symlink_to(link)
    assert f"cannot read {link}: too many levels of symbolic links" in one_line(index_of, root)
    assert f"cannot read {link}: " in one_line(what_changed, index, state, Source("train", str(root)))
    link.unlink()
    (root / "loop").symlink_to(root / "loop")
    assert f"cannot read {root / 'loop'}: " in one_line(index_of, root)
    (root / "loop").unlink()
    scandir = os.scandir

    def denied(path: Any) -> Any:
        if os.fsencode(path).endswith(b"/bee"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    message = one_line(index_of, root)
    assert f"cannot read {root / 'bee'}: permission denied; give yourself the right to read it, or take it out" in message


def test_a_folder_of_parquet_files_is_refused(tmp_path: Path):
    """A folder that holds parquet files goes through prepare too."""
    make_files(tmp_path, "train-0.parquet")
    assert "holds parquet files, which have no random access to their images; run `imagenet-swa prepare" in one_line(
        index_of, tmp_path
    )


# ---------------------------------------------------------------------------------------------------------------- lists


def write_list(folder: Path, content: bytes) -> Path:
    file = folder / "list.txt"
    file.write_bytes(content)
    return file


def index_list(file: Path, root: Path, num_classes: int = 10) -> ImageIndex:
    return index_of(Source("train", str(root), str(file)), num_classes)


def test_list_gives_paths_and_labels_in_its_order(tmp_path: Path):
    """A list's order and labels are kept; paths may hold spaces, repeat, or be absolute; blank lines do not count."""
    make_files(tmp_path, "a.jpg", "two words/b c.jpg", "été.jpg")
    elsewhere = make_files(tmp_path / "other", "d.jpg") / "d.jpg"
    lines = f"\ntwo words/b c.jpg 2\n\n   \na.jpg 0\r\nété.jpg  007\n\ta.jpg 1 \n{elsewhere} 9"
    index = index_list(write_list(tmp_path, lines.encode()), tmp_path)
    wanted = [("two words/b c.jpg", 2), ("a.jpg", 0), ("été.jpg", 7), ("a.jpg", 1), (str(elsewhere), 9)]
    assert samples_of(index) == [(str(tmp_path / name), label) for name, label in wanted]
    assert index.labels.dtype == np.int64
    assert index.classes is None


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"a.jpg", "wanted `path label`, got 'a.jpg'"),
        (b"5", "wanted `path label`, got '5'"),
        (b" 5", "wanted `path label`"),
        (b"a.jpg five", "wanted `path label`, got 'a.jpg five'"),
        (b"a.jpg 1.0", "wanted `path label`"),
        (b"a.jpg -1", "wanted `path label`, got 'a.jpg -1'"),
        (b"a.jpg +1", "wanted `path label`"),
        (b"a.jpg\t1", "wanted `path label`"),
        (b"a.jpg,1", "wanted `path label`"),
        ("a.jpg ٣".encode(), "wanted `path label`"),
        ("a.jpg ²".encode(), "wanted `path label`"),
        (b"a.jpg 10", r"label '10' is not in 0..9 (model.num_classes)"),
        (b"a.jpg 99999999999999999999999999", "is not in 0..9"),
        (b"a.jpg " + b"9" * 5000, "is not in 0..9"),
        (b"x" * 1_000_000, "wanted `path label`, got 'xxxx"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF\x00", "wanted `path label`"),
    ],
    ids=lambda value: repr(value[:20]) if isinstance(value, bytes) else "",
)
def test_unusable_line_is_refused_with_its_number(tmp_path: Path, line: bytes, reason: str):
    """A line of another form or with a label that the network has not is shown, shortened, with file and line number."""
    make_files(tmp_path, "a.jpg")
    file = write_list(tmp_path, b"a.jpg 0\n\n" + line + b"\na.jpg 1\n")
    message = one_line(index_list, file, tmp_path)
    assert f"{file}:3: " in message
    assert reason in message


@settings(deadline=None, max_examples=150)
@given(content=st.binary(max_size=60) | st.lists(st.sampled_from([b"a.jpg", b" ", b"1", b"99", b"\n", b"-"])).map(b"".join))
@example(content=b"a.jpg 1\x0ba.jpg 1")
@example(content=b"a\0b 1")
def test_any_bytes_are_a_list_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes):
    """Whatever a file holds, it is either a list whose images are there and labels in range, or refused in one line."""
    root = make_files(tmp_path_factory.getbasetemp() / "any", "a.jpg")
    file = write_list(root, content)
    try:
        index = index_list(file, root)
    except InputError as error:
        assert "\n" not in str(error)
        assert "\r" not in str(error)
    else:
        assert 0 <= index.labels.min() <= index.labels.max() < 10
        assert all(Path(index.path(i)).exists() for i in range(len(index)))


def test_a_list_with_a_byte_order_mark(tmp_path: Path):
    """The mark that some editors write before UTF-8 is no part of the first path."""
    make_files(tmp_path, "a.jpg")
    assert index_list(write_list(tmp_path, b"\xef\xbb\xbfa.jpg 1\n"), tmp_path).name(0) == "a.jpg"


def test_a_folder_in_a_list_is_refused(tmp_path: Path):
    """A line that names a folder is refused when the list is indexed, even where files may be missing."""
    make_files(tmp_path, "a.jpg", "deep/b.jpg")
    file = write_list(tmp_path, b"a.jpg 1\ndeep 1\n")
    for missing_ok in (False, True):
        source = Source("train", str(tmp_path), str(file), missing_ok)
        assert f"{file} names the folder {tmp_path / 'deep'}" in one_line(index_of, source)


def test_list_that_names_missing_files_is_refused(tmp_path: Path):
    """The first image that is not there is named, wherever it stands, with the number of others and where paths start."""
    make_files(tmp_path, "a.jpg")
    for lines in (b"gone.jpg 0\na.jpg 1\n", b"a.jpg 1\ngone.jpg 0\n", b"a.jpg 1\n" * 5000 + b"gone.jpg 0\n"):
        message = one_line(index_list, write_list(tmp_path, lines), tmp_path)
        assert f"names {tmp_path / 'gone.jpg'}, not there; its paths start from {tmp_path}" in message
    message = one_line(index_list, write_list(tmp_path, b"x 0\na.jpg 1\n" + b"y 1\n" * 2000), tmp_path)
    assert f"names {tmp_path / 'x'} and 2,000 more, not there" in message
    index, _ = scan(Source("train", str(tmp_path), str(tmp_path / "list.txt"), missing_ok=True), num_classes=10)
    assert index.sizes.tolist() == [-1, 0] + [-1] * 2000


def test_empty_or_unreadable_list_is_refused(tmp_path: Path):
    """A list without a line, one that does not exist and a folder are refused by name."""
    for content in (b"", b"\n\n  \n"):
        assert "lists no images" in one_line(index_list, write_list(tmp_path, content), tmp_path)
    assert "no such file" in one_line(index_list, tmp_path / "nowhere.txt", tmp_path)
    assert "is a directory" in one_line(index_list, tmp_path, tmp_path)


@pytest.mark.realdata
def test_real_lists(real_data: Path):
    """The lists of real images are read whole, with the labels that their folders' WordNet ids have among all 1,000."""
    for split, num_images in (("train", 154), ("val", 260)):
        index = index_list(real_data / f"{split}.txt", real_data / split, imagenet.NUM_CLASSES)
        assert len(index) == num_images
        for path, label in samples_of(index):
            assert Path(path).is_file()
            assert imagenet.synsets()[label] == Path(path).parent.name


@pytest.mark.realdata
def test_real_subset_as_folders_is_refused(real_data: Path):
    """Some of ImageNet's classes as folders would be numbered anew: refused, with the way out."""
    message = one_line(check_classes, index_of(real_data / "train"), "train", 1000)
    assert "154 class folders, a subset of ImageNet's 1000" in message
    assert "give data.train_list" in message


# --------------------------------------------------------------------------------------------------------------- shards


FORMATS = pytest.mark.parametrize(
    "kind", [tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "ustar", "pax"]
)


@FORMATS
@pytest.mark.parametrize("num_shards", [1, 3, 7])
def test_shards_are_the_files(tmp_path: Path, kind: int, num_shards: int):
    """Shards of any tar format give the names, labels, sizes, bytes, order and fingerprint of the list of the same images."""
    listed = index_of(as_list(tmp_path / "train"))
    source = as_shards(tmp_path / "shards", kind, num_shards)
    for path in (source.path, f"{source.path}/train-*.tar", f"{source.path}/train-{{0..{num_shards - 1}}}.tar"):
        index = index_of(Source("train", path))
        assert contents_of(index) == contents_of(listed) == WANTED
        assert index.fingerprint == listed.fingerprint
        assert index.path(0) == f"{source.path}/train-0.tar:ant/1.jpg"
    if num_shards == 1:
        assert contents_of(index_of(Source("train", f"{source.path}/train-0.tar"))) == WANTED


def test_shards_beside_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A pattern without a folder means the current one."""
    as_shards(tmp_path / "shards")
    monkeypatch.chdir(tmp_path / "shards")
    assert contents_of(index_of(Source("train", "train-*.tar"))) == WANTED


@FORMATS
def test_offsets_are_tarfiles(tmp_path: Path, kind: int):
    """Every image's place holds what tarfile extracts: long names, folders, links, sparse order and metadata around it."""
    long = "n01440764/" + "x" * 80 + "/" + "y" * 90
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=kind) as tar:
        folder = tarfile.TarInfo("n01440764")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for number, key in enumerate([long, "plain", "./dotted", "été", "a b", "UPPER"]):
            content = bytes([number]) * (700 * number + 1)
            for name, data in ((f"{key}.cls", b"%d\n" % number), (f"{key}.jpg", content), (f"{key}.txt", b"caption")):
                info = tarfile.TarInfo(name)
                info.size, info.uname, info.mtime = len(data), "somebody", 1.5 if kind == tarfile.PAX_FORMAT else 1
                tar.addfile(info, io.BytesIO(data))
    index = index_of(Source("train", str(path)), 10)
    with tarfile.open(path) as tar:
        images = [member for member in tar if member.name.endswith(".jpg")]
        assert [index.name(i) for i in range(len(index))] == [member.name for member in images]
        for i, member in enumerate(images):
            extracted = tar.extractfile(member)
            assert extracted is not None
            assert index.read(i) == extracted.read()
            assert index.labels[i] == i


def test_any_order_within_a_shard(tmp_path: Path):
    """Labels come before or after their images or far from them; the order of the images decides."""
    members = [(f"k{i}.jpg", b"%d" % i) for i in range(20)] + [(f"k{i}.cls", b"%d" % (i % 3)) for i in range(20)]
    for seed in range(5):
        random.Random(seed).shuffle(members)
        index = index_of(Source("train", str(write_tar(tmp_path / "x.tar", members))))
        assert [index.read(i) for i in range(20)] == [content for name, content in members if name.endswith(".jpg")]
        assert index.labels.tolist() == [int(index.read(i)) % 3 for i in range(20)]


def test_timms_layout(tmp_path: Path):
    """imagenet1k-train-0000.tar with key.jpg, key.cls and key.json as timm's data sets have them; .cls counts before .json."""
    for shard in range(2):
        members = []
        for i in range(3):
            key, label = f"n0144076{shard}_{i}", 10 * shard + i
            about = json.dumps({"label": label, "width": 5, "height": 4, "filename": f"{key}.JPEG"}).encode()
            members += [(f"{key}.cls", b"%d" % label), (f"{key}.jpg", key.encode()), (f"{key}.json", about)]
        write_tar(tmp_path / f"imagenet1k-train-{shard:04}.tar", members)
    index = index_of(Source("train", f"{tmp_path}/imagenet1k-train-{{0000..0001}}.tar"), 1000)
    assert index.labels.tolist() == [0, 1, 2, 10, 11, 12]
    assert [index.read(i).decode() + ".jpg" for i in range(6)] == [index.name(i) for i in range(6)]
    for order in (1, -1):
        both = [("a.cls", b"1"), ("a.json", b'{"label": 2}')][::order]
        assert index_of(write_tar(tmp_path / "both.tar", [("a.jpg", b"x"), *both])).labels.tolist() == [1]
    only = [("a.jpg", b"x"), ("a.json", b'{"label": 2}')]
    assert index_of(write_tar(tmp_path / "json.tar", only)).labels.tolist() == [2]


def test_a_shard_cut_anywhere(tmp_path: Path):
    """A shard cut in a header, in data, in padding or before its end is refused by name, or still holds all of its images."""
    source = as_shards(tmp_path / "train", num_shards=1)
    path = Path(source.path) / "train-0.tar"
    content, whole = path.read_bytes(), contents_of(index_of(source))
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    end = max(member.offset_data + member.size for member in members)
    stop = -(-end // 512) * 512  # where the blocks of zeros start
    places = {0, 1, 511, 512, len(content) - 1, len(content) - 512, end, end + 1, end + 511, end + 512, end + 1024}
    places |= {m.offset + step for m in members for step in (0, 1, 100, 511, 512, 512 + m.size // 2, 512 + m.size)}
    places |= {int(place) for place in np.random.default_rng(0).integers(0, len(content), 100)}
    for place in sorted(places):
        path.write_bytes(content[:place])
        try:
            index = index_of(source)
        except InputError as error:
            assert "\n" not in str(error)
            assert str(path) in str(error)
            assert place < stop + 512
        else:
            assert contents_of(index) == whole
            assert place >= stop + 512


def test_a_damaged_header_is_noticed(tmp_path: Path):
    """A header that is none any more would end the archive for tarfile: refused, as are two archives joined into one."""
    path = Path(as_shards(tmp_path / "train", num_shards=1).path) / "train-0.tar"
    content = path.read_bytes()
    with tarfile.open(path) as tar:
        offsets = [member.offset for member in tar]
    for offset in offsets:
        path.write_bytes(content[:offset] + b"damaged!" + content[offset + 8 :])
        assert str(path) in one_line(index_of, path)
    path.write_bytes(content + content)
    assert "goes on after its end, as joined tar files do" in one_line(index_of, path)


def test_a_dot_in_a_key(tmp_path: Path):
    """An image whose key has a dot is refused, not passed over; a further picture beside an image is no image of its own."""
    message = one_line(
        index_of, write_tar(tmp_path / "x.tar", [("b.jpg", b"x"), ("b.cls", b"1"), ("a.1.jpg", b"x"), ("a.1.cls", b"1")])
    )
    assert f"{tmp_path / 'x.tar'}: a.1.jpg has a dot in its key" in message
    members = [("a.jpg", b"x"), ("a.mask.png", b"m"), ("a.cls", b"1")]
    assert contents_of(index_of(write_tar(tmp_path / "y.tar", members))) == {"a.jpg": (1, b"x")}


def test_what_is_no_shard(tmp_path: Path):
    """Compressed tars, text, an empty file and a folder named like a shard are refused by name."""
    plain = write_tar(tmp_path / "plain", [("a.jpg", b"x"), ("a.cls", b"1")]).read_bytes()
    for number, content in enumerate((gzip.compress(plain), b"text" * 1000, b"<html>", b"", bytes(10))):
        path = tmp_path / f"x{number}.tar"
        path.write_bytes(content)
        assert f"cannot read the shard {path}: " in one_line(index_of, path) or f"{path} holds no images" in one_line(
            index_of, path
        )
    (tmp_path / "y.tar").mkdir()
    assert f"{tmp_path / 'y.tar'} has no sub-folders" in one_line(index_of, tmp_path / "y.tar")
    assert f"cannot read the shard {tmp_path / 'z.tar'}: no such file" in one_line(index_of, tmp_path / "z.tar")
    assert "no shards match" in one_line(index_of, tmp_path / "z-*.tar")
    assert "quote the pattern" in one_line(index_of, tmp_path / "z-*.tar")


def test_shards_without_usable_labels(tmp_path: Path):
    """An image without a label, or with one that is no number, is named with what was wanted."""
    for label in (
        None,
        ("a.cls", b"ant"),
        ("a.cls", b"-1"),
        ("a.json", b"{}"),
        ("a.json", b"[1]"),
        ("a.json", b"{"),
        ("a.cls", b""),
    ):
        members = [("b.jpg", b"x"), ("b.cls", b"1"), ("a.jpg", b"x"), *([label] if label else [])]
        message = one_line(index_of, write_tar(tmp_path / "x.tar", members))
        assert f"{tmp_path / 'x.tar'}: a.jpg has no label" in message
        assert "wanted a member a.cls with a number or .json with a label" in message
    for label in (b'{"label": true}', b'{"label": "1"}', b'{"label": 1.0}', b"\xff"):
        assert "no label" in one_line(index_of, write_tar(tmp_path / "x.tar", [("a.jpg", b"x"), ("a.json", label)]))


def test_two_images_with_one_key(tmp_path: Path):
    """Two images that would share a label are refused with both names."""
    message = one_line(index_of, write_tar(tmp_path / "x.tar", [("a.jpg", b"x"), ("a.cls", b"1"), ("a.png", b"y")]))
    assert "two images have the key a: a.jpg and a.png" in message


def test_tars_of_tars_and_tars_without_images(tmp_path: Path):
    """The official archive holds a tar per class: it goes through prepare; a tar without images is refused."""
    assert "run `imagenet-swa prepare` on it first" in one_line(
        index_of, write_tar(tmp_path / "x.tar", [("n01440764.tar", b"x")])
    )
    assert "holds no images; wanted members such as" in one_line(index_of, write_tar(tmp_path / "y.tar", [("a.txt", b"x")]))


def test_broken_shards_are_told_apart(tmp_path: Path):
    """Of several shards exactly the broken ones are named, each with its fault."""
    source = as_shards(tmp_path / "train", num_shards=4)
    assert broken_shards(source) == []
    shards = sorted((tmp_path / "train").iterdir())
    shards[1].write_bytes(b"text" * 500)
    shards[3].write_bytes(shards[3].read_bytes()[:700])
    assert [path for path, _ in broken_shards(source)] == [str(shards[1]), str(shards[3])]
    assert broken_shards(as_folder(tmp_path / "folder")) == []


def test_many_shards_are_read_in_processes(tmp_path: Path):
    """Eight shards and more go through worker processes, with the same result; a broken one is still named."""
    members = {f"{i}-{k}": b"%d" % (10 * i + k) for i in range(9) for k in range(3)}
    for i in range(9):
        keys = [key for key in members if key.startswith(f"{i}-")]
        write_tar(tmp_path / f"{i}.tar", [m for key in keys for m in ((f"{key}.jpg", members[key]), (f"{key}.cls", b"1"))])
    assert contents_of(index_of(tmp_path)) == {f"{key}.jpg": (1, content) for key, content in members.items()}
    (tmp_path / "5.tar").write_bytes(b"text" * 500)
    assert f"cannot read the shard {tmp_path / '5.tar'}" in one_line(index_of, tmp_path)


# ------------------------------------------------------------------------------------------------------------------- S3


def test_s3_gives_what_local_files_give(tmp_path: Path, bucket: "Bucket"):
    """Shards by folder and pattern, and a list, in S3 have the names, labels and bytes of the same files here."""
    shards, listed = as_shards(tmp_path / "shards"), as_list(tmp_path / "train")
    assert listed.list_file is not None
    prefix = bucket.put_folder(tmp_path / "shards", "shards")
    for path in (prefix, f"{prefix}/train-*.tar", f"{prefix}/train-{{0..1}}.tar"):
        index = index_of(Source("train", path))
        assert contents_of(index) == WANTED
        assert index.fingerprint == index_of(shards).fingerprint
    files = bucket.put_folder(tmp_path / "train", "files")
    remote_list = bucket.put("lists/train.txt", Path(listed.list_file).read_bytes())
    for list_file in (remote_list, listed.list_file):
        index = index_of(Source("train", files, list_file))
        assert contents_of(index) == WANTED
        assert index.fingerprint == index_of(listed).fingerprint
    here = index_of(Source("train", listed.path, remote_list))
    assert contents_of(here) == WANTED


def test_listed_objects_that_are_not_there(tmp_path: Path, bucket: "Bucket"):
    """A list that names a missing object is refused by its name, or marks it where missing images may be left out."""
    bucket.put("files/ant/1.jpg", b"some bytes")
    listed = write(tmp_path, {"list.txt": b"ant/1.jpg 0\nant/2.jpg 0\nbee/3.jpg 1\n"}) / "list.txt"
    message = one_line(index_of, Source("train", f"{bucket.url}/files", str(listed)))
    assert f"names {bucket.url}/files/ant/2.jpg and 1 more, not there" in message
    index = index_of(Source("train", f"{bucket.url}/files", str(listed), missing_ok=True))
    assert index.sizes.tolist() == [10, storage.WHOLE, storage.WHOLE]
    assert "no such bucket or prefix" in one_line(index_of, Source("train", f"{bucket.url}/nowhere", str(listed)))
