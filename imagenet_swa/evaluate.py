"""Top-1, top-5 and NLL with every image counted exactly once, for any number of ranks; several networks in one pass."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import nn

from imagenet_swa.data.batch import Batch
from imagenet_swa.models import mode_of

NUM_RANKED = 5


@dataclass(frozen=True)
class Evaluation:
    """What one network says about each of N images, in index order.

    Attributes:
        indices: (N,) int64, the images' numbers in the index: all of them, less those that were left out as bad.
        labels: (N,) int64.
        ranked: (N, min(5, classes)) int64, the most probable classes, best first.
        label_log_prob: (N,) float64, natural logarithm of the probability of the label.
        num_left_out: images of the split that cannot be decoded and are not among the N.
    """

    indices: NDArray[np.int64]
    labels: NDArray[np.int64]
    ranked: NDArray[np.int64]
    label_log_prob: NDArray[np.float64]
    num_left_out: int = 0

    @property
    def num_images(self) -> int:
        """N."""
        return len(self.labels)

    @property
    def num_correct(self) -> int:
        """Images whose most probable class is the label."""
        return int((self.ranked[:, 0] == self.labels).sum())

    @property
    def num_correct_top5(self) -> int:
        """Images whose label is among the five most probable classes."""
        return int((self.ranked == self.labels[:, None]).any(axis=1).sum())

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood, nats."""
        return float(-self.label_log_prob.sum() / self.num_images)

    def summary(self) -> dict[str, Any]:
        """Counts, and fractions of them."""
        return {
            "num_images": self.num_images,
            "num_left_out": self.num_left_out,
            "num_correct": self.num_correct,
            "num_correct_top5": self.num_correct_top5,
            "top1": self.num_correct / self.num_images,
            "top5": self.num_correct_top5 / self.num_images,
            "nll": self.nll,
        }

    def save(self, path: Path) -> None:
        """A parquet file with a row per image: index, label, top5 (list), probability of the label."""
        table = pa.table(
            {
                "index": self.indices,
                "label": self.labels,
                "top5": pa.array(self.ranked.tolist(), pa.list_(pa.int32())),
                "probability": np.exp(self.label_log_prob),
            }
        )
        partial = path.with_name(path.name + ".partial")
        pq.write_table(table, partial)
        partial.replace(path)


def evaluate(
    networks: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    labels: NDArray[np.int64],
    *,
    num_classes: int,
    device: torch.device,
    wanted: NDArray[np.int64] | None = None,
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    forward_context: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> dict[str, Evaluation]:
    """Run all networks in evaluation mode over the batches of this rank and put the ranks' answers together.

    Every rank fills in its own images' rows of arrays of zeros, and their sum over ranks is the whole: since a row that
    two ranks filled, or none, shows in the counts, no image is counted twice or missed without an error. Images that the
    loader says it left out count nowhere.

    Args:
        networks: logits (n, classes) from images, by name.
        batches: of this rank; their `indices` are positions in `labels`.
        labels: (N,) of the whole split.
        num_classes: width of the logits.
        wanted: positions in `labels` of the images to be seen; default: all.
        sum_over_ranks: all-reduce.
        forward_context: entered around every forward pass, for autocast.

    Raises:
        RuntimeError: an image was seen more than once, or never.
    """
    num_images, num_ranked = len(labels), min(NUM_RANKED, num_classes)
    seen, absent = (torch.zeros(num_images, dtype=torch.int64, device=device) for _ in range(2))
    ranked = {name: torch.zeros(num_images, num_ranked, dtype=torch.int64, device=device) for name in networks}
    label_log_prob = {name: torch.zeros(num_images, dtype=torch.float64, device=device) for name in networks}
    with ExitStack() as stack, torch.inference_mode():
        for network in networks.values():
            stack.enter_context(mode_of(network, training=False))
        for batch in batches:
            rows = torch.from_numpy(batch.indices).to(device)
            seen.index_add_(0, rows, torch.ones_like(rows))  # `seen[rows] += 1` counts an image twice in a batch once
            absent[list(batch.left_out)] = 1
            for name, network in networks.items() if len(rows) else ():
                with forward_context():
                    logits = network(batch.images)
                log_prob = logits.float().log_softmax(1)
                ranked[name][rows] = log_prob.topk(num_ranked).indices
                label_log_prob[name][rows] = log_prob.gather(1, batch.labels[:, None])[:, 0].double()
    seen, absent = sum_over_ranks(torch.stack([seen, absent]))
    times = torch.zeros_like(seen)
    times[slice(None) if wanted is None else torch.from_numpy(wanted).to(device)] = 1
    if not bool((seen + absent == times).all()):
        never, often = int((seen + absent < times).sum()), int((seen + absent > times).sum())
        raise RuntimeError(f"of {int(times.sum())} images {never} were never evaluated and {often} more than once")
    indices = seen.nonzero()[:, 0].cpu().numpy()
    return {
        name: Evaluation(
            indices,
            labels[indices],
            sum_over_ranks(ranked[name]).cpu().numpy()[indices],
            sum_over_ranks(label_log_prob[name]).cpu().numpy()[indices],
            num_left_out=int(times.sum()) - len(indices),
        )
        for name in networks
    }
