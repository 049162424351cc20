"""An interrupted run that is started again ends as if nothing had happened, or says in one line why it cannot go on."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import PROJECT, QUICK_RUN, mounted
from cuts import PLACES, PowerCut, cut_at_epoch, cut_at_step
from PIL import Image
from safetensors.torch import load_file

from imagenet_swa import session as session_module
from imagenet_swa import state as state_module
from imagenet_swa.arguments import parse_config
from imagenet_swa.checkpoint import Checkpoints
from imagenet_swa.config import InputError
from imagenet_swa.finetune import finetune
from imagenet_swa.run import Run
from imagenet_swa.stepper import Stepper

DROPOUT = ("--model.kwargs.drop_rate=0.3", "--model.kwargs.drop_path_rate=0.1")


pytestmark = pytest.mark.usefixtures("on_the_cpu")


def train(output: Path, *flags: str) -> Path:
    """Run with these flags on top of QUICK_RUN's and dropout; returns the run folder."""
    finetune(parse_config([*QUICK_RUN, *DROPOUT, f"--output={output}", *flags], "imagenet-swa train", ""))
    return output


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    AcceleratorState._reset_state(reset_partial_state=True)
    return train(tmp_path_factory.mktemp("uninterrupted") / "run")


def interrupted(output: Path, epoch: int, method: str, *flags: str) -> Path:
    """A run folder as the power cut left it."""
    with cut_at_epoch(epoch, method):
        train(output, *flags)
    return output


# A cut loses what still waits to be written; with this, what was saved before it is there.
WRITTEN = "--checkpoint.in_background=false"


def saved_by_epoch_2(tmp_path: Path, *flags: str) -> Path:
    """A run folder with checkpoints of epochs 1 and 2, cut while epoch 3 is trained."""
    return interrupted(tmp_path / "run", 2, "train_one_epoch", WRITTEN, *flags)


def assert_same_results(run: Path, wanted: Path) -> None:
    """Each capture, average, prediction, result and line of metrics is the same, byte for byte, and so is the last checkpoint."""
    kinds = ("captures/*", "averages/*", "predictions/*", "*.safetensors", "results.json")
    names = {str(path.relative_to(wanted)) for kind in kinds for path in wanted.glob(kind)}
    assert names == {str(path.relative_to(run)) for kind in kinds for path in run.glob(kind)}
    for name in names:
        assert (run / name).read_bytes() == (wanted / name).read_bytes(), name
    assert metrics_of(run) == metrics_of(wanted)
    one, other = (max((folder / "checkpoints").iterdir()) for folder in (run, wanted))
    assert one.name == other.name
    assert {path.name: path.read_bytes() for path in one.iterdir()} == {path.name: path.read_bytes() for path in other.iterdir()}


OF_THE_MACHINE = ("images_per_second", "data_wait", "memory_mib", "seconds")


def metrics_of(run: Path) -> list[str]:
    """The lines of metrics.jsonl without what depends on the machine's load; evaluations, which may come a little later, last."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines.sort(key=lambda line: line["kind"] == "evaluation")
    return [json.dumps({key: line[key] for key in line if key not in OF_THE_MACHINE}) for line in lines]


def train_lines(run: Path) -> list[dict[str, float]]:
    return [line for line in map(json.loads, metrics_of(run)) if line["kind"] == "train"]


def trained_steps(run: Path) -> list[float]:
    return [line["step"] for line in train_lines(run)]


def log_of(run: Path) -> str:
    return (run / "train.log").read_text()


# -------------------------------------------------------------------------------------- the same end in any case


@pytest.mark.parametrize(
    ("epoch", "method"),
    [
        (0, "evaluate_what_is_due"),
        (0, "train_one_epoch"),
        (1, "save_checkpoint"),
        (1, "evaluate_what_is_due"),
        (2, "_recompute_batchnorm"),
        (2, "results.add"),
        (3, "train_one_epoch"),
        (4, "at_minimum"),
        (4, "evaluate_what_is_due"),
        (4, "finish"),
    ],
)
def test_resumed_run_equals_uninterrupted_run(tmp_path: Path, uninterrupted: Path, epoch: int, method: str):
    """Wherever a run is cut, the same command ends with the very files of a run that was never cut, dropout included."""
    run = interrupted(tmp_path / "run", epoch, method)
    assert not (run / "report.md").exists()
    train(run)
    assert_same_results(run, uninterrupted)
    assert (run / "report.md").exists()


def test_statistics_under_dropout(tmp_path: Path):
    """Where dropout stands before BatchNorm, so that the statistics depend on chance, a cut before their pass changes nothing."""
    flags = ("--model.name=test_resnet", "--model.kwargs.drop_path_rate=0.5", "--swa.num_epochs=2")
    whole = train(tmp_path / "whole", *flags)
    run = interrupted(tmp_path / "run", 2, "_recompute_batchnorm", *flags)
    train(run, *flags)
    assert_same_results(run, whole)


def test_cut_twice(tmp_path: Path, uninterrupted: Path):
    """Two interruptions are no worse than one."""
    run = interrupted(tmp_path / "run", 1, "train_one_epoch")
    interrupted(run, 3, "train_one_epoch")
    train(run)
    assert_same_results(run, uninterrupted)


def test_evaluation_cut_in_the_middle_is_repeated(tmp_path: Path, uninterrupted: Path):
    """A report epoch whose evaluation was cut has no results of it; the resumed run makes them, and trains nothing again."""
    run = interrupted(tmp_path / "run", 2, "results.add", WRITTEN)
    assert {result["epoch"] for result in json.loads((run / "results.json").read_text())} == {0, 1}
    steps = trained_steps(run)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(Run, "train_one_epoch", go_down)
        train(run)  # evaluates what is due, writes it, and is cut again
    assert trained_steps(run) == steps
    of_two_epochs = [result for result in json.loads((uninterrupted / "results.json").read_text()) if result["epoch"] <= 2]
    assert json.loads((run / "results.json").read_text()) == of_two_epochs


def go_down(_run: Run) -> None:
    raise PowerCut


def test_evaluations_are_logged_once(tmp_path: Path, uninterrupted: Path):
    """metrics.jsonl of a run that was cut in an evaluation has the lines of an uninterrupted run, each once."""

    def evaluations(run: Path) -> list[tuple[int, str]]:
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return [(line["step"], line["name"]) for line in lines if line["kind"] == "evaluation"]

    run = interrupted(tmp_path / "run", 2, "results.add", WRITTEN)
    train(run)
    assert evaluations(run) == evaluations(uninterrupted)


def test_resumed_run_trains_only_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """After a checkpoint of epoch 2 of 4, two epochs are trained, the third and the fourth."""
    run = saved_by_epoch_2(tmp_path)
    steps: list[int] = []
    launch = Stepper.launch
    monkeypatch.setattr(Stepper, "launch", lambda self, step, *rest: (steps.append(step), launch(self, step, *rest))[1])
    train(run)
    assert steps == list(range(12, 24))
    assert "resuming after epoch 2, step 12" in log_of(run)


def test_momentum_is_resumed(tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch):
    """Momentum survives an interruption, and matters: a resume that forgets it ends elsewhere."""
    run = saved_by_epoch_2(tmp_path)
    monkeypatch.setattr(state_module, "load_momentum_buffers", lambda *_: None)
    train(run)
    with pytest.raises(AssertionError):
        assert_same_results(run, uninterrupted)
    assert (run / "captures/epoch-02.safetensors").read_bytes() == (uninterrupted / "captures/epoch-02.safetensors").read_bytes()


@pytest.mark.parametrize("backend", ["dali", "torchvision"])
def test_resumed_run_on_images(tmp_path: Path, image_folder: Path, backend: str):
    """With decoded JPEGs, random crops included, an interruption leaves no trace either."""
    flags = on_images(image_folder, backend)
    whole = train(tmp_path / "whole", *flags)
    run = interrupted(tmp_path / "run", 1, "train_one_epoch", *flags)
    train(run, *flags)
    assert_same_results(run, whole)


def on_images(folder: Path, backend: str) -> tuple[str, ...]:
    return (
        "--data.synthetic=false",
        f"--data.train={folder / 'train'}",
        f"--data.val={folder / 'val'}",
        f"--data.backend={backend}",
        "--data.num_workers=2" if backend == "dali" else "--data.num_workers=0",
        "--model.num_classes=3",
        "--global_batch_size=8",
        "--swa.num_epochs=2",
        "--swa.report_epochs=[]",
    )


def test_finished_run_started_again(tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch):
    """A finished run that is started again trains and evaluates nothing, writes its report, and ends well."""
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    (run / "report.md").unlink()
    (run / "swa.safetensors").unlink()
    monkeypatch.setattr(Run, "train_one_epoch", None)
    monkeypatch.setattr(session_module, "recompute_statistics", None)
    train(run)
    assert_same_results(run, uninterrupted)
    assert (run / "report.md").read_text() == (uninterrupted / "report.md").read_text()


def test_a_killed_process_is_resumed(tmp_path: Path):
    """A process killed with SIGKILL as soon as its second checkpoint is there is resumed to the end of a run never killed."""
    # Small steps, so that there is time to kill it between two epochs.
    flags = [*QUICK_RUN, *DROPOUT, "--data.synthetic_num_images=[480,40]", "--evaluation.captures=false"]
    run, whole = tmp_path / "run", tmp_path / "whole"
    command = [sys.executable, "-m", "imagenet_swa", "train", *flags, f"--output={run}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, cwd=PROJECT, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        wait_for(run / "checkpoints" / "step-0000060", process)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -signal.SIGKILL
    assert not (run / "report.md").exists()
    finetune(parse_config([*flags, f"--output={run}"], "imagenet-swa train", ""))
    finetune(parse_config([*flags, f"--output={whole}"], "imagenet-swa train", ""))
    assert "resuming after epoch" in log_of(run)
    assert_same_results(run, whole)


# ---------------------------------------------------------------------------------------------- cuts at random steps

VARIANTS = {
    "dropout": (),
    "cycles in steps": ("--swa.cycle_steps=4", "--swa.report_epochs=[1]", "--log_every=5"),
    "bf16": ("--speed.precision=bf16", "--speed.fused_optimizer=false", "--log_every=4"),
    "from scratch": ("--swa.start_epoch=2", "--swa.report_epochs=[]", "--log_every=100"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_cut_again_and_again(tmp_path: Path, variant: str):
    """Cut several times at random steps, in the loader, at a capture, after a step, in the middle of a write, with checkpoints of
    each step or of epochs only, a run ends as one that was never cut, byte for byte.
    """
    flags, draws = VARIANTS[variant], random.Random(variant)
    whole, run = train(tmp_path / "whole", *flags), tmp_path / "run"
    step = 0
    for place in draws.sample(list(PLACES), len(PLACES)):
        step += draws.randint(1, 6)
        if place == "minimum":
            step = min(step, 18)
        every = draws.choice(["0", "0", "null"])
        AcceleratorState._reset_state(reset_partial_state=True)
        with cut_at_step(step, place):
            train(run, *flags, f"--checkpoint.every_minutes={every}")
    AcceleratorState._reset_state(reset_partial_state=True)
    train(run, *flags)
    assert log_of(run).count("resuming after") >= 2
    assert_same_results(run, whole)


def test_a_checkpoint_within_an_epoch_is_gone_on_from(tmp_path: Path, uninterrupted: Path):
    """With a checkpoint of each step, a run that is cut in step 10 goes on with step 10, between two lines of metrics."""
    run = tmp_path / "run"
    with cut_at_step(9, "loader"):
        train(run, "--checkpoint.every_minutes=0", "--checkpoint.in_background=false")
    train(run)
    assert "resuming after epoch 1.5, step 9" in log_of(run)
    assert_same_results(run, uninterrupted)


def test_differences_allowed_by_name(tmp_path: Path):
    """A setting that differs is allowed by its name with a warning, another one is not; epochs must have as many steps."""
    run = saved_by_epoch_2(tmp_path)
    with pytest.raises(InputError, match=r"swa.lr_max was 0.05, is 0.04; .*--allow_changed='\[swa.lr_max\]'"):
        train(run, "--swa.lr_max=0.04", "--seed=1", "--allow_changed=[seed]")
    flags = ("--data.synthetic_num_images=[120,40]", "--allow_changed=[data.synthetic_num_images,training images]")
    with pytest.raises(InputError, match="the checkpoint's epochs have 6 steps, now they would have 7; choose another output"):
        train(run, *flags)
    train(run, "--swa.lr_max=0.04", "--allow_changed=[swa.lr_max]")
    assert "warning: swa.lr_max was 0.05, is 0.04, as allowed; results are those of neither setting" in log_of(run)


# ------------------------------------------------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MiB."""
    with mounted(tmp_path / "disk", "32m") as folder:
        yield folder


def fill(ballast: Path) -> None:
    """Take all the room there is."""
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def fill_at(step: int, ballast: Path, patch: pytest.MonkeyPatch, room_at: int | None = None) -> None:
    """The disk is full from a step on, until there is room at another."""
    heed = Run.heed

    def heeding(self: Run, *arguments: Any) -> None:
        if not ballast.exists() and self.step == step:
            self.outbox.wait()
            fill(ballast)
        if self.step == room_at:
            ballast.write_bytes(b"")
        heed(self, *arguments)

    patch.setattr(Run, "heed", heeding)


@pytest.mark.parametrize("in_background", ["true", "false"])
def test_a_disk_that_is_full_for_a_while(
    tmp_path: Path, uninterrupted: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch, in_background: str
):
    """While the disk is full the run goes on and warns; with room again it ends with the very files of an undisturbed run."""
    del tmp_path
    fill_at(7, small_disk / "ballast", monkeypatch, room_at=16)
    run = train(small_disk / "run", f"--checkpoint.in_background={in_background}")
    assert "warning: No space left on device" in log_of(run)
    assert_same_results(run, uninterrupted)


def test_a_disk_that_stays_full(small_disk: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch):
    """On a disk that stays full the run stops after max_failures refusals in a row, not before, with the disk's error; the old
    checkpoint stays, and with room the same command goes on to the end of an undisturbed run.
    """
    run, flags = small_disk / "run", ("--checkpoint.every_minutes=0", "--checkpoint.in_background=false")
    steps: list[int] = []
    launch = Stepper.launch
    monkeypatch.setattr(Stepper, "launch", lambda self, step, *rest: (steps.append(step), launch(self, step, *rest))[1])
    with pytest.MonkeyPatch.context() as patch:
        fill_at(8, small_disk / "ballast", patch)
        with pytest.raises(OSError, match="No space left on device"):
            train(run, *flags)
    assert steps == list(range(11)), "refused after steps 8, 9 and 10, agreed on with the vote of the next"
    newest, complaints = Checkpoints(run / "checkpoints", 2).newest_valid()
    assert newest is not None and newest.name == "step-0000007" and complaints == []
    (small_disk / "ballast").unlink()
    train(run)
    assert "resuming after epoch 1.167, step 7" in log_of(run)
    assert_same_results(run, uninterrupted)


def wait_for(path: Path, process: "subprocess.Popen[bytes]", seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, "the process ended by itself"
        assert time.monotonic() < end, f"{path} did not appear within {seconds} s"
        time.sleep(0.005)


# ----------------------------------------------------------------------------------- what may change, what may not


@pytest.mark.parametrize(
    ("flag", "named"),
    [
        ("--swa.lr_max=0.04", r"swa.lr_max was 0.05, is 0.04"),
        ("--seed=1", r"seed was 0, is 1"),
        ("--global_batch_size=32", r"global_batch_size was 16, is 32"),
        ("--model.kwargs.drop_rate=0.1", r"model.kwargs.drop_rate was 0.3, is 0.1"),
        (
            "--data.synthetic_num_images=[112,40]",
            r"data.synthetic_num_images was \[96, 40\], is \[112, 40\]; training images was",
        ),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, flag: str, named: str):
    """A checkpoint does not go on under a setting that decides the result: one line names it, old and new, and the way out."""
    run = saved_by_epoch_2(tmp_path)
    names = ("config.yaml", "metrics.jsonl", "results.json", "environment.json")
    before = [(run / name).read_bytes() for name in names]
    with pytest.raises(InputError, match=rf"belongs to another run: .*{named}") as caught:
        train(run, flag)
    assert "choose another output" in str(caught.value) and "\n" not in str(caught.value)
    assert [(run / name).read_bytes() for name in names] == before


def test_other_images_are_refused(tmp_path: Path, image_folder: Path):
    """A checkpoint does not go on with another list of images; the same images elsewhere are fine."""
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    run = interrupted(tmp_path / "run", 1, "train_one_epoch", WRITTEN, *on_images(images, "torchvision"))
    moved = images.rename(tmp_path / "elsewhere")
    extra = moved / "val/bee/new.JPEG"
    Image.new("RGB", (50, 50)).save(extra)
    with pytest.raises(InputError, match=r"belongs to another run: validation images was \w{64}, is \w{64};"):
        train(run, *on_images(moved, "torchvision"))
    extra.unlink()
    train(run, *on_images(moved, "torchvision"))
    assert (run / "report.md").exists()


def test_settings_that_may_change(tmp_path: Path, uninterrupted: Path):
    """What does not decide the weights may change on the way: logging, evaluation, how many checkpoints stay."""
    run = saved_by_epoch_2(tmp_path)
    train(run, "--log_every=3", "--evaluation.captures=false", "--checkpoint.keep=1", "--data.prefetch=3")
    one, other = load_file(run / "captures/epoch-04.safetensors"), load_file(uninterrupted / "captures/epoch-04.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-0000024"]


def test_never_resume(tmp_path: Path):
    """`resume: never` leaves a folder with a run alone."""
    run = saved_by_epoch_2(tmp_path)
    with pytest.raises(InputError, match="already holds a run and resume is never; choose another output, or resume auto"):
        train(run, "--resume=never")
    assert "resuming" not in log_of(run)


# -------------------------------------------------------------------------------------------- damaged checkpoints


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("weights.safetensors", flip_a_byte, "weights.safetensors is not as it was written"),
        ("momentum.safetensors", truncate, "momentum.safetensors is not as it was written"),
        ("average.safetensors", Path.unlink, "average.safetensors is missing"),
        ("progress.json", flip_a_byte, "progress.json is not as it was written"),
        ("manifest.json", Path.unlink, "its manifest.json is missing or damaged"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_a_damaged_checkpoint_is_passed_over(
    tmp_path: Path, uninterrupted: Path, name: str, damage: Callable[[Path], None], words: str
):
    """A damaged newest checkpoint is named in a warning, and the run goes on from the one before it to the same end."""
    run = saved_by_epoch_2(tmp_path)
    newest = run / "checkpoints/step-0000012"
    damage(newest / name)
    train(run)
    assert f"warning: checkpoint {newest}: {words}; trying the one before it" in log_of(run)
    assert "resuming after epoch 1" in log_of(run)
    assert_same_results(run, uninterrupted)


def test_all_checkpoints_damaged(tmp_path: Path):
    """Without any valid checkpoint the run says which is damaged and how, and overwrites nothing."""
    run = saved_by_epoch_2(tmp_path, "--checkpoint.keep=1")
    flip_a_byte(run / "checkpoints/step-0000012/weights.safetensors")
    before = (run / "captures/epoch-02.safetensors").read_bytes()
    with pytest.raises(InputError, match="holds a run but no valid checkpoint to go on from"):
        train(run, "--checkpoint.keep=1")
    assert "step-0000012: weights.safetensors is not as it was written; trying the one before it" in log_of(run)
    assert (run / "captures/epoch-02.safetensors").read_bytes() == before


def test_half_written_folders_are_ignored(tmp_path: Path, uninterrupted: Path):
    """Folders and files that an interrupted write left aside under `.partial` neither count nor disturb."""
    run = saved_by_epoch_2(tmp_path)
    shutil.copytree(run / "checkpoints/step-0000012", run / "checkpoints/step-0000018.partial")
    (run / "results.json.partial").write_text('[{"name": "pre')
    (run / "captures/epoch-03.safetensors.partial").write_bytes(b"\0\0")
    train(run)
    assert "resuming after epoch 2" in log_of(run)
    assert "warning" not in log_of(run)
    assert_same_results(run, uninterrupted)


def test_half_written_metrics_line(tmp_path: Path, uninterrupted: Path):
    """A line of metrics.jsonl that a killed process left half-written is gone after the resume, as are lines from beyond it."""
    run = saved_by_epoch_2(tmp_path)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 14, "epoch": 2.3, "lr": 1, "loss": 9}\n{"kind": "train", "st')
    train(run)
    assert_same_results(run, uninterrupted)


# ------------------------------------------------------------------------------------------------- files that went missing


def test_lost_results_are_made_up_for(tmp_path: Path):
    """Without results.json a resumed run evaluates the pretrained network again, from the weights in the checkpoint."""
    run = train(tmp_path / "run")
    before = json.loads((run / "results.json").read_text())
    (run / "results.json").write_text("[{")  # cut short
    train(run)
    after = json.loads((run / "results.json").read_text())
    assert {(r["name"], r["epoch"]) for r in after} == {
        ("pretrained", 0),
        ("capture", 4),
        ("swa", 4),
        ("swa_without_pretrained", 4),
    }
    assert all(result in before for result in after)
    log = (run / "train.log").read_text()
    assert "results.json is damaged" in log
    assert "the average after epoch 2 was not reported and cannot be made up for" in log


def test_a_lost_average_is_made_again(tmp_path: Path):
    """A finished run whose averages were deleted recomputes those of its last epoch, byte for byte."""
    run = train(tmp_path / "run")
    file = run / "averages" / "swa-epoch-04.safetensors"
    before = file.read_bytes()
    shutil.rmtree(file.parent)
    train(run)
    assert file.read_bytes() == before == (run / "swa.safetensors").read_bytes()


def test_a_run_without_its_checkpoints_is_not_overwritten(tmp_path: Path):
    """Where results lie but nothing to go on from, the same command refuses rather than start over."""
    run = train(tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.suffix not in (".log",)}
    with pytest.raises(InputError, match="holds a run but no valid checkpoint to go on from"):
        train(run)
    assert {path: path.read_bytes() for path in before} == before
    shutil.rmtree(tmp_path / "run")
    train(run, "--swa.num_epochs=1", "--swa.report_epochs=[1]")
    (run / "swa.safetensors").unlink()
    (run / "checkpoints" / "step-0000006" / "manifest.json").unlink()
    with pytest.raises(InputError, match="no valid checkpoint"):
        train(run, "--swa.num_epochs=1", "--swa.report_epochs=[1]")


@pytest.mark.parametrize("flag", ["--batchnorm.num_images=32", "--evaluation.batch_size=8", "--evaluation.precision=bf16"])
def test_settings_of_the_results_cannot_change_in_a_run(uninterrupted: Path, flag: str):
    """What decides statistics and accuracies stays as it was, or the records would describe another run."""
    with pytest.raises(InputError, match=flag[2:].partition("=")[0]):
        train(uninterrupted, flag)
