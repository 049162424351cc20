"""What becomes of bad images: the run stops, or leaves them out, names each once and keeps count."""

import io
from contextlib import redirect_stderr
from pathlib import Path

import pytest
from conftest import index_names
from hypothesis import given
from hypothesis import strategies as st

from imagenet_swa.config import InputError
from imagenet_swa.data.batch import BadImageError, BadImages, TooManyBadImagesError
from imagenet_swa.data.index import ImageIndex
from imagenet_swa.data.index_cache import read_quarantine

NAMES = (
    b"a.JPEG",
    b"with space.JPEG",
    "Ünï 象.JPEG".encode(),
    b"not \xff\xfe UTF-8.JPEG",
    b"quo'te\"s;&$(x).JPEG",
    b"#hash.JPEG",
)


@pytest.fixture
def index(tmp_path: Path) -> ImageIndex:
    return index_names(tmp_path, NAMES)


def test_stop_names_the_first(index: ImageIndex) -> None:
    """By default the first bad image of a batch is raised, with its path, the reason and every way out, on one line."""
    with pytest.raises(BadImageError) as error:
        BadImages(index).leave_out({1: "the file is empty", 0: "no such file"})
    message = str(error.value)
    assert message.startswith(f"cannot decode the image {index.path(1)}: the file is empty; ")
    for remedy in ("repair it", "data.quarantine (imagenet-swa verify finds", "data.on_bad_image to skip"):
        assert remedy in message
    assert "\n" not in message and error.value.concerns_one_rank and isinstance(error.value, InputError)


def test_nothing_bad_is_nothing_to_do(index: ImageIndex, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Batches without bad images leave no word and no file, however small they are."""
    for policy in ("stop", "skip"):
        BadImages(index, policy, log=tmp_path / "log.tsv").leave_out({}, num_good=0)
    assert capsys.readouterr() == ("", "") and not (tmp_path / "log.tsv").exists()


@given(
    passes=st.lists(st.lists(st.sets(st.integers(0, 5), max_size=3), max_size=5), min_size=1, max_size=3), limit=st.integers(0, 6)
)
def test_the_limit_counts_different_images_of_a_pass(passes: list[list[set[int]]], limit: int) -> None:
    """A pass ends as soon as more different images than the limit were bad in it; other passes do not count."""
    bad_images = BadImages(index_names(Path("/images"), NAMES), "skip", limit)
    for batches in passes:
        bad_images.start_pass()
        seen: set[int] = set()
        for batch in batches:
            seen |= batch
            if len(seen) <= limit:
                bad_images.leave_out(dict.fromkeys(batch, "bad"))
                continue
            with pytest.raises(TooManyBadImagesError, match=f"{limit + 1} images cannot be decoded, the last is /images/"):
                bad_images.leave_out(dict.fromkeys(batch, "bad"))
            break


def test_the_limit_in_words(index: ImageIndex) -> None:
    """The error names the last image, the setting and where to look, on one line, and concerns one rank."""
    with pytest.raises(TooManyBadImagesError) as error:
        BadImages(index, "skip", 0).leave_out({3: "the file is empty"})
    for words in (index.path(3), "the file is empty", "data.max_bad_images", "imagenet-swa verify"):
        assert words in str(error.value)
    assert "\n" not in str(error.value) and error.value.concerns_one_rank and isinstance(error.value, InputError)


@pytest.mark.parametrize("num_good,fails", [(0, True), (1, True), (2, False), (None, False)])
def test_too_few_to_train_on(index: ImageIndex, num_good: int | None, fails: bool) -> None:
    """Where BatchNorm is at work, at least two images have to be left of a batch."""
    bad_images = BadImages(index, "skip", 6)
    if not fails:
        bad_images.leave_out({0: "bad", 1: "bad"}, num_good=num_good)
        return
    with pytest.raises(TooManyBadImagesError, match=f"{num_good} of {(num_good or 0) + 2} images of a batch can be decoded"):
        bad_images.leave_out({0: "bad", 1: "bad"}, num_good=num_good)


def test_each_image_is_named_once_and_the_log_is_a_quarantine_list(index: ImageIndex, tmp_path: Path) -> None:
    """Over all passes an image is named once on stderr and in the log, which reads back as a quarantine list of that split."""
    log, err = tmp_path / "log.tsv", io.StringIO()  # which takes names that are no UTF-8, as a real stderr does
    for split in ("train", "val"):
        bad_images = BadImages(index, "skip", 100, split=split, log=log)
        for _ in range(3):
            bad_images.start_pass()
            with redirect_stderr(err):
                bad_images.leave_out({3: "the file is empty", 1: "no such file"})
                bad_images.leave_out({i: "damaged" for i in range(len(NAMES)) if split == "train"})
    lines = err.getvalue().splitlines()
    assert len(lines) == len(NAMES) + 2
    assert lines[1] == f"imagenet-swa: left out: {index.path(1)}: no such file"
    assert sorted(read_quarantine(log, "train")) == sorted(NAMES)
    assert read_quarantine(log, "val") == [NAMES[3], NAMES[1]]
    assert len(index.without(read_quarantine(log, "val"))) == len(NAMES) - 2
    assert log.read_bytes().splitlines()[0] == b"train\t" + NAMES[3] + b"\tthe file is empty"


def test_no_folder_no_log(index: ImageIndex, tmp_path: Path) -> None:
    """A command without a run folder, such as evaluate, makes none for the log."""
    BadImages(index, "skip", 100, log=tmp_path / "run" / "log.tsv").leave_out({0: "bad"})
    assert not (tmp_path / "run").exists()


def test_a_rank_says_who_it_is(index: ImageIndex, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Among several processes the line on stderr begins with the rank."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "2")
    BadImages(index, "skip", 1).leave_out({0: "bad"})
    assert capsys.readouterr().err == f"imagenet-swa: left out [rank 2]: {index.path(0)}: bad\n"


def test_an_interrupted_run_names_nothing_twice_in_its_list(index: ImageIndex, tmp_path: Path) -> None:
    """A run that goes on, with its own memory lost, adds only images that its list does not have yet."""
    log = tmp_path / "bad.tsv"
    for reasons in ({0: "empty"}, {0: "empty", 3: "cut"}, {3: "cut"}):
        BadImages(index, "skip", 9, split="train", log=log).leave_out(reasons)
    assert read_quarantine(log, "train") == [NAMES[0], NAMES[3]]


def test_how_few_are_too_few_to_train_on(index: ImageIndex) -> None:
    """BatchNorm at work needs two images of a batch, frozen BatchNorm one, evaluation none."""
    for min_good, num_good, is_enough in ((2, 1, False), (2, 2, True), (1, 1, True), (1, 0, False), (2, None, True)):
        bad_images = BadImages(index, "skip", 9, min_good=min_good)
        if is_enough:
            bad_images.leave_out({0: "empty"}, num_good=num_good)
        else:
            with pytest.raises(TooManyBadImagesError, match="too few to train on"):
                bad_images.leave_out({0: "empty"}, num_good=num_good)
