"""One epoch of SGD: forward, backward, step, learning rate, progress."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn
from torch.nn import functional as F

from imagenet_swa.config import Config, InputError, SwaConfig, TrainingError, require
from imagenet_swa.data.batch import Batch, ImageLoader, TooManyBadImagesError
from imagenet_swa.data.sampling import Indices, split_global_batch, training_batches
from imagenet_swa.models import batchnorm_layers
from imagenet_swa.optim import set_learning_rate
from imagenet_swa.records import Records, Ticker, memory_mib
from imagenet_swa.runtime import Runtime
from imagenet_swa.schedule import Schedule, make_schedule

_WAY_OUT = (
    "nothing of it was averaged or saved. Start again with a lower swa.lr_max or another speed.precision, into another output"
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How the training images divide into epochs, steps, processes and cycles."""

    num_images: int
    seed: int
    global_batch_size: int
    batch_size_per_device: int
    num_accumulation: int
    world_size: int
    swa: SwaConfig

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in an epoch."""
        return self.num_images // self.global_batch_size

    @cached_property
    def schedule(self) -> Schedule:
        """Learning rates and captures by step."""
        return make_schedule(self.swa, steps_per_epoch=self.steps_per_epoch)

    def batches(self, epoch: int, rank: int) -> Indices:
        """Image numbers of one process, (steps, num_accumulation, batch_size_per_device)."""
        return training_batches(
            self.num_images,
            seed=self.seed,
            epoch=epoch,
            global_batch_size=self.global_batch_size,
            batch_size_per_device=self.batch_size_per_device,
            rank=rank,
            world_size=self.world_size,
        )

    def describe(self) -> str:
        """The arithmetic, for people."""
        left_over = self.num_images - self.steps_per_epoch * self.global_batch_size
        accumulation = f" x {self.num_accumulation} accumulated" if self.num_accumulation > 1 else ""
        return (
            f"{self.batch_size_per_device} per device x {self.world_size} processes{accumulation} = {self.global_batch_size}; "
            f"{self.num_images:,} / {self.global_batch_size} = {self.steps_per_epoch:,} steps an epoch, "
            f"{left_over} images left over"
        )


def make_plan(config: Config, *, num_images: int, world_size: int) -> Plan:
    """Keep the global batch whatever the number of processes.

    Raises:
        InputError: the global batch does not divide, or is larger than the training set.
    """
    try:
        batch_size_per_device, num_accumulation = split_global_batch(
            config.global_batch_size,
            world_size=world_size,
            max_batch_size_per_device=config.speed.max_batch_size_per_device,
        )
    except ValueError as error:
        raise InputError(str(error)) from None
    if num_images < config.global_batch_size:
        raise InputError(
            f"{num_images} training images are fewer than one global batch of {config.global_batch_size}; lower global_batch_size"
        )
    plan = Plan(
        num_images=num_images,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        batch_size_per_device=batch_size_per_device,
        num_accumulation=num_accumulation,
        world_size=world_size,
        swa=config.swa,
    )
    check_cycle(plan)
    return plan


def check_cycle(plan: Plan) -> None:
    """Raise InputError where a cycle of so many steps captures nothing in time, or is longer than the rate falls."""
    swa, schedule = plan.swa, plan.schedule
    require(
        swa.schedule != "cosine" or 0 <= schedule.start_step <= schedule.budget_steps - schedule.cycle_steps,
        f"a cycle of {schedule.cycle_steps} steps from step {max(schedule.start_step, 0)} on leaves the cosine's "
        f"{schedule.budget_steps}; raise swa.budget_epochs or shorten the cycle",
    )
    first = min(swa.epochs_to_report, default=0) * plan.steps_per_epoch
    require(
        not swa.averages or schedule.last_capture(first) > swa.start_epoch * plan.steps_per_epoch,
        f"nothing is captured between epoch {swa.start_epoch} and the first report after epoch "
        f"{min(swa.epochs_to_report, default=0)}: a cycle has {schedule.cycle_steps} steps, an epoch {plan.steps_per_epoch}; "
        "shorten the cycle or report later",
    )


def check_batches(plan: Plan, config: Config, network: nn.Module) -> str | None:
    """What is unwise about the sizes of the batches that BatchNorm will see, None if nothing.

    Raises:
        InputError: single images, which have no spread to normalise by.
    """
    if config.model.freeze_batchnorm or not batchnorm_layers(network):
        return None
    most = config.speed.max_batch_size_per_device
    if min(plan.batch_size_per_device, config.evaluation.batch_size) < 2:
        raise InputError(
            f"BatchNorm needs at least 2 images at a time, got {plan.batch_size_per_device} in training and "
            f"{config.evaluation.batch_size} in evaluation; change global_batch_size, speed.max_batch_size_per_device "
            f"(now {most}) or evaluation.batch_size"
        )
    possible = min(plan.batch_size_per_device * plan.num_accumulation, most)
    if plan.batch_size_per_device >= possible // 2:
        return None
    return (
        f"BatchNorm will see {plan.batch_size_per_device} images at a time where {possible} would fit; "
        "a global_batch_size with more divisors allows larger parts"
    )


def train_one_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: ImageLoader,
    *,
    plan: Plan,
    epoch: int,
    config: Config,
    runtime: Runtime,
    records: Records,
    at_minimum: Callable[[int], None],
) -> None:
    """All steps of one epoch, 0-based; `network` and `optimizer` as Accelerate prepared them.

    `at_minimum(step)` is called where a cycle ends, with the number of finished steps.

    Raises:
        TrainingError: the loss or a weight is not finite.
        BadImageError: an image cannot be decoded.
        TooManyBadImagesError: more images than the limit cannot be decoded.
    """
    _training_mode(network, freeze_batchnorm=config.model.freeze_batchnorm)
    batches = plan.batches(epoch, runtime.rank)
    stream = _Timed(loader.training_stream(batches.reshape(-1, plan.batch_size_per_device), epoch=epoch))
    meter = _Meter(plan, config, runtime, records)
    first_step, num_left_out = epoch * plan.steps_per_epoch, 0
    title = f"epoch {epoch + 1}/{config.swa.num_epochs}"
    with records.progress(title, plan.steps_per_epoch) as ticker:
        for step in range(first_step, first_step + plan.steps_per_epoch):
            set_learning_rate(optimizer, plan.schedule.learning_rate(step))
            runtime.seed(config.seed, step)
            result = _train_one_step(network, optimizer, stream, plan, config, runtime)
            num_left_out += result.num_left_out
            check_left_out(num_left_out, config)
            is_last = step + 1 == first_step + plan.steps_per_epoch
            meter.after_step(step, result.loss, stream, title, ticker, is_last=is_last)
            if is_last or plan.schedule.is_capture(step + 1):
                _check_weights(network, step + 1)
            if plan.schedule.is_capture(step + 1):
                at_minimum(step + 1)
    if num_left_out:
        records.say(f"{title}: {num_left_out} images left out as bad, counted each time")
        records.log("bad_images", step=first_step + plan.steps_per_epoch, num_left_out=num_left_out)


def check_left_out(num_left_out: int, config: Config) -> None:
    """Raise TooManyBadImagesError where all ranks together left out more than the limit, which is none unless they may."""
    if num_left_out > (config.data.max_bad_images if config.data.on_bad_image == "skip" else 0):
        error = TooManyBadImagesError(
            f"{num_left_out} images of this pass cannot be decoded, data.max_bad_images is {config.data.max_bad_images}; "
            "look at the data with `imagenet-swa verify`"
        )
        error.concerns_one_rank = False  # the number is that of all ranks
        raise error


def _check_weights(network: nn.Module, step: int) -> None:
    """The last update's loss was computed before it: whether the weights survived it has to be asked of themselves."""
    if not all(bool(parameter.isfinite().all()) for parameter in network.parameters()):
        raise TrainingError(f"a weight became infinite or NaN by step {step}; {_WAY_OUT}")


def _training_mode(network: nn.Module, *, freeze_batchnorm: bool) -> None:
    network.train()
    if freeze_batchnorm:
        for layer in batchnorm_layers(network).values():
            layer.eval()


def _train_one_step(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    stream: Iterator[Batch],
    plan: Plan,
    config: Config,
    runtime: Runtime,
) -> "_StepResult":
    """One update from a global batch."""
    optimizer.zero_grad(set_to_none=True)
    total, num_left_out = torch.zeros((), device=runtime.device), 0
    for part in range(plan.num_accumulation):
        batch = next(stream)
        num_left_out += len(batch.left_out)
        is_last = part + 1 == plan.num_accumulation
        with nullcontext() if is_last else runtime.accelerator.no_sync(network):
            logits = network(batch.images)
            summed = F.cross_entropy(
                logits.float(), batch.labels, reduction="sum", label_smoothing=config.optimizer.label_smoothing
            )
            loss = summed / plan.global_batch_size
            # DDP averages gradients over ranks; times their number, the average is the gradient of the global mean.
            runtime.accelerator.backward(loss * plan.world_size)
        total += loss.detach()
    if config.data.on_bad_image == "skip":  # all ranks have to know what any of them left out
        num_left_out = int(runtime.sum(torch.tensor([num_left_out], device=runtime.device)).item())
        if num_left_out:
            weight = plan.global_batch_size / (plan.global_batch_size - num_left_out)
            total *= weight
            for parameter in network.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(weight)  # the mean over the images that there are
    optimizer.step()
    return _StepResult(total, num_left_out)


@dataclass(frozen=True)
class _StepResult:
    """`loss` (), this rank's part of the mean loss of the global batch; `num_left_out`, its bad images on all ranks."""

    loss: torch.Tensor
    num_left_out: int


class _Timed:
    """An iterator of batches that adds up how long its caller waited for them, in seconds."""

    def __init__(self, stream: Iterator[Batch]) -> None:
        self._stream = stream
        self.waited = 0.0

    def __iter__(self) -> "_Timed":
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        batch = next(self._stream)
        self.waited += time.perf_counter() - start
        return batch


class _Meter:
    """Collects the loss between two log lines and writes them."""

    def __init__(self, plan: Plan, config: Config, runtime: Runtime, records: Records) -> None:
        self._plan, self._config, self._runtime, self._records = plan, config, runtime, records
        self._losses: list[torch.Tensor] = []
        self._start = time.perf_counter()

    def after_step(self, step: int, loss: torch.Tensor, stream: _Timed, title: str, ticker: Ticker, *, is_last: bool) -> None:
        """Count a step; every `log_every` steps and after the last one, log and check the loss."""
        self._losses.append(loss)
        ticker.advance()
        if (step + 1) % self._config.log_every and not is_last:
            return
        loss_now = (self._runtime.sum(torch.stack(self._losses).sum()) / len(self._losses)).item()
        seconds = time.perf_counter() - self._start
        num_steps = len(self._losses)
        if not math.isfinite(loss_now):
            raise TrainingError(f"the loss became {loss_now} between steps {step + 1 - num_steps} and {step + 1}; {_WAY_OUT}")
        images_per_second = num_steps * self._plan.global_batch_size / seconds
        lr = self._plan.schedule.learning_rate(step)
        self._records.log(
            "train",
            step=step + 1,
            epoch=(step + 1) / self._plan.steps_per_epoch,
            lr=lr,
            loss=loss_now,
            images_per_second=images_per_second,
            data_wait=min(1.0, stream.waited / seconds),
            memory_mib=memory_mib(self._runtime.device),
        )
        ticker.note(f"loss {loss_now:.4f}, {images_per_second:.0f} images/s")
        if is_last:
            self._records.say(f"{title}: loss {loss_now:.4f}, lr {lr:.3g}, {images_per_second:.0f} images/s")
        self._losses.clear()
        stream.waited = 0.0
        self._start = time.perf_counter()
