"""Pictures of runs and of learning-rate schedules."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from imagenet_swa.config import Config, SwaConfig, require
from imagenet_swa.files import save_figure
from imagenet_swa.report.runs import TITLES, RunFiles
from imagenet_swa.schedule import make_schedule

MAX_STEPS = 1_000_000  # of a picture; of longer runs every second, third, ...
MAX_MARKS = 400  # captures that are drawn one by one
STYLES = {
    "pretrained": ("k", "s"),
    "capture": ("tab:blue", "o"),
    "swa": ("tab:red", "*"),
    "swa_without_pretrained": ("tab:orange", "D"),
}

# The learning rates of the paper's experiments (sec. 4 and appendix); epochs of 100 steps are enough to see the shape.
PAPER_SCHEDULES: dict[str, SwaConfig] = {
    "ImageNet: cyclical, c = 1 epoch": SwaConfig(lr_max=1e-3, lr_min=1e-5, num_epochs=10),
    "PyramidNet-272: cyclical, c = 3": SwaConfig(
        lr_max=0.05, lr_min=0.001, cycle_epochs=3, num_epochs=150, report_epochs=(75, 150)
    ),
    "VGG-16, WRN-28-10: constant": SwaConfig(schedule="constant", lr_max=0.01, num_epochs=150, report_epochs=(150,)),
    "SGD of PreResNet, WRN: three parts": SwaConfig(
        schedule="three_part", lr_max=0.1, lr_min=0.001, num_epochs=200, start_epoch=200, cycle_epochs=50, report_epochs=(200,)
    ),
    "Shake-Shake: piece of a cosine, c = 100": SwaConfig(
        schedule="cosine",
        lr_max=0.2,
        cycle_epochs=100,
        budget_epochs=1800,
        cosine_start_epoch=1600,
        num_epochs=900,
        report_epochs=(900,),
    ),
    "FGE (sec. 3.5): triangular, c = 2": SwaConfig(
        schedule="triangular", lr_max=0.05, lr_min=0.0005, cycle_epochs=2, num_epochs=20, report_epochs=(10, 20)
    ),
}


def learning_rates(run: RunFiles) -> tuple[list[int], list[float]]:
    """The steps done so far, counted from 1, and the rate of each: the logged lines alone would cut off the cycles' peaks."""
    logged = [line for line in run.metrics if line["kind"] == "train"]
    schedule = run.schedule
    if not logged or schedule is None:
        return [], []
    last = logged[-1]["step"]
    steps = list(range(1, last + 1, -(-last // MAX_STEPS) or 1))
    return steps, [schedule.learning_rate(step - 1) for step in steps]


def plot_trajectory(run: RunFiles, path: Path) -> None:
    """Learning rate and top-1 against the step, captures and averages marked (the paper's Fig. 2)."""
    figure, (above, below) = new_figure(2, size=(8, 5.5), height_ratios=(1, 2))
    above.plot(*learning_rates(run), color="tab:gray", linewidth=1)
    above.set_ylabel("learning rate")
    for name, (color, marker) in STYLES.items():
        points = sorted((r["step"], 100 * r["top1"]) for r in run.results if r["name"] == name)
        if points:
            line = "-" if name == "capture" else ":"
            below.plot(*zip(*points, strict=True), line, color=color, marker=marker, label=run.title(name), markersize=7)
    below.set_xlabel("step")
    below.set_ylabel("top-1 accuracy, %")
    below.legend()
    below.grid(alpha=0.3)
    figure.suptitle(run.network)
    save_figure(figure, path, dpi=120)


def plot_schedule(config: Config, steps_per_epoch: int, path: Path) -> None:
    """The learning rate at every step of a run, with the steps at which weights are captured."""
    require(steps_per_epoch >= 1, f"an epoch has at least 1 step, got {steps_per_epoch}")
    figure, (axes,) = new_figure(1, size=(8, 3.2))
    draw_schedule(axes, config.swa, steps_per_epoch)
    axes.set_xlabel(f"step ({steps_per_epoch:,} in an epoch)")
    axes.legend()
    figure.suptitle(f"{config.model.name}: {config.swa.schedule}, {config.swa.num_epochs} epochs")
    figure.savefig(path, dpi=120)


def plot_paper_schedules(path: Path, *, steps_per_epoch: int = 100) -> None:
    """All learning-rate schedules of the paper, a panel each."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    for axes, (title, swa) in zip(figure.subplots(3, 2).flat, PAPER_SCHEDULES.items(), strict=True):
        draw_schedule(axes, swa, steps_per_epoch, in_epochs=True)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch")
    figure.savefig(path, dpi=80)


def draw_schedule(axes: Any, swa: SwaConfig, steps_per_epoch: int, *, in_epochs: bool = False) -> None:
    """Rates and captures of a run on the axes; captures before the average begins are hollow."""
    schedule = make_schedule(swa, steps_per_epoch=steps_per_epoch)
    num_steps, start = swa.num_epochs * steps_per_epoch, swa.start_epoch * steps_per_epoch
    unit = steps_per_epoch if in_epochs else 1
    rates = [schedule.learning_rate(step) for step in range(num_steps)]
    axes.plot([(step + 1) / unit for step in range(num_steps)], rates, color="tab:gray", linewidth=1)
    captures = [step for step in range(1, num_steps + 1) if schedule.is_capture(step)]
    every = -(-len(captures) // MAX_MARKS) or 1
    for label, face, steps in (
        ("capture, averaged", "tab:blue", [step for step in captures if step > start]),
        ("capture, before averaging", "none", [step for step in captures if step <= start]),
    ):
        if steps := steps[::every]:
            heights = [rates[step - 1] for step in steps]
            style = {"marker": "o", "s": 14, "facecolors": face, "edgecolors": "tab:blue", "zorder": 3}
            axes.scatter([step / unit for step in steps], heights, label=label, **style)
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def plot_gains(gains: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A line per comparison: the mean gain, its interval over images (thick) and over seeds (thin), a dot per seed."""
    figure, (axes,) = new_figure(1, size=(8, 1.8 + 0.4 * len(gains)))
    for row, gain in enumerate(gains):
        y, seeds, images = len(gains) - 1 - row, gain["over_seeds"], gain["over_images"]
        marks = [
            (
                [images["low"], images["high"]],
                "-",
                {"color": "tab:red", "linewidth": 7, "alpha": 0.35},
                "95 % over images",
            ),
            (gain["values"], "o", {"color": "k", "markersize": 3}, "each seed"),
            ([gain["mean"]], "D", {"color": "tab:red", "markersize": 6, "zorder": 3}, "mean of the seeds"),
        ]
        if seeds:
            marks.append(
                (
                    [seeds["low"], seeds["high"]],
                    "|-",
                    {"color": "tab:gray", "linewidth": 1},
                    "95 % over seeds",
                )
            )
        for values, shape, style, label in marks:
            label = label if row == 0 else None
            axes.plot(values, [y] * len(values), shape, label=label, solid_capstyle="butt", **style)
    axes.axvline(0, color="k", linewidth=0.8)
    axes.set_ylim(-0.6, len(gains) - 0.4)
    axes.set_yticks(range(len(gains) - 1, -1, -1), [gain["label"] for gain in gains], fontsize=8)
    axes.set_xlabel("gain, points of top-1")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper right", ncols=4, fontsize=8)
    save_figure(figure, path, dpi=120)


def plot_seeds(
    runs: Sequence[RunFiles], baselines: Sequence[RunFiles], epochs_before: float, path: Path, *, title: str | None = None
) -> None:
    """Top-1 against epochs in all of the runs of one network: a line per seed, captures and averages; SGD alone in grey, its
    solutions as black squares. Where there are averages the picture begins below what they start from: what is earlier would
    press together what is to be seen.
    """
    figure, (axes,) = new_figure(1, size=(8, 4))
    groups = [
        (baselines, ["capture", "pretrained"], ("tab:gray", "."), 0.0, "SGD alone"),
        (baselines, ["pretrained"], STYLES["pretrained"], 0.0, "SGD at its full budget"),
        (runs, ["capture"], STYLES["capture"], epochs_before, "captures of SWA"),
        *[(runs, ["pretrained", name], STYLES[name], epochs_before, TITLES[name]) for name in ("swa", "swa_without_pretrained")],
    ]
    lowest = []
    for of_runs, names, (color, marker), offset, label in groups:
        for number, run in enumerate(of_runs):
            points = sorted((r["epoch"] + offset, 100 * r["top1"]) for r in run.results if r["name"] in names)
            if points:
                style = {"color": color, "marker": marker, "markersize": 4, "linewidth": 0.8}
                style |= {"label": None if number else label, "zorder": 3 if names == ["pretrained"] else 2}
                axes.plot(*zip(*points, strict=True), ":" if label in TITLES.values() else "-", **style)
                lowest += [min(top1 for _, top1 in points)] if of_runs is runs or names == ["pretrained"] else []
    if runs and baselines:
        axes.set_ylim(bottom=min(lowest) - 0.5)
        axes.set_xlim(left=0.9 * epochs_before)
    axes.set_xlabel("epochs, those of the start included" if epochs_before else "epochs")
    axes.set_ylabel("top-1 accuracy, %")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.suptitle(f"{title or (*runs, *baselines)[0].network}: a line per seed")
    save_figure(figure, path, dpi=100)


def new_figure(num_rows: int, *, size: tuple[float, float], **how: Any) -> tuple[Any, Sequence[Any]]:
    """A figure that no window shows, and its axes from top to bottom with a common x."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, list(figure.subplots(num_rows, 1, sharex=True, squeeze=False, **how)[:, 0])
