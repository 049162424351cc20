"""The three loaders on the CPU with the settings that their tests share; what is named in `changes` differs."""

from typing import Any

import torch

from imagenet_swa.config import Preprocessing
from imagenet_swa.data.dali import DaliLoader
from imagenet_swa.data.index import ImageIndex
from imagenet_swa.data.torch_loader import TorchvisionLoader

CPU = torch.device("cpu")


def dali_loader(index: ImageIndex, work: Preprocessing, **changes: Any) -> DaliLoader:
    """DALI, with its own resize."""
    arguments: dict[str, Any] = {"seed": 0, "device": CPU, "decode_on_gpu": False, "num_threads": 2, "prefetch": 2}
    return DaliLoader(index, work, **arguments | changes)


def compiled_loader(index: ImageIndex, work: Preprocessing, **changes: Any) -> DaliLoader:
    """DALI, with the compiled resize."""
    return dali_loader(index, work, compiled_resize=True, **changes)


def torchvision_loader(index: ImageIndex, work: Preprocessing, **changes: Any) -> TorchvisionLoader:
    """PIL, in this process: threads mean nothing to it."""
    changes.pop("num_threads", None)
    return TorchvisionLoader(index, work, **{"seed": 0, "device": CPU, "num_workers": 0, "prefetch": 2} | changes)
