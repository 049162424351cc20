"""The report against results made by hand: which numbers stand where, and what happens to folders that hold no run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import QUICK_RUN
from PIL import Image

from imagenet_swa.cli import parse_config
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
    table_rows,
    write_report,
)

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


@pytest.mark.parametrize("name", ["resnet18.tv_in1k", "resnet50d.ra2_in1k", "wide_resnet50_2.tv_in1k", "densenet121"])
def test_other_networks_have_no_paper_column(tmp_path: Path, name: str):
    """A network that the paper did not fine-tune has neither its numbers nor its citation in the report."""
    assert all(paper_figure(name, network, epoch) == "" for network in ("pretrained", "swa") for epoch in (0, 5, 10))
    text = write_report(make_run(tmp_path, name=name)).read_text()
    assert "paper" not in text


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
    assert last[:2] == ("mean ± std", "SWA ahead in 3 of 4")
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
