"""Results as rows of text for people, and such rows as Markdown or on the terminal."""

import sys
from statistics import mean, stdev
from typing import Any

from imagenet_swa.config import InputError
from imagenet_swa.report.paper import paper_figure
from imagenet_swa.report.runs import TITLES, RunFiles

COLUMNS = ("network", "epochs", "top-1 %", "top-5 %", "NLL", "gain, points", "paper top-1 %")
RUN_COLUMNS = ("run", "seed", "start", "last capture", "SWA (Alg. 1)", "SWA, captures only", "SWA - last capture")
SGD_COLUMNS = ("run", "seed", "epochs", "SGD")


def table_rows(run: RunFiles) -> list[tuple[str, ...]]:
    """A row per evaluated network, cells as in `COLUMNS`: pretrained, captures, then the averages by epoch."""
    baseline = None if run.is_sgd_only else run.result("pretrained")
    order = list(TITLES)
    ranked = sorted(run.results, key=lambda r: (min(1, order.index(r["name"])), r["epoch"], order.index(r["name"])))
    others = [r for r in ranked if not r["name"].startswith("swa")]
    averages = [r for r in ranked if r["name"].startswith("swa")]
    return [_row(run, result, baseline) for result in others + averages]


def _row(run: RunFiles, result: dict[str, Any], baseline: dict[str, Any] | None) -> tuple[str, ...]:
    gain = f"{100 * (result['top1'] - baseline['top1']):+.2f}" if baseline and result is not baseline else ""
    return (
        run.title(result["name"]),
        epochs_text(result["epoch"]),
        f"{100 * result['top1']:.2f}",
        f"{100 * result['top5']:.2f}",
        f"{result['nll']:.4f}",
        gain,
        paper_figure(run.network, result["name"], result["epoch"], num_classes=run.config["model"]["num_classes"]),
    )


def epochs_text(epoch: float) -> str:
    """`10`, `2.75` within an epoch, nothing for 0."""
    if not epoch:
        return ""
    return str(epoch) if isinstance(epoch, int) else f"{epoch:.2f}"


def compare_runs(runs: list[RunFiles]) -> list[tuple[str, ...]]:
    """A row per run with final top-1 in per cent, cells as in `RUN_COLUMNS`, and a last row mean ± standard deviation."""
    rows, numbers = [], []
    for run in runs:
        if run.is_sgd_only:
            raise InputError(f"{run.folder} averaged nothing and has no place beside runs of SWA in one table")
        top1 = [100 * result["top1"] for result in run.final_results().values()]
        numbers.append([*top1, top1[2] - top1[1]])
        cells = [f"{value:.2f}" for value in top1] + [f"{top1[2] - top1[1]:+.2f}"]
        rows.append((run.folder.name, str(run.seed), *cells))
    if len(runs) > 1:
        columns = list(zip(*numbers, strict=True))
        better = sum(row[-1] > 0 for row in numbers)
        cells = [*map(mean_and_std, columns[:-1]), mean_and_std(columns[-1], "+")]
        rows.append((f"mean ± std; SWA ahead of its last capture in {better} of {len(runs)}", "", *cells))
    return rows


def compare_sgd_runs(runs: list[RunFiles]) -> list[tuple[str, ...]]:
    """A row per run of SGD alone, cells as in `SGD_COLUMNS`, and a last row mean ± standard deviation."""
    results = [run.final_results()["pretrained"] for run in runs]
    top1 = [100 * result["top1"] for result in results]
    rows = [
        (run.folder.name, str(run.seed), epochs_text(result["epoch"]), f"{value:.2f}")
        for run, result, value in zip(runs, results, top1, strict=True)
    ]
    return [*rows, ("mean ± std", "", "", mean_and_std(top1))] if len(runs) > 1 else rows


def mean_and_std(values: Any, sign: str = "") -> str:
    """`76.97 ± 0.05`, with the sample standard deviation; a single value alone."""
    middle = f"{mean(values):{sign}.2f}"
    return f"{middle} ± {stdev(values):.2f}" if len(values) > 1 else middle


def markdown_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; columns that are empty in every row are left out."""
    kept = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    lines = [[_markdown_cell(columns[i]) for i in kept], ["---" if i == 0 else "---:" for i in kept]]
    lines += [[_markdown_cell(row[i]) for i in kept] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _markdown_cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("](", "]\\(")


def print_table(columns: tuple[str, ...], rows: list[tuple[str, ...]], title: str | None = None) -> None:
    """A table on stdout, without the columns that are empty in every row."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    kept = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    table = Table()
    for i in kept:
        table.add_column(escape(columns[i]), justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*[escape(row[i]) for i in kept])
    # Wide enough for every cell where the output is a file, whatever terminal it came from.
    console = Console(width=None if sys.stdout.isatty() else 160)
    if title is not None:
        console.print(escape(title), highlight=False)
    console.print(table)
