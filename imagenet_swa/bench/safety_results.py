"""Rounds and turns that `imagenet-swa bench safety` measured -> medians and shares, table, Markdown, JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from imagenet_swa.bench.results import spread
from imagenet_swa.report import markdown_table

if TYPE_CHECKING:
    from imagenet_swa.bench.agreeing import Turn
    from imagenet_swa.bench.saving import SavingRound

COLUMNS = ("", "ms", "min - max", "share", "of", "limit", "ratio to ours", "min - max of ratio", "MiB/s")
MINUTES = 10  # between checkpoints
LIMIT = 0.005  # share that a safe run may cost


def summarise_safety(rounds: "Sequence[SavingRound]", turns: "Sequence[Turn]", *, num_bytes: int) -> list[dict[str, Any]]:
    """A row per figure: seconds, share, ratio and MiB/s, each as median, minimum and maximum, or None.

    Ratios and shares of a step are taken within a round or turn. The share of a difference may be negative.
    """
    return [*(_of_saving(rounds, num_bytes) if rounds else ()), *_of_steps(turns)]


def _of_saving(rounds: "Sequence[SavingRound]", num_bytes: int) -> list[dict[str, Any]]:
    mib = num_bytes / 2**20
    writing = [each.writing for each in rounds]
    rows = [
        _row("checkpoint: copied to host memory", [each.copying for each in rounds], interval=True),
        _row("checkpoint: steps held up while it is written", [each.held_up for each in rounds], interval=True),
        _row("checkpoint: training stands still in all", [r.copying + r.held_up for r in rounds], interval=True, limit=LIMIT),
        _row("checkpoint: written in the background", writing, interval=True, rates=[mib / each for each in writing]),
        _row("checkpoint: longest pause of the interpreter", [each.pause for each in rounds]),
    ]
    ours = next(iter(rounds[0].waiting))
    for kind in rounds[0].waiting:
        seconds = [each.waiting[kind] for each in rounds]
        ratios = None if kind == ours else [each.waiting[kind] / each.waiting[ours] for each in rounds]
        rates = [mib / each for each in seconds]
        rows.append(_row(f"checkpoint: {kind}", seconds, interval=True, ratios=ratios, rates=rates))
    return rows


def _of_steps(turns: "Sequence[Turn]") -> list[dict[str, Any]]:
    agreement, check = [turn.agreement for turn in turns], [turn.check for turn in turns]
    more = [turn.guarded - turn.plain for turn in turns]
    plain = [turn.plain for turn in turns]

    def share(parts: list[float]) -> list[float]:
        return [part / whole for part, whole in zip(parts, plain, strict=True)]

    return [
        _row("step: without guards", plain),
        _row("step: with guards", [turn.guarded for turn in turns]),
        _row("step: the two's difference", more, shares=share(more)),
        _row("step: agreement of the ranks", agreement, shares=share(agreement), limit=LIMIT),
        _row("step: are the gradients finite", check, shares=share(check)),
    ]


def _row(
    what: str,
    seconds: list[float],
    *,
    interval: bool = False,
    shares: list[float] | None = None,
    limit: float | None = None,
    ratios: list[float] | None = None,
    rates: list[float] | None = None,
) -> dict[str, Any]:
    of = f"{MINUTES} minutes" if interval else "a step" if shares else None
    if interval:
        shares = [each / (60 * MINUTES) for each in seconds]
    return {
        "what": what,
        "seconds": spread(seconds),
        "share": spread(shares) if shares else None,
        "of": of,
        "limit": limit,
        "ratio": spread(ratios) if ratios else None,
        "mib_per_second": spread(rates) if rates else None,
    }


# ---------------------------------------------------------------------------------------------------------- files


def safety_rows(record: dict[str, Any]) -> list[tuple[str, ...]]:
    """A row per figure, cells as in `COLUMNS`."""
    return [
        (
            row["what"],
            _number(1000 * row["seconds"]["median"]),
            f"{_number(1000 * row['seconds']['min'])} - {_number(1000 * row['seconds']['max'])}",
            f"{100 * row['share']['median']:.3f} %" if row["share"] else "",
            row["of"] or "",
            f"{100 * row['limit']:g} %" if row["limit"] else "",
            f"{row['ratio']['median']:.2f}" if row["ratio"] else "",
            f"{row['ratio']['min']:.2f} - {row['ratio']['max']:.2f}" if row["ratio"] else "",
            f"{row['mib_per_second']['median']:.0f}" if row["mib_per_second"] else "",
        )
        for row in record["summary"]
    ]


def _number(milliseconds: float) -> str:
    """Three digits or more."""
    return f"{milliseconds:.0f}" if abs(milliseconds) >= 100 else f"{milliseconds:.3g}"


def write_safety_results(record: dict[str, Any], folder: Path) -> None:
    """Write safety.json and safety.md."""
    (folder / "safety.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "safety.md").write_text(_markdown(record))


def _markdown(record: dict[str, Any]) -> str:
    environment, settings = record["environment"], record["settings"]
    machine = ", ".join(environment["gpus"]) or f"{environment['cpu']}, no GPU"
    parts = ", ".join(f"{part} {num_bytes / 2**20:.1f}" for part, num_bytes in record["num_bytes"].items())
    lines = [
        "# Checkpoints and guards",
        "",
        markdown_table(COLUMNS, safety_rows(record)),
        "",
        f"Median, minimum and maximum over {settings['rounds']} checkpoints of each kind and {settings['turns']} turns of "
        f"{record['steps_at_a_time']} step(s) without and with guards, taking turns. Steps held up: the time of the steps during "
        f"a write less that of as many before and after it, so other work on the machine enters, with either sign. A checkpoint "
        f"every {MINUTES} minutes. Ours is flushed, hashed, read back from the disk and renamed; the others' bytes are left in "
        "the system's cache, over the last ones.",
        "",
        f"- network: {record['network']}, {record['batch_size']} images of {record['image_size']} pixels per step and process; "
        f"{environment['world_size']} process(es) of {record['num_threads']} thread(s) on {environment['device'].split(':')[0]}",
        f"- a checkpoint in MiB: {parts}",
        f"- machine: {machine}; {environment['num_cpus']} CPU cores; "
        + ", ".join(f"{name} {version}" for name, version in environment["versions"].items()),
    ]
    return "\n".join(lines) + "\n"
