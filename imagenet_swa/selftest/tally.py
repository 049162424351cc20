"""What a campaign found: figures, a table, faults.json."""

import json
import os
import platform
import statistics
from collections import Counter
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from imagenet_swa.files import write_atomically

PHASES = ("starting", "training", "batchnorm", "evaluation", "waiting to write", "finishing")


@dataclass(frozen=True)
class Kill:
    """One blow and what came of it.

    Attributes:
        run, attempt: which run, and how often it had been started before.
        signal, ranks: what reached whom.
        phase, while_writing: what the first of them was doing, and whether files were being written in the background.
        codes: exit codes by rank, minus the signal where one ended it.
        seconds_to_end: from the signal to the end of the last process.
        needed: what the launcher's part had to do to end the others: None, `SIGTERM` or `SIGKILL`.
        said: the last line of each rank, None of one that said nothing.
        after_request: whether it followed a request to stop that they were about to fulfil.
        was_followed: whether it was such a request; then `codes` are those of the KILL that followed.
    """

    run: int
    attempt: int
    signal: str
    ranks: tuple[int, ...]
    phase: str
    while_writing: bool
    codes: tuple[int | None, ...]
    seconds_to_end: float
    needed: str | None
    said: tuple[str | None, ...]
    after_request: bool = False
    was_followed: bool = False

    def describe(self) -> str:
        """The blow in a few words."""
        ranks = " and ".join(map(str, self.ranks))
        return f"attempt {self.attempt}, {self.signal} to rank {ranks} in {self.phase}{', writing' * self.while_writing}"


Kind = Literal["torn", "different", "orphan", "other"]


@dataclass(frozen=True)
class Problem:
    """What must not be: a torn checkpoint, a run with other results, a process that outlived its run, or anything else."""

    kind: Kind
    line: str


@dataclass
class Tally:
    """The figures of a campaign while it goes on."""

    num_runs: int = 0
    num_resumes: int = 0
    num_examined: int = 0
    kills: list[Kill] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def add(self, kind: Kind, *lines: str) -> None:
        """Note what must not be."""
        self.problems += [Problem(kind, line) for line in lines]

    def count(self, kind: Kind) -> int:
        """How many problems of a kind there are."""
        return sum(problem.kind == kind for problem in self.problems)

    def summary(self) -> dict[str, Any]:
        """The figures as faults.json has them."""
        by_signal = Counter(kill.signal for kill in self.kills)
        phases = {phase: Counter(k.signal for k in self.kills if k.phase == phase) for phase in PHASES}
        graceful = [kill.seconds_to_end for kill in self.kills if kill.signal != "SIGKILL" and not kill.was_followed]
        killed = [kill.seconds_to_end for kill in self.kills if kill.signal == "SIGKILL"]
        return {
            "runs": self.num_runs,
            "kills": len(self.kills),
            "kills_by_signal": dict(sorted(by_signal.items())),
            "kills_by_phase": {phase: dict(sorted(counts.items())) for phase, counts in phases.items()},
            "kills_after_a_request": sum(kill.after_request for kill in self.kills),
            "kills_while_writing": sum(kill.while_writing for kill in self.kills),
            "resumes": self.num_resumes,
            "exit_codes_by_signal": {
                name: _codes(k for k in self.kills if k.signal == name and not k.was_followed) for name in sorted(by_signal)
            },
            "ended_only_by": dict(Counter(kill.needed for kill in self.kills if kill.needed)),
            "checkpoints_examined": self.num_examined,
            "checkpoints_torn": self.count("torn"),
            "results_that_differ": self.count("different"),
            "orphans": self.count("orphan"),
            "other_problems": self.count("other"),
            "seconds_to_end": {"after_kill": _spread(killed), "after_stop_signals": _spread(graceful)},
        }

    def write(self, path: Path, **about: Any) -> dict[str, Any]:
        """Write faults.json and return what it holds."""
        machine = {"node": platform.node(), "platform": platform.platform(), "cpus": _num_cpus()}
        versions = {name: version(name) for name in ("torch", "accelerate", "timm", "safetensors", "numpy")}
        record = {"when": datetime.now(UTC).isoformat(timespec="seconds"), **about, **self.summary()}
        record |= {
            "problems": [problem.line for problem in self.problems],
            "versions": {"python": platform.python_version(), **versions},
            "machine": machine,
        }
        write_atomically(path, json.dumps(record | {"each_kill": [asdict(kill) for kill in self.kills]}, indent=1))
        return record


def _codes(kills: Any) -> dict[str, int]:
    """How often processes ended with each code."""
    counts = Counter(str(code) for kill in kills for code in kill.codes)
    return dict(sorted(counts.items()))


def _spread(seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {}
    return {"median": round(statistics.median(seconds), 2), "longest": round(max(seconds), 2)}


def _num_cpus() -> int:
    return len(os.sched_getaffinity(0))


def table(record: dict[str, Any]) -> list[str]:
    """The figures as lines for people."""
    signals = list(record["kills_by_signal"])
    width = max(map(len, PHASES))
    lines = [f"{'kills':<{width}}" + "".join(f"{name:>9}" for name in [*signals, "all"])]
    for phase, counts in record["kills_by_phase"].items():
        numbers = [counts.get(name, 0) for name in signals]
        lines.append(f"{phase:<{width}}" + "".join(f"{number:>9}" for number in [*numbers, sum(numbers)]))
    numbers = list(record["kills_by_signal"].values())
    lines.append(f"{'all':<{width}}" + "".join(f"{number:>9}" for number in [*numbers, sum(numbers)]))
    lines.append(
        f"while files were being written: {record['kills_while_writing']}; "
        f"KILL after another signal, before they had stopped: {record['kills_after_a_request']}"
    )
    for name, counts in record["exit_codes_by_signal"].items():
        lines.append(f"exit codes after {name}: " + ", ".join(f"{number} x {code}" for code, number in counts.items()))
    for kind, spread in record["seconds_to_end"].items():
        if spread:
            lines.append(f"seconds to end {kind.replace('_', ' ')}: median {spread['median']:g}, longest {spread['longest']:g}")
    lines.append(
        f"runs {record['runs']}, kills {record['kills']}, resumes {record['resumes']}, "
        f"checkpoints examined {record['checkpoints_examined']}, torn {record['checkpoints_torn']}, "
        f"results that differ {record['results_that_differ']}, orphans {record['orphans']}, "
        f"other problems {record['other_problems']}"
    )
    return lines
