"""Lists of images against torchvision's ImageFolder, list files with every fault, and class orders that cannot be right."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torchvision.datasets import ImageFolder

from imagenet_swa.config import InputError
from imagenet_swa.data import imagenet
from imagenet_swa.data.index import ImageIndex, check_classes, check_same_classes, index_folder, index_list


def make_files(root: Path, *names: str) -> Path:
    """Empty files: an index looks at names only."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def samples_of(index: ImageIndex) -> list[tuple[str, int]]:
    return [(index.path(i), int(index.labels[i])) for i in range(len(index))]


def one_line(call: Callable[..., object], *arguments: object) -> str:
    """The message of the InputError that the call raises, which must be one line."""
    with pytest.raises(InputError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


# -------------------------------------------------------------------------------------------------------- folders


def test_folder_is_read_as_torchvision_reads_it(tmp_path: Path):
    """Paths, labels, classes and their order are ImageFolder's: nested folders, upper case, spaces, other files and alphabets."""
    make_files(
        tmp_path,
        *("b/1.jpg", "b/10.JPEG", "b/2.Png", "b/deep/a.webp", "b/deep/deeper/z.tif", "b/a/a.bmp", "b/zz.ppm"),
        *("b/notes.txt", "b/picture.jpg.bak", "b/no_extension", "b/.hidden.jpg", "b/.jpg", "b/with.dots.pgm", "b/gif.gif"),
        *("Class with spaces/image one.jpeg", "Class with spaces/ two.tiff", "été/naïve.jpg", "été/日本.jpg", "A/x.jpg"),
        *("readme.txt", "stray.jpg"),
    )
    (tmp_path / "linked").symlink_to(tmp_path / "b", target_is_directory=True)
    (tmp_path / "A" / "inner link").symlink_to(tmp_path / "été", target_is_directory=True)
    index = index_folder(tmp_path)
    reference = ImageFolder(str(tmp_path))
    assert samples_of(index) == reference.samples
    assert list(index.classes or ()) == reference.classes
    assert len(index) == len(reference) == 27


PARTS = st.text(st.sampled_from("abAB0 .-_é"), min_size=1, max_size=4).filter(lambda part: part not in (".", ".."))
ENDINGS = st.sampled_from([".jpg", ".JPG", ".jpeg", ".png", ".txt", "", ".jpg.txt", ".tar"])
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
        assert "no images for" in one_line(index_folder, root) or "no sub-folders" in one_line(index_folder, root)
    else:
        index = index_folder(root)
        assert samples_of(index) == reference.samples
        assert list(index.classes or ()) == reference.classes


def test_names_that_are_not_utf8(tmp_path: Path):
    """File names of any bytes are kept, and the path opens the file."""
    folder = os.fsencode(tmp_path / "class")
    Path(os.fsdecode(folder)).mkdir()
    with open(folder + b"/\xff\xfe.jpg", "wb") as file:  # noqa: PTH123 - a path of bytes
        file.write(b"content")
    index = index_folder(tmp_path)
    assert Path(index.path(0)).read_bytes() == b"content"


def test_class_without_images_is_refused(tmp_path: Path):
    """Empty class folders are counted and the first is named: they would shift no label, but the data are not complete."""
    make_files(tmp_path, "ant/1.jpg", "bee/notes.txt", "cat/2.jpg")
    (tmp_path / "dog").mkdir()
    message = one_line(index_folder, tmp_path)
    assert "no images for 2 of 4 classes, the first is 'bee'" in message
    assert str(tmp_path) in message


def test_folder_without_class_folders_is_refused(tmp_path: Path):
    """A missing folder, a file, and a folder of images without classes are refused with what was wanted."""
    make_files(tmp_path / "flat", "1.jpg", "2.jpg")
    assert "no such folder" in one_line(index_folder, tmp_path / "nowhere")
    assert "no such folder" in one_line(index_folder, tmp_path / "flat" / "1.jpg")
    assert "has no sub-folders; wanted one per class" in one_line(index_folder, tmp_path / "flat")


# ---------------------------------------------------------------------------------------------------------- lists


def write_list(folder: Path, content: bytes) -> Path:
    file = folder / "list.txt"
    file.write_bytes(content)
    return file


def test_list_gives_paths_and_labels_in_its_order(tmp_path: Path):
    """A list's order and labels are kept; paths may hold spaces, repeat, or be absolute; blank lines do not count."""
    make_files(tmp_path, "a.jpg", "two words/b c.jpg", "été.jpg")
    elsewhere = make_files(tmp_path / "other", "d.jpg") / "d.jpg"
    lines = f"\ntwo words/b c.jpg 2\n\n   \na.jpg 0\r\nété.jpg  007\n\ta.jpg 1 \n{elsewhere} 9"
    index = index_list(write_list(tmp_path, lines.encode()), tmp_path, 10)
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
    message = one_line(index_list, file, tmp_path, 10)
    assert f"{file}:3: " in message
    assert reason in message


@settings(deadline=None, max_examples=200)
@given(content=st.binary(max_size=60) | st.lists(st.sampled_from([b"a.jpg", b" ", b"1", b"99", b"\n", b"-"])).map(b"".join))
@example(content=b"a.jpg 1\x0ba.jpg 1")
def test_any_bytes_are_a_list_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes):
    """Whatever a file holds, it is either a list whose images are there and labels in range, or refused in one line."""
    root = make_files(tmp_path_factory.getbasetemp() / "any", "a.jpg")
    file = write_list(root, content)
    try:
        index = index_list(file, root, 10)
    except InputError as error:
        assert "\n" not in str(error)
        assert "\r" not in str(error)
    else:
        assert 0 <= index.labels.min() <= index.labels.max() < 10
        assert os.path.isfile(index.path(0))
        assert os.path.isfile(index.path(len(index) - 1))


def test_list_that_names_a_missing_file_is_refused(tmp_path: Path):
    """The first or last image that is not there is named, with the folder that the paths start from."""
    make_files(tmp_path, "a.jpg")
    for lines in (b"gone.jpg 0\na.jpg 1\n", b"a.jpg 1\ngone.jpg 0\n"):
        message = one_line(index_list, write_list(tmp_path, lines), tmp_path, 10)
        assert f"names {tmp_path / 'gone.jpg'}, which is not there; its paths start from {tmp_path}" in message


def test_empty_or_unreadable_list_is_refused(tmp_path: Path):
    """A list without a line, one that does not exist and a folder are refused by name."""
    for content in (b"", b"\n\n  \n"):
        assert "lists no images" in one_line(index_list, write_list(tmp_path, content), tmp_path, 10)
    assert "No such file" in one_line(index_list, tmp_path / "nowhere.txt", tmp_path, 10)
    assert "Is a directory" in one_line(index_list, tmp_path, tmp_path, 10)


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
    message = one_line(check_classes, index_folder(real_data / "train"), "train", 1000)
    assert "154 class folders, a subset of ImageNet's 1000" in message
    assert "give data.train_list" in message


# ---------------------------------------------------------------------------------------------------- fingerprints


def made_index(root: str, paths: list[bytes], labels: list[int], classes: tuple[str, ...] | None = None) -> ImageIndex:
    return ImageIndex(
        root=Path(root), relative_paths=pa.array(paths, pa.large_binary()), labels=np.array(labels, np.int64), classes=classes
    )


def test_fingerprint_follows_names_labels_and_order():
    """Another name, label, order or number of images is another fingerprint; where they lie or how they were listed is not."""
    original = made_index("/a", [b"x/1", b"y/2", b"y/3"], [0, 1, 1]).fingerprint()
    same = [
        made_index("/elsewhere", [b"x/1", b"y/2", b"y/3"], [0, 1, 1]),
        made_index("/a", [b"x/1", b"y/2", b"y/3"], [0, 1, 1], classes=("x", "y")),
    ]
    assert {index.fingerprint() for index in same} == {original}
    others = [
        made_index("/a", [b"x/1", b"y/2", b"y/4"], [0, 1, 1]),
        made_index("/a", [b"x/1", b"y/2", b"y/3"], [0, 1, 0]),
        made_index("/a", [b"x/1", b"y/3", b"y/2"], [0, 1, 1]),
        made_index("/a", [b"y/2", b"x/1", b"y/3"], [1, 0, 1]),
        made_index("/a", [b"x/1", b"y/2"], [0, 1]),
        made_index("/a", [b"x/1y", b"/2", b"y/3"], [0, 1, 1]),
        made_index("/a", [], []),
    ]
    assert len({original, *(index.fingerprint() for index in others)}) == len(others) + 1


def test_folder_and_list_of_the_same_images_have_one_fingerprint(tmp_path: Path):
    """A folder, the same folder moved, and a list of its images in the same order have the same fingerprint."""
    names = ("ant/1.jpg", "ant/2.jpg", "bee/1.jpg")
    first, moved = make_files(tmp_path / "first", *names), make_files(tmp_path / "moved", *names)
    listed = write_list(tmp_path, b"ant/1.jpg 0\nant/2.jpg 0\nbee/1.jpg 1\n")
    fingerprints = {index_folder(first).fingerprint(), index_folder(moved).fingerprint()}
    fingerprints.add(index_list(listed, first, 2).fingerprint())
    assert len(fingerprints) == 1
    (moved / "bee/1.jpg").rename(moved / "bee/2.jpg")
    assert index_folder(moved).fingerprint() not in fingerprints


# --------------------------------------------------------------------------------------------------------- classes


def index_of(classes: list[str] | tuple[str, ...] | None, root: str = "/data/train") -> ImageIndex:
    """An index whose class folders these are, sorted as index_folder sorts them."""
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
    check_same_classes(train, index_of(["ant", "bee"], "/data/val"))
    check_same_classes(train, index_of(None))
    check_same_classes(index_of(None), val)
