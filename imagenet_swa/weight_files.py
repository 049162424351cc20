"""Files of weights that anybody may have written: read without running code from them."""

import pickle
import traceback
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from imagenet_swa.config import InputError
from imagenet_swa.plain import printable

Weights = dict[str, torch.Tensor]
_MAX_HEADER = 16 * 2**20  # bytes of names and shapes in a safetensors file; the largest networks have less than one


def read_weights(path: Path) -> Weights:
    """A .safetensors or .pth file as names and tensors in host memory; wrappers' prefixes are stripped.

    A .pth is read with `weights_only=True`, which runs no code from the file.

    Raises:
        InputError: no such file, another format, or not a dict of plain tensors.
    """
    if not path.is_file():
        raise InputError(f"no such weights file: {path}")
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise InputError(f"{path}: wanted a .safetensors or .pth file")
    loaded = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pth(path)
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise InputError(f"{path} holds no dict of tensors; save network.state_dict()")
    weights = {canonical_name(str(name)): tensor for name, tensor in loaded.items()}
    for name, tensor in weights.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise InputError(f"{path}: {printable(name)} is sparse, quantized or without values; save plain tensors")
    return weights


def _read_safetensors(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
        if size > _MAX_HEADER:
            raise InputError(f"{path} is not a valid safetensors file: its header would have {size:,} bytes")
        return load_file(path)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise InputError(f"{path} is not a valid safetensors file: {first_line(error)}") from None


def _read_pth(path: Path) -> Any:
    if _is_compressed(path):
        raise InputError(f"{path} is compressed inside and may grow without end; save it with torch.save")
    try:
        return torch.load(path, "cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen types for a file that it does not take
        reason = "" if isinstance(error, pickle.UnpicklingError) else f": {first_line(error)}"
        raise InputError(f"{path} is not a file of plain weights that loads without running code from it{reason}") from None


def _is_compressed(path: Path) -> bool:
    """Whether a zip archive has compressed members, which torch.save never writes."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):  # none; torch has its say about it
        return False


def canonical_name(name: str) -> str:
    """The name a parameter has in the bare network, without what DDP and torch.compile put before it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


def check_finite(weights: Weights, source: str) -> None:
    """Raise InputError, naming the source and the first such tensor, where a value is infinite or no number."""
    for name, tensor in weights.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise InputError(f"{source}: {name} holds infinite values or NaN; wanted weights of a run that did not diverge")


def first_line(error: Exception) -> str:
    """The error's own first line; of an assertion without words, such as pytorchcv's, the line of code that states it."""
    lines = str(error).strip().splitlines()
    if lines:
        return printable(lines[0][:300])
    stated = traceback.extract_tb(error.__traceback__)[-1].line if isinstance(error, AssertionError) else ""
    return stated or type(error).__name__
