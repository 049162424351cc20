"""Whether two finished runs have the same results, to the last bit."""

import json
from pathlib import Path
from typing import Any

from imagenet_swa.selftest.whole import checkpoints

# What tells the time, or where the run lies; of the checkpoints only the last is the same in all runs.
_NOT_RESULTS = ("train.log", "environment.json", "config.yaml", "report.json", "checkpoints/")
_CLOCK = ("seconds", "images_per_second", "data_wait", "memory_mib")


def differences(wanted: Path, run: Path) -> list[str]:
    """A line for each result of `run` that is not byte for byte that of `wanted`: weights, averages, predictions, results,
    metrics, reports, the data's index and the last checkpoint, less wall-clock fields.
    """
    here, there = results(run), results(wanted)
    lines = [f"{name} is missing" for name in there if name not in here]
    lines += [f"{name} is too much" for name in here if name not in there]
    return lines + [f"{name} differs" for name in there if name in here and here[name] != there[name]]


def results(run: Path) -> dict[str, bytes]:
    """The content of all files that hold results, by name; the last checkpoint as `checkpoint/...`."""
    files = {str(path.relative_to(run)): path for path in sorted(run.rglob("*")) if path.is_file()}
    found = {name: path.read_bytes() for name, path in files.items() if not name.startswith(_NOT_RESULTS)}
    if "metrics.jsonl" in found:
        found["metrics.jsonl"] = _without_clock_in_lines(found["metrics.jsonl"])
    saved = checkpoints(run)
    if saved:
        step, last = max(saved.items())
        found |= {f"checkpoint/{path.name}": path.read_bytes() for path in last.iterdir() if path.name != "manifest.json"}
        found["checkpoint/progress.json"] = _plain(json.loads(found["checkpoint/progress.json"]) | {"name": step})
    return found


def _without_clock_in_lines(content: bytes) -> bytes:
    return b"\n".join(_plain(json.loads(line)) for line in content.splitlines())


def _plain(value: Any) -> bytes:
    return json.dumps(_without_clock(value)).encode()


def _without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_clock(inner) for key, inner in value.items() if key not in _CLOCK}
    return [_without_clock(inner) for inner in value] if isinstance(value, list) else value
