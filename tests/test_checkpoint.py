"""Checkpoints on a disk that fills up, files that change, and names that sort badly."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file

from imagenet_swa import checkpoint
from imagenet_swa.checkpoint import Checkpoints, Snapshot, load_snapshot, save_weights, what_is_wrong


def snapshot(epoch: int) -> Snapshot:
    """A snapshot that says its epoch in every tensor."""
    tensor = torch.full((3, 2), float(epoch))
    return Snapshot(
        progress={"epoch": epoch, "step": 10 * epoch, "identity": {"seed": 0, "pair": [1, 2]}, "loss_scale": None},
        weights={"conv.weight": tensor, "bn.num_batches_tracked": torch.tensor(epoch)},
        momentum={"conv.weight": tensor * 2},
        average={"average/conv.weight": tensor * 3, "pretrained/conv.weight": tensor * 4},
    )


def assert_same(one: Snapshot, other: Snapshot) -> None:
    assert one.progress == other.progress
    for part in ("weights", "momentum", "average"):
        tensors, wanted = getattr(one, part), getattr(other, part)
        assert tensors.keys() == wanted.keys()
        for name in wanted:
            assert torch.equal(tensors[name], wanted[name])
            assert tensors[name].dtype == wanted[name].dtype


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("momentum", [True, False])
def test_what_was_saved_is_loaded(tmp_path: Path, momentum: bool):
    """A loaded snapshot is the saved one: numbers, tensors, types; also before the first step, when there is no momentum."""
    saved = snapshot(3) if momentum else Snapshot(snapshot(3).progress, snapshot(3).weights)
    path = Checkpoints(tmp_path, keep=2).save(saved)
    assert path == tmp_path / "epoch-03"
    assert_same(load_snapshot(path), saved)


def test_manifest_lists_sha256_of_every_file(tmp_path: Path):
    """manifest.json names every other file of the checkpoint with its SHA-256."""
    path = Checkpoints(tmp_path, keep=2).save(snapshot(1))
    wanted = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.iterdir() if file.name != "manifest.json"}
    assert len(wanted) == 4
    assert json.loads((path / "manifest.json").read_text()) == wanted


@pytest.mark.parametrize("epochs", [(9, 10), (99, 100), (2, 10, 100)])
def test_epochs_sort_by_number(tmp_path: Path, epochs: tuple[int, ...]):
    """The newest checkpoint is that of the largest epoch, not of the last name in the alphabet."""
    checkpoints = Checkpoints(tmp_path, keep=5)
    for epoch in epochs:
        checkpoints.save(snapshot(epoch))
    path, complaints = checkpoints.newest_valid()
    assert path is not None and complaints == []
    assert load_snapshot(path).progress["epoch"] == max(epochs)


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
    for epoch in range(1, number + 1):
        checkpoints.save(snapshot(epoch))
        assert names_in(folder) == [f"epoch-{e:02d}" for e in range(max(1, epoch - keep + 1), epoch + 1)]
    assert all(what_is_wrong(path) is None for path in folder.iterdir())


def test_the_old_goes_after_the_new_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With one checkpoint to keep, the old one is removed only when the new one is complete under its final name."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(snapshot(1))
    original = shutil.rmtree
    removed = []

    def rmtree(path: Path, *arguments: Any, **options: Any) -> None:
        if path.exists():
            assert what_is_wrong(tmp_path / "epoch-02") is None, f"{path.name} was removed first"
            removed.append(path.name)
        original(path, *arguments, **options)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    checkpoints.save(snapshot(2))
    assert removed == ["epoch-01"]


def test_a_damaged_later_checkpoint_does_not_push_out_the_new_one(tmp_path: Path):
    """A run that had to begin again keeps its new checkpoints although a damaged one has a larger number."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(snapshot(5))
    (tmp_path / "epoch-05" / "weights.safetensors").write_bytes(b"damaged")
    path = checkpoints.save(snapshot(1))
    assert checkpoints.newest_valid()[0] == path


def test_saving_over_a_damaged_checkpoint(tmp_path: Path):
    """The checkpoint of an epoch that is trained again replaces the damaged one, leftovers of a cut write included."""
    checkpoints = Checkpoints(tmp_path, keep=2)
    path = checkpoints.save(snapshot(1))
    (path / "weights.safetensors").write_bytes(b"damaged")
    shutil.copytree(path, tmp_path / "epoch-01.partial")
    (tmp_path / "epoch-01.partial" / "leftover").touch()
    checkpoints.save(snapshot(1))
    assert checkpoints.newest_valid() == (path, [])
    assert names_in(tmp_path) == ["epoch-01"]
    assert "leftover" not in names_in(path)


def test_strange_names_are_ignored(tmp_path: Path):
    """Folders that a person put beside the checkpoints neither count, nor disturb, nor get removed."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    strange = ["epoch-02.partial", "epoch-07-copy", "epoch-", "epoch-latest", "notes"]
    for name in strange:
        (tmp_path / name).mkdir()
    checkpoints.save(snapshot(1))
    checkpoints.save(snapshot(3))
    assert checkpoints.newest_valid() == (tmp_path / "epoch-03", [])
    assert names_in(tmp_path) == sorted([*strange, "epoch-03"])


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
WRITES = [*(("save_file", call) for call in (1, 2, 3)), *(("os.fsync", call) for call in range(1, 8)), ("write_atomically", 1)]
WRITES += [("write_atomically", 2), ("Path.rename", 1)]


@pytest.mark.parametrize(("function", "call"), WRITES)
def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, call: int):
    """Whatever write fails, on a full disk or elsewhere, the checkpoint before it is whole and the one to resume from."""
    checkpoints = Checkpoints(tmp_path, keep=1)
    old = checkpoints.save(snapshot(1))
    holder = {"os.fsync": os, "Path.rename": Path}.get(function, checkpoint)
    name = function.rpartition(".")[2]
    with monkeypatch.context() as patch:
        patch.setattr(holder, name, failing_at(call, getattr(holder, name)))
        with pytest.raises(OSError, match="No space left on device"):
            checkpoints.save(snapshot(2))
    assert checkpoints.newest_valid() == (old, [])
    assert_same(load_snapshot(old), snapshot(1))
    new = checkpoints.save(snapshot(2))  # as soon as there is room again
    assert names_in(tmp_path) == ["epoch-02"]
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
    assert set(before) == {*names_in(path), "epoch-01"}
    assert before[-1] == "epoch-01"
    assert after == ["checkpoints"]


def test_safetensors_own_error_becomes_the_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """safetensors' error for a full disk, which is no OSError, becomes one with number and path; its other errors stay."""

    def save_file(*_: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises(OSError, match=r"No space left on device: .*weights\.safetensors") as caught:
        Checkpoints(tmp_path, keep=1).save(snapshot(1))
    assert caught.value.errno == errno.ENOSPC

    def other_error(*_: Any) -> None:
        raise SafetensorError("InvalidHeader")

    monkeypatch.setattr(checkpoint, "save_file", other_error)
    with pytest.raises(SafetensorError, match="InvalidHeader"):
        Checkpoints(tmp_path, keep=1).save(snapshot(1))


# ------------------------------------------------------------------------------------------------------ damaged files


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Checkpoints(tmp_path_factory.mktemp("valid"), keep=1).save(snapshot(1))


FILES = ["average.safetensors", "manifest.json", "momentum.safetensors", "progress.json", "weights.safetensors"]


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
    for epoch in range(1, 5):
        checkpoints.save(snapshot(epoch))
    (tmp_path / "epoch-04" / "momentum.safetensors").unlink()
    (tmp_path / "epoch-03" / "progress.json").write_text("{}")
    path, complaints = checkpoints.newest_valid()
    assert path == tmp_path / "epoch-02"
    assert complaints == [
        f"{tmp_path}/epoch-04: momentum.safetensors is missing; trying the one before it",
        f"{tmp_path}/epoch-03: progress.json is not as it was written; trying the one before it",
    ]


# ------------------------------------------------------------------------------------------------------- weight files


def test_weight_file(tmp_path: Path):
    """save_weights makes folders as needed, replaces an older file, and leaves nothing else behind."""
    path = tmp_path / "captures" / "epoch-01.safetensors"
    for value in (1.0, 2.0):
        save_weights({"w": torch.full((2,), value)}, path, {"format": "pt"})
    assert torch.equal(load_file(path)["w"], torch.tensor([2.0, 2.0]))
    assert names_in(path.parent) == ["epoch-01.safetensors"]


@pytest.mark.parametrize("function", ["save_file", "flush"])
def test_a_failed_write_leaves_the_old_weight_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str):
    """A weight file that cannot be written leaves the one of the same name as it was."""
    path = tmp_path / "swa.safetensors"
    save_weights({"w": torch.ones(2)}, path, {})
    monkeypatch.setattr(checkpoint, function, full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        save_weights({"w": torch.zeros(2)}, path, {})
    assert torch.equal(load_file(path)["w"], torch.ones(2))
