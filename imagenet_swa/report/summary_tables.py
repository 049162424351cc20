"""The paper's Tables 1 and 2 with one's own rows above the paper's."""

from collections.abc import Callable, Sequence
from typing import Any

from imagenet_swa.report.document import Block, Heading, Paragraph, Rows
from imagenet_swa.report.paper import figure_text
from imagenet_swa.report.tables import mean_and_std

Record = dict[str, Any]


def table_blocks(records: Sequence[Record]) -> list[Block]:
    """A table per task of networks that have runs of SGD alone beside them (Table 1), one of all others (Table 2)."""
    blocks: list[Block] = [Heading("Means over seeds")]
    with_budgets = [record for record in records if record["sgd_runs"]]
    for num_classes in dict.fromkeys(record["num_classes"] for record in with_budgets):
        blocks.append(_table_1([record for record in with_budgets if record["num_classes"] == num_classes]))
    others = [record for record in records if not record["sgd_runs"]]
    for num_classes in dict.fromkeys(record["num_classes"] for record in others):
        blocks.append(_table_2([record for record in others if record["num_classes"] == num_classes]))
    if any(level["paper"] for record in records for level in record["levels"]):
        blocks.append(
            Paragraph(
                "The paper: Izmailov et al. 2018, mean ± standard deviation of 3 runs. Its pretrained ImageNet figures are from "
                "the torchvision documentation of its time, not measurements: compare gains rather than levels."
            )
        )
    return blocks


def _table_1(records: Sequence[Record]) -> Rows:
    """Columns by budgets."""

    def column_of(level: Record) -> str | None:
        if level["network"] == "pretrained":
            return None
        return "SGD" if level["network"] == "sgd" else _swa_column(level)

    return _table(records, ["SGD", *_swa_columns(records)], column_of, lambda record: str(record["budget_epochs"]))


def _table_2(records: Sequence[Record]) -> Rows:
    """Columns by epochs."""
    start = list(dict.fromkeys(level["title"] for r in records for level in _levels(r) if level["network"] == "pretrained"))

    def column_of(level: Record) -> str:
        return level["title"] if level["network"] == "pretrained" else _swa_column(level)

    return _table(records, [*start, *_swa_columns(records)], column_of, lambda _: "")


def _swa_columns(records: Sequence[Record]) -> list[str]:
    """By budgets, then those of which only the epochs are known."""
    levels = [level for record in records for level in _levels(record) if level["network"].startswith("swa")]
    levels.sort(key=lambda level: (level["budgets"] is None, level["budgets"] or level["epoch"]))
    return list(dict.fromkeys(map(_swa_column, levels)))


def _swa_column(level: Record) -> str:
    budgets, epoch = level["budgets"], level["epoch"]
    return f"SWA, {epoch:g} epochs" if budgets is None else f"SWA, {budgets_text(budgets)}"


def budgets_text(budgets: float) -> str:
    """`1 budget`, `1.25 budgets`."""
    return f"{budgets:.4g} budget{'s' if budgets > 1 else ''}"


def _table(
    records: Sequence[Record], columns: Sequence[str], column_of: Callable[[Record], str | None], budget: Callable[[Record], str]
) -> Rows:
    rows = []
    for record in records:
        levels = {column_of(level): level for level in _levels(record)}
        seeds = str(len(record["seeds"]) or len(record["sgd_seeds"]))
        gain = _gain_text(record)
        cells = [mean_and_std(levels[column]["values"]) if column in levels else "" for column in columns]
        rows.append((record["name"], budget(record), seeds, *cells, gain))
        papers = {column: level["paper"] for column, level in levels.items() if level["paper"]}
        if papers:
            cells = [figure_text((papers[c]["mean"], papers[c]["std"])) if c in papers else "" for c in columns]
            rows.append(("  the paper", budget(record), "3", *cells, _paper_gain(record)))
    images = ", ".join(dict.fromkeys(f"{record['num_images']:,}" for record in records))
    title = f"{records[0]['num_classes']} classes, {images} images: top-1 %, mean ± standard deviation over seeds"
    return Rows(("network", "epochs of a budget", "seeds", *columns, "gain, points"), rows, title)


def _levels(record: Record) -> list[Record]:
    """Those of the tables: the start, SGD, and the average that the runs leave as theirs."""
    average = "swa" if record["include_pretrained"] else "swa_without_pretrained"
    return [level for level in record["levels"] if level["network"] in ("sgd", "pretrained", average)]


def _gain_text(record: Record) -> str:
    return mean_and_std(record["gains"][-1]["values"], "+") if record["gains"] else ""


def _paper_gain(record: Record) -> str:
    """The paper's last average less its baseline."""
    levels = [level for level in _levels(record) if level["paper"]]
    baseline = [level for level in levels if level["network"] == ("sgd" if record["sgd_runs"] else "pretrained")]
    averages = [level for level in levels if level["network"].startswith("swa")]
    return f"{averages[-1]['paper']['mean'] - baseline[0]['paper']['mean']:+.2f}" if baseline and averages else ""
