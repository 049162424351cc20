"""A run in its middle: its network, its averages, its files; what the story in finetune.py is told of."""

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
from imagenet_swa.batchnorm import mean_over_ranks
from imagenet_swa.checkpoint import Checkpoints, Snapshot, check_same_run, copy_atomically, load_snapshot, save_weights
from imagenet_swa.config import Config, InputError, to_plain
from imagenet_swa.engine import Plan, check_batches, make_plan, train_one_epoch
from imagenet_swa.files import write_atomically
from imagenet_swa.models import Weights, batchnorm_layers, load_weights, read_weights
from imagenet_swa.optim import load_momentum_buffers, make_sgd, momentum_buffers
from imagenet_swa.records import Records, claim_folder
from imagenet_swa.report import write_report
from imagenet_swa.runtime import environment_record
from imagenet_swa.session import Session, compare_with_published

# The averages that a run reports, and whether the pretrained weights count in them.
AVERAGES = {"swa": True, "swa_without_pretrained": False}


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
        self.weights: Weights = capture_weights(session.network)  # after the last finished epoch
        self.captured: Weights = self.weights  # at the last minimum of the learning rate
        self.network, self.prepared, self.optimizer = self._prepare()

    @property
    def step(self) -> int:
        """Optimizer steps in the finished epochs."""
        return self.epoch * self.plan.steps_per_epoch

    @property
    def start_step(self) -> int:
        """Steps after which averaging begins."""
        return self.config.swa.start_epoch * self.plan.steps_per_epoch

    # ------------------------------------------------------------------------------------------ start and resume

    @classmethod
    def start(cls, config: Config) -> "Run":
        """Everything in place for the first epoch, or for the one after the newest valid checkpoint."""
        session = Session.open(config)
        claim_folder(config, session.runtime)
        records = Records(config.output, session.runtime)
        session.runtime.accelerator.init_trackers("imagenet_swa", config={"seed": config.seed})
        run = cls(session, records)
        if warning := check_batches(run.plan, config, run.network):
            records.say(f"warning: {warning}")
        snapshot = run._newest_snapshot()
        run._introduce(snapshot)
        if snapshot is not None:
            run._restore(snapshot)
        if run.epoch == config.swa.start_epoch:
            run.begin_averaging()
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
        if self.runtime.from_main(self._has_begun() if self.runtime.is_main else None):
            raise InputError(
                f"{self.folder} holds a run but no valid checkpoint to go on from; move it away or choose another output"
            )
        return None

    def _has_begun(self) -> bool:
        """Whether the folder holds more than a run leaves before its first checkpoint."""
        has_files = self.checkpoints.exist() or (self.folder / "swa.safetensors").exists()
        return has_files or any(result["epoch"] > 0 for result in self._saved_results())

    def _restore(self, snapshot: Snapshot) -> None:
        progress = snapshot.progress
        check_same_run(progress, self._identity())
        load_weights(self.network, snapshot.weights, "the checkpoint")
        load_momentum_buffers(self.network, self.optimizer, snapshot.momentum)
        self.average.load_state(snapshot.average, progress["num_averaged"])
        if self.runtime.accelerator.scaler is not None and progress["loss_scale"] is not None:
            self.runtime.accelerator.scaler.load_state_dict(progress["loss_scale"])
        self.epoch = progress["epoch"]
        self.weights = capture_weights(self.network)
        found = self.runtime.from_main(self._saved_results() if self.runtime.is_main else None)
        self.results = [result for result in found if result["epoch"] <= self.epoch]
        self.captured = self._captured_before()
        reported = {result["epoch"] for result in self.results if result["name"] == "swa"}
        for epoch in sorted(set(self.config.swa.epochs_to_report) - reported):
            if epoch < self.epoch:
                self.records.say(f"warning: the average after epoch {epoch} was not reported and cannot be made up for")

    def _captured_before(self) -> Weights:
        """The weights of the last capture: those of the checkpoint, unless it was taken earlier and still wants a result."""
        step = self.plan.schedule.last_capture(self.step)
        if step in (0, self.start_step, self.step) or self._has_result("capture", step):
            return self.weights
        return read_weights(self.folder / "captures" / f"{self._name_of(step)}.safetensors")

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
        """SGD over the training images once, with a capture wherever the learning rate is at its minimum."""
        train_one_epoch(
            self.prepared,
            self.optimizer,
            self.session.loaders.train,
            plan=self.plan,
            epoch=self.epoch,
            config=self.config,
            runtime=self.runtime,
            records=self.records,
            at_minimum=self._capture,
        )
        self.weights = self.captured if self.plan.schedule.is_capture(self.step + self.plan.steps_per_epoch) else self._weights()
        self.epoch += 1

    def begin_averaging(self) -> None:
        """What the network has learnt so far is what Alg. 1 starts from."""
        self.average.start_from(self.weights)
        self._save_weights(self.weights, self.folder / "pretrained.safetensors", step=self.step)

    def _capture(self, step: int) -> None:
        """Fold the weights at the end of a cycle into the average, once averaging has begun, and keep them as a file."""
        start, self.captured = time.perf_counter(), self._weights()
        if step > self.start_step:
            self.average.update(self.captured)
        seconds = time.perf_counter() - start
        mib = sum(tensor.nbytes for tensor in self.captured.values()) / 2**20
        self.records.log("capture", step=step, num_averaged=self.average.num_averaged, seconds=seconds, mib=mib)
        if self.average.num_averaged == 1:  # the method's whole extra cost, sec. 3.3
            self.records.say(f"  averaging: {mib:.1f} MiB more memory, {1000 * seconds:.1f} ms per capture")
        self._save_weights(self.captured, self.folder / "captures" / f"{self._name_of(step)}.safetensors", step=step)

    def _weights(self) -> Weights:
        """The network's weights now, with BatchNorm statistics of all ranks."""
        if not self.config.model.freeze_batchnorm:
            mean_over_ranks(self.network, self.runtime.sum, self.runtime.world_size)
        return capture_weights(self.network)

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
            momentum = momentum_buffers(self.network, self.optimizer)
            on_host = {name: buffer.to("cpu", copy=True).contiguous() for name, buffer in momentum.items()}
            self.checkpoints.save(Snapshot(progress, self.weights, on_host, self.average.state()))
        self.runtime.barrier()

    def evaluate_what_is_due(self) -> None:
        """Evaluate, in one pass, the networks of this epoch that have no result yet; save results and predictions."""
        networks = self._networks_due()
        if not networks:
            return
        self.runtime.barrier()
        progress = partial(self.records.progress, "evaluation")
        steps = {"pretrained": self.start_step, "capture": self.plan.schedule.last_capture(self.step)}
        for name, evaluation in self.session.evaluate(networks, progress).items():
            step = steps.get(name, self.step)
            label = name if name == "pretrained" else f"{name.replace('_', '-')}-{self._name_of(step)}"
            summary = evaluation.summary()
            self.results = [r for r in self.results if (r["name"], r["step"]) != (name, step)]
            self.results.append({"name": name, "epoch": self._epochs(step), "step": step, **summary})
            self.records.say(f"  {label}: top-1 {100 * summary['top1']:.2f} %, NLL {summary['nll']:.4f}")
            if self.runtime.is_main:
                folder = self.folder / "predictions"
                folder.mkdir(exist_ok=True)
                evaluation.save(folder / f"{label}.parquet")
        self._comment_on_results()
        if self.runtime.is_main:
            write_atomically(self.folder / "results.json", json.dumps(self.results, indent=1))
        for result in self.results[-len(networks) :]:  # not before: an interrupted pass is logged once, when it is repeated
            self.records.log("evaluation", **result)

    def finish(self) -> Path:
        """Write swa.safetensors, where anything was averaged, and the report; returns the latter's path."""
        name = "swa" if self.config.swa.include_pretrained else "swa_without_pretrained"
        if self.runtime.is_main:
            if self.config.swa.averages:
                copy_atomically(self._average_file(name), self.folder / "swa.safetensors")
            write_report(self.folder)
        self.runtime.barrier()
        self.runtime.accelerator.end_training()
        return self.folder / "report.md"

    # ------------------------------------------------------------------------------------------------- its parts

    def _networks_due(self) -> dict[str, nn.Module]:
        is_report = self.epoch in self.config.swa.epochs_to_report
        wanted: dict[str, nn.Module] = {}
        if self.epoch >= self.config.swa.start_epoch and not any(result["name"] == "pretrained" for result in self.results):
            wanted["pretrained"] = self.session.network_with(self.average.pretrained())
        if self._is_capture_due(is_report):
            wanted["capture"] = self.session.network_with(self.captured)
        done = {result["name"] for result in self.results if result["step"] == self.step}
        if is_report and not (done >= set(AVERAGES) and self._averages_on_disk()):
            wanted |= self._averaged_networks()
        return wanted

    def _is_capture_due(self, is_report: bool) -> bool:
        """Whether the last capture wants a result: the one of this epoch, or before a report any; the weights with which
        averaging began have theirs as the pretrained ones.
        """
        step = self.plan.schedule.last_capture(self.step)
        if step in (0, self.start_step) or self._has_result("capture", step):
            return False
        return is_report or (self.config.evaluation.captures and step > self.step - self.plan.steps_per_epoch)

    def _has_result(self, name: str, step: int) -> bool:
        return any((result["name"], result["step"]) == (name, step) for result in self.results)

    def _averaged_networks(self) -> dict[str, nn.Module]:
        """Both averages with fresh BatchNorm statistics, one pass over the training images for the two."""
        networks = {
            name: self.session.network_with(self.average.weights(include_pretrained=with_pretrained))
            for name, with_pretrained in AVERAGES.items()
        }
        self._recompute_batchnorm(list(networks.values()))
        for name, network in networks.items():
            self._save_weights(capture_weights(network), self._average_file(name), step=self.step)
        return networks

    def _average_file(self, name: str) -> Path:
        return self.folder / "averages" / f"{name.replace('_', '-')}-{self._name_of(self.step)}.safetensors"

    def _averages_on_disk(self) -> bool:
        return self.runtime.from_main(all(self._average_file(name).exists() for name in AVERAGES))

    def _recompute_batchnorm(self, networks: list[nn.Module]) -> None:
        if not batchnorm_layers(networks[0]) or self.config.model.freeze_batchnorm:
            why = "are frozen" if self.config.model.freeze_batchnorm else "do not exist in this network"
            self.records.say(f"  BatchNorm statistics {why}: nothing to recompute")
            return
        start = time.perf_counter()
        num_images = self.session.recompute_batchnorm(
            networks,
            epoch=self.epoch,
            step=self.step,
            num_images=self.config.batchnorm.num_images,
            progress=partial(self.records.progress, "BatchNorm statistics"),
        )
        self.records.say(f"  BatchNorm statistics from {num_images:,} images in {time.perf_counter() - start:.1f} s")

    def _save_weights(self, weights: Weights, path: Path, *, step: int) -> None:
        if self.runtime.is_main:
            num = self.average.num_averaged
            # One key: safetensors writes several in random order, and equal runs should leave equal files.
            about = {"network": self.config.model.name, "step": step, "epoch": self._epochs(step), "num_averaged": num}
            save_weights(weights, path, {"imagenet_swa": json.dumps(about)})

    def _epochs(self, step: int) -> int | float:
        """A step in epochs, whole where it ends one."""
        epochs, rest = divmod(step, self.plan.steps_per_epoch)
        return step / self.plan.steps_per_epoch if rest else epochs

    def _name_of(self, step: int) -> str:
        """How files of that step are called."""
        return f"step-{step:07d}" if step % self.plan.steps_per_epoch else f"epoch-{self._epochs(step):02d}"

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
        record, named = environment_record(self.runtime, self.config), zip(("train", "val"), self.session.indices, strict=True)
        record["data"] = {s: {"num_images": len(index), "fingerprint": index.fingerprint} for s, index in named}
        record["preprocessing"] = to_plain(self.session.preprocessing)
        write_atomically(self.folder / "environment.json", json.dumps(record, indent=1))
        write_atomically(self.folder / "config.yaml", yaml.safe_dump(to_plain(self.config), sort_keys=False))

    def _comment_on_results(self) -> None:
        now = {r["name"]: r["top1"] for r in self.results if r["step"] == self.step or r["name"] == "capture"}
        if "pretrained" in now:
            num_images = len(self.session.indices[1])
            self.records.say(compare_with_published(self.config, self.session.preprocessing, now["pretrained"], num_images))
        if "swa" in now and now["swa"] < now["capture"] - 0.1:
            self.records.say(
                f"warning: the average is {100 * (now['capture'] - now['swa']):.1f} points below its last capture. "
                "Averaged weights with unfit BatchNorm statistics look like this (is batchnorm.num_images too small?); "
                "so do captures too far apart to be averaged (is swa.lr_max too large?)"
            )
