"""The ensemble of captures beside their average: norms, labels, calibration against plain numpy from logits; whole runs."""

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import QUICK_RUN, one_line, run_ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.special import logsumexp, softmax
from torch import nn

from imagenet_swa.analysis.answers import ENSEMBLE, Answers, Pass, ask, plan_passes, reliability
from imagenet_swa.analysis.ensemble import EnsembleSettings, compare, ensemble
from imagenet_swa.arguments import parse_config
from imagenet_swa.config import Config
from imagenet_swa.data.batch import Batch, ImageLoader, TooManyBadImagesError
from imagenet_swa.data.index import ImageIndex
from imagenet_swa.finetune import finetune
from imagenet_swa.models import Weights
from imagenet_swa.session import Session

pytestmark = pytest.mark.usefixtures("on_the_cpu")

NUM_IMAGES, NUM_CLASSES = 41, 5
NAMES = ("one", "two", "three")


# ------------------------------------------------------------------------- networks whose logits a test can compute


class Linear(nn.Module):
    """Logits from the mean colours of the image: small enough for numpy."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, NUM_CLASSES)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(10 * images.mean(dim=(2, 3)))


@pytest.fixture
def session(tmp_path: Path) -> Session:
    """A session of made-up images, its network replaced by the linear one."""
    flags = (f"--model.num_classes={NUM_CLASSES}", f"--data.synthetic_num_images=[16,{NUM_IMAGES}]", f"--output={tmp_path}")
    opened = Session.open(parse_config([*QUICK_RUN, *flags], "test", ""))
    return replace(opened, network=Linear())


def random_weights(seed: int, size: float = 3) -> Weights:
    random = torch.Generator().manual_seed(seed)
    shapes = {"head.weight": (NUM_CLASSES, 3), "head.bias": (NUM_CLASSES,)}
    return {name: size * torch.randn(shape, generator=random) for name, shape in shapes.items()}


def loads(**weights: Weights) -> dict[str, Callable[[], Weights]]:
    return {name: lambda tensors=tensors: tensors for name, tensors in weights.items()}


MEMBERS: dict[str, Weights] = dict(zip(NAMES, map(random_weights, range(3)), strict=True))
OTHERS = {"swa": random_weights(7), "swa_without_pretrained": random_weights(8)}


def silent(_line: str) -> None:
    pass


def answers_of(session: Session, members: dict[str, Weights], others: dict[str, Weights], networks_per_pass: int = 9) -> Answers:
    return ask(session, loads(**members), loads(**others), networks_per_pass=networks_per_pass, say=silent)


def logits_by_numpy(session: Session, weights: Weights) -> np.ndarray:
    """(N, classes) float64."""
    (batch,) = session.loaders.val.evaluation_stream([np.arange(NUM_IMAGES)])
    colours = 10 * batch.images.double().mean(dim=(2, 3)).numpy()
    return colours @ weights["head.weight"].double().numpy().T + weights["head.bias"].double().numpy()


def test_answers_are_those_of_numpy(session: Session):
    """Labels, confidences and log-probabilities of members, ensemble and others are those of the logits by numpy and SciPy."""
    got = answers_of(session, MEMBERS, OTHERS)
    logits = {name: logits_by_numpy(session, weights) for name, weights in (MEMBERS | OTHERS).items()}
    probabilities = {name: softmax(values, axis=1) for name, values in logits.items()}
    probabilities[ENSEMBLE] = np.mean([probabilities[name] for name in NAMES], axis=0)
    labels = np.arange(NUM_IMAGES) % NUM_CLASSES
    assert got.of.keys() == probabilities.keys()
    assert len({tuple(p.argmax(axis=1)) for p in probabilities.values()}) == len(probabilities), "all say the same: no test"
    for name, wanted in probabilities.items():
        answer = got.of[name]
        np.testing.assert_array_equal(answer.labels, labels)
        np.testing.assert_array_equal(answer.predicted, wanted.argmax(axis=1))
        np.testing.assert_allclose(answer.confidence, wanted.max(axis=1), rtol=1e-5)
        np.testing.assert_allclose(np.exp(answer.label_log_prob), wanted[np.arange(NUM_IMAGES), labels], rtol=1e-4)
        np.testing.assert_array_equal(answer.correct, wanted.argmax(axis=1) == labels)
        assert answer.nll == pytest.approx(-np.log(wanted[np.arange(NUM_IMAGES), labels]).mean(), rel=1e-5)
    pairs = [("one", "two"), ("two", "three"), (ENSEMBLE, "swa"), (ENSEMBLE, "swa_without_pretrained")]
    assert list(got.distances) == pairs
    for first, second in pairs:
        wanted = np.sqrt(((probabilities[first] - probabilities[second]) ** 2).sum(axis=1))
        np.testing.assert_allclose(got.distances[first, second], wanted, rtol=1e-4, atol=1e-7)
        same = probabilities[first].argmax(axis=1) == probabilities[second].argmax(axis=1)
        assert got.same_label(first, second) == same.mean()


def test_evaluation_agrees(session: Session):
    """Top-1 and NLL are those of `Session.evaluate`, the way that runs are evaluated."""
    got = answers_of(session, MEMBERS, OTHERS)
    networks = {name: session.network_with(weights) for name, weights in (MEMBERS | OTHERS).items()}
    for name, evaluation in session.evaluate(networks).items():
        assert int(got.of[name].correct.sum()) == evaluation.num_correct
        assert got.of[name].nll == pytest.approx(evaluation.nll, rel=1e-6)


@pytest.mark.parametrize("networks_per_pass", [1, 2, 3, 4])
def test_passes_change_nothing(session: Session, networks_per_pass: int):
    """However many networks share a pass, the answers are the same to the last bit."""
    whole, parts = answers_of(session, MEMBERS, OTHERS), answers_of(session, MEMBERS, OTHERS, networks_per_pass)
    assert (whole.num_passes, parts.num_passes) == (1, -(-5 // networks_per_pass))
    for name, answer in whole.of.items():
        for what, values in vars(answer).items():
            np.testing.assert_array_equal(values, vars(parts.of[name])[what], err_msg=f"{name} {what}")
    assert whole.distances.keys() == parts.distances.keys()
    for pair, values in whole.distances.items():
        np.testing.assert_array_equal(values, parts.distances[pair])


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(0, 3), st.integers(1, 10))
def test_every_network_has_one_pass(num_members: int, num_others: int, networks_per_pass: int):
    """Each network is in one pass, members before others, none fuller than allowed, and no pass more than needed."""
    members, others = [f"m{i}" for i in range(num_members)], [f"o{i}" for i in range(num_others)]
    passes = plan_passes(members, others, networks_per_pass)
    assert [name for these in passes for name in (*these.members, *these.others)] == members + others
    assert all(1 <= len(these.members) + len(these.others) <= networks_per_pass for these in passes)
    assert len(passes) == -(-(num_members + num_others) // networks_per_pass)
    assert plan_passes(["a", "b"], ["c"], 2) == [Pass(("a", "b"), ()), Pass((), ("c",))]


@dataclass(frozen=True)
class Bad:
    """A loader that cannot decode some images, and says so."""

    loader: ImageLoader
    bad: tuple[int, ...]

    @property
    def index(self) -> ImageIndex:
        return self.loader.index

    def evaluation_stream(self, batches: Iterable[np.ndarray]) -> Iterator[Batch]:
        for batch in self.loader.evaluation_stream(batches):
            good = ~np.isin(batch.indices, self.bad)
            left_out = tuple(int(i) for i in batch.indices[~good])
            kept = torch.from_numpy(good)
            yield Batch(batch.images[kept], batch.labels[kept], batch.indices[good], left_out)


def test_images_left_out_count_nowhere(session: Session):
    """Images that cannot be decoded, a whole batch of them too, are left out where they may be, and else are an error."""
    bad = (3, *range(32, NUM_IMAGES))
    whole = answers_of(session, MEMBERS, OTHERS)
    loaders = replace(session.loaders, val=Bad(session.loaders.val, bad))
    skipping = replace(session.config, data=replace(session.config.data, on_bad_image="skip"))
    got = answers_of(replace(session, loaders=loaders, config=skipping), MEMBERS, OTHERS, networks_per_pass=2)
    kept = np.setdiff1d(np.arange(NUM_IMAGES), bad)
    assert got.num_left_out == len(bad)
    for name, answer in got.of.items():
        for what, values in vars(answer).items():
            np.testing.assert_allclose(values, vars(whole.of[name])[what][kept], rtol=1e-5, err_msg=f"{name} {what}")
    for pair, values in got.distances.items():
        np.testing.assert_allclose(values, whole.distances[pair][kept], rtol=1e-4)
    with pytest.raises(TooManyBadImagesError, match="10 images"):
        answers_of(replace(session, loaders=loaders), MEMBERS, OTHERS)


# -------------------------------------------------------------------------------------------------------- identities


def test_ensemble_of_equal_networks_is_the_network(session: Session):
    """Equal members: the ensemble says what each says, at no distance."""
    same: dict[str, Weights] = dict.fromkeys(NAMES, MEMBERS["one"])
    got = answers_of(session, same, {"swa": MEMBERS["one"]})
    for values in got.distances.values():
        np.testing.assert_allclose(values, 0, atol=1e-15)
    member, together = got.of["one"], got.of[ENSEMBLE]
    np.testing.assert_array_equal(member.predicted, together.predicted)
    np.testing.assert_allclose(member.confidence, together.confidence, rtol=1e-14)
    np.testing.assert_allclose(member.label_log_prob, together.label_log_prob, atol=1e-13)
    assert got.same_label(ENSEMBLE, "swa") == 1


def test_ensemble_is_at_least_as_likely_as_its_members(session: Session):
    """Jensen: on every image the ensemble's NLL is at most the mean of its members'."""
    got = answers_of(session, MEMBERS, {})
    members = np.mean([got.of[name].label_log_prob for name in NAMES], axis=0)
    assert (got.of[ENSEMBLE].label_log_prob >= members - 1e-12).all()
    assert got.of[ENSEMBLE].nll < np.mean([got.of[name].nll for name in NAMES]) - 0.01


def test_probabilities_that_underflow(session: Session):
    """Members that give a label a probability below 1e-308 have a finite NLL, and so has their ensemble."""
    certain: dict[str, Weights] = {name: random_weights(seed, size=2000) for seed, name in enumerate(NAMES)}
    got = answers_of(session, certain, {})
    logits = [logits_by_numpy(session, weights) for weights in certain.values()]
    log_prob = [values - logsumexp(values, axis=1, keepdims=True) for values in logits]
    wanted = np.asarray(logsumexp(log_prob, axis=0))[np.arange(NUM_IMAGES), np.arange(NUM_IMAGES) % NUM_CLASSES] - np.log(3)
    assert wanted.min() < -800
    np.testing.assert_allclose(got.of[ENSEMBLE].label_log_prob, wanted, rtol=1e-3)


# -------------------------------------------------------------------------------------------------------- calibration


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(0.001, 1), st.booleans()), min_size=1, max_size=60), st.integers(1, 20))
def test_calibration_error_is_its_definition(images: list[tuple[float, bool]], num_bins: int):
    """The sum over bins of share times |accuracy - confidence|, bins being intervals open below and closed above."""
    confidence, correct = np.array([c for c, _ in images]), np.array([c for _, c in images])
    wanted, counts = 0.0, []
    for b in range(num_bins):
        inside = [i for i, (c, _) in enumerate(images) if b < c * num_bins <= b + 1]
        counts.append(len(inside))
        if inside:
            gap = sum(bool(correct[i]) for i in inside) / len(inside) - sum(confidence[i] for i in inside) / len(inside)
            wanted += len(inside) / len(images) * abs(gap)
    got = reliability(confidence, correct, num_bins)
    assert got.num_images.tolist() == counts
    assert got.expected_calibration_error == pytest.approx(wanted, abs=1e-12)


def test_calibration_by_hand():
    """Four images in two bins: |0.5 - 0.3| and |1 - 0.8|, half of the images each; a confidence of 1 is in the last bin."""
    got = reliability(np.array([0.2, 0.4, 0.6, 1.0]), np.array([True, False, True, True]), 2)
    assert got.num_images.tolist() == [2, 2]
    assert got.accuracy.tolist() == [0.5, 1.0]
    np.testing.assert_allclose(got.confidence, [0.3, 0.8])
    assert got.expected_calibration_error == pytest.approx(0.2)


def test_a_network_that_knows_its_odds_is_calibrated():
    """Of images with confidence 0.7, as many right as that: no error; all right: 0.3."""
    confidence = np.full(1000, 0.7)
    assert reliability(confidence, np.arange(1000) < 700).expected_calibration_error == pytest.approx(0, abs=1e-12)
    assert reliability(confidence, np.ones(1000, bool)).expected_calibration_error == pytest.approx(0.3)


def test_comparison_is_that_of_the_answers(session: Session):
    """Means over images and pairs, and gains with the sign that says who is better, are as numpy has them."""
    got = answers_of(session, MEMBERS, OTHERS)
    record = compare(got, list(NAMES), seed=0)
    pairs = [("one", "two"), ("two", "three")]
    assert [(p["first"], p["second"]) for p in record["consecutive"]["pairs"]] == pairs
    assert record["consecutive"]["mean_distance"] == pytest.approx(np.mean([got.distances[pair] for pair in pairs]))
    labels = [(got.of[a].predicted == got.of[b].predicted).mean() for a, b in pairs]
    assert record["consecutive"]["same_label"] == pytest.approx(np.mean(labels))
    assert record["consecutive"]["largest_same_label"] == max(labels)
    for name in OTHERS:
        assert record["ensemble_and"][name]["mean_distance"] == pytest.approx(got.distances[ENSEMBLE, name].mean())
    found = {(gain["of"], gain["over"]): gain for gain in record["gains"]}
    for (of, over), answers in {
        (ENSEMBLE, "swa"): (got.of[ENSEMBLE], got.of["swa"]),
        ("swa", "last capture"): (got.of["swa"], got.of["three"]),
    }.items():
        gain = found[of, over]
        assert gain["top1"]["mean"] == pytest.approx(answers[0].correct.mean() - answers[1].correct.mean())
        assert gain["nll"]["mean"] == pytest.approx(answers[0].nll - answers[1].nll)
        for kind in ("top1", "nll"):
            assert gain[kind]["low"] <= gain[kind]["mean"] <= gain[kind]["high"]
        assert gain["mcnemar"]["num_only_b"] == (answers[0].correct & ~answers[1].correct).sum()
    assert json.loads(json.dumps(record)) == record


# ---------------------------------------------------------------------------------------------------------- whole runs


def configure(output: Path, *flags: str) -> Config:
    return parse_config([*QUICK_RUN, f"--output={output}", *flags], "test", "")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three captures; no test changes it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    out = tmp_path_factory.mktemp("ensemble") / "run"
    finetune(configure(out, "--swa.num_epochs=3"))
    return out


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A run that a test may damage."""
    return shutil.copytree(finished, tmp_path / "run")


def compared(run: Path, *flags: str, **settings: Any) -> dict[str, Any]:
    """The record of the comparison."""
    path = ensemble(configure(run, "--swa.num_epochs=3", *flags), EnsembleSettings(**settings), silent)
    return json.loads(path.with_name("ensemble.json").read_text())


def test_networks_are_those_of_the_run(copied: Path):
    """Captures and averages get the very counts that the run itself found, and the files are there."""
    record = compared(copied)
    results = {(r["name"], r["epoch"]): r for r in json.loads((copied / "results.json").read_text())}
    networks = {network["name"]: network for network in record["networks"]}
    wanted = {f"epoch-{epoch:02d}": results["capture", epoch] for epoch in (1, 2, 3)}
    wanted |= {name: results[name, 3] for name in ("swa", "swa_without_pretrained")}
    assert networks.keys() == wanted.keys() | {ENSEMBLE}
    for name, result in wanted.items():
        assert networks[name]["num_correct"] == result["num_correct"]
        assert networks[name]["nll"] == pytest.approx(result["nll"], rel=1e-5)
    assert record["num_images"] == 40
    text = (copied / "ensemble" / "ensemble.md").read_text()
    for figure in ("0.126", "0.079", "87.33", "95.26", f"{networks[ENSEMBLE]['nll']:.4f}", "PreResNet-164"):
        assert figure in text
    assert (copied / "ensemble" / "reliability.png").read_bytes().startswith(b"\x89PNG")


def test_several_passes_of_a_run(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """A pass per network gives the same record, and says so; `output` is where it goes."""
    config, settings = configure(copied, "--swa.num_epochs=3"), EnsembleSettings(networks_per_pass=1, output=tmp_path / "other")
    path = ensemble(config, settings)
    assert path == tmp_path / "other" / "ensemble.md"
    assert "pass 5 of 5" in capsys.readouterr().out
    record, whole = json.loads(path.with_name("ensemble.json").read_text()), compared(copied)
    assert (record.pop("num_passes"), whole.pop("num_passes")) == (5, 1)
    assert record == whole


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def other_shapes(path: Path) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({name: torch.zeros(3) for name in load_file(path)}, path, metadata)


@pytest.mark.parametrize(
    ("file", "harm", "words"),
    [
        ("captures", shutil.rmtree, "of the 3 captures in the average 3 are missing"),
        ("captures/epoch-02.safetensors", Path.unlink, "not complete"),
        ("captures/epoch-03.safetensors", Path.unlink, "(number 3)"),
        ("captures/epoch-02.safetensors", damage, "epoch-02.safetensors"),
        ("captures/epoch-01.safetensors", other_shapes, "epoch-01.safetensors does not fit the network"),
        ("averages/swa-epoch-03.safetensors", Path.unlink, "swa-epoch-03.safetensors is missing"),
        ("averages/swa-without-pretrained-epoch-03.safetensors", damage, "is not a valid safetensors file"),
        ("pretrained.safetensors", Path.unlink, "pretrained.safetensors is missing"),
        ("results.json", Path.unlink, "not finished"),
        ("config.yaml", Path.unlink, "holds no run"),
    ],
)
def test_incomplete_runs(copied: Path, file: str, harm: Callable[[Path], None], words: str):
    """What is missing or damaged is named in one line, and nothing is written."""
    harm(copied / file)
    config = configure(copied, "--swa.num_epochs=3")
    assert words in one_line(ensemble, config, EnsembleSettings(), silent)
    assert not list(copied.glob("ensemble/*"))


def test_runs_without_an_ensemble(tmp_path: Path):
    """Plain SGD averages nothing, and one capture is no ensemble: one line each."""
    for name, flags, words in (
        ("sgd", ("--swa.num_epochs=1", "--swa.start_epoch=1"), "plain SGD"),
        ("one", ("--swa.num_epochs=1",), "has 1 capture, wanted at least 2"),
    ):
        config = configure(tmp_path / name, "--swa.report_epochs=[]", *flags)
        finetune(config)
        AcceleratorState._reset_state(reset_partial_state=True)
        assert words in one_line(ensemble, config, EnsembleSettings(), silent)


def test_settings_are_checked():
    """A pass needs a network."""
    assert "networks_per_pass" in one_line(lambda: EnsembleSettings(networks_per_pass=0))


def compare_as_rank(rank: int, folder: Path) -> None:
    """The comparison in one of two gloo ranks, into a folder of its own."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (folder / "port").read_text(), "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    settings = EnsembleSettings(networks_per_pass=2, output=folder / "two")
    ensemble(configure(folder / "run", "--swa.num_epochs=3"), settings, silent)


def test_two_ranks_give_the_record_of_one(copied: Path, tmp_path: Path):
    """Two processes share the images, each once, and find what one finds, through several passes."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    (tmp_path / "port").write_text(str(port))
    run_ranks(compare_as_rank, 2, tmp_path)
    two, one = json.loads((tmp_path / "two" / "ensemble.json").read_text()), compared(copied, networks_per_pass=2)
    assert one["num_images"] == two["num_images"] == 40
    for network, other in zip(one["networks"], two["networks"], strict=True):
        assert network["num_correct"] == other["num_correct"]
        assert network["nll"] == pytest.approx(other["nll"], rel=1e-5)
        assert network["expected_calibration_error"] == pytest.approx(other["expected_calibration_error"], abs=1e-5)
    assert one["consecutive"]["same_label"] == two["consecutive"]["same_label"]
    assert one["consecutive"]["mean_distance"] == pytest.approx(two["consecutive"]["mean_distance"], rel=1e-5)
    for name, pair in one["ensemble_and"].items():
        assert pair["mean_distance"] == pytest.approx(two["ensemble_and"][name]["mean_distance"], rel=1e-5)
