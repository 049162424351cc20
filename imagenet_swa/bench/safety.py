"""What safety costs on this machine: checkpoints, and in each step the agreement of the ranks and the look at the gradients."""

import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from imagenet_swa.bench.agreeing import Turn, measure_turn
from imagenet_swa.bench.measure import empty_folder
from imagenet_swa.bench.safety_results import summarise_safety, write_safety_results
from imagenet_swa.bench.saving import Saving, SavingRound
from imagenet_swa.bench.trainee import Trainee
from imagenet_swa.config import Config, require, to_plain
from imagenet_swa.runtime import environment_record

_BATCH_SIZE_ON_CPU = 8


@dataclass(frozen=True, kw_only=True)
class SafetySettings:
    """Measurement of checkpoints and guards"""

    output: Path = Path("runs/bench")
    """Folder that safety.json and safety.md go to, on the disk that checkpoints are to be measured on."""
    rounds: int = 5
    """Checkpoints of each kind that are counted; 0 leaves them out."""
    turns: int = 20
    """Steps of each kind that are counted; on a GPU tens of steps."""
    batch_size: int | None = None
    """Images per step and process; default: speed.max_batch_size_per_device, without a GPU 8."""

    def __post_init__(self) -> None:
        for name, least in (("rounds", 0), ("turns", 1), ("batch_size", 1)):
            value = getattr(self, name)
            require(value is None or value >= least, f"bench.{name} must be at least {least}, got {value}")
        require(self.batch_size != 1, "bench.batch_size must be at least 2, which BatchNorm needs, got 1")


def bench_safety(config: Config, settings: SafetySettings) -> dict[str, Any]:
    """Measure on all ranks, write safety.json and safety.md on rank 0; return the record.

    The network is the configured one with random weights, the images are made up, so nothing is read or downloaded.

    Raises:
        InputError: unusable settings.
        OSError: the disk refuses a checkpoint.
    """
    on_gpu = torch.cuda.is_available()
    batch_size = settings.batch_size or (config.speed.max_batch_size_per_device if on_gpu else _BATCH_SIZE_ON_CPU)
    trainee = Trainee(config, batch_size)
    runtime, folder = trainee.runtime, settings.output / "checkpoints-of-bench"
    runtime.on_main(lambda: empty_folder(folder))
    try:
        measured = _measure(trainee, settings, folder, keep=config.checkpoint.keep)
    finally:
        if runtime.is_main:
            shutil.rmtree(folder, ignore_errors=True)
    sizes, rounds, turns = runtime.from_main(measured)
    record = {
        "summary": summarise_safety(rounds, turns, num_bytes=sum(sizes.values())),
        "rounds": [asdict(each) for each in rounds],
        "turns": [asdict(turn) for turn in turns],
        "num_bytes": sizes,
        "network": config.model.name,
        "batch_size": batch_size,
        "image_size": trainee.image_size,
        "steps_at_a_time": trainee.steps_at_a_time,
        "num_threads": torch.get_num_threads(),
        "settings": to_plain(settings),
        "speed": to_plain(config.speed),
        "environment": environment_record(runtime, config),
    }
    runtime.on_main(lambda: write_safety_results(record, settings.output))
    return record


def _measure(
    trainee: Trainee, settings: SafetySettings, folder: Path, *, keep: int
) -> tuple[dict[str, int], list[SavingRound], list[Turn]]:
    """Round and turn 0 are rehearsals, which nobody counts."""
    runtime = trainee.runtime

    def say(text: str) -> None:
        if runtime.is_main:
            print(text, file=sys.stderr, flush=True)

    turns = []
    for number in range(settings.turns + 1):
        turn = measure_turn(trainee, number)
        say(f"turn {number} of {settings.turns}: a step {turn.plain:.3f} s, with guards {turn.guarded:.3f} s")
        turns.append(turn)
    saving, rounds = Saving(trainee, folder, keep=keep, say=say), []
    try:
        sizes = saving.sizes()
        for number in range(settings.rounds + 1 if settings.rounds else 0):
            rounds.append(saving.round(number))
            say(
                f"round {number} of {settings.rounds}: a checkpoint written in {rounds[-1].writing:.2f} s, during "
                f"{rounds[-1].num_steps} steps"
            )
    finally:
        saving.close()
    return sizes, rounds[1:], turns[1:]
