"""The report against results made by hand: which numbers stand where, and what happens to folders that hold no run."""

import json
import re
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import PROJECT, QUICK_RUN, one_line
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

from imagenet_swa.arguments import parse_config
from imagenet_swa.config import Config, InputError, ModelConfig, SwaConfig, to_plain
from imagenet_swa.data import imagenet
from imagenet_swa.finetune import finetune
from imagenet_swa.report import (
    COLUMNS,
    RUN_COLUMNS,
    compare_runs,
    learning_rates,
    load_run,
    markdown_table,
    paper_figure,
    plot_paper_schedules,
    plot_schedule,
    plots,
    report_runs,
    table_rows,
    write_report,
)
from imagenet_swa.report.document import Block, Bullets, Heading, Paragraph, Picture, Rows, markdown, page
from imagenet_swa.report.findings import read_markdown
from imagenet_swa.report.paper import PAPER_TABLE_1, table_1
from imagenet_swa.report.plots import draw_schedule
from imagenet_swa.report.summary import nearest_quarter
from imagenet_swa.schedule import make_schedule

pytestmark = pytest.mark.usefixtures("on_the_cpu")

ENVIRONMENT = {
    "data": {split: {"num_images": 50000, "fingerprint": split + 64 * "f"} for split in ("train", "val")},
    "versions": {"torch": "2.10.0", "timm": "1.0.20"},
    "gpus": ["NVIDIA H100", "NVIDIA H100"],
    "cpu": "a CPU",
    "world_size": 2,
}


def result(name: str, epoch: int, top1: float, top5: float = 0.93, nll: float = 0.9) -> dict[str, Any]:
    return {"name": name, "epoch": epoch, "step": 100 * epoch, "num_images": 50000, "top1": top1, "top5": top5, "nll": nll}


RESULTS = [
    result("pretrained", 0, 0.7613, 0.92862, 0.96061),
    result("capture", 1, 0.7600),
    result("capture", 2, 0.75),
    result("swa", 2, 0.7645),
    result("swa_without_pretrained", 2, 0.7640),
    *[result("capture", epoch, 0.75 + epoch / 1000) for epoch in range(3, 11)],
    result("swa_without_pretrained", 5, 0.7674),
    result("swa", 5, 0.7680),
    result("swa_without_pretrained", 10, 0.76905),
    result("swa", 10, 0.7694),
]


def make_run(folder: Path, results: Any = RESULTS, *, name: str = "resnet50.tv_in1k", seed: int = 0, **swa: Any) -> Path:
    """A run folder without weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = Config(model=ModelConfig(name=name), swa=SwaConfig(**swa), seed=seed)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_plain(config)))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    (folder / "results.json").write_text(json.dumps(results))
    lines = [
        {"kind": "train", "step": step, "epoch": step / 100, "lr": 1e-3 - step * 1e-6, "loss": 1.0}
        for step in range(50, 1001, 50)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def column(rows: list[tuple[str, ...]], title: str) -> list[str]:
    return [row[COLUMNS.index(title)] for row in rows]


def parse_markdown(text: str) -> list[list[str]]:
    """The rows of the first Markdown table, its header first."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("| ---")]


# ------------------------------------------------------------------------------------------------------------ table


def test_rows_in_order(tmp_path: Path):
    """Rows come as a reader asks for them: pretrained, captures by epoch, then the averages by epoch, Alg. 1 first."""
    shuffled = [RESULTS[i] for i in np.random.default_rng(0).permutation(len(RESULTS))]
    rows = table_rows(load_run(make_run(tmp_path, shuffled)))
    averages = [(title, str(epoch)) for epoch in (2, 5, 10) for title in ("SWA (Alg. 1)", "SWA, captures only")]
    wanted = [("pretrained", ""), *[("capture", str(epoch)) for epoch in range(1, 11)], *averages]
    assert [row[:2] for row in rows] == wanted


def test_numbers_of_a_row(tmp_path: Path):
    """Accuracies are per cent with two decimals, the NLL has four, and the pretrained network has no gain over itself."""
    rows = table_rows(load_run(make_run(tmp_path)))
    assert rows[0] == ("pretrained", "", "76.13", "92.86", "0.9606", "", "76.15")
    assert ("SWA (Alg. 1)", "10", "76.94", "93.00", "0.9000", "+0.81", "76.97 ± 0.05") in rows


def test_gains(tmp_path: Path):
    """The gain is the difference to the measured pretrained network in points, with its sign."""
    rows = table_rows(load_run(make_run(tmp_path)))
    gains = dict(zip([row[:2] for row in rows], column(rows, "gain, points"), strict=True))
    assert gains["capture", "1"] == "-0.13"
    assert gains["capture", "2"] == "-1.13"
    assert gains["SWA, captures only", "5"] == "+0.61"
    for row in rows[1:]:
        assert float(row[5]) == pytest.approx(float(row[2]) - 76.13, abs=0.0101)


@pytest.mark.parametrize(
    ("name", "pretrained", "swa_5", "swa_10"),
    [
        ("resnet50.tv_in1k", "76.15", "76.83 ± 0.01", "76.97 ± 0.05"),
        ("resnet50.IMAGENET1K_V1", "76.15", "76.83 ± 0.01", "76.97 ± 0.05"),
        ("resnet152.tv_in1k", "78.31", "78.82 ± 0.01", "78.94 ± 0.07"),
        ("densenet161", "77.65", "78.26 ± 0.09", "78.44 ± 0.06"),
    ],
)
def test_the_papers_numbers(tmp_path: Path, name: str, pretrained: str, swa_5: str, swa_10: str):
    """Table 2 of the paper stands beside the paper's networks, at 5 and 10 epochs, and beside no capture."""
    rows = table_rows(load_run(make_run(tmp_path, name=name)))
    figures = dict(zip([row[:2] for row in rows], column(rows, "paper top-1 %"), strict=True))
    assert figures["pretrained", ""] == pretrained
    assert figures["SWA (Alg. 1)", "5"] == swa_5
    assert figures["SWA (Alg. 1)", "10"] == swa_10
    assert figures["SWA (Alg. 1)", "2"] == ""
    assert {figure for (title, _), figure in figures.items() if title == "capture"} == {""}
    assert "Izmailov et al. 2018, Table 2" in write_report(tmp_path).read_text()


OTHER_RECIPES = ["resnet50.a1_in1k", "resnet50.IMAGENET1K_V2"]


@pytest.mark.parametrize("name", [*OTHER_RECIPES, "resnet18.tv_in1k", "resnet50d.ra2_in1k", "wide_resnet50_2.tv_in1k"])
def test_other_networks_have_no_paper_column(tmp_path: Path, name: str):
    """A network that the paper did not fine-tune has neither its numbers nor its citation in the report."""
    assert all(paper_figure(name, network, epoch) == "" for network in ("pretrained", "swa") for epoch in (0, 5, 10))
    text = write_report(make_run(tmp_path, name=name)).read_text()
    assert "paper" not in text


def test_other_data_sets_have_no_paper_column(tmp_path: Path):
    """The paper's network with other classes than ImageNet's has none of its figures, alone or among others."""
    assert paper_figure("resnet50", "swa", 10, num_classes=100) == ""
    folder = scripted(tmp_path / "a", random_answers(0), model={"name": "resnet50.tv_in1k", "num_classes": 100})
    assert "paper" not in write_report(folder).read_text()
    (network,) = many([folder], tmp_path / "out")["networks"]
    assert {level["paper"] for level in network["levels"]} == {None}


def test_table_2_is_the_papers():
    """The gains that the paper reports after ten epochs are 0.82, 0.63 and 0.79 points."""
    gains = {name: row["swa 10"][0] - row["pretrained"][0] for name, row in imagenet.PAPER_TABLE_2.items()}
    assert gains == pytest.approx({"resnet50": 0.82, "resnet152": 0.63, "densenet161": 0.79})


# --------------------------------------------------------------------------------------------------------- markdown


def test_markdown_holds_the_table(tmp_path: Path):
    """report.md's table has every column and every row, cell by cell."""
    rows = table_rows(load_run(make_run(tmp_path)))
    path = write_report(tmp_path)
    assert path == tmp_path / "report.md"
    assert parse_markdown(path.read_text()) == [list(COLUMNS), *map(list, rows)]


def test_empty_columns_are_left_out():
    """A column without a single value is no column; one value keeps it."""
    assert markdown_table(("a", "b", "c"), [("1", "", ""), ("2", "", "x")]) == "| a | c |\n| --- | ---: |\n| 1 |  |\n| 2 | x |"


def test_report_tells_how_it_was_made(tmp_path: Path):
    """The report names network, schedule, batch, seed, data, machine and versions."""
    text = write_report(make_run(tmp_path, seed=7, lr_max=1e-3, lr_min=1e-5)).read_text()
    for words in (
        "# resnet50.tv_in1k: 10 epochs of SWA fine-tuning",
        "50,000 validation images, each counted once",
        "cyclical, 0.001 to 1e-05, epochs per cycle: 1; global batch 256, seed 7",
        "NVIDIA H100, NVIDIA H100; processes: 2; torch 2.10.0, timm 1.0.20",
        "training images: 50,000, fingerprint trainfffffffffff;",
    ):
        assert words in text


@pytest.mark.parametrize("numbers", [(7, 7), (0, 7)], ids=["in all", "since a later evaluation"])
def test_images_left_out_are_told(tmp_path: Path, numbers: tuple[int, int]):
    """The report says how many validation images could not be decoded, in whichever evaluation, and nothing where all could."""
    results = [found | {"num_left_out": number} for found, number in zip(RESULTS, numbers, strict=False)]
    text = write_report(make_run(tmp_path / "some", results)).read_text()
    assert "**7 validation images were left out**: they cannot be decoded" in text
    assert "left out" not in write_report(make_run(tmp_path / "none")).read_text()
    none = [found | {"num_left_out": 0} for found in RESULTS]
    assert "left out" not in write_report(make_run(tmp_path / "zero", none)).read_text()


def test_trajectory(tmp_path: Path):
    """trajectory.png is a picture with the drawing in more than one colour."""
    write_report(make_run(tmp_path))
    with Image.open(tmp_path / "trajectory.png") as image:
        colors = image.convert("RGB").getcolors(2**24)
    assert colors is not None and len(colors) > 50


# ----------------------------------------------------------------------------------------------------- running runs


def test_report_of_a_run_in_progress(tmp_path: Path):
    """A live run, with only its baseline and half a line of metrics, already gives a report."""
    make_run(tmp_path, RESULTS[:1])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 1050, "l')
    run = load_run(tmp_path)
    assert len(run.metrics) == 20
    assert len(parse_markdown(write_report(tmp_path).read_text())) == 2
    (tmp_path / "metrics.jsonl").unlink()
    assert load_run(tmp_path).metrics == []


@pytest.mark.parametrize("name", ["config.yaml", "environment.json", "results.json"])
@pytest.mark.parametrize("damage", ["missing", "empty", "half", "binary", "folder"])
def test_a_folder_that_holds_no_run(tmp_path: Path, name: str, damage: str):
    """A missing, empty or damaged file of a run is named in one line."""
    path = make_run(tmp_path) / name
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        half = b"a: [1,\n  b: {" if name == "config.yaml" else content[: len(content) // 2]
        path.write_bytes({"empty": b"", "half": half, "binary": b"\xff\xfe\x00"}[damage])
    with pytest.raises(InputError) as caught:
        load_run(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_such_folder(tmp_path: Path):
    """A folder that is not there holds no run."""
    with pytest.raises(InputError, match=r"nowhere holds no evaluated run: .*nowhere/config.yaml is missing"):
        load_run(tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------------ many runs


def finished(folder: Path, seed: int, top1: tuple[float, float, float, float]) -> Path:
    """A finished run with these accuracies of pretrained, last capture, and the two averages, and worse ones earlier."""
    pretrained, capture, swa, captures_only = top1
    results = [result("pretrained", 0, pretrained), result("capture", 5, 0.1), result("swa", 5, 0.1)]
    results += [result("swa_without_pretrained", 5, 0.1), result("capture", 10, capture), result("swa", 10, swa)]
    return make_run(folder, [*results, result("swa_without_pretrained", 10, captures_only)], seed=seed)


def test_runs_side_by_side(tmp_path: Path):
    """Several runs get a row each, with final accuracies, and a row with numpy's mean and sample standard deviation."""
    random = np.random.default_rng(1)
    table = np.round(random.uniform(0.7, 0.8, (4, 4)), 4)
    table[0, 2] = table[0, 1] - 0.001  # one run whose average is worse than its last capture
    table[1:, 2] = table[1:, 1] + 0.0021
    runs = [finished(tmp_path / f"seed-{i}", i, tuple(row)) for i, row in enumerate(table)]
    *rows, last = compare_runs([load_run(run) for run in runs])
    difference = 100 * (table[:, 2] - table[:, 1])
    for i, row in enumerate(rows):
        assert row == (f"seed-{i}", str(i), *[f"{100 * value:.2f}" for value in table[i]], f"{difference[i]:+.2f}")
    numbers = np.column_stack([100 * table, difference])
    assert last[:2] == ("mean ± std; SWA ahead of its last capture in 3 of 4", "")
    told = np.array([cell.split(" ± ") for cell in last[2:]], float)
    np.testing.assert_allclose(told, np.column_stack([numbers.mean(0), numbers.std(0, ddof=1)]), atol=0.005 + 1e-9)
    assert {len(row) for row in (*rows, last)} == {len(RUN_COLUMNS)}


@pytest.mark.parametrize("left_out", ["pretrained", "capture", "swa", "swa_without_pretrained"])
def test_unfinished_runs_are_not_compared(tmp_path: Path, left_out: str):
    """A run without its final results is named and not averaged with others, whatever it had reached before."""
    runs = [finished(tmp_path / str(i), i, (0.7, 0.7, 0.7, 0.7)) for i in range(2)]
    results = json.loads((runs[1] / "results.json").read_text())
    kept = [r for r in results if not (r["name"] == left_out and r["epoch"] in (0, 10))]
    (runs[1] / "results.json").write_text(json.dumps(kept))
    with pytest.raises(InputError, match=f"{runs[1]} is not finished; wanted a result after epoch 10 for each of pretrained"):
        compare_runs([load_run(run) for run in runs])


def test_the_plotted_rates_are_those_of_training(tmp_path):
    """The curve agrees with every logged line and reaches the peak of each cycle, which the log lines miss."""
    config = parse_config([*QUICK_RUN, f"--output={tmp_path / 'run'}"], "", "")
    finetune(config)
    run = load_run(config.output)
    steps, rates = learning_rates(run)
    assert steps == list(range(1, 25))
    for line in run.metrics:
        if line["kind"] == "train":
            assert rates[line["step"] - 1] == line["lr"]
    assert max(rates) == rates[0] == rates[6] > max(line["lr"] for line in run.metrics if line["kind"] == "train")


# -------------------------------------------------------------------------------------- runs with answers to each image

NUM_IMAGES = 400
SWA_10 = {"num_epochs": 10, "report_epochs": (5, 10)}
SGD_20 = {"num_epochs": 20, "start_epoch": 20, "schedule": "three_part", "lr_max": 0.1, "lr_min": 0.001, "cycle_epochs": 5}
Answers = Mapping[tuple[str, int], np.ndarray]  # (name, epoch) -> whether each image is right


def scripted(folder: Path, answers: Answers, *, seed: int = 0, model: Any = None, swa: Any = None, **data: str) -> Path:
    """A finished run whose results and predictions say these answers."""
    folder.mkdir(parents=True, exist_ok=True)
    config = Config(model=ModelConfig(**(model or {})), swa=SwaConfig(**(swa or SWA_10)), seed=seed, output=folder)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_plain(config)))
    prints = {split: {"num_images": NUM_IMAGES, "fingerprint": data.get(split, split) + 64 * "0"} for split in ("train", "val")}
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT | {"data": prints}))
    results = []
    for (name, epoch), correct in answers.items():
        results.append(result(name, epoch, float(correct.mean())) | {"num_images": len(correct)})
        label = name if name == "pretrained" else f"{name.replace('_', '-')}-epoch-{epoch:02d}"
        write_predictions(folder / "predictions" / f"{label}.parquet", correct)
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def write_predictions(path: Path, correct: np.ndarray, indices: np.ndarray | None = None) -> None:
    """A file of predictions in shuffled rows: what is right names the label first, what is wrong another class."""
    path.parent.mkdir(exist_ok=True)
    labels = np.arange(len(correct)) * 7 % 10
    first = np.where(correct, labels, (labels + 1) % 10)
    order = np.random.default_rng(0).permutation(len(correct))
    top5 = [[int(a), int(a + 2) % 10] for a in first[order]]
    columns = {"index": (np.arange(len(correct)) if indices is None else indices)[order], "label": labels[order], "top5": top5}
    pq.write_table(pa.table(columns), path)


def random_answers(seed: int) -> dict[tuple[str, int], np.ndarray]:
    """A run's answers, right at these rates, where the hard images are hard for every network."""
    random = np.random.default_rng(seed)
    hardness = np.random.default_rng(99).uniform(size=NUM_IMAGES)
    wanted = {("pretrained", 0): 0.6, ("capture", 5): 0.62, ("capture", 10): 0.66, ("swa", 5): 0.7, ("swa", 10): 0.74}
    wanted |= {("swa_without_pretrained", 5): 0.71, ("swa_without_pretrained", 10): 0.75}
    return {key: hardness + random.normal(0, 0.1, NUM_IMAGES) < rate for key, rate in wanted.items()}


def sgd_answers(seed: int) -> dict[tuple[str, int], np.ndarray]:
    """The answers of a run of SGD alone, twenty epochs long."""
    right = random_answers(seed + 100)
    return {("capture", 15): right["pretrained", 0], ("capture", 20): right["swa", 5], ("pretrained", 20): right["swa", 5]}


def read(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


class Page(HTMLParser):
    """What a browser would make of a page: its text by element, and all that it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        if "style" not in self.open:
            self.text += data


def tables_of(text: str) -> list[list[list[str]]]:
    """The cells of all tables of a Markdown text."""
    blocks = [parse_markdown(part) for part in text.split("\n\n")]
    return [block for block in blocks if block]


# ------------------------------------------------------------------------------------------------- one run's gains


def test_gains_of_one_run(tmp_path: Path):
    """Gain, bootstrap interval and McNemar's p-value of a run's networks are those that numpy and SciPy find in its answers."""
    right = random_answers(1)
    write_report(scripted(tmp_path, right))
    pairs = [(("swa", 10), ("pretrained", 0)), (("capture", 10), ("pretrained", 0)), (("swa", 10), ("capture", 10))]
    gains = read(tmp_path)["gains"]
    assert [gain["label"].partition(":")[0] for gain in gains] == ["in all", "fine-tuning", "averaging"]
    for gain, (after, before) in zip(gains, pairs, strict=True):
        difference = right[after].astype(int) - right[before].astype(int)
        won, lost = int((difference == 1).sum()), int((difference == -1).sum())
        assert gain["values"] == [pytest.approx(100 * difference.mean())]
        (test,) = gain["mcnemar"]
        assert (test["num_won"], test["num_lost"]) == (won, lost)
        assert test["p_value"] == pytest.approx(stats.binomtest(won, won + lost).pvalue)
        error = 100 * difference.std() / np.sqrt(NUM_IMAGES)
        wanted = 100 * difference.mean() + 1.96 * error * np.array([-1, 1])
        assert [gain["over_images"]["low"], gain["over_images"]["high"]] == pytest.approx(wanted, abs=0.2 * error)
        assert gain["over_seeds"] is None
    assert gains[0]["mean"] == pytest.approx(gains[1]["mean"] + gains[2]["mean"])


def test_the_average_that_counts(tmp_path: Path):
    """Where the run leaves the average of the captures alone, its gains are that one's."""
    right = random_answers(1)
    write_report(scripted(tmp_path, right, swa=SWA_10 | {"include_pretrained": False}))
    wanted = 100 * (right["swa_without_pretrained", 10].mean() - right["pretrained", 0].mean())
    assert read(tmp_path)["gains"][0]["mean"] == pytest.approx(wanted)


def test_images_that_one_network_did_not_see(tmp_path: Path):
    """Networks are compared on the images that both of them saw, paired by number, not by row."""
    right = random_answers(2)
    folder = scripted(tmp_path, right)
    seen = np.delete(np.arange(NUM_IMAGES), [3, 50, 51])
    results = json.loads((folder / "results.json").read_text())
    for found in results:
        if (found["name"], found["epoch"]) == ("swa", 10):
            found |= {"num_images": len(seen), "top1": right["swa", 10][seen].mean()}
    (folder / "results.json").write_text(json.dumps(results))
    labels = seen * 7 % 10
    first = np.where(right["swa", 10][seen], labels, (labels + 1) % 10)
    table = pa.table({"index": seen, "label": labels, "top5": [[int(a)] for a in first]})
    pq.write_table(table, folder / "predictions" / "swa-epoch-10.parquet")
    write_report(folder)
    gain = read(folder)["gains"][0]
    assert gain["mcnemar"][0]["num_images"] == len(seen)
    assert gain["mean"] == pytest.approx(100 * (right["swa", 10][seen].mean() - right["pretrained", 0][seen].mean()))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "swa-epoch-10.parquet is missing"),
        (lambda path: path.write_bytes(b"PAR1"), "swa-epoch-10.parquet cannot be read"),
        (lambda path: write_predictions(path, np.zeros(NUM_IMAGES, bool)), "not of the same evaluation"),
    ],
    ids=["missing", "damaged", "of other weights"],
)
def test_a_report_without_predictions(tmp_path: Path, damage: Callable[[Path], None], words: str):
    """Predictions that are not there or not the result's are named in the report, which is written all the same."""
    folder = scripted(tmp_path, random_answers(3))
    damage(folder / "predictions" / "swa-epoch-10.parquet")
    text = write_report(folder).read_text()
    assert words in text
    assert len(parse_markdown(text)) == 8
    assert read(folder)["gains"] == []


# ------------------------------------------------------------------------------------------------- other kinds of runs


def test_report_of_sgd_alone(tmp_path: Path):
    """A run that averages nothing has its captures and its solution, called SGD, and no word of an average."""
    text = write_report(scripted(tmp_path, sgd_answers(1), swa=SGD_20)).read_text()
    assert "# resnet50.tv_in1k: 20 epochs of SGD" in text
    rows = parse_markdown(text)
    assert [row[:2] for row in rows[1:]] == [["SGD", "20"], ["capture", "15"], ["capture", "20"]]
    assert "gain, points" not in rows[0]
    assert "Alg. 1" not in text
    assert read(tmp_path)["gains"] == []


def test_report_of_training_from_scratch(tmp_path: Path):
    """Weights that the run itself made before averaging are SGD's, with their epoch, and gains are over them."""
    right = {(name, epoch + 20): answers for (name, epoch), answers in random_answers(4).items()}
    swa = {"num_epochs": 30, "start_epoch": 20, "report_epochs": (25, 30), "schedule": "constant", "lr_max": 0.1}
    text = write_report(scripted(tmp_path, right, swa=swa)).read_text()
    assert "# resnet50.tv_in1k: 30 epochs, averaged from epoch 20 on" in text
    assert ["SGD", "20"] in [row[:2] for row in parse_markdown(text)]
    assert "constant, 0.1 to" in text
    assert read(tmp_path)["gains"][0]["mean"] == pytest.approx(100 * (right["swa", 30].mean() - right["pretrained", 20].mean()))


def test_captures_within_an_epoch(tmp_path: Path):
    """A capture in the middle of an epoch stands at its fraction of the epoch and is found by its step."""
    right = random_answers(5)
    swa = {"num_epochs": 10, "report_epochs": (5, 10), "cycle_epochs": 1, "cycle_steps": 230}
    folder = scripted(tmp_path, right, swa=swa)
    results = json.loads((folder / "results.json").read_text())
    for found in results:
        if (found["name"], found["epoch"]) == ("capture", 10):
            found |= {"epoch": 9.2, "step": 920}  # the last multiple of 230 up to 1,000
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "predictions" / "capture-epoch-10.parquet").rename(folder / "predictions" / "capture-step-0000920.parquet")
    text = write_report(folder).read_text()
    assert ["capture", "9.20"] in [row[:2] for row in parse_markdown(text)]
    assert "steps per cycle: 230" in text
    averaging = read(folder)["gains"][2]
    assert averaging["mean"] == pytest.approx(100 * (right["swa", 10].mean() - right["capture", 10].mean()))
    assert compare_runs([load_run(folder)])[0][3] == f"{100 * right['capture', 10].mean():.2f}"


@pytest.mark.parametrize(
    ("swa", "rate"),
    [
        ({"schedule": "constant", "lr_max": 0.05, "lr_min": 0.0}, lambda _: 0.05),
        ({"cycle_epochs": 5, "lr_max": 0.1, "lr_min": 0.0}, lambda step: 0.1 * (1 - (step % 500 + 1) / 500)),
        (
            SGD_20 | {"num_epochs": 10, "start_epoch": 10},
            lambda step: np.interp(step, [0, 500, 900, 1000], [0.1, 0.1, 0.001, 0.001]),
        ),
    ],
    ids=["constant", "cyclical", "three parts"],
)
def test_rates_by_formula(tmp_path: Path, swa: dict[str, Any], rate: Callable[[int], float]):
    """The plotted rates are the schedule's formula at every step done."""
    steps, rates = learning_rates(load_run(make_run(tmp_path, **swa)))
    assert steps == list(range(1, 1001))
    assert rates == pytest.approx([rate(step) for step in range(1000)], abs=1e-12)


# ------------------------------------------------------------------------------------------------------- the page


def test_the_page_needs_nothing_else(tmp_path: Path):
    """report.html has the tables of report.md cell by cell, its pictures inside, and nothing to fetch."""
    path = write_report(scripted(tmp_path, random_answers(6)))
    text = (tmp_path / "report.html").read_text()
    found = Page(text)
    assert found.tables == tables_of(path.read_text())
    assert len(found.fetched) == 1
    assert all(address.startswith("data:image/png;base64,") for address in found.fetched)
    assert "http" not in text
    assert "prefers-color-scheme" in text or "color-scheme: light dark" in text


def test_names_are_text(tmp_path: Path):
    """Whatever a network is called, the page shows it and does not obey it, and a table keeps its cells."""
    name = "<script>alert('x')</script>|&amp;\"*"
    folder = scripted(tmp_path, random_answers(7), model={"name": name})
    path = write_report(folder)
    found = Page((folder / "report.html").read_text())
    assert name in found.text
    assert "<script" not in (folder / "report.html").read_text()
    runs = [load_run(folder), load_run(scripted(tmp_path / "b|<i>", random_answers(8), model={"name": name}, seed=1))]
    path = report_runs(runs, tmp_path / "out")
    found = Page((tmp_path / "out" / "report.html").read_text())
    assert found.tables[0][2][0] == "b|<i>"
    assert len({len(row) for row in found.tables[0]}) == 1
    assert "<i>" not in (tmp_path / "out" / "report.html").read_text() + path.read_text().partition("## Runs")[0]


def test_a_diverged_run_is_json(tmp_path: Path):
    """What is no number in a run's results is null in report.json, which no strict reader would take otherwise."""
    folder = scripted(tmp_path, random_answers(7))
    results = json.loads((folder / "results.json").read_text())
    results[1]["nll"], results[2]["nll"] = float("nan"), float("inf")
    (folder / "results.json").write_text(json.dumps(results))
    write_report(folder)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    found = json.loads((folder / "report.json").read_text(), parse_constant=refuse)
    assert [result["nll"] for result in found["results"][:4]] == [0.9, None, None, 0.9]


def test_markdown_is_read_back(tmp_path: Path):
    """What is written as Markdown is read as the same headings, tables, lists, pictures and texts."""
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    rows = Rows(("a", "b|c"), [("1", "x|y"), ("<2", "z")])
    blocks: list[Block] = [Paragraph("Some **text**."), rows, Bullets(["one", "two"]), Picture(tmp_path / "a.png", "a picture")]
    (tmp_path / "a.md").write_text(markdown(blocks, tmp_path))
    found = read_markdown(tmp_path / "a.md")
    assert found[0] == blocks[0]
    assert isinstance(found[1], Rows) and found[1].rows == rows.rows
    assert found[2:] == blocks[2:]
    text = Paragraph("**a** *b* `2 * c * d` <i> * e")
    html = page([Heading("t", 1), text])
    assert "<p><strong>a</strong> <em>b</em> <code>2 * c * d</code> &lt;i&gt; * e</p>" in html


# ------------------------------------------------------------------------------------------------ what analyses left


def test_analyses_are_in_the_page(tmp_path: Path):
    """Landscapes, the averages' table and the ensemble's, where they are, stand in the run's report with their pictures."""
    folder = scripted(tmp_path, random_answers(9))
    for name in ("landscape", "averages-table", "ensemble"):
        (folder / name).mkdir()
    point = {"train_loss": 0.123456, "test_error": 0.25, "norm": 12.5}
    centre = {"width": [1.0], "num": 1, "num_censored": 0, "mean": 1.25, "std": None, "lower_bound_of_mean": 1.25}
    widths = {"rise_of_test_error": 0.01, "centres": {"swa": centre}, "differences": []}
    record = {"points": {"swa": point}, "basis": "w + t d", "widths": widths}
    (folder / "landscape" / "rays.json").write_text(json.dumps(record))
    Image.new("RGB", (3, 3)).save(folder / "landscape" / "rays.png")
    (folder / "landscape" / "plane.json").write_text("{")
    (folder / "averages-table" / "averages.md").write_text(
        "# Averages\n\n| average | top-1 % |\n| --- | ---: |\n| LAWA | 70.00 |\n"
    )
    (folder / "ensemble" / "ensemble.md").write_text("# Ensemble\n\nFar apart.\n\n![accuracy](reliability.png)\n")
    Image.new("RGB", (3, 3)).save(folder / "ensemble" / "reliability.png")
    path = write_report(folder)
    found = Page((folder / "report.html").read_text())
    assert ["swa", "0.1235", "25.00", "12.5"] in [row for table in found.tables for row in table]
    assert [["average", "top-1 %"], ["LAWA", "70.00"]] in found.tables
    assert any("1.25" in row for table in found.tables for row in table)
    assert len(found.fetched) == 3
    for words in ("Along random directions", "Averages", "Ensemble", "Far apart.", "plane.json cannot be read"):
        assert words in found.text
    assert "![accuracy](ensemble/reliability.png)" in path.read_text()


# ---------------------------------------------------------------------------------------------- many runs: Table 2


def seeds(folder: Path, numbers: range = range(3), **how: Any) -> list[Path]:
    """Runs that differ in the seed only."""
    return [scripted(folder / f"swa-{seed}", random_answers(seed), seed=seed, **how) for seed in numbers]


def many(folders: list[Path], output: Path) -> dict[str, Any]:
    """The JSON of the report of these runs."""
    report_runs([load_run(folder) for folder in folders], output)
    return read(output)


def level(network: dict[str, Any], name: str, epoch: int) -> dict[str, Any]:
    (found,) = [level for level in network["levels"] if (level["network"], level["epoch"]) == (name, epoch)]
    return found


def test_table_2_over_seeds(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Means and standard deviations over seeds are numpy's, beside the paper's, and each network has its own row."""
    first, second = seeds(tmp_path / "a"), seeds(tmp_path / "b", model={"name": "resnet152.tv_in1k"})
    fifty, other = many([*first, *second], tmp_path / "out")["networks"]
    assert (fifty["name"], other["name"]) == ("resnet50.tv_in1k", "resnet152.tv_in1k")
    top1 = {key: [100 * random_answers(seed)[key].mean() for seed in range(3)] for key in random_answers(0)}
    for (name, epoch), values in top1.items():
        if (name, epoch) != ("capture", 5):
            found = level(fifty, name, epoch)
            assert found["values"] == pytest.approx(values)
            assert (found["mean"], found["std"]) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert level(fifty, "swa", 10)["paper"] == {"mean": 76.97, "std": 0.05}
    assert level(other, "swa", 5)["paper"] == {"mean": 78.82, "std": 0.01}
    text = (tmp_path / "out" / "report.md").read_text()
    (table,) = [table for table in tables_of(text) if table[0][0] == "network" and "pretrained" in table[0]]
    assert table[0] == ["network", "seeds", "pretrained", "SWA, 5 epochs", "SWA, 10 epochs", "gain, points"]
    swa = np.array(top1["swa", 10])
    assert table[1][4] == f"{swa.mean():.2f} ± {swa.std(ddof=1):.2f}"
    assert table[2] == ["the paper", "3", "76.15", "76.83 ± 0.01", "76.97 ± 0.05", "+0.82"]
    assert [row[0] for row in table[1:]] == ["resnet50.tv_in1k", "the paper", "resnet152.tv_in1k", "the paper"]
    assert "SWA ahead of its last capture in 3 of 3" in capsys.readouterr().out


def test_gains_over_seeds(tmp_path: Path):
    """The gain of several seeds: SciPy's t interval over seeds, the bootstrap of the mean over seeds per image, a test a seed."""
    (network,) = many(seeds(tmp_path / "a"), tmp_path / "out")["networks"]
    five, ten = network["gains"]
    assert (five["epoch"], ten["epoch"], ten["over"]) == (5, 10, "pretrained")
    right = [random_answers(seed) for seed in range(3)]
    difference = np.array([r["swa", 10].astype(int) - r["pretrained", 0].astype(int) for r in right])
    values = 100 * difference.mean(1)
    assert ten["values"] == pytest.approx(values)
    wanted = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert [ten["over_seeds"][end] for end in ("low", "high")] == pytest.approx(np.array(wanted))
    error = 100 * difference.mean(0).std() / np.sqrt(NUM_IMAGES)
    ends = [ten["over_images"][end] for end in ("low", "high")]
    assert ends == pytest.approx(values.mean() + 1.96 * error * np.array([-1, 1]), abs=0.2 * error)
    for test, row in zip(ten["mcnemar"], difference, strict=True):
        won, lost = int((row == 1).sum()), int((row == -1).sum())
        assert test["p_value"] == pytest.approx(stats.binomtest(won, won + lost).pvalue)
    parts = {part["part"]: part for part in network["decomposition"]}
    assert parts["fine-tuning"]["values"] == pytest.approx(
        [100 * (r["capture", 10].mean() - r["pretrained", 0].mean()) for r in right]
    )
    assert parts["averaging"]["values"] == pytest.approx([100 * (r["swa", 10].mean() - r["capture", 10].mean()) for r in right])
    assert parts["in all"]["mean"] == pytest.approx(parts["fine-tuning"]["mean"] + parts["averaging"]["mean"])


def test_the_average_that_counts_over_seeds(tmp_path: Path):
    """Where the runs leave the average of the captures alone, table, gain and decomposition are that one's."""
    (network,) = many(seeds(tmp_path / "a", swa=SWA_10 | {"include_pretrained": False}), tmp_path / "out")["networks"]
    right = [random_answers(seed) for seed in range(3)]
    swa = np.array([100 * r["swa_without_pretrained", 10].mean() for r in right])
    over = {name: swa - [100 * r[key].mean() for r in right] for name, key in (("p", ("pretrained", 0)), ("c", ("capture", 10)))}
    assert network["gains"][1]["values"] == pytest.approx(over["p"])
    parts = {part["part"]: part["values"] for part in network["decomposition"]}
    assert parts["averaging"] == pytest.approx(over["c"])
    assert parts["in all"] == pytest.approx(over["p"])
    assert f"{swa.mean():.2f} ± {swa.std(ddof=1):.2f} | {over['p'].mean():+.2f}" in (tmp_path / "out" / "report.md").read_text()


def test_one_run_of_each_network(tmp_path: Path):
    """Networks with a single seed have no spread and no interval over seeds, and their report is written."""
    runs = [*seeds(tmp_path / "a", range(1)), *seeds(tmp_path / "b", range(1), model={"name": "resnet18"})]
    for network in many(runs, tmp_path / "out")["networks"]:
        assert network["gains"][1]["over_seeds"] is None
        assert level(network, "swa", 10)["std"] is None
    cells = [cell for table in tables_of((tmp_path / "out" / "report.md").read_text()) for row in table for cell in row[1:]]
    assert [cell for cell in cells if "±" in cell] == ["76.83 ± 0.01", "76.97 ± 0.05"]  # the paper's


# ---------------------------------------------------------------------------------------------- many runs: Table 1

VGG = {"library": "imagenet_swa", "name": "vgg16", "num_classes": 10}


def table_1_runs(
    folder: Path, numbers: range = range(3), model: dict[str, Any] = VGG, **how: Any
) -> tuple[list[Path], list[Path]]:
    """Runs of SGD over a budget of 20 epochs, and runs of SWA from their weights after 15: 1 and 1.25 budgets."""
    sgd = [scripted(folder / f"sgd-{seed}", sgd_answers(seed), seed=seed, model=model, swa=SGD_20, **how) for seed in numbers]
    starts = [{"weights": path / "captures" / "epoch-15.safetensors"} for path in sgd]
    swa = [
        scripted(folder / f"swa-{seed}", random_answers(seed), seed=seed, model=model | start, **how)
        for seed, start in zip(numbers, starts, strict=True)
    ]
    return sgd, swa


def test_table_1_over_seeds(tmp_path: Path):
    """SGD over the full budget and SWA by budgets stand in one row, gains are over SGD of the same seed on the same images."""
    sgd, swa = table_1_runs(tmp_path)
    (network,) = many([*swa, *sgd], tmp_path / "out")["networks"]
    assert (network["budget_epochs"], network["seeds"], network["sgd_seeds"]) == (20, [0, 1, 2], [0, 1, 2])
    assert [gain["budgets"] for gain in network["gains"]] == [1.0, 1.25]
    for seed in range(3):
        before, after = sgd_answers(seed)["pretrained", 20], random_answers(seed)["swa", 10]
        assert network["gains"][1]["values"][seed] == pytest.approx(100 * (after.mean() - before.mean()))
    texts = [table for table in tables_of((tmp_path / "out" / "report.md").read_text()) if "SWA, 1 budget" in table[0]]
    ((header, row),) = texts
    assert header == ["network", "epochs of a budget", "seeds", "SGD", "SWA, 1 budget", "SWA, 1.25 budgets", "gain, points"]
    values = np.array([100 * sgd_answers(seed)["pretrained", 20].mean() for seed in range(3)])
    assert row[:4] == ["vgg16", "20", "3", f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"]


def test_what_sgd_and_the_budgets_are(tmp_path: Path):
    """The report says how long a budget is, where SWA starts and at which rates both go, and warns of shared runs of SGD."""
    sgd, swa = table_1_runs(tmp_path)
    many([*sgd, *swa], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "vgg16: one budget is 20 epochs. SGD: plain SGD for the whole budget, at the learning rate 0.1 to 0.001" in text
    assert "starts from such a run's weights after 15 epochs (0.75 budgets), goes on at the learning rate 0.001 to 1e-05" in text
    assert "not independent" not in text
    start = {"weights": sgd[0] / "captures" / "epoch-15.safetensors"}
    other = scripted(tmp_path / "swa-9", random_answers(9), seed=9, model=VGG | start)
    many([*sgd, *swa, other], tmp_path / "out")
    assert "Several runs of SWA share a run of SGD" in (tmp_path / "out" / "report.md").read_text()


def test_both_averages_have_their_gains(tmp_path: Path):
    """Beside Alg. 1's average the gains of the captures alone stand in the table, over the same runs of SGD."""
    sgd, swa = table_1_runs(tmp_path)
    (network,) = many([*sgd, *swa], tmp_path / "out")["networks"]
    right = [(random_answers(seed)["swa_without_pretrained", 10], sgd_answers(seed)["pretrained", 20]) for seed in range(3)]
    other = network["gains_of_other_average"][-1]
    assert other["of"] == "swa_without_pretrained"
    assert other["values"] == pytest.approx([100 * (after.mean() - before.mean()) for after, before in right])
    cells = [row[0] for table in tables_of((tmp_path / "out" / "report.md").read_text()) for row in table]
    assert "SWA (Alg. 1), 1.25 budgets - SGD" in cells
    assert "SWA, captures only, 1.25 budgets - SGD" in cells


def test_arguments_of_a_network_are_in_its_name(tmp_path: Path):
    """A quarter of a VGG is called that in every table; the order in which its arguments are written makes no other network."""
    _, runs = table_1_runs(tmp_path, range(2), model=VGG | {"kwargs": {"width": 0.25, "dropout": 0.1}})
    path = runs[1] / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["model"]["kwargs"] = {"dropout": 0.1, "width": 0.25}
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    (network,) = many(runs, tmp_path / "out")["networks"]
    assert network["name"] == "vgg16 (dropout 0.1, width 0.25)"
    assert network["seeds"] == [0, 1]


def test_analyses_of_runs_are_in_the_page_of_many(tmp_path: Path):
    """What one of many runs was analysed for stands in their report under that run's name, its picture by relative path."""
    sgd, swa = table_1_runs(tmp_path)
    (swa[1] / "ensemble").mkdir()
    (swa[1] / "ensemble" / "ensemble.md").write_text("# Ensemble\n\nFar apart.\n\n![accuracy](reliability.png)\n")
    Image.new("RGB", (3, 3)).save(swa[1] / "ensemble" / "reliability.png")
    many([*sgd, *swa], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## swa-1: what its analyses show\n\n### Ensemble" in text
    assert "![accuracy](../swa-1/ensemble/reliability.png)" in text
    assert "swa-0: what" not in text
    assert len(Page((tmp_path / "out" / "report.html").read_text()).fetched) == 3


def test_pairs_are_by_weights_then_by_seed(tmp_path: Path):
    """The run of SGD to compare with is the one whose weights a run started from; where none is given, that of its seed."""
    sgd, swa = table_1_runs(tmp_path)
    other = scripted(
        tmp_path / "swa-7", random_answers(7), seed=7, model=VGG | {"weights": sgd[2] / "captures/epoch-15.safetensors"}
    )
    moved = scripted(
        tmp_path / "swa-1", random_answers(1), seed=1, model=VGG | {"weights": "elsewhere/captures/epoch-15.safetensors"}
    )
    (network,) = many([*sgd, moved, swa[0], other], tmp_path / "out")["networks"]
    assert network["baselines"] == [str(sgd[0]), str(sgd[1]), str(sgd[2])]


def test_sgd_runs_alone(tmp_path: Path):
    """Runs of SGD alone have their mean and no gain."""
    sgd, _ = table_1_runs(tmp_path)
    (network,) = many(sgd, tmp_path / "out")["networks"]
    assert network["gains"] == network["decomposition"] == []
    values = [100 * sgd_answers(seed)["pretrained", 20].mean() for seed in range(3)]
    assert level(network, "sgd", 20)["values"] == pytest.approx(values)


def test_data_sets_have_their_own_tables(tmp_path: Path):
    """Networks with 10 and with 100 classes stand in two tables."""
    runs = []
    for classes in (10, 100):
        sgd, swa = table_1_runs(
            tmp_path / str(classes), model=VGG | {"num_classes": classes}, val=f"cifar-{classes}", train=f"c{classes}"
        )
        runs += [*sgd, *swa]
    assert [network["num_classes"] for network in many(runs, tmp_path / "out")["networks"]] == [10, 100]
    titles = re.findall(r"\*\*(\d+) classes, 400 images", (tmp_path / "out" / "report.md").read_text())
    assert titles == ["10", "100"]


def test_table_1_is_the_papers():
    """SGD's and SWA's last figures of the paper's Table 1, and none for variants, other images or other libraries."""
    ends = {key: (row["sgd"][0], row[1.5][0]) for key, row in PAPER_TABLE_1.items()}
    assert list(ends.values()) == [
        *[(72.55, 74.27), (78.49, 80.35), (80.82, 82.15), (83.41, 84.16)],
        *[(93.25, 93.64), (95.28, 95.83), (96.18, 96.79), (96.93, 97.12)],
    ]
    wide = {"library": "pytorchcv", "name": "wrn28_10_cifar100", "num_classes": 100, "kwargs": {}}
    assert table_1(wide, 10_000)[1.25] == (81.91, 0.27)
    assert table_1(VGG | {"kwargs": {"dropout": 0.5}}, 10_000)["sgd"] == (93.25, 0.16)
    for other in (
        wide | {"library": "timm"},
        VGG | {"name": "vgg16_bn"},
        VGG | {"kwargs": {"width": 0.25}},
        wide | {"num_classes": 10},
    ):
        assert table_1(other, 10_000) == {}
    assert table_1(wide, 5_000) == {}
    assert [nearest_quarter(b) for b in (150 / 150, 188 / 150, 2200 / 1800, 1.1, None)] == [1.0, 1.25, 1.25, 1.1, None]


# ---------------------------------------------------------------------------------------------- runs that do not go together


def test_runs_that_cannot_stand_together(tmp_path: Path):
    """Each mixture that would make a meaningless table is refused in one line that names the runs and the reason."""
    sgd, swa = table_1_runs(tmp_path / "cifar")
    runs = seeds(tmp_path / "imagenet")
    other_val = scripted(tmp_path / "other-val", random_answers(5), seed=5, val="other")
    other_train = scripted(tmp_path / "other-train", random_answers(5), seed=5, train="other")
    other_data = scripted(tmp_path / "other-data", random_answers(5), seed=5, val="other", model={"name": "resnet18"})
    hotter = scripted(tmp_path / "hotter", random_answers(5), seed=5, swa=SWA_10 | {"lr_max": 0.5})
    again = scripted(tmp_path / "again", random_answers(1), seed=1)
    later = VGG | {"weights": sgd[1] / "captures" / "epoch-20.safetensors"}
    unlike = scripted(tmp_path / "unlike", random_answers(1), seed=1, model=later)
    stranger = scripted(tmp_path / "stranger", random_answers(9), seed=9, model=VGG | {"weights": "x/epoch-15.safetensors"})

    def complaint(*folders: Path) -> str:
        return one_line(lambda: report_runs([load_run(folder) for folder in folders], tmp_path / "out"))

    assert "different validation images (fingerprints val" in complaint(runs[0], other_val)
    assert "different training images (fingerprints train" in complaint(runs[0], other_train)
    assert f"{runs[0]} and {other_data} have different validation images" in complaint(runs[0], other_data)
    assert f"{runs[0]} has swa.lr_max 0.001, {hotter} has 0.5" in complaint(hotter, runs[0])
    assert f"{runs[1]} and {again} are of the same network and seed, 1" in complaint(runs[0], runs[1], again)
    assert f"{runs[0]} is given twice" in complaint(runs[0], runs[1], runs[0])
    assert "start from SGD after different numbers of epochs" in complaint(*sgd, swa[0], unlike)
    assert f"{stranger} (seed 9) has no run of SGD to be compared with" in complaint(*sgd, stranger)
    assert not (tmp_path / "out").exists()


def test_what_many_runs_need(tmp_path: Path):
    """Unfinished runs, runs without predictions and damaged files are named in one line, and nothing is written."""
    first, second, third = seeds(tmp_path / "runs")
    (first / "predictions" / "swa-epoch-05.parquet").unlink()
    results = json.loads((second / "results.json").read_text())
    (second / "results.json").write_text(json.dumps([r for r in results if r["epoch"] < 10]))

    def complaint(*folders: Path) -> str:
        return one_line(lambda: report_runs([load_run(folder) for folder in folders], tmp_path / "out"))

    assert f"{second} is not finished; wanted a result after epoch 10" in complaint(third, second)
    assert f"{first}/predictions/swa-epoch-05.parquet is missing" in complaint(third, first)
    environment = json.loads((third / "environment.json").read_text())
    (third / "config.yaml").write_text("- no\n- mapping\n")
    assert f"{third}/config.yaml is not what a run writes" in complaint(third)
    (third / "config.yaml").write_text("{model: {}, swa: 3, seed: 1}")
    assert f"{third}/config.yaml is not what a run writes" in complaint(third)
    assert environment["data"]
    assert not (tmp_path / "out").exists()


def test_preprocessing_must_agree(tmp_path: Path):
    """Runs of one network that saw the same files in another size are not compared."""
    runs = seeds(tmp_path)
    for number, run in enumerate(runs):
        environment = json.loads((run / "environment.json").read_text())
        (run / "environment.json").write_text(json.dumps(environment | {"preprocessing": {"resize": 256 if number else 235}}))
    message = one_line(lambda: report_runs([load_run(run) for run in runs], tmp_path / "out"))
    assert "different preprocessing: resize 235 and 256" in message


def test_where_the_report_goes(tmp_path: Path):
    """The report goes beside the runs, into `report` of the folder that holds all of them, or where it is told to, never
    into a run or over a file.
    """
    first, second = seeds(tmp_path / "a"), seeds(tmp_path / "b" / "c", model={"name": "resnet18"})
    assert report_runs([load_run(run) for run in first]) == tmp_path / "a" / "report" / "report.md"
    assert report_runs([load_run(run) for run in first + second]) == tmp_path / "report" / "report.md"
    runs = [load_run(run) for run in first]
    for name in ("report.md", "report.html", "report.json", "gains.png", "trajectories-1.png", "trajectories-2.png"):
        assert (tmp_path / "report" / name).stat().st_size > 0
    assert "holds a run; choose another folder" in one_line(lambda: report_runs(runs, first[0]))
    (tmp_path / "file").write_text("")
    assert "is a file; choose another folder" in one_line(lambda: report_runs(runs, tmp_path / "file"))


# -------------------------------------------------------------------------------------------------- gains as a picture


def test_the_drawn_interval_is_no_longer_than_the_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The thick line of an interval over images ends where the interval does: no cap adds to it, and seeds have their dots."""
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    gain = {"label": "a - b", "mean": 0.1, "values": [0.0, 0.2], "over_seeds": {"low": -1.0, "high": 1.2}}
    plots.plot_gains([gain | {"over_images": {"low": -0.3, "high": 0.5}}], tmp_path / "gains.png")
    lines = {line.get_label(): line for line in drawn[0].axes[0].lines}
    assert {line.get_solid_capstyle() for name, line in lines.items() if str(name).startswith("95 %")} == {"butt"}
    wanted = {
        "95 % over images": [-0.3, 0.5],
        "95 % over seeds": [-1.0, 1.2],
        "each seed": [0.0, 0.2],
        "mean of the seeds": [0.1],
    }
    assert {name: np.asarray(lines[name].get_xdata()).tolist() for name in wanted} == wanted


def test_the_picture_of_all_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """SGD's solutions at the full budget have their own mark, averages start at SGD's epochs, and nothing of them is cut off."""
    drawn: list[Figure] = []
    sgd, swa = ([load_run(folder) for folder in folders] for folders in table_1_runs(tmp_path))
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    plots.plot_seeds(swa, sgd, 15, tmp_path / "seeds.png", title="a network")
    axes = drawn[0].axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert np.asarray(lines["SGD at its full budget"].get_xdata()).tolist() == [20]
    assert np.asarray(lines["SWA (Alg. 1)"].get_xdata()).tolist() == [15, 20, 25]
    assert np.asarray(lines["captures of SWA"].get_xdata()).tolist() == [20, 25]
    earlier = lines["SGD alone"].get_color()
    heights = [height for line in axes.lines if line.get_color() != earlier for height in np.atleast_1d(line.get_ydata())]
    assert axes.get_ylim()[0] < min(heights)
    assert axes.get_xlim()[0] < 15


# ------------------------------------------------------------------------------------------------- schedules as pictures


def test_the_pictures_schedules_are_those_of_the_recipes():
    """What is drawn as the paper's schedules has the very rates of the configurations that reproduce them."""
    recipes = {"Shake": "cifar10-shakeshake-swa", "Pyramid": "cifar100-pyramidnet272-swa", "FGE": "cifar100-preresnet164-fge"}
    for start, name in recipes.items():
        (drawn,) = [swa for title, swa in plots.PAPER_SCHEDULES.items() if title.startswith(start)]
        recipe = parse_config([f"--config={PROJECT / f'configs/cifar/{name}.yaml'}"], "", "").swa
        one, other = (make_schedule(swa, steps_per_epoch=10) for swa in (drawn, recipe))
        for step in range(0, 10 * drawn.num_epochs, 7):
            assert one.learning_rate(step) == pytest.approx(other.learning_rate(step), rel=1e-9), (name, step)


def test_the_picture_of_a_schedule():
    """Drawn are the rate of every step and the captures: averaged ones filled, earlier ones hollow."""
    swa = SwaConfig(num_epochs=6, start_epoch=2, cycle_epochs=2, lr_max=0.4, lr_min=0.1, report_epochs=())
    axes = Figure().subplots()
    draw_schedule(axes, swa, steps_per_epoch=5)
    (line,) = axes.lines
    steps = np.arange(1, 31)
    np.testing.assert_allclose(np.asarray(line.get_xdata()), steps)
    np.testing.assert_allclose(np.asarray(line.get_ydata()), 0.4 - 0.3 * ((steps - 1) % 10 + 1) / 10)
    averaged, before = (np.asarray(marks.get_offsets()) for marks in axes.collections)
    np.testing.assert_allclose(averaged, [[20, 0.1], [30, 0.1]])
    np.testing.assert_allclose(before, [[10, 0.1]])
    assert len(axes.collections[0].get_facecolor()) == 1
    assert len(axes.collections[1].get_facecolor()) == 0


def test_schedules_are_written(tmp_path: Path):
    """The picture of a configuration's schedule and that of all the paper's are pictures; an epoch without steps is refused."""
    plot_schedule(Config(), 100, tmp_path / "one.png")
    plot_paper_schedules(tmp_path / "all.png", steps_per_epoch=10)
    for name in ("one.png", "all.png"):
        with Image.open(tmp_path / name) as image:
            colors = image.convert("RGB").getcolors(2**24)
        assert colors is not None and len(colors) > 20
    assert "at least 1 step, got 0" in one_line(plot_schedule, Config(), 0, tmp_path / "none.png")
