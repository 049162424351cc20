"""The weights that runs leave behind, by name: against the files themselves, and every way in which they can be missing."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import QUICK_RUN, one_line
from safetensors.torch import load_file, save_file
from torch import nn

from imagenet_swa.analysis.captures import RunWeights, check_fits, check_spec, weights_of
from imagenet_swa.arguments import parse_config
from imagenet_swa.finetune import finetune
from imagenet_swa.models import Weights

pytestmark = pytest.mark.usefixtures("on_the_cpu")
QUICK = ("--data.synthetic_num_images=[32,20]", "--swa.report_epochs=[]", "--evaluation.captures=false")


def train(output: Path, *flags: str) -> Path:
    finetune(parse_config([*QUICK_RUN, *QUICK, f"--output={output}", *flags], "imagenet-swa train", ""))
    return output


@pytest.fixture(scope="module")
def swa_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four epochs of two steps, a capture each, the last three of which are averaged."""
    return train(tmp_path_factory.mktemp("runs") / "swa", "--swa.start_epoch=1")


@pytest.fixture(scope="module")
def sgd_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of plain SGD with cycles of three steps."""
    flags = ("--swa.num_epochs=2", "--swa.start_epoch=2", "--swa.cycle_steps=3", "--seed=1")
    return train(tmp_path_factory.mktemp("runs") / "sgd", *flags)


@pytest.fixture
def copied(swa_run: Path, tmp_path: Path) -> Path:
    """A run to damage."""
    return shutil.copytree(swa_run, tmp_path / "run")


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(9)
    return timm.create_model("test_efficientnet", num_classes=10)


def assert_same(a: Weights, b: Weights) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# -------------------------------------------------------------------------------------------------------- what is there


def test_captures_come_in_the_order_of_the_average(swa_run: Path):
    """Captures are numbered as they entered the average, with the epoch and step of their file's name; earlier ones are apart."""
    run = RunWeights.load(swa_run)
    assert [(c.name, c.num_averaged, c.epoch, c.step) for c in run.captures] == [
        ("epoch-02", 1, 2, 4),
        ("epoch-03", 2, 3, 6),
        ("epoch-04", 3, 4, 8),
    ]
    assert [c.name for c in run.captures_before] == ["epoch-01"]
    assert_same(run.captures[1].load(), load_file(swa_run / "captures" / "epoch-03.safetensors"))
    assert run.averages
    assert run.last_result["name"] == "swa" and run.last_result["epoch"] == 4
    assert run.config["model"]["name"] == "test_efficientnet"


def test_plain_sgd_has_a_solution_and_no_average(sgd_run: Path, network: nn.Module):
    """A run that averages nothing ends with the weights called pretrained; what an average would give is refused by name."""
    run = RunWeights.load(sgd_run)
    assert not run.averages and run.captures == ()
    assert [c.name for c in run.captures_before] == ["step-0000003"]
    assert run.solution_path == sgd_run / "pretrained.safetensors"
    assert run.last_result["epoch"] == 2
    assert_same(weights_of(run, "step-0000003", network)[1], load_file(sgd_run / "captures" / "step-0000003.safetensors"))
    for spec in ("swa", "last", "without-pretrained"):
        assert f"averaged nothing, so it has no {spec}" in one_line(check_spec, run, spec)


@pytest.mark.parametrize(
    ("spec", "file"),
    [
        ("swa", "swa.safetensors"),
        ("pretrained", "pretrained.safetensors"),
        ("last", "captures/epoch-04.safetensors"),
        ("epoch-02", "captures/epoch-02.safetensors"),
        ("epoch-01", "captures/epoch-01.safetensors"),
    ],
)
def test_a_name_stands_for_its_file(swa_run: Path, network: nn.Module, spec: str, file: str):
    """Each short name gives the weights of one file of the run, under that name or another."""
    run = RunWeights.load(swa_run)
    name, weights = weights_of(run, spec, network)
    assert name == spec == check_spec(run, spec)
    assert_same(weights, load_file(swa_run / file))
    other_name, same = weights_of(run, f"first={spec}", network)
    assert other_name == "first"
    assert_same(same, weights)


def test_names_of_files_and_other_runs(swa_run: Path, sgd_run: Path, network: nn.Module):
    """NAME=FILE is that file, NAME=RUN the solution of that run: the average, or the end of plain SGD."""
    run = RunWeights.load(swa_run)
    solution = load_file(sgd_run / "pretrained.safetensors")
    for spec in (f"sgd={sgd_run}", f"sgd={sgd_run}/pretrained.safetensors"):
        name, weights = weights_of(run, spec, network)
        assert name == "sgd"
        assert_same(weights, solution)
    assert_same(weights_of(RunWeights.load(sgd_run), f"b={swa_run}", network)[1], load_file(swa_run / "swa.safetensors"))


def test_the_average_of_the_captures(swa_run: Path, network: nn.Module):
    """`without-pretrained` is numpy's mean of the averaged captures, and to the last bit the average that the run made."""
    parameters = dict(network.named_parameters())
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    _, weights = weights_of(RunWeights.load(swa_run), "without-pretrained", network)
    captures = [load_file(swa_run / "captures" / f"epoch-0{epoch}.safetensors") for epoch in (2, 3, 4)]
    own = load_file(swa_run / "averages" / "swa-without-pretrained-epoch-04.safetensors")
    for name in parameters:
        mean = np.mean([capture[name].double().numpy() for capture in captures], axis=0)
        np.testing.assert_allclose(weights[name].numpy(), mean, rtol=1e-6, atol=1e-7)
        assert torch.equal(weights[name], own[name])
    assert_same(network.state_dict(), before)  # which was only asked for its shapes


# ------------------------------------------------------------------------------------------------------ what is not


def test_missing_captures_are_counted(copied: Path, network: nn.Module):
    """A capture removed from the middle or the end is missed by number, by those who need them all and by no other."""
    (copied / "captures" / "epoch-03.safetensors").unlink()
    run = RunWeights.load(copied)
    assert "of the 3 captures in the average 1 are missing (number 2)" in one_line(lambda: run.captures)
    assert "1 are missing" in one_line(weights_of, run, "without-pretrained", network)
    assert "has no capture epoch-03; it has epoch-01, epoch-02, epoch-04" in one_line(check_spec, run, "epoch-03")
    assert weights_of(run, "swa", network)[0] == "swa"
    (copied / "captures" / "epoch-04.safetensors").unlink()
    assert "2 are missing (number 2, 3)" in one_line(lambda: RunWeights.load(copied).captures)
    shutil.rmtree(copied / "captures")
    assert "3 are missing" in one_line(check_spec, RunWeights.load(copied), "last")
    assert "it has none" in one_line(check_spec, RunWeights.load(copied), "epoch-04")


def test_captures_of_two_runs_in_one_folder(copied: Path):
    """A second capture of the same number is noticed."""
    shutil.copyfile(copied / "captures" / "epoch-02.safetensors", copied / "captures" / "epoch-09.safetensors")
    assert "more than this run's 3: numbers 1, 1, 2, 3" in one_line(lambda: RunWeights.load(copied).captures)


def test_an_unfinished_run_is_no_finished_one(copied: Path):
    """Without the last epoch's result or the final average a run is said to be unfinished."""
    (copied / "swa.safetensors").rename(copied / "aside")
    assert "is not finished" in (line := one_line(RunWeights.load, copied)) and "swa.safetensors is missing" in line
    (copied / "aside").rename(copied / "swa.safetensors")
    results = json.loads((copied / "results.json").read_text())
    (copied / "results.json").write_text(json.dumps([r for r in results if r["epoch"] != 4]))
    assert "not finished" in (line := one_line(RunWeights.load, copied)) and "after epoch 4, its last" in line
    (copied / "results.json").unlink()
    assert "not finished" in (line := one_line(RunWeights.load, copied)) and "results.json is missing" in line


def test_no_run_at_all(tmp_path: Path, copied: Path):
    """A folder without a run, without a run's configuration or with a damaged file is refused."""
    assert "holds no run" in one_line(RunWeights.load, tmp_path / "nowhere")
    (copied / "results.json").write_text("[{")
    assert "results.json cannot be read" in one_line(RunWeights.load, copied)
    (copied / "config.yaml").write_text("a: 1\n")
    assert "is not the configuration of a run" in one_line(RunWeights.load, copied)


def test_files_that_are_no_captures(copied: Path):
    """A damaged capture, and weights that do not say which capture they are, are named."""
    path = copied / "captures" / "epoch-03.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    assert "epoch-03.safetensors is not a capture of a run" in one_line(RunWeights.load, copied)
    save_file({"a": torch.zeros(1)}, path)
    assert "epoch-03.safetensors is not a capture of a run" in one_line(RunWeights.load, copied)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("sgd", "unknown weights 'sgd'; wanted one of swa, pretrained, last"),
        ("", "unknown weights ''"),
        ("sgd=", "names no weights"),
        ("=swa", "names no weights"),
        ("sgd=sdg", "unknown weights 'sdg'"),
        ("sgd=nowhere/run", "no such weights file or run: nowhere/run"),
        ("sgd=nowhere.safetensors", "no such weights file or run: nowhere.safetensors"),
        ("epoch-99", "has no capture epoch-99; it has epoch-01, epoch-02, epoch-03, epoch-04"),
        ("step-0000001", "has no capture step-0000001"),
    ],
)
def test_names_of_nothing(swa_run: Path, spec: str, words: str):
    """A name that stands for nothing is refused before any weights are read, with what there is."""
    assert words in one_line(check_spec, RunWeights.load(swa_run), spec)


def test_another_run_has_to_be_finished(swa_run: Path, tmp_path: Path):
    """NAME=FOLDER without a run in it says which folder."""
    assert f"{tmp_path} holds no run" in one_line(check_spec, RunWeights.load(swa_run), f"sgd={tmp_path}")


def test_weights_of_another_network(swa_run: Path, tmp_path: Path, network: nn.Module):
    """Weights whose names or shapes are not the network's are refused with the first difference; the network stays."""
    run, path = RunWeights.load(swa_run), tmp_path / "other.safetensors"
    save_file({name: t.contiguous() for name, t in timm.create_model("test_vit").state_dict().items()}, path)
    line = one_line(weights_of, run, f"other={path}", network)
    assert f"other={path}" in line and "does not fit the network" in line and "names missing" in line
    save_file({name: t.contiguous() for name, t in timm.create_model("test_efficientnet").state_dict().items()}, path)
    assert "has shape (1000, 256), wanted (10, 256)" in one_line(weights_of, run, f"other={path}", network)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    check_fits(network, load_file(swa_run / "swa.safetensors"), "the average")
    assert_same(network.state_dict(), before)


def test_runs_of_other_images(swa_run: Path, copied: Path):
    """The weights of a run that has seen other images are refused in one line; where a run does not say, they are taken."""
    run, path = RunWeights.load(swa_run), copied / "environment.json"
    assert check_spec(run, f"other={copied}") == "other"
    record = json.loads(path.read_text())
    for split, word in (("train", "training"), ("val", "validation")):
        changed = {**record["data"], split: {**record["data"][split], "fingerprint": 64 * "0"}}
        path.write_text(json.dumps(record | {"data": changed}))
        assert f"{swa_run} and {copied} have different {word} images" in one_line(check_spec, run, f"other={copied}")
    path.unlink()
    assert check_spec(run, f"other={copied}") == "other"
