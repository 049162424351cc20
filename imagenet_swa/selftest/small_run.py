"""The run that the campaign interrupts: seconds long, with all in it that a long one has."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from imagenet_swa.selftest import FaultSettings

CLASSES = ("ant", "bee", "cat")
_IMAGES_PER_CLASS = {"train": 160, "val": 40}


def write_run(folder: Path, settings: FaultSettings) -> Path:
    """Images in `folder`/images and the run's configuration, `folder`/run.yaml, whose path is returned."""
    _write_images(folder / "images")
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings_of_run(folder / "images", settings), sort_keys=False))
    return path


def settings_of_run(images: Path, settings: FaultSettings) -> dict[str, Any]:
    """4 epochs of 40 steps: dropout, gradient accumulation, averages from epoch 1 on, captures within epochs, two reports with a
    BatchNorm pass each, and a checkpoint every 0.2 seconds.
    """
    return {
        "seed": settings.seed,
        "global_batch_size": 12,
        "log_every": 7,
        "model": {
            "name": "test_efficientnet",
            "pretrained": False,
            "num_classes": len(CLASSES),
            "kwargs": {"drop_rate": 0.2, "drop_path_rate": 0.1},
        },
        "preprocessing": {"image_size": 32},
        "data": {
            "train": str(images / "train"),
            "val": str(images / "val"),
            "backend": settings.backend,
            "num_workers": 1,
        },
        "swa": {
            "num_epochs": 4,
            "start_epoch": 1,
            "cycle_steps": 25,
            "lr_max": 0.05,
            "lr_min": 0.005,
            "report_epochs": [2],
        },
        "evaluation": {"batch_size": 16, "precision": settings.precision},
        "speed": {"precision": settings.precision, "max_batch_size_per_device": 3},
        "checkpoint": {"every_minutes": 0.2 / 60},
        "processes": {"silence_seconds": 5.0},
    }


def _write_images(root: Path) -> None:
    """JPEGs of noise around the class's own colour, of many sizes, the same on every machine."""
    random = np.random.default_rng(0)
    for split, per_class in _IMAGES_PER_CLASS.items():
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(per_class):
                height, width = (int(side) for side in random.integers(40, 120, 2))
                smooth = random.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3)).astype(np.uint8)
                smooth[..., label] = 200
                image = Image.fromarray(smooth).resize((width, height), Image.Resampling.BICUBIC)
                image.save(folder / f"{number}.JPEG", quality=90)
