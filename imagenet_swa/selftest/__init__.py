"""`imagenet-swa selftest faults`: kill runs at random moments and compare what comes of them with a run that nobody disturbed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from imagenet_swa.config import require


@dataclass(frozen=True, kw_only=True)
class FaultSettings:
    """A campaign of kills"""

    kills: int = 200
    """Signals to send, at random moments, over as many runs as that takes."""
    processes: int = 2
    """Processes of a run."""
    seed: int = 0
    """Decides moments, signals and processes that they reach, as far as the machine's speed repeats."""
    output: Path = Path("runs/faults")
    """New or empty folder for faults.json and for what is to be looked at: logs, and runs that ended otherwise."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the runs."""
    backend: Literal["dali", "torchvision"] = "dali"
    """Who decodes the runs' images: DALI's threads or torchvision in processes of its own."""

    def __post_init__(self) -> None:
        require(self.kills >= 1, f"kills must be at least 1, got {self.kills}")
        require(self.processes in (1, 2, 3, 4, 6, 12), f"processes must divide a global batch of 12, got {self.processes}")
