"""A run that is killed anywhere and started again ends, to the last byte, as if nothing had happened."""

import hashlib
import json
import random
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from conftest import PROJECT
from launched import Launched, wait_until
from safetensors.torch import load_file
from struck import Arena, Struck, arena

from imagenet_swa.selftest.compare import differences
from imagenet_swa.selftest.whole import checkpoints, what_is_broken, what_is_torn

# 20 steps of micro-batches, captures within the epochs, two reports.
RUN = (
    "--data.synthetic",
    "--data.synthetic_num_images=[160,40]",
    "--model.name=test_efficientnet",
    "--model.kwargs.drop_rate=0.2",
    "--model.kwargs.drop_path_rate=0.2",
    "--model.pretrained=false",
    "--model.num_classes=10",
    "--preprocessing.image_size=32",
    "--global_batch_size=16",
    "--speed.max_batch_size_per_device=2",
    "--swa.num_epochs=2",
    "--swa.report_epochs=[1]",
    "--swa.cycle_steps=4",
    "--swa.lr_max=0.05",
    "--swa.lr_min=0.005",
    "--log_every=3",
    "--evaluation.batch_size=4",
)
SAVE_EACH_STEP = "--checkpoint.every_minutes=0"
BF16 = ("--speed.precision=bf16", "--evaluation.precision=bf16")
# Dropped paths before BatchNorm: what is drawn decides the statistics too.
RESNET = (*RUN, "--model.name=test_resnet", "--model.kwargs.drop_path_rate=0.5")


Batch = list[tuple[int, str]]  # numbers of images and digests of their pixels


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Arena]:
    with arena(tmp_path_factory.mktemp("arena")) as place:
        yield place


def undisturbed(place: Arena, num_processes: int, flags: Sequence[str]) -> Path:
    """The folder of a run that nobody disturbed; each is made once."""
    run = place.folder / "undisturbed" / hashlib.sha256(repr((num_processes, flags)).encode()).hexdigest()[:16]
    if not run.exists():
        place.finish(run, num_processes, flags)
    return run


def assert_whole(run: Path) -> None:
    assert what_is_torn(run) + what_is_broken(run) == []


# ---------------------------------------------------------------------------------------------------- killed anywhere

# Where rank 0 is killed, and the others at once after it, in an order in which each can follow on those before: at a batch of
# that number, those of training counted over all ranks, at the beginning of a phase, or when half of a file is written.
BLOWS = {
    "training": "training 13 SIGKILL",
    "checkpoint": "file-weights.safetensors 1 SIGKILL",
    "BatchNorm pass": "batchnorm 3 SIGKILL",
    "evaluation": "evaluation 2 SIGKILL",
    "after the BatchNorm pass": "begin-evaluation 0 SIGKILL",
    "manifest": "file-manifest.json 1 SIGKILL",
    "average": "file-swa-epoch-02.safetensors 0 SIGKILL",
    "results": "file-results.json 0 SIGKILL",
    "end": "begin-finishing 0 SIGKILL",
}
CASES = [
    (1, RESNET, ("training", "checkpoint", "BatchNorm pass", "end")),
    (2, (*RUN, *BF16), ("evaluation", "manifest", "average", "results")),
    (4, RUN, ("training", "after the BatchNorm pass")),
]
ALL_CASES = [
    (number, (*network, *precision), tuple(BLOWS))
    for number in (1, 2, 4)
    for network in (RUN, RESNET)
    for precision in ((), BF16)
]


def kill_somewhere(place: Arena, run: Path, num_processes: int, flags: Sequence[str], draws: random.Random) -> None:
    """Kill all ranks a random time after a random batch of training."""
    start = place.start(run, num_processes, flags, SPY_NAP="0.03")
    number = draws.randrange(1, 60) // num_processes
    start.until(lambda start: len(start.notes(0, "training")) > number)
    start.wait(draws.uniform(0, 0.1))
    assert -signal.SIGKILL in start.kill()
    assert_whole(run)


def kill_at(place: Arena, run: Path, num_processes: int, flags: Sequence[str], blow: str) -> None:
    """Kill all ranks at one of `BLOWS`."""
    phase, number, name = blow.split()
    here = int(number) // num_processes if phase == "training" else number
    start = place.start(run, num_processes, flags, blow=f"{phase} {here} {name} 0")
    codes = start.kill_after_blow()
    assert codes[0] == -signal.SIGKILL, f"{codes}\n{start.screen()}"
    assert any("signal" in note for note in start.notes()), start.screen()
    assert_whole(run)


def check_kills(place: Arena, num_processes: int, flags: Sequence[str], blows: Sequence[str]) -> None:
    wanted = undisturbed(place, num_processes, flags)
    run = place.folder / f"killed-{wanted.name}-{len(blows)}"
    draws = random.Random(num_processes)
    kill_somewhere(place, run, num_processes, (*flags, SAVE_EACH_STEP), draws)
    for name in blows:
        kill_at(place, run, num_processes, (*flags, SAVE_EACH_STEP), BLOWS[name])
    last = place.finish(run, num_processes, flags)
    assert "resuming after" in last.screen()
    assert differences(wanted, run) == []


@pytest.mark.parametrize(("num_processes", "flags", "blows"), CASES)
def test_kills_change_nothing(place: Arena, num_processes: int, flags: tuple[str, ...], blows: tuple[str, ...]) -> None:
    """Killed at a random moment, in a pass and in a write, it ends with the weights, averages, momentum, metrics and predictions
    of the undisturbed one.
    """
    check_kills(place, num_processes, flags, blows)


@pytest.mark.slow
@pytest.mark.parametrize(("num_processes", "flags", "blows"), ALL_CASES)
def test_kills_change_nothing_anywhere(place: Arena, num_processes: int, flags: tuple[str, ...], blows: tuple[str, ...]) -> None:
    """The same for each number of processes, network and precision, killed in each place in one run."""
    check_kills(place, num_processes, flags, blows)


# ------------------------------------------------------------------------------------------------------ decoded images


def on_images(folder: Path, backend: str = "dali", num_workers: int = 1) -> tuple[str, ...]:
    """24 training images: 6 steps of 4 in an epoch, from a network in which all batches of a size are alike: GroupNorm."""
    return (
        f"--data.train={folder}/train",
        f"--data.val={folder}/val",
        f"--data.backend={backend}",
        f"--data.num_workers={num_workers}",
        "--model.name=test_efficientnet_gn",
        "--model.pretrained=false",
        "--model.num_classes=3",
        "--preprocessing.image_size=32",
        "--global_batch_size=4",
        "--swa.num_epochs=2",
        "--swa.report_epochs=[1]",
        "--swa.lr_max=0.003",
        "--swa.lr_min=0.001",
        "--log_every=1",
        "--evaluation.batch_size=4",
    )


@pytest.mark.parametrize(("backend", "num_processes"), [("dali", 2), ("torchvision", 1)])
def test_kills_change_nothing_on_images(place: Arena, image_folder: Path, backend: str, num_processes: int) -> None:
    """With decoded JPEGs and random crops, a kill in the middle of an epoch, loader processes at work, changes nothing either."""
    flags = on_images(image_folder, backend)
    wanted, run = undisturbed(place, num_processes, flags), place.folder / backend
    saving = (SAVE_EACH_STEP, "--checkpoint.in_background=false")
    kill_at(place, run, num_processes, (*flags, *saving), f"training {8 * num_processes} SIGKILL")
    last = place.finish(run, num_processes, flags)
    first = last.notes(0, "training")[0]
    assert first in [note | {"time": first["time"]} for note in notes_of(place, wanted)]
    assert (first["epoch"], len(last.notes(0, "training"))) == (1, 4)
    assert differences(wanted, run) == []


def notes_of(place: Arena, run: Path) -> list[dict]:
    return [json.loads(line) for line in (place.folder / "spied" / run.name / "rank-0.jsonl").read_text().splitlines()]


# -------------------------------------------------------------------------------------------- another number of ranks

TOLERANCE = 1e-5  # of sums in another order
MOVED_AT_LEAST = 100 * TOLERANCE


def global_batches(start: Struck, first_step: int, num_parts: int, steps_per_epoch: int) -> dict[int, Batch]:
    """What the network saw in each step of a start, by the number of the step: (image, digest of its pixels) in rank order."""
    found: dict[int, Batch] = {}
    for rank in range(len(start.pids)):
        for number, note in enumerate(start.notes(rank, "training")):
            step = first_step + number // num_parts
            assert note["epoch"] == step // steps_per_epoch
            found.setdefault(step, []).extend(zip(note["indices"], note["pixels"], strict=True))
    return found


def largest_difference(one: Path, other: Path) -> float:
    """Of all weights but BatchNorm's statistics."""
    a, b = load_file(one), load_file(other)
    return max(float((a[name] - b[name]).abs().max()) for name in a if "running_" not in name and "num_batches" not in name)


def change_ranks(
    place: Arena, run: Path, flags: Sequence[str], numbers: Sequence[int], size_of_part: dict[int, int], steps: int
) -> Path:
    """Go through a run with several numbers of processes one after the other, killed in the middle of an epoch in between. Each
    global batch must have the images and crops of one process's run, whose folder is returned.
    """
    wanted = undisturbed(place, 1, flags)
    alone = [note for note in notes_of(place, wanted) if note.get("phase") == "training"]
    pairs = [pair for note in alone for pair in zip(note["indices"], note["pixels"], strict=True)]
    size = len(pairs) // (2 * steps)
    order = {k: pairs[k * size : (k + 1) * size] for k in range(2 * steps)}
    for turn, number in enumerate(numbers):
        first, num_parts = max(checkpoints(run), default=0), size // number // size_of_part[number]
        if turn + 1 == len(numbers):
            start = place.finish(run, number, flags)
        else:
            # Two steps, or three so as not to stop between epochs; each is on disk before the next begins.
            num_steps = 2 if (first + 2) % steps else 3
            blow = f"training {num_steps * num_parts} SIGKILL 0"
            start = place.start(run, number, (*flags, SAVE_EACH_STEP, "--checkpoint.in_background=false"), blow=blow)
            start.kill_after_blow()
            assert max(checkpoints(run)) == first + num_steps
        seen = global_batches(start, first, num_parts, steps)
        last = max(seen)
        assert seen == {k: order[k] for k in range(first, last)} | {last: seen[last]}
        assert set(seen[last]) <= set(order[last])  # not all processes may have come to it
        if turn:
            assert f"it was saved with {numbers[turn - 1]} processes" in start.screen()
    assert max(checkpoints(run)) == 2 * steps
    return wanted


def test_another_number_of_processes(place: Arena, image_folder: Path) -> None:
    """A run goes on with 1, then 4, then 2 processes after 2, in the middle of epochs, with the images and crops of one process's
    run in each global batch, and ends, without BatchNorm, with its weights but for rounding.
    """
    run, numbers = place.folder / "ranks", (2, 1, 4, 2)
    wanted = change_ranks(place, run, on_images(image_folder), numbers, {1: 4, 2: 2, 4: 1}, steps=6)
    for name in ("swa.safetensors", "captures/epoch-01.safetensors", "captures/epoch-02.safetensors"):
        assert largest_difference(run / name, wanted / name) < TOLERANCE, name
    assert largest_difference(wanted / name, wanted / "pretrained.safetensors") > MOVED_AT_LEAST


@pytest.mark.slow
def test_batchnorm_sees_parts_of_one_size(place: Arena) -> None:
    """Where speed.max_batch_size_per_device keeps the parts that BatchNorm sees, its network too goes on with another number of
    processes to the same weights but for rounding, which these random weights make three times as large in each step; only its
    moving statistics, means over processes, are others.
    """
    run, smooth = place.folder / "parts", ("--model.kwargs.drop_rate=0", "--model.kwargs.drop_path_rate=0", "--swa.lr_max=0.003")
    flags = (*RUN, *smooth, "--swa.cycle_steps=4", "--swa.lr_min=0.001", "--speed.max_batch_size_per_device=4")
    wanted, name = (
        change_ranks(place, run, flags, (2, 4), dict.fromkeys((1, 2, 4), 4), steps=10),
        "captures/step-0000004.safetensors",
    )
    assert largest_difference(run / name, wanted / name) < TOLERANCE
    assert largest_difference(wanted / name, wanted / "pretrained.safetensors") > MOVED_AT_LEAST


def test_a_batch_that_does_not_divide_is_refused(place: Arena) -> None:
    """With a number of processes that does not divide its global batch a run does not go on: the sizes and numbers that do are
    named, nothing that it wrote is lost, and it goes on with its own number.
    """
    run = place.folder / "refused"
    start = place.start(run, 1, RUN, blow="training 13 SIGTERM 0")
    assert start.end() == [85]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    refused = place.start(run, 3, RUN)
    assert refused.end() == [2, 2, 2]
    assert "global_batch_size 16 does not divide over 3 processes; set it to 15 or 18, or start one of 1, 2, 4, 8, 16" in (
        refused.screen()
    )
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    last = place.start(run, 1, RUN, blow="training 0 SIGTERM 0")
    assert last.end() == [85]
    assert "resuming after epoch" in last.screen()


# --------------------------------------------------------------------------------------------------- as users start it


@pytest.mark.slow
def test_a_killed_launcher(place: Arena, tmp_path: Path) -> None:
    """Where launch/single_node.sh itself is killed in an epoch, its processes end with it; the same command finishes the run."""
    flags = (*RUN, *BF16)
    wanted, run, spied = undisturbed(place, 2, flags), tmp_path / "run", tmp_path / "spied"
    spied.mkdir()
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    command = ["bash", "launch/single_node.sh", "--num_processes", "2", tmp_path / "config.yaml", *flags, f"--output={run}"]
    spying = {"PYTHONPATH": f"{place.folder}/spy:{PROJECT}", "SPY": str(spied), "SPY_NAP": "0.1"}
    killed = Launched(tmp_path, [*command, SAVE_EACH_STEP], **spying)
    wait_until(lambda: max(checkpoints(run), default=0) >= 3 or killed.process.poll() is not None, "three steps", 120)
    killed.process.kill()
    assert killed.finish()[0] == -signal.SIGKILL
    assert max(checkpoints(run)) < 20
    assert_whole(run)
    code, screen = Launched(tmp_path, command).finish(120)
    assert code == 0, screen
    assert differences(wanted, run) == []
