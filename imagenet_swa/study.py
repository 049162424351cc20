"""A grid of runs that differ in a few settings (sec. 4.3, Fig. 6): their arguments for the launchers, one table and one plot."""

import difflib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagenet_swa.arguments import parse_config
from imagenet_swa.config import InputError, flatten, require
from imagenet_swa.files import save_figure, write_atomically
from imagenet_swa.plain import parse_yaml, printable, read_text
from imagenet_swa.report.document import json_text
from imagenet_swa.report.groups import check_same_images
from imagenet_swa.report.plots import new_figure
from imagenet_swa.report.runs import TITLES, RunFiles, load_run, settings_of
from imagenet_swa.report.tables import markdown_table, print_table

USAGE = """usage: imagenet-swa study GRID [--count | --unfinished | --flags K]

Without a flag: the table, plot and JSON of the grid's finished runs, in the grid's output folder.
  --count       the number of runs
  --unfinished  the numbers of the runs that are not finished, counted from 0, one a line
  --flags K     the arguments of launch/single_node.sh for run K, counted from 0, one a line
"""
KEYS = ("base", "output", "settings", "runs")
COLUMNS = ("run", "learning rate", "epochs", "last capture", "SWA (Alg. 1)", "SWA, captures only")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")


@dataclass(frozen=True)
class GridRun:
    """One run of a grid.

    Attributes:
        output: its folder.
        settings: what it has other than the base, by `section.setting`.
    """

    name: str
    output: Path
    settings: dict[str, Any]

    def flags(self) -> list[str]:
        """The settings as flags, `output` among them."""
        values = {"output": str(self.output), **self.settings}
        return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


@dataclass(frozen=True)
class Grid:
    """A grid file: a base configuration, a folder for all runs, and the runs."""

    path: Path
    base: Path
    output: Path
    runs: tuple[GridRun, ...]

    def arguments(self, number: int) -> list[str]:
        """What launch/single_node.sh is to be called with for a run: the configuration and its flags."""
        require(0 <= number < len(self.runs), f"{self.path} has the runs 0 .. {len(self.runs) - 1}, got {number}")
        return [str(self.base), *self.runs[number].flags()]


def study(arguments: Sequence[str]) -> int:
    """The command `imagenet-swa study`: prints, and returns the exit code."""
    if not arguments or arguments[0].startswith("-"):
        print(USAGE, end="")
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    path, rest = Path(arguments[0]), list(arguments[1:])
    if len(rest) == 2 and rest[0] == "--flags" and rest[1].isdecimal():
        print("\n".join(load_grid(path, only=int(rest[1])).arguments(int(rest[1]))))
        return 0
    grid = load_grid(path)
    if rest == ["--count"]:
        print(len(grid.runs))
    elif rest == ["--unfinished"]:
        _, missing = _finished_runs(grid)
        print("".join(f"{number}\n" for number, run in enumerate(grid.runs) if run.name in missing), end="")
    else:
        require(not rest, f"wanted nothing, --count, --unfinished or --flags K after the grid, got {' '.join(rest)}")
        report_study(grid)
    return 0


# ------------------------------------------------------------------------------------------------------- the grid file


def load_grid(path: Path, only: int | None = None) -> Grid:
    """Read a grid and check every run's settings, so that the last one does not fail after days; with `only` just that one's.

    `base` is relative to the grid's own folder; `output`, as in every configuration, to where the program runs.

    Raises:
        InputError: no such file, keys that it does not know, names that are no folder names, settings that no run takes.
    """
    content = _read_yaml(path)
    unknown = [key for key in content if key not in KEYS]
    if unknown:
        near = difflib.get_close_matches(str(unknown[0]), KEYS, n=1)
        raise InputError(
            f"{path}: unknown key {unknown[0]}{f'; did you mean {near[0]}?' if near else ''} (keys: {', '.join(KEYS)})"
        )
    for key, kind in (("base", str), ("output", str), ("runs", dict)):
        require(isinstance(content.get(key), kind) and bool(content[key]), f"{path}: {key} is missing or no {_WORDS[kind]}")
    base = Path(os.path.normpath(path.parent / content["base"]))
    try:
        is_there = base.is_file()
    except OSError:  # of a name that no file can have
        is_there = False
    shown = printable(content["base"])[:300]
    require(is_there, f"{path}: base {shown} is not there ({printable(str(base))[:500]}); it is relative to the grid's folder")
    common = _settings(path, "settings", content.get("settings") or {})
    output = Path(content["output"])
    runs = [
        GridRun(str(name), output / str(name), common | _settings(path, f"runs.{name}", settings or {}))
        for name, settings in content["runs"].items()
    ]
    grid = Grid(path, base, output, tuple(runs))
    for run in runs if only is None else runs[only : only + 1]:
        _check_run(grid, run)
    return grid


_WORDS = {str: "text", dict: "mapping"}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = parse_yaml(read_text(path))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else printable(" ".join(str(error).split()))[:500]
        raise InputError(f"the grid {path} cannot be read: {reason}") from None
    require(isinstance(content, dict), f"{path} is no grid; wanted the keys {', '.join(KEYS)}")
    return content


def _settings(path: Path, where: str, settings: Any) -> dict[str, Any]:
    """Settings as `section.setting`, however they are nested."""
    require(isinstance(settings, dict), f"{path}: {where} is {settings!r}; wanted settings such as `swa.lr_max: 0.05`")
    flat = flatten({str(key): value for key, value in settings.items()})
    for key in ("output", "config"):
        require(key not in flat, f"{path}: {where} sets {key}, which the grid decides itself")
    return flat


def _check_run(grid: Grid, run: GridRun) -> None:
    require(
        bool(_NAME.fullmatch(run.name)),
        f"{grid.path}: the run {run.name!r} cannot be a folder's name; wanted letters, digits and . _ + -, no other first",
    )
    same = [other.name for other in grid.runs if other.name.lower() == run.name.lower()]
    require(len(same) == 1, f"{grid.path}: the runs {' and '.join(same)} have the same folder where case does not count")
    for flag in run.flags():
        require(flag.isprintable(), f"{grid.path}: run {run.name}: {printable(flag)[:100]} is no setting on one line")
    try:
        parse_config(["--config", str(grid.base), *run.flags()], "imagenet-swa train", "")
    except InputError as error:
        raise InputError(f"{grid.path}: run {run.name}: {error}") from None


# ------------------------------------------------------------------------------------------------------------ results


def report_study(grid: Grid) -> Path:
    """Print the table of the finished runs, say which are missing, write study.md, study.json and study.png; returns the first.

    Raises:
        InputError: no run is finished; one was made with other settings than the grid's, or on other images.
    """
    found, missing = _finished_runs(grid)
    require(
        bool(found), f"none of the {len(grid.runs)} runs of {grid.path} is finished; bash launch/study.sh {grid.path} makes them"
    )
    check_same_images(list(found.values()), ("train", "val"))
    _check_alike(grid, list(found.values()))
    rows = [_row(name, run) for name, run in found.items()]
    title = "test error, %"
    print_table(COLUMNS, rows, title)
    record = {
        "grid": str(grid.path),
        "missing": missing,
        "runs": {name: _record(run) for name, run in found.items()},
    }
    write_atomically(grid.output / "study.json", json_text(record))
    plot_study(record, grid.output / "study.png")
    lines = [
        f"# {grid.path.stem}: {title}",
        markdown_table(COLUMNS, rows),
        "![test error of the average against epochs](study.png)",
    ]
    if missing:
        lines.append(f"Missing: {'; '.join(f'{name} ({why})' for name, why in missing.items())}.")
        for name, why in missing.items():
            print(f"missing: {name}: {why}")
    path = grid.output / "study.md"
    write_atomically(path, "\n\n".join(lines) + "\n")
    for name in ("study.md", "study.png", "study.json"):
        print(f"{name}: {grid.output / name}")
    return path


def _finished_runs(grid: Grid) -> tuple[dict[str, RunFiles], dict[str, str]]:
    """The finished runs, and why the others are none."""
    found: dict[str, RunFiles] = {}
    missing: dict[str, str] = {}
    for run in grid.runs:
        try:
            files = load_run(run.output)
            files.final_results()
        except InputError as error:
            missing[run.name] = str(error) if (run.output / "config.yaml").exists() else "not started"
            continue
        _check_made_by(grid, run, files)
        found[run.name] = files
    return found, missing


def _check_made_by(grid: Grid, run: GridRun, files: RunFiles) -> None:
    made_with = flatten(files.config)
    for key, value in run.settings.items():
        require(
            key in made_with and _plain(made_with[key]) == _plain(value),
            f"{run.output} has {key} {made_with.get(key)}, {grid.path} says {value}: move the run away or mend the grid",
        )


def _check_alike(grid: Grid, runs: Sequence[RunFiles]) -> None:
    """Raise InputError where runs differ in more than the grid's own settings, as after a change of the base between them."""
    varied = {key for run in grid.runs for key in run.settings}
    first, settings = runs[0], settings_of(runs[0])
    for run in runs[1:]:
        others = settings_of(run)
        for key in sorted(settings.keys() | others.keys()):
            same = _plain(settings.get(key)) == _plain(others.get(key))
            require(
                same or any(f"{key}.".startswith(f"{name}.") for name in varied),
                f"{first.folder} has {key} {settings.get(key)}, {run.folder} has {others.get(key)}, {grid.path} does not vary "
                "it: make them anew with one base and the same flags",
            )


def _plain(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text, the program as a number."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    try:
        return float(value)
    except (TypeError, ValueError):
        return value


def _row(name: str, run: RunFiles) -> tuple[str, ...]:
    swa, final = run.swa, run.final_results()
    cells = [
        f"{100 * (1 - final[key]['top1']):.2f}" if key in final else "" for key in ("capture", "swa", "swa_without_pretrained")
    ]
    return (name, _rate_text(run), str(swa.num_epochs), *cells)


def _rate_text(run: RunFiles) -> str:
    swa = run.swa
    if swa.schedule == "constant":
        return f"constant {swa.lr_max:g}"
    length = f"{swa.cycle_steps} steps" if swa.cycle_steps else f"{swa.cycle_epochs} epochs"
    return f"{swa.schedule} {swa.lr_max:g} to {swa.lr_min:g}, c = {length}"


def _record(run: RunFiles) -> dict[str, Any]:
    names = ("pretrained", "capture", "swa", "swa_without_pretrained")
    curves = {
        name: sorted(
            (
                {"epoch": r["epoch"], "step": r["step"], "test_error": 1 - r["top1"], "nll": r["nll"]}
                for r in run.results
                if r["name"] == name
            ),
            key=lambda point: point["step"],
        )
        for name in names
    }
    return {
        "folder": str(run.folder),
        "learning_rate": _rate_text(run),
        "seed": run.seed,
        "include_pretrained": run.swa.include_pretrained,
        "swa": run.config["swa"],
        "num_images": run.results[0]["num_images"],
        "data": run.environment["data"],
        "curves": curves,
    }


def plot_study(record: dict[str, Any], path: Path) -> None:
    """Test error of the average against epochs, a line per run (Fig. 6); what they start from is epoch 0."""
    figure, (axes,) = new_figure(1, size=(8, 5))
    colors = [f"C{number}" for number in range(10)]
    for number, (name, run) in enumerate(record["runs"].items()):
        average = "swa" if run["include_pretrained"] else "swa_without_pretrained"
        points = [*run["curves"]["pretrained"], *run["curves"][average]]
        style = {"color": colors[number % 10], "linestyle": "-" if run["swa"]["schedule"] == "constant" else "--", "marker": "."}
        axes.plot(
            [p["epoch"] for p in points],
            [100 * p["test_error"] for p in points],
            label=f"{name}: {run['learning_rate']}",
            **style,
        )
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"test error of {TITLES['swa'].partition(' ')[0]}, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    save_figure(figure, path, dpi=120)
