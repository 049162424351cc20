"""Choose and build the loaders of a run."""

from dataclasses import dataclass

import torch

from imagenet_swa.config import Config, InputError, Preprocessing
from imagenet_swa.data.batch import ImageLoader
from imagenet_swa.data.index import ImageIndex, check_classes, check_same_classes, index_folder, index_list
from imagenet_swa.data.synthetic import SyntheticLoader, synthetic_index
from imagenet_swa.runtime import Runtime, num_cpus


@dataclass(frozen=True)
class Loaders:
    """The two splits."""

    train: ImageLoader
    val: ImageLoader


def build_indices(config: Config) -> tuple[ImageIndex, ImageIndex]:
    """The training and validation images that the configuration names.

    Raises:
        InputError: nothing named, nothing found, or labels that cannot be the network's.
    """
    if config.data.synthetic:
        num_train, num_val = config.data.synthetic_num_images
        return synthetic_index(num_train, config.model.num_classes), synthetic_index(num_val, config.model.num_classes)
    train, val = (_index_split(config, split) for split in ("train", "val"))
    check_same_classes(train, val)
    return train, val


def _index_split(config: Config, split: str) -> ImageIndex:
    root, list_file = getattr(config.data, split), getattr(config.data, f"{split}_list")
    if root is None:
        raise InputError(f"data.{split} is not set: pass --data.{split} FOLDER, or --data.synthetic to run without data")
    if list_file is not None:
        return index_list(list_file, root, config.model.num_classes)
    index = index_folder(root)
    check_classes(index, split, config.model.num_classes)
    return index


def build_loaders(
    config: Config, indices: tuple[ImageIndex, ImageIndex], preprocessing: Preprocessing, runtime: Runtime
) -> Loaders:
    """Loaders of the chosen backend for both splits, on this process's device."""
    train, val = (_build_loader(config, index, preprocessing, runtime) for index in indices)
    return Loaders(train=train, val=val)


def _build_loader(config: Config, index: ImageIndex, preprocessing: Preprocessing, runtime: Runtime) -> ImageLoader:
    data, on_gpu = config.data, runtime.device.type == "cuda"
    common = {"seed": config.seed, "device": runtime.device, "channels_last": config.speed.channels_last}
    if data.synthetic:
        return SyntheticLoader(index, preprocessing, **common)
    num_workers = data.num_workers if data.num_workers is not None else max(1, num_cpus() // runtime.local_world_size)
    common |= {"prefetch": data.prefetch}
    if data.decode == "gpu" and data.backend != "dali":
        raise InputError(
            f"data.decode is gpu, but only DALI decodes there and data.backend is {data.backend}; set one of the two"
        )
    if data.backend == "torchvision":
        from imagenet_swa.data.torch_loader import TorchvisionLoader

        return TorchvisionLoader(index, preprocessing, num_workers=num_workers, **common)
    if data.decode == "gpu" and not on_gpu:
        raise InputError("data.decode is gpu, but no GPU was found; set it to auto or cpu")
    try:
        from imagenet_swa.data.dali import DaliLoader
    except ImportError:
        major = (torch.version.cuda or "13").split(".")[0]
        raise InputError(
            f"NVIDIA DALI is not installed: pip install 'imagenet-swa[dali-cuda{major}]', or pass --data.backend torchvision"
        ) from None
    return DaliLoader(index, preprocessing, decode_on_gpu=on_gpu and data.decode != "cpu", num_threads=num_workers, **common)
