"""What a finished run left on disk: its captured weights in order, its averages, its settings; weights by a short name."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open
from torch import nn

from imagenet_swa.averaging import WeightAverage
from imagenet_swa.config import InputError, require
from imagenet_swa.models import Weights, load_weights, read_weights

_NAMES = "swa, pretrained, last, without-pretrained, epoch-NN, step-NNNNNNN, NAME=FILE.safetensors or NAME=RUN"


@dataclass(frozen=True)
class Capture:
    """Weights at the end of a learning-rate cycle.

    Attributes:
        num_averaged: it is this one in the average, from 1; 0: captured before averaging began.
        epoch: finished epochs, a fraction where a cycle ended within one.
        step: finished optimizer steps.
    """

    path: Path
    num_averaged: int
    epoch: float
    step: int

    @property
    def name(self) -> str:
        """`epoch-07` or `step-0000123`, as its file is called."""
        return self.path.stem

    def load(self) -> Weights:
        """Its parameters and buffers."""
        return read_weights(self.path)


@dataclass(frozen=True)
class RunWeights:
    """The weights of a finished run.

    Attributes:
        folder: of the run.
        config: its settings as plain values, by section.
        results: its results.json.
        found: the captures that are on disk, by step.
        num_averaged: captures in its average; 0: plain SGD.
        fingerprints: of the images that it has seen, by `train` and `val`; empty where the run does not say.
    """

    folder: Path
    config: dict[str, Any]
    results: list[dict[str, Any]]
    found: tuple[Capture, ...]
    num_averaged: int
    fingerprints: dict[str, str]

    @classmethod
    def load(cls, folder: Path) -> "RunWeights":
        """Read what a run folder says about its weights; the weights themselves are read when they are asked for.

        Raises:
            InputError: no run, or one that is not finished.
        """
        config = _read(folder / "config.yaml", yaml.safe_load, f"{folder} holds no run")
        swa = config.get("swa") or {} if isinstance(config, dict) else {}
        require("num_epochs" in swa, f"{folder}/config.yaml is not the configuration of a run")
        unfinished = f"{folder} holds a run that is not finished; go on with it (imagenet-swa train) first"
        results = _read(folder / "results.json", json.loads, unfinished)
        averages = swa.get("start_epoch", 0) < swa["num_epochs"]
        last = [r for r in results if r["name"] == ("swa" if averages else "pretrained") and r["epoch"] == swa["num_epochs"]]
        solution = folder / ("swa.safetensors" if averages else "pretrained.safetensors")
        require(bool(last), f"{unfinished}: nothing was evaluated after epoch {swa['num_epochs']}, its last")
        require(solution.is_file(), f"{unfinished}: {solution.name} is missing")
        found = sorted((_capture_at(path) for path in folder.glob("captures/*.safetensors")), key=lambda c: c.step)
        num_averaged = _capture_at(solution).num_averaged if averages else 0
        return cls(folder, config, results, tuple(found), num_averaged, _fingerprints(folder))

    @property
    def captures(self) -> tuple[Capture, ...]:
        """Those in the average, in the order in which they were averaged.

        Raises:
            InputError: some are missing.
        """
        averaged = [capture for capture in self.found if capture.num_averaged]
        numbers, wanted = [capture.num_averaged for capture in averaged], list(range(1, self.num_averaged + 1))
        missing = sorted(set(wanted) - set(numbers))
        require(
            not missing,
            f"{self.folder}/captures is not complete: of the {self.num_averaged} captures in the average {len(missing)} are "
            f"missing (number {_listed(missing)})",
        )
        require(
            numbers == wanted,
            f"{self.folder}/captures holds more than this run's {self.num_averaged}: numbers {_listed(numbers)}",
        )
        return tuple(averaged)

    @property
    def captures_before(self) -> tuple[Capture, ...]:
        """Those from before averaging began; all of a run that averages nothing."""
        return tuple(capture for capture in self.found if not capture.num_averaged)

    @property
    def averages(self) -> bool:
        """Whether it averaged anything; else it is plain SGD."""
        return self.num_averaged > 0

    @property
    def swa_path(self) -> Path:
        """The final average."""
        return self.folder / "swa.safetensors"

    @property
    def pretrained_path(self) -> Path:
        """What averaging began with, or the end of a run that is plain SGD."""
        return self.folder / "pretrained.safetensors"

    @property
    def solution_path(self) -> Path:
        """What the run was made for: the average, or the last weights of plain SGD."""
        return self.swa_path if self.averages else self.pretrained_path

    @property
    def last_result(self) -> dict[str, Any]:
        """The result of the solution."""
        name = "swa" if self.averages else "pretrained"
        return max((result for result in self.results if result["name"] == name), key=lambda result: result["step"])

    def captured(self, name: str) -> Capture:
        """A capture by its name, averaged or not.

        Raises:
            InputError: there is none of that name.
        """
        captures = {capture.name: capture for capture in self.found}
        if name not in captures:
            raise InputError(f"{self.folder} has no capture {name}; it has {_listed(list(captures))}")
        return captures[name]


def weights_of(run: RunWeights, spec: str, network: nn.Module) -> tuple[str, Weights]:
    """A name and the weights it stands for: `swa`, `pretrained`, `last` (capture), `epoch-07` or `step-0000123` (a capture),
    `without-pretrained` (the average of the captures alone), `NAME=FILE` (a weights file), `NAME=RUN` (the solution of another
    run), `NAME=SPEC` (any of these under another name).

    Args:
        network: the architecture that the weights have to fit; stays as it is.

    Raises:
        InputError: no such weights, or weights of another network.
    """
    name, path = _resolve(run, spec)
    weights = _average_of_captures(run, network) if path is None else read_weights(path)
    check_fits(network, weights, f"{spec} ({path or 'the average of its captures'})")
    return name, weights


def check_spec(run: RunWeights, spec: str) -> str:
    """The name that a specification goes by, without reading any weights.

    Raises:
        InputError: it names nothing that there is.
    """
    return _resolve(run, spec)[0]


def check_fits(network: nn.Module, weights: Weights, source: str) -> None:
    """Raise InputError, naming the source, unless the weights have the names and shapes of the network's."""
    load_weights(copy.deepcopy(network), weights, source)


def _resolve(run: RunWeights, spec: str) -> tuple[str, Path | None]:
    """Name and file; no file for the average of the captures."""
    name, has_name, rest = spec.partition("=")
    if not has_name:
        return spec, _own_file(run, spec)
    require(bool(name) and bool(rest), f"{spec!r} names no weights; wanted one of {_NAMES}")
    path = Path(rest)
    if path.is_dir():
        other = RunWeights.load(path)
        _check_same_images(run, other)
        return name, other.solution_path
    if path.is_file() or path.suffix or len(path.parts) > 1:
        require(path.is_file(), f"{spec}: no such weights file or run: {path}")
        return name, path
    return name, _own_file(run, rest)


def _check_same_images(run: RunWeights, other: RunWeights) -> None:
    """Weights made for other images have no place beside the run's: neither their train loss nor their test error compares."""
    for split, words in (("train", "training"), ("val", "validation")):
        first, second = (r.fingerprints.get(split) for r in (run, other))
        require(
            None in (first, second) or first == second,
            f"{run.folder} and {other.folder} have different {words} images (fingerprints {str(first)[:12]} and "
            f"{str(second)[:12]}); choose runs of one data set",
        )


def _fingerprints(folder: Path) -> dict[str, str]:
    try:
        data = json.loads((folder / "environment.json").read_text())["data"]
        return {split: data[split]["fingerprint"] for split in ("train", "val")}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _own_file(run: RunWeights, spec: str) -> Path | None:
    if spec.startswith(("epoch-", "step-")):
        return run.captured(spec).path
    if spec in ("swa", "last", "without-pretrained"):
        require(run.averages, f"{run.folder} averaged nothing, so it has no {spec}; its solution is called pretrained")
        if spec == "last":
            return run.captures[-1].path
        return run.swa_path if spec == "swa" else None
    require(spec == "pretrained", f"unknown weights {spec!r}; wanted one of {_NAMES}")
    require(run.pretrained_path.is_file(), f"{run.folder}: pretrained.safetensors is missing")
    return run.pretrained_path


def _average_of_captures(run: RunWeights, network: nn.Module) -> Weights:
    average = WeightAverage(network)
    for capture in run.captures:
        weights = capture.load()
        check_fits(network, weights, str(capture.path))
        average.update(weights)
    return average.weights(include_pretrained=False)


def _capture_at(path: Path) -> Capture:
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["imagenet_swa"])
            return Capture(path, about["num_averaged"], about["epoch"], about["step"])
    except (SafetensorError, OSError, KeyError, ValueError):
        raise InputError(f"{path} is not a capture of a run: it is damaged or does not say which one it is") from None


def _read(path: Path, parse: Callable[[str], Any], otherwise: str) -> Any:
    try:
        return parse(path.read_text())
    except FileNotFoundError:
        raise InputError(f"{otherwise}: {path} is missing") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {' '.join(str(error).split())}") from None


def _listed(items: list[Any]) -> str:
    shown = ", ".join(map(str, items[:6]))
    return f"{shown} and {len(items) - 6} more" if len(items) > 6 else shown or "none"
