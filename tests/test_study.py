"""Grids of runs: what the launchers are told, what is refused, and the table and curves of scripted runs."""

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import PROJECT, one_line, run
from PIL import Image

from imagenet_swa.arguments import parse_config
from imagenet_swa.config import Config, SwaConfig, to_plain
from imagenet_swa.study import load_grid, report_study, study

GRIDS = sorted((PROJECT / "configs" / "study").glob("*.yaml"))
BASE = "seed: 3\nmodel: {name: resnet18, pretrained: false}\nswa: {num_epochs: 4, report_epochs: [2, 4]}\n"
RUNS = {
    "constant-0.1": {"swa.schedule": "constant", "swa.lr_max": 0.1},
    "cyclical": {"swa": {"cycle_epochs": 2, "lr_max": 0.05}},
    "as-it-is": None,
}


def make_grid(folder: Path, **changes: Any) -> Path:
    """A grid file beside its base; a change of None leaves the key out."""
    (folder / "base.yaml").write_text(BASE)
    content = {"base": "base.yaml", "output": str(folder / "runs"), "runs": RUNS} | changes
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in content.items() if value is not None}, sort_keys=False))
    return path


def flags_of(grid: Path, number: int, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    assert study([str(grid), "--flags", str(number)]) == 0
    return capsys.readouterr().out.splitlines()


# ------------------------------------------------------------------------------------------------------ the grid file


def test_flags_make_the_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """The lines of a run, given to the program, are the base with that run's settings, in a folder of its own name."""
    grid = make_grid(tmp_path, settings={"swa.lr_min": 0.0005, "seed": 5})
    assert study([str(grid), "--count"]) == 0
    assert capsys.readouterr().out == "3\n"
    wanted = [("constant", 0.1, 1), ("cyclical", 0.05, 2), ("cyclical", 0.001, 1)]
    for number, (name, settings) in enumerate(zip(RUNS, wanted, strict=True)):
        base, *flags = flags_of(grid, number, capsys)
        config = parse_config(["--config", base, *flags], "", "")
        assert config.output == tmp_path / "runs" / name
        assert (config.seed, config.model.name, config.swa.report_epochs) == (5, "resnet18", (2, 4))
        assert (config.swa.schedule, config.swa.lr_max, config.swa.cycle_epochs) == settings
        assert config.swa.lr_min == 0.0005


@pytest.fixture
def mild(tmp_path: Path) -> Path:
    """A grid of three runs that no setting contradicts."""
    return make_grid(tmp_path)


@pytest.mark.parametrize("value", ["a b", "x=y", "$HOME `ls` \\", "ünï", "[1, 2", "true"])
def test_any_text_arrives(tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str):
    """A value with blanks, signs that shells know, or the look of YAML is one line and arrives as it is."""
    grid = make_grid(tmp_path, runs={"one": {"data.train": value}})
    base, *flags = flags_of(grid, 0, capsys)
    assert len(flags) == 2
    if value != "[1, 2":
        assert parse_config(["--config", base, *flags], "", "").data.train == value


def test_values_of_every_kind_arrive(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Null, false, lists, numbers and arguments of the network's constructor arrive as the YAML has them."""
    settings = {
        "batchnorm.num_images": None,
        "speed": {"channels_last": False},
        "swa.report_epochs": [3],
        "swa.lr_min": 1e-6,
        "model.kwargs": {"drop_rate": 0.2},
    }
    base, *flags = flags_of(make_grid(tmp_path, runs={"one": settings}), 0, capsys)
    config = parse_config(["--config", base, *flags], "", "")
    assert (config.batchnorm.num_images, config.speed.channels_last) == (None, False)
    assert (config.swa.report_epochs, config.swa.lr_min, config.model.kwargs) == ((3,), 1e-6, {"drop_rate": 0.2})


@cache
def configs_of(grid: Path) -> tuple[Config, ...]:
    """The configurations that a grid's runs start with."""
    found = load_grid(grid)
    return tuple(parse_config(["--config", *found.arguments(number)], "", "") for number in range(len(found.runs)))


@pytest.mark.parametrize("grid", GRIDS, ids=lambda path: path.stem)
def test_the_grids_of_this_project(grid: Path):
    """Each grid that comes with the project has the paper's eight kinds of run, reported after the same epochs."""
    configs = [config.swa for config in configs_of(grid)]
    assert [swa.schedule for swa in configs] == ["constant"] * 4 + ["cyclical"] * 4
    assert len({(swa.schedule, swa.lr_max) for swa in configs}) == 8
    assert len({swa.epochs_to_report for swa in configs}) == 1
    assert all(swa.lr_min == swa.lr_max for swa in configs[:4])
    assert [swa.lr_min / swa.lr_max for swa in configs[4:]] == pytest.approx([0.01] * 4)


def test_the_papers_rates():
    """Fig. 6: constant 0.1, 0.05, 0.01, 0.001 and cycles of five epochs from 0.1, 0.05, 0.01, 0.005, of PreResNet-164."""
    configs = configs_of(PROJECT / "configs" / "study" / "fig6.yaml")
    assert [config.swa.lr_max for config in configs] == [0.1, 0.05, 0.01, 0.001, 0.1, 0.05, 0.01, 0.005]
    assert [config.swa.cycle_epochs for config in configs] == [1] * 4 + [5] * 4
    assert {(config.model.name, config.model.num_classes) for config in configs} == {("preresnet164bn_cifar100", 100)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"bsae": "x"}, "unknown key bsae; did you mean base?"),
        ({"base": None}, "base is missing or no text"),
        ({"base": "nowhere.yaml"}, "base nowhere.yaml is not there"),
        ({"output": None}, "output is missing or no text"),
        ({"runs": None}, "runs is missing or no mapping"),
        ({"runs": {}}, "runs is missing or no mapping"),
        ({"runs": ["a"]}, "runs is missing or no mapping"),
        ({"runs": {"one": 3}}, "runs.one is 3; wanted settings"),
        ({"settings": 3}, "settings is 3; wanted settings"),
        ({"runs": {"one": {"swa.lr_maks": 1}}}, "run one: unknown setting swa.lr_maks; did you mean swa.lr_max?"),
        ({"runs": {"one": {"swa.lr_max": "fast"}}}, "run one: "),
        ({"runs": {"one": {"swa.lr_max": -1}}}, "run one: wanted 0 <= swa.lr_min <= swa.lr_max"),
        ({"settings": {"swa.cycle_epochs": 3}}, "run constant-0.1: swa.num_epochs 4 is not a whole number of cycles"),
        ({"runs": {"one": {"output": "x"}}}, "runs.one sets output, which the grid decides itself"),
        ({"runs": {"../up": None}}, "the run '../up' cannot be a folder's name"),
        ({"runs": {".hidden": None}}, "cannot be a folder's name"),
        ({"runs": {"a b": None}}, "cannot be a folder's name"),
        ({"runs": {"": None}}, "cannot be a folder's name"),
        ({"runs": {"Fast": None, "fast": None}}, "Fast and fast have the same folder"),
    ],
)
def test_what_is_no_grid(tmp_path: Path, changes: dict[str, Any], words: str):
    """Misspelt keys, settings that no run takes and names that are no folders are one line that names the grid."""
    grid = make_grid(tmp_path, **changes)
    message = one_line(load_grid, grid)
    assert words in message
    assert str(grid) in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: b\nruns: {a: {}, a: {}}\n", "line 2 and below: a is there twice"),
        ("base: a\nbase: b\n", "base is there twice"),
        ("- a\n", "is no grid; wanted the keys base, output, settings, runs"),
        ("", "is no grid"),
        ("a: [", "cannot be read"),
    ],
)
def test_files_that_are_no_grids(tmp_path: Path, text: str, words: str):
    """A run or key that is there twice would vanish silently in YAML; it, and what is no mapping, is refused."""
    (tmp_path / "grid.yaml").write_text(text)
    assert words in one_line(load_grid, tmp_path / "grid.yaml")
    assert "No such file" in one_line(load_grid, tmp_path / "nowhere.yaml")


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        (["--flags"], "got --flags"),
        (["--flags", "x"], "got --flags x"),
        (["--flags", "3"], "has the runs 0 .. 2, got 3"),
        (["--cuont"], "got --cuont"),
        (["--count", "more"], "got --count more"),
    ],
)
def test_misspelt_flags(mild: Path, rest: Sequence[str], words: str):
    """What the command does not know is named."""
    assert words in one_line(study, [str(mild), *rest])


def test_usage(capsys: pytest.CaptureFixture[str]):
    """Without a grid the usage, which is help with --help only."""
    assert study([]) == 2
    assert study(["--help"]) == 0
    first, second = re.findall(r"usage: imagenet-swa study GRID", capsys.readouterr().out)
    assert first == second


# ------------------------------------------------------------------------------------------------------------ results


def finished(
    folder: Path, swa: dict[str, Any], top1: Sequence[float], *, fingerprint: str = "f", unfinished: bool = False
) -> None:
    """A run of four epochs with reports after two and four: start, last capture, and the averages after each."""
    start, capture, early, late = top1
    folder.mkdir(parents=True)
    config = Config(swa=SwaConfig(**{"num_epochs": 4, "report_epochs": (2, 4), **swa}), output=folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_plain(config)))
    data = {split: {"num_images": 100, "fingerprint": fingerprint + split} for split in ("train", "val")}
    (folder / "environment.json").write_text(json.dumps({"data": data}))
    rows = [("pretrained", 0, start), ("capture", 4, capture), ("swa", 2, early), ("swa_without_pretrained", 2, early)]
    if not unfinished:
        rows += [("swa", 4, late), ("swa_without_pretrained", 4, late - 0.01)]
    common = {"num_images": 100, "top5": 0.9, "nll": 1.0}
    results = [{"name": name, "epoch": epoch, "step": 10 * epoch, "top1": value, **common} for name, epoch, value in rows]
    (folder / "results.json").write_text(json.dumps(results))


def test_table_and_curves(tmp_path: Path, mild: Path, capsys: pytest.CaptureFixture[str]):
    """The table has the finished runs' test errors, the JSON their curves, and both say which runs are missing and why."""
    finished(tmp_path / "runs" / "cyclical", {"cycle_epochs": 2, "lr_max": 0.05}, (0.6, 0.7, 0.72, 0.75))
    finished(tmp_path / "runs" / "constant-0.1", {"schedule": "constant", "lr_max": 0.1}, (0.6, 0.5, 0.61, 0.62), unfinished=True)
    assert study([str(mild)]) == 0
    out = capsys.readouterr().out
    (row,) = [line for line in out.splitlines() if "cyclical" in line and "│" in line]
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        *("cyclical", "cyclical 0.05 to 1e-05, c = 2 epochs", "4", "30.00", "25.00", "26.00"),
    ]
    assert "missing: constant-0.1: " in out and "is not finished" in out
    assert "missing: as-it-is: not started" in out
    assert study([str(mild), "--unfinished"]) == 0
    assert capsys.readouterr().out == "0\n2\n"
    record = json.loads((tmp_path / "runs" / "study.json").read_text())
    assert list(record["missing"]) == ["constant-0.1", "as-it-is"]
    errors = [(point["epoch"], point["test_error"]) for point in record["runs"]["cyclical"]["curves"]["swa"]]
    assert errors == [(2, pytest.approx(0.28)), (4, pytest.approx(0.25))]
    text = (tmp_path / "runs" / "study.md").read_text()
    assert "| cyclical | cyclical 0.05 to 1e-05, c = 2 epochs | 4 | 30.00 | 25.00 | 26.00 |" in text
    assert "Missing: constant-0.1" in text
    with Image.open(tmp_path / "runs" / "study.png") as image:
        colors = image.convert("RGB").getcolors(2**24)
    assert colors is not None and len(colors) > 20


def test_nothing_to_show(mild: Path):
    """A grid of which no run is finished says how to make them."""
    message = one_line(report_study, load_grid(mild))
    assert f"none of the 3 runs of {mild} is finished; bash launch/study.sh {mild} makes them" in message


def test_runs_of_another_grid(tmp_path: Path, mild: Path):
    """A folder whose run was made with other settings than the grid now says, or on other images, is refused."""
    finished(tmp_path / "runs" / "cyclical", {"cycle_epochs": 2, "lr_max": 0.07}, (0.6, 0.7, 0.72, 0.75))
    message = one_line(report_study, load_grid(mild))
    assert "has swa.lr_max 0.07" in message and "says 0.05" in message
    other = make_grid(tmp_path, runs={"cyclical": None, "other": None})
    finished(tmp_path / "runs" / "other", {}, (0.6, 0.7, 0.72, 0.75), fingerprint="g")
    assert "have different training images" in one_line(report_study, load_grid(other))


def test_runs_that_differ_in_more_than_the_grid_says(tmp_path: Path):
    """After a change of the base between two runs the plot would show two things at once; the setting is named."""
    grid = make_grid(tmp_path, runs={"one": {"swa.lr_max": 0.1}, "two": {"swa.lr_max": 0.2}})
    for name, rate in (("one", 0.1), ("two", 0.2)):
        finished(tmp_path / "runs" / name, {"lr_max": rate}, (0.6, 0.7, 0.72, 0.75))
    report_study(load_grid(grid))
    path = tmp_path / "runs" / "two" / "config.yaml"
    path.write_text(path.read_text().replace("global_batch_size: 256", "global_batch_size: 512"))
    message = one_line(report_study, load_grid(grid))
    assert f"{tmp_path}/runs/one has global_batch_size 256, {tmp_path}/runs/two has 512" in message


# ------------------------------------------------------------------------------------------------------------ launchers


def launcher(folder: Path, failing: str = "nothing", code: int = 7) -> dict[str, str]:
    """study.sh and study.sbatch in a project of their own whose single_node.sh writes down what it is called with, and fails for
    a run of that name with that code. The program is a stand-in that says what `imagenet-swa study` would of three unfinished
    runs.
    """
    (folder / "launch").mkdir()
    for name in ("study.sh", "study.sbatch", "stoppable.sh"):
        (folder / "launch" / name).write_text((PROJECT / "launch" / name).read_text())
    called = 'printf "%s|" "$@" >> called; echo >> called; case "$*" in *FAILING*) exit CODE ;; esac\n'
    (folder / "launch" / "single_node.sh").write_text(called.replace("FAILING", failing).replace("CODE", str(code)))
    program = folder / "bin" / "imagenet-swa"
    program.parent.mkdir()
    program.write_text(
        '#!/usr/bin/env bash\ncase "$*" in\n*--unfinished) printf "0\\n1\\n3\\n" ;;\n'
        '*--flags*) printf "base.yaml\\n--output=runs/run %s\\n--data.train=a b\\n" "$4" ;;\n*) echo "table of $2" ;;\nesac\n'
    )
    program.chmod(0o755)
    (folder / "grid.yaml").write_text("")
    return {"FIRST": str(program.parent)}


def launch(folder: Path, script: str, *arguments: str, failing: str = "nothing", code: int = 7, **environment: str) -> Any:
    environment |= launcher(folder, failing, code)
    command = ["bash", "-c", 'PATH="$FIRST:$PATH" exec bash "$@"', "bash", f"launch/{script}", *arguments]
    return run(command, cwd=folder, timeout=30, **environment)


def test_one_after_the_other(tmp_path: Path):
    """study.sh starts every run that is not finished with its own arguments, blanks and all, and the user's after them, then
    shows the table.
    """
    done = launch(tmp_path, "study.sh", "--num_processes", "2", "grid.yaml", "--data.val", "x y")
    assert done.returncode == 0, done.stderr
    wanted = [f"--num_processes|2|base.yaml|--output=runs/run {k}|--data.train=a b|--data.val|x y|" for k in (0, 1, 3)]
    assert (tmp_path / "called").read_text().splitlines() == wanted
    assert done.stdout.splitlines()[-1] == "table of grid.yaml"


def test_a_failed_run_stops_no_other(tmp_path: Path):
    """After a run that fails the others go on; the end names it, with exit code 1, below the table of the rest."""
    done = launch(tmp_path, "study.sh", "grid.yaml", failing="run\\ 1")
    assert done.returncode == 1
    assert len((tmp_path / "called").read_text().splitlines()) == 3
    assert done.stdout.splitlines()[-1] == "table of grid.yaml"
    assert done.stderr.splitlines()[-2:] == ["study.sh: 1 of 3 runs failed:", "  runs/run 1 (exit code 7)"]


@pytest.mark.parametrize("code", [85, 130])
def test_a_stop_stops_all(tmp_path: Path, code: int):
    """After a run that was stopped as asked, or by a second Ctrl-C, no other starts; the exit code is that run's."""
    done = launch(tmp_path, "study.sh", "grid.yaml", failing="run\\ 1", code=code)
    assert done.returncode == code
    assert len((tmp_path / "called").read_text().splitlines()) == 2
    assert done.stdout.splitlines()[-1].startswith("== 2 of 3: ")


def test_all_failed(tmp_path: Path):
    """Where every run fails the end says so."""
    done = launch(tmp_path, "study.sh", "grid.yaml", failing="base")
    assert done.returncode == 1
    assert "3 of 3 runs failed" in done.stderr


def test_a_task_of_the_array(tmp_path: Path):
    """study.sbatch starts the run whose number SLURM gives it."""
    done = launch(tmp_path, "study.sbatch", "grid.yaml", "--seed", "4", SLURM_ARRAY_TASK_ID="2")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "called").read_text() == "base.yaml|--output=runs/run 2|--data.train=a b|--seed|4|\n"


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("study.sh", [], "no such grid: (none given)"),
        ("study.sh", ["nowhere.yaml"], "no such grid: nowhere.yaml"),
        ("study.sh", ["--num_processes", "0", "grid.yaml"], "--num_processes wants a number of at least 1, got '0'"),
        ("study.sh", ["grid.yaml", "--output=x"], "leave --output out"),
        ("study.sh", ["grid.yaml", "--output", "x"], "leave --output out"),
        ("study.sbatch", [], "no such grid: (none given)"),
        ("study.sbatch", ["grid.yaml"], "this is no array; submit with --array=0-N"),
    ],
)
def test_what_launchers_refuse(tmp_path: Path, script: str, arguments: Sequence[str], words: str):
    """What cannot work is named in one line, with exit code 2, before any run starts."""
    done = launch(tmp_path, script, *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert not (tmp_path / "called").exists()
