"""What a finished run left on disk: its captured weights in order, its averages, its settings; weights by a short name."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from imagenet_swa.averaging import WeightAverage
from imagenet_swa.config import InputError, require
from imagenet_swa.models import load_weights
from imagenet_swa.plain import is_count, is_number, parse_json, parse_yaml, printable, read_text
from imagenet_swa.report.runs import is_result
from imagenet_swa.weight_files import Weights, check_finite, read_weights

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
        config = _read(folder / "config.yaml", parse_yaml, f"{folder} holds no run")
        swa = config.get("swa") or {} if isinstance(config, dict) else {}
        is_run = isinstance(swa, dict) and is_count(swa.get("num_epochs")) and is_count(swa.get("start_epoch", 0))
        require(is_run and isinstance(config.get("data", {}), dict), f"{folder}/config.yaml is not the configuration of a run")
        unfinished = f"{folder} holds a run that is not finished; go on with it (imagenet-swa train) first"
        results = _read(folder / "results.json", parse_json, unfinished)
        require(isinstance(results, list) and all(map(is_result, results)), f"{folder}/results.json is not what a run writes")
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
        numbers = [capture.num_averaged for capture in averaged]
        there = set(numbers) & set(range(1, self.num_averaged + 1))
        some = list(islice((number for number in range(1, self.num_averaged + 1) if number not in there), 7))
        num_missing = self.num_averaged - len(there)
        require(
            not num_missing,
            f"{self.folder}/captures is not complete: of the {self.num_averaged} captures in the average {num_missing} are "
            f"missing (number {_listed(some, num_missing)})",
        )
        require(
            numbers == list(range(1, self.num_averaged + 1)),
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
    """Raise InputError, naming the source, unless the weights are finite and have the network's names and shapes."""
    trial = copy.deepcopy(network)
    load_weights(trial, weights, source)
    check_finite(trial.state_dict(), source)


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
        data = parse_json(read_text(folder / "environment.json"))["data"]
        return {split: str(data[split]["fingerprint"]) for split in ("train", "val")}
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
            about = parse_json((file.metadata() or {})["imagenet_swa"])
            capture = Capture(path, about["num_averaged"], about["epoch"], about["step"])
        # As many as steps at most, or the numbers of all would fill the memory.
        if not (
            is_count(capture.step, 10**9) and is_count(capture.num_averaged, capture.step) and is_number(capture.epoch, 0, 1e9)
        ):
            raise ValueError
        return capture
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError):
        raise InputError(f"{path} is not a capture of a run: it is damaged or does not say which one it is") from None


def _read(path: Path, parse: Callable[[str], Any], otherwise: str) -> Any:
    try:
        return parse(read_text(path))
    except FileNotFoundError:
        raise InputError(f"{otherwise}: {path} is missing") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {printable(' '.join(str(error).split()))[:500]}") from None


def _listed(items: list[Any], number: int | None = None) -> str:
    """The first items, of `number` in all."""
    shown, number = ", ".join(map(str, items[:6])), number or len(items)
    return f"{shown} and {number - 6} more" if number > 6 else shown or "none"
