"""Save and resume all that a run needs: atomic, verified, the last k kept. safetensors and JSON only."""

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from imagenet_swa.config import InputError, to_plain
from imagenet_swa.files import flush, write_atomically

MANIFEST = "manifest.json"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Snapshot:
    """Everything a run's future depends on at the end of an epoch.

    Attributes:
        progress: epoch and step as numbers of finished ones, num_averaged, loss scale, and what the run was started with.
        weights: parameters and buffers of the network.
        momentum: SGD's buffers by parameter name.
        average: `WeightAverage.state()`.
    """

    progress: dict[str, Any]
    weights: Tensors
    momentum: Tensors = field(default_factory=dict)
    average: Tensors = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run, folders `epoch-03` below one folder. Only the main process saves."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    def save(self, snapshot: Snapshot) -> Path:
        """Write a checkpoint aside, flush it, list its files' digests, rename it; only then remove the oldest.

        Checkpoints of later epochs, which only a damaged file can leave behind, do not count among those to keep.
        """
        name = f"epoch-{snapshot.progress['epoch']:02d}"
        partial, final = self._folder / f"{name}.partial", self._folder / name
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for part in ("weights", "momentum", "average"):
            _write_tensors(getattr(snapshot, part), partial / f"{part}.safetensors")
        write_atomically(partial / "progress.json", json.dumps(snapshot.progress, indent=1))
        files = sorted(partial.iterdir())
        for path in files:
            flush(path)
        digests = {path.name: _digest(path) for path in files}
        write_atomically(partial / MANIFEST, json.dumps(digests, indent=1))
        flush(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        flush(self._folder)
        up_to_this = [path for path in self._complete() if _epoch_of(path) <= _epoch_of(final)]
        for old in up_to_this[: -self._keep]:
            shutil.rmtree(old)
        return final

    def exist(self) -> bool:
        """Whether there are any, valid or not."""
        return bool(self._complete())

    def newest_valid(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint whose files are all as written, and a line about each newer one that is not."""
        complaints = []
        for path in reversed(self._complete()):
            problem = what_is_wrong(path)
            if problem is None:
                return path, complaints
            complaints.append(f"{path}: {problem}; trying the one before it")
        return None, complaints

    def _complete(self) -> list[Path]:
        """Folders that were renamed to their final name, oldest first."""
        return sorted((path for path in self._folder.glob("epoch-*") if _epoch_of(path) >= 0), key=_epoch_of)


def _epoch_of(path: Path) -> int:
    """The number in the name of a checkpoint folder; -1 for other names, such as `epoch-03.partial`."""
    number = path.name.removeprefix("epoch-")
    return int(number) if number.isdecimal() else -1


def load_snapshot(path: Path) -> Snapshot:
    """Read back a checkpoint that `newest_valid` gave."""
    return Snapshot(
        progress=json.loads((path / "progress.json").read_text()),
        weights=load_file(path / "weights.safetensors"),
        momentum=load_file(path / "momentum.safetensors"),
        average=load_file(path / "average.safetensors"),
    )


def check_same_run(progress: dict[str, Any], identity: dict[str, Any]) -> None:
    """Raise InputError where a checkpoint's run and the present one differ in what decides the results."""
    saved = progress["identity"]
    changed = [key for key in identity if saved.get(key) != to_plain(identity[key])]
    if changed:
        what = "; ".join(f"{key} was {saved.get(key)}, is {to_plain(identity[key])}" for key in changed[:4])
        raise InputError(f"the checkpoint belongs to another run: {what}; restore the old settings, or choose another output")


def what_is_wrong(path: Path) -> str | None:
    """Why a checkpoint folder cannot be trusted, None if every file has the digest of its manifest."""
    try:
        digests: dict[str, str] = json.loads((path / MANIFEST).read_text())
    except (OSError, ValueError):  # no JSON, or no text at all
        return f"its {MANIFEST} is missing or damaged"
    for name, digest in digests.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _digest(path / name) != digest:
            return f"{name} is not as it was written"
    return None


def save_weights(weights: Tensors, path: Path, metadata: dict[str, str]) -> None:
    """A safetensors file, written aside, flushed and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    _write_tensors(weights, partial, metadata)
    flush(partial)
    partial.replace(path)


def copy_atomically(source: Path, target: Path) -> None:
    """A copy of a file, written aside, flushed and renamed."""
    partial = target.with_name(target.name + ".partial")
    shutil.copyfile(source, partial)
    flush(partial)
    partial.replace(target)


def _write_tensors(tensors: Tensors, path: Path, metadata: dict[str, str] | None = None) -> None:
    """`save_file` which raises OSError where the system refuses, such as for a full disk; safetensors has its own error."""
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
