"""What a run writes down: lines for machines, lines for people, a bar for terminals."""

import dataclasses
import json
import math
import os
import pty
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import QUICK_RUN
from hypothesis import example, given, settings
from hypothesis import strategies as st

from imagenet_swa.arguments import parse_config
from imagenet_swa.config import Config
from imagenet_swa.records import Records, memory_mib
from imagenet_swa.runtime import Runtime, start_runtime

pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    return start_runtime(Config(output=tmp_path_factory.mktemp("runtime")))


@pytest.fixture
def other_rank(runtime: Runtime) -> Runtime:
    return dataclasses.replace(runtime, rank=1)


def strictly(line: str) -> Any:
    """Parse as every JSON reader does, which know no NaN."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    return json.loads(line, parse_constant=refuse)


# ----------------------------------------------------------------------------------------------------------- metrics


@given(values=st.lists(st.floats(width=64) | st.integers(-(2**60), 2**60) | st.text(), max_size=4))
@example(values=[math.nan, math.inf, -math.inf])
@settings(max_examples=50, deadline=None)
def test_metrics_lines_are_json(tmp_path_factory: pytest.TempPathFactory, runtime: Runtime, values: list[Any]):
    """Each log call is one line of strict JSON that gives the values back; what JSON cannot say becomes null."""
    folder = tmp_path_factory.mktemp("records")
    records = Records(folder, runtime)
    named = {f"value{i}": value for i, value in enumerate(values)}
    records.log("train", step=3, **named)
    records.log("evaluation", step=4)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    wanted = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in named.items()}
    assert [strictly(line) for line in lines] == [{"kind": "train", "step": 3, **wanted}, {"kind": "evaluation", "step": 4}]


def test_trackers_get_the_numbers(tmp_path: Path, runtime: Runtime, other_rank: Runtime, monkeypatch: pytest.MonkeyPatch):
    """Numbers go to Accelerate's trackers under the kind of line, on every rank, since Accelerate picks its own; texts do not."""
    seen: list[tuple[dict[str, float], int]] = []
    monkeypatch.setattr(runtime.accelerator, "log", lambda values, step: seen.append((values, step)))
    for rank in (runtime, other_rank):
        Records(tmp_path, rank).log("evaluation", step=7, name="swa", top1=0.5, num_images=40)
    assert seen == [({"evaluation/swa/top1": 0.5, "evaluation/swa/num_images": 40}, 7)] * 2


def write_lines(folder: Path, steps: list[int], tail: str = "") -> None:
    lines = [json.dumps({"kind": "train", "step": step, "loss": 1.5}) + "\n" for step in steps]
    (folder / "metrics.jsonl").write_text("".join(lines) + tail)


def steps_in(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("step", "left"), [(-1, []), (0, [0]), (12, [0, 6, 12, 12]), (13, [0, 6, 12, 12]), (99, [0, 6, 12, 12, 18])]
)
def test_lines_of_later_steps_are_dropped(tmp_path: Path, runtime: Runtime, step: int, left: list[int]):
    """After forget_after(n) exactly the lines of steps up to n are left, in their order."""
    write_lines(tmp_path, [0, 6, 12, 12, 18])
    Records(tmp_path, runtime).forget_after(step)
    assert steps_in(tmp_path) == left


@pytest.mark.parametrize("tail", ['{"kind": "train", "st', '{"kind": "train"}\n', "\n", "[1, 2]\n", '"text"'])
def test_half_a_line_is_dropped(tmp_path: Path, runtime: Runtime, tail: str):
    """A line that a killed process left unfinished, and any without a step, is dropped; the next line starts on its own."""
    write_lines(tmp_path, [6, 12], tail)
    records = Records(tmp_path, runtime)
    records.forget_after(99)
    records.log("train", step=18)
    assert steps_in(tmp_path) == [6, 12, 18]


def test_nothing_to_forget(tmp_path: Path, runtime: Runtime):
    """A run without metrics stays without."""
    Records(tmp_path, runtime).forget_after(5)
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------- lines for people


def test_say(tmp_path: Path, runtime: Runtime, capsys: pytest.CaptureFixture[str]):
    """A line goes to the error stream as it is, brackets and length included, and with the time to train.log."""
    text = "batches [bold]64[/bold] x 4 :smile: = 256; " + "long " * 60 + "end"
    records = Records(tmp_path, runtime)
    records.say(text)
    records.say("second")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"{text}\nsecond\n"
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line[21:] for line in lines] == [text, "second"]
    assert all(line[:4].isdigit() and line[10] == " " and line[13] == ":" for line in lines)


def test_other_ranks_are_silent(tmp_path: Path, other_rank: Runtime, capsys: pytest.CaptureFixture[str]):
    """A rank other than 0 writes no file and prints nothing, and changes none that is there."""
    records = Records(tmp_path, other_rank)
    records.say("text")
    records.log("train", step=1, loss=2.0)
    records.forget_after(0)
    with records.progress("title", 3) as ticker:
        ticker.advance()
        ticker.note("note")
    assert list(tmp_path.iterdir()) == []
    write_lines(tmp_path, [1])
    records.forget_after(0)
    assert steps_in(tmp_path) == [1]
    assert capsys.readouterr() == ("", "")


# -------------------------------------------------------------------------------------------------------- progress


def output_on_a_terminal(folder: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a progress bar writes to an error stream that is a terminal."""
    reader, writer = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with Records(folder, runtime).progress("epoch 1/4", 10) as ticker:
            ticker.advance(2)
            ticker.advance()
            ticker.note("loss 1.2345")
        os.write(writer, b"THE END")
        monkeypatch.undo()
        output = b""
        while b"THE END" not in output:
            output += os.read(reader, 65536)
    os.close(reader)
    return output.decode()


def test_progress_on_a_terminal(tmp_path: Path, runtime: Runtime, other_rank: Runtime, monkeypatch: pytest.MonkeyPatch):
    """On a terminal rank 0 shows a bar with title, count, and note; other ranks show nothing."""
    shown = output_on_a_terminal(tmp_path, runtime, monkeypatch)
    for text in ("epoch 1/4", "3/10", "loss 1.2345"):
        assert text in shown
    assert output_on_a_terminal(tmp_path, other_rank, monkeypatch) == "THE END"


def test_progress_elsewhere(tmp_path: Path, runtime: Runtime, capsys: pytest.CaptureFixture[str]):
    """Where the output is no terminal, such as a job's log file, no bar is written."""
    with Records(tmp_path, runtime).progress("epoch 1/4", 10) as ticker:
        ticker.advance()
        ticker.note("loss")
    assert capsys.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------------------- files


def test_memory_of_the_process():
    """Without a GPU the memory is the process's peak resident size, as the kernel tells it, in MiB."""
    ballast = torch.ones(2**24)  # 64 MiB, touched
    status = Path("/proc/self/status").read_text().splitlines()
    kibibytes = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    assert memory_mib(ballast.device) == pytest.approx(kibibytes / 1024, rel=0.01)


def test_trackers_tell_networks_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Networks that are evaluated at the same step have a curve each."""
    runtime = start_runtime(parse_config([*QUICK_RUN, f"--output={tmp_path}"], "", ""))
    sent: dict[str, float] = {}
    monkeypatch.setattr(runtime.accelerator, "log", lambda values, **_: sent.update(values))
    records = Records(tmp_path, runtime)
    for name, top1 in (("swa", 0.5), ("capture", 0.25)):
        records.log("evaluation", step=3, name=name, top1=top1)
    records.log("train", step=3, loss=1.0)
    assert sent == {"evaluation/swa/top1": 0.5, "evaluation/capture/top1": 0.25, "train/loss": 1.0}
