"""`imagenet-swa bench safety`: what is saved and stepped while the clock runs, how figures follow, what is written."""

import errno
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import PROJECT, run

from imagenet_swa.agreement import Verdict, Wishes
from imagenet_swa.bench import saving
from imagenet_swa.bench.agreeing import Turn
from imagenet_swa.bench.safety import SafetySettings, bench_safety
from imagenet_swa.bench.safety_results import COLUMNS, safety_rows, summarise_safety
from imagenet_swa.bench.saving import ACCELERATE, OURS, TORCH, Saving, SavingRound
from imagenet_swa.bench.trainee import Trainee
from imagenet_swa.checkpoint import Checkpoints, Snapshot, load_snapshot
from imagenet_swa.config import Config, InputError, ModelConfig, PreprocessingConfig

pytestmark = pytest.mark.usefixtures("on_the_cpu")

CONFIG = Config(model=ModelConfig(name="test_efficientnet", num_classes=10), preprocessing=PreprocessingConfig(image_size=32))
FLAGS = ("--model.name=test_efficientnet", "--model.num_classes=10", "--preprocessing.image_size=32")


def saving_round(copying: float, held_up: float, writing: float, **waiting: float) -> SavingRound:
    kinds = {OURS: waiting["ours"], TORCH: waiting["torch"], ACCELERATE: waiting["accelerate"]}
    return SavingRound(copying=copying, held_up=held_up, writing=writing, step=1, num_steps=9, pause=0.1, waiting=kinds)


def row(summary: list[dict[str, Any]], what: str) -> dict[str, Any]:
    (found,) = [each for each in summary if what in each["what"]]
    return found


# ------------------------------------------------------------------------------------------------------- figures


def test_shares_and_ratios():
    """By hand: shares of 600 s, stops added within a round, ratios and shares of a step taken within a round or turn."""
    rounds = [
        saving_round(1, 2, 6, ours=4, torch=2, accelerate=1),
        saving_round(2, -1, 12, ours=8, torch=8, accelerate=4),
        saving_round(3, 6, 3, ours=5, torch=1, accelerate=20),
    ]
    turns = [Turn(plain=p, guarded=g, agreement=a, check=c) for p, g, a, c in ((1, 2, 0.1, 0.5), (2, 1, 0.1, 2), (4, 5, 0.2, 1))]
    summary = summarise_safety(rounds, turns, num_bytes=12 * 2**20)
    assert row(summary, "copied")["share"] == pytest.approx({"median": 2 / 600, "min": 1 / 600, "max": 3 / 600})
    assert row(summary, "in all")["seconds"] == {"median": 3, "min": 1, "max": 9}
    assert (row(summary, "in all")["limit"], row(summary, "in all")["of"]) == (0.005, "10 minutes")
    assert row(summary, "in the background")["mib_per_second"] == {"median": 2, "min": 1, "max": 4}
    assert row(summary, "training waits")["ratio"] is None
    assert row(summary, TORCH)["ratio"] == pytest.approx({"median": 0.5, "min": 0.2, "max": 1})
    assert row(summary, ACCELERATE)["ratio"] == pytest.approx({"median": 0.5, "min": 0.25, "max": 4})
    assert row(summary, "difference")["share"] == pytest.approx({"median": 0.25, "min": -0.5, "max": 1})
    assert row(summary, "agreement")["share"] == pytest.approx({"median": 0.05, "min": 0.05, "max": 0.1})
    assert (row(summary, "agreement")["limit"], row(summary, "agreement")["of"]) == (0.005, "a step")
    assert row(summary, "finite")["share"] == pytest.approx({"median": 0.5, "min": 0.25, "max": 1})
    assert row(summary, "without guards")["share"] is None


class _Clock:
    """A training whose steps take a second, and a second and a half while something is written, of which they finish a fifth."""

    def __init__(self) -> None:
        self.now, self.letter, self.num_behind = 0.0, None, 0
        self.runtime = SimpleNamespace(is_main=True, on_main=lambda call: call(), accelerator=SimpleNamespace())
        self.runtime.accelerator.register_for_checkpointing = lambda _: None

    def seconds_per_step(self, step: Callable[[], object]) -> float:
        start = self.now
        step()
        return self.now - start

    def snapshot(self) -> Snapshot:
        self.now += 0.25
        return Snapshot({"step": 1}, {})

    def guarded_step(self, wishes: Wishes = Wishes()) -> list[Verdict]:  # noqa: B008  frozen
        self.now += 1 if self.letter is None else 1.5
        self.num_behind += self.letter is not None
        if self.letter is not None and self.num_behind == 5:
            self.letter()
            self.letter = None
        return [Verdict(0.0, 0, 0, stop=False, save=wishes.save, give_up=False)]

    def put(self, _key: str, write: Callable[[], None], *, retry: bool) -> None:
        assert retry
        self.letter = write


def test_what_a_write_adds_to_the_steps(monkeypatch: pytest.MonkeyPatch):
    """Five steps of 1.5 s instead of 1 s are 2.5 s held up, whatever comes after the write; the copy is counted apart."""
    clock = _Clock()
    outbox = SimpleNamespace(put=clock.put, wait=lambda: None, failure=None)
    monkeypatch.setattr(saving, "Outbox", lambda **_: outbox)
    monkeypatch.setattr(saving.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(Checkpoints, "save", lambda *_: setattr(clock, "now", clock.now + 0.5))
    measured = Saving(clock, Path("nowhere"), keep=2, say=print)._behind_steps()  # pyright: ignore[reportArgumentType]
    assert measured == (0.25, 2.5 + 0.5, 0.5, 1.0, 6)


# ------------------------------------------------------------------------------------------------- what is timed


@pytest.fixture
def trainee() -> Trainee:
    return Trainee(CONFIG, batch_size=8)


def test_both_kinds_of_steps_do_the_same(trainee: Trainee):
    """A step with guards and one without leave equal gradients; the rate is 0, so weights stay; momentum does not."""
    weights = {name: p.detach().clone() for name, p in trainee.state.network.named_parameters()}
    gradients = []
    for step in (trainee.plain_step, trainee.guarded_step, trainee.plain_step):
        step()
        gradients.append([gradient.clone() for gradient in trainee.gradients()])
    for first, second, third in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)
        torch.testing.assert_close(first, third)
    assert sum(float(gradient.abs().sum()) for gradient in gradients[0]) > 0
    for name, parameter in trainee.state.network.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    momentum = trainee.snapshot().momentum
    assert set(momentum) == set(weights)
    assert all(float(buffer.abs().sum()) > 0 for buffer in momentum.values())


def test_a_step_without_guards_has_none(trainee: Trainee):
    """What the guard tells the optimizer to look at is not left to a plain step, which would obey it."""
    from imagenet_swa.optim import bare

    trainee.guarded_step()
    assert "found_inf" in vars(bare(trainee.state.optimizer))
    trainee.plain_step()
    assert "found_inf" not in vars(bare(trainee.state.optimizer))


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[dict[str, Any], Path, list[Snapshot]]]:
    """The record of two checkpoints of each kind and three turns, the folder, and what was on disk as checkpoints."""
    folder, saved = tmp_path_factory.mktemp("bench"), []
    save = Checkpoints.save

    def look(self: Checkpoints, snapshot: Snapshot) -> Path:
        path = save(self, snapshot)
        saved.append(load_snapshot(path))
        assert len(list(path.parent.iterdir())) <= 2
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", look)
        record = bench_safety(CONFIG, SafetySettings(output=folder / "new", rounds=2, turns=3, batch_size=4))
    yield record, folder / "new", saved


def test_whole_checkpoints_are_timed(result: tuple[dict[str, Any], Path, list[Snapshot]]):
    """Three kinds of a round, rehearsal included, write a new checkpoint each: weights, momentum, average, statistics."""
    record, _, saved = result
    assert len(saved) == 9
    assert len({snapshot.progress["step"] for snapshot in saved}) == 9
    for snapshot in saved:
        assert snapshot.weights and snapshot.momentum and snapshot.statistics
        assert {name.partition("/")[2] for name in snapshot.average} == set(snapshot.weights)
        for part, num_bytes in record["num_bytes"].items():
            assert num_bytes == sum(tensor.nbytes for tensor in getattr(snapshot, part).values())


def test_the_files_hold_what_the_table_shows(result: tuple[dict[str, Any], Path, list[Snapshot]]):
    """JSON holds the record; its summary follows from its rounds and turns; Markdown's cells are those numbers; no more files."""
    record, folder, _ = result
    from_file = json.loads((folder / "safety.json").read_text())
    assert from_file == json.loads(json.dumps(record))
    assert (len(from_file["rounds"]), len(from_file["turns"])) == (2, 3)
    rounds = [SavingRound(**each) for each in from_file["rounds"]]
    turns = [Turn(**turn) for turn in from_file["turns"]]
    assert summarise_safety(rounds, turns, num_bytes=sum(from_file["num_bytes"].values())) == from_file["summary"]
    lines = (folder / "safety.md").read_text().splitlines()
    table = [tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in lines if line.startswith("| ")]
    assert table[0] == COLUMNS
    assert table[2:] == safety_rows(from_file)
    for cells, figures in zip(table[2:], from_file["summary"], strict=True):
        assert cells[0] == figures["what"]
        assert float(cells[1]) == pytest.approx(1000 * figures["seconds"]["median"], rel=0.01)
        ends = [float(end) for end in cells[2].split(" - ")]
        assert ends == pytest.approx([1000 * figures["seconds"][name] for name in ("min", "max")], rel=0.01)
        assert (cells[3] == "") == (figures["share"] is None)
    assert sorted(path.name for path in folder.iterdir()) == ["safety.json", "safety.md"]
    assert (from_file["batch_size"], from_file["image_size"], from_file["environment"]["world_size"]) == (4, 32, 1)


@pytest.mark.usefixtures("result")
def test_the_thread_that_writes_has_ended():
    """Nothing goes on after the measurement."""
    assert "outbox" not in {thread.name for thread in threading.enumerate()}


def test_a_full_disk_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A checkpoint that the disk refuses is an error, not a figure and not a wait for ever; what was written goes."""

    def refuse(_self: Checkpoints, _snapshot: Snapshot) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path))

    monkeypatch.setattr(Checkpoints, "save", refuse)
    with pytest.raises(OSError, match="No space left on device"):
        bench_safety(CONFIG, SafetySettings(output=tmp_path / "new", rounds=1, turns=1, batch_size=4))
    assert list((tmp_path / "new").iterdir()) == []


def test_settings_that_cannot_be(tmp_path: Path):
    """Numbers below one, single images and an output that is a file are refused, with what is wanted."""
    for name, least in (("rounds", 0), ("turns", 1), ("batch_size", 1)):
        with pytest.raises(InputError, match=rf"bench\.{name} must be at least {least}, got {least - 1}"):
            replace(SafetySettings(), **{name: least - 1})
    with pytest.raises(InputError, match=r"bench\.batch_size must be at least 2.*got 1"):
        SafetySettings(batch_size=1)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot make the folder .*file.*; set bench\.output to another"):
        bench_safety(CONFIG, SafetySettings(output=tmp_path / "file"))


def test_steps_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """No rounds: nothing is saved, and the table holds the steps' rows only."""
    saved, save = [], Checkpoints.save
    monkeypatch.setattr(Checkpoints, "save", lambda *about: saved.append(1) or save(*about))
    record = bench_safety(CONFIG, SafetySettings(output=tmp_path, rounds=0, turns=1, batch_size=4))
    assert {row["what"].partition(":")[0] for row in record["summary"]} == {"step"}
    assert not saved


def test_no_weights_are_asked_for(tmp_path: Path):
    """The network has random weights, whatever weights are configured: a file that is not there is not missed."""
    config = replace(CONFIG, model=replace(CONFIG.model, pretrained=True, weights=tmp_path / "none.safetensors"))
    assert Trainee(config, batch_size=2).state.weights


# --------------------------------------------------------------------------------------------- as users start it


def test_two_ranks_measure_together(tmp_path: Path):
    """The launcher's two processes make one measurement, written and shown once."""
    launcher = ("accelerate", "launch", "--config_file=launch/accelerate/eight_gpus.yaml", "--num_processes=2")
    command = ("-m", "imagenet_swa", "bench", "safety", *FLAGS, f"--bench.output={tmp_path}", "--bench.rounds=1")
    settings = ("--bench.turns=1", "--bench.batch_size=4", "--processes.silence_seconds=30")
    done = run(
        [*launcher, "--main_process_port=0", *command, *settings], cwd=PROJECT, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES=""
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("step: agreement of the ranks") == 1
    assert done.stderr.count("round 1 of 1") == 1
    record = json.loads((tmp_path / "safety.json").read_text())
    assert record["environment"]["world_size"] == 2
    assert record["num_bytes"]["statistics"] % 2 == 0 < record["num_bytes"]["statistics"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["safety.json", "safety.md"]


def test_what_can_be_measured(capsys: pytest.CaptureFixture[str]):
    """`bench` without a kind, or with another, says which there are."""
    from imagenet_swa.cli import main

    for words in (["bench"], ["bench", "lader"]):
        assert main(words) == 2
        assert "wanted `imagenet-swa bench loader` or `imagenet-swa bench safety`, got" in capsys.readouterr().err
    assert main(["bench", "--help"]) == 0
    assert "bench loader|safety" in capsys.readouterr().out
