"""All settings of a run as frozen dataclasses; YAML and flags become one checked `Config`.

The text under a field is its help text. A `None` means "derived": from the network, the machine or another field.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from imagenet_swa.config.data import DataConfig
from imagenet_swa.config.errors import InputError, LostOthersError, StopRequested, TrainingError, require
from imagenet_swa.config.network import Interpolation, ModelConfig, Preprocessing, PreprocessingConfig
from imagenet_swa.config.safety import CheckpointConfig, ProcessesConfig
from imagenet_swa.config.training import BatchNormConfig, EvaluationConfig, OptimizerConfig, SpeedConfig, SwaConfig

__all__ = [
    "BatchNormConfig",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "InputError",
    "Interpolation",
    "LostOthersError",
    "ModelConfig",
    "OptimizerConfig",
    "Preprocessing",
    "PreprocessingConfig",
    "ProcessesConfig",
    "SpeedConfig",
    "StopRequested",
    "SwaConfig",
    "TrainingError",
    "flatten",
    "require",
    "to_plain",
]


@dataclass(frozen=True, kw_only=True)
class Config:
    """One fine-tuning run"""

    output: Path = Path("runs/swa")
    """Folder that all results go to; on several machines a folder that all of them see."""
    seed: int = 0
    """Decides the order of images, every augmentation, dropout and random initial weights."""
    global_batch_size: int = 256
    """Images per optimizer step over all processes, whatever their number."""
    resume: Literal["auto", "never"] = "auto"
    """auto goes on from the newest valid checkpoint in `output`; never refuses a folder that holds a run."""
    allow_changed: tuple[str, ...] = ()
    """Names of settings, or `training images`, that may differ from what the checkpoint in `output` was made with; any other
    difference ends the program before it starts."""
    max_minutes: float | None = None
    """Time limit: after so many minutes the run saves a checkpoint and ends with exit code 85; the same command goes on."""
    log_every: int = 50
    """Optimizer steps between two lines of metrics.jsonl."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Accelerate trackers that get the metrics as well."""
    model: ModelConfig = field(default_factory=ModelConfig)
    preprocessing: PreprocessingConfig = field(default_factory=PreprocessingConfig)
    data: DataConfig = field(default_factory=DataConfig)
    swa: SwaConfig = field(default_factory=SwaConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batchnorm: BatchNormConfig = field(default_factory=BatchNormConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    processes: ProcessesConfig = field(default_factory=ProcessesConfig)

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, f"seed must be in 0 .. 2^63 - 1, got {self.seed}")
        require(self.global_batch_size >= 1, f"global_batch_size must be at least 1, got {self.global_batch_size}")
        require(self.log_every >= 1, f"log_every must be at least 1 step, got {self.log_every}")
        limit = self.max_minutes
        require(limit is None or limit > 0, f"max_minutes must be above 0, got {limit}")

    def result_settings(self) -> dict[str, Any]:
        """The settings that decide weights and results, flattened to `section.field`: a resumed run must agree in them."""
        flat = flatten(to_plain(self))
        free = ("output", "resume", "allow_changed", "max_minutes", "checkpoint.", "processes.", "log_every", "trackers")
        free += ("data.num_workers", "data.prefetch", "data.on_bad_image", "data.max_bad_images", "data.resize")
        free += ("evaluation.captures", "swa.report_epochs", "swa.include_pretrained")
        # The fingerprints of the images stand for where they lie.
        free += ("data.train", "data.val", "data.index", "data.quarantine", "data.decode")
        return {key: value for key, value in flat.items() if not key.startswith(free)}


def to_plain(config: Any) -> Any:
    """A dataclass as nested dicts, lists and scalars, fit for YAML and JSON."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple | list):
        return [to_plain(item) for item in config]
    return str(config) if isinstance(config, Path) else config


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
