"""Checkpoints on a disk that fills up, lies or dies, files that change, and names that sort badly."""

import errno
import hashlib
import json
import math
import os
import pickle
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import mounted, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from imagenet_swa import checkpoint, files
from imagenet_swa.checkpoint import (
    TENSORS,
    Checkpoints,
    Snapshot,
    check_same_run,
    load_snapshot,
    save_weights,
    what_is_wrong,
)
from imagenet_swa.config import InputError
from imagenet_swa.files import write_flushed


def snapshot(step: int) -> Snapshot:
    """A snapshot that says its step in every tensor."""
    tensor = torch.full((3, 2), float(step))
    return Snapshot(
        progress={"step": step, "losses": [0.1, 1 / 3], "identity": {"seed": 0, "pair": [1, 2]}, "loss_scale": None, "format": 2},
        weights={"conv.weight": tensor, "bn.num_batches_tracked": torch.tensor(step)},
        momentum={"conv.weight": tensor * 2},
        average={"average/conv.weight": tensor * 3, "pretrained/conv.weight": tensor * 4},
        statistics={"rank-0/bn.running_mean": tensor * 5, "rank-1/bn.running_mean": tensor * 6},
    )


def assert_same(one: Snapshot, other: Snapshot) -> None:
    assert one.progress == other.progress
    for part in TENSORS:
        tensors, wanted = getattr(one, part), getattr(other, part)
        assert tensors.keys() == wanted.keys()
        for name in wanted:
            assert torch.equal(tensors[name], wanted[name])
            assert tensors[name].dtype == wanted[name].dtype


def name_of(step: int) -> str:
    return f"step-{step:07d}"


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("momentum", [True, False])
def test_what_was_saved_is_loaded(tmp_path: Path, momentum: bool):
    """A loaded snapshot is the saved one: numbers, tensors, types; also before the first step, when there is no momentum."""
    saved = snapshot(3) if momentum else Snapshot(snapshot(3).progress, snapshot(3).weights)
    path = Checkpoints(tmp_path, keep=2).save(saved)
    assert path == tmp_path / name_of(3)
    assert_same(load_snapshot(path), saved)


def test_manifest_lists_sha256_of_every_file(tmp_path: Path):
    """manifest.json names every other file of the checkpoint with its SHA-256."""
    path = Checkpoints(tmp_path, keep=2).save(snapshot(1))
    wanted = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir() if file.name != "manifest.json"}
    assert len(wanted) == 5
    assert json.loads((path / "manifest.json").read_text()) == wanted


@pytest.mark.parametrize("steps", [(9, 10), (9_999_999, 10_000_000), (2, 10**9, 10**8)])
def test_steps_sort_by_number(tmp_path: Path, steps: tuple[int, ...]):
    """The newest checkpoint is that of the largest step, not of the last name in the alphabet."""
    checkpoints = Checkpoints(tmp_path, keep=5)
    for step in steps:
        checkpoints.save(snapshot(step))
    path, complaints = checkpoints.newest_valid()
    assert path is not None and complaints == []
    assert load_snapshot(path).progress["step"] == max(steps)


def test_no_checkpoint_yet(tmp_path: Path):
    """A folder that is not there, or is empty, holds no checkpoint and gives no complaint."""
    assert Checkpoints(tmp_path / "nowhere", keep=2).newest_valid() == (None, [])
    assert Checkpoints(tmp_path, keep=2).newest_valid() == (None, [])


@given(keep=st.integers(1, 4), number=st.integers(1, 12))
@settings(max_examples=15, deadline=None)
def test_the_newest_are_kept(tmp_path_factory: pytest.TempPathFactory, keep: int, number: int):
    """After each of any number of saves the newest `keep` checkpoints are there, and all of them are valid."""
    folder = tmp_path_factory.mktemp("checkpoints")
    checkpoints = Checkpoints(folder, keep=keep)
    for last in range(1, number + 1):
        checkpoints.save(snapshot(last))
        assert names_in(folder) == [name_of(step) for step in range(max(1, last - keep + 1), last + 1)]
    assert all(what_is_wrong(path) is None for path in folder.iterdir())


def test_the_old_goes_after_the_new_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With one checkpoint to keep, the old one is removed only when the new one is complete under its final name."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(snapshot(1))
    original = shutil.rmtree
    removed = []

    def rmtree(path: Path, *arguments: Any, **options: Any) -> None:
        if path.exists():
            assert what_is_wrong(tmp_path / name_of(2)) is None, f"{path.name} was removed first"
            removed.append(path.name)
        original(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    checkpoints.save(snapshot(2))
    assert removed == [f"{name_of(1)}.old.partial"]


def test_a_damaged_later_checkpoint_does_not_push_out_the_new_one(tmp_path: Path):
    """A run that had to begin again keeps its new checkpoints although a damaged one has a larger number."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(snapshot(5))
    (tmp_path / name_of(5) / "weights.safetensors").write_bytes(b"damaged")
    path = checkpoints.save(snapshot(1))
    assert checkpoints.newest_valid()[0] == path


def test_saving_over_a_damaged_checkpoint(tmp_path: Path):
    """The checkpoint of an epoch that is trained again replaces the damaged one, leftovers of a cut write included."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    path = checkpoints.save(snapshot(1))
    (path / "weights.safetensors").write_bytes(b"damaged")
    shutil.copytree(path, tmp_path / f"{name_of(1)}.partial")
    (tmp_path / f"{name_of(1)}.partial" / "leftover").touch()
    checkpoints.save(snapshot(1))
    assert checkpoints.newest_valid() == (path, [])
    assert names_in(tmp_path) == [name_of(1)]
    assert "leftover" not in names_in(path)


def test_strange_names_are_ignored(tmp_path: Path):
    """Folders that a person put beside the checkpoints neither count, nor disturb, nor get removed."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    strange = ["step-0000002.partial", "step-0000007-copy", "step-", "step-latest", "step-7", "step-٣٣٣٣٣٣٣", "notes"]
    for name in strange:
        (tmp_path / name).mkdir()
    checkpoints.save(snapshot(1))
    checkpoints.save(snapshot(3))
    assert checkpoints.newest_valid() == (tmp_path / name_of(3), [])
    assert names_in(tmp_path) == sorted([*strange, name_of(3)])


# ------------------------------------------------------------------------------------------------- interrupted writes


def full_disk(*_arguments: Any, **_options: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")


def failing_at(call: int, original: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with its n-th call hitting a full disk."""
    calls = iter(range(1, 1000))

    def function(*arguments: Any, **options: Any) -> Any:
        return full_disk() if next(calls) == call else original(*arguments, **options)

    return function


# What is called while a checkpoint is written, and how often.
WRITES = [*(("write_flushed", call) for call in range(1, 7)), *(("os.fsync", call) for call in range(1, 9)), ("Path.rename", 1)]
WRITES += [("Path.mkdir", 1), ("drop_from_cache", 3)]


@pytest.mark.parametrize(("function", "call"), WRITES)
def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, call: int):
    """Whatever write fails, on a full disk or elsewhere, the checkpoint before it is whole and the one to resume from."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    old = checkpoints.save(snapshot(1))
    holder = {"os": os, "Path": Path}.get(function.rpartition(".")[0], checkpoint)
    name = function.rpartition(".")[2]
    with monkeypatch.context() as patch:
        patch.setattr(holder, name, failing_at(call, getattr(holder, name)))
        with pytest.raises(OSError, match="No space left on device"):
            checkpoints.save(snapshot(2))
    assert checkpoints.newest_valid()[0] in (old, tmp_path / name_of(2))
    assert what_is_wrong(old) is None
    assert_same(load_snapshot(old), snapshot(1))
    new = checkpoints.save(snapshot(2))  # as soon as there is room again
    assert names_in(tmp_path) == [name_of(2)]
    assert_same(load_snapshot(new), snapshot(2))


def test_data_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Every file, then its folder, is flushed before the rename, and the folder above after it: a power cut loses no data."""
    events: list[str] = []
    flush, rename = os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name.removesuffix(".partial"))
        flush(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        events.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", renamed)
    path = Checkpoints(tmp_path / "checkpoints", keep=1).save(snapshot(1))
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert set(before) == {*names_in(path), name_of(1)}
    assert before[-1] == name_of(1)
    assert after == ["checkpoints"]


def flipping(name: str) -> Callable[[Path, bytes], str]:
    """Writes as a disk does that alters a bit of one file; the digest is that of what was to be written."""

    def write(path: Path, content: bytes) -> str:
        digest = write_flushed(path, content)
        if path.name == name:
            flipped = bytearray(content)
            flipped[len(content) // 2] ^= 4
            path.write_bytes(flipped)
        return digest

    return write


@pytest.mark.parametrize("name", ["weights.safetensors", "statistics.safetensors", "progress.json", "manifest.json"])
def test_a_disk_that_gives_back_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    """A checkpoint that does not read back as it was to be written is an error of the disk, and the old one stays."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    old = checkpoints.save(snapshot(1))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_flushed", flipping(name))
        with pytest.raises(OSError, match="the disk gave back something else than was written: "):
            checkpoints.save(snapshot(2))
    assert names_in(tmp_path) == [old.name]
    assert_same(load_snapshot(old), snapshot(1))


def test_digests_are_of_what_was_to_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The manifest holds the digests of the bytes in memory: hashed again from the disk, an altered file would pass."""
    monkeypatch.setattr(checkpoint, "write_flushed", flipping("weights.safetensors"))
    monkeypatch.setattr(checkpoint, "what_is_wrong", lambda _: None)  # the check after writing
    path = Checkpoints(tmp_path, keep=1).save(snapshot(1))
    monkeypatch.undo()
    assert what_is_wrong(path) == "weights.safetensors is not as it was written"


def test_the_same_step_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A checkpoint that is there, and whole, is left alone."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    path = checkpoints.save(snapshot(1))
    inodes = [file.stat().st_ino for file in sorted(path.iterdir())]
    monkeypatch.setattr(checkpoint, "write_flushed", full_disk)
    assert checkpoints.save(snapshot(1)) == path
    assert [file.stat().st_ino for file in sorted(path.iterdir())] == inodes


# Has children that save for ever, each step the one after the last one on the disk, and kills them; prints what it then finds.
MOTHER = """
import json, os, random, signal, sys, time, torch
from pathlib import Path
from imagenet_swa.checkpoint import Checkpoints, Snapshot, load_snapshot, what_is_wrong
folder, draws = Path(sys.argv[1]), random.Random(0)
checkpoints = Checkpoints(folder, keep=1)


def save(step):
    tensors = {str(i): torch.full((50, 100), float(step)) for i in range(3)}
    checkpoints.save(Snapshot({"step": step}, tensors, tensors, tensors, {}))


step, start = 10, time.monotonic()
for number in range(step + 1):
    save(number)
seconds = (time.monotonic() - start) / (step + 1)  # of a save, on this disk and with what else is going on
for _ in range(50):
    child = os.fork()
    if child == 0:
        while True:
            step += 1
            save(step)
    time.sleep(draws.uniform(0, 4 * seconds))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    newest, complaints = checkpoints.newest_valid()
    before, step = step, 0 if newest is None else load_snapshot(newest).progress["step"]
    torn = [p.name for p in folder.glob("*") if p.suffix != ".partial" and what_is_wrong(p) is not None]
    print(json.dumps([before, step, complaints, torn, sorted(p.name for p in folder.glob("*.partial"))]), flush=True)
"""


def test_killed_while_saving(tmp_path: Path):
    """However often a process that saves is killed, in the middle of writing, renaming or removing, the newest valid checkpoint
    is never an older one than before, and nothing torn stands under a final name.
    """
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    mother = run([sys.executable, "-c", MOTHER, folder], OMP_NUM_THREADS="1")
    assert mother.returncode == 0, mother.stderr
    found = [json.loads(line) for line in mother.stdout.splitlines()]
    assert len(found) == 50
    for before, step, complaints, torn, _ in found:
        assert before <= step and not complaints and not torn
    num_hit = sum(bool(partial) for *_, partial in found)
    assert found[-1][1] > 12 and num_hit > 5, "some kills must have hit a save"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    with mounted(tmp_path / "disk", "1m") as folder:
        yield folder


def test_a_disk_that_is_really_full(small_disk: Path):
    """On a disk with room for one checkpoint and no more, saving a second raises, leaves nothing of it behind, and keeps the
    first; with room again it is saved.
    """
    checkpoints, large = Checkpoints(small_disk / "checkpoints", keep=1), {"w": torch.ones(100_000)}
    old = checkpoints.save(Snapshot({"step": 1}, large))
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(200 * 1024))
    with pytest.raises(OSError, match="No space left on device") as caught:
        checkpoints.save(Snapshot({"step": 2}, large, large))
    assert caught.value.errno == errno.ENOSPC and str(small_disk) in str(caught.value.filename)
    assert names_in(old.parent) == [old.name] and what_is_wrong(old) is None
    ballast.unlink()
    with pytest.raises(OSError, match="No space left on device"):
        checkpoints.save(Snapshot({"step": 2}, large, large))
    assert checkpoints.save(Snapshot({"step": 2}, large)).name == name_of(2)
    assert names_in(old.parent) == [name_of(2)]


# ------------------------------------------------------------------------------------------------------ damaged files


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Checkpoints(tmp_path_factory.mktemp("valid"), keep=1).save(snapshot(1))


FILES = ["manifest.json", "progress.json", *(f"{part}.safetensors" for part in TENSORS)]


@given(name=st.sampled_from(FILES), place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_bit_is_noticed_or_harmless(valid: Path, name: str, place: float, bit: int):
    """A checkpoint with one bit flipped anywhere is either refused, or gives the very snapshot that was saved."""
    content = (valid / name).read_bytes()
    damaged = bytearray(content)
    damaged[int(place * len(content))] ^= 1 << bit
    try:
        (valid / name).write_bytes(bytes(damaged))
        problem = what_is_wrong(valid)
        if problem is None:
            assert name == "manifest.json", "only the manifest's own white space is not covered by a digest"
            assert_same(load_snapshot(valid), snapshot(1))
        else:
            assert "\n" not in problem
    finally:
        (valid / name).write_bytes(content)
    assert what_is_wrong(valid) is None


@given(name=st.sampled_from(FILES), place=st.floats(0, 1, exclude_max=True))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_truncated_file_is_noticed(valid: Path, name: str, place: float):
    """A checkpoint of which one file is cut short anywhere is refused."""
    content = (valid / name).read_bytes()
    try:
        (valid / name).write_bytes(content[: int(place * len(content))])
        assert what_is_wrong(valid) is not None
    finally:
        (valid / name).write_bytes(content)


def test_each_damaged_checkpoint_is_complained_about(tmp_path: Path):
    """The newest valid checkpoint is found behind two damaged ones, and each of those gets a line that names the file."""
    checkpoints = Checkpoints(tmp_path, keep=4)
    for step in range(1, 5):
        checkpoints.save(snapshot(step))
    (tmp_path / name_of(4) / "momentum.safetensors").unlink()
    (tmp_path / name_of(3) / "progress.json").write_text("{}")
    path, complaints = checkpoints.newest_valid()
    assert path == tmp_path / name_of(2)
    assert complaints == [
        f"{tmp_path}/{name_of(4)}: momentum.safetensors is missing; trying the one before it",
        f"{tmp_path}/{name_of(3)}: progress.json is not as it was written; trying the one before it",
    ]


def rewrite(path: Path, **changes: Any) -> None:
    """Give files of a checkpoint other contents, and the manifest their digests, as somebody does who means harm."""
    manifest = path / "manifest.json"
    digests = json.loads(manifest.read_text())
    for stem, content in changes.items():
        name = f"{stem}.json" if stem == "progress" else f"{stem}.safetensors"
        (path / name).write_bytes(content)
        digests[name] = hashlib.sha256(content).hexdigest()
    manifest.write_text(json.dumps(digests))


@pytest.fixture
def copied(valid: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(valid, tmp_path / valid.name))


MANIFESTS = {
    "foreign": lambda digests: json.dumps(digests | {"../../secret": "0" * 64}),
    "one less": lambda digests: json.dumps({name: digests[name] for name in list(digests)[:-1]}),
    "list": lambda digests: json.dumps(list(digests)),
    "nested": lambda _: "[" * 100_000 + "]" * 100_000,
    "huge": lambda digests: json.dumps(digests) + " " * 2**24,
    "no text": lambda _: "\udcff",
    "empty": lambda _: "",
    "numbers": lambda digests: json.dumps(dict.fromkeys(digests, 7)),
}


@pytest.mark.parametrize("kind", MANIFESTS)
def test_hostile_manifests(copied: Path, kind: str):
    """A manifest that names other files, is huge, deeply nested or no JSON is refused in one line, and nothing else is read."""
    manifest = copied / "manifest.json"
    content = MANIFESTS[kind](json.loads(manifest.read_text()))
    manifest.write_bytes(content.encode(errors="surrogateescape"))
    problem = what_is_wrong(copied)
    assert problem is not None and "\n" not in problem
    with pytest.raises(InputError) as caught:
        load_snapshot(copied)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    assert Checkpoints(copied.parent, keep=1).newest_valid()[0] is None


CONTENTS: dict[str, dict[str, bytes]] = {
    "pickle": {"weights": pickle.dumps({"conv.weight": 1})},
    "huge header": {"weights": (2**62).to_bytes(8, "little") + b"{}"},
    "empty": {"momentum": b""},
    "nested progress": {"progress": b"[" * 100_000},
    "progress of another kind": {"progress": b"[1, 2]"},
    "another version": {"progress": b'{"step": 1, "format": 1}'},
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_contents_that_no_run_wrote(copied: Path, kind: str):
    """Files whose digests agree but which this program did not write are refused in one line."""
    rewrite(copied, **CONTENTS[kind])
    assert what_is_wrong(copied) is None
    with pytest.raises(InputError) as caught:
        load_snapshot(copied)
    assert str(copied) in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.parametrize("part", TENSORS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_checkpoint_that_is_not_finite(copied: Path, part: str, value: float):
    """NaN or infinite weights, momentum, averages or statistics are refused by name."""
    tensors = getattr(load_snapshot(copied), part)
    name = next(key for key, tensor in tensors.items() if tensor.is_floating_point())
    tensors[name][1, 1] = value
    rewrite(copied, **{part: save(tensors)})
    with pytest.raises(InputError, match=f"holds {name} with infinite or NaN values; remove it, an older one will do"):
        load_snapshot(copied)


def test_an_earlier_versions_checkpoints(tmp_path: Path):
    """Folders named by epochs, which an earlier version wrote, are no checkpoints, but show that a run has begun."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    assert not checkpoints.exist()
    (tmp_path / "epoch-03").mkdir()
    assert checkpoints.exist() and checkpoints.newest_valid() == (None, [])
    checkpoints.save(snapshot(1))
    assert (tmp_path / "epoch-03").is_dir()


# ----------------------------------------------------------------------------------------------------------- same run


IDENTITY = {"seed": 0, "swa.lr_max": 0.05, "training images": "a", "sizes": [1, 2]}


def test_the_same_run():
    """What agrees gives no line; tuples are the lists that JSON made of them."""
    assert check_same_run({"identity": IDENTITY}, IDENTITY | {"sizes": (1, 2)}) == []


def test_allowed_by_name():
    """What differs is refused with old and new value and the flag that allows it; each allowed name gives a line, and no other
    name is let through with it.
    """
    now = IDENTITY | {"seed": 1, "swa.lr_max": 0.1}
    with pytest.raises(InputError, match=r"seed was 0, is 1; swa.lr_max was 0.05, is 0.1; .*'\[seed, swa.lr_max\]'"):
        check_same_run({"identity": IDENTITY}, now)
    with pytest.raises(InputError, match=r"another run: swa.lr_max was 0.05, is 0.1; .*--allow_changed='\[swa.lr_max\]'"):
        check_same_run({"identity": IDENTITY}, now, allowed=("seed", "training images"))
    assert check_same_run({"identity": IDENTITY}, now, allowed=("swa.lr_max", "seed")) == [
        "seed was 0, is 1",
        "swa.lr_max was 0.05, is 0.1",
    ]


def test_a_setting_of_a_later_version():
    """A setting that the checkpoint does not know counts as changed."""
    with pytest.raises(InputError, match="seed was None, is 0"):
        check_same_run({"identity": {}}, {"seed": 0})


# ------------------------------------------------------------------------------------------------------- weight files


def test_weight_file(tmp_path: Path):
    """save_weights makes folders as needed, replaces an older file, and leaves nothing else behind."""
    path = tmp_path / "captures" / "epoch-01.safetensors"
    for value in (1.0, 2.0):
        save_weights({"w": torch.full((2,), value)}, path, {"format": "pt"})
    assert torch.equal(load_file(path)["w"], torch.tensor([2.0, 2.0]))
    assert names_in(path.parent) == ["epoch-01.safetensors"]


@pytest.mark.parametrize("function", ["write_flushed", "Path.replace"])
def test_a_failed_write_leaves_the_old_weight_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str):
    """A weight file that cannot be written leaves the one of the same name as it was."""
    path = tmp_path / "swa.safetensors"
    save_weights({"w": torch.ones(2)}, path, {})
    monkeypatch.setattr(Path if "Path" in function else files, function.rpartition(".")[2], full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        save_weights({"w": torch.zeros(2)}, path, {})
    assert names_in(tmp_path) == ["swa.safetensors"]
    assert torch.equal(load_file(path)["w"], torch.ones(2))
