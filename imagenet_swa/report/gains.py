"""What one network has over another on the same images: points, over seeds and images, and McNemar's test of each seed.

Which images a network has right stands in its run's predictions/*.parquet.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imagenet_swa.analysis.significance import Interval, mcnemar, paired_bootstrap, t_interval
from imagenet_swa.config import InputError
from imagenet_swa.report.document import Rows
from imagenet_swa.report.runs import RunFiles

BOOTSTRAP_SEED = 0
GAIN_COLUMNS = (
    "comparison",
    "gain, points",
    "95 % over images",
    "95 % over seeds",
    "images won",
    "images lost",
    "McNemar p",
)


@dataclass(frozen=True)
class Answers:
    """One network on N images.

    Attributes:
        indices: (N,) the images' numbers in the index, ascending.
        labels: (N,)
        correct: (N,) whether the most probable class is the label.
    """

    indices: NDArray[np.int64]
    labels: NDArray[np.int64]
    correct: NDArray[np.bool_]


def predictions_path(run: RunFiles, result: dict[str, Any]) -> Path:
    """Where a run keeps its answers to each image for this result."""
    name, epoch = result["name"], result["epoch"]
    when = f"epoch-{epoch:02d}" if isinstance(epoch, int) else f"step-{result['step']:07d}"
    label = name if name == "pretrained" else f"{name.replace('_', '-')}-{when}"
    return run.folder / "predictions" / f"{label}.parquet"


def read_answers(run: RunFiles, result: dict[str, Any]) -> Answers:
    """The answers behind a result.

    Raises:
        InputError: the file is missing, damaged, or of other weights than the result.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    path = predictions_path(run, result)
    if not path.is_file():
        raise InputError(f"{path} is missing: without its predictions {run.folder} cannot be compared image by image")
    try:
        table = pq.read_table(path, columns=["index", "label", "top5"])
        first = pc.list_element(table["top5"], 0)  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
        indices, labels, answers = (column.to_numpy() for column in (table["index"], table["label"], first))
        if not all(column.dtype.kind in "iu" for column in (indices, labels, answers)) or len(np.unique(indices)) < len(indices):
            raise ValueError("its columns are not numbers of images and classes, each image once")
    except (OSError, KeyError, ValueError, MemoryError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    order = np.argsort(indices, kind="stable")
    found = Answers(indices[order], labels[order], (answers == labels)[order])
    if (len(found.correct), int(found.correct.sum())) != (result["num_images"], round(result["top1"] * result["num_images"])):
        raise InputError(
            f"{path} has {found.correct.sum()} of {len(found.correct)} images right, but results.json says "
            f"{100 * result['top1']:.2f} % of {result['num_images']}: they are not of the same evaluation"
        )
    return found


def on_common_images(answers: Sequence[Answers]) -> list[NDArray[np.bool_]]:
    """What each network has right of the images that all of them saw, in the same order: all images, less the undecodable.

    Raises:
        InputError: no common image, or the same image with other labels.
    """
    common = answers[0].indices
    for other in answers[1:]:
        common = np.intersect1d(common, other.indices, assume_unique=True)
    rows = [np.searchsorted(answer.indices, common) for answer in answers]
    labels = answers[0].labels[rows[0]]
    if not len(common) or any((answer.labels[row] != labels).any() for answer, row in zip(answers, rows, strict=True)):
        raise InputError("the predictions are of different images: their labels differ, or no image is common to all")
    return [answer.correct[row] for answer, row in zip(answers, rows, strict=True)]


# ------------------------------------------------------------------------------------------------------------------- the gain


def measure_gain(label: str, seeds: Sequence[int], before: Sequence[Answers], after: Sequence[Answers]) -> dict[str, Any]:
    """The gain of `after` over `before`, in points of top-1, a pair of networks per seed.

    The interval over images is the paired bootstrap's for the mean over these very networks: another test set of the kind. The
    interval over seeds is Student's, for the mean over all seeds on this test set.

    Raises:
        InputError: the answers are of different images.
    """
    pairs = [on_common_images(pair) for pair in zip(before, after, strict=True)]
    tests = [mcnemar(*pair) for pair in pairs]
    values = [100 * (test.num_only_b - test.num_only_a) / test.num_images for test in tests]
    return {
        "label": label,
        "seeds": list(seeds),
        "values": values,
        "mean": mean(values),
        "std": stdev(values) if len(values) > 1 else None,
        "over_seeds": _ends(t_interval(values)),
        "over_images": _ends(paired_bootstrap(_mean_difference(before, after), seed=BOOTSTRAP_SEED), 100),
        "mcnemar": [
            {
                "seed": seed,
                "num_images": test.num_images,
                "num_won": test.num_only_b,
                "num_lost": test.num_only_a,
                "p_value": test.p_value,
            }
            for seed, test in zip(seeds, tests, strict=True)
        ],
    }


def _mean_difference(before: Sequence[Answers], after: Sequence[Answers]) -> np.ndarray:
    """(N,) over the images that all networks saw: how many more of the seeds have it right afterwards, as a share."""
    correct = np.array(on_common_images([*before, *after]), dtype=np.int64)
    num_seeds = len(before)
    return (correct[num_seeds:].sum(axis=0) - correct[:num_seeds].sum(axis=0)) / num_seeds


def _ends(interval: Interval | None, scale: float = 1) -> dict[str, float] | None:
    if interval is None:
        return None
    return {"low": scale * interval.low, "high": scale * interval.high, "level": interval.level}


def gain_rows(gains: Sequence[dict[str, Any]], title: str | None = None) -> Rows:
    """The gains as a table, cells as in `GAIN_COLUMNS`; of several seeds the counts are means and the p-values a range."""
    return Rows(GAIN_COLUMNS, [_gain_row(gain) for gain in gains], title)


def _gain_row(gain: dict[str, Any]) -> tuple[str, ...]:
    tests = gain["mcnemar"]
    spread = "" if gain["std"] is None else f" ± {gain['std']:.2f}"
    p_values = sorted(test["p_value"] for test in tests)
    return (
        gain["label"],
        f"{gain['mean']:+.2f}{spread}",
        ends_text(gain["over_images"]),
        ends_text(gain["over_seeds"]),
        f"{mean(test['num_won'] for test in tests):,.0f}",
        f"{mean(test['num_lost'] for test in tests):,.0f}",
        " to ".join(dict.fromkeys(f"{p:.2g}" for p in (p_values[0], p_values[-1]))),
    )


def ends_text(interval: dict[str, float] | None) -> str:
    """`+0.61 to +1.02`, empty where there is no interval."""
    return "" if interval is None else f"{interval['low']:+.2f} to {interval['high']:+.2f}"
