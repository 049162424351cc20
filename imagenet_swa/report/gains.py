"""What one network has over another on the same images: points, over seeds and images, and McNemar's test of each seed."""

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

import numpy as np

from imagenet_swa.analysis.significance import Interval, mcnemar, paired_bootstrap, t_interval
from imagenet_swa.report.answers import Answers, on_common_images
from imagenet_swa.report.document import Rows

BOOTSTRAP_SEED = 0
GAIN_COLUMNS = ("network", "gain, points", "95 % over images", "95 % over seeds", "images won", "images lost", "McNemar p")


def measure_gain(label: str, seeds: Sequence[int], before: Sequence[Answers], after: Sequence[Answers]) -> dict[str, Any]:
    """The gain of `after` over `before`, in points of top-1, a pair of networks per seed.

    The interval over images is the paired bootstrap's for the mean over these very networks: another test set of the kind. The
    interval over seeds is Student's, for the mean over all seeds on this test set.

    Raises:
        InputError: the answers are of different images.
    """
    pairs = [on_common_images(pair) for pair in zip(before, after, strict=True)]
    tests = [mcnemar(*pair) for pair in pairs]
    values = [100 * (test.num_only_b - test.num_only_a) / test.num_images for test in tests]
    return {
        "label": label,
        "seeds": list(seeds),
        "values": values,
        "mean": mean(values),
        "std": stdev(values) if len(values) > 1 else None,
        "over_seeds": _ends(t_interval(values)),
        "over_images": _ends(paired_bootstrap(_mean_difference(before, after), seed=BOOTSTRAP_SEED), 100),
        "mcnemar": [
            {
                "seed": seed,
                "num_images": test.num_images,
                "num_won": test.num_only_b,
                "num_lost": test.num_only_a,
                "p_value": test.p_value,
            }
            for seed, test in zip(seeds, tests, strict=True)
        ],
    }


def _mean_difference(before: Sequence[Answers], after: Sequence[Answers]) -> np.ndarray:
    """(N,) over the images that all networks saw: how many more of the seeds have it right afterwards, as a share."""
    correct = np.array(on_common_images([*before, *after]), dtype=np.int64)
    num_seeds = len(before)
    return (correct[num_seeds:].sum(axis=0) - correct[:num_seeds].sum(axis=0)) / num_seeds


def _ends(interval: Interval | None, scale: float = 1) -> dict[str, float] | None:
    if interval is None:
        return None
    return {"low": scale * interval.low, "high": scale * interval.high, "level": interval.level}


def gain_rows(gains: Sequence[dict[str, Any]], title: str | None = None) -> Rows:
    """The gains as a table, cells as in `GAIN_COLUMNS`; of several seeds the counts are means and the p-values a range."""
    return Rows(GAIN_COLUMNS, [_gain_row(gain) for gain in gains], title)


def _gain_row(gain: dict[str, Any]) -> tuple[str, ...]:
    tests = gain["mcnemar"]
    spread = "" if gain["std"] is None else f" ± {gain['std']:.2f}"
    p_values = sorted(test["p_value"] for test in tests)
    return (
        gain["label"],
        f"{gain['mean']:+.2f}{spread}",
        ends_text(gain["over_images"]),
        ends_text(gain["over_seeds"]),
        f"{mean(test['num_won'] for test in tests):,.0f}",
        f"{mean(test['num_lost'] for test in tests):,.0f}",
        " to ".join(dict.fromkeys(f"{p:.2g}" for p in (p_values[0], p_values[-1]))),
    )


def ends_text(interval: dict[str, float] | None) -> str:
    """`+0.61 to +1.02`, empty where there is no interval."""
    return "" if interval is None else f"{interval['low']:+.2f} to {interval['high']:+.2f}"
