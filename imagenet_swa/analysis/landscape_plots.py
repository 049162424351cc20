"""Pictures of landscapes as in the paper's Figs. 1, 3, 4 and 5, from their JSON."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imagenet_swa.files import save_figure

Record = Mapping[str, Any]
PANELS = {"train_loss": ("train loss with L2 term", 1), "test_error": ("test error, %", 100)}
_COLORS = ("tab:red", "tab:blue", "tab:green", "tab:purple", "tab:orange", "tab:brown")
_MARKERS = ("*", "o", "s", "D", "^", "v")
_NUM_LEVELS = 12
_CURVATURE = 4.0  # of the levels: each interval is larger than the one below it, the last e^4 times the first


def plot(record: Record, path: Path) -> None:
    """The picture that belongs to the record's kind, as a PNG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    draw = {"rays": _draw_rays, "line": _draw_line, "plane": _draw_plane}[record["kind"]]
    figure = draw(record, pyplot)
    save_figure(figure, path, dpi=100)
    pyplot.close(figure)


def _draw_rays(record: Record, pyplot: Any) -> Any:
    """Two panels: a thin line for each direction, a bold one for their mean, a colour for each centre (Fig. 4)."""
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for (key, (title, factor)), panel in zip(PANELS.items(), panels, strict=True):
        for (centre, rays), color in zip(record["rays"].items(), _cycle(_COLORS, len(record["rays"])), strict=True):
            curves = factor * _numbers([ray[key] for ray in rays])
            label = f"{centre}, mean of {len(rays)} directions" if panel is panels[0] else None
            panel.plot(record["distance"], curves.T, color=color, linewidth=0.6, alpha=0.45)
            panel.plot(record["distance"], curves.mean(0), color=color, linewidth=2.2, label=label)
        panel.set(xlabel="distance from the centre", ylabel=title)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    _mark_widths(panels[1], record)
    return figure


def _mark_widths(panel: Any, record: Record) -> None:
    """A dotted line where each centre's test error has risen by a point, in the mean over its rays if all of them got there."""
    centres = record["widths"]["centres"]
    for (name, centre), color in zip(centres.items(), _cycle(_COLORS, len(centres)), strict=True):
        if centre["num_censored"] == 0:
            label = f"{name}: +{100 * record['widths']['rise_of_test_error']:g} point at {centre['mean']:.3g}"
            panel.axvline(centre["mean"], color=color, linestyle=":", linewidth=1.5, label=label)
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize=8)


def _draw_line(record: Record, pyplot: Any) -> Any:
    """Train loss on the left axis, test error on the right, both ends marked (Fig. 5)."""
    figure, left = pyplot.subplots(figsize=(6.5, 4), layout="constrained")
    right, line = left.twinx(), record["line"]
    ends = list(record["points"])[:2]
    places = [0.0, record["distances"][ends[0]][ends[1]]]
    for axis, (key, (title, factor)), color in zip((left, right), PANELS.items(), ("tab:blue", "tab:red"), strict=True):
        axis.plot(line["distance"], factor * _numbers(line[key]), color=color)
        axis.set_ylabel(title, color=color)
        axis.tick_params(axis="y", labelcolor=color)
        for place, end, marker in zip(places, ends, _MARKERS, strict=False):
            value = factor * _numbers([record["points"][end][key]])
            axis.plot([place], value, marker=marker, color=color, markersize=9, linestyle="none")
    for place, end in zip(places, ends, strict=True):
        left.axvline(place, color="gray", linewidth=0.8, linestyle=":")
        left.annotate(end, (place, 1), xycoords=("data", "axes fraction"), xytext=(3, -12), textcoords="offset points")
    left.set_xlabel(f"distance from {ends[0]} towards {ends[1]}")
    left.grid(alpha=0.3)
    return figure


def _draw_plane(record: Record, pyplot: Any) -> Any:
    """Two panels of filled contours, the points marked and named (Figs. 1 and 3)."""
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    spanning = list(record["points"])[:3]
    for (key, (title, factor)), panel in zip(PANELS.items(), panels, strict=True):
        values = factor * _numbers(record["grid"][key])
        levels = contour_levels(values)
        shown = np.where(np.isfinite(values), values, levels[-1] + 1)
        filled = panel.contourf(record["x"], record["y"], shown, levels, cmap="viridis_r", extend="max")
        panel.contour(record["x"], record["y"], shown, levels, colors="white", linewidths=0.4)
        bar = figure.colorbar(filled, ax=panel, ticks=levels[::2], shrink=0.9)
        bar.ax.set_yticklabels([f"{level:.3g}" for level in levels[::2]])
        for (name, place), marker in zip(record["places"].items(), _cycle(_MARKERS, len(record["places"])), strict=True):
            face, edge = ("black", "white") if name in spanning else ("white", "black")
            panel.plot(place["x"], place["y"], marker, color=face, markeredgecolor=edge, markersize=10 if marker == "*" else 7)
            side = 6 if name in spanning else -14  # names of what lies close together go apart
            text = panel.annotate(name, (place["x"], place["y"]), xytext=(5, side), textcoords="offset points", fontsize=8)
            text.set_bbox({"facecolor": "white", "alpha": 0.6, "edgecolor": "none", "pad": 1})
        panel.set(xlabel="distance in weight space", title=title, aspect="equal")
    panels[0].set_ylabel("distance in weight space")
    apart = {name: place["distance_from_plane"] for name, place in record["places"].items() if name not in spanning}
    if apart:
        listed = ", ".join(f"{name} {distance:.3g}" for name, distance in apart.items())
        figure.supxlabel(f"projected onto the plane, and how far they lie from it: {listed}", fontsize=9)
    return figure


def contour_levels(values: NDArray[np.float64], num: int = _NUM_LEVELS) -> NDArray[np.float64]:
    """Ascending levels from the lowest value to the 90th percentile of the finite ones, closest to each other at the low end,
    where the differences between solutions are.
    """
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(np.quantile(finite, 0.9))) if finite.size else (0.0, 1.0)
    if not high > low:  # a flat landscape
        high = low + max(1e-6, 1e-3 * abs(low))
    share = np.expm1(_CURVATURE * np.linspace(0, 1, num)) / np.expm1(_CURVATURE)
    return low + (high - low) * share


def _numbers(values: Any) -> NDArray[np.float64]:
    """Lists with None where a number was not finite, as an array with NaN."""
    return np.array(values, dtype=np.float64)


def _cycle(items: Sequence[str], num: int) -> list[str]:
    return [items[i % len(items)] for i in range(num)]
