"""What a run folder holds, read for reports."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from imagenet_swa.config import Config, InputError, SwaConfig
from imagenet_swa.schedule import Schedule, make_schedule

# The networks of a run, in the order of the table. "swa" is Alg. 1: the pretrained weights count as its first model.
TITLES = {
    "pretrained": "pretrained",
    "capture": "capture",
    "swa": "SWA (Alg. 1)",
    "swa_without_pretrained": "SWA, captures only",
}


@dataclass(frozen=True)
class RunFiles:
    """What a run folder holds for the report."""

    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    results: list[dict[str, Any]]
    metrics: list[dict[str, Any]]

    def result(self, name: str, epoch: float | None = None) -> dict[str, Any] | None:
        """The evaluation of a network, the latest where no epoch is given; None if there was none."""
        found = [r for r in self.results if r["name"] == name and epoch in (None, r["epoch"])]
        return max(found, key=lambda r: r["epoch"], default=None)

    @property
    def swa(self) -> SwaConfig:
        """The run's settings of the learning rate and the average."""
        known = {f.name for f in dataclasses.fields(SwaConfig)}
        return SwaConfig(**{name: value for name, value in self.config["swa"].items() if name in known})

    @property
    def network(self) -> str:
        """The name that the network was asked for by."""
        return self.config["model"]["name"]

    @property
    def seed(self) -> int:
        """Of data order and augmentation."""
        return self.config["seed"]

    @property
    def is_sgd_only(self) -> bool:
        """Whether the run averaged nothing: the baseline of Table 1."""
        return not self.swa.averages

    @property
    def steps_per_epoch(self) -> int | None:
        """Updates in an epoch; None before the first is over."""
        finished = [line for line in (*self.results, *self.metrics) if line.get("epoch") and line.get("step")]
        return round(finished[-1]["step"] / finished[-1]["epoch"]) if finished else None

    @property
    def schedule(self) -> Schedule | None:
        """The learning rate by step; None before the length of an epoch is known."""
        return make_schedule(self.swa, steps_per_epoch=self.steps_per_epoch) if self.steps_per_epoch else None

    def title(self, name: str) -> str:
        """How the table calls a network of this run: weights that the run itself trained from scratch are no pretrained ones."""
        return "SGD" if name == "pretrained" and self.swa.start_epoch > 0 else TITLES[name]

    def final_results(self) -> dict[str, dict[str, Any]]:
        """The evaluations that end the run: all names of `TITLES`, or the SGD solution alone.

        Raises:
            InputError: one is missing, the run is not finished.
        """
        last = self.swa.num_epochs
        if self.is_sgd_only:
            found = {"pretrained": self.result("pretrained", last)}
        else:
            found = {name: self.result(name, last) for name in ("swa", "swa_without_pretrained")}
            found = {"pretrained": self.result("pretrained", self.swa.start_epoch), "capture": self._last_capture(), **found}
        if any(result is None for result in found.values()):
            wanted = ", ".join(self.title(name) for name in found)
            raise InputError(f"{self.folder} is not finished; wanted a result after epoch {last} for each of {wanted}")
        return {name: result for name, result in found.items() if result is not None}

    def _last_capture(self) -> dict[str, Any] | None:
        """The evaluation of the capture that went last into the final average."""
        end, schedule = self.result("swa", self.swa.num_epochs), self.schedule
        if end is None or schedule is None:
            return None
        step = schedule.last_capture(end["step"])
        return next((r for r in self.results if r["name"] == "capture" and r["step"] == step), None)


def load_run(folder: Path) -> RunFiles:
    """Read a run folder.

    Raises:
        InputError: it holds no run, or nothing was evaluated yet.
    """
    config = _read(folder / "config.yaml", yaml.safe_load, dict, ("model", "swa", "seed"))
    try:
        _from_plain(Config, config)
    except (TypeError, AttributeError) as error:
        raise InputError(f"{folder / 'config.yaml'} is not what a run writes: {error}") from None
    environment = _read(folder / "environment.json", json.loads, dict, ("data",))
    results = _read(folder / "results.json", json.loads, list)
    metrics_file = folder / "metrics.jsonl"
    lines = metrics_file.read_text().splitlines() if metrics_file.exists() else []
    metrics = [line for line in map(_parse_line, lines) if line is not None]
    return RunFiles(folder, config, environment, results, metrics)


def _read(path: Path, parse: Callable[[str], Any], kind: type, keys: tuple[str, ...] = ()) -> Any:
    try:
        content = parse(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{path.parent} holds no evaluated run: {path} is missing") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    if not content:
        raise InputError(f"{path.parent} holds no evaluated run: {path} is empty")
    if not isinstance(content, kind) or any(key not in content for key in keys):
        raise InputError(f"{path.parent} holds no evaluated run: {path} is not what a run writes")
    return content


def _parse_line(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except json.JSONDecodeError:  # the last line of a run that is being written or was killed
        return None


def settings_of(run: RunFiles) -> dict[str, Any]:
    """The settings that decide a run's results, flat, those that it was made without at their defaults."""
    return _from_plain(Config, run.config).result_settings()


def _from_plain(cls: type, values: dict[str, Any]) -> Any:
    """A dataclass from nested dicts; keys that this version does not know are left out."""
    known = {f.name: f for f in dataclasses.fields(cls) if f.name in values}
    return cls(**{
        name: _from_plain(f.type, values[name]) if isinstance(f.type, type) and dataclasses.is_dataclass(f.type) else values[name]
        for name, f in known.items()
    })  # fmt: skip
