"""Whether all ranks run the same code on the same settings, versions, images and weights; who differs, and in what."""

import hashlib
import json
import platform
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch

from imagenet_swa.config import Config, flatten, to_plain

Description = dict[str, str]

HOST = "host"  # the entry of a description that may differ
# Settings that each machine may have its own of. What they lead to is compared: fingerprints of images and weights.
OF_A_MACHINE = (
    *("output", "model.weights", "data.num_workers", "data.prefetch", "data.index", "data.quarantine"),
    *("data.train", "data.train_list", "data.val", "data.val_list"),
)
# Packages that may change a result.
PACKAGES = (
    *("torch", "torchvision", "timm", "pytorchcv", "accelerate", "safetensors", "numpy", "scipy", "pillow"),
    *("nvidia-dali-cuda120", "nvidia-dali-cuda130"),
)
_MOST_NAMED = 4
_CODE = "code: "
_ABSENT = "absent"


def describe(config: Config, found: Mapping[str, str]) -> Description:
    """What this rank would compute with, by name.

    Args:
        found: what the settings led to on this machine: fingerprints of images and weights, the name of the decoder.
    """
    settings = {
        key: json.dumps(value, default=str) for key, value in flatten(to_plain(config)).items() if key not in OF_A_MACHINE
    }
    return {HOST: socket.gethostname()} | settings | dict(found) | versions() | code_digests()


def versions() -> Description:
    """Versions of Python and of the packages that are installed."""
    found = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def code_digests(package: Path = Path(__file__).parent) -> Description:
    """A digest of each source file below a package, line ends aside; what was compiled from them is the machine's own."""
    paths = sorted(path for kind in ("py", "c", "txt") for path in package.rglob(f"*.{kind}"))
    contents = {path: path.read_bytes().replace(b"\r\n", b"\n") for path in paths}
    return {_CODE + str(path.relative_to(package.parent)): _digest(content) for path, content in contents.items()}


def weights_fingerprint(weights: Mapping[str, torch.Tensor]) -> str:
    """A digest of names, types, shapes and bytes of tensors, whatever their order and device."""
    parts = []
    for name, tensor in sorted(weights.items()):
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        parts.append((name, str(tensor.dtype), list(tensor.shape), hashlib.sha256(content).hexdigest()))
    return _digest(json.dumps(parts).encode())


def differences(descriptions: Sequence[Description]) -> str | None:
    """A line on the ranks that differ from most others, or from rank 0 where there is no majority, and in what; None if none.

    Args:
        descriptions: those of all ranks, in their order.
    """
    lines: dict[tuple[int, ...], list[str]] = {}
    for name in dict.fromkeys(key for description in descriptions for key in description if key != HOST):
        values = [description.get(name, _ABSENT) for description in descriptions]
        if len(set(values)) > 1:
            usual = Counter(values).most_common(1)[0][0]  # of equally many the first, which is rank 0's if it is among them
            for value in dict.fromkeys(values):
                if value != usual:
                    ranks = tuple(rank for rank, other in enumerate(values) if other == value)
                    lines.setdefault(ranks, []).append(_difference(name, value, usual))
    if not lines:
        return None
    who = [f"{_names(ranks, descriptions)}: {_enumerate(whats)}" for ranks, whats in lines.items()]
    return (
        f"not all ranks would compute the same. {_enumerate(who, separator='. ')}. Start all of them with the same command and "
        "configuration, code, packages and data"
    )


def _difference(name: str, value: str, usual: str) -> str:
    if name.startswith(_CODE):
        how = {_ABSENT: "is missing"}.get(value, "is additional" if usual == _ABSENT else "differs")
        return f"{name} {how}"
    return f"{name} is {_short(value)} instead of {_short(usual)}"


def _names(ranks: Sequence[int], descriptions: Sequence[Description]) -> str:
    hosts = dict.fromkeys(descriptions[rank].get(HOST, "?") for rank in ranks)
    numbers = _enumerate([str(rank) for rank in ranks])
    return f"rank{'s' if len(ranks) > 1 else ''} {numbers} on {_enumerate([_short(host) for host in hosts])}"


def _enumerate(items: Sequence[str], separator: str = ", ") -> str:
    """The first few, and how many more."""
    rest = len(items) - _MOST_NAMED
    return separator.join(items[:_MOST_NAMED]) + (f"{separator}and {rest} more" if rest > 0 else "")


def _short(text: str) -> str:
    printable = "".join(filter(str.isprintable, text))
    return printable if len(printable) <= 60 else printable[:57] + "..."


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
