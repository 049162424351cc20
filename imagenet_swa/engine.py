"""One epoch of SGD: forward, backward, step, learning rate, progress."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import nn

from imagenet_swa.agreement import Verdict, Wishes
from imagenet_swa.config import Config, TrainingError
from imagenet_swa.data.batch import Batch, ImageLoader, TooManyBadImagesError
from imagenet_swa.models import batchnorm_layers
from imagenet_swa.optim import set_learning_rate
from imagenet_swa.plan import Plan
from imagenet_swa.records import Records, Ticker, memory_mib
from imagenet_swa.runtime import Runtime
from imagenet_swa.stepper import WAY_OUT, Stepper


@dataclass
class Progress:
    """How far training is, beside weights and momentum.

    Attributes:
        step: finished updates.
        losses: mean losses of the global batches since the last line of metrics.jsonl.
        num_left_out: bad images left out in this epoch, on all ranks.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    num_left_out: int = 0


class Attendant(Protocol):
    """Who is asked and told in the course of an epoch; on every rank."""

    def wishes(self) -> Wishes:
        """What this rank wants from all, asked in each step."""
        ...

    def at_minimum(self, step: int) -> None:
        """A cycle ended with so many finished steps."""
        ...

    def heed(self, verdicts: Sequence[Verdict]) -> None:
        """What all ranks said about the last steps; `Progress.step` of them are finished, which may be the end of an epoch."""
        ...


def train_one_epoch(
    network: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: ImageLoader,
    *,
    plan: Plan,
    progress: Progress,
    config: Config,
    runtime: Runtime,
    records: Records,
    attendant: Attendant,
) -> None:
    """The steps from `progress.step` to the end of its epoch; `network` and `optimizer` as Accelerate prepared them.

    Raises:
        TrainingError: a loss, a gradient or a weight is not finite; no update was made with it, on any rank.
        BadImageError: an image cannot be decoded.
        TooManyBadImagesError: more images than the limit cannot be decoded.
        Whatever the attendant raises.
    """
    _training_mode(network, freeze_batchnorm=config.model.freeze_batchnorm)
    epoch, first_step = divmod(progress.step, plan.steps_per_epoch)
    end = (epoch + 1) * plan.steps_per_epoch
    batches = plan.batches(epoch, runtime.rank, first_step=first_step)
    stream = _Timed(loader.training_stream(batches.reshape(-1, plan.batch_size_per_device), epoch=epoch))
    stepper = Stepper(network, optimizer, plan, config, runtime, loader.index)
    title = f"epoch {epoch + 1}/{config.swa.num_epochs}"
    with records.progress(title, plan.steps_per_epoch) as ticker:
        ticker.advance(first_step)
        meter = _Meter(plan, config, runtime, records, progress, title, ticker)
        for step in range(progress.step, end):
            set_learning_rate(optimizer, plan.schedule.learning_rate(step))
            runtime.seed(config.seed, step)
            stepper.launch(step, stream, attendant.wishes())
            is_capture = plan.schedule.is_capture(step + 1)
            verdicts = stepper.verdicts(all_of_them=step + 1 == end or is_capture or meter.is_due(step + 1))
            if any(verdict.save or verdict.stop for verdict in verdicts):
                verdicts += stepper.verdicts(all_of_them=True)
            for verdict in verdicts:
                meter.after_step(verdict, stream)
                check_left_out(progress.num_left_out, config)
            if step + 1 == end or is_capture:
                check_weights(network, step + 1)
            if is_capture:
                attendant.at_minimum(step + 1)
            attendant.heed(verdicts)
    if progress.num_left_out:
        records.say(f"{title}: {progress.num_left_out} images left out as bad, counted each time")
        records.log("bad_images", step=end, num_left_out=progress.num_left_out)
    progress.num_left_out = 0


def check_left_out(num_left_out: int, config: Config) -> None:
    """Raise TooManyBadImagesError where all ranks together left out more than the limit, which is none unless they may."""
    if num_left_out > (config.data.max_bad_images if config.data.on_bad_image == "skip" else 0):
        error = TooManyBadImagesError(
            f"{num_left_out} images of this pass cannot be decoded, data.max_bad_images is {config.data.max_bad_images}; "
            "look at the data with `imagenet-swa verify`"
        )
        error.concerns_one_rank = False  # the number is that of all ranks
        raise error


def check_weights(network: nn.Module, step: int) -> None:
    """The last update's loss was computed before it: whether the weights survived it has to be asked of themselves."""
    if not all(bool(parameter.isfinite().all()) for parameter in network.parameters()):
        raise TrainingError(f"a weight became infinite or NaN by step {step}; {WAY_OUT}")


def _training_mode(network: nn.Module, *, freeze_batchnorm: bool) -> None:
    network.train()
    if freeze_batchnorm:
        for layer in batchnorm_layers(network).values():
            layer.eval()


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
    """Counts finished steps, collects the losses between two log lines and writes them."""

    def __init__(
        self,
        plan: Plan,
        config: Config,
        runtime: Runtime,
        records: Records,
        progress: Progress,
        title: str,
        ticker: Ticker,
    ) -> None:
        self._plan, self._config, self._runtime, self._records = plan, config, runtime, records
        self._progress, self._title, self._ticker = progress, title, ticker
        self._start, self._num_steps = time.perf_counter(), 0

    def is_due(self, step: int) -> bool:
        """Whether a line follows this number of finished steps."""
        return step % self._config.log_every == 0 or step % self._plan.steps_per_epoch == 0

    def after_step(self, verdict: Verdict, stream: _Timed) -> None:
        """Count a step; every `log_every` steps and after the last one of an epoch, log the loss."""
        progress = self._progress
        num_good = self._plan.global_batch_size - verdict.num_left_out
        progress.losses.append(verdict.loss * (self._plan.global_batch_size / num_good))
        progress.num_left_out += verdict.num_left_out
        progress.step += 1
        self._num_steps += 1
        self._ticker.advance()
        if self.is_due(progress.step):
            self._write(stream)
            progress.losses.clear()

    def _write(self, stream: _Timed) -> None:
        progress, steps_per_epoch = self._progress, self._plan.steps_per_epoch
        loss = math.fsum(progress.losses) / len(progress.losses)
        seconds = time.perf_counter() - self._start
        images_per_second = self._num_steps * self._plan.global_batch_size / seconds
        lr = self._plan.schedule.learning_rate(progress.step - 1)
        self._records.log(
            "train",
            step=progress.step,
            epoch=progress.step / steps_per_epoch,
            lr=lr,
            loss=loss,
            images_per_second=images_per_second,
            data_wait=min(1.0, stream.waited / seconds),
            memory_mib=memory_mib(self._runtime.device),
        )
        self._ticker.note(f"loss {loss:.4f}, {images_per_second:.0f} images/s")
        if progress.step % steps_per_epoch == 0:
            self._records.say(f"{self._title}: loss {loss:.4f}, lr {lr:.3g}, {images_per_second:.0f} images/s")
        stream.waited = 0.0
        self._start, self._num_steps = time.perf_counter(), 0
