"""A run in its middle: its network, its averages, its files; what the story in finetune.py is told of."""

import json
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from imagenet_swa import status
from imagenet_swa.agreement import GOES_ON, Verdict, Wishes, why_stopped
from imagenet_swa.averaging import capture_weights
from imagenet_swa.checkpoint import Checkpoints, Snapshot, check_same_run, copy_atomically, load_snapshot, save_weights
from imagenet_swa.config import Config, InputError, LostOthersError, StopRequested, TrainingError
from imagenet_swa.engine import check_weights, train_one_epoch
from imagenet_swa.files import remove_left_overs
from imagenet_swa.lock import RunLock
from imagenet_swa.models import Weights, batchnorm_layers, read_weights
from imagenet_swa.outbox import Outbox
from imagenet_swa.plan import Plan, check_batches, check_goes_on, make_plan
from imagenet_swa.records import Records, claim_folder
from imagenet_swa.report import write_report
from imagenet_swa.results import Results, saved_results
from imagenet_swa.session import Session
from imagenet_swa.state import TrainingState

# The averages that a run reports, and whether the pretrained weights count in them.
AVERAGES = {"swa": True, "swa_without_pretrained": False}


class Run:
    """A fine-tuning run in the middle: its network, its averages, its files. A context, which ends what it began."""

    def __init__(self, session: Session, records: Records) -> None:
        self.session, self.config, self.runtime, self.records = session, session.config, session.runtime, records
        self.folder = self.config.output
        self.checkpoints = Checkpoints(self.folder / "checkpoints", self.config.checkpoint.keep)
        self.lock = RunLock(self.folder, on_lost=lambda message: self.outbox.give_up(TrainingError(message)), say=_print)
        self.outbox = Outbox(
            max_failures=self.config.checkpoint.max_failures,
            say=records.say,
            may_write=self.lock.is_held,
            in_background=self.config.checkpoint.in_background and self.runtime.is_main,
        )
        self.results = Results(self.folder, self.runtime, records, self.outbox)
        num_images = len(session.loaders.train.index)
        self.plan: Plan = make_plan(self.config, num_images=num_images, world_size=self.runtime.world_size)
        self.state = TrainingState(session, self.plan)
        self.captured: Weights = self.state.weights  # at the last minimum of the learning rate
        self._saved_at = time.monotonic()
        self._stop_agreed = False

    @property
    def step(self) -> int:
        """Finished optimizer steps."""
        return self.state.progress.step

    @property
    def epoch(self) -> int:
        """Finished epochs."""
        return self.step // self.plan.steps_per_epoch

    @property
    def start_step(self) -> int:
        """Steps after which averaging begins."""
        return self.config.swa.start_epoch * self.plan.steps_per_epoch

    # ------------------------------------------------------------------------------------------ start and resume

    @classmethod
    def start(cls, config: Config) -> "Run":
        """Everything in place for the first step, or for the one after the newest valid checkpoint."""
        session = Session.open(config)
        claim_folder(config, session.runtime)
        run = cls(session, Records(config.output, session.runtime))
        try:
            run._begin()
        except BaseException as error:
            run.close(error)
            raise
        return run

    def _begin(self) -> None:
        self.runtime.on_main(self._take_the_folder)
        self.runtime.accelerator.init_trackers("imagenet_swa", config={"seed": self.config.seed})
        if warning := check_batches(self.plan, self.config, self.state.network):
            self.records.say(f"warning: {warning}")
        snapshot = self._newest_snapshot()
        if snapshot is not None:
            self._check_same_run(snapshot.progress)
        self._introduce(snapshot)
        if snapshot is None:
            self.records.forget_after(-1)
        else:
            self._restore(snapshot)
            self.runtime.on_main(partial(self.checkpoints.set_aside_after, self.step))
        if self.step == self.start_step:
            self.begin_averaging()
        # A finished run keeps the record of the machine that made it.
        if self.epoch < self.config.swa.num_epochs and self.runtime.is_main:
            self.session.save_description()

    def _take_the_folder(self) -> None:
        self.lock.acquire()
        remove_left_overs(*(self.folder / name for name in ("", "checkpoints", "captures", "averages", "predictions")))

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
        return has_files or any(result["step"] > 0 for result in saved_results(self.folder))

    def _check_same_run(self, progress: dict[str, Any]) -> None:
        for change in check_same_run(progress, self.session.identity(), self.config.allow_changed):
            self.records.say(f"warning: {change}, as allowed; results are those of neither setting")
        check_goes_on(self.plan, steps_per_epoch=progress["steps_per_epoch"], step=progress["step"])

    def _restore(self, snapshot: Snapshot) -> None:
        self.state.restore(snapshot)
        self.results.restore(self.step)
        self.captured = self._captured_before()
        missing = set(self.config.swa.epochs_to_report) - self.results.epochs_of("swa")
        for epoch in sorted(missing):
            if epoch * self.plan.steps_per_epoch < self.step:
                self.records.say(f"warning: the average after epoch {epoch} was not reported and cannot be made up for")

    def _captured_before(self) -> Weights:
        """The weights of the last capture: those of the checkpoint, unless it was taken earlier and still wants a result."""
        step = self.plan.schedule.last_capture(self.step)
        if step in (0, self.start_step, self.step) or self.results.has("capture", step):
            return self.state.weights
        return read_weights(self.folder / "captures" / f"{self._name_of(step)}.safetensors")

    # ------------------------------------------------------------------------------------------------- the story

    def train_one_epoch(self) -> None:
        """SGD over what is left of an epoch, with a capture wherever the learning rate is at its minimum."""
        status.phase("training")
        train_one_epoch(
            self.state.prepared,
            self.state.optimizer,
            self.session.loaders.train,
            plan=self.plan,
            progress=self.state.progress,
            config=self.config,
            runtime=self.runtime,
            records=self.records,
            attendant=self,
        )
        is_capture = self.plan.schedule.is_capture(self.step)
        self.state.weights = self.captured if is_capture else self.state.mean_weights()

    def begin_averaging(self) -> None:
        """What the network has learnt so far is what Alg. 1 starts from."""
        self.state.average.start_from(self.state.weights)
        self._save_weights(self.state.weights, self.folder / "pretrained.safetensors", step=self.step)

    def wishes(self) -> Wishes:
        """See `Attendant`."""
        minutes = self.config.checkpoint.every_minutes
        is_due = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        return Wishes(
            stop=self.runtime.wants_to_stop(f"training, step {self.step + 1}"),
            save=is_due and self.runtime.is_main,
            give_up=self.outbox.failure is not None,
        )

    def heed(self, verdicts: Sequence[Verdict]) -> None:
        """See `Attendant`: save and stop within an epoch; at its end, `save_checkpoint` does."""
        if any(verdict.give_up for verdict in verdicts):
            raise self.outbox.failure or LostOthersError("the process that writes the run's files could not; it says why")
        self._stop_agreed |= any(verdict.stop for verdict in verdicts)
        if self.state.is_between_epochs:
            return
        if self._stop_agreed or any(verdict.save for verdict in verdicts):
            check_weights(self.state.network, self.step)
            self.save_checkpoint()

    def at_minimum(self, step: int) -> None:
        """Fold the weights at the end of a cycle into the average, once averaging has begun, and keep them as a file."""
        start, self.captured = time.perf_counter(), self.state.mean_weights()
        if step > self.start_step:
            self.state.average.update(self.captured)
        seconds = time.perf_counter() - start
        mib = sum(tensor.nbytes for tensor in self.captured.values()) / 2**20
        self.records.log("capture", step=step, num_averaged=self.state.average.num_averaged, seconds=seconds, mib=mib)
        if self.state.average.num_averaged == 1:  # the method's whole extra cost, sec. 3.3
            self.records.say(f"  averaging: {mib:.1f} MiB more memory, {1000 * seconds:.1f} ms per capture")
        self._save_weights(self.captured, self.folder / "captures" / f"{self._name_of(step)}.safetensors", step=step)

    def save_checkpoint(self) -> None:
        """All that a resumed run needs, written in the background. Stops the run if that was agreed on."""
        self._saved_at = time.monotonic()
        snapshot = self.state.snapshot({"decoder": self.session.loaders.train.decoder, "identity": self.session.identity()})
        if self.runtime.is_main:
            self.outbox.put("log", self.records.flush)
            self.outbox.put("checkpoint", partial(self.checkpoints.save, snapshot), retry=True)
        if self._stop_agreed:
            raise StopRequested(f"{why_stopped(self.runtime)} after step {self.step}; a checkpoint is saved, {GOES_ON}")

    def evaluate_what_is_due(self) -> None:
        """Evaluate, in one pass, the networks of this epoch that have no result yet; save results and predictions."""
        networks = self._networks_due()
        if not networks:
            return
        status.phase("evaluation")
        steps = {"pretrained": self.start_step, "capture": self.plan.schedule.last_capture(self.step)}
        evaluations = self.session.evaluate(networks, partial(self.records.progress, "evaluation"))
        found = {}
        for name, evaluation in evaluations.items():
            step = steps.get(name, self.step)
            label = name if name == "pretrained" else f"{name.replace('_', '-')}-{self._name_of(step)}"
            found[name] = evaluation, label, step, self._epochs(step)
        self.results.add(found)
        self.results.comment(self.config, self.session.preprocessing, self.step, len(self.session.indices[1]))

    def finish(self) -> Path:
        """Write swa.safetensors, where anything was averaged, and the report; returns the latter's path."""
        status.phase("finishing")
        self.runtime.stop.is_heeded = True  # what is left takes seconds, and is not worth a stop
        self.runtime.on_main(self._write_last_files)
        self.runtime.accelerator.end_training()
        return self.folder / "report.md"

    def _write_last_files(self) -> None:
        self.outbox.wait()
        name = "swa" if self.config.swa.include_pretrained else "swa_without_pretrained"
        if self.config.swa.averages:
            copy_atomically(self._average_file(name), self.folder / "swa.safetensors")
        write_report(self.folder)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """All ranks leave together when they stop as asked: one that is gone first has the launcher end the others."""
        try:
            if isinstance(error, StopRequested):
                status.phase("waiting to write")
                self.runtime.on_main(self.outbox.wait)
        finally:
            self.close(error)

    def close(self, error: BaseException | None = None) -> None:
        """Write what can still be written, for which an impatient user does not wait, and give the folder back."""
        self.outbox.close(seconds=1 if isinstance(error, KeyboardInterrupt) else None)
        self.lock.release()

    # ------------------------------------------------------------------------------------------------- its parts

    def _networks_due(self) -> dict[str, nn.Module]:
        is_report = self.state.is_between_epochs and self.epoch in self.config.swa.epochs_to_report
        wanted: dict[str, nn.Module] = {}
        if self.step >= self.start_step and not self.results.has("pretrained"):
            wanted["pretrained"] = self.session.network_with(self.state.average.pretrained())
        if self.state.is_between_epochs and self._is_capture_due(is_report):
            wanted["capture"] = self.session.network_with(self.captured)
        done = all(self.results.has(name, self.step) for name in AVERAGES)
        if is_report and not (done and self._averages_on_disk()):
            wanted |= self._averaged_networks()
        return wanted

    def _is_capture_due(self, is_report: bool) -> bool:
        """Whether the last capture wants a result: the one of this epoch, or before a report any; the weights with which
        averaging began have theirs as the pretrained ones.
        """
        step = self.plan.schedule.last_capture(self.step)
        if step in (0, self.start_step) or self.results.has("capture", step):
            return False
        return is_report or (self.config.evaluation.captures and step > self.step - self.plan.steps_per_epoch)

    def _averaged_networks(self) -> dict[str, nn.Module]:
        """Both averages with fresh BatchNorm statistics, one pass over the training images for the two."""
        networks = {
            name: self.session.network_with(self.state.average.weights(include_pretrained=with_pretrained))
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
        status.phase("batchnorm")
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
            num = self.state.average.num_averaged
            # One key: safetensors writes several in random order, and equal runs should leave equal files.
            about = {"network": self.config.model.name, "step": step, "epoch": self._epochs(step), "num_averaged": num}
            metadata = {"imagenet_swa": json.dumps(about)}
            self.outbox.put(str(path), partial(save_weights, weights, path, metadata))

    def _epochs(self, step: int) -> int | float:
        """A step in epochs, whole where it ends one."""
        epochs, rest = divmod(step, self.plan.steps_per_epoch)
        return step / self.plan.steps_per_epoch if rest else epochs

    def _name_of(self, step: int) -> str:
        """How files of that step are called."""
        return f"step-{step:07d}" if step % self.plan.steps_per_epoch else f"epoch-{self._epochs(step):02d}"

    def _introduce(self, snapshot: Snapshot | None) -> None:
        for line in self.session.describe():
            self.records.say(line)
        self.records.say(f"batches: {self.plan.describe()}; device {self.runtime.device}, {self.config.speed.precision}")
        if snapshot is not None:
            step = snapshot.progress["step"]
            changes = "".join(f"; {change}" for change in self.session.changes_since(snapshot.progress))
            self.records.say(f"resuming after epoch {self._epochs(step):.4g}, step {step}{changes}")


def _print(text: str) -> None:
    """On the screen only: until the lock is taken, train.log is another job's."""
    print(f"imagenet-swa: {text}", file=sys.stderr, flush=True)
