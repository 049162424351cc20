"""Choose and build the loaders of a run."""

import hashlib
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from imagenet_swa.config import Config, InputError, Preprocessing, require
from imagenet_swa.data import resize, storage
from imagenet_swa.data.batch import BadImages, ImageLoader
from imagenet_swa.data.imagenet import SPLITS
from imagenet_swa.data.index import ImageIndex, check_classes, check_labels, check_same_classes, load_index
from imagenet_swa.data.index_cache import build_index, find_index, index_path, read_quarantine
from imagenet_swa.data.sampling import epoch_order
from imagenet_swa.data.sources import Source, Track, scan, source_of, untracked
from imagenet_swa.data.synthetic import SyntheticLoader, synthetic_index
from imagenet_swa.runtime import Runtime, num_cpus

HOLD_OUT_SEED = 0  # of every run, whatever its own: soups of several seeds are chosen on the same images


@dataclass(frozen=True)
class Loaders:
    """The two splits, and the training images that no training sees, if there are any."""

    train: ImageLoader
    val: ImageLoader
    held_out: ImageLoader | None = None


def build_indices(
    config: Config, runtime: Runtime | None = None, track: Track[Any] = untracked, *, evaluation_only: bool = False
) -> tuple[ImageIndex, ImageIndex]:
    """The training and validation images that the configuration names, less those in quarantine.

    An index that `imagenet-swa index` built is used where there is one. Otherwise the data is read: by rank 0, which leaves
    the index in `output`/index for the others. With `evaluation_only` the training images may be left out, and the
    validation images then stand for both.

    Raises:
        InputError: nothing named, nothing found, labels that cannot be the network's, or data that changed; on every rank.
    """
    if config.data.synthetic:
        num_train, num_val = config.data.synthetic_num_images
        return synthetic_index(num_train, config.model.num_classes), synthetic_index(num_val, config.model.num_classes)
    if evaluation_only and config.data.train is None:
        val = _index_of(config, "val", runtime, track)
        return val, val
    train, val = (_index_of(config, split, runtime, track) for split in SPLITS)
    check_same_classes(train, val)
    return train, val


def num_training_images(config: Config) -> int | None:
    """How many images a run trains on, None where the configuration names none."""
    if config.data.synthetic:
        return config.data.synthetic_num_images[0] - config.data.num_held_out
    if config.data.train is None:
        return None
    return len(hold_out(_index_of(config, "train", None, untracked), config.data.num_held_out)[0])


def hold_out(train: ImageIndex, num_held_out: int) -> tuple[ImageIndex, ImageIndex | None]:
    """The training images without those held out, and those, if any; which ones follows from the numbers of images alone.

    Raises:
        InputError: fewer than half would be left.
    """
    if num_held_out == 0:
        return train, None
    require(
        2 * num_held_out <= len(train),
        f"data.num_held_out {num_held_out} is more than half of the {len(train)} training images; lower it",
    )
    order = epoch_order(len(train), seed=HOLD_OUT_SEED, epoch=0)
    return train.take(np.sort(order[num_held_out:])), train.take(np.sort(order[:num_held_out]))


def fingerprint_of_some(index: ImageIndex, num_images: int = 16) -> str:
    """A digest of the bytes of a few images, the same ones on every rank, as this machine reads them."""
    digest = hashlib.sha256()
    for i in np.linspace(0, len(index) - 1, num_images).astype(int).tolist():
        try:
            digest.update(hashlib.sha256(index.read(i)).digest())
        except storage.ReadError:
            digest.update(b"unreadable")
    return digest.hexdigest()


def _index_of(config: Config, split: str, runtime: Runtime | None, track: Track[Any]) -> ImageIndex:
    source = source_of(config.data, split)
    if config.data.index is not None and not config.data.index.is_dir():
        raise InputError(f"data.index {config.data.index} is no folder; run `imagenet-swa index` with it first, or leave it out")
    if runtime is None or runtime.world_size == 1:
        index = find_index(source, config.data.index) or scan(source, num_classes=config.model.num_classes, track=track)[0]
    else:
        index = _from_main(source, config, runtime, track)
    check_classes(index, split, config.model.num_classes)
    check_labels(index, split, config.model.num_classes)
    if config.data.quarantine is None:
        return index
    unwanted = set(read_quarantine(config.data.quarantine, split))
    kept = index.without(unwanted)
    if (num_unknown := len(unwanted) - (len(index) - len(kept))) > 0 and (runtime is None or runtime.is_main):
        print(
            f"imagenet-swa: warning: {num_unknown} line(s) of {config.data.quarantine} name no image of data.{split}",
            file=sys.stderr,
        )
    if not len(kept):
        raise InputError(f"{config.data.quarantine} leaves no image of data.{split}")
    return kept


def _from_main(source: Source, config: Config, runtime: Runtime, track: Track[Any]) -> ImageIndex:
    """Rank 0 finds or builds the index, all others read its file; every rank raises what rank 0 raised."""
    path, problem = None, None
    if runtime.is_main:
        try:
            if find_index(source, config.data.index) is not None:
                path = index_path(source, config.data.index)
            else:
                path = str(build_index(source, config.output / "index", num_classes=config.model.num_classes, track=track)[1])
        except (InputError, OSError) as error:  # whatever it is, no rank may wait for an index that does not come
            problem = str(error)
    path, problem = runtime.from_main((path, problem))
    if problem is not None:
        raise InputError(problem)
    return load_index(path, source.root)[0]


def build_loaders(
    config: Config,
    indices: tuple[ImageIndex, ImageIndex],
    preprocessing: Preprocessing,
    runtime: Runtime,
    held_out: ImageIndex | None = None,
) -> Loaders:
    """Loaders of the chosen backend for both splits, on this process's device."""
    train, val = (
        _build_loader(config, split, index, preprocessing, runtime) for split, index in zip(SPLITS, indices, strict=True)
    )
    apart = None if held_out is None else _build_loader(config, "train", held_out, preprocessing, runtime)
    return Loaders(train=train, val=val, held_out=apart)


def _build_loader(config: Config, split: str, index: ImageIndex, preprocessing: Preprocessing, runtime: Runtime) -> ImageLoader:
    data, common = config.data, {"seed": config.seed, "device": runtime.device, "channels_last": config.speed.channels_last}
    if data.synthetic:
        return SyntheticLoader(index, preprocessing, **common)
    log = config.output / f"bad-images-rank-{runtime.rank}.tsv"
    common |= {
        "prefetch": data.prefetch,
        "bad_images": BadImages(
            index,
            data.on_bad_image,
            data.max_bad_images,
            split=split,
            log=log,
            min_good=1 if config.model.freeze_batchnorm else 2,
        ),
    }
    num_workers = data.num_workers if data.num_workers is not None else max(1, num_cpus() // runtime.local_world_size)
    if data.backend == "torchvision":
        if data.decode == "gpu":
            raise InputError(
                "data.decode is gpu, but only DALI decodes there and data.backend is torchvision; set one of the two"
            )
        from imagenet_swa.data.torch_loader import TorchvisionLoader

        return TorchvisionLoader(index, preprocessing, num_workers=num_workers, **common)
    return _build_dali_loader(config, index, preprocessing, runtime, num_threads=num_workers, **common)


def _build_dali_loader(
    config: Config, index: ImageIndex, preprocessing: Preprocessing, runtime: Runtime, **common: Any
) -> ImageLoader:
    data, on_gpu = config.data, runtime.device.type == "cuda"
    if data.decode == "gpu" and not on_gpu:
        raise InputError("data.decode is gpu, but no GPU was found; set it to auto or cpu")
    if data.resize == "compiled" and not resize.available():
        raise InputError(
            "data.resize is compiled, but that part was not built; install a C compiler (gcc or clang) and the package again, "
            "or set data.resize to auto"
        )
    try:
        from imagenet_swa.data.dali import DaliLoader
    except ImportError:
        major = (torch.version.cuda or "13").split(".")[0]
        raise InputError(
            f"NVIDIA DALI is not installed: pip install 'imagenet-swa[dali-cuda{major}]', or pass --data.backend torchvision"
        ) from None
    return DaliLoader(
        index,
        preprocessing,
        decode_on_gpu=on_gpu and data.decode != "cpu",
        compiled_resize=data.resize != "dali" and resize.available(),
        **common,
    )
