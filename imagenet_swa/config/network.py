"""Settings of the network and of its input."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from imagenet_swa.config.errors import require

Interpolation = Literal["bilinear", "bicubic"]
TrainCrop = Literal["random_resized", "padded"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network and the weights it starts from"""

    library: Literal["timm", "torchvision", "pytorchcv", "imagenet_swa"] = "timm"
    """Library that defines the network; pytorchcv has the CIFAR networks of the paper but its VGG-16, which is ours."""
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
    # Not Any: the parser would build whatever class a value of that type names.
    kwargs: dict[str, bool | int | float | str | list | dict | None] = field(default_factory=dict)
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
    train_crop: TrainCrop = "random_resized"
    """Training: random_resized takes a window of random area and aspect ratio and resizes it; padded takes a window of
    image_size pixels from the image with black borders (CIFAR's), and resizes nothing."""
    padding: int = 4
    """Training with padded crops: width of the black border on each side, pixels."""
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
        require(self.padding >= 0, f"preprocessing.padding must be 0 or more pixels, got {self.padding}")
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
    train_crop: TrainCrop = "random_resized"
    padding: int = 4

    def __post_init__(self) -> None:
        require(
            self.resize >= self.image_size,
            f"preprocessing.resize {self.resize} is smaller than the central crop of {self.image_size} pixels; "
            f"set preprocessing.resize to at least {self.image_size}",
        )

    def describe(self) -> str:
        """One line for people."""
        numbers = " ".join(f"{v:g}" for v in self.mean), " ".join(f"{v:g}" for v in self.std)
        crop = f"random crop of {self.crop_area[0]:g}-{self.crop_area[1]:g} of the area, {self.train_interpolation}"
        if self.train_crop == "padded":
            crop = f"random crop of {self.image_size} from {self.padding} pixels of padding"
        return (
            f"evaluation: resize {self.resize} {self.interpolation}, central crop {self.image_size}; "
            f"training: {crop}, {'flip' if self.horizontal_flip else 'no flip'}; "
            f"mean {numbers[0]}, std {numbers[1]}"
        )
