"""Points of weight space: measured as a plain loop measures them, however they are grouped, interrupted and shared out."""

import json
import math
import os
import socket
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import QUICK_RUN, one_line, run_ranks
from torch import nn
from torch.nn import functional as F

from imagenet_swa.analysis import points as points_module
from imagenet_swa.analysis.points import MeasureSettings, Point, conditions_of, key_of, l2_term, measure_points, read_journals
from imagenet_swa.arguments import parse_config
from imagenet_swa.batchnorm import recompute_statistics
from imagenet_swa.config import OptimizerConfig, TrainingError
from imagenet_swa.data.sampling import statistics_batches
from imagenet_swa.session import Session

pytestmark = pytest.mark.usefixtures("on_the_cpu")
SETTINGS = MeasureSettings(epoch=3, step=18, networks_per_pass=2)
FLAGS = ("--data.synthetic_num_images=[48,20]", "--optimizer.weight_decay=0.01")


def open_session(folder: Path, *flags: str) -> Session:
    AcceleratorState._reset_state(reset_partial_state=True)
    return Session.open(parse_config([*QUICK_RUN, *FLAGS, f"--output={folder}", *flags], "", ""))


def drop_half(layer: nn.Module, _images: object, output: torch.Tensor) -> torch.Tensor:
    """Dropout that BatchNorm sees, which the library's small networks do not have."""
    return F.dropout(output, 0.5, layer.training)


def open_with_dropout(folder: Path) -> Session:
    session = open_session(folder)
    session.network.get_submodule("conv_stem").register_forward_hook(drop_half)
    return session


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    return open_with_dropout(tmp_path_factory.mktemp("run"))


@pytest.fixture
def no_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks at an image fails."""
    monkeypatch.setattr(Session, "evaluate", lambda *_, **__: pytest.fail("images were looked at"))


def scaled(session: Session, factor: float) -> Point:
    """The session's weights times a factor."""

    def make() -> dict[str, torch.Tensor]:
        state = session.network.state_dict()
        return {name: tensor * factor if tensor.is_floating_point() else tensor.clone() for name, tensor in state.items()}

    return Point(f"times {factor}", {"factor": factor}, make)


def several(session: Session, *factors: float) -> list[Point]:
    return [scaled(session, factor) for factor in factors]


# ------------------------------------------------------------------------------------------------------- the numbers


def all_images(session: Session, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    loader = getattr(session.loaders, split)
    batches = list(loader.evaluation_stream([np.arange(len(loader.index))]))
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches])


def test_a_point_is_measured_as_a_plain_loop_measures_it(tmp_path: Path):
    """BatchNorm statistics are those of `recompute_statistics`; loss and errors are torch's over all images, the L2 term is half
    the weight decay times the sum of squares of every parameter.
    """
    session = open_session(tmp_path)
    point = scaled(session, 1.25)
    values = measure_points(session, [point], journal=tmp_path, settings=SETTINGS)[point.name]
    network = session.network_with(point.make())
    train, size = session.loaders.train, session.config.evaluation.batch_size
    batches = statistics_batches(48, seed=0, epoch=SETTINGS.epoch, rank=0, world_size=1, batch_size=size)
    recompute_statistics([network], (batch.images for batch in train.training_stream(batches, epoch=SETTINGS.epoch)))
    network.eval()
    for split, prefix in (("train", "train"), ("val", "test")):
        images, labels = all_images(session, split)
        with torch.no_grad():
            logits = torch.cat([network(images[i : i + 16]) for i in range(0, len(images), 16)])
        assert values[f"{prefix}_nll"] == pytest.approx(F.cross_entropy(logits.double(), labels).item(), abs=1e-6)
        assert values[f"{prefix}_error"] == pytest.approx(1 - (logits.argmax(1) == labels).double().mean().item(), abs=1e-12)
        assert values[f"num_{prefix}_images"] == len(labels)
    squares = sum(float((parameter.detach().numpy().astype(np.float64) ** 2).sum()) for parameter in network.parameters())
    assert values["l2"] == pytest.approx(0.01 / 2 * squares, rel=1e-9)
    assert values["train_loss"] == values["train_nll"] + values["l2"]
    assert values["num_batchnorm_images"] == 48


def test_statistics_at_the_point_are_used(session: Session, tmp_path: Path):
    """With the statistics that the weights came with, here those of no image at all, the figures would be others."""
    point = scaled(session, 1.0)
    values = measure_points(session, [point], journal=tmp_path, settings=SETTINGS)[point.name]
    stale = session.evaluate({"stale": session.network_with(point.make())})["stale"]
    assert abs(values["test_nll"] - stale.nll) > 1e-3


@pytest.mark.parametrize("decay_norm_and_bias", [True, False])
def test_the_l2_term_is_what_weight_decay_descends(decay_norm_and_bias: bool):
    """An SGD step of rate 1 with no other gradient moves each parameter by minus the gradient of the L2 term."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    network[2].bias.requires_grad_(False)
    config = OptimizerConfig(weight_decay=0.1, decay_norm_and_bias=decay_norm_and_bias, nesterov=True)
    before = l2_term(network, config)
    trained = [p for p in network.parameters() if p.requires_grad and (decay_norm_and_bias or p.ndim > 1)]
    for parameter in trained:
        value = parameter.detach().flatten()[0].item()
        for sign in (1, -1):
            parameter.data.flatten()[0] = value + sign * 1e-3
            moved = l2_term(network, config)
            assert moved - before == pytest.approx(0.1 / 2 * ((value + sign * 1e-3) ** 2 - value**2), abs=1e-12)
        parameter.data.flatten()[0] = value
    assert before == pytest.approx(0.05 * sum(float(p.detach().square().sum()) for p in trained))


def test_subsets_of_the_training_images(session: Session, tmp_path: Path):
    """Fewer training images for the loss and for BatchNorm are counted, and change the figures."""
    point = scaled(session, 1.0)
    few = replace(SETTINGS, num_train_images=10, num_batchnorm_images=20)
    all_of_them, some = (measure_points(session, [point], journal=tmp_path, settings=s)[point.name] for s in (SETTINGS, few))
    assert (some["num_train_images"], some["num_batchnorm_images"], some["num_test_images"]) == (10, 20, 20)
    assert some["train_nll"] != all_of_them["train_nll"]
    assert some["test_nll"] != all_of_them["test_nll"]


def test_how_points_share_passes_changes_nothing(session: Session, tmp_path: Path):
    """One by one, in pairs, all in one pass or in another order: the same bits, though every network draws dropout."""
    points = several(session, 1.0, 1.1, 1.2, 1.3)
    orders = [(points, 1), (points, 2), (points, 4), (points[::-1], 3)]
    results = [
        measure_points(session, order, journal=tmp_path / str(i), settings=replace(SETTINGS, networks_per_pass=number))
        for i, (order, number) in enumerate(orders)
    ]
    assert all(result == results[0] for result in results)
    assert len({values["test_nll"] for values in results[0].values()}) == 4


# -------------------------------------------------------------------------------------------------------- journals


def test_what_stands_in_a_journal_is_not_measured_again(session: Session, tmp_path: Path, request: pytest.FixtureRequest):
    """A second call reads the values of the first, of whichever rank's journal, and looks at no image."""
    points = several(session, 1.0, 1.1)
    first = measure_points(session, points, journal=tmp_path, settings=SETTINGS)
    lines = (tmp_path / "points-rank-00.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "points-rank-00.jsonl").write_text(lines[0])
    (tmp_path / "points-rank-07.jsonl").write_text(lines[1])
    request.getfixturevalue("no_measuring")
    said: list[str] = []
    assert measure_points(session, points, journal=tmp_path, settings=SETTINGS, say=said.append) == first
    assert said == ["2 points, 2 of them measured before"]


def test_a_line_that_was_cut_off_is_measured_again(session: Session, tmp_path: Path):
    """A half-written last line counts as absent, and does not swallow the line that follows it."""
    points = several(session, 1.0, 1.1, 1.2)
    first = measure_points(session, points, journal=tmp_path, settings=SETTINGS)
    path = tmp_path / "points-rank-00.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[: content.rindex(b"\n", 0, -1) + 30])
    assert len(read_journals(tmp_path)) == 2
    assert measure_points(session, points, journal=tmp_path, settings=SETTINGS) == first
    assert len(read_journals(tmp_path)) == 3
    assert len(path.read_text().splitlines()) == 4


def test_a_damaged_journal_is_no_obstacle(session: Session, tmp_path: Path):
    """Lines of bytes that are no text, no JSON or another JSON are passed over."""
    points = several(session, 1.0)
    first = measure_points(session, points, journal=tmp_path, settings=SETTINGS)
    path = tmp_path / "points-rank-00.jsonl"
    path.write_bytes(b'\xff\xfe\n[1]\n{"key": 3}\n{"key": "a", "values": 7}\nnull\n' + path.read_bytes())
    assert measure_points(session, points, journal=tmp_path, settings=SETTINGS) == first


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({"epoch": 2}, ()),
        ({"num_batchnorm_images": 24}, ()),
        ({"num_train_images": 24}, ()),
        ({}, ("--optimizer.weight_decay=0.02",)),
        ({}, ("--optimizer.decay_norm_and_bias=false",)),
        ({}, ("--seed=1",)),
        ({}, ("--evaluation.batch_size=8",)),
        ({}, ("--data.synthetic_num_images=[48,24]",)),
        ({}, ("--preprocessing.crop_area=[0.5,1.0]",)),
        ({}, ("--model.kwargs={drop_rate: 0.25}",)),
    ],
)
def test_what_decides_the_values_decides_the_key(
    session: Session, tmp_path: Path, changes: dict[str, Any], flags: tuple[str, ...]
):
    """Another setting that changes a value gives another key."""
    point, other = scaled(session, 1.0), open_session(tmp_path, *flags)
    assert key_of(point, conditions_of(session, SETTINGS)) != key_of(point, conditions_of(other, replace(SETTINGS, **changes)))


def test_what_does_not_decide_the_values_leaves_the_key(session: Session, tmp_path: Path):
    """Where results go, how many points share a pass and which file the network's first weights came from decide nothing."""
    point, other = scaled(session, 1.0), open_session(tmp_path, "--log_every=7", "--swa.lr_max=0.5")
    assert key_of(point, conditions_of(session, SETTINGS)) == key_of(
        point, conditions_of(other, replace(SETTINGS, networks_per_pass=1))
    )


def test_points_of_other_settings_are_left_alone(session: Session, tmp_path: Path):
    """A journal with points of other settings or weights is added to; a line says so, and the old ones are still good."""
    old = measure_points(session, several(session, 1.0), journal=tmp_path, settings=SETTINGS)
    said: list[str] = []
    few = replace(SETTINGS, num_train_images=10)
    new = measure_points(session, several(session, 1.0), journal=tmp_path, settings=few, say=said.append)
    assert said[0] == "1 points to measure; 1 other points in the journals, of other settings or weights, are left alone"
    assert new != old
    assert measure_points(session, several(session, 1.0), journal=tmp_path, settings=SETTINGS) == old
    assert len((tmp_path / "points-rank-00.jsonl").read_text().splitlines()) == 2


def test_points_of_one_definition_are_measured_once(session: Session, tmp_path: Path):
    """Two names for the same weights give the same values and one line."""
    point = scaled(session, 1.0)
    twin = replace(point, name="twin")
    values = measure_points(session, [point, twin], journal=tmp_path, settings=SETTINGS)
    assert values[point.name] == values["twin"]
    assert len((tmp_path / "points-rank-00.jsonl").read_text().splitlines()) == 1


def test_losses_that_are_not_finite(session: Session, tmp_path: Path):
    """Where the weights overflow, values are NaN, in the first call and in the one that reads them back; JSON stays JSON."""
    point = scaled(session, 1e30)
    for _ in range(2):
        values = measure_points(session, [point], journal=tmp_path, settings=SETTINGS)[point.name]
        assert math.isnan(values["test_nll"]) and math.isnan(values["train_loss"])
        assert 0 <= values["test_error"] <= 1
    text = (tmp_path / "points-rank-00.jsonl").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


# ---------------------------------------------------------------------------------------------------- sharing out


def choose_port(folder: Path) -> None:
    """Where the ranks of a folder meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(free.getsockname()[1]))


def become_rank(rank: int, folder: Path, world_size: int = 2) -> None:
    """What a launcher tells a process of a group on one machine. One thread each: with more, sums differ in the last bits."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # or Accelerate sets it, to more for one process than for two
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (folder / "port").read_text(), "CUDA_VISIBLE_DEVICES": ""}
    os.environ.update({name: str(value) for name, value in places.items()})


FACTORS = (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6)


def measure_on_a_rank(rank: int, folder: Path) -> None:
    """What each of two processes does; the third of the points is there already."""
    become_rank(rank, folder)
    session = open_with_dropout(folder)
    assert (session.runtime.rank, session.runtime.world_size) == (rank, 2)
    values = measure_points(session, several(session, *FACTORS), journal=folder / "journal", settings=SETTINGS)
    (folder / f"values-{rank}.json").write_text(json.dumps(values))
    session.runtime.barrier()
    torch.distributed.destroy_process_group()


def test_two_ranks_measure_what_one_measures(session: Session, tmp_path: Path):
    """Two real processes share out what is missing, every second point to each, and both return what one rank measures, bit for
    bit.
    """
    expected = measure_points(session, several(session, *FACTORS), journal=tmp_path / "one", settings=SETTINGS)
    measure_points(session, several(session, FACTORS[2]), journal=tmp_path / "journal", settings=SETTINGS)
    choose_port(tmp_path)
    run_ranks(measure_on_a_rank, 2, tmp_path)
    for rank in range(2):
        assert json.loads((tmp_path / f"values-{rank}.json").read_text()) == expected
    lines = [(tmp_path / "journal" / f"points-rank-0{rank}.jsonl").read_text().splitlines() for rank in range(2)]
    names = [[json.loads(line)["name"] for line in of_rank] for of_rank in lines]
    assert names == [["times 1.2", "times 1.0", "times 1.3", "times 1.5"], ["times 1.1", "times 1.4", "times 1.6"]]


def test_a_rank_waits_for_the_others(tmp_path: Path, session: Session, monkeypatch: pytest.MonkeyPatch):
    """A rank that is done early looks into the journals until everything is there; no collective with a time limit waits."""
    values = {key: dict.fromkeys(sorted(points_module._MEASURED), number) for key, number in (("a", 1.0), ("b", 2.0))}
    first, late = (json.dumps({"key": key, "name": "", "values": values[key]}) + "\n" for key in values)
    journal = tmp_path / "points-rank-01.jsonl"
    looks: list[int] = []

    def look(_seconds: float) -> None:
        looks.append(1)
        if len(looks) == 3:
            journal.write_text(late)

    (tmp_path / "points-rank-00.jsonl").write_text(first)
    monkeypatch.setattr(points_module, "time", SimpleNamespace(sleep=look))  # of this module: other threads sleep too
    monkeypatch.setattr(type(session.runtime), "barrier", lambda _: looks.append(2))
    runtime = replace(session.runtime, world_size=2)
    assert points_module._all_values(tmp_path, {"a", "b"}, runtime) == values
    assert looks == [1, 1, 1, 2]


def test_a_rank_does_not_wait_for_one_that_failed(tmp_path: Path, session: Session, monkeypatch: pytest.MonkeyPatch):
    """A rank that fails says why in the folder, those that wait end with that, and the next call goes on as if nothing were."""

    def fail(*_: object, **__: object) -> None:
        raise MemoryError("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(Session, "evaluate", fail)
        with pytest.raises(MemoryError):
            measure_points(session, several(session, 1.0), journal=tmp_path, settings=SETTINGS)
    monkeypatch.setattr(points_module.time, "sleep", lambda _: pytest.fail("waited"))
    with pytest.raises(TrainingError, match="another process failed, and its points are missing: MemoryError out of memory"):
        points_module._all_values(tmp_path, {"a"}, replace(session.runtime, world_size=2))
    assert measure_points(session, several(session, 1.0), journal=tmp_path, settings=SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["points-rank-00.jsonl"]


def test_ranks_that_do_not_share_the_folder(tmp_path: Path, session: Session):
    """A process that does not find what rank 0 put into the folder, as on another machine, is counted before any measuring."""

    class Blind(type(session.runtime)):
        @property
        def is_main(self) -> bool:
            return False

        def sum(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor

    runtime = Blind(**{**vars(session.runtime), "world_size": 1})
    message = one_line(points_module._prepare_folder, tmp_path / "journal", runtime)
    assert f"1 of 1 processes do not see {tmp_path / 'journal'} as rank 0 does" in message


# ---------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(("gib", "expected"), [(1000, 16), (0, 1)])
def test_as_many_networks_as_memory_allows(session: Session, monkeypatch: pytest.MonkeyPatch, gib: int, expected: int):
    """At most 16 networks share a pass, at least one, and a quarter of what is free holds all of them with their results."""
    monkeypatch.setattr(points_module, "_free_memory", lambda: gib * 2**30)
    assert points_module._networks_that_fit(session) == expected
    weights = sum(tensor.nbytes for tensor in session.network.state_dict().values())
    monkeypatch.setattr(points_module, "_free_memory", lambda: 4 * 6 * weights)
    assert 1 <= points_module._networks_that_fit(session) <= 6
