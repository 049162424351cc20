"""The campaign of kills ends well on a sound program, and finds each kind of harm where there is one."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from imagenet_swa.checkpoint import Checkpoints, Snapshot
from imagenet_swa.config import InputError
from imagenet_swa.selftest import FaultSettings
from imagenet_swa.selftest.blows import WRITING, draw_blow
from imagenet_swa.selftest.campaign import Campaign, faults, unexpected_end
from imagenet_swa.selftest.compare import differences
from imagenet_swa.selftest.ranks import MARKER, Mother, Ranks, end_left_over, marked_processes
from imagenet_swa.selftest.tally import PHASES, Kill, Problem, Tally, table
from imagenet_swa.selftest.whole import checkpoints, last_logged_step, left_overs, what_is_broken, what_is_torn

# ------------------------------------------------------------------------------------------------ the whole campaign


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a campaign of four kills that found nothing."""
    folder = tmp_path_factory.mktemp("campaign") / "faults"
    assert faults(FaultSettings(kills=4, output=folder)) == 0
    return folder


def test_four_kills_change_nothing(campaign: Path):
    """Runs that are killed and started again end as undisturbed ones do; the record counts each kill, by signal and by phase."""
    record = json.loads((campaign / "faults.json").read_text())
    assert record["kills"] == len(record["each_kill"]) >= 4
    assert sum(record["kills_by_signal"].values()) == record["kills"]
    assert sum(sum(counts.values()) for counts in record["kills_by_phase"].values()) == record["kills"]
    assert record["checkpoints_torn"] == record["results_that_differ"] == record["orphans"] == 0
    assert record["problems"] == []
    assert record["runs"] >= 1
    assert record["checkpoints_examined"] >= record["runs"]
    assert sorted(path.name for path in campaign.iterdir()) == [
        "faults.json",
        "images",
        "logs",
        "reference",
        "run.yaml",
        "status",
    ]


def test_a_folder_with_files_is_refused(campaign: Path):
    """A campaign writes into an empty folder only."""
    with pytest.raises(InputError, match="not empty"):
        faults(FaultSettings(kills=1, output=campaign))


def alter(path: Path, at: int = -1) -> None:
    """Turn one bit over."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def last_checkpoint(run: Path) -> Path:
    return max(run.glob("checkpoints/step-*"))


HARM: dict[str, tuple[str, Callable[[Path], object]]] = {
    "capture": ("captures/", lambda run: alter(min(run.glob("captures/*")))),
    "average": ("averages/", lambda run: alter(max(run.glob("averages/*")))),
    "result": ("swa.safetensors differs", lambda run: alter(run / "swa.safetensors")),
    "start of the average": ("pretrained.safetensors", lambda run: alter(run / "pretrained.safetensors")),
    "momentum": ("checkpoint/momentum", lambda run: alter(last_checkpoint(run) / "momentum.safetensors")),
    "prediction": ("predictions/", lambda run: alter(min(run.glob("predictions/*")), at=100)),
    "missing": ("is missing", lambda run: min(run.glob("captures/*")).unlink()),
    "too much": ("too much", lambda run: (run / "captures" / "epoch-77.safetensors").write_bytes(b"x")),
}


@pytest.mark.parametrize("kind", HARM)
def test_a_single_bit_is_found(kind: str, campaign: Path, tmp_path: Path):
    """Any result that differs in one bit, is missing or is too much, is found and named, and makes the tally one of problems."""
    run = tmp_path / "run"
    shutil.copytree(campaign / "reference", run)
    assert differences(campaign / "reference", run) == []
    name, harm = HARM[kind]
    harm(run)
    found = differences(campaign / "reference", run)
    assert len(found) == 1
    assert name in found[0]


def test_metrics_are_compared_without_the_clock(campaign: Path, tmp_path: Path):
    """Another speed is no difference, another loss or one line more is."""
    run = tmp_path / "run"
    shutil.copytree(campaign / "reference", run)
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    first = next(number for number, line in enumerate(lines) if line["kind"] == "train")

    def write(**changes: float) -> None:
        path.write_text("".join(json.dumps(line | (changes if n == first else {})) + "\n" for n, line in enumerate(lines)))

    write(images_per_second=1.0, data_wait=0.5, memory_mib=3.0)
    assert differences(campaign / "reference", run) == []
    write(loss=lines[first]["loss"] * (1 + 2**-52))
    assert differences(campaign / "reference", run) == ["metrics.jsonl differs"]
    write()
    with path.open("a") as file:
        file.write(json.dumps(lines[-1]) + "\n")
    assert differences(campaign / "reference", run) == ["metrics.jsonl differs"]


def test_a_run_that_ends_otherwise_is_reported_and_kept(campaign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The campaign's own verdict on an altered run: a problem in the tally and on the screen, the run kept to be looked at."""
    judge = Campaign(FaultSettings(kills=1, output=tmp_path / "campaign"))
    shutil.copytree(campaign / "reference", judge.reference)

    def end_altered(run: Path) -> bool:
        shutil.copytree(campaign / "reference", run)
        alter(run / "swa.safetensors")
        (run / "train.log.partial").write_text("[")
        return True

    judge.bring_to_its_end = end_altered
    judge.disturb_one_run()
    assert judge.tally.problems == [
        Problem("different", "run-001: swa.safetensors differs"),
        Problem("other", "run-001: left train.log.partial behind"),
    ]
    assert "swa.safetensors differs" in capsys.readouterr().out
    assert (tmp_path / "campaign" / "run-001").is_dir()


# ------------------------------------------------------------------------------------------------ what is on the disk


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run folder with two checkpoints."""
    for step in (3, 12):
        progress = {"step": step, "num_averaged": 0}
        tensors = {"a": torch.arange(5.0) + step}
        Checkpoints(tmp_path / "checkpoints", keep=2).save(Snapshot(progress, tensors, tensors, tensors, tensors))
    return tmp_path


def test_whole_checkpoints_are_not_torn(saved: Path):
    """What the program saves agrees with its manifest; what is called partial does not count."""
    (saved / "checkpoints" / "step-0000015.partial").mkdir()
    assert list(checkpoints(saved)) == [3, 12]
    assert what_is_torn(saved) == []


@pytest.mark.parametrize("name", ["weights", "momentum", "average", "statistics"])
@pytest.mark.parametrize("harm", ["altered", "truncated", "missing", "empty"])
def test_a_torn_checkpoint_is_found(name: str, harm: str, saved: Path):
    """A file of it with one bit over, cut short, missing or empty: the checkpoint is named."""
    path = saved / "checkpoints" / "step-0000012" / f"{name}.safetensors"
    content = path.read_bytes()
    match harm:
        case "altered":
            alter(path)
        case "missing":
            path.unlink()
        case _:
            path.write_bytes(content[:-1] if harm == "truncated" else b"")
    assert len(what_is_torn(saved)) == 1
    assert what_is_torn(saved)[0].startswith("step-0000012")
    assert name in what_is_torn(saved)[0]


def test_a_manifest_that_names_less_is_found(saved: Path):
    """A manifest that lists only some of the files, or is no JSON, or a file beside it that nobody lists."""
    folder = saved / "checkpoints" / "step-0000003"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["weights.safetensors"] == hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"weights.safetensors": manifest["weights.safetensors"]}))
    assert "manifest.json lists" in what_is_torn(saved)[0]
    (folder / "manifest.json").write_text("{")
    assert "no JSON" in what_is_torn(saved)[0]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert what_is_torn(saved) == []
    (folder / "core").touch()
    assert "core" in what_is_torn(saved)[0]


def test_broken_files_are_found(tmp_path: Path):
    """Weights, results and predictions that are cut short are named, whole ones and partial ones are not."""
    save_file({"a": torch.arange(7.0)}, tmp_path / "capture.safetensors")
    (tmp_path / "results.json").write_text("[1, 2]")
    (tmp_path / "some.json.partial").write_text("[1, ")
    (tmp_path / "one.parquet").write_bytes(b"PAR1 and so on PAR1")
    assert what_is_broken(tmp_path) == []
    assert left_overs(tmp_path) == ["some.json.partial"]
    for path in tmp_path.glob("*.*"):
        path.write_bytes(path.read_bytes()[:-1])
    assert [line.split(":")[0] for line in what_is_broken(tmp_path)] == ["capture.safetensors", "one.parquet", "results.json"]
    (tmp_path / "capture.safetensors").write_bytes(b"\x80\x02}q\x00.")
    assert "no whole safetensors header" in what_is_broken(tmp_path)[0]


def test_the_last_logged_step(tmp_path: Path):
    """The highest step of metrics.jsonl, whatever a killed run left of its last line."""
    assert last_logged_step(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 7}\n{"kind": "train", "step": 14}\n{"kind": "tr')
    assert last_logged_step(tmp_path) == 14


# ---------------------------------------------------------------------------------------------------- how they end

KILL_OF_ONE = Kill(1, 0, "SIGKILL", (1,), "training", False, (1, -9), 1.0, None, ())
TERM_OF_ONE = Kill(1, 0, "SIGTERM", (1,), "training", False, (85, 85), 1.0, None, ())


@pytest.mark.parametrize(
    "kill",
    [
        KILL_OF_ONE,
        replace(KILL_OF_ONE, codes=(-9, -9), ranks=(0, 1)),
        replace(KILL_OF_ONE, codes=(0, -9), phase="finishing"),
        replace(KILL_OF_ONE, codes=(85, -9), phase="waiting to write", after_request=True),
        replace(KILL_OF_ONE, codes=(-15, -9), phase="starting", needed="SIGTERM"),
        TERM_OF_ONE,
        replace(TERM_OF_ONE, codes=(0, 0)),
        replace(TERM_OF_ONE, codes=(1, -15), phase="starting"),
    ],
)
def test_ends_as_they_should_be(kill: Kill):
    """Killed ones end by that and the others with an error; after a stop signal all with 85, or 0 if nothing was left to do."""
    assert unexpected_end(kill) is None


@pytest.mark.parametrize(
    "kill",
    [
        replace(KILL_OF_ONE, codes=(-6, -9)),
        replace(KILL_OF_ONE, codes=(-11, -9)),
        replace(KILL_OF_ONE, codes=(85, -9)),
        replace(KILL_OF_ONE, needed="SIGTERM"),
        replace(KILL_OF_ONE, needed="SIGKILL", phase="starting"),
        replace(TERM_OF_ONE, codes=(85, 0)),
        replace(TERM_OF_ONE, codes=(85, 1)),
        replace(TERM_OF_ONE, codes=(85, -6)),
        replace(TERM_OF_ONE, codes=(1, -15)),
        replace(TERM_OF_ONE, codes=(0, -15), phase="starting"),
        replace(TERM_OF_ONE, needed="SIGTERM"),
    ],
)
def test_ends_that_are_findings(kill: Kill):
    """A crash, ranks that disagree, a stop signal that kills, ranks that have to be ended: none passes."""
    assert unexpected_end(kill) is not None


def test_the_tally_adds_up():
    """Any problem of any kind is among the problems, and the table shows every number of kills."""
    tally = Tally(num_runs=2, kills=[KILL_OF_ONE, TERM_OF_ONE, replace(KILL_OF_ONE, phase="starting", while_writing=True)])
    tally.add("torn", "a", "b", "c", "d")
    tally.add("different", "a", "b", "c")
    tally.add("orphan", "a", "b")
    tally.add("other", "a")
    summary = tally.summary()
    counts = (summary[key] for key in ("checkpoints_torn", "results_that_differ", "orphans", "other_problems"))
    assert list(counts) == [4, 3, 2, 1]
    assert len(tally.problems) == 10
    assert summary["kills_by_signal"] == {"SIGKILL": 2, "SIGTERM": 1}
    assert summary["kills_by_phase"]["training"] == {"SIGKILL": 1, "SIGTERM": 1}
    assert summary["kills_while_writing"] == 1
    assert summary["exit_codes_by_signal"] == {"SIGKILL": {"-9": 2, "1": 2}, "SIGTERM": {"85": 2}}
    assert set(summary["kills_by_phase"]) == set(PHASES)
    lines = table(summary)
    assert lines[0].split() == ["kills", "SIGKILL", "SIGTERM", "all"]
    assert next(line for line in lines if line.startswith("training")).split() == ["training", "1", "1", "2"]
    assert next(line for line in lines if line.startswith("all")).split() == ["all", "2", "1", "3"]


def test_blows_reach_all_signals_ranks_and_phases():
    """400 draws hold every signal, KILL in about half of them, each rank alone and both, the clock and the rare phases."""
    draws = random.Random(1)
    blows = [draw_blow(draws, 2, 10.0) for _ in range(400)]
    counts = Counter(blow.signal.name for blow in blows)
    assert set(counts) == {"SIGKILL", "SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"}
    assert 160 < counts["SIGKILL"] < 240
    assert set(Counter(blow.ranks for blow in blows)) == {(0,), (1,), (0, 1)}
    phases = Counter(blow.phase for blow in blows)
    assert set(phases) == {None, WRITING, "batchnorm", "evaluation", "finishing"}
    assert 160 < phases[None] < 240
    by_clock = [blow.after for blow in blows if blow.phase is None]
    assert min(by_clock) < 0.5
    assert max(by_clock) > 9.5
    followed = [blow for blow in blows if blow.then]
    assert 30 < len(followed) < 110
    assert all(blow.is_graceful and blow.then and blow.then.signal == signal.SIGKILL for blow in followed)


# ----------------------------------------------------------------------------------------------------- the processes


@pytest.fixture(scope="module")
def mother() -> Iterator[Mother]:
    with Mother("of-the-tests", hash_seed=1) as mother:
        yield mother


def test_forked_processes_end_as_started_ones(mother: Mother, tmp_path: Path):
    """Exit code and output are those of `python -m imagenet_swa` with the same arguments; a signal ends it as it would."""
    for arguments in (["--version"], ["train", "--sede=1"], ["no-such-command"]):
        log = tmp_path / "log"
        log.unlink(missing_ok=True)
        ranks = Ranks([mother], arguments, tmp_path / "status", log)
        ranks.wait(60)
        command = [sys.executable, "-m", "imagenet_swa", *arguments]
        environment = os.environ | {"RANK": "0", "IMAGENET_SWA_STATUS": str(tmp_path / "status")}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
        assert ranks.codes == [done.returncode]
        assert log.read_text() == done.stdout + done.stderr
    ranks = Ranks([mother, mother], ["train", "--data.synthetic", f"--output={tmp_path / 'run'}"], tmp_path / "status", log)
    ranks.send(signal.SIGKILL, [1])
    ranks.wait(60, lambda: ranks.codes[1] is not None)
    assert ranks.codes == [None, -9]
    ranks.send(signal.SIGKILL, [0])
    ranks.wait(60)
    assert ranks.codes == [-9, -9]


def test_what_outlives_a_run_is_found_and_ended():
    """A process with the campaign's mark, started by whomever, is found after its time and killed; one that is spared is not."""
    command = ["sleep", "60"]
    orphan, spared, stranger = (
        subprocess.Popen(command, env=os.environ | {MARKER: marker}) for marker in ("of-one", "of-one", "of-another")
    )
    try:
        time.sleep(0.1)
        assert set(marked_processes("of-one")) == {orphan.pid, spared.pid}
        assert end_left_over("of-one", [spared.pid], seconds=0.1) == [orphan.pid]
        assert orphan.wait(10) == -9
        assert spared.poll() is None
        assert stranger.poll() is None
    finally:
        for process in (orphan, spared, stranger):
            process.kill()
            process.wait()
