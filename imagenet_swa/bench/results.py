"""Blocks that `imagenet-swa bench loader` measured -> medians of ratios, table, Markdown, bar chart, JSON."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

from imagenet_swa.report import markdown_table

MAX_LABEL = 40  # letters of a loader's name in the chart
MODES = ("train", "evaluation")
COLUMNS = ("mode", "loader", "output", "images/s", "ratio", "min - max", "images/CPU-s", "CPU ratio", "min - max (CPU)")


@dataclass(frozen=True, kw_only=True)
class Block:
    """One measurement. Round 0 is the rehearsal, which no one records."""

    mode: Literal["train", "evaluation"]
    candidate: str
    round: int
    num_images: int
    seconds: float
    cpu_seconds: float


def summarise(blocks: Sequence[Block], reference: str) -> list[dict[str, Any]]:
    """Per mode and candidate: rates, and ratios to the reference's block of the same round; median, min and max each.

    Ratios are None where the reference has no block in any of the candidate's rounds.
    """
    of_reference = {(block.mode, block.round): block for block in blocks if block.candidate == reference}
    summary = []
    for mode, name in dict.fromkeys((block.mode, block.candidate) for block in blocks):
        own = [block for block in blocks if (block.mode, block.candidate) == (mode, name)]
        pairs = [(block, of_reference[mode, block.round]) for block in own if (mode, block.round) in of_reference]
        row: dict[str, Any] = {"mode": mode, "candidate": name, "rounds": len(own)}
        for kind, rate in (("images_per_second", images_per_second), ("images_per_cpu_second", images_per_cpu_second)):
            row[kind] = spread([rate(block) for block in own])
            row[f"ratio_of_{kind}"] = spread([rate(block) / rate(other) for block, other in pairs]) if pairs else None
        summary.append(row)
    return summary


def images_per_second(block: Block) -> float:
    """Of wall time."""
    return block.num_images / max(block.seconds, 1e-9)


def images_per_cpu_second(block: Block) -> float:
    """Of CPU time of all processes."""
    return block.num_images / max(block.cpu_seconds, 1e-9)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, min and max."""
    return {"median": median(values), "min": min(values), "max": max(values)}


# ---------------------------------------------------------------------------------------------------------- files


def table_rows(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row per mode and loader, cells as in `COLUMNS`: by mode, the fastest first."""
    ranked = sorted(record["summary"], key=lambda row: (MODES.index(row["mode"]), -_order(row)))
    kinds = ("images_per_second", "images_per_cpu_second")
    return [(row["mode"], row["candidate"], row["output"], *_cells(row, kinds[0]), *_cells(row, kinds[1])) for row in ranked]


def _order(row: dict[str, Any]) -> float:
    return (row["ratio_of_images_per_second"] or row["images_per_second"])["median"]


def _cells(row: dict[str, Any], kind: str) -> tuple[str, str, str]:
    ratio = row[f"ratio_of_{kind}"]
    rate = f"{row[kind]['median']:.0f}"
    return (rate, f"{ratio['median']:.2f}", f"{ratio['min']:.2f} - {ratio['max']:.2f}") if ratio else (rate, "", "")


def absent_lines(record: dict[str, Any]) -> list[str]:
    """A line per loader that was not measured, or not to the end, with the reason."""
    reasons: dict[tuple[str, str], list[str]] = {}
    for item in record["absent"]:
        reasons.setdefault((item["candidate"], item["reason"]), []).append(item["mode"])
    return [f"{name} ({', '.join(modes)}): {reason}" for (name, reason), modes in reasons.items()]


def write_results(record: dict[str, Any], folder: Path) -> None:
    """Write loader.json, loader.md and loader.png."""
    (folder / "loader.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "loader.md").write_text(_markdown(record))
    plot_ratios(record, folder / "loader.png")


def _markdown(record: dict[str, Any]) -> str:
    environment = record["environment"]
    machine = ", ".join(environment["gpus"]) or f"{environment['cpu']}, no GPU"
    num_images = ", ".join(f"{number:,} for {mode}" for mode, number in record["num_images"].items())
    lines = [
        "# Loaders",
        "",
        markdown_table(COLUMNS, table_rows(record)) if record["summary"] else "Nothing was measured.",
        "",
        f"Median over {record['settings']['rounds']} rounds{' (interrupted)' if record['interrupted'] else ''} of a block of "
        f"{record['num_images_per_block']:,} images each, taking turns. Ratios are to {record['reference']} within a round, then "
        "median, minimum and maximum. Whatever was prefetched is drained before the clock starts; the files are in memory; CPU "
        "time counts all processes. Compare float32 with float32 and uint8 with uint8.",
        "",
        "![ratios to the reference](loader.png)",
        "",
        *[f"- not measured: {line}" for line in absent_lines(record)],
        f"- images: {num_images}; batches of {record['batch_size']}; {record['num_workers']} workers, "
        f"{record['data']['prefetch']} batches prefetched",
        f"- machine: {machine}; {environment['num_cpus']} CPU cores; "
        + ", ".join(f"{name} {version}" for name, version in environment["versions"].items()),
    ]
    return "\n".join(lines) + "\n"


def _tick_label(row: dict[str, Any]) -> str:
    """Start and end of a long name, which would leave no room for bars."""
    name = row["candidate"]
    short = name if len(name) <= MAX_LABEL else f"{name[: MAX_LABEL - 18]}...{name[-15:]}"
    return f"{short} ({row['output']})"


def plot_ratios(record: dict[str, Any], path: Path) -> None:
    """A panel per mode: each loader's ratio to the reference in wall time and in CPU time, whiskers from min to max."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = [row for row in record["summary"] if row["ratio_of_images_per_second"]]
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in rows)] or ["nothing measured"]
    height = 1.2 + 0.5 * max(1, len(rows))
    figure, axes = pyplot.subplots(len(modes), 1, figsize=(8, height), squeeze=False, sharex=True, layout="constrained")
    for axis, mode in zip(axes[:, 0], modes, strict=True):
        shown = sorted((row for row in rows if row["mode"] == mode), key=_order)
        for shift, kind, label in ((0.2, "images_per_second", "images/s"), (-0.2, "images_per_cpu_second", "images/CPU-s")):
            ratios = [row[f"ratio_of_{kind}"] for row in shown]
            centres = [r["median"] for r in ratios]
            whiskers = [[r["median"] - r["min"] for r in ratios], [r["max"] - r["median"] for r in ratios]]
            places = [i + shift for i in range(len(shown))]
            axis.barh(places, centres, height=0.38, xerr=whiskers, capsize=2, label=label)
        axis.set_yticks(range(len(shown)), [_tick_label(row) for row in shown])
        axis.axvline(1, color="k", linewidth=0.8, linestyle=":")
        axis.set_title(mode)
        axis.grid(axis="x", alpha=0.3)
    axes[0, 0].legend()
    axes[-1, 0].set_xlabel(f"ratio to {record['reference']}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
