"""Facts about ImageNet-1k against timm, torchvision and the real class list."""

from pathlib import Path

import pytest
from timm.data.imagenet_info import ImageNetInfo
from torchvision import models

from imagenet_swa.data import imagenet
from imagenet_swa.data.imagenet import PAPER_TABLE_2, PUBLISHED_TOP1, published_top1, synsets


def test_synsets_are_sorted_unique_wordnet_ids():
    """The classes are 1,000 different WordNet ids in the order in which folders of these names sort."""
    assert len(synsets()) == len(set(synsets())) == imagenet.NUM_CLASSES == 1000
    assert list(synsets()) == sorted(synsets())
    assert all(len(name) == 9 and name[0] == "n" and name[1:].isdecimal() for name in synsets())


def test_synsets_are_timms():
    """timm's list of ImageNet-1k names the same classes in the same order."""
    assert list(synsets()) == ImageNetInfo("imagenet-1k").label_names()


def test_known_classes_have_their_numbers():
    """Tench is class 0, tabby cat 281, toilet tissue 999, as everywhere."""
    assert (synsets()[0], synsets()[281], synsets()[999]) == ("n01440764", "n02123045", "n15075141")


@pytest.mark.realdata
def test_synsets_are_those_of_the_real_images(real_data: Path):
    """The real images' list numbers its classes in the same order."""
    assert list(synsets()) == (real_data / "synsets.txt").read_text().split()
    for line in (real_data / "val.txt").read_text().splitlines():
        path, label = line.rsplit(" ", 1)
        assert path.split("/")[0] == synsets()[int(label)]


@pytest.mark.parametrize("name", ["ResNet50", "ResNet152", "DenseNet161"])
def test_published_top1_is_torchvisions_own(name: str):
    """The figure for torchvision's weights is the one that torchvision states in their description."""
    weights = getattr(models, f"{name}_Weights").IMAGENET1K_V1
    stated = weights.meta["_metrics"]["ImageNet-1K"]["acc@1"]
    assert published_top1("torchvision", f"{name.lower()}.IMAGENET1K_V1", "bilinear") == pytest.approx(stated / 100)


def test_published_top1_of_timm():
    """timm's figures for the same files, measured by timm."""
    found = {name: published_top1("timm", f"{name}.tv_in1k", "bilinear") for name in ("resnet50", "resnet152")}
    assert found == {"resnet50": 0.76156, "resnet152": 0.78330}


def test_published_top1_depends_on_the_resize_filter():
    """timm's densenet161 has timm's figure with timm's bicubic resize and torchvision's, lower one with the bilinear resize."""
    assert published_top1("timm", "densenet161.tv_in1k", "bicubic") == 0.77384
    assert published_top1("timm", "densenet161.tv_in1k", "bilinear") == 0.77138


def test_published_top1_of_unknown_weights():
    """For other weights, another library's name or torchvision's V2 weights no figure is known."""
    for library, name in (("timm", "resnet50"), ("timm", "resnet50.IMAGENET1K_V1"), ("torchvision", "resnet50.IMAGENET1K_V2")):
        assert published_top1(library, name, "bilinear") is None


def test_figures_are_fractions_and_per_cents():
    """Published accuracies are fractions near the paper's per cents of the same network."""
    for (_, name), top1 in PUBLISHED_TOP1.items():
        per_cent, _ = PAPER_TABLE_2[name.split(".")[0]]["pretrained"]
        assert abs(100 * top1 - per_cent) < 0.6


def test_table_2_of_the_paper():
    """Table 2 of Izmailov et al., top-1 in per cent: pretrained, SWA after 5 and 10 epochs with the std of 3 runs."""
    rows = {
        "resnet50": "76.15 76.83±0.01 76.97±0.05",
        "resnet152": "78.31 78.82±0.01 78.94±0.07",
        "densenet161": "77.65 78.26±0.09 78.44±0.06",
    }
    assert set(PAPER_TABLE_2) == set(rows)
    for network, row in rows.items():
        figures = PAPER_TABLE_2[network]
        assert list(figures) == ["pretrained", "swa 5", "swa 10"]
        printed = [f"{mean:.2f}" + (f"±{std:.2f}" if std is not None else "") for mean, std in figures.values()]
        assert " ".join(printed) == row


def test_split_sizes():
    """ImageNet-1k has 1,281,167 training images, 5,005 batches of 256 with the last short one, and 50,000 validation images."""
    assert (imagenet.NUM_TRAIN, imagenet.NUM_VAL) == (1_281_167, 50_000)
    assert -(-imagenet.NUM_TRAIN // 256) == 5005
