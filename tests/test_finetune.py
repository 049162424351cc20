"""Whole runs in this process: what they leave behind, against plain PyTorch, numpy, PIL and the formulas of the paper."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from conftest import QUICK_RUN
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torchvision import transforms
from torchvision.datasets import ImageFolder

from imagenet_swa import models
from imagenet_swa.arguments import parse_config
from imagenet_swa.config import Config, InputError, Preprocessing
from imagenet_swa.data import resize
from imagenet_swa.data.sampling import epoch_order
from imagenet_swa.data.synthetic import SyntheticLoader, synthetic_index
from imagenet_swa.data.torch_loader import TorchvisionLoader
from imagenet_swa.evaluate import Evaluation
from imagenet_swa.finetune import finetune
from imagenet_swa.session import Session, evaluate_network

Weights = dict[str, torch.Tensor]
CPU = torch.device("cpu")
ONE_EPOCH = ("--swa.num_epochs=1", "--swa.report_epochs=[]")
TWO_EPOCHS = ("--swa.num_epochs=2", "--swa.report_epochs=[]")
GENTLE = ("--swa.lr_max=0.001", "--swa.lr_min=0.0001")


pytestmark = pytest.mark.usefixtures("on_the_cpu")


def configure(output: Path, *flags: str) -> Config:
    return parse_config([*QUICK_RUN, f"--output={output}", *flags], "imagenet-swa train", "")


def train(output: Path, *flags: str) -> Path:
    """Run with these flags on top of QUICK_RUN's; returns the run folder."""
    finetune(configure(output, *flags))
    return output


def on_images(image_folder: Path, backend: str) -> tuple[str, ...]:
    """Flags for two epochs of four steps on the 24 + 12 JPEGs."""
    return (
        "--data.synthetic=false",
        f"--data.train={image_folder / 'train'}",
        f"--data.val={image_folder / 'val'}",
        f"--data.backend={backend}",
        "--data.num_workers=2" if backend == "dali" else "--data.num_workers=0",
        "--model.num_classes=3",
        "--global_batch_size=6",
        "--swa.num_epochs=2",
        "--swa.report_epochs=[1]",
        "--swa.lr_max=0.005",
        "--swa.lr_min=0.0005",
        "--evaluation.batch_size=5",
    )


def write_start(folder: Path, num_classes: int) -> Path:
    """A file of random weights with BatchNorm statistics that are not the initial ones."""
    torch.manual_seed(11)
    network = timm.create_model("test_efficientnet", num_classes=num_classes)
    with torch.no_grad():
        network(torch.randn(64, 3, 32, 32))
    path = folder / f"start-{num_classes}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Weight files to start from, by number of classes."""
    folder = tmp_path_factory.mktemp("start")
    return {num_classes: write_start(folder, num_classes) for num_classes in (3, 10)}


@pytest.fixture(scope="module", params=["synthetic", "dali", "torchvision"])
def finished(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, image_folder: Path, start: dict[int, Path]
) -> Path:
    """A finished run on made-up images, or on JPEGs with either backend."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("run") / request.param
    if request.param == "synthetic":
        return train(folder, f"--model.weights={start[10]}")
    return train(folder, *on_images(image_folder, request.param), f"--model.weights={start[3]}")


def saved_config(run: Path) -> Config:
    return parse_config(["--config", str(run / "config.yaml")], "imagenet-swa train", "")


def results_of(run: Path) -> dict[tuple[str, int], dict[str, Any]]:
    found = json.loads((run / "results.json").read_text())
    results = {(result["name"], result["epoch"]): result for result in found}
    assert len(results) == len(found), "a network was evaluated twice"
    return results


def metrics_of(run: Path, kind: str) -> list[dict[str, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def captures_of(run: Path) -> dict[int, Weights]:
    return {int(path.stem.removeprefix("epoch-")): load_file(path) for path in sorted((run / "captures").iterdir())}


def parameters_of(weights: Weights) -> Weights:
    """Without BatchNorm's statistics and counters."""
    return {name: tensor for name, tensor in weights.items() if "running_" not in name and "num_batches" not in name}


def float64_mean(members: list[Weights]) -> dict[str, np.ndarray]:
    return {name: np.mean([member[name].double().numpy() for member in members], axis=0) for name in members[0]}


def assert_is_mean(average: Weights, members: list[Weights]) -> None:
    """Within fp32's rounding, once per member."""
    wanted = float64_mean([parameters_of(member) for member in members])
    assert parameters_of(average).keys() == wanted.keys()
    for name, tensor in parameters_of(average).items():
        np.testing.assert_allclose(tensor.numpy(), wanted[name], rtol=2e-6, atol=1e-7, err_msg=name)


def assert_equal(one: Weights, other: Weights) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def assert_close(one: Weights, other: Weights, *, tolerance: float) -> None:
    """Every tensor's difference is small beside the tensor, or beside 0.01 where that is larger."""
    assert one.keys() == other.keys()
    for name in one:
        a, b = one[name].double(), other[name].double()
        assert (a - b).norm() <= tolerance * max(b.norm().item(), 0.01), name


def difference(one: Weights, other: Weights) -> float:
    """Length of the way from one to the other, over all parameters."""
    return sum((one[name].double() - other[name].double()).square().sum().item() for name in parameters_of(one)) ** 0.5


# ----------------------------------------------------------------------------------------------- what a run leaves


def test_files_of_a_run(finished: Path):
    """A run leaves every file that the report and a later reader need, and no half-written one."""
    num_epochs = saved_config(finished).swa.num_epochs
    reports = saved_config(finished).swa.epochs_to_report
    averages = [f"{name}-epoch-{epoch:02d}" for name in ("swa", "swa-without-pretrained") for epoch in reports]
    captures = [f"epoch-{epoch:02d}" for epoch in range(1, num_epochs + 1)]
    wanted = {f"captures/{name}.safetensors" for name in captures} | {f"averages/{name}.safetensors" for name in averages}
    predictions = ["pretrained", *[f"capture-{name}" for name in captures], *averages]
    wanted |= {f"predictions/{name}.parquet" for name in predictions}
    wanted |= {"config.yaml", "environment.json", "metrics.jsonl", "results.json", "train.log"}
    wanted |= {"report.md", "report.html", "report.json", "trajectory.png", "pretrained.safetensors", "swa.safetensors"}
    found = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    assert {path for path in found if not path.startswith("checkpoints/")} == wanted
    assert (finished / "trajectory.png").read_bytes().startswith(b"\x89PNG")


def test_results_of_a_run(finished: Path):
    """There is a result for the pretrained network, for every capture, and for both averages at every report epoch."""
    config, results = saved_config(finished), results_of(finished)
    wanted = {("pretrained", 0)} | {("capture", epoch) for epoch in range(1, config.swa.num_epochs + 1)}
    wanted |= {(name, epoch) for name in ("swa", "swa_without_pretrained") for epoch in config.swa.epochs_to_report}
    assert results.keys() == wanted
    num_images, steps_per_epoch = (40, 6) if config.data.synthetic else (12, 4)
    for (_, epoch), result in results.items():
        assert result["num_images"] == num_images
        assert result["step"] == epoch * steps_per_epoch


def test_saved_config_is_the_config(tmp_path: Path):
    """config.yaml alone gives back the very configuration of the run."""
    config = configure(tmp_path / "run", *ONE_EPOCH, "--model.kwargs.drop_rate=0.25", "--preprocessing.mean=[0.1,0.2,0.3]")
    finetune(config)
    assert saved_config(tmp_path / "run") == config


def test_environment_names_the_data(finished: Path):
    """environment.json holds the number of images and a fingerprint of each split, and the preprocessing that was used."""
    environment = json.loads((finished / "environment.json").read_text())
    data = environment["data"]
    wanted = (96, 40) if saved_config(finished).data.synthetic else (24, 12)
    assert (data["train"]["num_images"], data["val"]["num_images"]) == wanted
    assert data["train"]["fingerprint"] != data["val"]["fingerprint"]
    assert environment["preprocessing"]["image_size"] == 32
    assert torch.__version__.startswith(environment["versions"]["torch"])


# -------------------------------------------------------------------------------------------------------- averages


def test_average_with_pretrained(finished: Path):
    """At every report epoch the SWA weights are the mean of the pretrained weights and all captures so far (Alg. 1)."""
    config, captures = saved_config(finished), captures_of(finished)
    assert config.model.weights is not None
    pretrained = load_file(config.model.weights)
    for epoch in config.swa.epochs_to_report:
        members = [pretrained, *[captures[e] for e in range(1, epoch + 1)]]
        assert_is_mean(load_file(finished / f"averages/swa-epoch-{epoch:02d}.safetensors"), members)


def test_average_of_captures(finished: Path):
    """The other average is the mean of the captures alone."""
    captures = captures_of(finished)
    for epoch in saved_config(finished).swa.epochs_to_report:
        average = load_file(finished / f"averages/swa-without-pretrained-epoch-{epoch:02d}.safetensors")
        assert_is_mean(average, [captures[e] for e in range(1, epoch + 1)])


def test_swa_file_is_the_last_average(finished: Path):
    """swa.safetensors is the average of the whole run."""
    last = saved_config(finished).swa.num_epochs
    assert_equal(load_file(finished / "swa.safetensors"), load_file(finished / f"averages/swa-epoch-{last:02d}.safetensors"))


def test_swa_file_without_pretrained(tmp_path: Path):
    """`include_pretrained: false` makes swa.safetensors the average of the captures; a finished run switches without training."""
    run = train(tmp_path / "run", *TWO_EPOCHS)
    before = metrics_of(run, "train")
    train(run, *TWO_EPOCHS, "--swa.include_pretrained=false")
    captures = captures_of(run)
    assert_is_mean(load_file(run / "swa.safetensors"), [captures[1], captures[2]])
    assert metrics_of(run, "train") == before


def test_weights_are_fp32_and_own_their_names(finished: Path):
    """Every weight file has exactly the bare network's names, and floating-point tensors in fp32."""
    names = timm.create_model("test_efficientnet", num_classes=saved_config(finished).model.num_classes).state_dict().keys()
    for path in finished.glob("*/*.safetensors"):
        weights = load_file(path)
        assert weights.keys() == names, path
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32, torch.int64}


# ---------------------------------------------------------------------------------------------------- learning rate


def test_learning_rate_is_the_formula(finished: Path):
    """The rate in metrics.jsonl is (1 - t) lr_max + t lr_min with t = (mod(i - 1, c) + 1) / c for update i (sec. 3.1)."""
    config = saved_config(finished)
    c = 6 if config.data.synthetic else 4
    lines = metrics_of(finished, "train")
    assert [line["step"] for line in lines] == [i for i in range(1, c * config.swa.num_epochs + 1) if i % 2 == 0]
    for line in lines:
        t = ((line["step"] - 1) % c + 1) / c
        assert line["lr"] == pytest.approx((1 - t) * config.swa.lr_max + t * config.swa.lr_min, rel=1e-12)


def test_constant_schedule(tmp_path: Path):
    """A constant schedule trains at lr_max throughout and captures after every epoch."""
    run = train(tmp_path / "run", *TWO_EPOCHS, "--swa.schedule=constant", "--swa.lr_max=0.01")
    assert {line["lr"] for line in metrics_of(run, "train")} == {0.01}
    assert captures_of(run).keys() == {1, 2}


def test_cycles_of_two_epochs(tmp_path: Path):
    """With cycle_epochs 2 a cycle's rate falls over two epochs, and only its end is captured and averaged."""
    run = train(tmp_path / "run", "--swa.cycle_epochs=2")
    captures = captures_of(run)
    assert captures.keys() == {2, 4}
    assert results_of(run).keys() == {("pretrained", 0)} | {
        (name, epoch) for name in ("capture", "swa", "swa_without_pretrained") for epoch in (2, 4)
    }
    for line in metrics_of(run, "train"):
        t = ((line["step"] - 1) % 12 + 1) / 12
        assert line["lr"] == pytest.approx((1 - t) * 0.05 + t * 0.005, rel=1e-12)
    assert_is_mean(load_file(run / "averages/swa-without-pretrained-epoch-04.safetensors"), [captures[2], captures[4]])


# -------------------------------------------------------------------------------------- BatchNorm and evaluation


def training_images(run: Path, epoch: int) -> torch.Tensor:
    """All training images with their crops of this epoch, (N, 3, 32, 32): by PIL, whichever backend the run used."""
    session = Session.open(saved_config(run))
    index, seed = session.indices[0], session.config.seed
    if session.config.data.synthetic:
        loader = session.loaders.train
    else:
        loader = TorchvisionLoader(index, session.preprocessing, seed=seed, device=CPU, num_workers=0, prefetch=1)
    return next(iter(loader.training_stream([np.arange(len(index))], epoch=epoch))).images


def validation_set(run: Path) -> tuple[torch.Tensor, np.ndarray]:
    """Validation images and labels: made-up ones from their loader, JPEGs from torchvision's own classes."""
    config = saved_config(run)
    p = Preprocessing(**json.loads((run / "environment.json").read_text())["preprocessing"])
    if config.data.synthetic:
        loader = SyntheticLoader(synthetic_index(40, 10), p, seed=config.seed, device=CPU)
        batch = next(iter(loader.evaluation_stream([np.arange(40)])))
        return batch.images, batch.labels.numpy()
    transform = transforms.Compose(
        [
            transforms.Resize(p.resize, transforms.InterpolationMode(p.interpolation)),
            transforms.CenterCrop(p.image_size),
            transforms.ToTensor(),
            transforms.Normalize(p.mean, p.std),
        ]
    )
    folder = ImageFolder(str(config.data.val), transform)
    return torch.stack([image for image, _ in folder]), np.array(folder.targets)


def test_batchnorm_statistics_of_the_average(finished: Path):
    """swa.safetensors' first BatchNorm layer has the mean and the unbiased variance of its inputs over all training images."""
    config, weights = saved_config(finished), load_file(finished / "swa.safetensors")
    network = timm.create_model("test_efficientnet", num_classes=config.model.num_classes)
    network.load_state_dict(weights)
    with torch.no_grad():
        images = training_images(finished, epoch=config.swa.num_epochs).double()
        inputs = network.get_submodule("conv_stem").double()(images).numpy()
    # DALI's resize differs from PIL's by a grey level here and there.
    tolerance = 1e-5 if config.data.synthetic or config.data.backend == "torchvision" else 2e-2
    np.testing.assert_allclose(weights["bn1.running_mean"], inputs.mean((0, 2, 3)), rtol=tolerance, atol=tolerance / 10)
    np.testing.assert_allclose(weights["bn1.running_var"], inputs.var((0, 2, 3), ddof=1), rtol=tolerance)


def test_captures_are_evaluated_as_sgd_left_them(finished: Path):
    """A capture keeps the moving statistics of training, which differ from those of its average."""
    config = saved_config(finished)
    assert config.model.weights is not None
    pretrained, captures = load_file(config.model.weights), captures_of(finished)
    swa = load_file(finished / "swa.safetensors")
    assert not torch.equal(captures[1]["bn1.running_mean"], pretrained["bn1.running_mean"])
    assert not torch.equal(captures[config.swa.num_epochs]["bn1.running_mean"], swa["bn1.running_mean"])


def test_results_follow_from_the_predictions(finished: Path):
    """top-1, top-5 and NLL of results.json can be counted again from each network's prediction file."""
    for (name, epoch), result in results_of(finished).items():
        label = name if name == "pretrained" else f"{name.replace('_', '-')}-epoch-{epoch:02d}"
        table = pq.read_table(finished / "predictions" / f"{label}.parquet").to_pydict()
        assert table["index"] == list(range(result["num_images"]))
        best = [top5[0] == label for top5, label in zip(table["top5"], table["label"], strict=True)]
        among = [label in top5 for top5, label in zip(table["top5"], table["label"], strict=True)]
        assert (result["num_correct"], result["num_correct_top5"]) == (sum(best), sum(among))
        assert result["top1"] == pytest.approx(np.mean(best))
        assert result["top5"] == pytest.approx(np.mean(among))
        assert result["nll"] == pytest.approx(-np.mean(np.log(table["probability"])))


def test_results_follow_from_the_weights(finished: Path):
    """Plain timm loads each weight file strictly, and plain PyTorch on torchvision's images finds the same numbers."""
    images, labels = validation_set(finished)
    config, results = saved_config(finished), results_of(finished)
    assert config.model.weights is not None
    last = config.swa.num_epochs
    files = {"pretrained": config.model.weights, "swa": finished / "swa.safetensors"}
    files["capture"] = finished / f"captures/epoch-{last:02d}.safetensors"
    files["swa_without_pretrained"] = finished / f"averages/swa-without-pretrained-epoch-{last:02d}.safetensors"
    exact = config.data.synthetic or config.data.backend == "torchvision"
    for name, path in files.items():
        network = timm.create_model("test_efficientnet", num_classes=config.model.num_classes)
        network.load_state_dict(load_file(path))
        network.eval()
        with torch.no_grad():
            log_prob = network(images).log_softmax(1).numpy()
        result = results[name, 0 if name == "pretrained" else last]
        if exact:
            assert result["num_correct"] == (log_prob.argmax(1) == labels).sum(), name
        nll = -log_prob[np.arange(len(labels)), labels].mean()
        assert result["nll"] == pytest.approx(nll, rel=1e-4 if exact else 2e-2), name


def test_some_images_for_batchnorm(tmp_path: Path):
    """With batchnorm.num_images N the statistics come from N training images, so that they differ from those of all."""
    of_all = train(tmp_path / "all", *ONE_EPOCH)
    of_some = train(tmp_path / "some", *ONE_EPOCH, "--batchnorm.num_images=32")
    assert "BatchNorm statistics from 32 images" in (of_some / "train.log").read_text()
    one, other = load_file(of_all / "swa.safetensors"), load_file(of_some / "swa.safetensors")
    assert_equal(parameters_of(one), parameters_of(other))
    assert not torch.equal(one["bn1.running_var"], other["bn1.running_var"])


def test_averages_far_below_captures_are_commented_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An average that is far worse than its last capture gets a warning that names BatchNorm statistics and lr_max."""

    def evaluate(_self: Session, networks: dict[str, nn.Module], *_: Any, **__: Any) -> dict[str, Evaluation]:
        right, wrong = np.zeros((4, 5), int), np.ones((4, 5), int)
        labels, log_prob = np.zeros(4, int), np.full(4, -1.0)
        answers = {name: right if name == "capture" else wrong for name in networks}
        return {name: Evaluation(np.arange(4), labels, ranked, log_prob) for name, ranked in answers.items()}

    monkeypatch.setattr(Session, "evaluate", evaluate)
    run = train(tmp_path / "run", *ONE_EPOCH)
    log = (run / "train.log").read_text()
    assert "the average is 100.0 points below its last capture" in log
    assert "batchnorm.num_images" in log and "swa.lr_max" in log


# ------------------------------------------------------------------------------------- against a loop by hand


def reference_epoch(network: nn.Module, config: Config) -> Weights:
    """One epoch of SGD as a textbook has it: v <- m v + g + d w, w <- w - lr v, over the run's order of images."""
    preprocessing = models.resolve_preprocessing(config.model, config.preprocessing, network)
    loader = SyntheticLoader(synthetic_index(96, 10), preprocessing, seed=config.seed, device=CPU)
    batches = epoch_order(96, seed=config.seed, epoch=0).reshape(6, 16)
    velocity = [torch.zeros_like(parameter) for parameter in network.parameters()]
    network.train()
    for i, batch in enumerate(loader.training_stream(batches, epoch=0), start=1):
        t = ((i - 1) % 6 + 1) / 6
        lr = (1 - t) * config.swa.lr_max + t * config.swa.lr_min
        target = F.one_hot(batch.labels, 10) * (1 - config.optimizer.label_smoothing) + config.optimizer.label_smoothing / 10
        loss = -(target * network(batch.images).log_softmax(1)).sum(1).mean()
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        with torch.no_grad():
            for w, v, g in zip(network.parameters(), velocity, gradients, strict=True):
                if config.optimizer.decay_norm_and_bias or w.ndim > 1:
                    g = g + config.optimizer.weight_decay * w
                v.mul_(config.optimizer.momentum).add_(g)
                w.sub_(lr * (g + config.optimizer.momentum * v if config.optimizer.nesterov else v))
    return network.state_dict()


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--optimizer.label_smoothing=0.2",),
        ("--optimizer.nesterov", "--optimizer.weight_decay=0.1"),
        ("--optimizer.weight_decay=0.1", "--optimizer.decay_norm_and_bias=false"),
        ("--speed.channels_last=false", "--speed.fused_optimizer=false"),
    ],
    ids=["plain", "label_smoothing", "nesterov", "no decay of norms", "slow switches"],
)
def test_capture_is_what_plain_sgd_gives(tmp_path: Path, start: dict[int, Path], flags: tuple[str, ...]):
    """A cycle of one epoch ends at the weights and moving statistics of a hand-written SGD loop over the same batches."""
    run = train(tmp_path / "run", *ONE_EPOCH, f"--model.weights={start[10]}", *flags)
    network = timm.create_model("test_efficientnet", num_classes=10)
    network.load_state_dict(load_file(start[10]))
    assert_close(captures_of(run)[1], reference_epoch(network, saved_config(run)), tolerance=1e-4)


def test_accumulation_is_no_other_training(tmp_path: Path):
    """Without BatchNorm, four parts of a batch accumulated give the weights of the whole batch."""
    flags = (*ONE_EPOCH, "--model.name=test_efficientnet_gn")
    whole = train(tmp_path / "whole", *flags)
    parts = train(tmp_path / "parts", *flags, "--speed.max_batch_size_per_device=4")
    assert "4 per device x 1 processes x 4 accumulated = 16" in (parts / "train.log").read_text()
    assert_close(captures_of(parts)[1], captures_of(whole)[1], tolerance=1e-4)
    losses = [[line["loss"] for line in metrics_of(run, "train")] for run in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# ------------------------------------------------------------------------------------------------ any network


@pytest.mark.parametrize(
    ("flags", "has_batchnorm"),
    [
        (("--model.name=test_efficientnet_gn",), False),
        (("--model.name=test_efficientnet_ln",), False),
        (("--model.name=test_vit", "--model.kwargs.img_size=32"), False),
        (("--model.name=test_resnet",), True),
        (("--model.library=torchvision", "--model.name=mobilenet_v3_small"), True),
        (("--model.library=torchvision", "--model.name=shufflenet_v2_x0_5"), True),
    ],
    ids=lambda value: value[-1].rpartition("=")[2] if isinstance(value, tuple) else "",
)
def test_networks_by_name(tmp_path: Path, flags: tuple[str, ...], has_batchnorm: bool):
    """Any network of either library runs through; where it has no BatchNorm the run says so."""
    run = train(tmp_path / "run", *TWO_EPOCHS, *GENTLE, *flags)
    captures = captures_of(run)
    average = load_file(run / "averages/swa-without-pretrained-epoch-02.safetensors")
    assert_is_mean(average, [captures[1], captures[2]])
    assert all(np.isfinite(result["nll"]) for result in results_of(run).values())
    log = (run / "train.log").read_text()
    assert ("do not exist in this network" not in log) == has_batchnorm
    assert ("BatchNorm statistics from 96 images" in log) == has_batchnorm


class Small(nn.Sequential):
    """A network with a BatchNorm layer that has statistics but no weights."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3, stride=2),
            nn.BatchNorm2d(8, affine=False),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 10),
        )


def test_batchnorm_without_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A BatchNorm layer without scale and shift gets its statistics like any other."""
    monkeypatch.setattr(models, "create_network", lambda _: Small())
    run = train(tmp_path / "run", *ONE_EPOCH, "--model.library=torchvision", "--model.name=resnet18")
    weights = load_file(run / "swa.safetensors")
    images = training_images(run, epoch=1).double()
    inputs = F.conv2d(images, weights["0.weight"].double(), weights["0.bias"].double(), stride=2).numpy()
    np.testing.assert_allclose(weights["1.running_mean"], inputs.mean((0, 2, 3)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(weights["1.running_var"], inputs.var((0, 2, 3), ddof=1), rtol=1e-5)


def test_frozen_batchnorm(tmp_path: Path, start: dict[int, Path]):
    """With freeze_batchnorm the statistics stay the pretrained ones, in captures and averages alike; the weights do not."""
    run = train(tmp_path / "run", *TWO_EPOCHS, *GENTLE, f"--model.weights={start[10]}", "--model.freeze_batchnorm")
    pretrained = load_file(start[10])
    statistics = [name for name in pretrained if "running_" in name or "num_batches" in name]
    for weights in (*captures_of(run).values(), load_file(run / "swa.safetensors")):
        for name in statistics:
            assert torch.equal(weights[name], pretrained[name]), name
        assert not torch.equal(weights["bn1.weight"], pretrained["bn1.weight"])
    assert "BatchNorm statistics are frozen" in (run / "train.log").read_text()


# --------------------------------------------------------------------------------------- repeatability, arithmetic


def test_runs_with_dropout_repeat_to_the_bit(tmp_path: Path):
    """Two runs with the same seed are bit-identical, dropout and all; without dropout, or with another seed, they differ."""
    flags = (*ONE_EPOCH, *GENTLE, "--model.kwargs.drop_rate=0.5", "--model.kwargs.drop_path_rate=0.2")
    one, other = train(tmp_path / "one", *flags), train(tmp_path / "other", *flags)
    assert_equal(captures_of(one)[1], captures_of(other)[1])
    assert_equal(load_file(one / "swa.safetensors"), load_file(other / "swa.safetensors"))
    assert results_of(one) == results_of(other)
    no_dropout = train(tmp_path / "no-dropout", *ONE_EPOCH, *GENTLE)
    assert difference(captures_of(one)[1], captures_of(no_dropout)[1]) > 0
    other_seed = train(tmp_path / "seed", *flags, "--seed=1")
    assert difference(captures_of(one)[1], captures_of(other_seed)[1]) > 0


def test_bf16_training(tmp_path: Path, start: dict[int, Path]):
    """bf16 arithmetic changes the weights slightly, and they stay fp32 wherever they are kept."""
    flags = (*ONE_EPOCH, *GENTLE, f"--model.weights={start[10]}")
    in_fp32 = captures_of(train(tmp_path / "fp32", *flags))[1]
    AcceleratorState._reset_state(reset_partial_state=True)
    run = train(tmp_path / "bf16", *flags, "--speed.precision=bf16")
    in_bf16 = captures_of(run)[1]
    way, deviation = difference(in_fp32, load_file(start[10])), difference(in_bf16, in_fp32)
    assert 0 < deviation < 0.2 * way
    files = [*run.glob("captures/*"), *run.glob("averages/*"), *run.glob("checkpoints/*/*.safetensors")]
    assert len(files) >= 6
    for path in files:
        assert not {tensor.dtype for tensor in load_file(path).values()} - {torch.float32, torch.int64}, path


def test_bf16_evaluation(tmp_path: Path, start: dict[int, Path]):
    """evaluation.precision bf16 changes the NLL slightly and nothing of the training."""
    flags = (*ONE_EPOCH, f"--model.weights={start[10]}")
    one, other = train(tmp_path / "fp32", *flags), train(tmp_path / "bf16", *flags, "--evaluation.precision=bf16")
    assert_equal(captures_of(one)[1], captures_of(other)[1])
    before, after = (results_of(run)["pretrained", 0]["nll"] for run in (one, other))
    assert before != after
    assert before == pytest.approx(after, rel=0.02)


def test_compiled_training(tmp_path: Path, start: dict[int, Path]):
    """torch.compile changes the weights by rounding only, and none of their names."""
    flags = (*ONE_EPOCH, *GENTLE, f"--model.weights={start[10]}")
    eager = captures_of(train(tmp_path / "eager", *flags))[1]
    compiled = train(tmp_path / "compiled", *flags, "--speed.compile")
    assert captures_of(compiled)[1].keys() == eager.keys()
    assert_close(captures_of(compiled)[1], eager, tolerance=1e-3)
    timm.create_model("test_efficientnet", num_classes=10).load_state_dict(load_file(compiled / "swa.safetensors"))


def test_tensorboard_gets_the_metrics(tmp_path: Path):
    """With the tensorboard tracker, losses, rates and accuracies arrive in its event files."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = train(tmp_path / "run", *ONE_EPOCH, "--trackers=[tensorboard]")
    events = accumulator.EventAccumulator(str(run / "imagenet_swa"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(line["step"], pytest.approx(line["loss"])) for line in metrics_of(run, "train")]
    assert {"evaluation/swa/top1", "evaluation/capture/top1"} <= set(events.Tags()["scalars"])


# ------------------------------------------------------------------------------------------------------ refusals


def test_never_resume_refuses_a_taken_folder(tmp_path: Path):
    """`resume: never` does not touch a folder that holds a run."""
    run = train(tmp_path / "run", *ONE_EPOCH)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(InputError, match=r"already holds a run and resume is never; choose another output"):
        train(run, *ONE_EPOCH, "--resume=never")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_output_below_a_file(tmp_path: Path):
    """A run folder that cannot be made is refused in one line with the system's reason."""
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot create the run folder .*file/run: Not a directory"):
        train(tmp_path / "file" / "run")


@pytest.mark.parametrize("backend", ["dali", "torchvision"])
def test_a_bad_training_image_is_named(tmp_path: Path, image_folder: Path, backend: str):
    """An undecodable training image stops the run with its path; nothing of that epoch is captured or saved."""
    for split in ("train", "val"):
        for path in sorted((image_folder / split).rglob("*.JPEG")):
            copy = tmp_path / "images" / path.relative_to(image_folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    bad = tmp_path / "images/train/bee/3.JPEG"
    bad.write_text("<html>404</html>")
    with pytest.raises(InputError, match=f"cannot decode the image {bad}"):
        train(tmp_path / "run", *on_images(tmp_path / "images", backend))
    assert not list((tmp_path / "run").glob("captures/*"))
    assert not list((tmp_path / "run").glob("checkpoints/*"))


# ------------------------------------------------------------------------------------- real images and weights


def real_flags(real_data: Path, lists: bool = True) -> list[str]:
    folders = [f"--data.{split}={real_data / split}" for split in ("train", "val")]
    files = [f"--data.{split}_list={real_data / split}.txt" for split in ("train", "val")]
    return folders + files if lists else folders


REAL_NETWORKS: dict[str, tuple[str, ...]] = {
    "mobilenet_v2": ("--model.library=torchvision", "--model.name=mobilenet_v2"),
    "tf_efficientnet_lite0": ("--model.library=timm", "--model.name=tf_efficientnet_lite0"),
}


@pytest.fixture
def weights_flag(real_weights: Path) -> Callable[[str], str]:
    return lambda name: f"--model.weights={next(real_weights.glob(name + '.*'))}"


@pytest.mark.realdata
@pytest.mark.parametrize(("name", "top1", "top5"), [("mobilenet_v2", 198, 244), ("tf_efficientnet_lite0", 208, 243)])
def test_pretrained_baseline_on_real_images(real_data: Path, weights_flag: Callable[[str], str], name: str, top1: int, top5: int):
    """Through DALI, real weights classify as many real validation images as with PIL preprocessing, two more or fewer where
    DALI resizes.
    """
    flags = [*REAL_NETWORKS[name], weights_flag(name), *real_flags(real_data), "--evaluation.batch_size=65"]
    evaluation = evaluate_network(parse_config(flags, "imagenet-swa evaluate", ""))
    assert evaluation.num_images == 260
    tolerance = 0 if resize.available() else 2
    assert abs(evaluation.num_correct - top1) <= tolerance
    assert abs(evaluation.num_correct_top5 - top5) <= tolerance


@pytest.mark.realdata
def test_two_cycles_on_real_images(tmp_path: Path, real_data: Path, weights_flag: Callable[[str], str]):
    """Two short cycles of a real network on real images run through to a report whose accuracies are far above chance."""
    flags = [*REAL_NETWORKS["mobilenet_v2"], weights_flag("mobilenet_v2"), *real_flags(real_data)]
    flags += ["--preprocessing.image_size=96", "--global_batch_size=32", "--swa.num_epochs=2", "--swa.report_epochs=[]"]
    flags += ["--swa.lr_max=1e-4", "--swa.lr_min=1e-5", "--evaluation.batch_size=32", f"--output={tmp_path / 'run'}"]
    report = finetune(parse_config(flags, "imagenet-swa train", "")).read_text()
    for row in ("| pretrained |", "| capture | 1 |", "| capture | 2 |", "| SWA (Alg. 1) | 2 |", "| SWA, captures only | 2 |"):
        assert row in report
    results = results_of(tmp_path / "run")
    assert len(results) == 5
    assert all(result["num_correct"] > 26 for result in results.values())  # of 260; chance is 0.26


@pytest.mark.realdata
def test_some_of_imagenets_classes_as_folders(tmp_path: Path, real_data: Path, weights_flag: Callable[[str], str]):
    """Folders of some of ImageNet's classes are refused for a network of 1000, with the reason and the way out."""
    flags = [*REAL_NETWORKS["mobilenet_v2"], weights_flag("mobilenet_v2"), *real_flags(real_data, lists=False)]
    with pytest.raises(InputError, match=r"a subset of ImageNet's 1000.*1000 outputs.*wrong labels; give data.train_list"):
        finetune(parse_config([*flags, f"--output={tmp_path / 'run'}"], "imagenet-swa train", ""))


@pytest.mark.parametrize("flag", ["--speed.max_batch_size_per_device=1", "--evaluation.batch_size=1"])
def test_batchnorm_on_single_images_is_refused(tmp_path: Path, flag: str):
    """One image has no spread to normalise by: said before the first epoch, where the network has BatchNorm."""
    with pytest.raises(InputError, match="BatchNorm needs at least 2 images at a time"):
        finetune(configure(tmp_path / "run", flag))
    assert not (tmp_path / "run" / "checkpoints").exists()
    finetune(configure(tmp_path / "frozen", flag, "--model.freeze_batchnorm", "--swa.num_epochs=1", "--swa.report_epochs=[1]"))


def test_a_batch_that_splits_badly_is_mentioned(tmp_path: Path):
    """A global batch of 14 in parts of at most 6 means parts of 2: the user hears of it."""
    flags = ("--global_batch_size=14", "--speed.max_batch_size_per_device=6", "--swa.num_epochs=1", "--swa.report_epochs=[1]")
    finetune(configure(tmp_path / "run", *flags))
    log = (tmp_path / "run" / "train.log").read_text()
    assert "warning: BatchNorm will see 2 images at a time where 6 would fit" in log
