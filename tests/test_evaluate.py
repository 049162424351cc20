"""Top-1, top-5 and NLL against numpy, each image once, whatever the ranks and the batches."""

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import nn

from imagenet_swa.data.batch import Batch
from imagenet_swa.data.sampling import Indices, evaluation_batches
from imagenet_swa.evaluate import Evaluation, evaluate

CPU = torch.device("cpu")
Sum = Callable[[torch.Tensor], torch.Tensor]


# ---------------------------------------------------------------------------------------------------------- helpers


class Table(nn.Module):
    """Says about image i what row i of a table says: logits that do not depend on the batch."""

    def __init__(self, logits: NDArray[np.floating]) -> None:
        super().__init__()
        self.register_buffer("logits", torch.from_numpy(logits))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.get_buffer("logits")
        return logits[images[:, 0, 0, 0].long()]


def some_logits(num: int, num_classes: int, seed: int = 0) -> NDArray[np.float32]:
    return (3 * np.random.default_rng([seed, num, num_classes]).normal(size=(num, num_classes))).astype(np.float32)


def some_labels(num: int, num_classes: int) -> NDArray[np.int64]:
    return np.random.default_rng([1, num, num_classes]).integers(0, num_classes, num)


def batch_of(indices: Indices, labels: NDArray[np.int64]) -> Batch:
    """Image i is one pixel whose value is i."""
    images = torch.from_numpy(np.repeat(indices, 3).reshape(-1, 3, 1, 1).astype(np.float32))
    return Batch(images, torch.from_numpy(labels[indices]), indices)


def batches_of_rank(labels: NDArray[np.int64], rank: int, world_size: int, batch_size: int) -> Iterator[Batch]:
    for indices in evaluation_batches(len(labels), rank=rank, world_size=world_size, batch_size=batch_size):
        yield batch_of(indices, labels)


def in_numpy(logits: NDArray[np.floating], labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Five most probable classes and log-probability of the label, in float64."""
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(axis=1, keepdims=True)
    log_prob = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return np.argsort(-wide, axis=1)[:, :5], log_prob[np.arange(len(labels)), labels]


def check_against_numpy(evaluation: Evaluation, logits: NDArray[np.floating], labels: NDArray[np.int64]) -> None:
    ranked, log_prob = in_numpy(logits, labels)
    np.testing.assert_array_equal(evaluation.indices, np.arange(len(labels)))
    np.testing.assert_array_equal(evaluation.labels, labels)
    np.testing.assert_array_equal(evaluation.ranked, ranked)
    np.testing.assert_allclose(evaluation.label_log_prob, log_prob, atol=3e-6)
    assert evaluation.ranked.dtype == np.int64 and evaluation.label_log_prob.dtype == np.float64
    num_correct = sum(int(label == row[0]) for label, row in zip(labels, ranked, strict=True))
    num_correct_top5 = sum(int(label in row) for label, row in zip(labels, ranked, strict=True))
    summary = evaluation.summary()
    assert summary["num_images"] == evaluation.num_images == len(labels)
    assert summary["num_correct"] == evaluation.num_correct == num_correct
    assert summary["num_correct_top5"] == evaluation.num_correct_top5 == num_correct_top5
    assert summary["top1"] == num_correct / len(labels) and summary["top5"] == num_correct_top5 / len(labels)
    assert summary["nll"] == evaluation.nll == pytest.approx(-log_prob.mean(), abs=3e-6)


def in_threads(world_size: int, work: Callable[[int, Sum], Any]) -> list[Any]:
    """Run work(rank, sum_over_ranks) for all ranks at once; what each returned, or the exception that it raised."""
    barrier = threading.Barrier(world_size)
    given_by_rank: list[Any] = [None] * world_size
    results: list[Any] = [None] * world_size

    def run_rank(rank: int) -> None:
        def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
            given_by_rank[rank] = tensor
            barrier.wait(timeout=30)
            total = torch.stack(given_by_rank).sum(dim=0)
            barrier.wait(timeout=30)
            return total

        try:
            results[rank] = work(rank, sum_over_ranks)
        except Exception as error:
            results[rank] = error
            if not isinstance(error, RuntimeError):
                barrier.abort()

    threads = [threading.Thread(target=run_rank, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    return results


def evaluate_on_ranks(
    tables: dict[str, NDArray[np.floating]], labels: NDArray[np.int64], world_size: int, batch_size: int
) -> list[dict[str, Evaluation]]:
    """What each rank of `world_size` gets, from threads."""
    num_classes = next(iter(tables.values())).shape[1]

    def work(rank: int, sum_over_ranks: Sum) -> dict[str, Evaluation]:
        networks = {name: Table(logits) for name, logits in tables.items()}
        batches = batches_of_rank(labels, rank, world_size, batch_size)
        return evaluate(networks, batches, labels, num_classes=num_classes, device=CPU, sum_over_ranks=sum_over_ranks)

    results = in_threads(world_size, work)
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def evaluate_alone(logits: NDArray[np.floating], labels: NDArray[np.int64], indices: list[list[int]]) -> Evaluation:
    batches = (batch_of(np.array(part, np.int64), labels) for part in indices)
    return evaluate({"network": Table(logits)}, batches, labels, num_classes=logits.shape[1], device=CPU)["network"]


def check_identical(one: Evaluation, other: Evaluation) -> None:
    """Equal to the last bit."""
    for name in ("indices", "labels", "ranked", "label_log_prob"):
        assert getattr(one, name).tobytes() == getattr(other, name).tobytes(), name
    assert one.summary() == other.summary()


# ------------------------------------------------------------------------------------------------------ the numbers


@settings(max_examples=60, deadline=None)
@given(
    num=st.integers(1, 60),
    num_classes=st.sampled_from([1, 2, 3, 4, 5, 6, 10, 1000]),
    batch_size=st.integers(1, 64),
    seed=st.integers(0, 99),
)
def test_results_are_numpys(num: int, num_classes: int, batch_size: int, seed: int) -> None:
    """Top-1, top-5 and NLL are those of a softmax and a sort in float64, also with fewer than five classes."""
    logits, labels = some_logits(num, num_classes, seed), some_labels(num, num_classes)
    batches = batches_of_rank(labels, 0, 1, batch_size)
    (evaluation,) = evaluate({"network": Table(logits)}, batches, labels, num_classes=num_classes, device=CPU).values()
    check_against_numpy(evaluation, logits, labels)
    assert evaluation.ranked.shape == (num, min(5, num_classes))


def test_results_worked_out_by_hand() -> None:
    """Three images, six classes: one right at once, one right at the fifth guess, one not among the five."""
    logits = np.log(np.array([[10, 1, 2, 3, 4, 5], [10, 5, 4, 3, 2, 1], [1, 10, 5, 4, 3, 2]], np.float32))
    labels = np.array([0, 4, 0])
    evaluation = evaluate_alone(logits, labels, [[0, 1], [2]])
    assert evaluation.ranked.tolist() == [[0, 5, 4, 3, 2], [0, 1, 2, 3, 4], [1, 2, 3, 4, 5]]
    assert (evaluation.num_correct, evaluation.num_correct_top5) == (1, 2)
    assert evaluation.nll == pytest.approx(-np.log([10 / 25, 2 / 25, 1 / 25]).mean(), abs=1e-6)
    summary = evaluation.summary()
    assert (summary["top1"], summary["top5"], summary["num_images"]) == (1 / 3, 2 / 3, 3)


def test_large_logits_do_not_overflow() -> None:
    """A certain network has a finite NLL, whether it is right or wrong."""
    logits, labels = np.array([[3e4, 0.0], [0.0, 3e4], [-3e4, -3e4]], np.float32), np.array([0, 0, 1])
    evaluation = evaluate_alone(logits, labels, [[0, 1, 2]])
    np.testing.assert_allclose(evaluation.label_log_prob, [0, -3e4, -np.log(2)], rtol=1e-6)


# --------------------------------------------------------------------------------------------- ranks and batch sizes


@pytest.mark.parametrize("num", [1, 2, 7, 23])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_every_image_counts_once_on_any_number_of_ranks(num: int, world_size: int) -> None:
    """Results are the same bits for 1 to 5 ranks and any batch size, more ranks than images included, on every rank."""
    num_classes = 12
    logits, labels = some_logits(num, num_classes), some_labels(num, num_classes)
    alone = evaluate_alone(logits, labels, [list(range(num))])
    check_against_numpy(alone, logits, labels)
    for batch_size in {1, 3, max(1, num - 1), num, num + 1}:
        for of_rank in evaluate_on_ranks({"network": logits}, labels, world_size, batch_size):
            check_identical(of_rank["network"], alone)


@pytest.mark.parametrize(
    "indices,never,often",
    [
        ([[0, 1, 2], [3]], 2, 0),
        ([[0, 1, 2], [2, 3, 4, 5]], 0, 1),
        ([[0, 1, 2, 2], [3, 4, 5]], 0, 1),
        ([[0, 1, 2], [3, 4, 4]], 1, 1),
        ([[0, 0, 0, 0, 0, 0]], 5, 1),
        ([], 6, 0),
    ],
    ids=["two missing", "twice in two batches", "twice in one batch", "one for another", "one for all", "nothing"],
)
def test_missing_and_repeated_images_are_counted_and_refused(indices: list[list[int]], never: int, often: int) -> None:
    """A result in which not every image counts once is never returned; the error has the numbers."""
    logits, labels = some_logits(6, 4), some_labels(6, 4)
    with pytest.raises(RuntimeError, match=f"of 6 images {never} were never evaluated and {often} more than once"):
        evaluate_alone(logits, labels, indices)


def test_an_image_that_two_ranks_saw_is_refused_on_both() -> None:
    """Ranks that overlap, as padding samplers make them, raise the same error on every rank."""
    logits, labels = some_logits(5, 4), some_labels(5, 4)
    shares = [np.array([0, 2, 4]), np.array([1, 3, 0])]

    def work(rank: int, sum_over_ranks: Sum) -> object:
        batches = [batch_of(shares[rank], labels)]
        network = {"network": Table(logits)}
        return evaluate(network, batches, labels, num_classes=4, device=CPU, sum_over_ranks=sum_over_ranks)

    errors = in_threads(2, work)
    assert all(isinstance(error, RuntimeError) for error in errors)
    assert [str(error) for error in errors] == ["of 5 images 0 were never evaluated and 1 more than once"] * 2


# --------------------------------------------------------------------------------------------------------- bad images


def without(batches: Iterator[Batch], bad: set[int], labels: NDArray[np.int64]) -> Iterator[Batch]:
    """The batches as a loader yields them that cannot decode these images."""
    for batch in batches:
        numbers = batch.indices.tolist()
        kept = batch_of(np.array([i for i in numbers if i not in bad], np.int64), labels)
        yield replace(kept, left_out=tuple(i for i in numbers if i in bad))


@settings(max_examples=40, deadline=None)
@given(data=st.data(), num=st.integers(2, 30), world_size=st.integers(1, 3), batch_size=st.integers(1, 8))
def test_images_left_out_count_nowhere(data: st.DataObject, num: int, world_size: int, batch_size: int) -> None:
    """With images left out, on any ranks, whole batches included, every rank has numpy's numbers of the others."""
    bad = data.draw(st.sets(st.integers(0, num - 1), max_size=num - 1))
    logits, labels = some_logits(num, 7), some_labels(num, 7)
    kept = np.array(sorted(set(range(num)) - bad))

    def work(rank: int, sum_over_ranks: Sum) -> Evaluation:
        batches = without(batches_of_rank(labels, rank, world_size, batch_size), bad, labels)
        network = {"network": Table(logits)}
        return evaluate(network, batches, labels, num_classes=7, device=CPU, sum_over_ranks=sum_over_ranks)["network"]

    for evaluation in in_threads(world_size, work):
        np.testing.assert_array_equal(evaluation.indices, kept)
        assert evaluation.num_left_out == evaluation.summary()["num_left_out"] == len(bad)
        check_against_numpy(replace(evaluation, indices=np.arange(len(kept))), logits[kept], labels[kept])


def test_an_image_both_evaluated_and_left_out_is_refused() -> None:
    """An image that one batch holds and another says it left out is counted twice, which no result may be."""
    logits, labels = some_logits(4, 3), some_labels(4, 3)
    batches = [batch_of(np.arange(4), labels), replace(batch_of(np.arange(0), labels), left_out=(2,))]
    with pytest.raises(RuntimeError, match="of 4 images 0 were never evaluated and 1 more than once"):
        evaluate({"network": Table(logits)}, batches, labels, num_classes=3, device=CPU)


# ------------------------------------------------------------------------------------------------------ real processes

NUM_RANKS = 3
LOGITS, LABELS = some_logits(23, 12), some_labels(23, 12)


def _work_as_rank(rank: int, folder: Path) -> None:
    """One process of a gloo group of three: evaluates on two ranks, then on three, each result into a file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=NUM_RANKS)
    groups = {size: torch.distributed.new_group(list(range(size))) for size in (2, 3)}
    for world_size, group in groups.items():
        if rank >= world_size:
            continue

        def sum_over_ranks(tensor: torch.Tensor, group: Any = group) -> torch.Tensor:
            total = tensor.clone()
            torch.distributed.all_reduce(total, group=group)
            return total

        batches = batches_of_rank(LABELS, rank, world_size, batch_size=5)
        network = {"network": Table(LOGITS)}
        result = evaluate(network, batches, LABELS, num_classes=12, device=CPU, sum_over_ranks=sum_over_ranks)
        np.savez(folder / f"{world_size}-{rank}.npz", **vars(result["network"]))
    torch.distributed.destroy_process_group()


def test_real_processes_agree_with_one(tmp_path: Path) -> None:
    """Two and three gloo processes have one process's results, to the last bit, on every rank."""
    run_ranks(_work_as_rank, NUM_RANKS, tmp_path)
    alone = evaluate_alone(LOGITS, LABELS, [list(range(23))])
    for world_size in (2, 3):
        for rank in range(world_size):
            with np.load(tmp_path / f"{world_size}-{rank}.npz") as arrays:
                check_identical(Evaluation(**dict(arrays)), alone)


# ------------------------------------------------------------------------------------------------------ the networks


@pytest.mark.parametrize("world_size", [1, 2])
def test_several_networks_in_one_pass_equal_separate_passes(world_size: int) -> None:
    """Each of three networks gets what a pass of its own would give it, under its own name."""
    labels = some_labels(17, 9)
    tables: dict[str, NDArray[np.floating]] = {name: some_logits(17, 9, seed) for seed, name in enumerate(("b", "a", "c"))}
    together = evaluate_on_ranks(tables, labels, world_size, batch_size=4)[0]
    assert list(together) == ["b", "a", "c"]
    for name, logits in tables.items():
        check_identical(together[name], evaluate_alone(logits, labels, [list(range(17))]))
        check_against_numpy(together[name], logits, labels)


class Classifier(nn.Module):
    """A network whose mode matters: BatchNorm and dropout; remembers how it was run."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Dropout(0.5))
        self.head = nn.Linear(8, 7)
        self.was_training: list[bool] = []
        self.had_gradients: list[bool] = []
        self.dtypes: list[torch.dtype] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.features(images).mean((2, 3)))
        self.was_training.append(any(module.training for module in self.modules()))
        self.had_gradients.append(logits.requires_grad)
        self.dtypes.append(logits.dtype)
        return logits


def pictures(num: int, batch_size: int) -> tuple[torch.Tensor, NDArray[np.int64], list[Batch]]:
    labels = some_labels(num, 7)
    images = torch.randn(num, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    parts = evaluation_batches(num, rank=0, world_size=1, batch_size=batch_size)
    return images, labels, [Batch(images[part], torch.from_numpy(labels[part]), part) for part in parts]


def test_networks_run_in_evaluation_mode_without_gradients() -> None:
    """The moving statistics are used and not touched, dropout is off, no graph is built, and modes are put back."""
    network = Classifier()
    network.features.eval()
    network.features[2].train()
    modes = [module.training for module in network.modules()]
    before = copy.deepcopy(network.state_dict())
    images, labels, batches = pictures(20, 6)
    evaluation = evaluate({"network": network}, batches, labels, num_classes=7, device=CPU)["network"]
    assert network.was_training == [False] * 4 and network.had_gradients == [False] * 4
    assert [module.training for module in network.modules()] == modes and True in modes and False in modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    with torch.no_grad():
        check_against_numpy(evaluation, copy.deepcopy(network).eval()(images).numpy(), labels)


def test_training_goes_on_after_an_evaluation() -> None:
    """Parameters that were evaluated can still be trained."""
    network = Classifier()
    images, labels, batches = pictures(8, 8)
    evaluate({"network": network}, batches, labels, num_classes=7, device=CPU)
    network(images).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.parametrize("broken", ["images", "network"])
def test_an_exception_puts_the_modes_back(broken: str) -> None:
    """Whether images or network fail, each module is in its own mode afterwards, and gradients are on."""
    networks = {"first": Classifier(), "second": Classifier()}
    networks["second"].features.eval()
    modes = {name: [module.training for module in network.modules()] for name, network in networks.items()}
    _, labels, batches = pictures(8, 4)

    def failing() -> Iterator[Batch]:
        yield batches[0]
        if broken == "images":
            raise OSError("a disk failed")
        yield Batch(batches[1].images[:, :2], batches[1].labels, batches[1].indices)

    with pytest.raises(OSError if broken == "images" else RuntimeError):
        evaluate(networks, failing(), labels, num_classes=7, device=CPU)
    assert {name: [module.training for module in network.modules()] for name, network in networks.items()} == modes
    assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


def test_the_context_decides_the_arithmetic() -> None:
    """Under bf16 autocast the logits are bf16, and everything behind them is computed from these in full precision."""
    network = Classifier()
    images, labels, batches = pictures(20, 6)
    num_entered = 0

    def context() -> torch.autocast:
        nonlocal num_entered
        num_entered += 1
        return torch.autocast("cpu", dtype=torch.bfloat16)

    evaluation = evaluate({"network": network}, batches, labels, num_classes=7, device=CPU, forward_context=context)["network"]
    assert network.dtypes == [torch.bfloat16] * 4 and num_entered == 4
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network.eval()(images).float().numpy()
    _, log_prob = in_numpy(logits, labels)
    np.testing.assert_allclose(evaluation.label_log_prob, log_prob, atol=3e-6)
    plain = evaluate({"network": network}, batches, labels, num_classes=7, device=CPU, forward_context=nullcontext)["network"]
    assert network.dtypes[-1] == torch.float32
    assert not np.array_equal(plain.label_log_prob, evaluation.label_log_prob)


# ----------------------------------------------------------------------------------------------------- saved results


@pytest.mark.parametrize("num_classes", [3, 30])
def test_saved_predictions(tmp_path: Path, num_classes: int) -> None:
    """The parquet file has a row per image, in index order: label, top five, and the label's probability as numpy has it."""
    logits, labels = some_logits(11, num_classes), some_labels(11, num_classes)
    path = tmp_path / "predictions.parquet"
    path.write_bytes(b"an older file")
    evaluation = evaluate_alone(logits, labels, [[10, 3, 5], [0, 1, 2, 4], [9, 8, 7, 6]])
    evaluation.save(path)
    table = pq.read_table(path)
    assert table.column_names == ["index", "label", "top5", "probability"]
    ranked, log_prob = in_numpy(logits, labels)
    assert table["index"].to_pylist() == list(range(11))
    assert table["label"].to_pylist() == labels.tolist()
    assert table["top5"].to_pylist() == ranked.tolist()
    np.testing.assert_allclose(table["probability"].to_numpy(), np.exp(log_prob), rtol=1e-5)
    assert [file.name for file in tmp_path.iterdir()] == ["predictions.parquet"]  # nothing half-written beside it


def test_accuracy_can_be_recomputed_from_the_file(tmp_path: Path) -> None:
    """Top-1, top-5 and NLL follow from the saved predictions alone."""
    logits, labels = some_logits(200, 10), some_labels(200, 10)
    evaluation = evaluate_alone(logits, labels, [list(range(200))])
    evaluation.save(tmp_path / "predictions.parquet")
    rows = pq.read_table(tmp_path / "predictions.parquet").to_pylist()
    assert sum(row["top5"][0] == row["label"] for row in rows) == evaluation.num_correct
    assert sum(row["label"] in row["top5"] for row in rows) == evaluation.num_correct_top5
    assert -np.mean(np.log([row["probability"] for row in rows])) == pytest.approx(evaluation.nll, rel=1e-9)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """On a GPU the results are numpy's, too."""
    device = torch.device("cuda", 0)
    batches = [
        Batch(batch.images.to(device), batch.labels.to(device), batch.indices) for batch in batches_of_rank(LABELS, 0, 1, 5)
    ]
    network = {"network": Table(LOGITS).to(device)}
    check_against_numpy(evaluate(network, batches, LABELS, num_classes=12, device=device)["network"], LOGITS, LABELS)
