"""Landscapes of small runs: their points rebuilt by numpy, interrupted and shared out; their pictures; bad input."""

import json
import multiprocessing
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import QUICK_RUN, one_line, run_ranks
from matplotlib import pyplot
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from test_points import become_rank, choose_port

from imagenet_swa.analysis import landscape_plots
from imagenet_swa.analysis.landscape import LandscapeSettings, landscape
from imagenet_swa.analysis.points import MeasureSettings, recompute_statistics_alone
from imagenet_swa.analysis.vectors import random_direction
from imagenet_swa.arguments import parse_config
from imagenet_swa.config import Config, InputError
from imagenet_swa.finetune import finetune
from imagenet_swa.session import Session

pytestmark = pytest.mark.usefixtures("on_the_cpu")
QUICK = (
    "--data.synthetic_num_images=[48,40]",
    "--swa.report_epochs=[]",
    "--swa.num_epochs=3",
    "--evaluation.captures=false",
    "--swa.lr_max=0.01",
    "--swa.lr_min=0.001",
)
SGD = ("--swa.start_epoch=3", "--swa.schedule=constant", "--seed=1")
FEW = {"num_directions": 2, "num_steps": 3, "max_distance": 6.0}


def configure(output: Path, *flags: str) -> Config:
    return parse_config([*QUICK_RUN, *QUICK, f"--output={output}", *flags], "imagenet-swa train", "")


def analysed(output: Path) -> Config:
    """The configuration of an analysis: only the architecture is needed."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return configure(output)


@pytest.fixture(scope="module")
def swa_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs, a capture each."""
    folder = tmp_path_factory.mktemp("runs") / "swa"
    finetune(configure(folder))
    return folder


@pytest.fixture(scope="module")
def sgd_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain SGD of another seed."""
    folder = tmp_path_factory.mktemp("runs") / "sgd"
    AcceleratorState._reset_state(reset_partial_state=True)
    finetune(configure(folder, *SGD))
    return folder


def look(folder: Path, **settings: Any) -> dict[str, Any]:
    """The JSON of a landscape of the run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return json.loads(landscape(analysed(folder), LandscapeSettings(**settings), say=lambda _line: None).read_text())


@pytest.fixture(scope="module")
def rays(swa_run: Path, sgd_run: Path) -> dict[str, Any]:
    return look(swa_run, kind="rays", points=("swa", f"sgd={sgd_run}"), **FEW)


@pytest.fixture(scope="module")
def line(swa_run: Path) -> dict[str, Any]:
    return look(swa_run, kind="line", points=("swa", "last"), num_steps=4, margin=0.3)


@pytest.fixture(scope="module")
def plane(swa_run: Path, sgd_run: Path) -> dict[str, Any]:
    others = (f"sgd={sgd_run}", "epoch-01")
    return look(swa_run, kind="plane", points=("swa", "last", "pretrained"), others=others, num_steps=3)


@pytest.fixture(scope="module")
def session(swa_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Session:
    return Session.open(replace(analysed(swa_run), output=tmp_path_factory.mktemp("session")))


def vector(session: Session, weights: dict[str, torch.Tensor]) -> NDArray[np.float64]:
    """All parameters in a row, by numpy."""
    names = [name for name, _ in session.network.named_parameters()]
    return np.concatenate([weights[name].numpy().astype(np.float64).ravel() for name in names])


def measured_at(session: Session, at: NDArray[np.float64]) -> dict[str, float]:
    """The values of a vector: written into a network parameter by parameter, measured with a pass of its own."""
    network, position = session.network_with(session.network.state_dict()), 0
    with torch.no_grad():
        for parameter in network.parameters():
            part = at[position : position + parameter.numel()].astype(np.float32)
            parameter.copy_(torch.from_numpy(part.reshape(parameter.shape)))
            position += parameter.numel()
    recompute_statistics_alone(session, [network], MeasureSettings(epoch=3, step=9))
    test = session.evaluate({"": network})[""]
    train = session.evaluate({"": network}, split="train")[""]
    l2 = 1e-4 / 2 * float((at**2).sum())
    return {"test_error": 1 - test.num_correct / 40, "test_nll": test.nll, "train_loss": train.nll + l2}


def assert_measured(values: dict[str, float], expected: dict[str, float]) -> None:
    for key in expected:
        assert values[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-6), key


def test_other_images_are_told(swa_run: Path, tmp_path: Path):
    """Flags that lay other images over the run's are said aloud and stand in the JSON; the run's own are not remarked on."""
    AcceleratorState._reset_state(reset_partial_state=True)
    said: list[str] = []
    few = LandscapeSettings(kind="line", num_steps=2, margin=0, output=tmp_path)
    path = landscape(configure(swa_run, "--data.synthetic_num_images=[48,24]"), few, say=said.append)
    notes = json.loads(path.read_text())["notes"]
    assert [note[:45] for note in notes] == ["The validation images are not those of the ru"]
    assert notes[0] in said


def test_the_runs_own_images_need_no_word(line: dict[str, Any]):
    """Nothing is remarked on where the images are those of the run."""
    assert line["notes"] == []


# ------------------------------------------------------------------------------------------------------- the numbers


def test_the_ends_of_a_line_reproduce_the_run(swa_run: Path, line: dict[str, Any]):
    """At distance 0 stand the test error and NLL that the run itself reported of its average."""
    results = json.loads((swa_run / "results.json").read_text())
    swa = next(result for result in results if result["name"] == "swa")
    at = line["line"]["distance"].index(0.0)
    assert line["line"]["test_error"][at] == (40 - swa["num_correct"]) / 40
    assert line["line"]["test_nll"][at] == swa["nll"]


def test_a_line_is_measured_where_it_says(swa_run: Path, line: dict[str, Any], session: Session):
    """Points of the line are the average moved towards the last capture by the signed distance, both ends among them."""
    w1, w2 = (vector(session, load_file(swa_run / f)) for f in ("swa.safetensors", "captures/epoch-03.safetensors"))
    length = np.linalg.norm(w2 - w1)
    np.testing.assert_allclose(line["line"]["distance"], length * np.arange(-2, 7) / 4)
    assert line["distances"]["swa"]["last"] == pytest.approx(length)
    for i in (0, 3, 6, 8):
        at = w1 + line["line"]["distance"][i] * (w2 - w1) / length
        assert_measured({key: line["line"][key][i] for key in line["line"]}, measured_at(session, at))
    for end, i in (("swa", 2), ("last", 6)):
        assert {key: line["line"][key][i] for key in ("train_loss", "test_error")}.items() <= line["points"][end].items()


def test_rays_are_measured_where_they_say(swa_run: Path, sgd_run: Path, rays: dict[str, Any], session: Session):
    """Every ray is its centre plus distance times a unit vector, which is the same for each centre."""
    centres = {
        "swa": vector(session, load_file(swa_run / "swa.safetensors")),
        "sgd": vector(session, load_file(sgd_run / "pretrained.safetensors")),
    }
    assert rays["distance"] == [0.0, 2.0, 4.0, 6.0]
    for name, centre in centres.items():
        assert len(rays["rays"][name]) == 2
        for number, i in ((0, 0), (0, 1), (1, 1), (1, 3)):
            at = centre + rays["distance"][i] * random_direction(len(centre), seed=0, number=number).numpy()
            ray = rays["rays"][name][number]
            assert_measured({key: ray[key][i] for key in ray}, measured_at(session, at))
        assert rays["points"][name]["norm"] == pytest.approx(np.linalg.norm(centre))
    assert rays["distances"]["swa"]["sgd"] == pytest.approx(np.linalg.norm(centres["swa"] - centres["sgd"]))
    assert rays["rays"]["swa"][0]["train_loss"][1] != rays["rays"]["swa"][1]["train_loss"][1]


def test_the_widths_are_those_of_the_rays(rays: dict[str, Any]):
    """Each width is where numpy finds the first crossing of the ray's own test errors."""
    for name, of_centre in rays["rays"].items():
        for ray, found in zip(of_centre, rays["widths"]["centres"][name]["width"], strict=True):
            fine = np.linspace(0, 6, 600_001)
            above = np.interp(fine, rays["distance"], ray["test_error"]) > ray["test_error"][0] + 0.01 + 1e-12
            expected = fine[above.argmax()] if above.any() else None
            assert found == (None if expected is None else pytest.approx(expected, abs=2e-5))


def test_a_plane_is_measured_where_it_says(swa_run: Path, sgd_run: Path, plane: dict[str, Any], session: Session):
    """Grid points are w1 + x u + y v with numpy's basis, all points lie where it says, and the grid has room for them."""
    files = {
        "swa": swa_run / "swa.safetensors",
        "last": swa_run / "captures/epoch-03.safetensors",
        "pretrained": swa_run / "pretrained.safetensors",
        "sgd": sgd_run / "pretrained.safetensors",
        "epoch-01": swa_run / "captures/epoch-01.safetensors",
    }
    vectors = {name: vector(session, load_file(path)) for name, path in files.items()}
    w1 = vectors["swa"]
    q, r = np.linalg.qr(np.stack([vectors["last"] - w1, vectors["pretrained"] - w1], 1))
    q = q * np.sign(np.diag(r))
    for name, at in vectors.items():
        coordinates = q.T @ (at - w1)
        rest = np.linalg.norm(at - w1 - q @ coordinates)
        expected = {"x": coordinates[0], "y": coordinates[1], "distance_from_plane": rest}
        assert plane["places"][name] == pytest.approx(expected, abs=1e-6)
    for row, column in ((0, 0), (1, 2), (3, 1)):
        at = w1 + q @ np.array([plane["x"][column], plane["y"][row]])
        assert_measured({key: grid[row][column] for key, grid in plane["grid"].items()}, measured_at(session, at))
    for axis in ("x", "y"):
        places = [place[axis] for place in plane["places"].values()]
        assert min(plane[axis]) < min(places) and max(places) < max(plane[axis])
        assert len(plane[axis]) == 4


def test_the_record_says_what_it_is_of(rays: dict[str, Any], swa_run: Path, sgd_run: Path):
    """The JSON holds settings, environment, the conditions of measuring and which weights each point is."""
    assert rays["settings"]["num_directions"] == 2 and rays["settings"]["points"] == ["swa", f"sgd={sgd_run}"]
    assert rays["environment"]["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert rays["conditions"]["epoch"] == 3 and rays["conditions"]["step"] == 9
    assert rays["points"]["sgd"]["weights"] == f"sgd={sgd_run}"
    assert rays["coordinates"].startswith(f"{load_parameters(swa_run)} trainable parameters")


def load_parameters(folder: Path) -> int:
    weights = load_file(folder / "swa.safetensors")
    return sum(tensor.numel() for name, tensor in weights.items() if "running" not in name and "num_batches" not in name)


def test_more_steps_and_centres_take_up_what_is_there(swa_run: Path, tmp_path: Path, sgd_run: Path):
    """A finer grid, more directions and a further centre measure only what they add: points are known by what they are."""
    said: list[str] = []

    def ask(**changes: Any) -> None:
        settings = LandscapeSettings(**({"kind": "rays", "output": tmp_path, **FEW} | changes))
        landscape(analysed(swa_run), settings, said.append)

    ask()
    assert said[0] == "7 points to measure"
    for changes, expected in (
        ({"num_directions": 3}, "10 points, 7 of them measured before"),
        ({"num_steps": 6}, "13 points, 7 of them measured before"),
        ({"points": ("swa", f"sgd={sgd_run}")}, "14 points, 7 of them measured before"),
    ):
        said.clear()
        ask(**changes)
        assert said[0].startswith(expected)


def test_rays_reach_half_the_norm_by_default(swa_run: Path, session: Session, tmp_path: Path):
    """Without a distance, rays end at half the first centre's norm; where they end before the error rises, a line says so."""
    expected = np.linalg.norm(vector(session, load_file(swa_run / "swa.safetensors"))) / 2
    record = look(swa_run, num_directions=1, num_steps=2, output=tmp_path)
    assert record["distance"] == pytest.approx([0, expected / 2, expected])
    said: list[str] = []
    short = LandscapeSettings(num_directions=1, num_steps=2, max_distance=1e-6, output=tmp_path)
    landscape(analysed(swa_run), short, said.append)
    assert "1 widths lie beyond 1e-06; raise landscape.max_distance to see them" in said


# ------------------------------------------------------------------------------------- interrupted, on several ranks


def look_on_a_rank(rank: int, folder: Path, world_size: int = 2) -> None:
    """The rays of the folder's arguments, one point to a pass, in a process of their own."""
    become_rank(rank, folder, world_size)
    flags, settings = json.loads((folder / "arguments.json").read_text())
    config = parse_config(flags, "", "")
    landscape(config, LandscapeSettings(**settings | {"points": tuple(settings["points"]), "output": folder}))
    if world_size > 1:
        torch.distributed.destroy_process_group()


def test_killed_and_resumed_on_two_ranks(swa_run: Path, sgd_run: Path, rays: dict[str, Any], tmp_path: Path):
    """Killed in its middle and resumed by two ranks, a measurement ends with the numbers of an uninterrupted one, and what was
    done before the kill is not done again.
    """
    flags = [*QUICK_RUN, *QUICK, f"--output={swa_run}"]
    settings = {"points": ["swa", f"sgd={sgd_run}"], "networks_per_pass": 1, **FEW}
    (tmp_path / "arguments.json").write_text(json.dumps([flags, settings]))
    choose_port(tmp_path)
    journals = [tmp_path / f"points-rank-0{rank}.jsonl" for rank in range(2)]
    process = multiprocessing.get_context("forkserver").Process(target=look_on_a_rank, args=(0, tmp_path, 1))
    process.start()
    deadline = time.monotonic() + 150
    while num_lines(journals[0]) < 3 and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    before = journals[0].read_bytes()
    assert 3 <= before.count(b"\n") < 14, "the kill came too late or too early to show anything"
    assert not (tmp_path / "rays.json").exists()
    run_ranks(look_on_a_rank, 2, tmp_path)
    assert journals[0].read_bytes().startswith(before)
    assert min(map(num_lines, journals)) > 0
    assert sum(map(num_lines, journals)) == 14
    resumed = json.loads((tmp_path / "rays.json").read_text())
    for key in rays.keys() - {"settings", "environment"}:
        assert resumed[key] == rays[key], key
    assert resumed["environment"]["world_size"] == 2


def num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


# ------------------------------------------------------------------------------------------------------------ pictures


@pytest.mark.parametrize("kind", ["rays", "line", "plane"])
def test_each_landscape_has_its_picture(swa_run: Path, kind: str, request: pytest.FixtureRequest):
    """Beside KIND.json lies KIND.png, a picture below 150 kB."""
    request.getfixturevalue(kind)
    path = swa_run / "landscape" / f"{kind}.png"
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) >= 350
    assert path.stat().st_size < 150_000


def test_a_picture_of_rays_shows_each_direction_and_the_mean(rays: dict[str, Any]):
    """Either panel has a curve for each direction of each centre and one that is their mean, in per cent for errors."""
    figure = landscape_plots._draw_rays(rays, pyplot)
    for axes, (key, factor) in zip(figure.axes, (("train_loss", 1), ("test_error", 100)), strict=True):
        marked = [drawn for drawn in axes.lines if drawn.get_linestyle() == ":"]
        assert len(axes.lines) == 2 * 3 + len(marked)
        for centre, curves in (("swa", axes.lines[:3]), ("sgd", axes.lines[3:])):
            expected = factor * np.array([ray[key] for ray in rays["rays"][centre]])
            np.testing.assert_allclose([curve.get_ydata() for curve in curves[:2]], expected)
            np.testing.assert_allclose(curves[2].get_ydata(), expected.mean(0))
            assert len({curve.get_color() for curve in curves[:3]}) == 1
    pyplot.close(figure)


def test_a_picture_of_rays_marks_the_widths(rays: dict[str, Any]):
    """Where all rays of a centre have a width a dotted line of its colour stands at their mean; a censored one has none."""
    centres = {name: centre | {"num_censored": 0, "mean": 2.5} for name, centre in rays["widths"]["centres"].items()}
    centres["sgd"]["num_censored"] = 1
    figure = landscape_plots._draw_rays(rays | {"widths": rays["widths"] | {"centres": centres}}, pyplot)
    (mark,) = [drawn for drawn in figure.axes[1].lines if drawn.get_linestyle() == ":"]
    assert np.asarray(mark.get_xdata())[0] == 2.5
    assert mark.get_color() == figure.axes[1].lines[0].get_color()
    assert mark.get_label() == "swa: +1 point at 2.5"
    pyplot.close(figure)


def test_a_picture_of_a_line_marks_its_ends(line: dict[str, Any]):
    """Train loss and test error have an axis each, and both ends a mark on either curve."""
    figure = landscape_plots._draw_line(line, pyplot)
    for axes, (key, factor) in zip(figure.axes, (("train_loss", 1), ("test_error", 100)), strict=True):
        curve, *marks = [drawn for drawn in axes.lines if drawn.get_linestyle() != ":"]
        np.testing.assert_allclose(curve.get_ydata(), factor * np.array(line["line"][key]))
        ends = [(0.0, factor * line["points"]["swa"][key])]
        ends.append((line["distances"]["swa"]["last"], factor * line["points"]["last"][key]))
        np.testing.assert_allclose([(*mark.get_xdata(), *mark.get_ydata()) for mark in marks], ends)
    assert {text.get_text() for text in figure.axes[0].texts} == {"swa", "last"}
    pyplot.close(figure)


def test_a_picture_of_a_plane_names_the_points(plane: dict[str, Any]):
    """Both panels mark and name every point at its place, with a unit of the same length on both axes; how far the projected
    ones lie from the plane stands below.
    """
    figure = landscape_plots._draw_plane(plane, pyplot)
    for axes in figure.axes[:2]:
        marks = {(*mark.get_xdata(), *mark.get_ydata()) for mark in axes.lines}
        assert marks == {(place["x"], place["y"]) for place in plane["places"].values()}
        assert {text.get_text() for text in axes.texts} == {"swa", "last", "pretrained", "sgd", "epoch-01"}
        assert axes.get_aspect() == 1
    apart = ", ".join(f"{name} {plane['places'][name]['distance_from_plane']:.3g}" for name in ("sgd", "epoch-01"))
    assert figure.get_supxlabel().endswith(f"how far they lie from it: {apart}")
    pyplot.close(figure)


def test_contours_are_closest_near_the_minimum():
    """Levels rise from the lowest value, each step larger than the one before; infinite and missing values do not count."""
    values = np.random.default_rng(0).exponential(size=(20, 20))
    levels = landscape_plots.contour_levels(np.concatenate([values, [[np.inf, np.nan] * 10]]))
    assert levels[0] == values.min()
    assert levels[-1] == pytest.approx(np.quantile(values, 0.9))
    assert (np.diff(levels, 2) > 0).all()


@pytest.mark.parametrize("values", [np.zeros((3, 3)), np.full((3, 3), np.nan), np.array([[1.0, np.nan], [1.0, 1.0]])])
def test_contours_of_a_flat_landscape(values: NDArray[np.float64]):
    """Where all values are the same or none is finite, levels still rise, as the plot needs."""
    assert (np.diff(landscape_plots.contour_levels(values)) > 0).all()


def test_pictures_of_values_that_are_not_finite(rays: dict[str, Any], plane: dict[str, Any], tmp_path: Path):
    """A loss that overflowed far out, null in the JSON, leaves a gap in the curves and lies beyond all contours."""
    broken = json.loads(json.dumps(rays)), json.loads(json.dumps(plane))
    broken[0]["rays"]["swa"][1]["train_loss"][2:] = [None, None]
    broken[1]["grid"]["train_loss"][0] = [None] * 4
    for record in broken:
        landscape_plots.plot(record, tmp_path / "broken.png")
        assert (tmp_path / "broken.png").stat().st_size > 5000


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_directions": 0}, "num_directions must be at least 1, got 0"),
        ({"num_steps": 1}, "num_steps must be at least 2, got 1"),
        ({"max_distance": 0.0}, "max_distance must be positive, got 0.0"),
        ({"max_distance": -1.0}, "max_distance must be positive, got -1.0"),
        ({"max_distance": float("nan")}, "max_distance must be positive, got nan"),
        ({"max_distance": float("inf")}, "max_distance must be positive, got inf"),
        ({"margin": -0.1}, "margin must be 0 or more"),
        ({"direction_seed": -1}, "direction_seed must be 0 or more"),
        ({"num_train_images": 0}, "num_train_images must be at least 1"),
        ({"num_batchnorm_images": 1}, "num_batchnorm_images must be at least 2"),
        ({"networks_per_pass": 0}, "networks_per_pass must be at least 1"),
        ({"kind": "line", "points": ("swa",)}, "line wants 2 points, got 1"),
        ({"kind": "line", "points": ("swa", "last", "pretrained")}, "line wants 2 points, got 3"),
        ({"kind": "plane", "points": ("swa", "last")}, "plane wants 3 points, got 2"),
        ({"kind": "line", "others": ("last",)}, "others are projected onto a plane, kind is line"),
    ],
)
def test_settings_that_mean_nothing(settings: dict[str, Any], words: str):
    """Each setting out of its range is refused with its name and what it was."""
    assert words in one_line(lambda: LandscapeSettings(**settings))


def refused(folder: Path, **settings: Any) -> str:
    return one_line(landscape, analysed(folder), LandscapeSettings(**settings))


def test_points_that_span_nothing(swa_run: Path, tmp_path: Path):
    """Collinear points of a plane, the same weights twice and one name twice are refused before anything is measured."""
    output = tmp_path / "out"
    collinear = ("swa", "pretrained", "without-pretrained")  # Alg. 1's average lies between the other two
    assert "swa, pretrained, without-pretrained lie on a line" in refused(swa_run, kind="plane", points=collinear, output=output)
    assert "last and epoch-03 are the same" in refused(swa_run, kind="line", points=("last", "epoch-03"), output=output)
    assert "2 points are called swa" in refused(swa_run, kind="line", points=("swa", "swa=last"), output=output)
    assert not output.exists()


def test_runs_that_cannot_be_looked_at(swa_run: Path, tmp_path: Path):
    """An unfinished run, no run, a name of nothing and missing captures are one line each."""
    assert "holds no run" in refused(tmp_path / "nowhere")
    assert "unknown weights 'sgd'" in refused(swa_run, points=("sgd",))
    copied = shutil.copytree(swa_run, tmp_path / "run")
    (copied / "captures" / "epoch-02.safetensors").unlink()
    assert "captures is not complete" in refused(copied, kind="line", points=("swa", "last"))
    (copied / "swa.safetensors").unlink()
    assert "not finished" in refused(copied)


def test_weights_of_another_network(swa_run: Path, tmp_path: Path):
    """A run of another network as a point is named with the first difference."""
    other = tmp_path / "other"
    AcceleratorState._reset_state(reset_partial_state=True)
    finetune(configure(other, "--model.name=test_resnet", "--swa.num_epochs=1"))
    assert "does not fit the network" in (text := refused(swa_run, points=("swa", f"other={other}"))) and str(other) in text


def test_every_default_is_a_landscape():
    """Each kind says by itself which points it takes, as many as it needs."""
    counts: dict[str, Callable[[int], bool]] = {"rays": lambda n: n >= 1, "line": lambda n: n == 2, "plane": lambda n: n == 3}
    for kind, fits in counts.items():
        assert fits(len(LandscapeSettings(kind=kind).specs))  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError):
        LandscapeSettings(kind="plane", points=("swa",))
