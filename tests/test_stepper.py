"""Updates from batches and gradients that are not finite: none of them is made, whoever decides it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from test_engine import Loader, network, settings
from torch import nn
from torch.nn import functional as F

from imagenet_swa.agreement import Wishes
from imagenet_swa.config import Config, SpeedConfig, TrainingError
from imagenet_swa.data.batch import Batch
from imagenet_swa.optim import make_sgd, momentum_buffers, set_learning_rate
from imagenet_swa.plan import make_plan
from imagenet_swa.runtime import Runtime, start_runtime
from imagenet_swa.stepper import Stepper, are_finite, set_found_inf

pytestmark = pytest.mark.usefixtures("on_the_cpu")
NUM_IMAGES = 50
BAD_STEP = 2  # counted from 0


@pytest.fixture
def runtime(tmp_path: Path) -> Runtime:
    return start_runtime(Config(output=tmp_path))


class Trial:
    """A network, its optimizer and a stepper over an epoch of six batches of eight images."""

    def __init__(self, runtime: Runtime, *, fused: bool, lag: int = 0, poisoned: int | None = None) -> None:
        config = settings(freeze_batchnorm=poisoned is not None)
        object.__setattr__(config, "speed", SpeedConfig(fused_optimizer=fused))
        self.net, loader = network(), Loader(poisoned)
        self.optimizer = make_sgd(self.net, config.optimizer, fused=fused)
        plan = make_plan(config, num_images=NUM_IMAGES, world_size=1)
        self.batches = plan.batches(0, 0)[:, 0]
        self.stream: Iterator[Batch] = loader.training_stream(self.batches, epoch=0)
        self.stepper = Stepper(self.net, self.optimizer, plan, config, runtime, loader.index)
        self.stepper._agreement._lag = lag
        self.net.train()
        self.net[1].train(poisoned is None)  # in training mode BatchNorm spreads a NaN over the batch
        set_learning_rate(self.optimizer, 0.1)
        self.step = 0

    def launch(self) -> None:
        self.stepper.launch(self.step, self.stream, Wishes())
        self.step += 1

    def state(self) -> dict[str, torch.Tensor]:
        """All that an update changes: parameters and momentum."""
        found = dict(self.net.named_parameters()) | {f"m/{k}": v for k, v in momentum_buffers(self.net, self.optimizer).items()}
        return {name: tensor.detach().clone() for name, tensor in found.items()}

    def spoil_a_gradient(self, value: float) -> None:
        """From the bad step on, one value of one parameter's gradient is this; losses stay finite."""

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            spoilt = gradient.clone()
            if self.step == BAD_STEP:
                spoilt.view(-1)[3] = value
            return spoilt

        parameter = next(self.net.parameters())
        parameter.register_hook(spoil)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def poisoned_image(runtime: Runtime) -> int:
    """An image of the bad step."""
    return int(Trial(runtime, fused=False).batches[BAD_STEP, 5])


DECIDERS = pytest.mark.parametrize(("fused", "lag"), [(False, 0), (True, 0), (True, 1)], ids=["plain", "fused", "a step later"])


@DECIDERS
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite(runtime: Runtime, fused: bool, lag: int, value: float):
    """One value of a gradient that is not finite, with a finite loss, keeps parameters and momentum as they were before that
    step, bit for bit, also where the host hears of it a step later; step and images are named.
    """
    trial = Trial(runtime, fused=fused, lag=lag)
    trial.spoil_a_gradient(value)
    for _ in range(BAD_STEP):
        trial.launch()
        trial.stepper.verdicts()
    before = trial.state()
    with pytest.raises(TrainingError) as caught:
        for _ in range(1 + lag):
            trial.launch()
            trial.stepper.verdicts()
    assert_same(trial.state(), before)
    message, images = str(caught.value), sorted(trial.batches[BAD_STEP].tolist())
    assert (
        f"a gradient of step {BAD_STEP + 1} is infinite or NaN, its batch holds images {images[0]} (synthetic-{images[0]})"
        in message
    )
    assert "and 4 others; no update was made" in message and "lower swa.lr_max" in message and "\n" not in message


@DECIDERS
def test_a_loss_that_is_not_finite(runtime: Runtime, fused: bool, lag: int):
    """An image whose loss is NaN is named, alone, and changes nothing."""
    number = poisoned_image(runtime)
    trial = Trial(runtime, fused=fused, lag=lag, poisoned=number)
    for _ in range(BAD_STEP):
        trial.launch()
        trial.stepper.verdicts()
    before = trial.state()
    with pytest.raises(TrainingError, match=rf"loss of step 3 .* for image {number} \(synthetic-{number}\); no update"):
        for _ in range(1 + lag):
            trial.launch()
            trial.stepper.verdicts()
    assert_same(trial.state(), before)


@pytest.mark.parametrize("lag", [0, 1])
def test_no_update_follows_either(runtime: Runtime, lag: int):
    """After a step that was not finite, no later one updates anything, although its own gradients are finite."""
    trial = Trial(runtime, fused=True, lag=lag)
    trial.spoil_a_gradient(float("inf"))
    for _ in range(BAD_STEP):
        trial.launch()
    before = trial.state()
    for _ in range(3):  # nobody looks at the verdicts in between
        trial.launch()
    assert_same(trial.state(), before)
    with pytest.raises(TrainingError, match="a gradient of step 3"):
        trial.stepper.verdicts(all_of_them=True)


@pytest.mark.parametrize("fused", [False, True])
def test_steps_are_those_of_a_plain_loop(runtime: Runtime, fused: bool):
    """Without anything bad, verdicts and updates are those of torch's own loop: losses, weights, momentum."""
    trial, plain, loader = Trial(runtime, fused=fused), network().train(), Loader()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    losses, wanted = [], []
    for step in range(6):
        trial.launch()
        losses += [verdict.loss for verdict in trial.stepper.verdicts()]
        indices = trial.batches[step]
        optimizer.zero_grad()
        loss = F.cross_entropy(plain(loader.images[indices]), torch.from_numpy(loader.index.labels[indices]))
        loss.backward()
        optimizer.step()
        wanted.append(loss.item())
    assert losses == pytest.approx(wanted, rel=1e-5)
    for (name, one), other in zip(trial.net.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=name)


def test_verdicts_come_once_and_in_order(runtime: Runtime):
    """With a lag, each verdict is given once, in order, and all_of_them gives the last."""
    prompt, late = Trial(runtime, fused=True), Trial(runtime, fused=True, lag=1)
    wanted, got = [], []
    for step in range(4):
        prompt.launch()
        late.launch()
        wanted += prompt.stepper.verdicts()
        got += late.stepper.verdicts()
        assert got == wanted[:step]
    got += late.stepper.verdicts(all_of_them=True)
    assert got == wanted and late.stepper.verdicts(all_of_them=True) == []


class Noting:
    """A watch that notes what it is told."""

    def __init__(self, events: list[str]) -> None:
        self.note = events.append


def test_a_rank_without_its_batch_is_behind(runtime: Runtime):
    """In each step a rank notes once that it has its batch, so that one whose loader hangs is behind those that wait for it."""
    events: list[str] = []

    def noted(stream: Iterator[Batch]) -> Iterator[Batch]:
        for batch in stream:
            yield batch
            events.append("asks for the next batch")

    trial = Trial(replace(runtime, watch=cast("Any", Noting(events))), fused=True)
    trial.stream = noted(trial.stream)
    for _ in range(3):
        trial.launch()
    notes = [f"training, step {step}, which needs all gradients" for step in (1, 2, 3)]
    assert events == [notes[0], "asks for the next batch", notes[1], "asks for the next batch", notes[2]]


# ------------------------------------------------------------------------------------------- what the guard rests on


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_torchs_fused_kernel_honours_found_inf(momentum: float, found_inf: float):
    """torch's fused SGD leaves parameters and momentum alone exactly where its found_inf is 1."""
    parameter = nn.Parameter(torch.ones(1000))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=momentum, fused=True)
    optimizer.state[parameter]["momentum_buffer"] = torch.full((1000,), 2.0)
    parameter.grad = torch.full((1000,), 3.0)
    set_found_inf(optimizer, torch.tensor(found_inf))
    optimizer.step()
    is_same = bool((parameter == 1).all()) and bool((optimizer.state[parameter]["momentum_buffer"] == 2).all())
    assert is_same == (found_inf == 1)
    assert (not is_same) == bool((parameter != 1).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e20, 0.0])
def test_are_finite(value: float):
    """One bad value anywhere in any gradient is found, whatever its shape; so is a norm that no fp32 holds."""
    for shape in ((), (7,), (3, 4, 5, 6)):
        bad = torch.zeros(shape)
        bad.view(-1)[-1] = value
        gradients: list[Any] = [torch.ones(5), bad, torch.ones(2, 2)]
        assert bool(are_finite(gradients)) == (value == 0.0)
