"""Processes, images, network and loaders: what every command needs that runs a network on images."""

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import yaml
from torch import nn

from imagenet_swa.agreement import until_stopped
from imagenet_swa.batchnorm import recompute_statistics
from imagenet_swa.config import Config, Preprocessing, require, to_plain
from imagenet_swa.data.batch import Batch
from imagenet_swa.data.index import ImageIndex
from imagenet_swa.data.loaders import Loaders, build_indices, build_loaders, fingerprint_of_some, hold_out
from imagenet_swa.data.sampling import Indices, epoch_order, evaluation_batches, statistics_batches
from imagenet_swa.data.sources import progress_bar
from imagenet_swa.engine import check_left_out
from imagenet_swa.evaluate import Evaluation, evaluate
from imagenet_swa.files import write_atomically
from imagenet_swa.models import (
    Weights,
    batchnorm_layers,
    check_forward,
    load_pretrained,
    load_weights,
    resolve_preprocessing,
)
from imagenet_swa.records import Ticker, no_progress
from imagenet_swa.runtime import Runtime, environment_record, start_runtime
from imagenet_swa.sameness import describe, differences, weights_fingerprint

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
        if runtime.world_size > 1:
            _check_sameness(runtime, describe(config, {}))
        indices = build_indices(config, runtime, progress_bar, evaluation_only=evaluation_only)
        torch.manual_seed(config.seed)  # random weights are the same on every rank, as the averages of all ranks must be
        with runtime.local_main_first():
            network = load_pretrained(config.model)
        preprocessing = resolve_preprocessing(config.model, config.preprocessing, network)
        check_forward(network, preprocessing.image_size, config.model)
        train, held_out = hold_out(indices[0], 0 if evaluation_only else config.data.num_held_out)
        indices = train, indices[1]
        loaders = build_loaders(config, indices, preprocessing, runtime, held_out)
        session = cls(config, runtime, indices, network, preprocessing, loaders)
        if runtime.world_size > 1:
            _check_sameness(runtime, session._found_here())
        return session

    def _found_here(self) -> dict[str, str]:
        """What the settings led to on this machine, as far as results depend on it."""
        found = {"weights": weights_fingerprint(self.network.state_dict()), "decoder": self.loaders.train.decoder}
        if not self.config.data.synthetic:
            named = zip(("training", "validation"), self.indices, strict=True)
            found |= {f"some {split} images": fingerprint_of_some(index) for split, index in named}
        return found

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

    def identity(self) -> dict[str, Any]:
        """What a checkpoint's run and the present one must have in common, flat."""
        train, val = (index.fingerprint for index in self.indices)
        return self.config.result_settings() | {"training images": train, "validation images": val}

    def changes_since(self, progress: Mapping[str, Any]) -> list[str]:
        """What is other now than it was for the checkpoint of this progress, and what follows from it."""
        found, decoder = [], self.loaders.train.decoder
        if (before := progress["world_size"]) != self.runtime.world_size:
            found.append(f"it was saved with {before} processes: BatchNorm now sees batches of another size")
        if (before := progress.get("decoder", decoder)) != decoder:
            found.append(f"until then images were decoded by {before}: pixels now differ slightly")
        return found

    def save_description(self) -> None:
        """config.yaml and environment.json, with which others can repeat or doubt the run."""
        record, named = environment_record(self.runtime, self.config), zip(("train", "val"), self.indices, strict=True)
        record["data"] = {s: {"num_images": len(index), "fingerprint": index.fingerprint} for s, index in named}
        record["preprocessing"] = to_plain(self.preprocessing)
        write_atomically(self.config.output / "environment.json", json.dumps(record, indent=1))
        write_atomically(self.config.output / "config.yaml", yaml.safe_dump(to_plain(self.config), sort_keys=False))

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
            stream = ticker.follow(loader.training_stream(batches, epoch=epoch))
            num_seen = recompute_statistics(
                networks,
                (batch.images for batch in self._until_stopped("BatchNorm statistics", stream, batches, alone)),
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
            stream = ticker.follow(loader.evaluation_stream([chosen[batch] for batch in batches]))
            evaluations = evaluate(
                networks,
                self._until_stopped("evaluation", stream, batches, alone),
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

    def _until_stopped(self, what: str, stream: Iterable[Batch], batches: list[Indices], alone: bool) -> Iterator[Batch]:
        """The stream, of which rank 0 has the most batches."""
        num_rounds = len(batches) if alone else self.runtime.from_main(len(batches))
        return until_stopped(stream, num_rounds, self.runtime, what=what, alone=alone)


def _check_sameness(runtime: Runtime, description: dict[str, str]) -> None:
    """Raise InputError, on every rank, where a rank's settings, code, versions, weights or images are not the others'."""
    difference = differences(runtime.gather(description))
    require(difference is None, f"{difference}")


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def evaluate_network(config: Config) -> Evaluation:
    """The configured network as it starts, on the validation images: the baseline of a run, or any weights file."""
    session = Session.open(config, evaluation_only=True)
    network = session.placed(session.network)
    return session.evaluate({"network": network})["network"]
