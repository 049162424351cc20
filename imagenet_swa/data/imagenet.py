"""Facts about ImageNet-1k (ILSVRC2012): split sizes, class order, published accuracies."""

from functools import cache
from pathlib import Path

SPLITS = ("train", "val")
NUM_CLASSES = 1000
NUM_TRAIN = 1_281_167
NUM_VAL = 50_000

# Top-1 on the 50,000 validation images of the weights that the paper starts from, as fractions, measured by the
# libraries' authors with the preprocessing of their own data configs (torchvision: bilinear throughout).
PUBLISHED_TOP1 = {
    ("timm", "resnet50.tv_in1k"): 0.76156,
    ("timm", "resnet152.tv_in1k"): 0.78330,
    ("timm", "densenet161.tv_in1k"): 0.77384,
    ("torchvision", "resnet50.IMAGENET1K_V1"): 0.76130,
    ("torchvision", "resnet152.IMAGENET1K_V1"): 0.78312,
    ("torchvision", "densenet161.IMAGENET1K_V1"): 0.77138,
}

# Table 2 of the paper, top-1 in per cent: pretrained, SWA after 5 epochs, SWA after 10 epochs (mean, std of 3 runs).
PAPER_TABLE_2 = {
    "resnet50": {"pretrained": (76.15, None), "swa 5": (76.83, 0.01), "swa 10": (76.97, 0.05)},
    "resnet152": {"pretrained": (78.31, None), "swa 5": (78.82, 0.01), "swa 10": (78.94, 0.07)},
    "densenet161": {"pretrained": (77.65, None), "swa 5": (78.26, 0.09), "swa 10": (78.44, 0.06)},
}


@cache
def synsets() -> tuple[str, ...]:
    """The 1,000 WordNet ids in class order, which is their alphabetical order."""
    return tuple((Path(__file__).parent / "imagenet_synsets.txt").read_text().split())


def published_top1(library: str, name: str, interpolation: str) -> float | None:
    """The published top-1 of these weights as a fraction, None where none is known for this preprocessing.

    timm evaluates densenet161.tv_in1k with bicubic resizing; with bilinear the same file gives torchvision's figure.
    """
    if (library, name, interpolation) == ("timm", "densenet161.tv_in1k", "bilinear"):
        return PUBLISHED_TOP1["torchvision", "densenet161.IMAGENET1K_V1"]
    return PUBLISHED_TOP1.get((library, name))
