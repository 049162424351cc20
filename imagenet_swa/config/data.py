"""Settings of the images and their decoding."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from imagenet_swa.config.errors import require


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images are and who decodes them"""

    train: str | None = None
    """Training images: a folder with one sub-folder per class; tar shards as WebDataset lays them out, by a folder that holds
    them or a pattern such as `/data/train-{0000..1023}.tar`, also `s3://bucket/train-*.tar`; with `train_list`, the folder or
    `s3://bucket/prefix` that its paths start from."""
    train_list: str | None = None
    """Text file (or `s3://` object) with a line `path label` per training image; paths lie below `train`, by `..` or from `/` too
    (with `train` set to `/` any path does)."""
    val: str | None = None
    """Validation images, named like `train`."""
    val_list: str | None = None
    """Text file (or `s3://` object) with a line `path label` per validation image."""
    index: Path | None = None
    """Folder of the indices that `imagenet-swa index` writes; default: beside the data."""
    quarantine: Path | None = None
    """List of images to leave out, as `imagenet-swa verify` writes it: lines `split, name, reason` separated by tabs."""
    on_bad_image: Literal["stop", "skip"] = "stop"
    """What an image that cannot be read (for whatever reason) or decoded does: stop the run with its name, or be left out,
    named and counted; with skip, all processes compare notes after each step."""
    max_bad_images: int = 100
    """With on_bad_image skip: the most images that a pass over the training or validation images may leave out."""
    num_held_out: int = 0
    """Training images that no training sees, the same for every seed; `imagenet-swa averages` chooses its soup by them."""
    synthetic: bool = False
    """Made-up images instead of files: tries a machine or a configuration without any data."""
    synthetic_num_images: tuple[int, int] = (2560, 512)
    """Number of made-up training and validation images."""
    backend: Literal["dali", "torchvision"] = "dali"
    """Who decodes: NVIDIA DALI, or torchvision (PIL), slower, needs nothing installed. Same crops from both."""
    decode: Literal["auto", "cpu", "gpu"] = "auto"
    """DALI: decode on the CPU or the GPU; auto takes the GPU where there is one."""
    resize: Literal["auto", "compiled", "dali"] = "auto"
    """DALI on the CPU: who resizes what it decoded. compiled: the project's own C code, with Pillow's pixels and faster;
    dali: DALI's operator, which differs at the borders of crops; auto takes the compiled one where it was built."""
    num_workers: int | None = None
    """Decoding threads (DALI) or processes (torchvision) per training process; default: an equal share of the cores."""
    prefetch: int = 2
    """Batches prepared ahead."""

    def __post_init__(self) -> None:
        require(self.max_bad_images >= 0, f"data.max_bad_images must be 0 or more, got {self.max_bad_images}")
        require(self.num_held_out >= 0, f"data.num_held_out must be 0 or more, got {self.num_held_out}")
        require(self.prefetch >= 1, f"data.prefetch must be at least 1 batch, got {self.prefetch}")
        require(self.num_workers is None or self.num_workers >= 0, f"data.num_workers must be 0 or more, got {self.num_workers}")
        numbers = self.synthetic_num_images
        require(min(numbers) >= 1, f"data.synthetic_num_images must be at least 1 each, got {numbers}")
