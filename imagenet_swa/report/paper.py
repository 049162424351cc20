"""The paper's figures, to stand beside one's own (Izmailov et al. 2018, Tables 1 and 2)."""

from collections.abc import Mapping
from typing import Any

from imagenet_swa.data.imagenet import NUM_CLASSES, PAPER_TABLE_2

Figure = tuple[float, float | None]  # mean and standard deviation of three runs, per cent

CIFAR_LIBRARIES = ("pytorchcv", "imagenet_swa")
CIFAR_NUM_VAL = 10_000

# Table 1, top-1 in per cent by budgets of epochs; "sgd" is SGD for one budget. By number of classes and
# the network's name in the libraries above, less its ending `_cifar10` or `_cifar100`.
PAPER_TABLE_1: dict[tuple[int, str], dict[str | float, Figure]] = {
    (100, "vgg16"): {"sgd": (72.55, 0.10), 1.0: (73.91, 0.12), 1.25: (74.17, 0.15), 1.5: (74.27, 0.25)},
    (100, "preresnet164bn"): {"sgd": (78.49, 0.36), 1.0: (79.77, 0.17), 1.25: (80.18, 0.23), 1.5: (80.35, 0.16)},
    (100, "wrn28_10"): {"sgd": (80.82, 0.23), 1.0: (81.46, 0.23), 1.25: (81.91, 0.27), 1.5: (82.15, 0.27)},
    (100, "pyramidnet272_a200_bn"): {"sgd": (83.41, None), 1.5: (84.16, None)},
    (10, "vgg16"): {"sgd": (93.25, 0.16), 1.0: (93.59, 0.16), 1.25: (93.70, 0.22), 1.5: (93.64, 0.18)},
    (10, "preresnet164bn"): {"sgd": (95.28, 0.10), 1.0: (95.56, 0.11), 1.25: (95.77, 0.04), 1.5: (95.83, 0.03)},
    (10, "wrn28_10"): {"sgd": (96.18, 0.11), 1.0: (96.45, 0.11), 1.25: (96.64, 0.08), 1.5: (96.79, 0.05)},
    (10, "shakeshakeresnet_cifar"): {"sgd": (96.93, None), 1.5: (97.12, None)},
}

# The arguments with which the paper's networks are built, where they are not all in the name.
_ARGUMENTS = {"shakeshakeresnet_cifar": {"blocks": 26, "bottleneck": False, "first_stage_channels": 64}}
_PAPER_WEIGHTS = ("", "tv_in1k", "IMAGENET1K_V1")  # what the libraries call those that Table 2 starts from
_AS_IN_THE_PAPER = {"width": 1, "dropout": 0.5}


def paper_figure(model_name: str, network: str, epoch: float, *, num_classes: int = NUM_CLASSES) -> str:
    """Table 2's cell for this network as text, "" where the paper has none."""
    figure = table_2(model_name, network, epoch, num_classes=num_classes)
    return "" if figure is None else figure_text(figure)


def table_2(model_name: str, network: str, epoch: float, *, num_classes: int = NUM_CLASSES) -> Figure | None:
    """Table 2's top-1 in per cent for this network, None for weights of another recipe or with other classes than ImageNet's."""
    name, _, recipe = model_name.partition(".")
    row = PAPER_TABLE_2.get(name, {}) if recipe in _PAPER_WEIGHTS and num_classes == NUM_CLASSES else {}
    key = "pretrained" if network == "pretrained" else f"swa {epoch}" if network.startswith("swa") else ""
    return row.get(key)


def table_1(model: Mapping[str, Any], num_images: int) -> dict[str | float, Figure]:
    """Table 1's row for the network of these settings, empty where the paper has none, where it is built with other arguments
    than the paper's (a small variant), or where the images cannot be CIFAR's.
    """
    if model["library"] not in CIFAR_LIBRARIES or num_images != CIFAR_NUM_VAL:
        return {}
    num_classes, name = model["num_classes"], model["name"]
    given = {key: value for key, value in model.get("kwargs", {}).items() if _AS_IN_THE_PAPER.get(key) != value}
    if given != _ARGUMENTS.get(name, {}):
        return {}
    return PAPER_TABLE_1.get((num_classes, name.removesuffix(f"_cifar{num_classes}")), {})


def figure_text(figure: Figure) -> str:
    """`76.97 ± 0.05`."""
    value, spread = figure
    return f"{value:.2f}" if spread is None else f"{value:.2f} ± {spread:.2f}"
