"""Plots of the averages' table and of the ensemble comparison, from their records."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from imagenet_swa.files import save_figure

MARKERS = {"ema": ("tab:green", "^"), "lawa": ("tab:purple", "v"), "greedy_soup": ("tab:brown", "P"), "ensemble": ("k", "X")}
# Kind of row: label of the line through them, colour, marker.
LINES = {
    "capture": ("captures themselves", "tab:blue", "o"),
    "with_pretrained": ("average with pretrained (Alg. 1)", "tab:red", "*"),
    "captures_only": ("average of captures only", "tab:orange", "D"),
}


def plot_averages(record: dict[str, Any], path: Path) -> None:
    """Test error against the number of captures: a line each for the captures and for the two averages of the first k, and to
    the right of the last a mark each for the other averages of all of them.
    """
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    rows, n = record["rows"], record["num_captures"]
    errors = {kind: [(r["num_captures"], _error(r)) for r in rows if r["kind"] == kind] for kind in ("pretrained", *LINES)}
    axes.axhline(errors["pretrained"][0][1], color="k", linestyle=":", linewidth=1, label="pretrained")
    for kind, (label, color, marker) in LINES.items():
        start = errors["pretrained"] if kind == "with_pretrained" else []  # Alg. 1 after no capture
        axes.plot(*zip(*start, *errors[kind], strict=True), "-", color=color, marker=marker, label=label, markersize=7)
    marks = [(same["kind"], same["title"], _error(row)) for row in rows for same in (row, *row["also"])]
    marks = [mark for mark in marks if mark[0] in MARKERS]
    kinds = [kind for kind, _, _ in marks]
    for place, (kind, title, error) in enumerate(marks):  # beside one another: at n they would hide each other
        color, marker = MARKERS[kind]
        x, alpha = n + (place + 1) * max(n, 5) / 40, 1 / (1 + kinds[:place].count(kind)) ** 0.5
        axes.plot([x], [error], marker, color=color, alpha=alpha, label=title, markersize=8)
    axes.set_xticks(range(0, n + 1, 1 + n // 20))
    axes.set_xlabel("captures so far; to the right of the last: other averages")
    axes.set_ylabel("test error, %")
    axes.grid(alpha=0.3)
    figure.legend(fontsize="small", loc="outside right upper")
    figure.suptitle(f"{record['network']}: averages of {n} captures")
    save_figure(figure, path, dpi=120)


def _error(row: dict[str, Any]) -> float:
    return 100 * (1 - row["top1"])


def plot_reliability(record: dict[str, Any], path: Path) -> None:
    """Accuracy against confidence, in bins, of the last capture, the ensemble and the averages; below, how full the bins are."""
    figure = Figure(figsize=(7, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot([0, 1], [0, 1], ":", color="tab:gray", label="perfectly calibrated")
    of = {network["name"]: network for network in record["networks"]}
    last = record["consecutive"]["pairs"][-1]["second"]
    colors = {last: "tab:blue", "ensemble": "k", "swa": "tab:red", "swa_without_pretrained": "tab:orange"}
    for name, color in colors.items():
        bins = of[name]["reliability"]
        filled = [i for i, number in enumerate(bins["num_images"]) if number]
        points = [[bins[what][i] for i in filled] for what in ("confidence", "accuracy")]
        error = of[name]["expected_calibration_error"]
        above.plot(*points, "o-", color=color, markersize=4, label=f"{of[name]['title']}: error {error:.4f}")
        edges = [i / len(bins["num_images"]) for i in range(len(bins["num_images"]) + 1)]
        below.stairs([number / record["num_images"] for number in bins["num_images"]], edges, color=color)
    above.set_ylabel("accuracy in the bin")
    above.legend(fontsize="small")
    above.grid(alpha=0.3)
    below.set_xlabel("confidence: probability of the most probable class")
    below.set_ylabel("share of images")
    figure.suptitle(f"{record['network']}: calibration")
    save_figure(figure, path, dpi=120)
