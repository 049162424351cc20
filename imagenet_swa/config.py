"""All settings of a run as frozen dataclasses; YAML and flags become one checked `Config`.

The text under a field is its help text. A `None` means "derived": from the network, the machine or another field.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Interpolation = Literal["bilinear", "bicubic"]


class InputError(ValueError):
    """What the user gave cannot be used. The message is one line: what, got, wanted, what to do next."""

    concerns_one_rank = False  # whether other ranks may not know, so that this rank has to say it


class TrainingError(RuntimeError):
    """Training cannot go on. The message is one line for people."""


def require(condition: bool, message: str) -> None:
    """Raise `InputError(message)` unless the condition holds."""
    if not condition:
        raise InputError(message)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network and the weights it starts from"""

    library: Literal["timm", "torchvision"] = "timm"
    """Library that defines the network."""
    name: str = "resnet50.tv_in1k"
    """`architecture.weights` as the library names them: timm `resnet50.tv_in1k`, torchvision `resnet50.IMAGENET1K_V1`.
    The part after the dot also decides the preprocessing, with a file's weights too. The architecture alone will do where
    `weights` is a file or `pretrained` is false."""
    pretrained: bool = True
    """Start from pretrained weights; false starts from random ones."""
    weights: Path | None = None
    """A local .safetensors or .pth file with the pretrained weights, instead of the library's own."""
    num_classes: int = 1000
    """Number of outputs of the network."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the network's constructor, such as `drop_rate: 0.2`."""
    freeze_batchnorm: bool = False
    """Train with the pretrained BatchNorm statistics, which then are neither updated nor recomputed."""
    sync_batchnorm: bool = False
    """Share BatchNorm's batch statistics between all processes (SyncBatchNorm; needs GPUs)."""

    def __post_init__(self) -> None:
        require(self.num_classes >= 1, f"model.num_classes must be at least 1, got {self.num_classes}")
        require(bool(self.name), "model.name is empty; give a name such as resnet50.tv_in1k")


@dataclass(frozen=True, kw_only=True)
class PreprocessingConfig:
    """How an image becomes the network's input; what is left out comes from the network's own data config"""

    image_size: int | None = None
    """Height and width of the network's input, pixels."""
    resize: int | None = None
    """Evaluation: length of the shorter side before the central crop, pixels."""
    interpolation: Interpolation | None = None
    """Evaluation: filter of the (antialiased) resize."""
    train_interpolation: Interpolation = "bilinear"
    """Training: filter of the (antialiased) resize; bilinear is what torchvision's weights were trained with."""
    mean: tuple[float, float, float] | None = None
    """Per channel, for pixels scaled to 0..1."""
    std: tuple[float, float, float] | None = None
    """Per channel, for pixels scaled to 0..1."""
    crop_area: tuple[float, float] = (0.08, 1.0)
    """Training: range of the random crop's share of the image area."""
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Training: range of the random crop's width / height."""
    horizontal_flip: bool = True
    """Training: mirror half of the images."""

    def __post_init__(self) -> None:
        for name in ("crop_area", "crop_aspect"):
            low, high = getattr(self, name)
            require(0 < low <= high, f"preprocessing.{name} must be 0 < low <= high, got {low}, {high}")
        require(self.crop_area[1] <= 1, f"preprocessing.crop_area must not exceed 1, got {self.crop_area[1]}")
        for name in ("image_size", "resize"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"preprocessing.{name} must be at least 1 pixel, got {value}")
        require(self.std is None or min(self.std) > 0, f"preprocessing.std must be positive, got {self.std}")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """`PreprocessingConfig` with every blank filled in: what the loaders work by."""

    image_size: int
    resize: int
    interpolation: Interpolation
    train_interpolation: Interpolation
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_area: tuple[float, float]
    crop_aspect: tuple[float, float]
    horizontal_flip: bool

    def __post_init__(self) -> None:
        require(
            self.resize >= self.image_size,
            f"preprocessing.resize {self.resize} is smaller than the central crop of {self.image_size} pixels; "
            f"set preprocessing.resize to at least {self.image_size}",
        )

    def describe(self) -> str:
        """One line for people."""
        numbers = " ".join(f"{v:g}" for v in self.mean), " ".join(f"{v:g}" for v in self.std)
        return (
            f"evaluation: resize {self.resize} {self.interpolation}, central crop {self.image_size}; "
            f"training: random crop of {self.crop_area[0]:g}-{self.crop_area[1]:g} of the area, "
            f"{self.train_interpolation}, {'flip' if self.horizontal_flip else 'no flip'}; "
            f"mean {numbers[0]}, std {numbers[1]}"
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images are and who decodes them"""

    train: str | None = None
    """Training images: a folder with one sub-folder per class; tar shards as WebDataset lays them out, by a folder that holds
    them or a pattern such as `/data/train-{0000..1023}.tar`, also `s3://bucket/train-*.tar`; with `train_list`, the folder or
    `s3://bucket/prefix` that its paths start from."""
    train_list: str | None = None
    """Text file (or `s3://` object) with a line `path label` per training image."""
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
        require(self.prefetch >= 1, f"data.prefetch must be at least 1 batch, got {self.prefetch}")
        require(self.num_workers is None or self.num_workers >= 0, f"data.num_workers must be 0 or more, got {self.num_workers}")
        numbers = self.synthetic_num_images
        require(min(numbers) >= 1, f"data.synthetic_num_images must be at least 1 each, got {numbers}")


@dataclass(frozen=True, kw_only=True)
class SwaConfig:
    """The fine-tuning itself: learning-rate cycles and the average (Alg. 1 of the paper)"""

    num_epochs: int = 10
    """Passes over the training data."""
    schedule: Literal["cyclical", "constant"] = "cyclical"
    """cyclical: from just under lr_max linearly to lr_min within each cycle; constant: lr_max throughout."""
    lr_max: float = 1e-3
    """Learning rate that a cycle starts from (paper: alpha_1)."""
    lr_min: float = 1e-5
    """Learning rate that a cycle ends at, where the weights are captured (paper: alpha_2)."""
    cycle_epochs: int = 1
    """Length of a cycle in epochs (paper: c)."""
    include_pretrained: bool = True
    """Whether swa.safetensors counts the pretrained weights as the first model (Alg. 1) or holds the captures only.
    The report shows both."""
    report_epochs: tuple[int, ...] = (5, 10)
    """After these epochs the average is given BatchNorm statistics and evaluated; the last epoch always is."""

    def __post_init__(self) -> None:
        require(self.num_epochs >= 1, f"swa.num_epochs must be at least 1, got {self.num_epochs}")
        require(self.cycle_epochs >= 1, f"swa.cycle_epochs must be at least 1, got {self.cycle_epochs}")
        require(
            self.num_epochs % self.cycle_epochs == 0,
            f"swa.num_epochs {self.num_epochs} is not a whole number of cycles of {self.cycle_epochs} epochs",
        )
        require(
            0 <= self.lr_min <= self.lr_max < float("inf"),
            f"wanted 0 <= swa.lr_min <= swa.lr_max, got lr_min {self.lr_min:g}, lr_max {self.lr_max:g}",
        )
        for epoch in self.report_epochs:
            require(
                epoch >= 1 and epoch % self.cycle_epochs == 0,
                f"swa.report_epochs: nothing is captured after epoch {epoch}; "
                f"wanted positive multiples of swa.cycle_epochs {self.cycle_epochs}",
            )

    @property
    def epochs_to_report(self) -> tuple[int, ...]:
        """Numbers of finished epochs after which the average is evaluated, ascending, the last epoch included."""
        return tuple(sorted({epoch for epoch in self.report_epochs if epoch < self.num_epochs} | {self.num_epochs}))


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """SGD"""

    momentum: float = 0.9
    """Momentum; its buffer starts at zero."""
    nesterov: bool = False
    """Nesterov's form of the momentum."""
    weight_decay: float = 1e-4
    """L2 penalty on all parameters."""
    decay_norm_and_bias: bool = True
    """Whether the penalty covers biases and normalisation parameters, as in the paper's code."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes."""

    def __post_init__(self) -> None:
        require(0 <= self.momentum < 1, f"optimizer.momentum must be in [0, 1), got {self.momentum}")
        require(self.weight_decay >= 0, f"optimizer.weight_decay must not be negative, got {self.weight_decay}")
        require(0 <= self.label_smoothing < 1, f"optimizer.label_smoothing must be in [0, 1), got {self.label_smoothing}")
        require(self.momentum > 0 or not self.nesterov, "optimizer.nesterov needs a momentum above 0")


@dataclass(frozen=True, kw_only=True)
class BatchNormConfig:
    """Recomputation of the BatchNorm statistics of averaged weights"""

    num_images: int | None = None
    """Number of training images it looks at; default: all of them."""

    def __post_init__(self) -> None:
        require(
            self.num_images is None or self.num_images >= 2, f"batchnorm.num_images must be at least 2, got {self.num_images}"
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluation on the validation images"""

    batch_size: int = 128
    """Images per process at a time, in evaluation and in the BatchNorm pass."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the evaluation and of the BatchNorm pass."""
    captures: bool = True
    """Evaluate the captured weights of every cycle, one more pass over the validation images each."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"evaluation.batch_size must be at least 1, got {self.batch_size}")


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """Switches that change speed and memory, and the results only by rounding"""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the training steps; weights, momentum and averages stay fp32."""
    tf32: bool = True
    """On GPUs from Ampere on: convolutions and matrix products of fp32 numbers in TF32."""
    channels_last: bool = True
    """Memory order of images and convolution weights; the faster one on GPUs with tensor cores."""
    compile: bool = False
    """Compile the network with torch.compile."""
    fused_optimizer: bool = True
    """Update all parameters in one kernel."""
    max_batch_size_per_device: int = 64
    """Largest batch that a device takes at a time; a larger share of the global batch is accumulated in equal parts."""

    def __post_init__(self) -> None:
        require(
            self.max_batch_size_per_device >= 1,
            f"speed.max_batch_size_per_device must be at least 1, got {self.max_batch_size_per_device}",
        )


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
    checkpoints_to_keep: int = 2
    """Number of newest checkpoints that stay on disk."""
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

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, f"seed must be in 0 .. 2^63 - 1, got {self.seed}")
        require(self.global_batch_size >= 1, f"global_batch_size must be at least 1, got {self.global_batch_size}")
        require(self.log_every >= 1, f"log_every must be at least 1 step, got {self.log_every}")
        require(self.checkpoints_to_keep >= 1, f"checkpoints_to_keep must be at least 1, got {self.checkpoints_to_keep}")

    def result_settings(self) -> dict[str, Any]:
        """The settings that decide weights and results, flattened to `section.field`: a resumed run must agree in them."""
        flat = flatten(to_plain(self))
        free = ("output", "resume", "checkpoints_to_keep", "log_every", "trackers", "evaluation.captures")
        free += ("data.num_workers", "data.prefetch", "data.on_bad_image", "data.max_bad_images", "data.resize")
        free += ("swa.report_epochs", "swa.include_pretrained")
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
