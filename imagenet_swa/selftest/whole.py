"""Whether what a run has on disk is whole, found out without the code that wrote it."""

import hashlib
import json
import re
from pathlib import Path

_FILES = {"manifest.json", "progress.json"} | {f"{part}.safetensors" for part in ("weights", "momentum", "average", "statistics")}


def checkpoints(run: Path) -> dict[int, Path]:
    """The finished checkpoints by step, ascending."""
    found = {}
    for path in (run / "checkpoints").glob("step-*"):
        if match := re.fullmatch(r"step-(\d{7,})", path.name):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def what_is_torn(run: Path) -> list[str]:
    """A line for each finished checkpoint that is not as its manifest says."""
    return [f"{path.name}: {problem}" for path in checkpoints(run).values() if (problem := _problem_of(path))]


def _problem_of(checkpoint: Path) -> str | None:
    names = {path.name for path in checkpoint.iterdir()}
    if names != _FILES:
        return f"holds {sorted(names ^ _FILES)} too much or too little"
    try:
        digests = json.loads((checkpoint / "manifest.json").read_text())
        json.loads((checkpoint / "progress.json").read_text())
    except ValueError:
        return "manifest.json or progress.json is no JSON"
    if set(digests) != _FILES - {"manifest.json"}:
        return f"manifest.json lists {sorted(digests)}"
    for name, digest in digests.items():
        if hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() != digest:
            return f"{name} is not as manifest.json says"
    return None


def what_is_broken(run: Path) -> list[str]:
    """A line for each other file, of those that readers rely on, that is not whole; what is called .partial may be anything."""
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and ".partial" not in str(path.relative_to(run))]
    return [f"{path.relative_to(run)}: {problem}" for path in files if (problem := _problem_of_file(path))]


def _problem_of_file(path: Path) -> str | None:
    content = path.read_bytes() if path.suffix in (".json", ".safetensors", ".parquet") else b""
    match path.suffix:
        case ".json":
            try:
                json.loads(content)
            except ValueError:
                return "no JSON"
        case ".safetensors":
            return _problem_of_safetensors(content)
        case ".parquet":
            if not (content.startswith(b"PAR1") and content.endswith(b"PAR1")):
                return "no whole Parquet file"
    return None


def _problem_of_safetensors(content: bytes) -> str | None:
    """The format: 8 bytes with the length of the header, a header in JSON, the tensors' bytes up to the last offset."""
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
    except ValueError:
        return "no whole safetensors header"
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return None if len(content) == 8 + length + max(ends, default=0) else "tensors are missing"


def left_overs(run: Path) -> list[str]:
    """What a finished run must not leave behind: files that were being written."""
    return sorted(str(path.relative_to(run)) for path in run.rglob("*.partial*"))


def last_logged_step(run: Path) -> int:
    """The last step that metrics.jsonl tells of; a line that a killed run left half-written does not count."""
    steps = [0]
    path = run / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            steps.append(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return max(steps)
