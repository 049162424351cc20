"""Settings of checkpoints and of the processes that share a run."""

from dataclasses import dataclass

from imagenet_swa.config.errors import require


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What a run writes to go on from"""

    every_minutes: float | None = 10.0
    """Minutes from one checkpoint to the next, 0 after each step, null only at the ends of epochs, where there always is one."""
    keep: int = 2
    """Number of newest checkpoints that stay on disk."""
    in_background: bool = True
    """Write captures and checkpoints while training goes on."""
    max_failures: int = 3
    """How often in a row the disk may refuse what is to be written: what could not be written is kept in memory and tried
    again with the next, and the run stops when it is refused this often."""

    def __post_init__(self) -> None:
        minutes = self.every_minutes
        require(minutes is None or 0 <= minutes < float("inf"), f"checkpoint.every_minutes must be 0 or more, got {minutes}")
        require(self.keep >= 1, f"checkpoint.keep must be at least 1, got {self.keep}")
        require(self.max_failures >= 1, f"checkpoint.max_failures must be at least 1, got {self.max_failures}")


@dataclass(frozen=True, kw_only=True)
class ProcessesConfig:
    """When a run gives up waiting for one of its processes"""

    silence_seconds: float = 60.0
    """A process that gives no sign of life for so long (killed, its machine lost, a cable cut) ends the others."""
    collective_minutes: float = 30.0
    """A process that lives and does not come to where the others wait for it ends them after so long."""

    def __post_init__(self) -> None:
        require(self.silence_seconds >= 1, f"processes.silence_seconds must be at least 1, got {self.silence_seconds}")
        require(self.collective_minutes > 0, f"processes.collective_minutes must be above 0, got {self.collective_minutes}")
