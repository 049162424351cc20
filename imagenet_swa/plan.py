"""How the training images divide into epochs, steps, processes, batches and cycles."""

from dataclasses import dataclass
from functools import cached_property

from torch import nn

from imagenet_swa.config import Config, InputError, SwaConfig, require
from imagenet_swa.data.sampling import Indices, split_global_batch, training_batches
from imagenet_swa.models import batchnorm_layers
from imagenet_swa.schedule import Schedule, make_schedule


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

    def batches(self, epoch: int, rank: int, first_step: int = 0) -> Indices:
        """Image numbers of one process from a step of the epoch on, (steps, num_accumulation, batch_size_per_device)."""
        return training_batches(
            self.num_images,
            seed=self.seed,
            epoch=epoch,
            global_batch_size=self.global_batch_size,
            batch_size_per_device=self.batch_size_per_device,
            rank=rank,
            world_size=self.world_size,
            first_step=first_step,
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


def check_goes_on(plan: Plan, *, steps_per_epoch: int, step: int) -> None:
    """Raise InputError where a checkpoint after so many steps has epochs of another length, or lies beyond the end."""
    now, num_epochs = plan.steps_per_epoch, plan.swa.num_epochs
    require(
        steps_per_epoch == now,
        f"the checkpoint's epochs have {steps_per_epoch} steps, now they would have {now}; choose another output",
    )
    require(
        step <= num_epochs * now,
        f"the checkpoint was saved after epoch {step / now:.4g}, swa.num_epochs is {num_epochs}; choose another output",
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
