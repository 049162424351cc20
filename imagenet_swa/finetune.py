"""The story of a run: pretrained network -> cycles of SGD -> averages -> BatchNorm statistics -> evaluation -> report."""

import copy
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn

from imagenet_swa.averaging import WeightAverage, capture_weights
from imagenet_swa.batchnorm import mean_over_ranks, recompute_statistics
from imagenet_swa.checkpoint import Checkpoints, Snapshot, check_same_run, copy_atomically, load_snapshot, save_weights
from imagenet_swa.config import Config, InputError, to_plain
from imagenet_swa.data.sampling import statistics_batches
from imagenet_swa.engine import Plan, check_batches, check_left_out, make_plan, train_one_epoch
from imagenet_swa.files import write_atomically
from imagenet_swa.models import Weights, batchnorm_layers, load_weights
from imagenet_swa.optim import load_momentum_buffers, make_sgd, momentum_buffers
from imagenet_swa.records import Records
from imagenet_swa.report import write_report
from imagenet_swa.runtime import Runtime, environment_record
from imagenet_swa.session import Session, compare_with_published

# The averages that a run reports, and whether the pretrained weights count in them.
AVERAGES = {"swa": True, "swa_without_pretrained": False}


def finetune(config: Config) -> Path:
    """Alg. 1 of the paper from pretrained weights to report.md, whose path is returned; resumes where a run stopped."""
    run = Run.start(config)
    run.evaluate_what_is_due()  # the pretrained network, or what an interruption left out
    while run.epoch < config.swa.num_epochs:
        run.train_one_epoch()
        if run.plan.is_capture(run.epoch):
            run.capture()
        run.save_checkpoint()
        run.evaluate_what_is_due()
    return run.finish()


class Run:
    """A fine-tuning run in the middle: its network, its averages, its files."""

    def __init__(self, session: Session, records: Records) -> None:
        self.session, self.config, self.runtime, self.records = session, session.config, session.runtime, records
        self.folder = self.config.output
        self.checkpoints = Checkpoints(self.folder / "checkpoints", self.config.checkpoints_to_keep)
        self.epoch = 0  # finished epochs
        self.results: list[dict[str, Any]] = []
        num_images = len(session.loaders.train.index)
        self.plan: Plan = make_plan(self.config, num_images=num_images, world_size=self.runtime.world_size)
        self.average = WeightAverage(session.network)
        self.captured: Weights = capture_weights(session.network)
        self.network, self.prepared, self.optimizer = self._prepare()

    @property
    def step(self) -> int:
        """Finished optimizer steps."""
        return self.epoch * self.plan.steps_per_epoch

    # ------------------------------------------------------------------------------------------ start and resume

    @classmethod
    def start(cls, config: Config) -> "Run":
        """Everything in place for the first epoch, or for the one after the newest valid checkpoint."""
        session = Session.open(config)
        _claim_folder(config, session.runtime)
        records = Records(config.output, session.runtime)
        session.runtime.accelerator.init_trackers("imagenet_swa", config={"seed": config.seed})
        run = cls(session, records)
        if warning := check_batches(run.plan, config, run.network):
            records.say(f"warning: {warning}")
        snapshot = run._newest_snapshot()
        run._introduce(snapshot)
        if snapshot is not None:
            run._restore(snapshot)
        records.forget_after(run.step if snapshot else -1)
        if run.epoch < config.swa.num_epochs:  # a finished run keeps the record of the machine that made it
            run._save_description()
        return run

    def _prepare(self) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
        """The network to train: bare, as prepared by Accelerate, and its optimizer."""
        network = self.session.placed(copy.deepcopy(self.session.network))
        if self.config.model.sync_batchnorm:
            network = convert_sync_batchnorm(network)  # timm's, which keeps the activations of its fused layers
        optimizer = make_sgd(network, self.config.optimizer, fused=self.config.speed.fused_optimizer)
        if self.config.speed.compile:
            network.compile()  # in place: parameter names stay as they are
        prepared, prepared_optimizer = self.runtime.accelerator.prepare(network, optimizer)
        return network, prepared, prepared_optimizer

    def _newest_snapshot(self) -> Snapshot | None:
        path, complaints = self.runtime.from_main(self.checkpoints.newest_valid() if self.runtime.is_main else None)
        for complaint in complaints:
            self.records.say(f"warning: checkpoint {complaint}")
        if path is not None:
            return load_snapshot(path)
        remains = self.checkpoints.exist() or (self.folder / "swa.safetensors").exists() if self.runtime.is_main else None
        if self.runtime.from_main(remains):
            raise InputError(
                f"{self.folder} holds a run but no valid checkpoint to go on from; move it away or choose another output"
            )
        return None

    def _restore(self, snapshot: Snapshot) -> None:
        progress = snapshot.progress
        check_same_run(progress, self._identity())
        load_weights(self.network, snapshot.weights, "the checkpoint")
        load_momentum_buffers(self.network, _bare(self.optimizer), snapshot.momentum)
        self.average.load_state(snapshot.average, progress["num_averaged"])
        if self.runtime.accelerator.scaler is not None and progress["loss_scale"] is not None:
            self.runtime.accelerator.scaler.load_state_dict(progress["loss_scale"])
        self.epoch = progress["epoch"]
        self.captured = capture_weights(self.network)
        found = self.runtime.from_main(self._saved_results() if self.runtime.is_main else None)
        self.results = [result for result in found if result["epoch"] <= self.epoch]
        reported = {result["epoch"] for result in self.results if result["name"] == "swa"}
        for epoch in sorted(set(self.config.swa.epochs_to_report) - reported):
            if epoch < self.epoch:
                self.records.say(f"warning: the average after epoch {epoch} was not reported and cannot be made up for")

    def _saved_results(self) -> list[dict[str, Any]]:
        path = self.folder / "results.json"
        try:
            return json.loads(path.read_text()) if path.exists() else []
        except ValueError:
            self.records.say(f"warning: {path} is damaged; what can be evaluated again will be")
            return []

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint's run and the present one must have in common, flat."""
        train, val = (index.fingerprint for index in self.session.indices)
        return self.config.result_settings() | {"training images": train, "validation images": val}

    # ------------------------------------------------------------------------------------------------- the story

    def train_one_epoch(self) -> None:
        """SGD over the training images once."""
        train_one_epoch(
            self.prepared,
            self.optimizer,
            self.session.loaders.train,
            plan=self.plan,
            epoch=self.epoch,
            config=self.config,
            runtime=self.runtime,
            records=self.records,
        )
        if not self.config.model.freeze_batchnorm:
            mean_over_ranks(self.network, self.runtime.sum, self.runtime.world_size)
        self.captured = capture_weights(self.network)
        self.epoch += 1

    def capture(self) -> None:
        """Fold the weights at the end of a cycle into the average and keep them as a file."""
        start = time.perf_counter()
        self.average.update(self.captured)
        seconds = time.perf_counter() - start
        mib = sum(tensor.nbytes for tensor in self.captured.values()) / 2**20
        self.records.log("capture", step=self.step, num_averaged=self.average.num_averaged, seconds=seconds, mib=mib)
        if self.average.num_averaged == 1:  # the method's whole extra cost, sec. 3.3
            self.records.say(f"  averaging: {mib:.1f} MiB more memory, {1000 * seconds:.1f} ms per capture")
        self._save_weights(self.captured, self.folder / "captures" / f"epoch-{self.epoch:02d}.safetensors")

    def save_checkpoint(self) -> None:
        """All that a resumed run needs. Returns when it is on disk, on every rank."""
        if self.runtime.is_main:
            scaler = self.runtime.accelerator.scaler
            progress = {
                "epoch": self.epoch,
                "step": self.step,
                "num_averaged": self.average.num_averaged,
                "loss_scale": scaler.state_dict() if scaler is not None else None,
                "world_size": self.runtime.world_size,
                "decoder": self.session.loaders.train.decoder,
                "identity": self._identity(),
            }
            momentum = momentum_buffers(self.network, _bare(self.optimizer))
            on_host = {name: buffer.to("cpu", copy=True).contiguous() for name, buffer in momentum.items()}
            self.checkpoints.save(Snapshot(progress, self.captured, on_host, self.average.state()))
        self.runtime.barrier()

    def evaluate_what_is_due(self) -> None:
        """Evaluate, in one pass, the networks of this epoch that have no result yet; save results and predictions."""
        networks = self._networks_due()
        if not networks:
            return
        self.runtime.barrier()
        progress = partial(self.records.progress, "evaluation")
        for name, evaluation in self.session.evaluate(networks, progress).items():
            epoch, step = (0, 0) if name == "pretrained" else (self.epoch, self.step)
            summary = evaluation.summary()
            self.results = [r for r in self.results if (r["name"], r["epoch"]) != (name, epoch)]
            self.results.append({"name": name, "epoch": epoch, "step": step, **summary})
            self.records.say(f"  {_label(name, epoch)}: top-1 {100 * summary['top1']:.2f} %, NLL {summary['nll']:.4f}")
            if self.runtime.is_main:
                folder = self.folder / "predictions"
                folder.mkdir(exist_ok=True)
                evaluation.save(folder / f"{_label(name, epoch)}.parquet")
        self._comment_on_results()
        if self.runtime.is_main:
            write_atomically(self.folder / "results.json", json.dumps(self.results, indent=1))
        for result in self.results[-len(networks) :]:  # not before: an interrupted pass is logged once, when it is repeated
            self.records.log("evaluation", **result)

    def finish(self) -> Path:
        """Write swa.safetensors and the report; returns the latter's path."""
        name = "swa" if self.config.swa.include_pretrained else "swa_without_pretrained"
        if self.runtime.is_main:
            copy_atomically(self._average_file(name), self.folder / "swa.safetensors")
            write_report(self.folder)
        self.runtime.barrier()
        self.runtime.accelerator.end_training()
        return self.folder / "report.md"

    # ------------------------------------------------------------------------------------------------- its parts

    def _networks_due(self) -> dict[str, nn.Module]:
        done = {result["name"] for result in self.results if result["epoch"] == self.epoch}
        is_report = self.epoch in self.config.swa.epochs_to_report
        wanted: dict[str, nn.Module] = {}
        if not any(result["name"] == "pretrained" for result in self.results):
            wanted["pretrained"] = self.session.network_with(self.average.pretrained())
        is_capture = self.epoch > 0 and self.plan.is_capture(self.epoch)
        if is_capture and (self.config.evaluation.captures or is_report) and "capture" not in done:
            wanted["capture"] = self.session.network_with(self.captured)
        if self.epoch > 0 and is_report and not (done >= set(AVERAGES) and self._averages_on_disk()):
            wanted |= self._averaged_networks()
        return wanted

    def _averaged_networks(self) -> dict[str, nn.Module]:
        """Both averages with fresh BatchNorm statistics, one pass over the training images for the two."""
        networks = {
            name: self.session.network_with(self.average.weights(include_pretrained=with_pretrained))
            for name, with_pretrained in AVERAGES.items()
        }
        self._recompute_batchnorm(list(networks.values()))
        for name, network in networks.items():
            self._save_weights(capture_weights(network), self._average_file(name))
        return networks

    def _average_file(self, name: str) -> Path:
        return self.folder / "averages" / f"{_label(name, self.epoch)}.safetensors"

    def _averages_on_disk(self) -> bool:
        return self.runtime.from_main(all(self._average_file(name).exists() for name in AVERAGES))

    def _recompute_batchnorm(self, networks: list[nn.Module]) -> None:
        if not batchnorm_layers(networks[0]) or self.config.model.freeze_batchnorm:
            why = "are frozen" if self.config.model.freeze_batchnorm else "do not exist in this network"
            self.records.say(f"  BatchNorm statistics {why}: nothing to recompute")
            return
        loader = self.session.loaders.train
        batches = statistics_batches(
            len(loader.index),
            seed=self.config.seed,
            epoch=self.epoch,
            rank=self.runtime.rank,
            world_size=self.runtime.world_size,
            batch_size=self.config.evaluation.batch_size,
            num_used=self.config.batchnorm.num_images,
        )
        self.runtime.seed(self.config.seed, self.step, 1)  # dropout, apart from the training steps' numbers
        start = time.perf_counter()
        with self.records.progress("BatchNorm statistics", len(batches)) as ticker:
            num_images = recompute_statistics(
                networks,
                (batch.images for batch in ticker.follow(loader.training_stream(batches, epoch=self.epoch))),
                sum_over_ranks=self.runtime.sum,
                forward_context=lambda: self.runtime.autocast(self.config.evaluation.precision),
            )
        wanted = min(self.config.batchnorm.num_images or len(loader.index), len(loader.index))
        check_left_out(wanted - num_images, self.config)
        self.records.say(f"  BatchNorm statistics from {num_images:,} images in {time.perf_counter() - start:.1f} s")

    def _save_weights(self, weights: Weights, path: Path) -> None:
        if self.runtime.is_main:
            # One key: safetensors writes several in random order, and equal runs should leave equal files.
            about = {"network": self.config.model.name, "num_averaged": self.average.num_averaged}
            save_weights(weights, path, {"imagenet_swa": json.dumps(about)})

    # -------------------------------------------------------------------------------------------- words for people

    def _introduce(self, snapshot: Snapshot | None) -> None:
        for line in self.session.describe():
            self.records.say(line)
        self.records.say(f"batches: {self.plan.describe()}; device {self.runtime.device}, {self.config.speed.precision}")
        if snapshot is not None:
            before, note = snapshot.progress, ""
            if before["world_size"] != self.runtime.world_size:
                note += f"; it was saved with {before['world_size']} processes: BatchNorm now sees batches of another size"
            if before.get("decoder", decoder := self.session.loaders.train.decoder) != decoder:
                note += f"; until then images were decoded by {before['decoder']}: pixels now differ slightly"
            self.records.say(f"resuming after epoch {before['epoch']}{note}")

    def _save_description(self) -> None:
        if not self.runtime.is_main:
            return
        record = environment_record(self.runtime, self.config)
        record["data"] = {
            split: {"num_images": len(index), "fingerprint": index.fingerprint}
            for split, index in zip(("train", "val"), self.session.indices, strict=True)
        }
        record["preprocessing"] = to_plain(self.session.preprocessing)
        write_atomically(self.folder / "environment.json", json.dumps(record, indent=1))
        write_atomically(self.folder / "config.yaml", yaml.safe_dump(to_plain(self.config), sort_keys=False))

    def _comment_on_results(self) -> None:
        latest = {result["name"]: result["top1"] for result in self.results if result["epoch"] == self.epoch}
        if "pretrained" in latest:
            self.records.say(
                compare_with_published(
                    self.config, self.session.preprocessing, latest["pretrained"], len(self.session.indices[1])
                )
            )
        if "swa" in latest and latest["swa"] < latest["capture"] - 0.1:
            self.records.say(
                f"warning: the average is {100 * (latest['capture'] - latest['swa']):.1f} points below its last capture. "
                "Averaged weights with unfit BatchNorm statistics look like this (is batchnorm.num_images too small?); "
                "so do captures too far apart to be averaged (is swa.lr_max too large?)"
            )


def _claim_folder(config: Config, runtime: Runtime) -> None:
    """Create the run folder; with `resume: never`, refuse one that holds a run."""
    taken = runtime.from_main((config.output / "config.yaml").exists() if runtime.is_main else None)
    if taken and config.resume == "never":
        raise InputError(f"{config.output} already holds a run and resume is never; choose another output, or resume auto")
    if runtime.is_main:
        try:
            config.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot create the run folder {config.output}: {error.strerror}") from None
    runtime.barrier()


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer inside Accelerate's wrapper."""
    return optimizer.optimizer if hasattr(optimizer, "optimizer") else optimizer


def _label(name: str, epoch: int) -> str:
    """File and line name of an evaluated network."""
    return name if name == "pretrained" else f"{name.replace('_', '-')}-epoch-{epoch:02d}"
