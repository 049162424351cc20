"""Processes, images, network and loaders: what every command needs that runs a network on images."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from imagenet_swa.config import Config, Preprocessing, require
from imagenet_swa.data.imagenet import NUM_VAL, published_top1
from imagenet_swa.data.index import ImageIndex
from imagenet_swa.data.loaders import Loaders, build_indices, build_loaders
from imagenet_swa.data.sampling import evaluation_batches
from imagenet_swa.data.sources import progress_bar
from imagenet_swa.engine import check_left_out
from imagenet_swa.evaluate import Evaluation, evaluate
from imagenet_swa.models import Weights, check_forward, load_pretrained, load_weights, resolve_preprocessing
from imagenet_swa.records import Ticker, no_progress
from imagenet_swa.runtime import Runtime, start_runtime


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
        return cls(config, runtime, indices, network, preprocessing, build_loaders(config, indices, preprocessing, runtime))

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

    def evaluate(
        self, networks: dict[str, nn.Module], progress: Callable[[int], AbstractContextManager[Ticker]] = no_progress
    ) -> dict[str, Evaluation]:
        """All networks in one pass over the validation images; `progress(num_batches)` shows how far it is."""
        index = self.loaders.val.index
        batches = evaluation_batches(
            len(index),
            rank=self.runtime.rank,
            world_size=self.runtime.world_size,
            batch_size=self.config.evaluation.batch_size,
        )
        with progress(len(batches)) as ticker:
            evaluations = evaluate(
                networks,
                ticker.follow(self.loaders.val.evaluation_stream(batches)),
                index.labels,
                num_classes=self.config.model.num_classes,
                device=self.runtime.device,
                sum_over_ranks=self.runtime.sum,
                forward_context=lambda: self.runtime.autocast(self.config.evaluation.precision),
            )
        num_left_out = max(evaluation.num_left_out for evaluation in evaluations.values())
        check_left_out(num_left_out, self.config)
        require(
            num_left_out < len(index),
            f"{num_left_out} images of data.val cannot be decoded and none is left; look at the data with `imagenet-swa verify`",
        )
        return evaluations


def evaluate_network(config: Config) -> Evaluation:
    """The configured network as it starts, on the validation images: the baseline of a run, or any weights file."""
    session = Session.open(config, evaluation_only=True)
    network = session.placed(session.network)
    return session.evaluate({"network": network})["network"]


def compare_with_published(config: Config, preprocessing: Preprocessing, top1: float, num_images: int) -> str:
    """A sentence on how a measured baseline relates to the published figure."""
    published = published_top1(config.model.library, config.model.name, preprocessing.interpolation)
    if published is None or config.model.weights is not None or num_images != NUM_VAL:
        return f"  baseline: {100 * top1:.2f} % measured in this pipeline; gains are relative to it"
    difference = 100 * (top1 - published)
    verdict = (
        "agrees" if abs(difference) <= 0.1 else "DIFFERS: check class order, preprocessing and weights before trusting gains"
    )
    return f"  baseline: {100 * top1:.2f} % measured, {100 * published:.2f} % published: {difference:+.2f} points, {verdict}"
