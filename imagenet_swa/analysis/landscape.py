"""The loss around the weights of a finished run: along random rays (Fig. 4), a line (Fig. 5), over a plane (Figs. 1 and 3)."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from imagenet_swa.analysis import landscape_plots
from imagenet_swa.analysis.captures import RunWeights, check_spec, weights_of
from imagenet_swa.analysis.points import MeasureSettings, Point, Values, conditions_of, measure_points
from imagenet_swa.analysis.vectors import (
    Coordinates,
    Plane,
    check_different,
    digest,
    distance,
    norm,
    on_line,
    random_direction,
)
from imagenet_swa.analysis.widths import COLUMNS, summarise, table_rows, width
from imagenet_swa.config import Config, require, to_plain
from imagenet_swa.files import write_atomically
from imagenet_swa.models import Weights
from imagenet_swa.report import print_table
from imagenet_swa.runtime import environment_record
from imagenet_swa.session import Session

Kind = Literal["rays", "line", "plane"]
MEASURED = ("train_loss", "train_nll", "l2", "train_error", "test_error", "test_nll")
_DEFAULT_POINTS = {"rays": ("swa",), "line": ("swa", "last"), "plane": ("swa", "last", "pretrained")}
_DEFAULT_REACH = 0.5  # of rays, as a share of the centre's norm


@dataclass(frozen=True, kw_only=True)
class LandscapeSettings:
    """Where to look at the loss around the weights of a run, and how closely"""

    kind: Kind = "rays"
    """rays: from each point along random directions; line: through two points; plane: through three."""
    points: tuple[str, ...] = ()
    """Which weights: swa, pretrained, last (capture), epoch-07 or step-0000123 (a capture), without-pretrained,
    NAME=FILE.safetensors, or NAME=RUN (the solution of another run, such as one of plain SGD). Default: rays from swa, the line
    from swa to last, the plane through swa, last and pretrained."""
    others: tuple[str, ...] = ()
    """plane: further weights, projected onto it."""
    num_directions: int = 10
    """rays: number of random directions, the same from each point."""
    direction_seed: int = 0
    """rays: decides the directions."""
    max_distance: float | None = None
    """rays: how far they go in weight space; default: half the norm of the first point."""
    num_steps: int = 20
    """Intervals along a ray, between the two points of a line, and along each side of a plane."""
    margin: float = 0.25
    """line, plane: how far beyond the points, as a share of their distance or of the longer side."""
    num_train_images: int | None = None
    """Training images for the train loss, a random choice; default: all."""
    num_batchnorm_images: int | None = None
    """Training images for the BatchNorm statistics of each point; default: as many as the run took for its average."""
    networks_per_pass: int | None = None
    """Points that share a pass over the images; default: as many as fit into a quarter of the free memory, at most 16."""
    output: Path | None = None
    """Folder of the results; default: landscape in the run's folder."""

    def __post_init__(self) -> None:
        least, most = {"rays": (1, 1000), "line": (2, 2), "plane": (3, 3)}[self.kind]
        wanted = "at least one point" if self.kind == "rays" else f"{least} points"
        num = len(self.points)
        require(num == 0 or least <= num <= most, f"landscape.points: {self.kind} wants {wanted}, got {num}")
        require(self.kind == "plane" or not self.others, f"landscape.others are projected onto a plane, kind is {self.kind}")
        require(self.num_directions >= 1, f"landscape.num_directions must be at least 1, got {self.num_directions}")
        require(0 <= self.direction_seed < 2**63, f"landscape.direction_seed must be 0 or more, got {self.direction_seed}")
        reach = self.max_distance
        require(reach is None or 0 < reach < math.inf, f"landscape.max_distance must be positive, got {reach}")
        require(self.num_steps >= 2, f"landscape.num_steps must be at least 2, got {self.num_steps}")
        require(0 <= self.margin < math.inf, f"landscape.margin must be 0 or more, got {self.margin}")
        for name, lowest in (("num_train_images", 1), ("num_batchnorm_images", 2), ("networks_per_pass", 1)):
            value = getattr(self, name)
            require(value is None or value >= lowest, f"landscape.{name} must be at least {lowest}, got {value}")

    @property
    def specs(self) -> tuple[str, ...]:
        """The points that the landscape is spanned by."""
        return self.points or _DEFAULT_POINTS[self.kind]


@dataclass(frozen=True)
class Given:
    """Weights that the user named, and the `sha` of them."""

    name: str
    spec: str
    weights: Weights
    coordinates: Coordinates
    sha: str

    @property
    def vector(self) -> torch.Tensor:
        """(n,) float64, made anew each time: kept, those of ten large networks would fill the memory of a machine's ranks."""
        return self.coordinates.flatten(self.weights)


@dataclass(frozen=True)
class Plan:
    """Which points a landscape wants, and how their values by name become what is special in its JSON."""

    points: list[Point]
    record: Callable[[Mapping[str, Values]], dict[str, Any]]


def landscape(config: Config, settings: LandscapeSettings, say: Callable[[str], None] = print) -> Path:
    """Measure a landscape of the run in `config.output`; write KIND.json and KIND.png and return the path of the former.

    Raises:
        InputError: the run is not finished, weights that there are not or of another network, points that span nothing.
    """
    run = RunWeights.load(config.output)
    names = [check_spec(run, spec) for spec in (*settings.specs, *settings.others)]
    repeated = [name for name in names if names.count(name) > 1]
    require(not repeated, f"landscape: {len(repeated)} points are called {''.join(repeated[:1])}; give them other names by NAME=")
    session = Session.open(config)
    coordinates = Coordinates.of(session.network)
    given = [_given(run, spec, session, coordinates) for spec in (*settings.specs, *settings.others)]
    plan = {"rays": _plan_rays, "line": _plan_line, "plane": _plan_plane}[settings.kind](given, settings, coordinates)
    folder = settings.output or config.output / "landscape"
    measure, notes = _how_to_measure(run, config, settings), _notes(run, session)
    say_once = say if session.runtime.is_main else _silently
    for note in notes:
        say_once(note)
    values = measure_points(session, [*map(_at, given), *plan.points], journal=folder, settings=measure, say=say_once)
    path = folder / f"{settings.kind}.json"
    if session.runtime.is_main:
        record = {
            "kind": settings.kind,
            "run": str(config.output),
            "settings": to_plain(settings),
            "environment": environment_record(session.runtime, config),
            "conditions": conditions_of(session, measure),
            "notes": notes,
            "coordinates": f"{coordinates.num} trainable parameters in {len(coordinates.shapes)} tensors, no buffers",
            "points": {g.name: _about(g, values[g.name]) for g in given},
            "distances": _distances(given),
            **plan.record(values),
        }
        write_atomically(path, json.dumps(_sayable(record), indent=1))
        landscape_plots.plot(json.loads(path.read_text()), path.with_suffix(".png"))
        _tell(record, path, say)
    session.runtime.barrier()
    return path


def _notes(run: RunWeights, session: Session) -> list[str]:
    """What a reader has to know where flags laid over the run's configuration show other images than the run has seen."""
    words = {"train": "training", "val": "validation"}
    return [
        f"The {words[split]} images are not those of the run (another fingerprint): compare with no figure of the run."
        for split, index in zip(words, session.indices, strict=True)
        if run.fingerprints.get(split) not in (None, index.fingerprint)
    ]


def _given(run: RunWeights, spec: str, session: Session, coordinates: Coordinates) -> Given:
    name, weights = weights_of(run, spec, session.network)
    return Given(name, spec, weights, coordinates, digest(weights))


def _distances(given: Sequence[Given]) -> dict[str, dict[str, float]]:
    found = {g.name: dict.fromkeys([g.name for g in given], 0.0) for g in given}
    for i, a in enumerate(given):
        vector = a.vector
        for b in given[i + 1 :]:
            found[a.name][b.name] = found[b.name][a.name] = distance(vector, b.vector)
    return found


def _at(given: Given) -> Point:
    """The very weights that were given."""
    return Point(given.name, {"weights": given.sha}, lambda: given.weights)


def _how_to_measure(run: RunWeights, config: Config, settings: LandscapeSettings) -> MeasureSettings:
    """As the run measured its own average: the same crops and the same number of images for BatchNorm."""
    return MeasureSettings(
        epoch=run.config["swa"]["num_epochs"],
        step=run.last_result["step"],
        num_batchnorm_images=settings.num_batchnorm_images or config.batchnorm.num_images,
        num_train_images=settings.num_train_images,
        networks_per_pass=settings.networks_per_pass,
    )


# ----------------------------------------------------------------------------------------------- rays, line, plane


def _plan_rays(given: Sequence[Given], settings: LandscapeSettings, coordinates: Coordinates) -> Plan:
    """w + t d from each w along the same random unit vectors d."""
    reach = settings.max_distance or _DEFAULT_REACH * norm(given[0].vector)
    distances = [reach * i / settings.num_steps for i in range(settings.num_steps + 1)]
    directions = range(settings.num_directions)

    def name(centre: Given, number: int, i: int) -> str:
        return f"{centre.name}, direction {number}, step {i}" if i else centre.name

    def point(centre: Given, number: int, i: int) -> Point:
        def make() -> Weights:
            direction = random_direction(coordinates.num, seed=settings.direction_seed, number=number)
            return coordinates.unflatten(centre.vector + distances[i] * direction, centre.weights)

        definition = {"from": centre.sha, "direction": [settings.direction_seed, number], "distance": distances[i]}
        return Point(name(centre, number, i), definition, make)

    def record(values: Mapping[str, Values]) -> dict[str, Any]:
        rays = {
            centre.name: [_columns(values, [name(centre, k, i) for i in range(len(distances))]) for k in directions]
            for centre in given
        }
        widths = {centre: [width(distances, ray["test_error"]) for ray in of_centre] for centre, of_centre in rays.items()}
        basis = f"w + t d, d the unit vectors {directions.start} to {directions.stop - 1} of seed {settings.direction_seed}"
        return {"basis": basis, "distance": distances, "rays": rays, "widths": summarise(widths, reach)}

    return Plan([point(g, k, i) for g in given for k in directions for i in range(1, len(distances))], record)


def _plan_line(given: Sequence[Given], settings: LandscapeSettings, coordinates: Coordinates) -> Plan:
    """(1 - t) w1 + t w2, both ends among the points."""
    first, second = given
    check_different(first.vector, second.vector, (first.name, second.name))
    beyond = math.ceil(settings.margin * settings.num_steps)
    steps = range(-beyond, settings.num_steps + beyond + 1)
    length = distance(first.vector, second.vector)

    def name(i: int) -> str:
        return {0: first.name, settings.num_steps: second.name}.get(i, f"line, step {i}")

    def point(i: int) -> Point:
        share = i / settings.num_steps
        definition = {"from": first.sha, "to": second.sha, "share": share}

        def make() -> Weights:
            return coordinates.unflatten(on_line(first.vector, second.vector, share), first.weights)

        return Point(name(i), definition, make)

    def record(values: Mapping[str, Values]) -> dict[str, Any]:
        signed = {"distance": [length * i / settings.num_steps for i in steps]}
        basis = f"(1 - t) {first.name} + t {second.name}; distance is signed, from {first.name} towards {second.name}"
        return {"basis": basis, "line": signed | _columns(values, [name(i) for i in steps])}

    return Plan([point(i) for i in steps if i not in (0, settings.num_steps)], record)


def _plan_plane(given: Sequence[Given], settings: LandscapeSettings, coordinates: Coordinates) -> Plan:
    """A grid over the plane through the first three; where they and all others lie."""
    spanning = given[:3]
    names = [g.name for g in spanning]
    plane = Plane.through([g.vector for g in spanning], names)
    places = {g.name: plane.project(g.vector) for g in given}
    xs, ys = _grid([x for x, _, _ in places.values()], [y for _, y, _ in places.values()], settings)

    def name(row: int, column: int) -> str:
        return f"plane, row {row}, column {column}"

    def point(row: int, column: int) -> Point:
        x, y = xs[column], ys[row]

        def make() -> Weights:
            return coordinates.unflatten(plane.at(x, y), spanning[0].weights)

        return Point(name(row, column), {"through": [g.sha for g in spanning], "x": x, "y": y}, make)

    def record(values: Mapping[str, Values]) -> dict[str, Any]:
        rows = [_columns(values, [name(row, column) for column in range(len(xs))]) for row in range(len(ys))]
        grids = {key: [row[key] for row in rows] for key in MEASURED}
        where = {n: {"x": x, "y": y, "distance_from_plane": rest} for n, (x, y, rest) in places.items()}
        basis = f"origin {names[0]}; u towards {names[1]}; v at right angles to it, on the side of {names[2]}; both of length 1"
        return {"basis": basis, "x": xs, "y": ys, "grid": grids, "places": where}

    return Plan([point(row, column) for row in range(len(ys)) for column in range(len(xs))], record)


def _grid(xs: Sequence[float], ys: Sequence[float], settings: LandscapeSettings) -> tuple[list[float], list[float]]:
    """Equal steps over the box around all points, with a margin on each side."""
    margin = settings.margin * max(max(xs) - min(xs), max(ys) - min(ys))
    x, y = (np.linspace(min(v) - margin, max(v) + margin, settings.num_steps + 1).tolist() for v in (xs, ys))
    return x, y


# --------------------------------------------------------------------------------------------------------- results


def _columns(values: Mapping[str, Values], names: Sequence[str]) -> dict[str, list[float]]:
    return {key: [values[name][key] for name in names] for key in MEASURED}


def _about(given: Given, values: Values) -> dict[str, Any]:
    return {"weights": given.spec, "sha256": given.sha, "norm": norm(given.vector), **values}


def _sayable(tree: Any) -> Any:
    """JSON has no infinity and no NaN."""
    if isinstance(tree, dict):
        return {str(key): _sayable(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_sayable(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def _tell(record: dict[str, Any], path: Path, say: Callable[[str], None]) -> None:
    for name, point in record["points"].items():
        say(f"{name}: train loss {point['train_loss']:.4f}, test error {100 * point['test_error']:.2f} %")
    if record["kind"] == "rays":
        say("distance at which the test error is 1 point above the centre's:")
        print_table(COLUMNS, table_rows(record["widths"]))
        num_censored = sum(centre["num_censored"] for centre in record["widths"]["centres"].values())
        if num_censored:
            say(f"{num_censored} widths lie beyond {record['distance'][-1]:.4g}; raise landscape.max_distance to see them")
    say(f"results: {path}")
    say(f"plot:    {path.with_suffix('.png')}")


def _silently(_line: str) -> None:
    return None
