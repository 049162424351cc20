"""How wide a solution is: the distance along random directions at which the test error has risen by a point. Pure numbers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

RISE = 0.01  # one point of test error


def width(distances: Sequence[float], errors: Sequence[float], rise: float = RISE) -> float | None:
    """The distance at which the error first exceeds the first one by `rise`, linear between the measured ones; None where it
    does not within their range (the width is censored: larger than the last distance).

    Args:
        distances: from the centre, ascending; the first is the centre's own, 0.
        errors: fractions.
    """
    limit = errors[0] + rise
    for i in range(1, len(errors)):
        if errors[i] > limit:
            share = (limit - errors[i - 1]) / (errors[i] - errors[i - 1])
            return distances[i - 1] + share * (distances[i] - distances[i - 1])
    return None


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over those directions that have a number.

    Attributes:
        num: directions with a number.
        num_censored: directions without one.
        mean: None where no direction has a number.
        std: sample standard deviation, None below two.
    """

    num: int
    num_censored: int
    mean: float | None
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Spread":
        """Of one value per direction, None where it is censored."""
        known = [value for value in values if value is not None]
        return cls(len(known), len(values) - len(known), mean(known) if known else None, stdev(known) if len(known) > 1 else None)

    def __str__(self) -> str:
        if self.mean is None:
            return "none within range"
        spread = "" if self.std is None else f" ± {self.std:.4g}"
        return f"{self.mean:.4g}{spread}"


def paired_difference(a: Sequence[float | None], b: Sequence[float | None]) -> Spread:
    """a - b in each direction in which both have a number: what the direction does to both cancels."""
    return Spread.of([None if x is None or y is None else x - y for x, y in zip(a, b, strict=True)])


def summarise(widths: Mapping[str, Sequence[float | None]], max_distance: float, rise: float = RISE) -> dict[str, Any]:
    """All about the widths of some centres along the same directions, as plain values.

    `lower_bound_of_mean` counts a censored width as the largest distance measured: with any of them censored, `mean`, which
    leaves them out, is too small as well, and of the narrow directions only.
    """
    centres = {}
    for name, values in widths.items():
        bounded = [max_distance if value is None else value for value in values]
        centres[name] = {
            "width": list(values),
            **vars(Spread.of(values)),
            "lower_bound_of_mean": math.fsum(bounded) / len(bounded),
        }
    names = list(widths)
    differences = [
        {"of": a, "minus": b, **vars(paired_difference(widths[a], widths[b])), "num_wider": num_wider(widths[a], widths[b])}
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    ]
    return {"rise_of_test_error": rise, "max_distance": max_distance, "centres": centres, "differences": differences}


def num_wider(a: Sequence[float | None], b: Sequence[float | None]) -> int:
    """Directions in which a is wider than b; a censored width is wider than any number, and than another it is not."""
    pairs = zip(a, b, strict=True)
    return sum((math.inf if x is None else x) > (math.inf if y is None else y) for x, y in pairs)


COLUMNS = ("centre", "width", "mean at least", "directions", "beyond the range")


def table_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A row per centre and per pair of them, cells as in `COLUMNS`."""
    rows = []
    for name, centre in summary["centres"].items():
        spread = Spread(*(centre[key] for key in ("num", "num_censored", "mean", "std")))
        total = str(centre["num"] + centre["num_censored"])
        rows.append((name, str(spread), f"{centre['lower_bound_of_mean']:.4g}", total, str(centre["num_censored"])))
    for pair in summary["differences"]:
        spread = Spread(*(pair[key] for key in ("num", "num_censored", "mean", "std")))
        total = pair["num"] + pair["num_censored"]
        wider = f"{pair['num_wider']} of {total} wider"
        rows.append((f"{pair['of']} - {pair['minus']}, paired", str(spread), "", wider, str(pair["num_censored"])))
    return rows
