"""The table of averages of a finished run: weights against the run's own and numpy, scores against the run's own, its words."""

import json
import os
import shutil
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from conftest import QUICK_RUN, one_line, run_ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from imagenet_swa.analysis.averages import AveragesSettings, Scorer, averages
from imagenet_swa.analysis.captures import RunWeights
from imagenet_swa.analysis.significance import mcnemar, paired_bootstrap
from imagenet_swa.analysis.soups import Recipe, recipes_of
from imagenet_swa.arguments import parse_config
from imagenet_swa.batchnorm import recompute_statistics
from imagenet_swa.config import Config
from imagenet_swa.data.sampling import statistics_batches
from imagenet_swa.finetune import finetune
from imagenet_swa.models import Weights
from imagenet_swa.session import Session

pytestmark = pytest.mark.usefixtures("on_the_cpu")

NUM_CAPTURES = 4
TWO_EPOCHS = ("--swa.num_epochs=2", "--swa.report_epochs=[]")


def configure(output: Path, *flags: str) -> Config:
    return parse_config([*QUICK_RUN, f"--output={output}", *flags], "test", "")


def silent(_line: str) -> None:
    pass


def train(output: Path, *flags: str) -> Config:
    """The configuration of a finished run, as the command line hands it to an analysis: without the weights that it began with,
    which are not those of its seed.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(5)
    config = configure(output, *flags)
    start = output.parent / f"{output.name}-start.safetensors"
    save_file(timm.create_model(config.model.name, num_classes=10).state_dict(), start)
    finetune(replace(config, model=replace(config.model, weights=start)))
    AcceleratorState._reset_state(reset_partial_state=True)
    return config


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run of four captures that held images out; no test changes it."""
    return train(tmp_path_factory.mktemp("averages") / "run", "--data.num_held_out=24")


@pytest.fixture
def copied(finished: Config, tmp_path: Path) -> Config:
    """A run that a test may damage."""
    return replace(finished, output=shutil.copytree(finished.output, tmp_path / "run"))


def table(config: Config, folder: Path, **settings: Any) -> dict[str, Any]:
    """The record of the table, written to the folder."""
    path = averages(config, AveragesSettings(output=folder, **settings), silent)
    assert path == folder / "averages.md"
    return json.loads((folder / "averages.json").read_text())


@pytest.fixture(scope="module")
def tabled(finished: Config, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """The table of the finished run, and its folder."""
    AcceleratorState._reset_state(reset_partial_state=True)
    folder = tmp_path_factory.mktemp("table")
    return table(finished, folder), folder


def row_of(record: dict[str, Any], title: str) -> dict[str, Any]:
    return next(row for row in record["rows"] if title in (row["title"], *(other["title"] for other in row["also"])))


def capture_files(config: Config) -> list[Weights]:
    return [load_file(config.output / "captures" / f"epoch-{epoch:02d}.safetensors") for epoch in range(1, NUM_CAPTURES + 1)]


# ---------------------------------------------------------------------------------------------------------- weights


def scorer_of(config: Config) -> Scorer:
    return Scorer(Session.open(config), RunWeights.load(config.output), AveragesSettings(lawa_sizes=()), silent)


def mean_of(models: list[Weights], shares: Sequence[float], names: set[str]) -> Weights:
    """The named tensors' mean, the last model's others."""
    mean = {}
    for name in names:
        stacked = torch.stack([model[name].double() for model in models])
        mean[name] = torch.tensordot(torch.tensor(shares, dtype=torch.float64), stacked, 1).float()
    return {**models[-1], **mean}


def weights_by_title(scorer: Scorer, recipes: list[Recipe]) -> dict[str, Weights]:
    return {recipe.title: scorer.weights(recipe) for recipe in recipes}


def test_the_last_prefix_is_the_runs_average(finished: Config):
    """After all captures, with and without the pretrained weights, the parameters are the run's own averages, bit for bit."""
    made = weights_by_title(scorer := scorer_of(finished), recipes_of(NUM_CAPTURES))
    own = {
        "Alg. 1, 4": finished.output / "swa.safetensors",
        "captures only, 4": finished.output / "averages" / "swa-without-pretrained-epoch-04.safetensors",
    }
    parameters = [name for name, _ in scorer.session.network.named_parameters()]
    for title, path in own.items():
        kept = load_file(path)
        assert kept.keys() == made[title].keys()
        for name in parameters:
            assert torch.equal(kept[name], made[title][name]), (title, name)
    assert not torch.equal(made["Alg. 1, 4"][parameters[0]], made["captures only, 4"][parameters[0]])
    assert scorer.notes == []


def test_weights_are_means_by_numpy(finished: Config):
    """Each row's parameters are the mean of pretrained.safetensors and the captures by its shares; others are as they are."""
    recipes = recipes_of(NUM_CAPTURES, ema_decays=(0.7,), lawa_sizes=(3,), soup=(0, 2))
    scorer = scorer_of(finished)
    made = weights_by_title(scorer, [recipe for recipe in recipes if recipe.kind != "ensemble"])
    models = [load_file(finished.output / "pretrained.safetensors"), *capture_files(finished)]
    names = {name for name, _ in scorer.session.network.named_parameters()}
    shares = {
        "Alg. 1, 2": (1 / 3, 1 / 3, 1 / 3, 0, 0),
        "captures only, 3": (0, 1 / 3, 1 / 3, 1 / 3, 0),
        "EMA, decay 0.7": (0.7**4, 0.3 * 0.7**3, 0.3 * 0.7**2, 0.3 * 0.7, 0.3),
        "LAWA, last 3": (0, 0, 1 / 3, 1 / 3, 1 / 3),
        "greedy soup of 2": (0, 1 / 2, 0, 1 / 2, 0),
        "uniform soup": (0, 1 / 4, 1 / 4, 1 / 4, 1 / 4),
    }
    for title, parts in shares.items():
        for name in names:
            wanted = sum(part * model[name].double().numpy() for part, model in zip(parts, models, strict=True))
            np.testing.assert_allclose(made[title][name].numpy(), wanted, rtol=1e-6, atol=1e-7, err_msg=f"{title} {name}")
    for number, title in enumerate(["pretrained", *(f"capture {k}" for k in range(1, NUM_CAPTURES + 1))]):
        assert all(torch.equal(tensor, models[number][name]) for name, tensor in made[title].items())


def test_prefixes_in_any_order(finished: Config):
    """A prefix shorter than the one before it is its own average, not the longer one's."""
    scorer, recipes = scorer_of(finished), {recipe.title: recipe for recipe in recipes_of(NUM_CAPTURES)}
    first = scorer.weights(recipes["captures only, 2"])
    scorer.weights(recipes["captures only, 4"])
    again = scorer.weights(recipes["captures only, 2"])
    assert all(torch.equal(first[name], again[name]) for name in first)


# ----------------------------------------------------------------------------------------------------------- scores


def test_rows_are_the_networks_that_the_run_reported(finished: Config, tabled: tuple[dict[str, Any], Path]):
    """Pretrained, captures and the averages of all captures have the very numbers of the run's own results."""
    record, _ = tabled
    results = {(r["name"], r["epoch"]): r for r in json.loads((finished.output / "results.json").read_text())}
    titles = {("pretrained", 0): "pretrained", ("swa", 4): "Alg. 1, 4", ("swa_without_pretrained", 4): "captures only, 4"}
    titles |= {("capture", k): f"capture {k}" for k in range(1, NUM_CAPTURES + 1)}
    assert record["num_images"] == 40
    for key, title in titles.items():
        row = row_of(record, title)
        assert row["num_correct"] == results[key]["num_correct"], title
        assert row["nll"] == pytest.approx(results[key]["nll"], rel=1e-6), title


def test_every_average_has_its_own_statistics(finished: Config, tabled: tuple[dict[str, Any], Path]):
    """NLL of a prefix, EMA and LAWA are those of the weights loaded by hand, with BatchNorm recomputed for them alone."""
    record, _ = tabled
    session = Session.open(finished)
    recipes = {recipe.title: recipe for recipe in recipes_of(NUM_CAPTURES, ema_decays=(0.7,), lawa_sizes=(3,))}
    models = [load_file(finished.output / "pretrained.safetensors"), *capture_files(finished)]
    parameters = {name for name, _ in session.network.named_parameters()}
    (test,) = session.loaders.val.evaluation_stream([np.arange(40)])
    for title in ("Alg. 1, 2", "captures only, 1", "EMA, decay 0.7", "LAWA, last 3"):
        network = session.network_with(mean_of(models, recipes[title].shares, parameters))
        with torch.no_grad():
            unfit = network.eval()(test.images).log_softmax(1)
        batches = statistics_batches(72, seed=0, epoch=NUM_CAPTURES, rank=0, world_size=1, batch_size=16)
        stream = session.loaders.train.training_stream(batches, epoch=NUM_CAPTURES)
        recompute_statistics([network], (batch.images for batch in stream))
        with torch.no_grad():
            log_prob = network.eval()(test.images).log_softmax(1)
        nll = -float(log_prob.gather(1, test.labels[:, None]).mean())
        assert row_of(record, title)["nll"] == pytest.approx(nll, rel=1e-4), title
        assert abs(nll + float(unfit.gather(1, test.labels[:, None]).mean())) > 1e-3, "statistics do not matter: no test"
    assert record["num_batchnorm_images"] == len(session.indices[0]) == 72


def test_gains_are_those_of_the_predictions(finished: Config, tabled: tuple[dict[str, Any], Path]):
    """Gains over the pretrained network and the last capture, interval and p, are those of the run's saved predictions."""
    record, _ = tabled

    def correct(label: str) -> np.ndarray:
        saved = pq.read_table(finished.output / "predictions" / f"{label}.parquet").to_pydict()
        return np.array([top5[0] == label for top5, label in zip(saved["top5"], saved["label"], strict=True)])

    average, over = correct("swa-epoch-04"), {"over_pretrained": "pretrained", "over_last_capture": "capture-epoch-04"}
    row = row_of(record, "Alg. 1, 4")
    for key, label in over.items():
        assert row[key]["top1"]["mean"] == pytest.approx(average.mean() - correct(label).mean())
        interval = paired_bootstrap(average.astype(int) - correct(label), seed=0)
        assert (row[key]["top1"]["low"], row[key]["top1"]["high"]) == (interval.low, interval.high)
        assert row[key]["mcnemar"]["p_value"] == mcnemar(correct(label), average).p_value
    assert row_of(record, "pretrained")["over_pretrained"] is None
    assert row_of(record, "capture 4")["over_last_capture"] is None


def test_passes_change_nothing(finished: Config, tabled: tuple[dict[str, Any], Path], tmp_path: Path):
    """However many networks share a pass, the table is the same."""
    assert table(finished, tmp_path, networks_per_pass=3) == tabled[0]


def test_captures_of_the_ensemble_are_the_captures(finished: Config, tabled: tuple[dict[str, Any], Path], tmp_path: Path):
    """Without the ensemble's row all others are the same; its NLL is at most the captures' mean."""
    record, _ = tabled
    without = table(finished, tmp_path, ensemble=False)
    rows = {row["title"]: row for row in record["rows"]}
    ensemble = rows.pop("ensemble of 4")
    assert rows.keys() == {row["title"] for row in without["rows"]}
    for row in without["rows"]:
        assert row["num_correct"] == rows[row["title"]]["num_correct"]
        assert row["nll"] == pytest.approx(rows[row["title"]]["nll"], rel=1e-6)
    assert ensemble["nll"] <= np.mean([rows[f"capture {k}"]["nll"] for k in range(1, NUM_CAPTURES + 1)])


# --------------------------------------------------------------------------------------------------- the greedy soup


def test_greedy_soup_is_chosen_on_images_held_out(finished: Config, tabled: tuple[dict[str, Any], Path]):
    """Every trial's count is the soup's hits on the images held out, computed by hand; validation images have no say."""
    record, _ = tabled
    session = Session.open(finished)
    held_out = session.loaders.held_out
    assert held_out is not None and len(held_out.index) == 24
    (test,) = held_out.evaluation_stream([np.arange(24)])
    captures = capture_files(finished)
    parameters = {name for name, _ in session.network.named_parameters()}

    def hits(members: list[int]) -> int:
        shares = [(k in members) / len(members) for k in range(NUM_CAPTURES)]
        network = session.network_with(mean_of(captures, shares, parameters))
        batches = statistics_batches(72, seed=0, epoch=NUM_CAPTURES, rank=0, world_size=1, batch_size=16)
        stream = session.loaders.train.training_stream(batches, epoch=NUM_CAPTURES)
        recompute_statistics([network], (batch.images for batch in stream))
        with torch.no_grad():
            return int((network.eval()(test.images).argmax(1) == test.labels).sum())

    alone = [hits([k]) for k in range(NUM_CAPTURES)]
    order = sorted(range(NUM_CAPTURES), key=lambda k: (-alone[k], k))
    soup, best, wanted = [order[0]], alone[order[0]], [(order[0], alone[order[0]], True)]
    for k in order[1:]:
        score = hits(sorted([*soup, k]))
        wanted.append((k, score, score >= best))
        if score >= best:
            soup, best = [*soup, k], score
    got = [(trial["capture"], trial["num_correct"], trial["added"]) for trial in record["greedy_soup"]]
    assert got == [(f"epoch-{k + 1:02d}", score, added) for k, score, added in wanted]
    row = row_of(record, f"greedy soup of {len(soup)}")
    assert row["shares"] == [0, *(1 / len(soup) if k in soup else 0 for k in range(NUM_CAPTURES))]


def test_no_greedy_soup_without_images_held_out(tmp_path: Path):
    """Where nothing was held out there is no such row, and a line says why and how."""
    config = train(tmp_path / "run", *TWO_EPOCHS)
    record = table(config, tmp_path / "table")
    assert not any(row["title"].startswith("greedy") for row in record["rows"])
    (note,) = [note for note in record["notes"] if "greedy" in note]
    assert "held no training images out" in note and "data.num_held_out" in note
    assert note in (tmp_path / "table" / "averages.md").read_text()
    AcceleratorState._reset_state(reset_partial_state=True)
    quiet = table(config, tmp_path / "quiet", greedy=False)
    assert not any("greedy" in note for note in quiet["notes"])
    changed = replace(config, data=replace(config.data, num_held_out=16))
    message = one_line(averages, changed, AveragesSettings(), silent)
    assert "data.num_held_out is 16" in message and "trained with 0" in message


# ------------------------------------------------------------------------------------------------------------- words


def test_files_of_the_table(tabled: tuple[dict[str, Any], Path]):
    """Markdown has a line per row with its numbers, equal averages share one, and the plot is there."""
    record, folder = tabled
    text = (folder / "averages.md").read_text()
    for row in record["rows"]:
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {row['title']} ")]
        assert f"| {100 * row['top1']:.2f} | {row['nll']:.4f} |" in line
        if row["over_pretrained"] is not None:
            assert f"{100 * row['over_pretrained']['top1']['mean']:+.2f} [" in line
    assert "captures only, 4 = uniform soup" in text
    assert "No LAWA of the last 5: there are 4 captures." in text
    assert (folder / "averages.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in sorted(folder.iterdir())] == ["averages.json", "averages.md", "averages.png"]


def test_default_folder_and_what_is_said(copied: Config, capsys: pytest.CaptureFixture[str]):
    """The table goes into the run folder; lines on the way name the networks and the images."""
    path = averages(copied, AveragesSettings(ema_decays=(), lawa_sizes=(), ensemble=False))
    assert path == copied.output / "averages-table" / "averages.md"
    said = capsys.readouterr().out
    assert "24 held-out training images: epoch-" in said
    assert "evaluated on the validation images: pretrained; capture 1; " in said


def test_changed_captures_are_noticed(copied: Config, tmp_path: Path):
    """A capture with other numbers than when it was averaged is told from the run's average."""
    path = copied.output / "captures" / "epoch-02.safetensors"
    weights = load_file(path)
    weights["classifier.bias"] += 1
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(weights, path, metadata)
    record = table(copied, tmp_path / "table", greedy=False)
    assert any("do not average to swa.safetensors" in note for note in record["notes"])


def test_other_training_images_are_noticed(copied: Config, tmp_path: Path):
    """Where the training images are not the run's, a line says so, and no soup is chosen on who knows which images."""
    changed = replace(copied, data=replace(copied.data, synthetic_num_images=(90, 40)))
    record = table(changed, tmp_path / "table")
    assert any("another fingerprint" in note for note in record["notes"])
    assert any("No greedy soup" in note and "cannot be told" in note for note in record["notes"])
    assert record["greedy_soup"] == []


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("file", "harm", "words"),
    [
        ("captures", shutil.rmtree, "captures"),
        ("captures/epoch-03.safetensors", Path.unlink, "not complete"),
        ("captures/epoch-02.safetensors", damage, "epoch-02.safetensors"),
        ("pretrained.safetensors", Path.unlink, "pretrained.safetensors is missing"),
        ("swa.safetensors", Path.unlink, "swa.safetensors is missing"),
        ("environment.json", Path.unlink, "environment.json is missing"),
    ],
)
def test_incomplete_runs(copied: Config, file: str, harm: Callable[[Path], None], words: str):
    """What is missing or damaged is named in one line, and no table is written."""
    harm(copied.output / file)
    assert words in one_line(averages, copied, AveragesSettings(), silent)
    assert not list(copied.output.glob("averages-table/*"))


def test_output_that_cannot_be_made(copied: Config, tmp_path: Path):
    """A folder below a file is refused in one line, before any work."""
    (tmp_path / "file").touch()
    said: list[str] = []
    message = one_line(averages, copied, AveragesSettings(output=tmp_path / "file" / "table"), said.append)
    assert "cannot make the folder" in message and "averages.output" in message
    assert said == []


def test_a_run_of_plain_sgd_has_no_averages(tmp_path: Path):
    """One line says that the run averaged nothing."""
    config = train(tmp_path / "run", "--swa.num_epochs=1", "--swa.start_epoch=1", "--swa.report_epochs=[]")
    assert "plain SGD" in one_line(averages, config, AveragesSettings(), silent)


def test_one_capture_is_enough(tmp_path: Path):
    """The table of a single capture has its two averages, and no ensemble."""
    config = train(tmp_path / "run", "--swa.num_epochs=1", "--swa.report_epochs=[]")
    titles = [row["title"] for row in table(config, tmp_path / "table", ema_decays=(0.5,))["rows"]]
    assert titles == ["pretrained", "capture 1", "Alg. 1, 1", "captures only, 1"]  # an EMA of decay 1/2 is Alg. 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ema_decays": (0.5, 1.0)}, "ema_decays must be between 0 and 1, got 1"),
        ({"lawa_sizes": (0,)}, "lawa_sizes must be at least 1, got 0"),
        ({"num_batchnorm_images": 1}, "num_batchnorm_images must be at least 2, got 1"),
        ({"networks_per_pass": 0}, "networks_per_pass must be at least 1, got 0"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], words: str):
    """Values out of range are named with what is wanted."""
    assert words in one_line(lambda: AveragesSettings(**settings))


# ------------------------------------------------------------------------------------------------------------- ranks

GROUP_NORM = (*TWO_EPOCHS, "--model.name=test_efficientnet_gn", "--data.num_held_out=24")


def tabulate_as_rank(rank: int, folder: Path) -> None:
    """The table in one of two gloo ranks."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (folder / "port").read_text(), "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    averages(configure(folder / "run", *GROUP_NORM), AveragesSettings(output=folder / "two"), silent)


def test_two_ranks_give_the_table_of_one(tmp_path: Path):
    """Two processes share the images, each once, and find what one finds; the network has GroupNorm, since BatchNorm would be
    recomputed from batches of other images.
    """
    config = train(tmp_path / "run", *GROUP_NORM)
    with socket.create_server(("127.0.0.1", 0)) as server:
        (tmp_path / "port").write_text(str(server.getsockname()[1]))
    run_ranks(tabulate_as_rank, 2, tmp_path)
    two, one = json.loads((tmp_path / "two" / "averages.json").read_text()), table(config, tmp_path / "one")
    assert one["greedy_soup"] == two["greedy_soup"] != []
    assert one["num_batchnorm_images"] == 0
    for row, other in zip(one["rows"], two["rows"], strict=True):
        assert row["nll"] == pytest.approx(other.pop("nll"), rel=1e-5)
        assert {**other, "nll": row["nll"]} == row
