"""What networks and the ensemble of some of them say about each validation image, as class probabilities (sec. 3.5)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from imagenet_swa.analysis.captures import check_fits
from imagenet_swa.analysis.significance import mcnemar, paired_bootstrap
from imagenet_swa.config import require
from imagenet_swa.data.batch import Batch
from imagenet_swa.data.sampling import evaluation_batches
from imagenet_swa.engine import check_left_out
from imagenet_swa.models import Weights, read_weights
from imagenet_swa.session import Session

ENSEMBLE = "ensemble"
Vector = NDArray[np.float64]
Load = Callable[[], Weights]


@dataclass(frozen=True)
class Answer:
    """What one network says about each of N images.

    Attributes:
        labels: (N,) int64, what the images show.
        predicted: (N,) int64, the most probable class.
        confidence: (N,) its probability.
        label_log_prob: (N,) natural logarithm of the probability of the label.
    """

    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    confidence: Vector
    label_log_prob: Vector

    @property
    def correct(self) -> NDArray[np.bool_]:
        """(N,) whether the most probable class is the label."""
        return self.predicted == self.labels

    @property
    def nll(self) -> float:
        """Mean negative log-likelihood, nats."""
        return float(-self.label_log_prob.mean())


@dataclass(frozen=True)
class Answers:
    """What several networks say about the same N images.

    Attributes:
        of: by name; the ensemble's is ENSEMBLE.
        distances: (N,) L2 norm of the difference of two networks' class probabilities, by their names.
        num_left_out: validation images that cannot be decoded and are not among the N.
        num_passes: over the images.
    """

    of: dict[str, Answer]
    distances: dict[tuple[str, str], Vector]
    num_left_out: int
    num_passes: int

    def same_label(self, first: str, second: str) -> float:
        """Share of the images to which two networks give the same label."""
        return float((self.of[first].predicted == self.of[second].predicted).mean())


@dataclass(frozen=True)
class Pass:
    """The networks that share a pass over the images: some of the ensemble's members, then some others."""

    members: tuple[str, ...]
    others: tuple[str, ...]


def plan_passes(members: Sequence[str], others: Sequence[str], networks_per_pass: int) -> list[Pass]:
    """All members in their order, then the others, which need the finished ensemble, `networks_per_pass` at a time."""
    names = [*members, *others]
    groups = [names[start : start + networks_per_pass] for start in range(0, len(names), networks_per_pass)]
    place = {name: number for number, name in enumerate(names)}
    return [
        Pass(
            tuple(name for name in group if place[name] < len(members)),
            tuple(name for name in group if place[name] >= len(members)),
        )
        for group in groups
    ]


def fitting(session: Session, path: Path) -> Weights:
    """A file's weights. Raises InputError, naming it, unless they are the network's."""
    weights = read_weights(path)
    check_fits(session.network, weights, str(path))
    return weights


def make_output(session: Session, folder: Path, setting: str) -> Path:
    """The folder, made by rank 0 before the work begins. Raises InputError on every rank where it cannot be made."""
    problem = None
    if session.runtime.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"cannot make the folder {folder}: {error.strerror}; set {setting} to another"
    problem = session.runtime.from_main(problem)
    require(problem is None, str(problem))
    return folder


def ask(
    session: Session,
    members: Mapping[str, Load],
    others: Mapping[str, Load],
    *,
    networks_per_pass: int,
    say: Callable[[str], None],
) -> Answers:
    """Ask the members, their ensemble (the mean of their class probabilities) and the others about all validation images.

    Distances are those between consecutive members, and between the ensemble and each of the others. Where not all networks
    share one pass, the sum of the members' probabilities so far, and those of the latest, wait in host memory: 16 bytes per
    image and class, over all ranks. The answers are the same to the last bit. Probabilities are computed in float64.

    Raises:
        InputError: too many images cannot be decoded, or a network does not fit.
    """
    passes = plan_passes(list(members), list(others), networks_per_pass)
    questions = _Questions(session, list(members), list(others))
    for number, these in enumerate(passes, 1):
        if len(passes) > 1:
            say(f"pass {number} of {len(passes)} over the validation images: {', '.join((*these.members, *these.others))}")
        networks = {name: session.network_with({**members, **others}[name]()) for name in (*these.members, *these.others)}
        questions.ask(networks, these, is_last=number == len(passes))
    return questions.answers(len(passes))


class _Questions:
    """This rank's part of the answers: a row per image of the split, zero where another rank has the image."""

    def __init__(self, session: Session, members: list[str], others: list[str]) -> None:
        self._session, self._members = session, members
        self._labels = session.loaders.val.index.labels
        names = [*members, ENSEMBLE, *others]
        pairs = [*pairwise(members), *((ENSEMBLE, other) for other in others)]
        self._predicted = {name: self._rows(torch.int64) for name in names}
        self._confidence = {name: self._rows(torch.float64) for name in names}
        self._label_log_prob = {name: self._rows(torch.float64) for name in names if name != ENSEMBLE}
        self._distances = {pair: self._rows(torch.float64) for pair in pairs}
        self._seen, self._absent = self._rows(torch.int64), self._rows(torch.int64)
        self._waiting: dict[int, tuple[NDArray[np.int64], torch.Tensor, torch.Tensor]] = {}

    def _rows(self, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(len(self._labels), dtype=dtype, device=self._session.runtime.device)

    def ask(self, networks: dict[str, nn.Module], these: Pass, *, is_last: bool) -> None:
        """One pass over this rank's images."""
        session = self._session
        runtime = session.runtime
        batches = evaluation_batches(
            len(self._labels),
            rank=runtime.rank,
            world_size=runtime.world_size,
            batch_size=session.config.evaluation.batch_size,
        )
        for network in networks.values():
            network.eval()
        with torch.inference_mode():
            for number, batch in enumerate(session.loaders.val.evaluation_stream(batches)):
                rows = torch.from_numpy(batch.indices).to(runtime.device)
                self._absent[list(batch.left_out)] = 1
                self._seen.index_add_(0, rows, torch.ones_like(rows))
                if len(rows):
                    total, latest = self._ask_about(batch, rows, networks, these, *self._so_far(number, batch.indices))
                    if not is_last:
                        self._waiting[number] = batch.indices, total.cpu(), latest.cpu()

    def _ask_about(
        self,
        batch: Batch,
        rows: torch.Tensor,
        networks: dict[str, nn.Module],
        these: Pass,
        total: torch.Tensor | None,
        latest: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch of n images; returns the members' probabilities (n, classes) so far: their sum, and the latest member's."""
        for name in these.members:
            latest, before = self._answer(name, networks[name], batch, rows), latest
            total = latest if total is None else total + latest
            if before is not None:
                pair = (self._members[self._members.index(name) - 1], name)
                self._distances[pair][rows] = (latest - before).norm(dim=1)
        assert total is not None and latest is not None
        if self._members[-1] in these.members:
            self._note(ENSEMBLE, total / len(self._members), rows)
        for name in these.others:
            difference = total / len(self._members) - self._answer(name, networks[name], batch, rows)
            self._distances[ENSEMBLE, name][rows] = difference.norm(dim=1)
        return total, latest

    def _so_far(self, number: int, indices: NDArray[np.int64]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The members' summed probabilities of a batch, and the latest member's, from the passes before this one."""
        if number not in self._waiting:
            return None, None
        those, total, latest = self._waiting.pop(number)
        if not np.array_equal(those, indices):
            raise RuntimeError("other images could be decoded than in the pass before this one; run it again")
        device = self._session.runtime.device
        return total.to(device), latest.to(device)

    def _answer(self, name: str, network: nn.Module, batch: Batch, rows: torch.Tensor) -> torch.Tensor:
        """Class probabilities (n, classes) in float64; what they say is noted."""
        with self._session.runtime.autocast(self._session.config.evaluation.precision):
            logits = network(batch.images)
        log_prob = logits.double().log_softmax(1)
        self._label_log_prob[name][rows] = log_prob.gather(1, batch.labels[:, None])[:, 0]
        probabilities = log_prob.exp()
        self._note(name, probabilities, rows)
        return probabilities

    def _note(self, name: str, probabilities: torch.Tensor, rows: torch.Tensor) -> None:
        self._confidence[name][rows], self._predicted[name][rows] = probabilities.max(dim=1)

    def answers(self, num_passes: int) -> Answers:
        """All ranks' answers, on every rank."""
        add, num_images = self._session.runtime.sum, len(self._labels)
        seen, absent = add(torch.stack([self._seen, self._absent]))
        complete = (seen == num_passes) | ((seen == 0) & (absent > 0))
        if not bool(complete.all()):
            raise RuntimeError(f"of {num_images} images {int((~complete).sum())} were not seen exactly once in each pass")
        num_left_out = num_images - int((seen > 0).sum())
        check_left_out(num_left_out, self._session.config)
        require(num_left_out < num_images, "no image of data.val can be decoded; look at the data with `imagenet-swa verify`")
        kept = (seen > 0).nonzero()[:, 0]

        def gathered(rows: torch.Tensor) -> NDArray[Any]:
            return add(rows)[kept].cpu().numpy()

        label_log_prob = {name: gathered(rows) for name, rows in self._label_log_prob.items()}
        # log of the mean of the members' probabilities, by way of their logarithms, which do not underflow
        logs = [label_log_prob[name] for name in self._members]
        label_log_prob[ENSEMBLE] = np.logaddexp.reduce(logs, axis=0) - np.log(len(logs))
        labels = self._labels[kept.cpu().numpy()]
        of = {
            name: Answer(labels, gathered(rows), gathered(self._confidence[name]), label_log_prob[name])
            for name, rows in self._predicted.items()
        }
        return Answers(of, {pair: gathered(rows) for pair, rows in self._distances.items()}, num_left_out, num_passes)


# ------------------------------------------------------------------------------------------------------ calibration

NUM_BINS = 15


@dataclass(frozen=True)
class Reliability:
    """Images by confidence in equal-width bins; bin b of B holds confidences in (b / B, (b + 1) / B].

    Attributes:
        num_images: (B,) int64.
        accuracy: (B,) share of them that are right, 0 in an empty bin.
        confidence: (B,) their mean confidence, 0 in an empty bin.
    """

    num_images: NDArray[np.int64]
    accuracy: Vector
    confidence: Vector

    @property
    def expected_calibration_error(self) -> float:
        """Mean over images of |accuracy - confidence| of the image's bin (Guo et al. 2017, arXiv:1706.04599, eq. 3)."""
        return float((self.num_images * abs(self.accuracy - self.confidence)).sum() / self.num_images.sum())


def reliability(confidence: Vector, correct: NDArray[np.bool_], num_bins: int = NUM_BINS) -> Reliability:
    """Accuracy and mean confidence (both (N,) per image) by bins of confidence."""
    bins = np.clip(np.ceil(confidence * num_bins).astype(np.int64) - 1, 0, num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    sums = [np.bincount(bins, weights=values, minlength=num_bins) for values in (correct, confidence)]
    accuracy, mean_confidence = (total / np.maximum(counts, 1) for total in sums)
    return Reliability(counts, accuracy, mean_confidence)


# ------------------------------------------------------------------------------------------------------------ gains


def top1_gain(over: NDArray[np.bool_], of: NDArray[np.bool_], *, seed: int) -> dict[str, Any]:
    """What one network's hits have over another's, (N,) each, of the same images: the difference of top-1 with the paired
    bootstrap's 95 % interval, and McNemar's test.
    """
    interval = paired_bootstrap(of.astype(np.int64) - over, seed=seed)
    return {"top1": asdict(interval), "mcnemar": asdict(mcnemar(over, of))}


def gain_cells(gain: dict[str, Any] | None) -> tuple[str, str]:
    """A gain for people: points with their interval, and p; nothing of a network over itself."""
    if gain is None:
        return "", ""
    points = [f"{100 * gain['top1'][name]:+.2f}" for name in ("mean", "low", "high")]
    return f"{points[0]} [{points[1]}, {points[2]}]", f"{gain['mcnemar']['p_value']:.2g}"
