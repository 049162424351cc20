"""What a run folder holds, read for reports."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from imagenet_swa.config import Config, InputError, SwaConfig
from imagenet_swa.plain import is_count, is_number, parse_json, parse_yaml, printable, read_text
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
    config = read_config(folder)
    environment = _read(folder / "environment.json", parse_json, dict, ("data",))
    _check(folder / "environment.json", _is_environment(environment))
    results = _read(folder / "results.json", parse_json, list)
    _check(folder / "results.json", all(map(is_result, results)))
    metrics_file = folder / "metrics.jsonl"
    lines = _read(metrics_file, str.splitlines, list) if metrics_file.exists() and metrics_file.stat().st_size else []
    metrics = [line for line in map(_parse_line, lines) if line is not None]
    return RunFiles(folder, config, environment, results, metrics)


def read_config(folder: Path) -> dict[str, Any]:
    """The settings in a run folder as plain values, those that this version knows checked.

    Raises:
        InputError: it holds no run.
    """
    path = folder / "config.yaml"
    config = _read(path, parse_yaml, dict, ("model", "swa", "seed"))
    try:
        swa = _from_plain(Config, config).swa
        make_schedule(swa, steps_per_epoch=swa.cycle_steps or 1).learning_rate(0)
    except (TypeError, AttributeError, ValueError, KeyError, OverflowError, ZeroDivisionError) as error:
        raise InputError(f"{path} is not what a run writes: {printable(str(error))[:300]}") from None
    used = {"model": ("name", "num_classes"), "swa": ("num_epochs", "schedule", "lr_max", "lr_min", "cycle_epochs")}
    _check(path, all(name in config[section] for section, names in used.items() for name in names))
    return config


def is_result(entry: Any) -> bool:
    """Whether an entry of results.json is one that a run writes; the NLL of a diverged network may be no number."""
    return (
        isinstance(entry, dict)
        and entry.get("name") in TITLES
        and is_number(entry.get("epoch"), 0, 1e9)
        and is_count(entry.get("step"))
        and is_count(entry.get("num_images"))
        and entry["num_images"] > 0
        and is_number(entry.get("top1"), 0, 1)
        and is_number(entry.get("top5"), 0, 1)
        and isinstance(entry.get("nll"), int | float)
        and is_count(entry.get("num_left_out", 0))
    )


def _is_environment(record: dict[str, Any]) -> bool:
    data, versions, gpus = record["data"], record.get("versions", {}), record.get("gpus", [])
    return (
        isinstance(data, dict)
        and all(isinstance(data.get(split), dict) for split in ("train", "val"))
        and all(isinstance(part.get("fingerprint"), str) and is_count(part.get("num_images")) for part in data.values())
        and isinstance(versions, dict)
        and isinstance(gpus, list)
        and all(isinstance(text, str) for text in (*gpus, record.get("cpu", "")))
        and isinstance(record.get("preprocessing", {}), dict)
    )


def _check(path: Path, is_right: bool) -> None:
    if not is_right:
        raise InputError(f"{path.parent} holds no evaluated run: {path} is not what a run writes")


def _read(path: Path, parse: Callable[[str], Any], kind: type, keys: tuple[str, ...] = ()) -> Any:
    try:
        content = parse(read_text(path))
    except FileNotFoundError:
        raise InputError(f"{path.parent} holds no evaluated run: {path} is missing") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {printable(' '.join(str(error).split()))[:500]}") from None
    if not content:
        raise InputError(f"{path.parent} holds no evaluated run: {path} is empty")
    _check(path, isinstance(content, kind) and all(key in content for key in keys))
    return content


def _parse_line(line: str) -> dict[str, Any] | None:
    try:
        entry = parse_json(line)
    except ValueError:  # the last line of a run that is being written or was killed
        return None
    is_line = isinstance(entry, dict) and isinstance(entry.get("kind"), str) and is_count(entry.get("step"))
    return entry if is_line and is_number(entry.get("epoch", 0), 0, 1e9) else None


def settings_of(run: RunFiles) -> dict[str, Any]:
    """The settings that decide a run's results, flat, those that it was made without at their defaults."""
    return _from_plain(Config, run.config).result_settings()


def _from_plain(cls: type, values: dict[str, Any]) -> Any:
    """A dataclass from nested dicts; keys that this version does not know are left out."""
    known = {f.name: f for f in dataclasses.fields(cls) if f.name in values}
    for name, f in known.items():
        if not dataclasses.is_dataclass(f.type) and not _fits(values[name], f.type):
            raise TypeError(f"{name} is {str(values[name])[:60]!r}")
    return cls(**{
        name: _from_plain(f.type, values[name]) if isinstance(f.type, type) and dataclasses.is_dataclass(f.type) else values[name]
        for name, f in known.items()
    })  # fmt: skip


def _fits(value: Any, kind: Any) -> bool:
    """Whether a plain value can be one of a field of this type, as `to_plain` writes them."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if origin is Literal:
        return isinstance(value, str) and value in inner
    if origin is tuple:
        kinds = [inner[0]] * len(value) if isinstance(value, list) and inner[-1] is ... else inner
        return isinstance(value, list) and len(value) == len(kinds) and all(map(_fits, value, kinds))
    if kind is float:
        return is_number(value) and math.isfinite(value)
    if kind is int:
        return type(value) is int
    return isinstance(value, {Path: str, None: NoneType}.get(kind, origin or kind))
