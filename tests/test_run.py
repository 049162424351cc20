"""Runs that start from scratch, average from some epoch on, capture within epochs, average nothing, or hold images out."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import QUICK_RUN, index_folder, one_line
from cuts import PowerCut, cut_at_epoch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from imagenet_swa.arguments import parse_config
from imagenet_swa.config import Config, ModelConfig
from imagenet_swa.data.loaders import hold_out
from imagenet_swa.finetune import finetune
from imagenet_swa.models import resolve_preprocessing
from imagenet_swa.report import load_run
from imagenet_swa.results import compare_with_published
from imagenet_swa.run import Run
from imagenet_swa.session import Session

pytestmark = pytest.mark.usefixtures("on_the_cpu")

STEPS_PER_EPOCH = 6  # of QUICK_RUN
CONSTANT = ("--swa.schedule=constant", "--swa.lr_max=0.05", "--swa.report_epochs=[]")


def train(output: Path, *flags: str) -> Path:
    """Run with these flags on top of QUICK_RUN's; returns the run folder."""
    AcceleratorState._reset_state(reset_partial_state=True)
    finetune(parse_config([*QUICK_RUN, f"--output={output}", *flags], "imagenet-swa train", ""))
    return output


def results_of(run: Path) -> dict[tuple[str, float], dict[str, Any]]:
    return {(result["name"], result["epoch"]): result for result in json.loads((run / "results.json").read_text())}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def about(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["imagenet_swa"])


def assert_same(one: Path, other: Path) -> None:
    """Two weight files hold the same bits under the same names."""
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def assert_mean(average: Path, files: Sequence[Path]) -> None:
    """The parameters of a file are numpy's mean of those of the others, to fp32 rounding."""
    got, of = load_file(average), [load_file(path) for path in files]
    parameters = [name for name in got if name.endswith((".weight", ".bias"))]
    assert len(parameters) > 20
    for name in parameters:
        wanted = np.mean([weights[name].double().numpy() for weights in of], axis=0)
        np.testing.assert_allclose(got[name].numpy(), wanted, rtol=1e-6, atol=1e-8)


# ---------------------------------------------------------------------------------- from scratch, averaging from an epoch on


@pytest.fixture(scope="module")
def from_scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four epochs at a fixed rate from random weights, averaged from epoch 2 on."""
    return train(tmp_path_factory.mktemp("from-scratch") / "run", *CONSTANT, "--swa.start_epoch=2")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same four epochs as plain SGD."""
    return train(tmp_path_factory.mktemp("plain") / "run", *CONSTANT, "--swa.start_epoch=4")


def test_averaging_starts_where_it_is_told(from_scratch: Path):
    """Averaging from epoch 2 of 4 averages the captures of epochs 3 and 4, and in Alg. 1 those of epoch 2 as its first model."""
    captures = from_scratch / "captures"
    files = [captures / f"epoch-{epoch:02d}.safetensors" for epoch in (2, 3, 4)]
    assert_same(from_scratch / "pretrained.safetensors", files[0])
    assert_mean(from_scratch / "swa.safetensors", files)
    assert_mean(from_scratch / "averages/swa-without-pretrained-epoch-04.safetensors", files[1:])
    assert names_in(captures) == [f"epoch-{epoch:02d}.safetensors" for epoch in (1, 2, 3, 4)]
    assert [about(captures / name)["num_averaged"] for name in names_in(captures)] == [0, 0, 1, 2]


def test_averaging_does_not_disturb_training(from_scratch: Path, plain: Path):
    """The weights of every epoch are the same whether and from when on they are averaged."""
    for epoch in (1, 2, 3, 4):
        assert_same(*[run / f"captures/epoch-{epoch:02d}.safetensors" for run in (from_scratch, plain)])


def test_results_of_a_run_from_scratch(from_scratch: Path):
    """The network that averaging starts from stands as the pretrained one, at its epoch, and once."""
    wanted = {("capture", 1), ("pretrained", 2), ("capture", 3), ("capture", 4), ("swa", 4), ("swa_without_pretrained", 4)}
    results = results_of(from_scratch)
    assert results.keys() == wanted
    assert all(result["step"] == epoch * STEPS_PER_EPOCH for (_, epoch), result in results.items())
    session = Session.open(load_config(from_scratch))
    for file, key in (("pretrained", ("pretrained", 2)), ("captures/epoch-03", ("capture", 3)), ("swa", ("swa", 4))):
        network = session.network_with(load_file(from_scratch / f"{file}.safetensors"))
        assert session.evaluate({"network": network})["network"].num_correct == results[key]["num_correct"]


def test_plain_sgd_averages_nothing(plain: Path):
    """With start_epoch at the end, the solution is the pretrained result of the last epoch and no average is written."""
    assert results_of(plain).keys() == {("capture", 1), ("capture", 2), ("capture", 3), ("pretrained", 4)}
    assert_same(plain / "pretrained.safetensors", plain / "captures/epoch-04.safetensors")
    assert not (plain / "swa.safetensors").exists()
    assert not (plain / "averages").exists()
    assert load_run(plain).result("pretrained") is not None
    assert (plain / "report.md").read_text().count("|") > 4


def test_swa_from_a_capture_of_plain_sgd(plain: Path, tmp_path: Path):
    """A run from a kept capture has that capture's weights as its pretrained ones, and its result."""
    capture = plain / "captures/epoch-03.safetensors"
    run = train(tmp_path / "run", *CONSTANT, "--swa.num_epochs=1", f"--model.weights={capture}")
    assert_same(run / "pretrained.safetensors", capture)
    before, after = results_of(plain)["capture", 3], results_of(run)["pretrained", 0]
    assert (before["num_correct"], before["nll"]) == (after["num_correct"], after["nll"])


def test_plain_sgd_without_its_checkpoints_is_not_overwritten(plain: Path, tmp_path: Path):
    """A finished run of plain SGD, which left no average, is refused rather than trained anew when its checkpoints are gone."""
    run = tmp_path / "run"
    shutil.copytree(plain, run, ignore=shutil.ignore_patterns("checkpoints"))
    message = one_line(lambda: train(run, *CONSTANT, "--swa.start_epoch=4"))
    assert "holds a run but no valid checkpoint to go on from" in message
    assert (run / "results.json").read_bytes() == (plain / "results.json").read_bytes()


def cut(output: Path, epoch: int, method: str, *flags: str) -> Path:
    """A run that ends where `method` of Run is called with so many finished epochs, and is started again."""
    with cut_at_epoch(epoch, method):
        train(output, *flags)
    return train(output, *flags)


@pytest.mark.parametrize(
    ("epoch", "method"),
    [(1, "save_checkpoint"), (2, "begin_averaging"), (2, "save_checkpoint"), (2, "evaluate_what_is_due"), (3, "train_one_epoch")],
)
def test_run_from_scratch_resumes(from_scratch: Path, tmp_path: Path, epoch: int, method: str):
    """Interrupted before, at or after the epoch at which averaging begins, a run ends with the same bits."""
    run = cut(tmp_path / "run", epoch, method, *CONSTANT, "--swa.start_epoch=2")
    for file in ("pretrained", "captures/epoch-02", "captures/epoch-04", "swa", "averages/swa-without-pretrained-epoch-04"):
        assert_same(run / f"{file}.safetensors", from_scratch / f"{file}.safetensors")
    assert results_of(run) == results_of(from_scratch)


# --------------------------------------------------------------------------------------------------- cycles in steps

IN_STEPS = ("--swa.cycle_steps=4", "--swa.report_epochs=[1]")


@pytest.fixture(scope="module")
def in_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four epochs of six steps with cycles of four steps: six captures, of which two end an epoch."""
    return train(tmp_path_factory.mktemp("in-steps") / "run", *IN_STEPS)


def test_captures_within_epochs(in_steps: Path):
    """Cycles of four steps are captured after steps 4, 8, 12, ..., under names that tell, and all of them are averaged."""
    steps = [4, 8, 12, 16, 20, 24]
    found = {about(path)["step"]: path for path in (in_steps / "captures").iterdir()}
    assert sorted(found) == steps
    names = [found[step].stem for step in steps]
    assert names == ["step-0000004", "step-0000008", "epoch-02", "step-0000016", "step-0000020", "epoch-04"]
    assert [about(found[step])["num_averaged"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert_mean(in_steps / "averages/swa-without-pretrained-epoch-04.safetensors", [found[step] for step in steps])
    assert_mean(in_steps / "averages/swa-without-pretrained-epoch-01.safetensors", [found[4]])


def test_results_of_captures_within_epochs(in_steps: Path):
    """At the end of an epoch its last capture is evaluated, under the step at which it was taken."""
    captures = {result["step"]: epoch for (name, epoch), result in results_of(in_steps).items() if name == "capture"}
    assert captures == {4: 4 / 6, 12: 2, 16: 16 / 6, 24: 4}
    files = {"capture-step-0000004", "capture-epoch-02", "capture-step-0000016", "capture-epoch-04"}
    assert {path.stem for path in (in_steps / "predictions").glob("capture-*")} == files
    table = pq.read_table(in_steps / "predictions/capture-step-0000004.parquet").to_pydict()
    session = Session.open(load_config(in_steps))
    network = session.network_with(load_file(in_steps / "captures/step-0000004.safetensors"))
    evaluation = session.evaluate({"network": network})["network"]
    assert table["top5"] == evaluation.ranked.tolist()


def test_minimum_of_the_rate_is_where_the_capture_is(in_steps: Path):
    """The logged rates are lr_min at every fourth step and above it elsewhere."""
    lines = [json.loads(line) for line in (in_steps / "metrics.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["lr"] for line in lines if line["kind"] == "train"}
    assert {step for step, rate in rates.items() if rate == 0.005} == {4, 8, 12, 16, 20, 24}
    assert [line["step"] for line in lines if line["kind"] == "capture"] == [4, 8, 12, 16, 20, 24]


@pytest.mark.parametrize(
    ("epoch", "method"), [(0, "at_minimum"), (1, "at_minimum"), (3, "train_one_epoch"), (3, "evaluate_what_is_due")]
)
def test_run_with_cycles_in_steps_resumes(in_steps: Path, tmp_path: Path, epoch: int, method: str):
    """Interrupted between two captures of an epoch or after it, a run ends with the same bits, results and predictions."""
    run = cut(tmp_path / "run", epoch, method, *IN_STEPS)
    assert names_in(run / "captures") == names_in(in_steps / "captures")
    for path in [*(in_steps / "captures").iterdir(), *(in_steps / "averages").iterdir()]:
        assert_same(run / path.relative_to(in_steps), path)
    assert results_of(run) == results_of(in_steps)


def test_captures_with_a_result_are_not_needed_again(tmp_path: Path):
    """A run between two captures resumes without the file of the first, once that is evaluated; else it names the file."""
    flags = ("--swa.cycle_steps=9", "--swa.num_epochs=3", "--swa.report_epochs=[]")  # epochs of six steps
    run, file = tmp_path / "run", "captures/step-0000009.safetensors"
    with pytest.raises(PowerCut), pytest.MonkeyPatch.context() as patch:
        original = Run.train_one_epoch
        patch.setattr(Run, "train_one_epoch", lambda self: original(self) if self.epoch < 2 else stop())
        train(run, *flags)  # writes what waits before it ends
    (run / file).unlink()
    results = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text(json.dumps([result for result in results if result["name"] != "capture"]))
    assert f"no such weights file: {run / file}" in one_line(lambda: train(run, *flags))
    (run / "results.json").write_text(json.dumps(results))
    assert {step for name, step in results_of(train(run, *flags)) if name == "capture"} == {1.5, 3}


def stop() -> None:
    raise PowerCut


# ----------------------------------------------------------------------------------------------------- images held out


def load_config(run: Path) -> Any:
    AcceleratorState._reset_state(reset_partial_state=True)
    return parse_config([f"--config={run / 'config.yaml'}"], "", "")


@pytest.mark.parametrize("num_held_out", [1, 7, 12])
def test_held_out_images_are_apart(image_folder: Path, num_held_out: int):
    """What is held out and what is trained on are disjoint, together all, and the same whatever else is configured."""
    index = index_folder(image_folder / "train")
    kept, held_out = hold_out(index, num_held_out)
    assert held_out is not None
    names = [set(part.names.to_pylist()) for part in (kept, held_out)]
    assert len(held_out) == num_held_out
    assert not names[0] & names[1]
    assert names[0] | names[1] == set(index.names.to_pylist())
    labels = dict(zip(index.names.to_pylist(), index.labels.tolist(), strict=True))
    assert all(labels[name] == label for name, label in zip(held_out.names.to_pylist(), held_out.labels.tolist(), strict=True))


def test_nothing_held_out(image_folder: Path):
    """With 0 the training images are all of them; with more than half the run is refused."""
    index = index_folder(image_folder / "train")
    assert hold_out(index, 0) == (index, None)
    assert "data.num_held_out 13 is more than half of the 24 training images" in one_line(hold_out, index, 13)


def test_a_run_does_not_see_what_is_held_out(image_folder: Path, tmp_path: Path):
    """Training and BatchNorm pass ask for no held-out image; evaluating on them sees each once."""
    flags = [flag for flag in QUICK_RUN if "synthetic" not in flag and "global_batch" not in flag]
    flags += [
        "--model.num_classes=3",
        f"--data.train={image_folder}/train",
        f"--data.val={image_folder}/val",
        "--global_batch_size=6",
    ]
    config = parse_config([*flags, "--data.num_held_out=10", f"--output={tmp_path}/run", "--data.backend=torchvision"], "", "")
    finetune(config)
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    assert environment["data"]["train"]["num_images"] == 14
    AcceleratorState._reset_state(reset_partial_state=True)
    session = Session.open(config)
    evaluation = session.evaluate({"network": session.placed(session.network)}, split="held_out")["network"]
    assert evaluation.num_images == 10
    trained_on = set(session.loaders.train.index.names.to_pylist())
    assert session.loaders.held_out is not None
    assert not trained_on & set(session.loaders.held_out.index.names.to_pylist())


# ------------------------------------------------------------------------------------------------------------- session


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({}, "50.00 % measured, 76.13 % published"),
        ({"pretrained": False}, "measured in this pipeline"),
        ({"weights": Path("weights.safetensors")}, "measured in this pipeline"),
    ],
)
def test_only_published_weights_are_compared_with_published_figures(model: dict[str, Any], words: str):
    """The figure of torchvision's ResNet-50 stands beside its own weights' result; not beside a file's or random weights'."""
    config = Config(model=ModelConfig(library="torchvision", name="resnet50.IMAGENET1K_V1", **model))
    preprocessing = resolve_preprocessing(config.model, config.preprocessing, nn.Identity())
    assert words in compare_with_published(config, preprocessing, 0.5, 50_000)


class Counting(nn.Module):
    """Logits that say nothing; how many images it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen += len(images)
        return torch.zeros(len(images), 10)


@pytest.mark.parametrize(
    ("split", "num_images", "wanted"), [("val", None, 40), ("val", 7, 7), ("train", 20, 20), ("train", 500, 96)]
)
def test_evaluation_on_some_images(plain: Path, split: Any, num_images: int | None, wanted: int):
    """A subset of a split has the asked size, is always the same, and its images have the split's labels."""
    session, network = Session.open(load_config(plain)), Counting()
    first = session.evaluate({"network": network}, split=split, num_images=num_images)["network"]
    again = session.evaluate({"network": network}, split=split, num_images=num_images)["network"]
    assert network.seen == 2 * wanted
    assert first.num_images == len(set(first.indices.tolist())) == wanted
    assert (first.indices == again.indices).all()
    index = session.loaders.val.index if split == "val" else session.loaders.train.index
    assert (first.labels == index.labels[first.indices]).all()


def test_nothing_held_out_to_evaluate(plain: Path):
    """Asked for held-out images where there are none, the session says so in a line."""
    session = Session.open(load_config(plain))
    assert "no images are held out" in one_line(lambda: session.evaluate({"network": Counting()}, split="held_out"))
