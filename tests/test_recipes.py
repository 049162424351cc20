"""The recipes of the paper's CIFAR experiments: their numbers against the paper's, and launch/cifar.sh, which runs them."""

import json
import math
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import PROJECT, run
from PIL import Image
from torch import nn

from imagenet_swa.arguments import parse_config
from imagenet_swa.cli import COMMANDS, main
from imagenet_swa.config import Config, ModelConfig, flatten, to_plain
from imagenet_swa.models import create_network, resolve_preprocessing
from imagenet_swa.optim import make_sgd
from imagenet_swa.schedule import Schedule, make_schedule

FOLDER = PROJECT / "configs" / "cifar"
FILES = sorted(FOLDER.glob("*.yaml"))
STEPS = 50_000 // 128  # updates in an epoch of CIFAR

# Rows of Table 1: classes, budget, where SWA starts, rates of SGD, weight decay, millions of parameters, shape of the SWA rate.
TABLE_1: dict[str, tuple[int, int, int, float, float, float, tuple[Any, ...]]] = {
    "cifar100-vgg16": (100, 200, 150, 0.05, 5e-4, 15.29, ("constant", 0.01)),
    "cifar100-preresnet164": (100, 150, 112, 0.1, 3e-4, 1.73, ("constant", 0.05)),
    "cifar100-wrn28-10": (100, 200, 150, 0.1, 5e-4, 36.5, ("constant", 0.01)),
    "cifar100-pyramidnet272": (100, 300, 300, 0.1, 1e-4, 26.3, ("cyclical", 0.05, 0.001, 3)),
    "cifar10-vgg16": (10, 200, 150, 0.05, 5e-4, 15.25, ("constant", 0.01)),
    "cifar10-preresnet164": (10, 150, 112, 0.1, 3e-4, 1.70, ("constant", 0.01)),
    "cifar10-wrn28-10": (10, 200, 150, 0.1, 5e-4, 36.5, ("constant", 0.01)),
    "cifar10-shakeshake": (10, 1800, 1800, 0.2, 1e-4, 11.7, ("cosine", 100)),
}
SMALL = ["small-vgg16", "small-preresnet", "small-wrn", "small-pyramidnet", "small-shakeshake"]
PAIRS = [*TABLE_1, *SMALL]


@cache
def load(name: str) -> Config:
    return parse_config(["--config", str(FOLDER / f"{name}.yaml")], "", "")


def schedule(config: Config) -> Schedule:
    return make_schedule(config.swa, steps_per_epoch=STEPS)


def rates(config: Config, steps: np.ndarray) -> np.ndarray:
    return np.array([schedule(config).learning_rate(int(step)) for step in steps])


def some_steps(num_epochs: int) -> np.ndarray:
    """The first and last updates of some epochs, and updates within them."""
    epochs = np.unique(np.linspace(0, num_epochs - 1, 41).astype(int))
    return np.unique((epochs[:, None] * STEPS + np.array([0, 1, 77, STEPS // 2, STEPS - 1])).ravel())


def image_settings(config: Config) -> dict[str, Any]:
    return {name: value for name, value in vars(config.preprocessing).items() if value is not None}


pytestmark = pytest.mark.usefixtures("on_the_cpu")


# -------------------------------------------------------------------------------------------------------- files


def test_there_is_a_file_per_row_and_kind():
    """Each row of Table 1 and each small relative has an SGD and a SWA file, Fig. 7, Fig. 9 and FGE theirs; no other is there."""
    names = {f"{pair}-{kind}" for pair in PAIRS for kind in ("sgd", "swa")}
    names |= {"cifar100-preresnet164-fge", "cifar100-wrn28-10-fixed-rate", "cifar100-preresnet164-fixed-rate"}
    assert {path.stem for path in FILES} == names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_line_sets_what_it_says(path: Path):
    """Every file is a configuration; its values arrive as written, and none of its sections leaves a setting to a default."""
    config = load(path.stem)
    found, written = flatten(to_plain(config)), flatten(yaml.safe_load(path.read_text()))
    for name, value in written.items():
        assert found[name] == (type(found[name])(value) if isinstance(found[name], float) else value), name
    for section in ("optimizer", "batchnorm", "evaluation", "speed"):
        assert set(flatten({section: to_plain(getattr(config, section))})) <= written.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_header_shows_commands_that_work(path: Path):
    """The header names the paper's section or says that there is none, what is measured, and commands that can be typed."""
    header = "\n".join(line.removeprefix("#") for line in path.read_text().splitlines() if line.startswith("#"))
    text = " ".join(header.split())
    assert "sec. " in text or "No row of the paper" in text
    assert "Measured here: not run yet" in text or "Measured: " in text
    commands = [shlex.split(line) for line in header.replace("\\\n", " ").splitlines() if line.startswith("   ")]
    assert any(words[:2] == ["bash", "launch/single_node.sh"] for words in commands)
    for words in commands:
        if words[:2] == ["bash", "launch/single_node.sh"]:
            assert words[2] == f"configs/cifar/{path.name}"
            parse_config(["--config", str(PROJECT / words[2]), *words[3:]], "", "")
        elif words[:2] == ["bash", "launch/cifar.sh"]:
            assert path.stem in (f"{words[2]}-sgd", f"{words[2]}-swa")
            assert set(words[3::2]) <= {"--data", "--seeds"}
        else:
            assert words[0] == "imagenet-swa" and words[1] in COMMANDS


# --------------------------------------------------------------------------------------- the paper's experiment


@pytest.mark.parametrize("row", TABLE_1)
def test_budgets_add_up(row: str):
    """SGD takes the budget B; SWA goes on from 0.75 B (or B) and ends at 1.5 B; reports stand at B, 1.25 B and 1.5 B."""
    _, budget, start, *_ = TABLE_1[row]
    sgd, swa = load(f"{row}-sgd").swa, load(f"{row}-swa").swa
    assert sgd.num_epochs == sgd.start_epoch == sgd.budget_epochs == budget and not sgd.averages
    assert start == budget or abs(start - 0.75 * budget) <= 0.5
    assert swa.start_epoch == 0 and start + swa.num_epochs == 1.5 * budget
    columns = [share * budget for share in ((1.25, 1.5) if start == budget else (1, 1.25, 1.5))]
    # The average after an epoch between two captures is that after the first of them.
    wanted = [math.ceil(column - start) // swa.cycle_epochs * swa.cycle_epochs for column in columns]
    assert list(swa.epochs_to_report) == wanted


@pytest.mark.parametrize("row", TABLE_1)
def test_sgd_has_the_papers_learning_rate(row: str):
    """Alpha_1 for half the budget, linearly to 0.01 alpha_1 at 0.9 of it, then constant; Shake-Shake's falls along a cosine."""
    _, budget, _, lr, *_ = TABLE_1[row]
    steps = some_steps(budget)
    share = steps / (budget * STEPS)
    wanted = np.interp(share, [0, 0.5, 0.9, 1], [lr, lr, 0.01 * lr, 0.01 * lr])
    if row == "cifar10-shakeshake":
        wanted = lr * np.cos(share * math.pi / 2) ** 2
    np.testing.assert_allclose(rates(load(f"{row}-sgd"), steps), wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("row", TABLE_1)
def test_swa_has_the_papers_learning_rate(row: str):
    """Constant; (1 - t) alpha_1 + t alpha_2 in 3 epochs; Shake-Shake's 0.1 (1 + cos(pi (1600 + epoch mod 100) / 1800)). Captures
    stand at the ends of the cycles.
    """
    *_, shape = TABLE_1[row]
    config = load(f"{row}-swa")
    steps = some_steps(config.swa.num_epochs)
    match shape:
        case ("constant", rate):
            wanted, cycle = np.full(len(steps), rate), 1
        case ("cyclical", first, last, cycle):
            t = (steps % (cycle * STEPS) + 1) / (cycle * STEPS)
            wanted = (1 - t) * first + t * last
        case _:
            cycle = shape[1]
            epoch = steps / STEPS
            wanted = 0.1 * (1 + np.cos(np.pi * (1600 + epoch % 100) / 1800))
            assert np.ptp(wanted) > 0.004
    np.testing.assert_allclose(rates(config, steps), wanted, rtol=1e-9)
    captured = [step for step in range(1, config.swa.num_epochs * STEPS + 1) if schedule(config).is_capture(step)]
    assert captured == [k * cycle * STEPS for k in range(1, config.swa.num_epochs // cycle + 1)]


@pytest.mark.parametrize("row", TABLE_1)
@pytest.mark.parametrize("kind", ["sgd", "swa"])
def test_settings_of_the_paper(row: str, kind: str):
    """Classes, batch 128 on one device, weight decay, momentum, 4 pixels of padding and flips are those of the experiment."""
    classes, _, _, _, weight_decay, _, _ = TABLE_1[row]
    config = load(f"{row}-{kind}")
    assert (config.model.num_classes, config.global_batch_size, config.speed.max_batch_size_per_device) == (classes, 128, 128)
    optimizer = config.optimizer
    assert (optimizer.weight_decay, optimizer.momentum, optimizer.label_smoothing) == (weight_decay, 0.9, 0)
    assert optimizer.nesterov == row.endswith(("pyramidnet272", "shakeshake"))
    images = config.preprocessing
    assert (images.train_crop, images.padding, images.horizontal_flip) == ("padded", 4, True)
    assert config.swa.include_pretrained and config.batchnorm.num_images is None


@pytest.mark.parametrize("row", TABLE_1)
def test_networks_have_the_published_size(row: str):
    """The networks have the published numbers of parameters; with pytorchcv's names or families, for 10 and 100 classes."""
    classes, *_, millions, _ = TABLE_1[row]
    config = load(f"{row}-sgd")
    with torch.device("meta"):
        network = create_network(config.model)
        assert network.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, classes)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, rel=5e-3)
    dropouts = [module.p for module in network.modules() if isinstance(module, nn.Dropout) and module.p > 0]
    assert dropouts == ([0.5, 0.5] if "vgg16" in row else [])
    own = resolve_preprocessing(ModelConfig(**vars(config.model)), type(config.preprocessing)(), network)
    assert all(getattr(own, name) == getattr(config.preprocessing, name) for name in ("mean", "std", "resize", "image_size"))


@pytest.mark.parametrize("row", PAIRS)
def test_swa_starts_from_a_capture_that_sgd_keeps(row: str):
    """Both halves have one network, images and optimizer, and the SWA run's weights are a capture of the SGD run's folder."""
    sgd, swa = load(f"{row}-sgd"), load(f"{row}-swa")
    assert (sgd.model.library, sgd.model.name, sgd.model.kwargs) == (swa.model.library, swa.model.name, swa.model.kwargs)
    assert (image_settings(sgd), sgd.optimizer, sgd.speed) == (image_settings(swa), swa.optimizer, swa.speed)
    assert not sgd.model.pretrained and sgd.model.weights is None and swa.model.weights is not None
    assert sgd.output == Path("runs/cifar") / row / "sgd-0"
    assert swa.output == sgd.output.with_name("swa-0")
    match = re.fullmatch(rf"{sgd.output}/captures/epoch-(\d\d+)\.safetensors", str(swa.model.weights))
    assert match
    epoch = int(match.group(1))
    assert f"{epoch:02d}" == match.group(1)
    assert schedule(sgd).is_capture(epoch * STEPS) and epoch <= sgd.swa.num_epochs
    assert epoch + swa.swa.num_epochs == 1.5 * sgd.swa.num_epochs


def test_geometric_ensembling():
    """Sec. 3.5: 20 epochs of a triangular rate, captures at its ten minima, from a capture that the SGD run keeps."""
    config, sgd = load("cifar100-preresnet164-fge"), load("cifar100-preresnet164-sgd")
    assert config.swa.num_epochs == 20
    captured = [step for step in range(1, 20 * STEPS + 1) if schedule(config).is_capture(step)]
    assert captured == [epoch * STEPS for epoch in range(1, 20, 2)]
    steps = np.arange(20 * STEPS)
    wanted = np.interp((steps + 1) / STEPS % 2, [0, 1, 2], [0.05, 0.0005, 0.05])
    np.testing.assert_allclose(rates(config, steps), wanted, rtol=1e-9)
    assert rates(config, np.array(captured) - 1) == pytest.approx(5e-4)
    assert str(config.model.weights) == f"{sgd.output}/captures/epoch-120.safetensors"
    assert schedule(sgd).is_capture(120 * STEPS)
    assert (config.optimizer, config.model.name) == (sgd.optimizer, sgd.model.name)


@pytest.mark.parametrize(("network", "rate", "start"), [("wrn28-10", 0.05, 140), ("preresnet164", 0.1, 200)])
def test_fixed_rates_from_scratch(network: str, rate: float, start: int):
    """Fig. 7 and 9: one rate for 300 epochs from random weights, captures after each, averaged from the stated epoch on."""
    config = load(f"cifar100-{network}-fixed-rate")
    assert not config.model.pretrained and config.model.weights is None
    assert (config.swa.num_epochs, config.swa.start_epoch, config.swa.averages) == (300, start, True)
    assert set(rates(config, some_steps(300))) == {rate}
    assert all(schedule(config).is_capture(epoch * STEPS) for epoch in range(1, 301))
    table = load(f"cifar100-{network}-sgd")
    assert (config.optimizer, config.model, image_settings(config)) == (table.optimizer, table.model, image_settings(table))


# ----------------------------------------------------------------------------------------------- small relatives


@pytest.mark.parametrize("small", SMALL)
def test_small_recipes_have_the_schedules_of_the_large(small: str):
    """Rates, decay and kind of schedule are those of the network they stand for; only the number of epochs is smaller."""
    large = {"small-vgg16": "cifar10-vgg16", "small-preresnet": "cifar10-preresnet164", "small-wrn": "cifar10-wrn28-10"}
    row = large.get(small) or ("cifar100-pyramidnet272" if small == "small-pyramidnet" else "cifar10-shakeshake")
    for kind in ("sgd", "swa"):
        ours, theirs = load(f"{small}-{kind}"), load(f"{row}-{kind}")
        for name in ("schedule", "lr_max", "lr_min", "include_pretrained"):
            assert getattr(ours.swa, name) == getattr(theirs.swa, name)
        assert ours.optimizer == theirs.optimizer and ours.global_batch_size == theirs.global_batch_size
        assert ours.model.num_classes == 10
        assert ours.swa.num_epochs <= 16


@pytest.mark.parametrize("small", SMALL)
def test_small_recipes_take_two_steps(small: str):
    """A small network is small, has finite losses, and two steps at its first rate move every parameter that has a gradient."""
    torch.manual_seed(11)
    config = load(f"{small}-sgd")
    network = create_network(config.model).train()
    assert sum(p.numel() for p in network.parameters()) < 1_000_000
    optimizer = make_sgd(network, config.optimizer, fused=False)
    before = {name: parameter.detach().clone() for name, parameter in network.named_parameters()}
    images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 10
    for step in range(2):
        optimizer.param_groups[0]["lr"] = schedule(config).learning_rate(step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(images), labels)
        assert loss.isfinite()
        loss.backward()
        optimizer.step()
    moved = [name for name, parameter in network.named_parameters() if not torch.equal(parameter, before[name])]
    assert moved == list(before)


# ------------------------------------------------------------------------------------------------ launch/cifar.sh

SCRIPT = PROJECT / "launch" / "cifar.sh"


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """Stand-ins for accelerate and imagenet-swa that note their arguments, one call a line, words separated by tabs."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in ("accelerate", "imagenet-swa"):
        path = folder / name
        path.write_text(f"""#!/usr/bin/env bash\n(printf '%s' {name}; printf '\\t%s' "$@"; echo) >>"{tmp_path}/calls"\n""")
        path.chmod(0o755)
    return folder


def launch(*arguments: str | Path, programs: Path | None = None, cwd: Path = PROJECT, **environment: Any):
    """launch/cifar.sh on the CPU, with the stand-ins first on the PATH where there are any."""
    first = [] if programs is None else ["bash", "-c", 'PATH="$0:$PATH"; export PATH; exec "$@"', programs]
    return run([*first, "bash", SCRIPT, *arguments], timeout=280, cwd=cwd, CUDA_VISIBLE_DEVICES="", **environment)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no such recipe: (none given); wanted one of cifar10-preresnet164"),
        (["--seeds", "3"], "no such recipe: --seeds; wanted one of"),
        (["cifar10-vgg"], "no such recipe: cifar10-vgg; wanted one of"),
        (["cifar100-preresnet164-fge"], "no such recipe: cifar100-preresnet164-fge"),
        (["small-wrn", "--seeds"], "--seeds wants a value"),
        (["small-wrn", "--seeds", "0"], "--seeds wants a number of at least 1, got '0'"),
        (["small-wrn", "--seeds", "two"], "--seeds wants a number of at least 1, got 'two'"),
        (["small-wrn", "--data", "/nowhere"], "--data wants a folder with train/ and val/, got '/nowhere'"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(programs: Path, arguments: list[str], message: str):
    """A missing or wrong argument ends with exit code 2 and one line, before anything is run."""
    result = launch(*arguments, programs=programs)
    assert result.returncode == 2
    assert result.stderr.startswith("cifar.sh: ") and message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (programs.parent / "calls").exists()


def test_the_script_runs_both_halves_for_each_seed(tmp_path: Path, programs: Path):
    """Each seed has its SGD run and, from the capture that the file names, its SWA run; settings go to all; one table ends it."""
    data = tmp_path / "my images"
    for split in ("train", "val"):
        (data / split).mkdir(parents=True)
    settings = ["--speed.precision", "bf16", "--data.num_workers=2"]
    arguments = ["cifar100-preresnet164", "--seeds", "2", "--data", data, *settings, "--output", "my runs/here"]
    result = launch(*arguments, programs=programs, NUM_PROCESSES="1")
    assert result.returncode == 0, result.stderr
    calls = [line.split("\t") for line in (tmp_path / "calls").read_text().splitlines()]
    folders = [f"my runs/here/{kind}-{seed}" for seed in (0, 1) for kind in ("sgd", "swa")]
    assert calls[-1] == ["imagenet-swa", "report", *folders]
    assert len(calls) == 5
    for call, folder in zip(calls, folders, strict=False):
        words = call[call.index("--config") + 1 :]
        kind, seed = folder[-5:].split("-")
        assert Path(words[0]).resolve() == FOLDER / f"cifar100-preresnet164-{kind}.yaml"
        config = parse_config(["--config", *words], "", "")
        assert (str(config.output), config.seed, config.speed.precision, config.data.num_workers) == (
            folder,
            int(seed),
            "bf16",
            2,
        )
        assert (config.data.train, config.data.val) == (f"{data}/train", f"{data}/val")
        weights = f"my runs/here/sgd-{seed}/captures/epoch-112.safetensors"
        assert config.model.weights == (Path(weights) if kind == "swa" else None)


@pytest.mark.parametrize("recipe", PAIRS)
def test_the_script_finds_the_capture_of_every_recipe(tmp_path: Path, programs: Path, recipe: str):
    """In its default folder each recipe's SWA run starts from the very file that its configuration names."""
    assert launch(recipe, programs=programs, NUM_PROCESSES="1").returncode == 0
    _, swa, _ = (line.split("\t") for line in (tmp_path / "calls").read_text().splitlines())
    assert swa[swa.index("--model.weights") + 1] == str(load(f"{recipe}-swa").model.weights)
    assert swa[swa.index("--output") + 1] == str(load(f"{recipe}-swa").output)


def test_a_failed_half_ends_the_script(programs: Path):
    """When the SGD run fails, its exit code is the script's, and nothing runs after it."""
    with (programs / "accelerate").open("a") as file:
        file.write("exit 3\n")
    assert launch("small-wrn", programs=programs, NUM_PROCESSES="1").returncode == 3
    assert len((programs.parent / "calls").read_text().splitlines()) == 1


def test_a_recipe_from_beginning_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """On generated PNGs the script leaves a finished SGD run as it is, averages from its capture, and reports on both runs."""
    random = np.random.default_rng(12)
    for split, number in (("train", 13), ("val", 2)):
        for label in range(10):
            folder = tmp_path / "data" / split / f"class {label}"
            folder.mkdir(parents=True)
            for k in range(number):
                pixels = random.integers(0, 128, (32, 32, 3)) + 12 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{k}.png")
    monkeypatch.chdir(tmp_path)
    settings = ["--data.backend=torchvision", "--data.num_workers=0", "--evaluation.batch_size=20"]
    images = ["--data.train", str(tmp_path / "data/train"), "--data.val", str(tmp_path / "data/val")]
    config = ["--config", str(FOLDER / "small-wrn-sgd.yaml"), "--output", "runs/sgd-0"]
    assert main(["train", *config, *images, *settings]) == 0
    trained = [Path("runs/sgd-0", name).read_text() for name in ("metrics.jsonl", "results.json")]

    result = launch("small-wrn", "--data", "data", *settings, "--output", "runs", cwd=tmp_path, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert [Path("runs/sgd-0", name).read_text() for name in ("metrics.jsonl", "results.json")] == trained
    assert re.findall(r"epoch (\d+)/(\d+): loss", result.stderr) == [(str(epoch), "6") for epoch in range(1, 7)]
    sgd, swa = (json.loads(Path(f"runs/{kind}-0/results.json").read_text()) for kind in ("sgd", "swa"))
    assert not any(entry["name"].startswith("swa") for entry in sgd)
    assert [entry["epoch"] for entry in swa if entry["name"] == "swa"] == [2, 4, 6]
    start = next(entry for entry in sgd if entry["name"] == "capture" and entry["epoch"] == 6)
    pretrained = next(entry for entry in swa if entry["name"] == "pretrained")
    assert (pretrained["num_correct"], pretrained["nll"]) == (start["num_correct"], pytest.approx(start["nll"]))
    assert "wrn_cifar" in result.stdout.split("== small-wrn: all runs ==")[1]
