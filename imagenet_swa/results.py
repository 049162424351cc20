"""What a run has measured so far: results.json and the predictions beside it. Every rank knows it, rank 0 writes it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from imagenet_swa.config import Config, Preprocessing
from imagenet_swa.data.imagenet import NUM_VAL, published_top1
from imagenet_swa.evaluate import Evaluation
from imagenet_swa.files import write_atomically
from imagenet_swa.outbox import Outbox
from imagenet_swa.records import Records
from imagenet_swa.runtime import Runtime

FILE = "results.json"
Result = dict[str, Any]


class Results:
    """Results by name of the network and step, in the order in which they came."""

    def __init__(self, folder: Path, runtime: Runtime, records: Records, outbox: Outbox) -> None:
        self._folder, self._runtime, self._records, self._outbox = folder, runtime, records, outbox
        self._results: list[Result] = []

    def restore(self, step: int) -> None:
        """Take those up to a step from the disk, and bring metrics.jsonl to their state: a kill may have come in between."""
        found = self._runtime.from_main(saved_results(self._folder, self._records.say) if self._runtime.is_main else None)
        self._results = [result for result in found if result["step"] <= step]
        known = {(result["name"], result["step"]) for result in self._results}
        kept = self._records.forget_after(step, known)
        told = {(line.get("name"), line["step"]) for line in kept if line.get("kind") == "evaluation"}
        self._log([result for result in self._results if (result["name"], result["step"]) not in told])

    def has(self, name: str, step: int | None = None) -> bool:
        """Whether there is one of that name, at that step if one is given."""
        return any(result["name"] == name and step in (None, result["step"]) for result in self._results)

    def epochs_of(self, name: str) -> set[float]:
        """After which epochs there are results of that name."""
        return {result["epoch"] for result in self._results if result["name"] == name}

    def add(self, evaluations: dict[str, tuple[Evaluation, str, int, float]]) -> None:
        """Evaluations by name, each with its label in file names, its step and that step in epochs: say, write and log them."""
        new: list[Result] = []
        for name, (evaluation, label, step, epoch) in evaluations.items():
            summary = evaluation.summary()
            self._results = [r for r in self._results if (r["name"], r["step"]) != (name, step)]
            self._results.append({"name": name, "epoch": epoch, "step": step, **summary})
            new.append(self._results[-1])
            self._records.say(f"  {label}: top-1 {100 * summary['top1']:.2f} %, NLL {summary['nll']:.4f}")
            if self._runtime.is_main:
                path = self._folder / "predictions" / f"{label}.parquet"
                self._outbox.put(f"predictions {label}", _saving(evaluation, path))
        if self._runtime.is_main:
            text = json.dumps(self._results, indent=1)
            step = max(step for _, _, step, _ in evaluations.values())
            self._outbox.put(f"results {step}", lambda: write_atomically(self._folder / FILE, text))
        self._log(new)

    def comment(self, config: Config, preprocessing: Preprocessing, step: int, num_images: int) -> None:
        """Say how the baseline and the average of a step are to be taken."""
        now = {r["name"]: r["top1"] for r in self._results if r["step"] == step or r["name"] == "capture"}
        if "pretrained" in now:
            self._records.say(compare_with_published(config, preprocessing, now["pretrained"], num_images))
        if "swa" in now and now["swa"] < now["capture"] - 0.1:
            self._records.say(
                f"warning: the average is {100 * (now['capture'] - now['swa']):.1f} points below its last capture. "
                "Averaged weights with unfit BatchNorm statistics look like this (is batchnorm.num_images too small?); "
                "so do captures too far apart to be averaged (is swa.lr_max too large?)"
            )

    def _log(self, results: list[Result]) -> None:
        for result in results:
            self._records.log("evaluation", **result)


def saved_results(folder: Path, say: Callable[[str], None] = lambda _: None) -> list[Result]:
    """What results.json holds, nothing where it is missing or damaged."""
    path = folder / FILE
    try:
        found = json.loads(path.read_text()) if path.exists() else []
        return [dict(result, step=int(result["step"]), name=str(result["name"])) for result in found]
    except (ValueError, TypeError, KeyError, RecursionError):
        say(f"warning: {path} is damaged; what can be evaluated again will be")
        return []


def _saving(evaluation: Evaluation, path: Path) -> Callable[[], None]:
    def save() -> None:
        path.parent.mkdir(exist_ok=True)
        evaluation.save(path)

    return save


def compare_with_published(config: Config, preprocessing: Preprocessing, top1: float, num_images: int) -> str:
    """A sentence on how a measured baseline relates to the published figure."""
    published = published_top1(config.model.library, config.model.name, preprocessing.interpolation)
    by_name = config.model.weights is None and config.model.pretrained  # else a file's weights, or random ones
    if published is None or not by_name or num_images != NUM_VAL:
        return f"  baseline: {100 * top1:.2f} % measured in this pipeline; gains are relative to it"
    difference = 100 * (top1 - published)
    verdict = (
        "agrees" if abs(difference) <= 0.1 else "DIFFERS: check class order, preprocessing and weights before trusting gains"
    )
    return f"  baseline: {100 * top1:.2f} % measured, {100 * published:.2f} % published: {difference:+.2f} points, {verdict}"
