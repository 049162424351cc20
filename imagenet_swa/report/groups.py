"""Which runs belong together, and whether they may stand in one report."""

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imagenet_swa.config import InputError, require
from imagenet_swa.report.runs import RunFiles, settings_of

MAY_DIFFER = ("seed", "model.weights")  # of a kind's runs; folders, machines and reports are no settings of the result


@dataclass(frozen=True)
class Network:
    """All runs of one network on one data set, by seed.

    Attributes:
        swa: runs that averaged.
        sgd: runs of SGD alone, the baseline of Table 1.
        baselines: for each of `swa` the run of `sgd` to compare it with; none where there is no `sgd`.
    """

    swa: tuple[RunFiles, ...]
    sgd: tuple[RunFiles, ...]
    baselines: tuple[RunFiles, ...]

    @property
    def runs(self) -> tuple[RunFiles, ...]:
        """All of them."""
        return (*self.sgd, *self.swa)

    @property
    def model(self) -> dict[str, Any]:
        """The settings of the network."""
        return self.runs[0].config["model"]

    @property
    def name(self) -> str:
        """What it is called, with the arguments that it was built with: a quarter of a network is not that network."""
        arguments = ", ".join(f"{key} {value}" for key, value in sorted(self.model.get("kwargs", {}).items()))
        return f"{self.model['name']} ({arguments})" if arguments else self.model["name"]

    @property
    def budget(self) -> int | None:
        """Epochs of one budget: those of SGD alone."""
        return (self.sgd[0].swa.budget_epochs or self.sgd[0].swa.num_epochs) if self.sgd else None

    @property
    def epochs_before(self) -> float | None:
        """Epochs of SGD in the weights that `swa` starts from; None where that is not known."""
        return _epochs_before(self.swa[0], self.baselines[0]) if self.baselines else None

    def budgets(self, epoch: float) -> float | None:
        """What a network of `swa` has cost after so many epochs, in budgets: those of its start included."""
        return None if self.epochs_before is None or self.budget is None else (self.epochs_before + epoch) / self.budget


def group_runs(runs: Sequence[RunFiles]) -> list[Network]:
    """The runs by network, in the order in which they are given.

    Raises:
        InputError: runs that cannot stand in one report, or of which one is not finished.
    """
    _check_distinct(runs)
    for run in runs:
        run.final_results()
    kinds: dict[tuple[Any, ...], list[RunFiles]] = {}
    for run in runs:
        kinds.setdefault(_network_of(run), []).append(run)
    for of_one_network in kinds.values():
        check_same_images(of_one_network, ("train", "val"))
    by_classes: dict[int, list[RunFiles]] = {}
    for run in runs:
        by_classes.setdefault(run.config["model"]["num_classes"], []).append(run)
    for of_one_task in by_classes.values():
        check_same_images(of_one_task, ("val",))
    return [_make_network(of_one_network) for of_one_network in kinds.values()]


def _network_of(run: RunFiles) -> tuple[Any, ...]:
    model = run.config["model"]
    return model["library"], model["name"], model["num_classes"], json.dumps(model.get("kwargs", {}), sort_keys=True)


def _make_network(runs: Sequence[RunFiles]) -> Network:
    swa = _one_kind(run for run in runs if not run.is_sgd_only)
    sgd = _one_kind(run for run in runs if run.is_sgd_only)
    baselines = tuple(_baseline_of(run, sgd) for run in swa) if sgd else ()
    starts = {_epochs_before(run, baseline) for run, baseline in zip(swa, baselines, strict=False)}
    require(len(starts) < 2, f"the runs of {runs[0].network} start from SGD after different numbers of epochs: {starts}")
    return Network(swa, sgd, baselines)


def _one_kind(runs: Iterable[RunFiles]) -> tuple[RunFiles, ...]:
    """Runs by seed, which must differ in nothing else."""
    ordered = sorted(runs, key=lambda run: run.seed)
    for before, run in itertools.pairwise(ordered):
        require(
            before.seed != run.seed,
            f"{before.folder} and {run.folder} are of the same network and seed, {run.seed}; give one of them",
        )
        first, second = settings_of(before), settings_of(run)
        different = [key for key in first if key not in MAY_DIFFER and first[key] != second.get(key)]
        different += [key for key in second if key not in first]
        if different:
            key = different[0]
            raise InputError(
                f"{before.folder} has {key} {first.get(key)}, {run.folder} has {second.get(key)}; wanted runs of "
                f"{run.network} that differ in nothing but the seed: report them apart"
            )
    return tuple(ordered)


def _check_distinct(runs: Sequence[RunFiles]) -> None:
    seen: dict[Path, Path] = {}
    for run in runs:
        place = run.folder.resolve()
        require(place not in seen, f"{run.folder} is given twice; a run counts once")
        seen[place] = run.folder


def check_same_images(runs: Sequence[RunFiles], splits: Sequence[str]) -> None:
    """Raise `InputError` unless all runs saw the images of the first, and runs of one network prepared them alike."""
    words = {"train": "training", "val": "validation"}
    for run in runs[1:]:
        for split in splits:
            first, other = (r.environment["data"][split]["fingerprint"] for r in (runs[0], run))
            require(
                first == other,
                f"{runs[0].folder} and {run.folder} have different {words[split]} images "
                f"(fingerprints {first[:12]} and {other[:12]}); report data sets apart",
            )
        first, other = (r.environment.get("preprocessing") for r in (runs[0], run))
        if runs[0].network == run.network and first and other and first != other:
            key = next(key for key in first if first[key] != other.get(key))
            raise InputError(
                f"{runs[0].folder} and {run.folder} have different preprocessing: {key} {first[key]} and {other.get(key)}"
            )


def _baseline_of(run: RunFiles, sgd: Sequence[RunFiles]) -> RunFiles:
    """The run of SGD that an SWA run started from, or one of its seed."""
    weights = run.config["model"].get("weights")
    parents = Path(weights).resolve().parents if weights else ()
    started_from = [other for other in sgd if other.folder.resolve() in parents]
    found = started_from or [other for other in sgd if other.seed == run.seed]
    require(
        bool(found),
        f"{run.folder} (seed {run.seed}) has no run of SGD to be compared with: it starts from {weights}, and those given "
        f"have the seeds {', '.join(str(other.seed) for other in sgd)}",
    )
    return found[0]


def _epochs_before(run: RunFiles, baseline: RunFiles) -> float | None:
    """Epochs of SGD in the weights that a run starts from, by the name of their file; None where it tells nothing."""
    name = Path(run.config["model"].get("weights") or "").name
    if match := re.fullmatch(r"epoch-(\d+)\.safetensors", name):
        return int(match.group(1))
    if (match := re.fullmatch(r"step-(\d+)\.safetensors", name)) and baseline.steps_per_epoch:
        return int(match.group(1)) / baseline.steps_per_epoch
    return baseline.swa.num_epochs if name == "pretrained.safetensors" else None
