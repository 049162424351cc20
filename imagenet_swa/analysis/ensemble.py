"""The ensemble of a run's captures beside the average of their weights: how far apart, how good, how calibrated (sec. 3.5)."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from imagenet_swa.analysis.answers import (
    ENSEMBLE,
    NUM_BINS,
    Answer,
    Answers,
    ask,
    fitting,
    gain_cells,
    make_output,
    reliability,
    top1_gain,
)
from imagenet_swa.analysis.average_plots import plot_reliability
from imagenet_swa.analysis.captures import RunWeights
from imagenet_swa.analysis.significance import paired_bootstrap
from imagenet_swa.analysis.soups import averaged_run
from imagenet_swa.config import Config, require
from imagenet_swa.files import write_atomically
from imagenet_swa.report import markdown_table
from imagenet_swa.session import Session

SWA, WITHOUT_PRETRAINED = "swa", "swa_without_pretrained"
TITLES = {SWA: "SWA (Alg. 1)", WITHOUT_PRETRAINED: "SWA, captures only", ENSEMBLE: "ensemble of the captures"}
# Sec. 3.5: PreResNet-164 on CIFAR-100, captures of 20 epochs of FGE, SWA the average of the same weights.
PAPER = {
    "network": "PreResNet-164, CIFAR-100",
    "consecutive": {"mean_distance": 0.126, "largest_same_label": 0.8733},
    "ensemble_and_swa": {"mean_distance": 0.079, "same_label": 0.9526},
}
# Pairs whose second network is measured against the first.
GAINS = ((SWA, ENSEMBLE), ("last capture", SWA), ("last capture", ENSEMBLE), (WITHOUT_PRETRAINED, ENSEMBLE))
NLL_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class EnsembleSettings:
    """How the ensemble of a run's captures is compared with their average"""

    networks_per_pass: int = 16
    """Networks in the device's memory at a time; more than that take several passes over the validation images, and the
    members' probabilities wait in host memory. The results are the same."""
    output: Path | None = None
    """Folder of ensemble.json, ensemble.md and reliability.png; default: RUN/ensemble."""

    def __post_init__(self) -> None:
        require(self.networks_per_pass >= 1, f"ensemble.networks_per_pass must be at least 1, got {self.networks_per_pass}")


def ensemble(config: Config, settings: EnsembleSettings, say: Callable[[str], None] = print) -> Path:
    """Compare the ensemble of all captures of the run in `config.output` with SWA; returns the path of ensemble.md.

    The ensemble's class probabilities are the mean of the captures' (after softmax); every network keeps the BatchNorm
    statistics that the run gave it. Every validation image counts once, on any number of ranks.

    Raises:
        InputError: no finished run with at least two captures and its averages, or weights of another network.
    """
    run = averaged_run(config.output, at_least=2)
    averages = {name: _average_file(run, name) for name in (SWA, WITHOUT_PRETRAINED)}
    session = Session.open(config, evaluation_only=True)
    folder = make_output(session, settings.output or config.output / "ensemble", "ensemble.output")
    say = say if session.runtime.is_main else lambda _line: None
    say(f"{len(run.captures)} captures, their ensemble, and their average with and without the pretrained weights")
    members = {capture.name: partial(fitting, session, capture.path) for capture in run.captures}
    others = {name: partial(fitting, session, path) for name, path in averages.items()}
    answers = ask(session, members, others, networks_per_pass=settings.networks_per_pass, say=say)
    if session.runtime.is_main:
        record = compare(answers, list(members), seed=config.seed) | {"network": config.model.name, "run": str(config.output)}
        _write(record, folder)
        say("\n\n".join(_tables(record)))
        say(f"report: {folder / 'ensemble.md'}\nplot:   {folder / 'reliability.png'}")
    session.runtime.barrier()
    return folder / "ensemble.md"


def _average_file(run: RunWeights, name: str) -> Path:
    path = run.folder / "averages" / f"{name.replace('_', '-')}-epoch-{run.last_result['epoch']:02d}.safetensors"
    require(path.is_file(), f"{run.folder} is not complete: {path} is missing; it is what the ensemble is compared with")
    return path


# ---------------------------------------------------------------------------------------------------------- numbers


def compare(answers: Answers, members: list[str], *, seed: int) -> dict[str, Any]:
    """All that the comparison shows, as plain values.

    Args:
        answers: of the members, the ensemble, and both averages.
        members: the captures' names in order.
        seed: of the bootstrap.
    """
    consecutive = [_pair(answers, *pair) for pair in pairwise(members)]
    gains = [{"of": of, "over": over} | gain(answers.of[_named(over, members)], answers.of[of], seed=seed) for over, of in GAINS]
    same = [pair["same_label"] for pair in consecutive]
    return {
        "num_images": len(answers.of[ENSEMBLE].labels),
        "num_left_out": answers.num_left_out,
        "num_passes": answers.num_passes,
        "networks": [{"name": name, "title": TITLES.get(name, name)} | _quality(answer) for name, answer in answers.of.items()],
        "consecutive": {
            "pairs": consecutive,
            "mean_distance": fmean(pair["mean_distance"] for pair in consecutive),
            "same_label": fmean(same),
            "largest_same_label": max(same),
        },
        "ensemble_and": {name: _pair(answers, ENSEMBLE, name) for name in (SWA, WITHOUT_PRETRAINED)},
        "gains": gains,
        "paper": PAPER,
    }


def _named(name: str, members: list[str]) -> str:
    return members[-1] if name == "last capture" else name


def _pair(answers: Answers, first: str, second: str) -> dict[str, Any]:
    return {
        "first": first,
        "second": second,
        "mean_distance": float(answers.distances[first, second].mean()),
        "same_label": answers.same_label(first, second),
    }


def _quality(answer: Answer) -> dict[str, Any]:
    bins = reliability(answer.confidence, answer.correct)
    return {
        "num_correct": int(answer.correct.sum()),
        "top1": float(answer.correct.mean()),
        "nll": answer.nll,
        "expected_calibration_error": bins.expected_calibration_error,
        "mean_confidence": float(answer.confidence.mean()),
        "reliability": {name: values.tolist() for name, values in vars(bins).items()},
    }


def gain(over: Answer, of: Answer, *, seed: int) -> dict[str, Any]:
    """What the second network has over the first on the same images: accuracy with McNemar's test, and NLL (negative is
    better), both with the paired bootstrap's 95 % interval.
    """
    nll = paired_bootstrap(over.label_log_prob - of.label_log_prob, seed=seed, num_resamples=NLL_RESAMPLES)
    return top1_gain(over.correct, of.correct, seed=seed) | {"nll": asdict(nll)}


# ------------------------------------------------------------------------------------------------------------ words


def _write(record: dict[str, Any], folder: Path) -> None:
    write_atomically(folder / "ensemble.json", json.dumps(record, indent=1))
    plot_reliability(record, folder / "reliability.png")
    write_atomically(folder / "ensemble.md", ensemble_text(record))


def _tables(record: dict[str, Any]) -> tuple[str, str, str]:
    """Quality, distances, and gains."""
    paper = f"paper: mean norm ({record['paper']['network']})"
    return (
        markdown_table(("network", "top-1 %", "NLL", "calibration error"), [_network_row(n) for n in record["networks"]]),
        markdown_table(("networks", "mean norm", "same label %", paper, "paper: same label %"), _distance_rows(record)),
        markdown_table(("network", "over", "points [95 %]", "McNemar p", "NLL [95 %]"), [_gain_row(g) for g in record["gains"]]),
    )


def ensemble_text(record: dict[str, Any]) -> str:
    """The comparison as Markdown."""
    quality, distances, gains = _tables(record)
    lines = [
        f"# {record['network']}: the ensemble of {len(record['consecutive']['pairs']) + 1} captures and their average",
        "",
        quality,
        "",
        f"{record['num_images']:,} validation images, each counted once. The ensemble's class probabilities are the mean of the "
        "captures' after softmax. Captures keep the BatchNorm statistics of their training, the averages those recomputed for "
        f"them. Calibration error: {NUM_BINS} bins of equal width by confidence (the probability of the most probable class), "
        "and the mean over images of the distance between accuracy and mean confidence of the image's bin (Guo et al. 2017).",
        "",
        "## How far apart",
        "",
        distances,
        "",
        "Mean norm: the L2 norm of the difference of two networks' class probabilities, mean over images. The paper's figures "
        "are of section 3.5, with captures of 20 epochs of Fast Geometric Ensembling, whose average leaves the weights before "
        "them out.",
        "",
        "## Gains",
        "",
        gains,
        "",
        "On the same images; intervals by the paired bootstrap, and so of this set of images alone: another seed moves further. "
        "A negative difference of NLL is a gain.",
        "",
        "![accuracy against confidence](reliability.png)",
    ]
    if record["num_left_out"]:
        lines += ["", f"**{record['num_left_out']} validation images were left out**: they cannot be decoded."]
    return "\n".join(lines) + "\n"


def _network_row(network: dict[str, Any]) -> tuple[str, ...]:
    error = network["expected_calibration_error"]
    return network["title"], f"{100 * network['top1']:.2f}", f"{network['nll']:.4f}", f"{error:.4f}"


def _distance_rows(record: dict[str, Any]) -> list[tuple[str, ...]]:
    consecutive, paper = record["consecutive"], record["paper"]
    rows: list[tuple[str, ...]] = [
        (f"{p['first']} and {p['second']}", f"{p['mean_distance']:.4f}", f"{100 * p['same_label']:.2f}", "", "")
        for p in consecutive["pairs"]
    ]
    same = f"{100 * consecutive['same_label']:.2f}, at most {100 * consecutive['largest_same_label']:.2f}"
    theirs = paper["consecutive"]
    beside = f"{theirs['mean_distance']:.3f}", f"at most {100 * theirs['largest_same_label']:.2f}"
    rows.append(("consecutive captures, mean", f"{consecutive['mean_distance']:.4f}", same, *beside))
    for name, pair in record["ensemble_and"].items():
        theirs = paper["ensemble_and_swa"] if name == WITHOUT_PRETRAINED else None
        beside = (f"{theirs['mean_distance']:.3f}", f"{100 * theirs['same_label']:.2f}") if theirs else ("", "")
        title = f"ensemble and {TITLES[name]}"
        rows.append((title, f"{pair['mean_distance']:.4f}", f"{100 * pair['same_label']:.2f}", *beside))
    return rows


def _gain_row(gain: dict[str, Any]) -> tuple[str, ...]:
    of: str = gain["of"]
    over: str = gain["over"]
    nll = gain["nll"]
    return (
        TITLES.get(of, of),
        TITLES.get(over, over),
        *gain_cells(gain),
        f"{nll['mean']:+.4f} [{nll['low']:+.4f}, {nll['high']:+.4f}]",
    )
