"""Which images a network has right, from a run's predictions/*.parquet."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from imagenet_swa.config import InputError
from imagenet_swa.report.runs import RunFiles


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
    if not path.exists():
        raise InputError(f"{path} is missing: without its predictions {run.folder} cannot be compared image by image")
    try:
        table = pq.read_table(path, columns=["index", "label", "top5"])
        first = pc.list_element(table["top5"], 0)  # pyright: ignore[reportAttributeAccessIssue]  # made at run time
        indices, labels, answers = (column.to_numpy() for column in (table["index"], table["label"], first))
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
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
