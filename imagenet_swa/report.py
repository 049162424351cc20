"""Finished or running runs -> result table beside the paper's, trajectory plot, Markdown. Reads files only."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import yaml

from imagenet_swa.config import InputError
from imagenet_swa.data.imagenet import PAPER_TABLE_2
from imagenet_swa.schedule import learning_rate

# The networks of a run, in the order of the table. "swa" is Alg. 1: the pretrained weights count as its first model.
TITLES = {
    "pretrained": "pretrained",
    "capture": "capture",
    "swa": "SWA (Alg. 1)",
    "swa_without_pretrained": "SWA, captures only",
}
COLUMNS = ("network", "epochs", "top-1 %", "top-5 %", "NLL", "gain, points", "paper top-1 %")


@dataclass(frozen=True)
class RunFiles:
    """What a run folder holds for the report."""

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    results: list[dict[str, Any]]
    metrics: list[dict[str, Any]]

    def result(self, name: str, epoch: int | None = None) -> dict[str, Any] | None:
        """The evaluation of a network, the latest where no epoch is given; None if there was none."""
        found = [r for r in self.results if r["name"] == name and epoch in (None, r["epoch"])]
        return max(found, key=lambda r: r["epoch"], default=None)


def load_run(folder: Path) -> RunFiles:
    """Read a run folder.

    Raises:
        InputError: it holds no run, or nothing was evaluated yet.
    """
    config = _read(folder / "config.yaml", yaml.safe_load)
    environment = _read(folder / "environment.json", json.loads)
    results = _read(folder / "results.json", json.loads)
    metrics_file = folder / "metrics.jsonl"
    lines = metrics_file.read_text().splitlines() if metrics_file.exists() else []
    metrics = [line for line in map(_parse_line, lines) if line is not None]
    return RunFiles(folder, config, environment, results, metrics)


def _read(path: Path, parse: Callable[[str], Any]) -> Any:
    try:
        content = parse(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path.parent} holds no evaluated run: {path} is missing") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not content:
        raise InputError(f"{path.parent} holds no evaluated run: {path} is empty")
    return content


def _parse_line(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:  # the last line of a run that is being written or was killed
        return None


# ---------------------------------------------------------------------------------------------------------- table


def table_rows(run: RunFiles) -> list[tuple[str, ...]]:
    """A row per evaluated network, cells as in `COLUMNS`: pretrained, captures, then the averages by epoch."""
    baseline = run.result("pretrained")
    order = list(TITLES)
    ranked = sorted(run.results, key=lambda r: (max(1, order.index(r["name"])) if r["epoch"] else 0, r["epoch"]))
    averages = [r for r in ranked if r["name"].startswith("swa")]
    averages.sort(key=lambda r: (r["epoch"], order.index(r["name"])))
    others = [r for r in ranked if not r["name"].startswith("swa")]
    return [_row(run, result, baseline) for result in others + averages]


def _row(run: RunFiles, result: dict[str, Any], baseline: dict[str, Any] | None) -> tuple[str, ...]:
    gain = f"{100 * (result['top1'] - baseline['top1']):+.2f}" if baseline and result is not baseline else ""
    return (
        TITLES[result["name"]],
        str(result["epoch"]) if result["epoch"] else "",
        f"{100 * result['top1']:.2f}",
        f"{100 * result['top5']:.2f}",
        f"{result['nll']:.4f}",
        gain,
        paper_figure(run.config["model"]["name"], result["name"], result["epoch"]),
    )


def paper_figure(model_name: str, network: str, epoch: int) -> str:
    """Table 2's cell for this network as text, "" where the paper has none."""
    row = PAPER_TABLE_2.get(model_name.partition(".")[0], {})
    key = "pretrained" if network == "pretrained" else f"swa {epoch}" if network.startswith("swa") else ""
    if key not in row:
        return ""
    value, spread = row[key]
    return f"{value:.2f}" if spread is None else f"{value:.2f} ± {spread:.2f}"


def markdown_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; columns that are empty in every row are left out."""
    kept = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    lines = [[columns[i] for i in kept], ["---" if i == 0 else "---:" for i in kept]]
    lines += [[row[i] for i in kept] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def print_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """A table on stdout, without the columns that are empty in every row."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    kept = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    table = Table()
    for i in kept:
        table.add_column(columns[i], justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*[escape(row[i]) for i in kept])
    # Wide enough for every cell where the output is a file, whatever terminal it came from.
    Console(width=None if sys.stdout.isatty() else 140).print(table)


# --------------------------------------------------------------------------------------------------------- report


def write_report(folder: Path) -> Path:
    """Write report.md and trajectory.png into the run folder and return the former's path."""
    run = load_run(folder)
    plot_trajectory(run, folder / "trajectory.png")
    path = folder / "report.md"
    path.write_text(_report_text(run))
    return path


def _report_text(run: RunFiles) -> str:
    model, swa, data = run.config["model"], run.config["swa"], run.environment["data"]
    versions = run.environment["versions"]
    num_images = run.results[0]["num_images"]
    machine = ", ".join(run.environment["gpus"]) or run.environment["cpu"]
    lines = [
        f"# {model['name']}: {swa['num_epochs']} epochs of SWA fine-tuning",
        "",
        markdown_table(COLUMNS, table_rows(run)),
        "",
        f"{num_images:,} validation images, each counted once. Gains are over the pretrained network measured in this pipeline. "
        "SWA (Alg. 1) counts the pretrained weights as the first model of the average; "
        "*captures only* leaves them out. Captures are the weights at the minimum of each learning-rate cycle.",
        "",
        "![learning rate and top-1 against step](trajectory.png)",
        "",
        f"- learning rate: {swa['schedule']}, {swa['lr_max']:g} to {swa['lr_min']:g}, epochs per cycle: {swa['cycle_epochs']}; "
        f"global batch {run.config['global_batch_size']}, seed {run.config['seed']}",
        f"- training images: {data['train']['num_images']:,}, fingerprint {data['train']['fingerprint'][:16]}; "
        f"validation images: {data['val']['num_images']:,}, fingerprint {data['val']['fingerprint'][:16]}",
        f"- machine: {machine}; processes: {run.environment['world_size']}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]
    num_left_out = max(result.get("num_left_out", 0) for result in run.results)
    if num_left_out:
        lines.append(f"- **{num_left_out} validation images were left out**: they cannot be decoded (bad-images-rank-*.tsv)")
    if paper_figure(model["name"], "pretrained", 0):
        lines.append(
            "- paper: Izmailov et al. 2018, Table 2, mean ± standard deviation of 3 runs; its pretrained column is from the "
            "torchvision documentation of its time, not a measurement, so compare gains rather than levels"
        )
    return "\n".join(lines) + "\n"


def learning_rates(run: RunFiles) -> tuple[list[int], list[float]]:
    """The steps done so far, counted from 1, and the rate of each: the logged lines alone would cut off the cycles' peaks."""
    logged = [line for line in run.metrics if line["kind"] == "train"]
    if not logged:
        return [], []
    steps = list(range(1, logged[-1]["step"] + 1))
    swa = run.config["swa"]
    cycle_steps = swa["cycle_epochs"] * round(logged[-1]["step"] / logged[-1]["epoch"])
    rule = {"schedule": swa["schedule"], "cycle_steps": cycle_steps, "lr_max": swa["lr_max"], "lr_min": swa["lr_min"]}
    return steps, [learning_rate(step - 1, **rule) for step in steps]


def plot_trajectory(run: RunFiles, path: Path) -> None:
    """Learning rate and top-1 against the step, captures and averages marked (the paper's Fig. 2)."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 5.5), height_ratios=(1, 2), layout="constrained")
    above.plot(*learning_rates(run), color="tab:gray", linewidth=1)
    above.set_ylabel("learning rate")
    styles = {"pretrained": ("k", "s"), "capture": ("tab:blue", "o"), "swa": ("tab:red", "*")}
    styles["swa_without_pretrained"] = ("tab:orange", "D")
    for name, (color, marker) in styles.items():
        points = sorted((r["step"], 100 * r["top1"]) for r in run.results if r["name"] == name)
        if points:
            line = "-" if name == "capture" else ":"
            below.plot(*zip(*points, strict=True), line, color=color, marker=marker, label=TITLES[name], markersize=7)
    below.set_xlabel("step")
    below.set_ylabel("top-1 accuracy, %")
    below.legend()
    below.grid(alpha=0.3)
    figure.suptitle(run.config["model"]["name"])
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


# ------------------------------------------------------------------------------------------------------ many runs

RUN_COLUMNS = ("run", "seed", "pretrained", "last capture", "SWA (Alg. 1)", "SWA, captures only", "SWA - last capture")


def compare_runs(runs: list[RunFiles]) -> list[tuple[str, ...]]:
    """A row per run with final top-1 in per cent, cells as in `RUN_COLUMNS`, and a last row mean ± standard deviation."""
    rows, numbers = [], []
    for run in runs:
        last_epoch = run.config["swa"]["num_epochs"]
        results = [run.result(name, 0 if name == "pretrained" else last_epoch) for name in TITLES]
        if any(result is None for result in results):
            wanted = f"wanted a result after epoch {last_epoch} for each of {', '.join(TITLES.values())}"
            raise InputError(f"{run.folder} is not finished; {wanted}")
        top1 = [100 * result["top1"] for result in results if result is not None]
        numbers.append([*top1, top1[2] - top1[1]])
        cells = [f"{value:.2f}" for value in top1] + [f"{top1[2] - top1[1]:+.2f}"]
        rows.append((run.folder.name, str(run.config["seed"]), *cells))
    if len(runs) > 1:
        columns = list(zip(*numbers, strict=True))
        cells = [f"{mean(column):.2f} ± {stdev(column):.2f}" for column in columns]
        better = sum(row[-1] > 0 for row in numbers)
        rows.append(("mean ± std", f"SWA ahead in {better} of {len(runs)}", *cells))
    return rows
