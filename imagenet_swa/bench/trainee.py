"""The configured network in training, as a run trains it, on made-up images: what the bench saves and whose steps it times."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from imagenet_swa.agreement import Verdict, Wishes
from imagenet_swa.bench.measure import settle
from imagenet_swa.checkpoint import Snapshot
from imagenet_swa.config import Config, DataConfig, SwaConfig
from imagenet_swa.data.batch import Batch
from imagenet_swa.optim import bare
from imagenet_swa.plan import make_plan
from imagenet_swa.runtime import Runtime
from imagenet_swa.session import Session
from imagenet_swa.state import TrainingState
from imagenet_swa.stepper import Stepper

_STEPS_PER_EPOCH = 1_000_000  # so that all is within an epoch, where a checkpoint holds most
_STEPS_AT_A_TIME_ON_GPU = 10
_NOTHING = Wishes()


class Trainee:
    """A network of random weights, its optimizer, the average; the learning rate is 0, so that it stays what it is.

    Attributes:
        runtime: this process among the others.
        image_size: pixels.
        steps_at_a_time: steps that are timed together: on a GPU, waiting for each would hide that the host runs ahead.
    """

    def __init__(self, config: Config, batch_size: int) -> None:
        config = replace(
            config,
            model=replace(config.model, pretrained=False, weights=None),
            data=DataConfig(synthetic=True, synthetic_num_images=(batch_size, batch_size), on_bad_image=config.data.on_bad_image),
            swa=SwaConfig(),
            speed=replace(config.speed, max_batch_size_per_device=batch_size),
        )
        session = Session.open(config)
        self.runtime: Runtime = session.runtime
        num_images = batch_size * self.runtime.world_size
        self._config = session.config = replace(config, global_batch_size=num_images)
        self.steps_at_a_time = _STEPS_AT_A_TIME_ON_GPU if self.runtime.device.type == "cuda" else 1
        self.image_size = session.preprocessing.image_size
        plan = make_plan(self._config, num_images=num_images * _STEPS_PER_EPOCH, world_size=self.runtime.world_size)
        self.state = TrainingState(session, plan)
        self.state.prepared.train()
        loader = session.loaders.train
        self._stepper = Stepper(self.state.prepared, self.state.optimizer, plan, self._config, self.runtime, loader.index)
        self._stream = _for_ever(next(loader.training_stream([np.arange(batch_size)], epoch=0)))
        self._facts = {"decoder": loader.decoder, "identity": self._config.result_settings()}

    def guarded_step(self, wishes: Wishes = _NOTHING) -> list[Verdict]:
        """A step as a run makes it: nothing that is not finite is applied, and the ranks agree how to go on."""
        self._stepper.launch(self.state.progress.step, self._stream, wishes)
        self.state.progress.step += 1
        return self._stepper.verdicts()

    def plain_step(self) -> None:
        """The same step as people write it, without guards and agreement."""
        optimizer, accelerator = self.state.optimizer, self.runtime.accelerator
        vars(bare(optimizer)).pop("found_inf", None)  # of the last guarded step
        optimizer.zero_grad(set_to_none=True)
        batch = next(self._stream)
        smoothing = self._config.optimizer.label_smoothing
        accelerator.backward(F.cross_entropy(self.state.prepared(batch.images).float(), batch.labels, label_smoothing=smoothing))
        optimizer.step()
        self.state.progress.step += 1

    def seconds_per_step(self, step: Callable[[], object]) -> float:
        """How long a step takes, of `steps_at_a_time`."""
        settle()
        start = time.perf_counter()
        for _ in range(self.steps_at_a_time):
            step()
        settle()
        return (time.perf_counter() - start) / self.steps_at_a_time

    def gradients(self) -> list[torch.Tensor]:
        """Those of the last step."""
        return [p.grad for p in self.state.network.parameters() if p.grad is not None]

    def snapshot(self) -> Snapshot:
        """What a run saves, under the number of a step that was not saved yet; for all ranks."""
        self.state.progress.step += 1
        return self.state.snapshot(self._facts)

    def in_place(self) -> dict[str, Any]:
        """The same for `torch.save`, not copied."""
        average = self.state.average.state()
        return {"model": self.state.network.state_dict(), "optimizer": self.state.optimizer.state_dict(), "average": average}


def _for_ever(batch: Batch) -> Iterator[Batch]:
    while True:
        yield batch
