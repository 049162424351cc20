"""Images that cannot be decoded: they stop a run with their names, or are left out as if the data had never had them."""

import io
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from conftest import run, run_ranks
from cuts import cut_at_epoch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from imagenet_swa.agreement import Wishes
from imagenet_swa.arguments import parse_config
from imagenet_swa.checkpoint import what_is_wrong
from imagenet_swa.cli import main
from imagenet_swa.config import Config, DataConfig, InputError, ModelConfig, OptimizerConfig, SpeedConfig, SwaConfig
from imagenet_swa.data import index_cache, loaders
from imagenet_swa.data.batch import Batch, TooManyBadImagesError
from imagenet_swa.data.index import load_index
from imagenet_swa.data.sampling import Indices, epoch_order, training_batches
from imagenet_swa.data.sources import Source, scan
from imagenet_swa.data.synthetic import synthetic_index
from imagenet_swa.engine import Progress, train_one_epoch
from imagenet_swa.finetune import finetune
from imagenet_swa.optim import make_sgd
from imagenet_swa.plan import make_plan
from imagenet_swa.records import Records
from imagenet_swa.runtime import start_runtime

pytestmark = pytest.mark.usefixtures("on_the_cpu")

BACKENDS = ("dali", "torchvision")
Weights = dict[str, torch.Tensor]


# ------------------------------------------------------------------------------------- the update of a step, by itself

NUM_IMAGES, NUM_CLASSES, BATCH_SIZE = 48, 4, 12


class LoaderWithHoles:
    """Images of random numbers, of which some cannot be decoded."""

    decoder = "none"

    def __init__(self, bad: Iterable[int]) -> None:
        self.index = synthetic_index(NUM_IMAGES, NUM_CLASSES)
        self.bad = set(bad)
        self.images = torch.randn(NUM_IMAGES, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def training_stream(self, batches: Iterable[Indices], *, epoch: int) -> Iterator[Batch]:
        del epoch
        for indices in batches:
            kept = np.array([i for i in indices if int(i) not in self.bad], np.int64)
            left_out = tuple(int(i) for i in indices if int(i) in self.bad)
            yield Batch(self.images[kept], torch.from_numpy(self.index.labels[kept]), kept, left_out)

    def evaluation_stream(self, batches: Iterable[Indices]) -> Iterator[Batch]:
        return self.training_stream(batches, epoch=0)


def network(*, batchnorm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4) if batchnorm else nn.GroupNorm(2, 4)
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, NUM_CLASSES))


def settings(*, label_smoothing: float = 0.0, part: int = 64, max_bad: int = 100, policy: Any = "skip") -> Config:
    return Config(
        global_batch_size=BATCH_SIZE,
        log_every=1,
        model=ModelConfig(num_classes=NUM_CLASSES),
        swa=SwaConfig(num_epochs=1, lr_max=0.05, lr_min=0.05, report_epochs=()),
        optimizer=OptimizerConfig(label_smoothing=label_smoothing),
        speed=SpeedConfig(max_batch_size_per_device=part),
        data=DataConfig(on_bad_image=policy, max_bad_images=max_bad),
    )


class Nobody:
    """Wants nothing and hears nothing."""

    def wishes(self) -> Wishes:
        return Wishes()

    def at_minimum(self, step: int) -> None: ...

    def heed(self, verdicts: object) -> None: ...


def train_epoch(folder: Path, config: Config, bad: Iterable[int], *, batchnorm: bool = False) -> Weights:
    """One epoch of the package's training; metrics.jsonl goes to the folder."""
    folder.mkdir(exist_ok=True)
    runtime = start_runtime(config)
    net = network(batchnorm=batchnorm)
    prepared, optimizer = runtime.accelerator.prepare(net, make_sgd(net, config.optimizer, fused=config.speed.fused_optimizer))
    train_one_epoch(
        prepared,
        optimizer,
        LoaderWithHoles(bad),
        plan=make_plan(config, num_images=NUM_IMAGES, world_size=runtime.world_size),
        progress=Progress(),
        config=config,
        runtime=runtime,
        records=Records(folder, runtime),
        attendant=Nobody(),
    )
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def plain_loop(bad: Iterable[int], *, label_smoothing: float = 0.0, batchnorm: bool = False) -> tuple[Weights, list[float]]:
    """torch's own loop over the images that there are, with torch's mean loss: weights, and the loss of each step."""
    net, loader, bad = network(batchnorm=batchnorm), LoaderWithHoles(()), set(bad)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    losses = []
    for batch in global_batches():
        kept = [i for i in batch if i not in bad]
        labels = torch.from_numpy(loader.index.labels[kept])
        loss = F.cross_entropy(net(loader.images[kept]), labels, label_smoothing=label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return net.state_dict(), losses


def global_batches() -> list[list[int]]:
    order = epoch_order(NUM_IMAGES, seed=0, epoch=0)
    return order.reshape(-1, BATCH_SIZE).tolist()


def losses_of(folder: Path) -> list[float]:
    return [line["loss"] for line in metrics_of(folder) if line["kind"] == "train"]


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_close(got: Weights, wanted: Weights) -> None:
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], atol=1e-6, rtol=0, msg=lambda text, name=name: f"{name}: {text}")


def first_images(*numbers_in_batch: tuple[int, int]) -> list[int]:
    """Images by (global batch, position in it)."""
    return [global_batches()[batch][position] for batch, position in numbers_in_batch]


@pytest.mark.parametrize(
    ("part", "batchnorm"), [(12, False), (12, True), (4, False), (3, False)], ids=["whole", "batchnorm", "thirds", "quarters"]
)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("bad", [[(0, 3)], [(1, 0), (1, 1), (1, 2), (1, 3), (3, 7)]], ids=["one", "several"])
def test_a_step_is_that_of_the_images_that_there_are(
    tmp_path: Path, part: int, batchnorm: bool, label_smoothing: float, bad: list[tuple[int, int]]
):
    """With bad images every update and loss is that of a plain loop over the others with their mean loss."""
    left_out = first_images(*bad)
    wanted, losses = plain_loop(left_out, label_smoothing=label_smoothing, batchnorm=batchnorm)
    config = settings(label_smoothing=label_smoothing, part=part)
    assert_close(train_epoch(tmp_path, config, left_out, batchnorm=batchnorm), wanted)
    assert losses_of(tmp_path) == pytest.approx(losses, abs=1e-5)
    assert f"epoch 1/1: {len(bad)} images left out as bad" in (tmp_path / "train.log").read_text()
    everything, _ = plain_loop((), label_smoothing=label_smoothing, batchnorm=batchnorm)
    assert max(float((wanted[name] - everything[name]).abs().max()) for name in wanted) > 1e-4  # the images matter


def test_skip_changes_no_bit_of_a_step_without_bad_images(tmp_path: Path):
    """Where nothing is bad, leaving out what is bad trains to the very bits of stopping at it."""
    skip, stop = (train_epoch(tmp_path / policy, settings(policy=policy), ()) for policy in ("skip", "stop"))
    assert all(torch.equal(skip[name], stop[name]) for name in stop)
    assert losses_of(tmp_path / "skip") == losses_of(tmp_path / "stop")


# With two ranks, positions 0-5 of a global batch are rank 0's, 6-11 rank 1's.
ON_RANKS = {
    "nothing": [],
    "one rank": [(0, 7), (2, 8), (2, 11)],
    "both ranks": [(0, 0), (0, 6), (1, 2), (3, 9)],
    "all of a part": [(1, position) for position in range(6, 12)],
}


def join_ranks(rank: int, folder: Path) -> None:
    """Make this process one of two, as a launcher and Accelerate do."""
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"})
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)


def train_on_a_rank(rank: int, folder: Path) -> None:
    """All cases of ON_RANKS, with and without accumulation, and a limit that is passed only by both ranks together."""
    join_ranks(rank, folder)
    for name, bad in ON_RANKS.items():
        for part in (6, 3):
            weights = train_epoch(folder / f"{name}-{part}", settings(part=part), first_images(*bad))
            torch.save(weights, folder / f"{name}-{part}" / f"rank-{rank}.pt")
    try:
        train_epoch(folder / "limit", settings(max_bad=3), first_images(*ON_RANKS["both ranks"]))
    except TooManyBadImagesError as error:
        (folder / f"limit-{rank}.txt").write_text(str(error))
    train_epoch(folder / "limit", settings(max_bad=4), first_images(*ON_RANKS["both ranks"]))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `train_on_a_rank` leaves."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(train_on_a_rank, 2, folder)
    return folder


@pytest.mark.parametrize("part", [6, 3], ids=["whole", "accumulated"])
@pytest.mark.parametrize("name", ON_RANKS)
def test_two_ranks_make_the_step_of_one(two_ranks: Path, name: str, part: int):
    """Two processes, whichever of them has the bad images, update as one plain loop over the images that there are."""
    wanted, losses = plain_loop(first_images(*ON_RANKS[name]))
    of_ranks = [torch.load(two_ranks / f"{name}-{part}" / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]
    for weights in of_ranks:
        assert_close(weights, wanted)
    assert all(torch.equal(of_ranks[0][key], of_ranks[1][key]) for key in wanted)
    assert losses_of(two_ranks / f"{name}-{part}") == pytest.approx(losses, abs=1e-5)


def test_the_limit_counts_all_ranks_together(two_ranks: Path):
    """Four bad images, two on each rank, pass a limit of three on both ranks at once, and none of four."""
    messages = [(two_ranks / f"limit-{rank}.txt").read_text() for rank in range(2)]
    assert messages[0] == messages[1]
    assert "4 images of this pass cannot be decoded, data.max_bad_images is 3" in messages[0]
    assert "imagenet-swa verify" in messages[0] and "\n" not in messages[0]


# ------------------------------------------------------------------------------------------------- images on the disk


@dataclass(frozen=True)
class Images:
    """32 training and 12 validation images by lists, indexed; `bad` are the names of those of each split that are bad."""

    root: Path
    bad: dict[str, list[str]]

    @property
    def flags(self) -> tuple[str, ...]:
        lists = [(f"--data.{split}={self.root / split}", f"--data.{split}_list={self.root / split}.txt") for split in self.bad]
        return (*lists[0], *lists[1], f"--data.index={self.root / 'index'}", "--model.num_classes=3")

    def names(self, split: str) -> list[str]:
        """Of all images, in the order of the index."""
        return [line.rpartition(" ")[0] for line in (self.root / f"{split}.txt").read_text().splitlines()]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def make_gif(path: Path) -> None:
    buffer = io.BytesIO()
    Image.open(path).save(buffer, "GIF")
    path.write_bytes(buffer.getvalue())


# What is done to an image before the index is built, and after; and what the message says of it.
DAMAGES: dict[str, tuple[Callable[[Path], None] | None, Callable[[Path], None] | None, str]] = {
    "truncated": (truncate, None, "truncated|damaged or cut short"),
    "empty": (empty, None, "the file is empty"),
    "gif": (make_gif, None, "not an image of a known format; it starts with b'GIF8"),
    "missing": (None, Path.unlink, "no such file"),
}
BAD = {
    "train": {"ant/2.JPEG": "truncated", "bee/0.JPEG": "empty", "bee/5.JPEG": "gif", "cat/7.JPEG": "missing"},
    "val": {"ant/1.JPEG": "truncated", "ant/3.JPEG": "empty", "bee/2.JPEG": "gif", "cat/0.JPEG": "missing"},
}


def make_images(root: Path, source: Path, bad: dict[str, dict[str, str]]) -> Images:
    """The source's images, eight of them twice, with lists and index and these damages."""
    shutil.copytree(source, root)
    for number in range(8):
        shutil.copy(root / "val" / "ant" / f"{number % 4}.JPEG", root / "train" / "ant" / f"more-{number}.JPEG")
    for split in ("train", "val"):
        names = sorted(str(path.relative_to(root / split)) for path in (root / split).rglob("*.JPEG"))
        labels = [("ant", "bee", "cat").index(name.split("/")[0]) for name in names]
        (root / f"{split}.txt").write_text("".join(f"{name} {label}\n" for name, label in zip(names, labels, strict=True)))
    images = Images(root, {split: sorted(bad[split]) for split in ("train", "val")})
    damaged = [(root / split / name, DAMAGES[kind]) for split in bad for name, kind in bad[split].items()]
    for path, (before, _, _) in damaged:
        if before is not None:
            before(path)
    with redirect_stdout(io.StringIO()):
        assert main(["index", *images.flags]) == 0
    for path, (_, after, _) in damaged:
        if after is not None:
            after(path)
    return images


@pytest.fixture(scope="module")
def clean(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Images:
    """Nothing is bad."""
    return make_images(tmp_path_factory.mktemp("clean") / "images", image_folder, {"train": {}, "val": {}})


@pytest.fixture(scope="module")
def damaged(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Images:
    """Four images of each split are bad, each in its own way."""
    return make_images(tmp_path_factory.mktemp("damaged") / "images", image_folder, BAD)


QUICK = (
    "--model.name=test_efficientnet",
    "--model.pretrained=false",
    "--preprocessing.image_size=32",
    "--global_batch_size=8",
    "--swa.num_epochs=2",
    "--swa.report_epochs=[]",
    "--swa.lr_max=0.01",
    "--swa.lr_min=0.001",
    "--log_every=1",
    "--evaluation.batch_size=8",
)
SKIP = "--data.on_bad_image=skip"


def backend_flags(backend: str) -> tuple[str, str]:
    return (f"--data.backend={backend}", f"--data.num_workers={int(backend == 'dali')}")


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and its run folder."""

    code: int
    out: str
    err: str
    folder: Path = Path()

    @property
    def results(self) -> list[dict[str, Any]]:
        return json.loads((self.folder / "results.json").read_text())

    @property
    def named(self) -> list[str]:
        """Paths of the images that were said to be left out, in the order of the lines."""
        return [line.split(": ")[2] for line in self.err.splitlines() if line.startswith("imagenet-swa: left out")]

    @property
    def logged(self) -> list[tuple[str, str]]:
        """Split and name of every line of the logs of bad images."""
        lines = [line for path in sorted(self.folder.glob("bad-images-rank-*.tsv")) for line in path.read_text().splitlines()]
        return [cast(tuple[str, str], tuple(line.split("\t")[:2])) for line in lines]

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("imagenet-swa: error")]


def command(*arguments: str, folder: Path = Path()) -> Outcome:
    """A command of the program in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(arguments)
    return Outcome(code, out.getvalue(), err.getvalue(), folder)


def train(folder: Path, *flags: str) -> Outcome:
    return command("train", *QUICK, *flags, f"--output={folder}", folder=folder)


def launch(folder: Path, *flags: str, timeout: float = 90) -> Outcome:
    """The same on two processes, by accelerate's launcher."""
    launcher = ["accelerate", "launch", "--config_file", "launch/accelerate/two_cpu_processes.yaml", "-m", "imagenet_swa.train"]
    done: subprocess.CompletedProcess[str] = run(
        [*launcher, *QUICK, *flags, f"--output={folder}"], timeout=timeout, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1"
    )
    return Outcome(done.returncode, done.stdout, done.stderr, folder)


def train_as_told(rank: int, folder: Path) -> None:
    """One of two processes: trains with the flags in the folder and leaves there how it ended."""
    join_ranks(rank, folder)
    outcome = train(folder / "run", *json.loads((folder / "flags.json").read_text()))
    ended = {"code": outcome.code, "out": outcome.out, "err": outcome.err}
    (folder / f"outcome-{rank}.json").write_text(json.dumps(ended))


def train_on_ranks(folder: Path, *flags: str) -> list[Outcome]:
    """The same on two processes without a launcher, which would end one when the other ends: how each ended."""
    folder.mkdir()
    (folder / "flags.json").write_text(json.dumps(flags))
    run_ranks(train_as_told, 2, folder)
    return [Outcome(**json.loads((folder / f"outcome-{rank}.json").read_text()), folder=folder / "run") for rank in range(2)]


def paths_of(images: Images, *splits: str) -> list[str]:
    return sorted(str(images.root / split / name) for split in splits for name in images.bad[split])


def assert_same_runs(one: Outcome, other: Outcome) -> None:
    """Equal weights, to the last bit, predictions, results and logged losses."""
    kinds = ("captures/*.safetensors", "averages/*.safetensors", "swa.safetensors")
    names = sorted(str(path.relative_to(one.folder)) for kind in kinds for path in one.folder.glob(kind))
    assert "swa.safetensors" in names
    assert names == sorted(str(path.relative_to(other.folder)) for kind in kinds for path in other.folder.glob(kind))
    for name in names:
        assert (one.folder / name).read_bytes() == (other.folder / name).read_bytes(), name
    for path in one.folder.glob("predictions/*"):
        assert pq.read_table(path) == pq.read_table(other.folder / "predictions" / path.name)
    assert one.results == other.results
    assert losses_of(one.folder) == losses_of(other.folder)


# -------------------------------------------------------------------------------------------------------------- stop


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("kind", "split"), [(kind, "val") for kind in DAMAGES] + [("truncated", "train"), ("missing", "train")])
def test_a_bad_image_stops_the_run(tmp_path: Path, image_folder: Path, backend: str, kind: str, split: str):
    """By default one bad image ends a run with exit code 2 and one line: its path, what is wrong with it, what to do."""
    bad = {"train": {}, "val": {}} | {split: {"bee/2.JPEG": kind}}
    images = make_images(tmp_path / "images", image_folder, bad)
    outcome = train(tmp_path / "run", *images.flags, *backend_flags(backend), "--swa.num_epochs=1")
    assert outcome.code == 2
    (line,) = outcome.errors
    assert "Traceback" not in outcome.err and outcome.named == [] and outcome.logged == []
    if kind == "missing":  # noticed when the index is compared with the data
        assert line.startswith("imagenet-swa: error: the index ") and f"{images.root / split / 'bee/2.JPEG'} is gone" in line
        return
    assert line.startswith(f"imagenet-swa: error: cannot decode the image {images.root / split / 'bee/2.JPEG'}: ")
    assert any(reason in line for reason in DAMAGES[kind][2].split("|"))
    for remedy in ("repair it", "take it out", "data.quarantine", "imagenet-swa verify", "data.on_bad_image to skip"):
        assert remedy in line


# -------------------------------------------------------------------------------------------------------------- skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_skip_changes_nothing_of_clean_data(tmp_path: Path, clean: Images, backend: str):
    """On good images skip and stop leave the same files with the same bits."""
    stop = train(tmp_path / "stop", *clean.flags, *backend_flags(backend))
    skip = train(tmp_path / "skip", *clean.flags, *backend_flags(backend), SKIP)
    assert (stop.code, skip.code) == (0, 0)
    assert_same_runs(stop, skip)
    files = [sorted(str(path.relative_to(run.folder)) for path in run.folder.rglob("*")) for run in (stop, skip)]
    assert files[0] == files[1]
    assert [result["num_left_out"] for result in stop.results] == [0] * len(stop.results)
    assert "left out" not in (skip.folder / "report.md").read_text() + skip.err


@pytest.fixture(scope="module", params=BACKENDS)
def skipped(request: pytest.FixtureRequest, damaged: Images, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A run that left the bad images out."""
    return train(tmp_path_factory.mktemp("skipped") / "run", *damaged.flags, *backend_flags(request.param), SKIP)


def test_skip_runs_through_and_names_each_bad_image_once(skipped: Outcome, damaged: Images):
    """With skip the run finishes; stderr and log name each bad image once and no other, with the reason."""
    assert (skipped.code, skipped.errors) == (0, [])
    assert sorted(skipped.named) == paths_of(damaged, "train", "val")
    assert sorted(skipped.logged) == sorted((split, name) for split in damaged.bad for name in damaged.bad[split])
    (log,) = skipped.folder.glob("bad-images-rank-*.tsv")
    for line in log.read_text().splitlines():
        split, name, reason = line.split("\t")
        wanted = DAMAGES[BAD[split][name]][2].split("|")
        assert any(words in reason for words in wanted), line
        assert f"{damaged.root / split / name}: {reason}" in skipped.err


def test_skip_counts_the_images_that_there_are(skipped: Outcome, damaged: Images):
    """Results, report, BatchNorm line and predictions speak of the good images, by their numbers in the index."""
    assert {(result["num_images"], result["num_left_out"]) for result in skipped.results} == {(8, 4)}
    for result in skipped.results:
        assert result["top1"] == result["num_correct"] / 8
    assert "**4 validation images were left out**" in (skipped.folder / "report.md").read_text()
    assert "8 validation images, each counted once" in (skipped.folder / "report.md").read_text()
    assert "BatchNorm statistics from 28 images" in skipped.err
    assert "epoch 1/2: 4 images left out as bad" in skipped.err and "epoch 2/2: 4 images left out as bad" in skipped.err
    names = damaged.names("val")
    kept = [number for number, name in enumerate(names) if name not in damaged.bad["val"]]
    tables = list(skipped.folder.glob("predictions/*.parquet"))
    assert len(tables) == len(skipped.results)
    for path in tables:
        table = pq.read_table(path).to_pydict()
        assert table["index"] == kept
        assert table["label"] == [("ant", "bee", "cat").index(names[number].split("/")[0]) for number in kept]


def test_the_log_of_a_run_is_the_next_ones_quarantine(tmp_path: Path, skipped: Outcome, damaged: Images):
    """With the log as quarantine list a run that stops at bad images finishes, and measures what the first one measured."""
    (log,) = skipped.folder.glob("bad-images-rank-*.tsv")
    backend = next(name for name in BACKENDS if f"backend: {name}" in (skipped.folder / "config.yaml").read_text())
    second = train(tmp_path / "run", *damaged.flags, *backend_flags(backend), f"--data.quarantine={log}")
    assert (second.code, second.errors, second.named) == (0, [], [])
    assert {(result["num_images"], result["num_left_out"]) for result in second.results} == {(8, 0)}
    before, after = skipped.results[0], second.results[0]  # the untrained network: the same weights
    assert before["name"] == after["name"] == "pretrained"
    assert {k: v for k, v in after.items() if k != "num_left_out"} == {k: v for k, v in before.items() if k != "num_left_out"}


def test_a_split_of_bad_images_ends_the_run(tmp_path: Path, image_folder: Path):
    """Where not one validation image is left, a run that leaves bad ones out ends with one line."""
    names = [f"{name}/{number}.JPEG" for name in ("ant", "bee", "cat") for number in range(4)]
    images = make_images(tmp_path / "images", image_folder, {"train": {}, "val": dict.fromkeys(names, "empty")})
    ways = {
        "ours": backend_flags("dali"),
        "dali": (*backend_flags("dali"), "--data.resize=dali"),
        "PIL": backend_flags("torchvision"),
    }
    for name, flags in ways.items():
        outcome = train(tmp_path / name, *images.flags, *flags, SKIP)
        assert outcome.code == 2, name
        (line,) = outcome.errors
        assert "12 images" in line and "none is left" in line


# ---------------------------------------------------------------------------------------------------- both, one and two

# GroupNorm in place of BatchNorm: with it two processes train to the weights of one.
WITHOUT_BATCHNORM = "--model.name=test_efficientnet_gn"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The flag of a weights file to start from."""
    file = tmp_path_factory.mktemp("start") / "start.safetensors"
    torch.manual_seed(0)
    save_file(timm.create_model("test_efficientnet_gn", num_classes=3).state_dict(), file)
    return f"--model.weights={file}"


@pytest.fixture(scope="module")
def on_processes(damaged: Images, start: str, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Outcome]:
    """Runs that left the bad images out, by backend and number of processes."""
    folder = tmp_path_factory.mktemp("processes")
    outcomes = {}
    for backend in BACKENDS:
        flags = (*damaged.flags, *backend_flags(backend), SKIP, WITHOUT_BATCHNORM, start, "--model.pretrained=true")
        outcomes[backend, 1] = train(folder / f"{backend}-1", *flags)
        if backend == "dali":
            outcomes[backend, 2] = launch(folder / f"{backend}-2", *flags)
        else:
            first, second = train_on_ranks(folder / f"{backend}-2", *flags)
            outcomes[backend, 2] = replace(first, code=first.code or second.code, err=first.err + second.err)
    return outcomes


def test_backends_and_processes_leave_out_the_same_images(on_processes: dict[tuple[str, int], Outcome], damaged: Images):
    """Either backend, on one process or two, leaves out the same images, each rank naming its own once."""
    for key, outcome in on_processes.items():
        assert outcome.code == 0, outcome.err
        assert set(outcome.named) == set(paths_of(damaged, "train", "val")), key
        assert set(outcome.logged) == {(split, name) for split in damaged.bad for name in damaged.bad[split]}, key
    for backend in BACKENDS:
        outcome = on_processes[backend, 2]
        lines = [line for line in outcome.err.splitlines() if line.startswith("imagenet-swa: left out")]
        assert len(set(lines)) == len(lines)
        for rank in range(2):
            log = (outcome.folder / f"bad-images-rank-{rank}.tsv").read_text().splitlines()
            assert len(log) == sum(line.startswith(f"imagenet-swa: left out [rank {rank}]: ") for line in lines) > 0


def test_backends_and_processes_measure_the_same(on_processes: dict[tuple[str, int], Outcome]):
    """With bad images, evaluation has the same counts from either backend, on one process or two."""
    keys = ("name", "epoch", "num_images", "num_left_out", "num_correct", "num_correct_top5")
    wanted = [[result[key] for key in keys] for result in on_processes["torchvision", 1].results]
    assert len(wanted) == 5
    for outcome in on_processes.values():
        assert [[result[key] for key in keys] for result in outcome.results] == wanted
        assert "**4 validation images were left out**" in (outcome.folder / "report.md").read_text()


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_processes_train_to_the_weights_of_one(on_processes: dict[tuple[str, int], Outcome], backend: str):
    """With bad images on either process, two end with the captures and the average of one, but for rounding."""
    one, two = on_processes[backend, 1], on_processes[backend, 2]
    for name in ("captures/epoch-01.safetensors", "captures/epoch-02.safetensors", "swa.safetensors"):
        weights, others = load_file(one.folder / name), load_file(two.folder / name)
        assert max(float((weights[key].double() - others[key].double()).abs().max()) for key in weights) < 1e-5, name
    assert losses_of(one.folder) == pytest.approx(losses_of(two.folder), abs=1e-4)


# ---------------------------------------------------------------------------------------------------------- the limit


@pytest.fixture(scope="module")
def late(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Images:
    """With global batches of 12, epoch 1 meets no bad image and epoch 2 meets three, left over in epoch 1: of two processes one
    meets two of them and the other one.
    """
    names = make_images(tmp_path_factory.mktemp("names") / "images", image_folder, {"train": {}, "val": {}}).names("train")
    first, second = (epoch_order(32, seed=0, epoch=epoch)[:24].reshape(2, 2, 6) for epoch in range(2))
    of_ranks = [sorted(set(second[:, rank].ravel().tolist()) - set(first.ravel().tolist())) for rank in range(2)]
    bad = {names[number]: "gif" for number in [*of_ranks[0][:2], *of_ranks[1][:1]]}
    assert len(bad) == 3
    return make_images(tmp_path_factory.mktemp("late") / "images", image_folder, {"train": bad, "val": {}})


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ((SKIP, "--data.max_bad_images=2"), "3 images cannot be decoded, the last is "),
        ((), "cannot decode the image "),
    ],
    ids=["limit", "stop"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_that_stopped_goes_on_leaving_out(tmp_path: Path, late: Images, backend: str, first: tuple[str, ...], message: str):
    """A run that ended at its bad images goes on from its checkpoint once more may be left out, to the bits of a run that left
    them out from the start.
    """
    flags = (*late.flags, *backend_flags(backend), "--global_batch_size=12")
    stopped = train(tmp_path / "run", *flags, *first)
    assert stopped.code == 2
    (line,) = stopped.errors
    assert message in line and str(late.root) in line and "imagenet-swa verify" in line
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert checkpoint.name == "step-0000002" and what_is_wrong(checkpoint) is None
    resumed = train(tmp_path / "run", *flags, SKIP, "--data.max_bad_images=3")
    assert resumed.code == 0, resumed.err
    assert "resuming after epoch 1" in resumed.err
    assert_same_runs(resumed, train(tmp_path / "whole", *flags, SKIP))


def test_beyond_the_limit_all_processes_end(tmp_path: Path, late: Images):
    """Two processes that together leave out more than they may both end, with one line; the checkpoint is whole, and one process
    goes on from it.
    """
    flags = (*late.flags, *backend_flags("dali"), "--global_batch_size=12", SKIP)
    outcomes = train_on_ranks(tmp_path / "ranks", *flags, "--data.max_bad_images=2")
    assert [outcome.code for outcome in outcomes] == [2, 2]
    (line,) = [line for outcome in outcomes for line in outcome.errors]
    assert "3 images of this pass cannot be decoded, data.max_bad_images is 2" in line and "imagenet-swa verify" in line
    assert [len(outcome.named) for outcome in outcomes] == [2, 1]
    (checkpoint,) = (tmp_path / "ranks" / "run" / "checkpoints").iterdir()
    assert checkpoint.name == "step-0000002" and what_is_wrong(checkpoint) is None
    resumed = train(tmp_path / "ranks" / "run", *flags, "--data.max_bad_images=3")
    assert resumed.code == 0 and "resuming after epoch 1" in resumed.err and "saved with 2 processes" in resumed.err


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_limit_holds_in_each_split(tmp_path: Path, damaged: Images, split: str):
    """A pass over either split may leave out as many as the limit says, and not one more."""
    other = {"train": "val", "val": "train"}[split]
    quarantine = tmp_path / "bad.tsv"
    quarantine.write_text("".join(f"{other}\t{name}\t\n" for name in damaged.bad[other]))
    flags = (*damaged.flags, *backend_flags("torchvision"), SKIP, f"--data.quarantine={quarantine}", "--swa.num_epochs=1")
    assert train(tmp_path / "four", *flags, "--data.max_bad_images=4").code == 0
    outcome = train(tmp_path / "three", *flags, "--data.max_bad_images=3")
    assert outcome.code == 2
    assert "4 images cannot be decoded" in outcome.errors[0] and "data.max_bad_images" in outcome.errors[0]


def test_a_process_without_any_good_image_ends_the_run(tmp_path: Path, image_folder: Path):
    """A process whose whole part of a training step is bad says so, and no process waits for it."""
    names = make_images(tmp_path / "names", image_folder, {"train": {}, "val": {}}).names("train")
    part = training_batches(32, seed=0, epoch=0, global_batch_size=8, batch_size_per_device=4, rank=1, world_size=2)[1, 0]
    images = make_images(tmp_path / "images", image_folder, {"train": {names[i]: "empty" for i in part}, "val": {}})
    outcome = launch(tmp_path / "run", *images.flags, *backend_flags("dali"), SKIP, timeout=60)
    assert outcome.code != 0
    assert any(
        "[rank 1]" in line and "0 of 4 images of a batch can be decoded, too few to train on" in line for line in outcome.errors
    )


# --------------------------------------------------------------------------------------------------------------- resume


def interrupted(folder: Path, epoch: int, method: str, *flags: str) -> None:
    """A run whose power is cut when it comes there with this many finished epochs."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with redirect_stderr(io.StringIO()), cut_at_epoch(epoch, method):
        finetune(parse_config([*QUICK, *flags, f"--output={folder}"], "imagenet-swa train", ""))


@pytest.mark.parametrize(("epoch", "method"), [(1, "train_one_epoch"), (2, "_recompute_batchnorm"), (2, "results.add")])
def test_a_resumed_run_leaves_out_the_same(tmp_path: Path, skipped: Outcome, damaged: Images, epoch: int, method: str):
    """Wherever a run with bad images is cut, the same command ends with the bits of the run that was not."""
    backend = next(name for name in BACKENDS if f"backend: {name}" in (skipped.folder / "config.yaml").read_text())
    flags = (*damaged.flags, *backend_flags(backend), SKIP)
    interrupted(tmp_path / "run", epoch, method, *flags)
    assert_same_runs(train(tmp_path / "run", *flags), skipped)


# ---------------------------------------------------------------------------------------------------------- changed data


@dataclass(frozen=True)
class Halted:
    """A run on class folders without an index, cut after its first epoch."""

    images: Path
    folder: Path

    @property
    def flags(self) -> tuple[str, ...]:
        folders = (f"--data.train={self.images / 'train'}", f"--data.val={self.images / 'val'}")
        return (*folders, *backend_flags("torchvision"), "--model.num_classes=3")


@pytest.fixture(scope="module")
def halted_once(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Halted:
    """The original, which tests copy."""
    halted = Halted(tmp_path_factory.mktemp("halted") / "images", tmp_path_factory.mktemp("halted") / "run")
    shutil.copytree(image_folder, halted.images)
    interrupted(halted.folder, 1, "train_one_epoch", "--checkpoint.in_background=false", *halted.flags)
    return halted


@pytest.fixture
def halted(halted_once: Halted, tmp_path: Path) -> Halted:
    shutil.copytree(halted_once.images, tmp_path / "images")
    shutil.copytree(halted_once.folder, tmp_path / "run")
    return Halted(tmp_path / "images", tmp_path / "run")


def save_again(path: Path) -> None:
    image = Image.open(path)
    image.resize((image.width + 8, image.height)).save(path)


CHANGES: dict[str, Callable[[Path], object]] = {
    "removed": Path.unlink,
    "added": lambda path: shutil.copy(path, path.with_name("new.JPEG")),
    "renamed": lambda path: path.rename(path.with_name("new.JPEG")),
    "resized": save_again,
}


@pytest.mark.parametrize(("split", "words"), [("train", "training images was"), ("val", "validation images was")])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_images_are_refused(halted: Halted, change: str, split: str, words: str):
    """An image removed, added, renamed or of another size since the checkpoint: the run does not go on, and says which split."""
    CHANGES[change](halted.images / split / "bee" / "1.JPEG")
    outcome = train(halted.folder, *halted.flags)
    assert outcome.code == 2
    (line,) = outcome.errors
    assert "the checkpoint belongs to another run" in line and words in line
    assert ("training images" in line) != ("validation images" in line)
    assert "restore the old settings, choose another output" in line


def test_a_quarantine_list_that_changes_the_images_is_refused(halted: Halted, tmp_path: Path):
    """A quarantine list that takes an image away since the checkpoint is another set of images; one that takes none is not."""
    quarantine = tmp_path / "bad.tsv"
    flags = (*halted.flags, f"--data.quarantine={quarantine}")
    quarantine.write_text("train\tbee/1.JPEG\tugly\n")
    (line,) = train(halted.folder, *flags).errors
    assert "training images was" in line and "validation images" not in line
    quarantine.write_text("# nothing\nval\tbee/unknown.JPEG\tugly\n")
    assert train(halted.folder, *flags).code == 0


def test_images_that_moved_are_the_same(halted: Halted):
    """The same images in another place are no change."""
    moved = replace(halted, images=halted.images.rename(halted.images.with_name("elsewhere")))
    assert train(moved.folder, *moved.flags).code == 0


# ------------------------------------------------------------------------------------------------- who builds the index


def indices_on_a_rank(rank: int, folder: Path) -> None:
    """Notes what the rank read itself and what it got: from good folders, from a folder with an empty class."""
    join_ranks(rank, folder)
    runtime, scanned, found = start_runtime(Config()), [], {}

    def noted(source: Source, **how: Any) -> Any:
        scanned.append(source.split)
        return scan(source, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loaders, "scan", noted)
        patch.setattr(index_cache, "scan", noted)
        for name in ("good", "bad"):
            data = DataConfig(train=str(folder / name / "train"), val=str(folder / name / "val"))
            config = Config(output=folder / f"run-{name}", data=data, model=ModelConfig(num_classes=3))
            try:
                found[name] = [index.fingerprint for index in loaders.build_indices(config, runtime)]
            except InputError as error:
                found[name] = str(error)
    (folder / f"rank-{rank}.json").write_text(json.dumps({"scanned": scanned, **found}))


def test_rank_0_builds_the_index_for_all(tmp_path: Path, image_folder: Path):
    """On several processes rank 0 alone reads the data and leaves the index below output/index; what it cannot read, all say."""
    shutil.copytree(image_folder, tmp_path / "good")
    shutil.copytree(image_folder, tmp_path / "bad")
    shutil.rmtree(tmp_path / "bad" / "val" / "bee")
    (tmp_path / "bad" / "val" / "bee").mkdir()
    run_ranks(indices_on_a_rank, 2, tmp_path)
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2))
    assert (first["scanned"], second["scanned"]) == (["train", "val", "train", "val"], [])
    files = sorted((tmp_path / "run-good" / "index").iterdir())
    assert len(files) == 2
    written = {load_index(str(file), "")[0].fingerprint for file in files}
    assert first["good"] == second["good"] and set(first["good"]) == written
    assert first["bad"] == second["bad"]
    assert "no images for 1 of 3 classes, the first is 'bee'" in first["bad"] and "\n" not in first["bad"]


def test_data_that_cannot_be_indexed_ends_all_processes(tmp_path: Path, image_folder: Path):
    """An error while indexing ends both of two processes, with one line."""
    flags = (f"--data.train={image_folder / 'train'}", f"--data.val={tmp_path / 'nowhere'}", "--model.num_classes=3")
    outcomes = train_on_ranks(tmp_path / "ranks", *flags)
    assert [outcome.code for outcome in outcomes] == [2, 2]
    (line,) = [line for outcome in outcomes for line in outcome.errors]
    assert line.startswith(f"imagenet-swa: error: no such folder: {tmp_path / 'nowhere'}")
