"""The report of many runs: Tables 1 and 2 beside the paper's, gains with their intervals, Markdown, HTML and JSON."""

import os
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from imagenet_swa.config import SwaConfig, require
from imagenet_swa.files import write_atomically
from imagenet_swa.report.document import Block, Bullets, Heading, Paragraph, Picture, Rows, json_text, markdown, page
from imagenet_swa.report.findings import findings_under
from imagenet_swa.report.gains import Answers, gain_rows, measure_gain, read_answers
from imagenet_swa.report.groups import Network, group_runs
from imagenet_swa.report.paper import Figure, table_1, table_2
from imagenet_swa.report.plots import plot_gains, plot_seeds
from imagenet_swa.report.runs import TITLES, RunFiles
from imagenet_swa.report.summary_tables import budgets_text, table_blocks
from imagenet_swa.report.tables import RUN_COLUMNS, SGD_COLUMNS, compare_runs, compare_sgd_runs, print_table

AVERAGES = ("swa", "swa_without_pretrained")


def report_runs(runs: Sequence[RunFiles], output: Path | None = None) -> Path:
    """Print the tables of many runs and write report.md, report.html, report.json and their pictures into a folder.

    Args:
        output: the folder; default: `report` in the folder that holds all the runs.

    Returns:
        The path of report.md.

    Raises:
        InputError: runs that cannot stand in one report; one that is not finished, or without its predictions.
    """
    networks = group_runs(runs)
    folder = output or default_output(runs)
    require(not (folder / "config.yaml").exists(), f"{folder} holds a run; choose another folder with --output")
    require(not folder.exists() or folder.is_dir(), f"{folder} is a file; choose another folder with --output")
    record = {"networks": [summarise(network) for network in networks]}
    folder.mkdir(parents=True, exist_ok=True)
    blocks = _blocks(networks, record["networks"], folder)
    for block in blocks:
        if isinstance(block, Rows):
            print_table(block.columns, block.rows, block.title)
    write_atomically(folder / "report.json", json_text(record))
    write_atomically(folder / "report.html", page(blocks))
    write_atomically(folder / "report.md", markdown(blocks, folder))
    return folder / "report.md"


def default_output(runs: Sequence[RunFiles]) -> Path:
    """`report` in the nearest folder that all runs lie in."""
    parents = [run.folder.absolute().parent for run in runs]
    common = Path(os.path.commonpath(parents))
    return (common if len(set(parents)) > 1 else runs[0].folder.parent) / "report"


# -------------------------------------------------------------------------------------------------- the numbers


def summarise(network: Network) -> dict[str, Any]:
    """All numbers of a network's runs as plain values: levels in per cent, gains in points."""
    first = network.runs[0]
    return {
        "name": network.name,
        "library": network.model["library"],
        "num_classes": network.model["num_classes"],
        "num_images": first.results[0]["num_images"],
        "data": first.environment["data"],
        "budget_epochs": network.budget,
        "epochs_before": network.epochs_before,
        "include_pretrained": _main_average(network) == "swa",
        "seeds": [run.seed for run in network.swa],
        "runs": [str(run.folder) for run in network.swa],
        "sgd_seeds": [run.seed for run in network.sgd],
        "sgd_runs": [str(run.folder) for run in network.sgd],
        "baselines": [str(run.folder) for run in network.baselines],
        "levels": _levels(network),
        "gains": _gains(network, _main_average(network)) if network.swa else [],
        "gains_of_other_average": _gains(network, _other_average(network)) if network.swa else [],
        "decomposition": _decomposition(network) if network.swa else [],
    }


def _main_average(network: Network) -> str:
    """The average that counts: the one that the runs leave as swa.safetensors."""
    settings = [run.swa.include_pretrained for run in network.swa]
    return "swa" if any(settings) or not settings else "swa_without_pretrained"


def _other_average(network: Network) -> str:
    return next(name for name in AVERAGES if name != _main_average(network))


def _levels(network: Network) -> list[dict[str, Any]]:
    """Top-1 of every kind of network at every epoch at which all runs have it."""
    levels = []
    if network.sgd:
        results = [run.final_results()["pretrained"] for run in network.sgd]
        levels.append(_level(network, "sgd", 1.0, results))
    if network.swa:
        final = [run.final_results() for run in network.swa]
        levels += [_level(network, name, None, [found[name] for found in final]) for name in ("pretrained", "capture")]
    for epoch in _report_epochs(network):
        for name in AVERAGES:
            results = [result for run in network.swa if (result := run.result(name, epoch)) is not None]
            levels.append(_level(network, name, network.budgets(epoch), results))
    return levels


def _level(network: Network, name: str, budgets: float | None, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    values = [100 * result["top1"] for result in results]
    epoch = results[0]["epoch"]
    paper = _paper(network, name, epoch, budgets)
    return {
        "network": name,
        "title": "SGD" if name == "sgd" else network.swa[0].title(name),
        "epoch": epoch,
        "budgets": nearest_quarter(budgets),
        "exact_budgets": budgets,
        "values": values,
        "mean": mean(values),
        "std": stdev(values) if len(values) > 1 else None,
        "paper": None if paper is None else {"mean": paper[0], "std": paper[1]},
    }


def _paper(network: Network, name: str, epoch: float, budgets: float | None) -> Figure | None:
    row = table_1(network.model, network.runs[0].results[0]["num_images"])
    if row and name == "sgd":
        return row["sgd"]
    if row and name in AVERAGES:
        return row.get(nearest_quarter(budgets) or 0.0)
    return None if name == "sgd" else table_2(network.model["name"], name, epoch, num_classes=network.model["num_classes"])


def nearest_quarter(budgets: float | None) -> float | None:
    """Budgets that whole epochs or cycles cannot hit exactly (112 of 112.5 epochs, 2,200 of 2,250) as the ones that are meant."""
    if budgets is None:
        return None
    quarter = round(4 * budgets) / 4
    return quarter if abs(budgets - quarter) < 0.03 else budgets


def _report_epochs(network: Network) -> list[int]:
    """The epochs after which every run has an evaluated average."""
    epochs = [{r["epoch"] for r in run.results if r["name"] == "swa"} for run in network.swa]
    epochs += [{r["epoch"] for r in run.results if r["name"] == "swa_without_pretrained"} for run in network.swa]
    return sorted(set.intersection(*epochs)) if epochs else []


class _Reader:
    """Answers of the runs of SWA and of their baselines, each file read once."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self._read: dict[tuple[Path, str, float], Answers] = {}

    def of(self, runs: Sequence[RunFiles], results: Sequence[dict[str, Any]]) -> list[Answers]:
        found = []
        for run, result in zip(runs, results, strict=True):
            key = (run.folder, result["name"], result["step"])
            if key not in self._read:
                self._read[key] = read_answers(run, result)
            found.append(self._read[key])
        return found

    def baseline(self) -> list[Answers]:
        runs = self.network.baselines
        return self.of(runs, [run.final_results()["pretrained"] for run in runs])

    def final(self, name: str) -> list[Answers]:
        runs = self.network.swa
        return self.of(runs, [run.final_results()[name] for run in runs])

    def average(self, name: str, epoch: int) -> list[Answers]:
        runs = self.network.swa
        return self.of(runs, [result for run in runs if (result := run.result(name, epoch)) is not None])


def _gains(network: Network, name: str) -> list[dict[str, Any]]:
    """Gains of an average at each report over SGD at the full budget, where it was run, else over the pretrained network."""
    reader = _Reader(network)
    over = "sgd" if network.baselines else "pretrained"
    before = reader.baseline() if network.baselines else reader.final("pretrained")
    words = "SGD" if network.baselines else network.swa[0].title("pretrained")
    gains = []
    for epoch in _report_epochs(network):
        budgets = nearest_quarter(network.budgets(epoch))
        when = f"{epoch} epochs" if budgets is None else budgets_text(budgets)
        label = f"{TITLES[name]}, {when} - {words}"
        gain = measure_gain(label, [run.seed for run in network.swa], before, reader.average(name, epoch))
        gains.append({"of": name, "epoch": epoch, "budgets": budgets, "over": over} | gain)
    return gains


def _decomposition(network: Network) -> list[dict[str, Any]]:
    """What the SWA runs gained over the weights they started from: by fine-tuning, by averaging, in all."""
    reader, name = _Reader(network), _main_average(network)
    parts = {"fine-tuning": ("capture", "pretrained"), "averaging": (name, "capture"), "in all": (name, "pretrained")}
    words = {"capture": "last capture", "pretrained": "start", name: TITLES[name]}
    return [
        {"part": part, "of": after, "over": before}
        | measure_gain(
            f"{part}: {words[after]} - {words[before]}",
            [run.seed for run in network.swa],
            reader.final(before),
            reader.final(after),
        )
        for part, (after, before) in parts.items()
    ]


# -------------------------------------------------------------------------------------------------- the document


def _blocks(networks: Sequence[Network], records: Sequence[dict[str, Any]], folder: Path) -> list[Block]:
    blocks: list[Block] = [Heading("Runs side by side", 1), Heading("Each run")]
    for network in networks:
        several = len(networks) > 1 or bool(network.sgd)
        if network.swa:
            rows = compare_runs(list(network.swa))
            blocks.append(Rows(RUN_COLUMNS, rows, f"{network.name}: runs of SWA, top-1 %" if several else None))
        if network.sgd:
            blocks.append(Rows(SGD_COLUMNS, compare_sgd_runs(list(network.sgd)), f"{network.name}: runs of SGD alone, top-1 %"))
    blocks += [*table_blocks(records), *[Paragraph(text) for network in networks if (text := _budgets_in_words(network))]]
    gains, others, parts = (_labelled(records, key) for key in ("gains", "gains_of_other_average", "decomposition"))
    if gains:
        plot_gains([*gains, *[part for part in parts if part["part"] != "in all"]], folder / "gains.png")
        about = "gains with their intervals over images and over seeds"
        blocks += [Heading("Gains"), gain_rows([*gains, *others], "Over the baseline measured in the same pipeline")]
        blocks += [gain_rows(parts, "Where it comes from"), _how_to_read(), Picture(folder / "gains.png", about)]
    for number, network in enumerate(networks, start=1):
        path = folder / f"trajectories-{number}.png"
        plot_seeds(network.swa, network.sgd, network.epochs_before or 0, path, title=network.name)
        blocks.append(Picture(path, f"{network.name}: top-1 against epochs, a line per seed"))
    runs = [run for network in networks for run in network.runs]
    for run in runs:
        blocks += findings_under(run.folder, f"{run.folder.name}: what its analyses show")
    return [*blocks, Heading("Runs"), Bullets([f"`{run.folder}`: seed {run.seed}" for run in runs])]


def _labelled(records: Sequence[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """The gains of all networks, with the network's name where there are several."""
    several = len(records) > 1
    return [
        gain | {"label": f"{record['name']}: {gain['label']}"} if several else gain for record in records for gain in record[key]
    ]


def _budgets_in_words(network: Network) -> str | None:
    """What SGD, SWA and the budgets of Table 1 stand for in these runs."""
    if not network.baselines or network.epochs_before is None:
        return None
    swa, before = network.swa[0].swa, network.budgets(0) or 0
    text = (
        f"{network.name}: one budget is {network.budget} epochs. SGD: plain SGD for the whole budget, at the learning rate "
        f"{_rate_in_words(network.sgd[0].swa)}. SWA: starts from such a run's weights after {network.epochs_before:g} epochs "
        f"({before:.4g} budgets), goes on at the learning rate {_rate_in_words(swa)} and averages its captures; its budgets "
        "count all epochs, those before its start included. *SWA (Alg. 1)* has the start in the average, *SWA, captures only* "
        "has not."
    )
    if len({run.folder for run in network.baselines}) < len(network.swa):
        text += " Several runs of SWA share a run of SGD: their gains are not independent, the interval over seeds is too narrow."
    return text


def _rate_in_words(swa: SwaConfig) -> str:
    rates = f"{swa.lr_max:g}" if swa.schedule == "constant" else f"{swa.lr_max:g} to {swa.lr_min:g}"
    return f"{rates} ({swa.schedule.replace('_', ' ')})"


def _how_to_read() -> Paragraph:
    return Paragraph(
        "A - B reads: top-1 of A less top-1 of B. "
        "Gains are in points of top-1, mean ± sample standard deviation over seeds, each seed's two networks on the same images. "
        "Over images: the paired bootstrap's 95 % interval of the mean over these very runs, for another test set of the kind. "
        "Over seeds: Student's 95 % interval of the mean of all seeds, on this test set; of two or three seeds it says little. "
        "Images won and lost are means over seeds. McNemar's exact two-sided test of each seed, smallest to largest p-value. "
        "Fine-tuning: the last capture less the weights that the run started from; averaging: the average less its last capture."
    )
