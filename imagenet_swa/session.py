"""Processes, images, network and loaders: what every command needs that runs a network on images."""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from imagenet_swa.batchnorm import recompute_statistics
from imagenet_swa.config import Config, Preprocessing, require
from imagenet_swa.data.imagenet import NUM_VAL, published_top1
from imagenet_swa.data.index import ImageIndex
from imagenet_swa.data.loaders import Loaders, build_indices, build_loaders, hold_out
from imagenet_swa.data.sampling import epoch_order, evaluation_batches, statistics_batches
from imagenet_swa.data.sources import progress_bar
from imagenet_swa.engine import check_left_out
from imagenet_swa.evaluate import Evaluation, evaluate
from imagenet_swa.models import (
    Weights,
    batchnorm_layers,
    check_forward,
    load_pretrained,
    load_weights,
    resolve_preprocessing,
)
from imagenet_swa.records import Ticker, no_progress
from imagenet_swa.runtime import Runtime, start_runtime

Progress = Callable[[int], AbstractContextManager[Ticker]]
SUBSET_SEED = 1  # of the images that stand for a split


@dataclass
class Session:
    """What every command needs that runs a network on images."""

    config: Config
    runtime: Runtime
    indices: tuple[ImageIndex, ImageIndex]
    network: nn.Module
    preprocessing: Preprocessing
    loaders: Loaders

    @classmethod
    def open(cls, config: Config, *, evaluation_only: bool = False) -> "Session":
        """Processes, images and the pretrained network (in host memory), in the order in which bad input is cheapest. With
        `evaluation_only` it does without training images.
        """
        runtime = start_runtime(config)
        indices = build_indices(config, runtime, progress_bar, evaluation_only=evaluation_only)
        torch.manual_seed(config.seed)  # random weights are the same on every rank, as the averages of all ranks must be
        with runtime.local_main_first():
            network = load_pretrained(config.model)
        preprocessing = resolve_preprocessing(config.model, config.preprocessing, network)
        check_forward(network, preprocessing.image_size, config.model)
        train, held_out = hold_out(indices[0], 0 if evaluation_only else config.data.num_held_out)
        indices = train, indices[1]
        loaders = build_loaders(config, indices, preprocessing, runtime, held_out)
        return cls(config, runtime, indices, network, preprocessing, loaders)

    def describe(self) -> list[str]:
        """Network, preprocessing and images, a line each."""
        model = self.config.model
        weights = model.weights or ("by that name" if model.pretrained else "random")
        num_train, num_val = map(len, self.indices)
        return [
            f"network: {model.library} {model.name}, weights {weights}",
            f"preprocessing: {self.preprocessing.describe()}",
            f"images: {num_train:,} for training, {num_val:,} for validation; decoded by {self.loaders.train.decoder}",
        ]

    def network_with(self, weights: Weights) -> nn.Module:
        """A fresh network on the device: one that Accelerate prepared would run in training's arithmetic."""
        network = copy.deepcopy(self.network)
        load_weights(network, weights, "the average")
        return self.placed(network)

    def placed(self, network: nn.Module) -> nn.Module:
        """The network on the device in the configured memory order."""
        order = torch.channels_last if self.config.speed.channels_last else torch.preserve_format
        return network.to(self.runtime.device).to(memory_format=order)

    def recompute_batchnorm(
        self,
        networks: Sequence[nn.Module],
        *,
        epoch: int,
        step: int = 0,
        num_images: int | None = None,
        alone: bool = False,
        progress: Progress = no_progress,
    ) -> int:
        """Give all networks BatchNorm statistics in one pass over training images, with the crops of the epoch; returns the
        number of images, 0 where there is nothing to recompute.

        Args:
            networks: of one architecture, on the device.
            step: decides what dropout draws.
            num_images: how many images, in random order; default: all.
            alone: this process goes through all of them, else all processes share them.
        """
        if self.config.model.freeze_batchnorm or not batchnorm_layers(self.network):
            return 0
        loader, runtime = self.loaders.train, self.runtime
        batches = statistics_batches(
            len(loader.index),
            seed=self.config.seed,
            epoch=epoch,
            rank=0 if alone else runtime.rank,
            world_size=1 if alone else runtime.world_size,
            batch_size=self.config.evaluation.batch_size,
            num_used=num_images,
        )
        runtime.seed(self.config.seed, step, 1, alone=alone)  # dropout, apart from the training steps' numbers
        with progress(len(batches)) as ticker:
            num_seen = recompute_statistics(
                networks,
                (batch.images for batch in ticker.follow(loader.training_stream(batches, epoch=epoch))),
                sum_over_ranks=_as_it_is if alone else runtime.sum,
                forward_context=lambda: runtime.autocast(self.config.evaluation.precision),
            )
        check_left_out(min(num_images or len(loader.index), len(loader.index)) - num_seen, self.config)
        return num_seen

    def evaluate(
        self,
        networks: dict[str, nn.Module],
        progress: Progress = no_progress,
        *,
        split: Literal["val", "train", "held_out"] = "val",
        num_images: int | None = None,
        alone: bool = False,
    ) -> dict[str, Evaluation]:
        """All networks in one pass over the images of a split, resized and centrally cropped.

        Args:
            progress: `progress(num_batches)` shows how far it is.
            num_images: a random subset, always the same; default: all.
            alone: this process goes through all of them, else all processes share them.
        """
        loader, runtime = getattr(self.loaders, split), self.runtime
        require(loader is not None, "no images are held out; data.num_held_out was 0 in this run")
        chosen = np.sort(epoch_order(len(loader.index), seed=SUBSET_SEED, epoch=0)[:num_images])
        batches = evaluation_batches(
            len(chosen),
            rank=0 if alone else runtime.rank,
            world_size=1 if alone else runtime.world_size,
            batch_size=self.config.evaluation.batch_size,
        )
        with progress(len(batches)) as ticker:
            evaluations = evaluate(
                networks,
                ticker.follow(loader.evaluation_stream([chosen[batch] for batch in batches])),
                loader.index.labels,
                num_classes=self.config.model.num_classes,
                device=runtime.device,
                wanted=chosen,
                sum_over_ranks=_as_it_is if alone else runtime.sum,
                forward_context=lambda: runtime.autocast(self.config.evaluation.precision),
            )
        num_left_out = max(evaluation.num_left_out for evaluation in evaluations.values())
        check_left_out(num_left_out, self.config)
        require(
            num_left_out < len(chosen),
            f"{num_left_out} images of data.{'val' if split == 'val' else 'train'} cannot be decoded and none is left; "
            "look at the data with `imagenet-swa verify`",
        )
        return evaluations


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def evaluate_network(config: Config) -> Evaluation:
    """The configured network as it starts, on the validation images: the baseline of a run, or any weights file."""
    session = Session.open(config, evaluation_only=True)
    network = session.placed(session.network)
    return session.evaluate({"network": network})["network"]


def compare_with_published(config: Config, preprocessing: Preprocessing, top1: float, num_images: int) -> str:
    """A sentence on how a measured baseline relates to the published figure."""
    published = published_top1(config.model.library, config.model.name, preprocessing.interpolation)
    by_name = config.model.weights is None and config.model.pretrained  # else a file's weights, or random ones
    if published is None or not by_name or num_images != NUM_VAL:
        return f"  baseline: {100 * top1:.2f} % measured in this pipeline; gains are relative to it"
    difference = 100 * (top1 - published)
    verdict = (
        "agrees" if abs(difference) <= 0.1 else "DIFFERS: check class order, preprocessing and weights before trusting gains"
    )
    return f"  baseline: {100 * top1:.2f} % measured, {100 * published:.2f} % published: {difference:+.2f} points, {verdict}"
