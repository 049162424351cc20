"""One epoch of training: the plan's arithmetic, what is logged, and losses and weights that are not finite."""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from imagenet_swa.agreement import Verdict, Wishes
from imagenet_swa.config import Config, InputError, ModelConfig, SpeedConfig, SwaConfig, TrainingError
from imagenet_swa.data.batch import Batch
from imagenet_swa.data.index import ImageIndex
from imagenet_swa.data.sampling import Indices
from imagenet_swa.data.synthetic import synthetic_index
from imagenet_swa.engine import Progress, train_one_epoch
from imagenet_swa.optim import make_sgd
from imagenet_swa.plan import Plan, check_goes_on, make_plan
from imagenet_swa.records import Records
from imagenet_swa.runtime import Runtime, start_runtime

NUM_IMAGES, NUM_CLASSES = 50, 4


class Loader:
    """Images of random numbers; image `poisoned` is all NaN."""

    decoder = "nobody: made up"

    def __init__(self, poisoned: int | None = None) -> None:
        self.index: ImageIndex = synthetic_index(NUM_IMAGES, NUM_CLASSES)
        self.images = torch.randn(NUM_IMAGES, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        if poisoned is not None:
            self.images[poisoned] = math.nan

    def training_stream(self, batches: Iterable[Indices], *, epoch: int) -> Iterator[Batch]:
        del epoch
        for indices in batches:
            yield Batch(self.images[indices], torch.from_numpy(self.index.labels[indices]), indices)

    def evaluation_stream(self, batches: Iterable[Indices]) -> Iterator[Batch]:
        return self.training_stream(batches, epoch=0)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.0), nn.Linear(4 * 36, NUM_CLASSES))


pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    return start_runtime(Config(output=tmp_path))


def settings(*, log_every: int = 50, batch_size: int = 8, lr: float = 0.01, **model: Any) -> Config:
    return Config(
        global_batch_size=batch_size,
        log_every=log_every,
        model=ModelConfig(num_classes=NUM_CLASSES, **model),
        swa=SwaConfig(num_epochs=3, lr_max=lr, lr_min=lr, report_epochs=()),
    )


class Attendant:
    """Takes down what it is told and asked; `interfere` is called with the number of finished steps in each step."""

    def __init__(self, progress: Progress, interfere: Callable[[int], object] = lambda _: None) -> None:
        self.progress, self.interfere = progress, interfere
        self.minima: list[int] = []
        self.heard: list[Verdict] = []
        self.wished = Wishes()

    def wishes(self) -> Wishes:
        return self.wished

    def at_minimum(self, step: int) -> None:
        assert self.progress.step == step
        self.minima.append(step)

    def heed(self, verdicts: Sequence[Verdict]) -> None:
        self.heard += verdicts
        self.interfere(self.progress.step)


def train(
    folder: Path,
    runtime: Runtime,
    config: Config,
    net: nn.Module,
    loader: Loader | None = None,
    progress: Progress | None = None,
    interfere: Callable[[int], object] = lambda _: None,
) -> Attendant:
    """To the end of the epoch in which `progress` is; metrics.jsonl goes to the folder."""
    attendant = Attendant(progress or Progress(), interfere)
    train_one_epoch(
        net,
        make_sgd(net, config.optimizer, fused=config.speed.fused_optimizer),
        loader or Loader(),
        plan=make_plan(config, num_images=NUM_IMAGES, world_size=1),
        progress=attendant.progress,
        config=config,
        runtime=runtime,
        records=Records(folder, runtime),
        attendant=attendant,
    )
    return attendant


def lines_of(folder: Path) -> list[dict[str, float]]:
    path = folder / "metrics.jsonl"
    return list(map(json.loads, path.read_text().splitlines())) if path.exists() else []


# -------------------------------------------------------------------------------------------------------------- plan


@given(
    world_size=st.integers(1, 6),
    share=st.integers(1, 40),
    largest=st.integers(1, 64),
    more=st.integers(0, 300),
    seed=st.integers(0, 2**63 - 1),
)
def test_plan_covers_an_epoch(world_size: int, share: int, largest: int, more: int, seed: int):
    """Over all processes and steps each image is seen at most once, and fewer than one global batch is left out."""
    global_batch_size = world_size * share
    num_images = global_batch_size + more
    config = Config(global_batch_size=global_batch_size, seed=seed, speed=SpeedConfig(max_batch_size_per_device=largest))
    plan = make_plan(config, num_images=num_images, world_size=world_size)
    assert plan.batch_size_per_device <= largest
    assert plan.batch_size_per_device * plan.num_accumulation * world_size == global_batch_size
    batches = [plan.batches(epoch=3, rank=rank) for rank in range(world_size)]
    seen = np.concatenate([b.ravel() for b in batches])
    assert len(set(seen.tolist())) == len(seen) == plan.steps_per_epoch * global_batch_size
    assert num_images - len(seen) < global_batch_size
    assert {b.shape[0] for b in batches} == {plan.steps_per_epoch}


@given(
    num_images=st.integers(1, 5000),
    global_batch_size=st.integers(1, 500),
    world_size=st.integers(1, 8),
    largest=st.integers(1, 100),
)
def test_the_told_arithmetic_is_right(num_images: int, global_batch_size: int, world_size: int, largest: int):
    """The numbers in the sentence about batches multiply, divide and leave over as it says."""
    assume(global_batch_size % world_size == 0 and num_images >= global_batch_size)
    config = Config(global_batch_size=global_batch_size, speed=SpeedConfig(max_batch_size_per_device=largest))
    told = make_plan(config, num_images=num_images, world_size=world_size).describe().replace(",", "")
    product, division, left = told.split("; ")[0], *re.findall(r"; (.*) steps an epoch (\d+) images left over", told)[0]
    factors, total = product.split(" = ")
    assert math.prod(map(int, re.findall(r"\d+", factors))) == int(total) == global_batch_size
    images, batch, steps = map(int, re.findall(r"\d+", division))
    assert (images, batch) == (num_images, global_batch_size)
    assert steps * batch + int(left) == images and int(left) < batch


def test_the_papers_plan():
    """ImageNet in batches of 256 on four devices: 64 each, 5,004 steps, 143 images left over."""
    told = make_plan(Config(), num_images=1_281_167, world_size=4).describe()
    assert told == "64 per device x 4 processes = 256; 1,281,167 / 256 = 5,004 steps an epoch, 143 images left over"


def test_too_few_images():
    """A training set smaller than a global batch is refused with both numbers and what to lower."""
    with pytest.raises(InputError, match="100 training images are fewer than one global batch of 256; lower global_batch_size"):
        make_plan(Config(), num_images=100, world_size=1)


def test_batch_that_does_not_divide():
    """A global batch that does not divide over the processes is refused with sizes that do."""
    with pytest.raises(InputError, match="256 does not divide over 3 processes; set it to 255 or 258"):
        make_plan(Config(), num_images=1000, world_size=3)


@pytest.mark.parametrize("schedule", ["cyclical", "constant", "three_part"])
def test_epochs_that_end_in_a_capture(schedule: Any):
    """Cycles of three epochs are captured at their ends, whatever the rate does in them."""
    swa = SwaConfig(num_epochs=6, cycle_epochs=3, schedule=schedule, report_epochs=())
    plan: Plan = make_plan(Config(swa=swa), num_images=1000, world_size=1)
    assert [epoch for epoch in range(7) if plan.schedule.is_capture(epoch * plan.steps_per_epoch)] == [3, 6]


def test_minima_within_an_epoch(tmp_path: Path, runtime: Runtime):
    """With cycles of four steps and six steps an epoch, the second epoch tells of the minima after steps 8 and 12."""
    config = replace(settings(), swa=SwaConfig(num_epochs=3, cycle_steps=4, lr_max=0.01, report_epochs=()))
    assert train(tmp_path, runtime, config, network(), progress=Progress(6)).minima == [8, 12]


def test_cycle_too_long_for_its_report():
    """A report before anything was captured is refused, with the lengths of cycle and epoch."""
    swa = SwaConfig(num_epochs=4, cycle_steps=20, report_epochs=(2,))
    with pytest.raises(InputError, match="captured between epoch 0 and the first report after epoch 2: a cycle has 20 steps"):
        make_plan(Config(swa=swa, global_batch_size=10), num_images=60, world_size=1)
    swa = SwaConfig(num_epochs=4, cycle_steps=5, start_epoch=3, report_epochs=())
    assert make_plan(Config(swa=swa, global_batch_size=10), num_images=60, world_size=1).schedule.cycle_steps == 5


def test_cosine_cycle_longer_than_its_annealing():
    """A cosine's cycle has to lie within the annealing."""
    swa = SwaConfig(num_epochs=4, schedule="cosine", cycle_epochs=2, budget_epochs=4, cosine_start_epoch=3, report_epochs=())
    with pytest.raises(InputError, match="a cycle of 12 steps from step 18 on leaves the cosine's 24"):
        make_plan(Config(swa=swa, global_batch_size=10), num_images=60, world_size=1)


def test_a_checkpoint_beyond_the_end():
    """A run cannot go on from after its last epoch, nor from epochs of another length; it can from its end."""
    plan = make_plan(Config(swa=SwaConfig(num_epochs=3), global_batch_size=10), num_images=60, world_size=1)
    check_goes_on(plan, steps_per_epoch=6, step=18)
    with pytest.raises(InputError, match=r"saved after epoch 3\.167, swa.num_epochs is 3; choose another output"):
        check_goes_on(plan, steps_per_epoch=6, step=19)
    with pytest.raises(InputError, match="the checkpoint's epochs have 7 steps, now they would have 6"):
        check_goes_on(plan, steps_per_epoch=7, step=7)


# ---------------------------------------------------------------------------------------------------------- logging


@pytest.mark.parametrize(("log_every", "steps"), [(1, [7, 8, 9, 10, 11, 12]), (2, [8, 10, 12]), (5, [10, 12]), (100, [12])])
def test_steps_that_are_logged(tmp_path: Path, runtime: Runtime, log_every: int, steps: list[int]):
    """Every log_every-th step counted over the run, and each epoch's last one, gets a line."""
    train(tmp_path, runtime, settings(log_every=log_every), network(), progress=Progress(6))
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == steps
    assert [line["epoch"] for line in lines] == pytest.approx([step / 6 for step in steps])
    for line in lines:
        assert line["images_per_second"] > 0
        assert 0 <= line["data_wait"] <= 1
        assert line["memory_mib"] > 0


def test_logged_loss_is_the_mean_since_the_last_line(tmp_path: Path, runtime: Runtime):
    """The loss of a line is the mean of the losses of the steps since the line before it."""
    each, some = tmp_path / "each", tmp_path / "some"
    for folder, log_every in ((each, 1), (some, 4)):
        folder.mkdir()
        train(folder, runtime, settings(log_every=log_every), network())
    losses = [line["loss"] for line in lines_of(each)]
    assert [line["loss"] for line in lines_of(some)] == pytest.approx([np.mean(losses[:4]), np.mean(losses[4:])])


def test_first_loss(tmp_path: Path, runtime: Runtime):
    """The first step's loss is the mean cross-entropy of the untouched network on the first global batch."""
    config, net, loader = settings(log_every=1), network(), Loader()
    indices = make_plan(config, num_images=NUM_IMAGES, world_size=1).batches(0, 0)[0].ravel()
    with torch.no_grad():
        logits = network().train()(loader.images[indices])
        wanted = F.cross_entropy(logits, torch.from_numpy(loader.index.labels[indices])).item()
    train(tmp_path, runtime, config, net, loader)
    assert lines_of(tmp_path)[0]["loss"] == pytest.approx(wanted)


# ------------------------------------------------------------------------------------------------------------- modes


@pytest.mark.parametrize("freeze", [True, False])
def test_modes_while_training(tmp_path: Path, runtime: Runtime, freeze: bool):
    """Training puts an evaluating network into training mode, BatchNorm only where it is not frozen."""
    net = network().eval()
    modes: dict[str, bool] = {}
    for name, module in net.named_modules():
        module.register_forward_hook(lambda m, *_, name=name: modes.__setitem__(name, m.training))
    train(tmp_path, runtime, settings(freeze_batchnorm=freeze), net)
    assert modes == {"": True, "0": True, "1": not freeze, "2": True, "3": True, "4": True}


# ------------------------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("log_every", [1, 2, 100])
def test_loss_that_is_not_finite(tmp_path: Path, runtime: Runtime, log_every: int):
    """A loss that becomes NaN stops training with step, image and the way out; no line of metrics holds it."""
    config = settings(log_every=log_every, freeze_batchnorm=True)  # else BatchNorm spreads it over the batch
    number = int(make_plan(config, num_images=NUM_IMAGES, world_size=1).batches(0, 0)[2].ravel()[3])
    with pytest.raises(TrainingError) as caught:
        train(tmp_path, runtime, config, network(), Loader(poisoned=number))
    message = str(caught.value)
    assert f"the loss of step 3 is infinite or NaN for image {number} (synthetic-{number}); no update was made, " in message
    assert "nothing of it was averaged or saved" in message
    assert "lower swa.lr_max" in message and "another output" in message and "\n" not in message
    assert [line["step"] for line in lines_of(tmp_path)] == [step for step in (1, 2) if step % log_every == 0]


def test_weights_that_are_not_finite(tmp_path: Path, runtime: Runtime):
    """A last update that makes a weight infinite is noticed although its loss, computed before it, was finite."""
    config = settings(batch_size=NUM_IMAGES, lr=1e38)
    net = network()
    linear = net[4]
    assert isinstance(linear, nn.Linear)
    nn.init.normal_(linear.weight, std=1e3)  # for large gradients
    with pytest.raises(TrainingError, match=r"a weight became infinite or NaN by step 1; nothing of it was averaged or saved"):
        train(tmp_path, runtime, config, net)
    (line,) = lines_of(tmp_path)
    assert math.isfinite(line["loss"])
