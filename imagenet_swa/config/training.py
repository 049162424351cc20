"""Settings of training, averaging and evaluation."""

from dataclasses import dataclass
from typing import Literal

from imagenet_swa.config.errors import require

ScheduleName = Literal["cyclical", "constant", "triangular", "cosine", "three_part"]


@dataclass(frozen=True, kw_only=True)
class SwaConfig:
    """The fine-tuning itself: learning-rate cycles and the average (Alg. 1 of the paper)"""

    num_epochs: int = 10
    """Passes over the training data."""
    start_epoch: int = 0
    """Epochs before averaging begins, for training from scratch (sec. 4.4); the weights after them take the place of the
    pretrained ones in Alg. 1. As many as num_epochs: plain SGD, nothing is averaged."""
    schedule: ScheduleName = "cyclical"
    """cyclical: from just under lr_max linearly to lr_min within each cycle; constant: lr_max throughout; triangular: down to
    lr_min in the middle of a cycle and back up (Fast Geometric Ensembling's); cosine: each cycle repeats a piece of a cosine
    annealing from lr_max to 0 over budget_epochs, by default its end (Shake-Shake's); three_part: lr_max for half of
    budget_epochs, linearly to lr_min at 0.9 of them, then lr_min (the SGD baseline's)."""
    lr_max: float = 1e-3
    """Learning rate that a cycle starts from (paper: alpha_1)."""
    lr_min: float = 1e-5
    """Learning rate that a cycle ends at, where the weights are captured (paper: alpha_2); cosine and constant do without."""
    cycle_epochs: int = 1
    """Length of a cycle in epochs (paper: c): from one capture to the next, with every schedule."""
    cycle_steps: int | None = None
    """Length of a cycle in steps, instead of cycle_epochs."""
    budget_epochs: int | None = None
    """cosine, three_part: epochs in which the rate falls; default: num_epochs."""
    cosine_start_epoch: int | None = None
    """cosine: the epoch of the annealing at which a cycle starts; default: budget_epochs less the cycle."""
    include_pretrained: bool = True
    """Whether swa.safetensors counts the pretrained weights as the first model (Alg. 1) or holds the captures only.
    The report shows both."""
    report_epochs: tuple[int, ...] = (5, 10)
    """After these epochs the average is given BatchNorm statistics and evaluated; the last epoch always is."""

    def __post_init__(self) -> None:
        require(self.num_epochs >= 1, f"swa.num_epochs must be at least 1, got {self.num_epochs}")
        require(
            0 <= self.start_epoch <= self.num_epochs,
            f"swa.start_epoch must be in 0 .. swa.num_epochs {self.num_epochs}, got {self.start_epoch}",
        )
        require(
            0 <= self.lr_min <= self.lr_max < float("inf"),
            f"wanted 0 <= swa.lr_min <= swa.lr_max, got lr_min {self.lr_min:g}, lr_max {self.lr_max:g}",
        )
        budget = self.budget_epochs
        require(budget is None or budget >= 1, f"swa.budget_epochs must be at least 1, got {budget}")
        require(
            budget is None or self.schedule in ("cosine", "three_part"),
            f"swa.budget_epochs means nothing to the schedule {self.schedule}; leave it out",
        )
        start = self.cosine_start_epoch
        require(start is None or self.schedule == "cosine", "swa.cosine_start_epoch is set, but swa.schedule is not cosine")
        require(start is None or start >= 0, f"swa.cosine_start_epoch must be 0 or more, got {start}")
        self._check_cycle()

    def _check_cycle(self) -> None:
        require(self.cycle_epochs >= 1, f"swa.cycle_epochs must be at least 1, got {self.cycle_epochs}")
        steps = self.cycle_steps
        require(steps is None or steps >= 1, f"swa.cycle_steps must be at least 1, got {steps}")
        require(steps is None or self.cycle_epochs == 1, "swa.cycle_steps and swa.cycle_epochs are both set; set one")
        length = steps or self.cycle_epochs
        unit = "epochs" if steps is None else "steps"
        require(
            self.schedule != "triangular" or length % 2 == 0,
            f"a triangular cycle has its minimum in the middle: swa.cycle_{unit} must be even, got {length}",
        )
        for epoch in self.report_epochs:
            require(epoch >= 1, f"swa.report_epochs must be positive, got {epoch}")
        if steps is not None:  # how many make an epoch is known when the images are
            return
        for name, epochs in (("num_epochs", self.num_epochs), ("start_epoch", self.start_epoch)):
            require(
                epochs % self.cycle_epochs == 0,
                f"swa.{name} {epochs} is not a whole number of cycles of {self.cycle_epochs} epochs",
            )
        for epoch in self.report_epochs:
            require(
                epoch % self.cycle_epochs == 0,
                f"swa.report_epochs: no cycle ends with epoch {epoch}; "
                f"wanted positive multiples of swa.cycle_epochs {self.cycle_epochs}",
            )

    @property
    def averages(self) -> bool:
        """Whether any weights are averaged."""
        return self.start_epoch < self.num_epochs

    @property
    def epochs_to_report(self) -> tuple[int, ...]:
        """Numbers of finished epochs after which the average is evaluated, ascending, the last epoch included."""
        if not self.averages:
            return ()
        wanted = {epoch for epoch in self.report_epochs if self.start_epoch < epoch < self.num_epochs}
        return tuple(sorted(wanted | {self.num_epochs}))


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """SGD"""

    momentum: float = 0.9
    """Momentum; its buffer starts at zero."""
    nesterov: bool = False
    """Nesterov's form of the momentum."""
    weight_decay: float = 1e-4
    """L2 penalty on all parameters."""
    decay_norm_and_bias: bool = True
    """Whether the penalty covers biases and normalisation parameters, as in the paper's code."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes."""

    def __post_init__(self) -> None:
        require(0 <= self.momentum < 1, f"optimizer.momentum must be in [0, 1), got {self.momentum}")
        require(self.weight_decay >= 0, f"optimizer.weight_decay must not be negative, got {self.weight_decay}")
        require(0 <= self.label_smoothing < 1, f"optimizer.label_smoothing must be in [0, 1), got {self.label_smoothing}")
        require(self.momentum > 0 or not self.nesterov, "optimizer.nesterov needs a momentum above 0")


@dataclass(frozen=True, kw_only=True)
class BatchNormConfig:
    """Recomputation of the BatchNorm statistics of averaged weights"""

    num_images: int | None = None
    """Number of training images it looks at; default: all of them."""

    def __post_init__(self) -> None:
        require(
            self.num_images is None or self.num_images >= 2, f"batchnorm.num_images must be at least 2, got {self.num_images}"
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluation on the validation images"""

    batch_size: int = 128
    """Images per process at a time, in evaluation and in the BatchNorm pass."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the evaluation and of the BatchNorm pass."""
    captures: bool = True
    """Evaluate captured weights too: at the end of an epoch the last capture that it had, one more pass over the validation
    images."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"evaluation.batch_size must be at least 1, got {self.batch_size}")


@dataclass(frozen=True, kw_only=True)
class SpeedConfig:
    """Switches that change speed and memory, and the results only by rounding"""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of the training steps; weights, momentum and averages stay fp32."""
    tf32: bool = True
    """On GPUs from Ampere on: convolutions and matrix products of fp32 numbers in TF32."""
    channels_last: bool = True
    """Memory order of images and convolution weights; the faster one on GPUs with tensor cores."""
    compile: bool = False
    """Compile the network with torch.compile."""
    fused_optimizer: bool = True
    """Update all parameters in one kernel."""
    max_batch_size_per_device: int = 64
    """Largest batch that a device takes at a time; a larger share of the global batch is accumulated in equal parts."""

    def __post_init__(self) -> None:
        require(
            self.max_batch_size_per_device >= 1,
            f"speed.max_batch_size_per_device must be at least 1, got {self.max_batch_size_per_device}",
        )
