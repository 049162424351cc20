"""What `prepare` did, as numbers for programs and lines for people."""

import itertools
from collections import Counter
from collections.abc import Iterable
from typing import Any

from imagenet_swa.data.index import ImageIndex
from imagenet_swa.data.prepare.copies import EVALUATION_SIZE
from imagenet_swa.data.prepare.units import Unit


def make_report(
    units: list[Unit], index: ImageIndex, *, split: str, source: str, words: str, settings: dict[str, Any]
) -> dict[str, Any]:
    """The numbers of the whole output, whatever number of runs wrote it."""
    counts: Counter[str] = sum((unit.counts for unit in units), Counter())
    before, after = (sum(getattr(unit, name) for unit in units) for name in ("num_bytes_before", "num_bytes"))
    num_compared = counts["compared"]
    values_per_image = 3 * EVALUATION_SIZE**2
    return {
        "split": split,
        "source": source,
        "source_kind": words,
        "settings": settings,
        "images": len(index),
        "files": len(index.shards) or len(index),
        "bytes_before": before,
        "bytes_after": after,
        "ratio": after / before if before else 1.0,
        "unchanged": counts["unchanged"],
        "re_encoded": counts["re_encoded"],
        "kept_small": counts["small"],
        "kept_not_smaller": counts["not_smaller"],
        "restart_markers": counts["restart_markers"],
        "without_restart_markers": len(index) - counts["restart_markers"] if settings["restart_markers"] else 0,
        "renamed": sum(unit.num_renamed for unit in units),
        "bad": [entry for unit in units for entry in unit.bad],
        "re_encoded_compared": num_compared,
        "difference_mean": sum(unit.difference_sum for unit in units) / (num_compared * values_per_image)
        if num_compared
        else None,
        "difference_max": max(unit.difference_max for unit in units) if num_compared else None,
        "fingerprint": index.fingerprint,
    }


def describe(report: dict[str, Any]) -> Iterable[str]:
    """The report as lines for people; only what was counted or measured."""
    yield (
        f"{report['split']}: {report['images']:,} images in {report['files']:,} files, "
        f"{report['bytes_before']:,} -> {report['bytes_after']:,} bytes of images, ratio {report['ratio']:.3f}"
    )
    side = report["settings"]["shorter_side"]
    if side is not None:
        yield (
            f"re-encoded {report['re_encoded']:,}; kept as they were {report['kept_small']:,} whose shorter side is at most "
            f"{side} pixels, and {report['kept_not_smaller']:,} that would not have taken fewer bytes"
        )
    if report["re_encoded_compared"]:
        yield (
            f"grey levels of {report['re_encoded_compared']:,} re-encoded images after the evaluation's resize and crop at "
            f"{EVALUATION_SIZE} differ by {report['difference_mean']:.2f} on average, {report['difference_max']} at most"
        )
    if report["settings"]["restart_markers"]:
        yield (
            f"restart markers added to {report['restart_markers']:,}, each decoded and found equal in every pixel; "
            f"{report['without_restart_markers']:,} without, which are no sequential JPEGs of one scan or cannot be cut"
        )
    if report["renamed"]:
        yield f"renamed {report['renamed']:,}, since in shards a name ends at its first dot: other dots became underscores"
    if report["bad"]:
        names = ", ".join(f"{name} ({reason})" for name, reason in itertools.islice(report["bad"], 5))
        yield f"left out {len(report['bad']):,} that cannot be read or decoded: {names}"
    yield (
        f"read back: names, labels and bytes of all {report['images']:,} images are those written; "
        f"fingerprint {report['fingerprint'][:12]}"
    )
