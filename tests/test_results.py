"""What a run has measured: kept up to a step, told once in metrics.jsonl whatever a kill came between."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imagenet_swa.config import Config
from imagenet_swa.evaluate import Evaluation
from imagenet_swa.outbox import Outbox
from imagenet_swa.records import Records
from imagenet_swa.results import Results, saved_results
from imagenet_swa.runtime import Runtime, start_runtime

pytestmark = pytest.mark.usefixtures("on_the_cpu")


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    return start_runtime(Config(output=tmp_path_factory.mktemp("runtime")))


def results(folder: Path, runtime: Runtime) -> Results:
    box = Outbox(max_failures=3, say=print, in_background=False)
    return Results(folder, runtime, Records(folder, runtime), box)


def evaluation(num_correct: int) -> Evaluation:
    """Ten images, of which so many are right."""
    labels, ranked = np.zeros(10, np.int64), np.ones((10, 2), np.int64)
    ranked[:num_correct, 0] = 0
    return Evaluation(np.arange(10), labels, ranked, np.full(10, -0.5))


def told(folder: Path) -> list[tuple[str, int]]:
    path = folder / "metrics.jsonl"
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else []
    return [(line["name"], line["step"]) for line in lines if line["kind"] == "evaluation"]


def test_what_is_added_is_written(tmp_path: Path, runtime: Runtime):
    """Results come back from results.json in their order; one of the same name and step replaces the old; predictions too."""
    found = results(tmp_path, runtime)
    found.add({"pretrained": (evaluation(3), "pretrained", 0, 0)})
    found.add({"swa": (evaluation(4), "swa-epoch-01", 6, 1), "capture": (evaluation(5), "capture-epoch-01", 6, 1)})
    found.add({"swa": (evaluation(6), "swa-epoch-01", 6, 1)})
    kept = [(r["name"], r["step"], r["num_correct"], r["top1"]) for r in saved_results(tmp_path)]
    assert kept == [("pretrained", 0, 3, 0.3), ("capture", 6, 5, 0.5), ("swa", 6, 6, 0.6)]
    assert found.has("swa") and found.has("swa", 6) and not found.has("swa", 5) and found.epochs_of("swa") == {1}
    assert len(pq.read_table(tmp_path / "predictions/capture-epoch-01.parquet")) == 10


def test_other_ranks_write_nothing(tmp_path: Path, runtime: Runtime):
    """Every rank knows the results, rank 0 alone writes them."""
    found = results(tmp_path, replace(runtime, rank=1))
    found.add({"swa": (evaluation(4), "swa-epoch-01", 6, 1)})
    assert found.has("swa", 6) and list(tmp_path.iterdir()) == []


@settings(max_examples=60, deadline=None)
@given(
    on_disk=st.sets(st.sampled_from([("capture", 6), ("swa", 6), ("capture", 12), ("swa", 12)])),
    logged=st.sets(st.sampled_from([("capture", 6), ("swa", 6), ("capture", 12), ("swa", 12)])),
    step=st.sampled_from([0, 6, 12]),
)
def test_told_once(
    tmp_path_factory: pytest.TempPathFactory,
    runtime: Runtime,
    on_disk: set[tuple[str, int]],
    logged: set[tuple[str, int]],
    step: int,
):
    """Whether a kill came before results.json or before the line of metrics: after the resume each result up to the step has one
    line, and an evaluation that is to be made again has none.
    """
    folder = tmp_path_factory.mktemp("results")
    summary = {"epoch": 1, "top1": 0.5}
    (folder / "results.json").write_text(json.dumps([{"name": n, "step": s, **summary} for n, s in sorted(on_disk)]))
    lines: list[dict[str, Any]] = [{"kind": "train", "step": s} for s in (6, 12)]
    lines += [{"kind": "evaluation", "step": s, "name": n, **summary} for n, s in sorted(logged)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = results(folder, runtime)
    found.restore(step)
    wanted = {(name, at) for name, at in on_disk if at <= step}
    assert sorted(told(folder)) == sorted(wanted)
    assert all(found.has(name, at) == ((name, at) in wanted) for name, at in on_disk | logged)


@pytest.mark.parametrize("content", ["[{", "[1]", '[{"step": 1}]', '{"a": 1}', "[" * 100_000, '[{"step": "x", "name": "swa"}]'])
def test_damaged(tmp_path: Path, content: str):
    """A damaged results.json counts as empty, with a warning that names it."""
    (tmp_path / "results.json").write_text(content)
    said: list[str] = []
    assert saved_results(tmp_path, said.append) == []
    assert said == [f"warning: {tmp_path / 'results.json'} is damaged; what can be evaluated again will be"]


def test_missing(tmp_path: Path):
    """Without results.json there are none, and nothing to warn of."""
    said: list[str] = []
    assert saved_results(tmp_path, said.append) == [] == said


@pytest.mark.parametrize(("swa", "warns"), [(6, False), (4, False), (2, True)])
def test_an_average_far_below_its_captures(
    tmp_path: Path, runtime: Runtime, capsys: pytest.CaptureFixture[str], swa: int, warns: bool
):
    """An average more than ten points below its last capture gets a diagnosis that names BatchNorm; another does not."""
    found = results(tmp_path, runtime)
    found.add({"capture": (evaluation(4), "capture", 6, 1), "swa": (evaluation(swa), "swa", 6, 1)})
    found.comment(Config(), None, 6, 10)  # pyright: ignore[reportArgumentType]  not looked at without a baseline
    assert ("BatchNorm statistics" in capsys.readouterr().err) == warns
