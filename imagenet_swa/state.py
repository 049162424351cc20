"""What a checkpoint holds, alive: the network in training, its optimizer, the average, and how far they are."""

import copy
from typing import Any

from timm.layers.norm_act import convert_sync_batchnorm

from imagenet_swa.averaging import WeightAverage, capture_weights
from imagenet_swa.batchnorm import mean_over_ranks, restore_statistics, statistics_of_ranks
from imagenet_swa.checkpoint import Snapshot
from imagenet_swa.engine import Progress
from imagenet_swa.models import Weights, load_weights
from imagenet_swa.optim import load_momentum_buffers, make_sgd, momentum_buffers
from imagenet_swa.plan import Plan
from imagenet_swa.rehearsal import rehearse
from imagenet_swa.session import Session


class TrainingState:
    """The network, bare and as prepared by Accelerate, its optimizer, the average, the progress.

    Attributes:
        weights: of the network after the last finished epoch, or as it was restored.
    """

    def __init__(self, session: Session, plan: Plan) -> None:
        self._session, self._runtime, self._plan = session, session.runtime, plan
        config = session.config
        network = session.placed(copy.deepcopy(session.network))
        if config.model.sync_batchnorm:
            network = convert_sync_batchnorm(network)  # timm's, which keeps the activations of its fused layers
        optimizer = make_sgd(network, config.optimizer, fused=config.speed.fused_optimizer)
        if config.speed.compile:
            network.compile()  # in place: parameter names stay as they are
        self.network = network
        self.prepared, self.optimizer = self._runtime.accelerator.prepare(network, optimizer)
        self.average = WeightAverage(session.network)
        self.progress = Progress()
        self.weights: Weights = capture_weights(session.network)
        rehearse(self.prepared, plan.batch_size_per_device, session.preprocessing.image_size, self._runtime)

    @property
    def is_between_epochs(self) -> bool:
        """Whether the last step was the last of an epoch, or there was none."""
        return self.progress.step % self._plan.steps_per_epoch == 0

    def mean_weights(self) -> Weights:
        """The network's weights now, with BatchNorm statistics of all ranks, which go on from there."""
        if not self._session.config.model.freeze_batchnorm:
            mean_over_ranks(self.network, self._runtime.sum, self._runtime.world_size)
        return capture_weights(self.network)

    def snapshot(self, facts: dict[str, Any]) -> Snapshot:
        """All of it, in host memory, and the facts. For all ranks; only rank 0's is whole. Training leaves it as it is."""
        runtime, scaler, statistics = self._runtime, self._runtime.accelerator.scaler, {}
        if not self.is_between_epochs:  # there, all ranks have the same
            statistics = statistics_of_ranks(self.network, runtime.sum, runtime.rank, runtime.world_size)
        progress = {
            "step": self.progress.step,
            "losses": list(self.progress.losses),
            "num_left_out": self.progress.num_left_out,
            "steps_per_epoch": self._plan.steps_per_epoch,
            "num_averaged": self.average.num_averaged,
            "loss_scale": scaler.state_dict() if scaler is not None else None,
            "world_size": runtime.world_size,
        }
        if not runtime.is_main:
            return Snapshot(progress, {})
        momentum = momentum_buffers(self.network, self.optimizer)
        on_host = {name: buffer.to("cpu", copy=True).contiguous() for name, buffer in momentum.items()}
        weights = self.weights if self.is_between_epochs else capture_weights(self.network)
        return Snapshot(progress | facts, weights, on_host, self.average.state(), statistics)

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from what `snapshot` gave, on this number of ranks or another."""
        saved, runtime = snapshot.progress, self._runtime
        load_weights(self.network, snapshot.weights, "the checkpoint")
        restore_statistics(self.network, snapshot.statistics, runtime.rank, runtime.world_size)
        load_momentum_buffers(self.network, self.optimizer, snapshot.momentum)
        self.average.load_state(snapshot.average, saved["num_averaged"])
        if runtime.accelerator.scaler is not None and saved["loss_scale"] is not None:
            runtime.accelerator.scaler.load_state_dict(saved["loss_scale"])
        self.progress = Progress(saved["step"], list(saved["losses"]), saved["num_left_out"])
        self.weights = snapshot.weights
