"""Save and resume all that a run needs: whole or not there, verified, the last k kept. safetensors and JSON only."""

import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from imagenet_swa.config import InputError, to_plain
from imagenet_swa.files import drop_from_cache, flush, write_atomically, write_flushed
from imagenet_swa.plain import is_count

MANIFEST, PROGRESS = "manifest.json", "progress.json"
FORMAT = 2
_MAX_JSON = 2**24  # bytes
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Snapshot:
    """Everything a run's future depends on after a step.

    Attributes:
        progress: number of finished steps, num_averaged, loss scale, losses not logged yet, what the run was started with.
        weights: parameters and buffers of the network, on rank 0.
        momentum: SGD's buffers by parameter name.
        average: `WeightAverage.state()`.
        statistics: BatchNorm's moving statistics of each rank, `rank-0/NAME`, where they differ between ranks.
    """

    progress: dict[str, Any]
    weights: Tensors
    momentum: Tensors = field(default_factory=dict)
    average: Tensors = field(default_factory=dict)
    statistics: Tensors = field(default_factory=dict)


TENSORS = ("weights", "momentum", "average", "statistics")
_NAMES = {PROGRESS, *(f"{part}.safetensors" for part in TENSORS)}


class Checkpoints:
    """The checkpoints of one run, folders `step-0000123` below one folder. Only the main process saves."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    def save(self, snapshot: Snapshot) -> Path:
        """Write a checkpoint aside, flush it, list the digests of what was to be written, read it back, rename it; only then
        remove the oldest. One of the same step that is whole stays as it is.

        Checkpoints of later steps, which only a damaged file can leave behind, do not count among those to keep.

        Raises:
            OSError: the disk refused, or gave back something else; the checkpoints of before are as they were.
        """
        final = self._folder / f"step-{snapshot.progress['step']:07d}"
        if not final.exists() or what_is_wrong(final) is not None:
            partial = self._write_aside(snapshot, final)
            _remove(final)
            partial.rename(final)
            flush(self._folder)
        up_to_this = [path for path in self._complete() if _step_of(path) <= _step_of(final)]
        for old in up_to_this[: -self._keep]:
            _remove(old)
        return final

    def _write_aside(self, snapshot: Snapshot, final: Path) -> Path:
        partial = final.with_name(final.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            self._write_files(snapshot, partial)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)  # such as for a full disk, which needs the room
            raise
        return partial

    def _write_files(self, snapshot: Snapshot, partial: Path) -> None:
        progress = json.dumps(snapshot.progress | {"format": FORMAT}, indent=1).encode()
        digests = {PROGRESS: write_flushed(partial / PROGRESS, progress)}
        for part in TENSORS:
            name = f"{part}.safetensors"
            digests[name] = write_flushed(partial / name, save(getattr(snapshot, part)))
        write_flushed(partial / MANIFEST, json.dumps(digests, indent=1).encode())
        flush(partial)
        for path in partial.iterdir():
            drop_from_cache(path)
        if (problem := what_is_wrong(partial)) is not None:
            raise OSError(5, f"the disk gave back something else than was written: {problem}", str(partial))

    def exist(self) -> bool:
        """Whether there are any, valid or not, of this version or an earlier one."""
        return bool(self._complete()) or any(self._folder.glob("epoch-*"))

    def newest_valid(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint whose files are all as written, and a line about each newer one that is not."""
        complaints = []
        for path in reversed(self._complete()):
            problem = what_is_wrong(path)
            if problem is None:
                return path, complaints
            complaints.append(f"{path}: {problem}; trying the one before it")
        return None, complaints

    def set_aside_after(self, step: int) -> None:
        """Rename those of later steps, which were damaged or unreadable: the run goes on from before them."""
        for path in self._complete():
            if _step_of(path) > step:
                aside = path.with_name(f"{path.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)

    def _complete(self) -> list[Path]:
        """Folders that were renamed to their final name, oldest first."""
        return sorted((path for path in self._folder.glob("step-*") if _step_of(path) >= 0 and path.is_dir()), key=_step_of)


def _step_of(path: Path) -> int:
    """The number in the name of a checkpoint folder; -1 for other names, such as `step-0000003.partial`."""
    number = path.name.removeprefix("step-")
    return int(number) if re.fullmatch("[0-9]{7,18}", number) else -1


def _remove(checkpoint: Path) -> None:
    """Under another name first: what is half removed does not look like a checkpoint."""
    if checkpoint.exists():
        aside = checkpoint.with_name(checkpoint.name + ".old.partial")
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
        shutil.rmtree(aside)


def load_snapshot(path: Path) -> Snapshot:
    """Read back a checkpoint that `newest_valid` gave; each file is checked again as it is read.

    Raises:
        InputError: it is not as it was written, or cannot be what this program wrote.
    """
    try:
        digests = _read_manifest(path)
        contents = {name: (path / name).read_bytes() for name in digests}
        wrong = [name for name, content in contents.items() if hashlib.sha256(content).hexdigest() != digests[name]]
        tensors = {part: load(contents[f"{part}.safetensors"]) for part in TENSORS}
        progress = json.loads(contents[PROGRESS])
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise InputError(f"the checkpoint {path} cannot be read: {' '.join(str(error).split())[:300]}") from None
    if wrong:
        raise InputError(f"the checkpoint {path} changed while it was read: {wrong[0]}")
    if not isinstance(progress, dict) or progress.get("format") != FORMAT:
        raise InputError(f"the checkpoint {path} was written by another version of this program; finish the run with that one")
    if not is_count(progress.get("step")) or not isinstance(progress.get("identity", {}), dict):
        raise InputError(f"the checkpoint {path} does not say of which run and step it is; remove it, an older one will do")
    for name, tensor in chain.from_iterable(part.items() for part in tensors.values()):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise InputError(f"the checkpoint {path} holds {name} with infinite or NaN values; remove it, an older one will do")
    return Snapshot(progress=progress, **tensors)


def check_same_run(progress: dict[str, Any], identity: dict[str, Any], allowed: Sequence[str] = ()) -> list[str]:
    """Differences between a checkpoint's run and the present one that were allowed by name, a line each.

    Raises:
        InputError: they differ in anything else that decides the results.
    """
    saved = progress.get("identity", {})
    changed = {key: f"{key} was {saved.get(key)}, is {to_plain(identity[key])}" for key in identity}
    changed = {key: text for key, text in changed.items() if saved.get(key) != to_plain(identity[key])}
    refused = [key for key in changed if key not in allowed]
    if refused:
        what = "; ".join(changed[key] for key in refused[:4]) + ("; ..." if len(refused) > 4 else "")
        raise InputError(
            f"the checkpoint belongs to another run: {what}; restore the old settings, choose another output, or name what may "
            f"differ: --allow_changed='[{', '.join(refused)}]'"
        )
    return list(changed.values())


def what_is_wrong(path: Path) -> str | None:
    """Why a checkpoint folder cannot be trusted, None if every file has the digest of its manifest."""
    try:
        digests = _read_manifest(path)
    except (OSError, ValueError, RecursionError):  # no JSON, or no text at all
        return f"its {MANIFEST} is missing or damaged"
    for name, digest in digests.items():
        try:
            if not (path / name).is_file():
                return f"{name} is missing"
            if _digest(path / name) != digest:
                return f"{name} is not as it was written"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def _read_manifest(path: Path) -> dict[str, str]:
    """The digests by file name; ValueError where it names other files than a checkpoint has."""
    if (path / MANIFEST).stat().st_size > _MAX_JSON:
        raise ValueError("too large")
    digests = json.loads((path / MANIFEST).read_bytes())
    if not isinstance(digests, dict) or set(digests) != _NAMES:
        raise ValueError("not the files of a checkpoint")
    return digests


def save_weights(weights: Tensors, path: Path, metadata: dict[str, str]) -> None:
    """A safetensors file, written aside, flushed and renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, save(weights, metadata))


def copy_atomically(source: Path, target: Path) -> None:
    """A copy of a file, written aside, flushed and renamed."""
    partial = target.with_name(target.name + ".partial")
    shutil.copyfile(source, partial)
    flush(partial)
    partial.replace(target)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
