"""The doctor finds a healthy run healthy, and each broken thing broken, whatever else is."""

import re
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import timm
import torch
from conftest import QUICK_RUN
from torch import nn

from imagenet_swa import models, results
from imagenet_swa.cli import main
from imagenet_swa.config import ModelConfig
from imagenet_swa.data import imagenet

CHECKS = ["processes", "DALI", "images", "network", "disk", "batches", "decoding", "baseline"]
DiskUsage = namedtuple("DiskUsage", "total used free")


pytestmark = pytest.mark.usefixtures("on_the_cpu")


class Examined:
    """What the doctor said: exit code, verdict and finding by check."""

    def __init__(self, capsys: pytest.CaptureFixture[str], *flags: str) -> None:
        capsys.readouterr()
        self.code = main(["doctor", *QUICK_RUN, *flags])
        captured = capsys.readouterr()
        self.lines = captured.out.splitlines()
        assert "Traceback" not in captured.err
        parsed = [re.fullmatch(r"\[( ok |FAIL|warn)\] (\w+): (.+)", line) for line in self.lines]
        assert all(parsed), self.lines
        found = [match.groups() for match in parsed if match]
        self.findings = {title: finding for verdict, title, finding in found if verdict != "warn"}
        self.failed = [title for verdict, title, _ in found if verdict == "FAIL"]
        self.warnings = [finding for verdict, _, finding in found if verdict == "warn"]


def on_images(folder: Path, backend: str = "torchvision") -> list[str]:
    return [
        "--data.synthetic=false",
        f"--data.train={folder / 'train'}",
        f"--data.val={folder / 'val'}",
        f"--data.backend={backend}",
        "--data.num_workers=1" if backend == "dali" else "--data.num_workers=0",
        "--model.num_classes=3",
        "--global_batch_size=8",
    ]


def test_healthy_synthetic_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A run on made-up images passes every check, in order, with exit code 0, and leaves nothing behind."""
    examined = Examined(capsys, f"--output={tmp_path / 'run'}")
    assert examined.code == 0
    assert list(examined.findings) == CHECKS
    assert examined.failed == [] and examined.warnings == []
    assert "training 96 of 10 classes, validation 40 of 10 classes" in examined.findings["images"]
    assert "13 BatchNorm layers" in examined.findings["network"]
    assert "16 per device x 1 processes = 16; 96 / 16 = 6 steps" in examined.findings["batches"]
    assert "(16, 3, 32, 32)" in examined.findings["decoding"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("backend", ["dali", "torchvision"])
def test_healthy_images(tmp_path: Path, capsys: pytest.CaptureFixture[str], image_folder: Path, backend: str):
    """A run on JPEGs passes every check with either backend."""
    examined = Examined(capsys, *on_images(image_folder, backend), f"--output={tmp_path}")
    assert (examined.code, list(examined.findings), examined.failed) == (0, CHECKS, [])
    assert ("not used" in examined.findings["DALI"]) == (backend != "dali")
    assert "(8, 3, 32, 32)" in examined.findings["decoding"]


def test_skipping_the_baseline(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """--skip_baseline leaves out the measurement and nothing else."""
    examined = Examined(capsys, "--skip_baseline", f"--output={tmp_path}")
    assert (examined.code, list(examined.findings)) == (0, CHECKS[:-1])


@pytest.mark.parametrize(
    ("flags", "failed", "words", "not_run"),
    [
        (["--data.synthetic=false"], ["images"], "data.train is not set", ["batches", "decoding", "baseline"]),
        (
            ["--data.synthetic=false", "--data.train=/nowhere", "--data.val=/nowhere"],
            ["images"],
            "no such folder: /nowhere",
            ["batches", "decoding", "baseline"],
        ),
        (["--model.name=tset_efficientnet"], ["network"], "did you mean test_efficientnet", CHECKS[4:]),
        (["--model.weights=/nowhere/w.pth"], ["network"], "no such weights file: /nowhere/w.pth", CHECKS[4:]),
        (["--preprocessing.resize=16"], ["network"], "smaller than the central crop of 32", CHECKS[4:]),
        (["--global_batch_size=97"], ["batches", "decoding"], "fewer than one global batch of 97", ["baseline"]),
    ],
    ids=["no images named", "no folder", "no network", "no weights", "resize", "batch"],
)
def test_one_broken_setting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], failed: list[str], words: str, not_run: list[str]
):
    """A broken setting fails its check with its reason and exit code 1; all checks that do not rest on it still run."""
    examined = Examined(capsys, f"--output={tmp_path}", *flags)
    assert examined.code == 1
    assert examined.failed == failed
    assert words in examined.findings[failed[0]]
    assert list(examined.findings) == [check for check in CHECKS if check not in not_run]


def test_two_broken_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Two things that are broken are both found in one go."""
    examined = Examined(capsys, "--data.synthetic=false", "--model.name=nonsense", f"--output={tmp_path}")
    assert (examined.code, examined.failed) == (1, ["images", "network"])


def test_no_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Where the launcher started another number of processes than it was asked for, that is said first and alone."""
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    examined = Examined(capsys, f"--output={tmp_path}")
    assert (examined.code, examined.failed) == (1, ["processes"])
    assert "8 processes were asked for, but this run has 1" in examined.findings["processes"]


def test_no_dali(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, image_folder: Path):
    """Without DALI a configuration that wants it fails with the way to install it, and the images are still looked at."""
    for name in [name for name in sys.modules if name.startswith("nvidia.dali") or name == "imagenet_swa.data.dali"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    examined = Examined(capsys, *on_images(image_folder, "dali"), f"--output={tmp_path}")
    assert (examined.code, examined.failed) == (1, ["DALI", "decoding"])
    assert "install the extra dali-cuda" in examined.findings["DALI"]
    assert "24 of 3 classes" in examined.findings["images"]


@pytest.mark.parametrize("backend", ["dali", "torchvision"])
def test_an_image_that_does_not_decode(tmp_path: Path, capsys: pytest.CaptureFixture[str], image_folder: Path, backend: str):
    """An undecodable image among the first is named by the decoding check."""
    shutil.copytree(image_folder, tmp_path / "images")
    for path in (tmp_path / "images/train/cat").iterdir():
        path.write_text("<html>404</html>")
    examined = Examined(capsys, *on_images(tmp_path / "images", backend), f"--output={tmp_path}")
    assert (examined.code, examined.failed) == (1, ["decoding"])
    assert re.search(r"cannot decode the image .*/train/cat/\d.JPEG", examined.findings["decoding"])
    assert "baseline" not in examined.findings


@pytest.mark.parametrize("output", [".", "not/yet/there"])
def test_too_little_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, output: str):
    """A disk on which the captures, averages and checkpoints do not fit fails with both sizes; the rest is still checked."""
    asked = []

    def disk_usage(path: Path) -> DiskUsage:
        asked.append(Path(path))
        return DiskUsage(10**12, 10**12 - 10**6, 10**6)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    examined = Examined(capsys, f"--output={tmp_path / output}")
    assert (examined.code, examined.failed) == (1, ["disk"])
    assert "0.0 GiB free, this run needs about 0.0 GiB" in examined.findings["disk"]
    assert asked == [tmp_path], "the disk of the folder that is there already"
    assert list(examined.findings) == CHECKS


def test_disk_need_is_enough(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """The disk check asks for what a run really takes, a checkpoint being written included: not less, and not much more."""
    assert main(["train", *QUICK_RUN, f"--output={tmp_path / 'run'}"]) == 0
    weights = sum(path.stat().st_size for path in (tmp_path / "run").rglob("*.safetensors"))
    checkpoint = sum(path.stat().st_size for path in (tmp_path / "run/checkpoints/step-0000024").iterdir())
    for share, code in ((1.2, 0), (0.97, 1)):
        usage = DiskUsage(10**12, 0, int(share * (weights + checkpoint)))
        monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
        assert Examined(capsys, f"--output={tmp_path / 'other'}").code == code


NAMED = ("--model.name=test_efficientnet.r160_in1k", "--model.pretrained=true", "--preprocessing.interpolation=bilinear")


def download(model: ModelConfig) -> nn.Module:
    """In the place of timm's weights by that name: always the same random ones."""
    torch.manual_seed(0)
    return timm.create_model(model.name, pretrained=False, num_classes=model.num_classes)


def publish(monkeypatch: pytest.MonkeyPatch, top1: float) -> None:
    """Let the published figure of the quick run's network on its 40 images be this."""
    monkeypatch.setitem(imagenet.PUBLISHED_TOP1, ("timm", "test_efficientnet.r160_in1k"), top1)
    monkeypatch.setattr(results, "NUM_VAL", 40)


def test_baseline_against_the_published_figure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """A baseline within 0.1 points of the published figure agrees; another fails with both numbers and where to look."""
    monkeypatch.setattr(models, "_from_timm", download)
    flags = [*NAMED, f"--output={tmp_path}"]
    measured = float(re.findall(r"([\d.]+) % measured", Examined(capsys, *flags).findings["baseline"])[0]) / 100
    publish(monkeypatch, measured + 0.0009)
    agreeing = Examined(capsys, *flags)
    assert (agreeing.code, agreeing.failed) == (0, [])
    assert "-0.09 points, agrees" in agreeing.findings["baseline"]
    publish(monkeypatch, measured + 0.25)
    differing = Examined(capsys, *flags)
    assert (differing.code, differing.failed) == (1, ["baseline"])
    assert f"{100 * measured:.2f} % measured, {100 * measured + 25:.2f} % published: -25.00" in differing.findings["baseline"]
    assert "check class order, preprocessing and weights" in differing.findings["baseline"]


def test_a_network_that_does_not_take_the_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A network that fails on images of the configured size fails its check in one line, without a traceback."""
    examined = Examined(capsys, "--model.library=torchvision", "--model.name=inception_v3", f"--output={tmp_path}")
    assert (examined.code, examined.failed) == (1, ["network"])
    assert "Kernel size can't be greater than actual input size" in examined.findings["network"]


@pytest.mark.realdata
def test_a_subset_of_imagenet(tmp_path: Path, capsys: pytest.CaptureFixture[str], real_data: Path, real_weights: Path):
    """Part of ImageNet, by lists, passes with a warning about either split's size."""
    flags = ["--data.synthetic=false", "--data.backend=dali", "--model.library=torchvision", "--model.name=mobilenet_v2"]
    flags += [f"--model.weights={real_weights / 'mobilenet_v2.torchvision.safetensors'}", "--model.num_classes=1000"]
    for split in ("train", "val"):
        flags += [f"--data.{split}={real_data / split}", f"--data.{split}_list={real_data / split}.txt"]
    examined = Examined(capsys, *flags, "--skip_baseline", f"--output={tmp_path}")
    assert (examined.code, examined.failed) == (0, [])
    assert examined.warnings == [
        "154 training images, ImageNet-1k has 1,281,167",
        "260 validation images, ImageNet-1k has 50,000",
    ]
