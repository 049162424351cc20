"""Weights as vectors: coordinates, directions, planes and projections, against numpy and plain loops."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from imagenet_swa.analysis.vectors import (
    Coordinates,
    Plane,
    check_different,
    digest,
    distance,
    dot,
    norm,
    on_line,
    random_direction,
)


class Toy(nn.Module):
    """All that a network may hold: norms with buffers, a shared, a frozen and an unused parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.second = nn.Linear(3, 4, bias=False)
        self.second.weight = self.first.weight
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)
        self.scale = nn.Parameter(torch.tensor(2.0))


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


@contextmanager
def threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------- coordinates


def test_the_coordinates_are_the_trainable_parameters_each_once(toy: Toy):
    """Neither buffers nor frozen parameters count, and a shared parameter counts once."""
    coordinates = Coordinates.of(toy)
    assert list(coordinates.shapes) == ["scale", "first.weight", "first.bias", "norm.weight", "norm.bias"]
    assert coordinates.aliases == {"second.weight": "first.weight"}
    assert coordinates.num == sum(p.numel() for p in toy.parameters() if p.requires_grad) == 1 + 12 + 4 + 4 + 4


def test_a_vector_holds_the_parameters_one_after_the_other(toy: Toy):
    """The vector is numpy's concatenation of the parameters, and it is of float64."""
    vector = Coordinates.of(toy).flatten(toy.state_dict())
    arrays = [p.detach().numpy().ravel() for p in toy.parameters() if p.requires_grad]
    assert vector.dtype == torch.float64
    np.testing.assert_array_equal(vector.numpy(), np.concatenate(arrays).astype(np.float64))


def test_there_and_back(toy: Toy):
    """Weights come back from their vector, with buffers and frozen parameters from elsewhere, shared ones under both names."""
    coordinates, rest = Coordinates.of(toy), {name: tensor + 1 for name, tensor in toy.state_dict().items()}
    back = coordinates.unflatten(coordinates.flatten(toy.state_dict()), rest)
    assert back.keys() == toy.state_dict().keys()
    elsewhere = {"frozen", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    for name, tensor in toy.state_dict().items():
        torch.testing.assert_close(back[name], rest[name] if name in elsewhere else tensor, rtol=0, atol=0)
    assert back["first.weight"].dtype == torch.float32
    toy.load_state_dict(back)


def test_the_digest_tells_any_change():
    """The digest is that of the numbers, names, shapes and types, wherever the tensors lie in memory and in the dict."""
    weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1)}
    transposed = {"b": torch.tensor(1), "a": weights["a"].t().contiguous().t()}
    assert digest(transposed) == digest(weights)
    others = [
        weights | {"a": weights["a"].nextafter(torch.tensor(9.0))},
        weights | {"a": weights["a"].reshape(3, 2)},
        weights | {"b": torch.tensor(1, dtype=torch.int32)},
        {"c": weights["a"], "b": weights["b"]},
    ]
    assert len({digest(other) for other in [weights, *others]}) == 5


# ---------------------------------------------------------------------------------------------------- directions


@pytest.mark.parametrize("length", [1, 2, 7, 1000])
def test_a_direction_is_box_muller_of_philox(length: int):
    """A direction is the normalised Box-Muller transform, number by number, of the Philox words of (seed, number)."""
    half = (length + 1) // 2
    words = np.random.Philox(key=np.array([5, 3], np.uint64)).random_raw(2 * half).tolist()
    uniform = [((word >> 11) + 0.5) / 2**53 for word in words]
    pairs = list(zip(uniform[:half], uniform[half:], strict=True))
    normal = [math.sqrt(-2 * math.log(u)) * math.cos(2 * math.pi * v) for u, v in pairs]
    normal += [math.sqrt(-2 * math.log(u)) * math.sin(2 * math.pi * v) for u, v in pairs]
    expected = np.array(normal[:length]) / math.sqrt(sum(value**2 for value in normal[:length]))
    np.testing.assert_allclose(random_direction(length, seed=5, number=3).numpy(), expected, rtol=1e-12)


def test_directions_have_length_one_and_differ():
    """Unit vectors of one seed and of another are all at nearly right angles to each other, as random ones are."""
    length = 20_000
    several = torch.stack([random_direction(length, seed=s, number=k) for s in range(3) for k in range(5)])
    inner = (several @ several.T).numpy()
    np.testing.assert_allclose(np.diag(inner), 1, rtol=1e-14)
    assert np.abs(inner - np.diag(np.diag(inner))).max() < 5 / math.sqrt(length)
    for vector in several:
        assert stats.kstest(vector.numpy() * math.sqrt(length), "norm").pvalue > 1e-4


def test_a_direction_follows_from_its_number_alone():
    """Neither torch's random state nor the number of threads nor what was drawn before changes a bit of a direction."""
    with threads(1):
        torch.manual_seed(1)
        once = random_direction(3_000_001, seed=0, number=7)
    with threads(2):
        torch.manual_seed(2)
        random_direction(10, seed=0, number=6)
        again = random_direction(3_000_001, seed=0, number=7)
    assert torch.equal(once, again)


def test_sums_are_the_same_for_any_number_of_threads():
    """Inner products agree with exact summation, and to the last bit between one thread and two."""
    a, b = vectors(2, 3_000_001)
    with threads(1):
        one = dot(a, b), norm(a), distance(a, b)
    with threads(2):
        two = dot(a, b), norm(a), distance(a, b)
    assert one == two
    x, y = a.numpy(), b.numpy()
    exact = math.fsum(x * y), math.sqrt(math.fsum(x * x)), math.sqrt(math.fsum((x - y) ** 2))
    assert one == pytest.approx(exact, rel=1e-12)


# --------------------------------------------------------------------------------------------------------- planes


@settings(deadline=None, max_examples=40)
@given(st.integers(3, 200), st.integers(0, 2**32), st.floats(1e-3, 1e3))
def test_the_basis_is_that_of_a_qr_decomposition(length: int, seed: int, scale: float):
    """u and v are the columns of numpy's QR of (w2 - w1, w3 - w1), pointing at w2 and to the side of w3."""
    points = scale * vectors(3, length, seed=seed)
    plane = Plane.through(list(points), ["a", "b", "c"])
    w1, w2, w3 = points.numpy()
    q, r = np.linalg.qr(np.stack([w2 - w1, w3 - w1], axis=1))
    q = q * np.sign(np.diag(r))
    basis = torch.stack([plane.u, plane.v], 1).numpy()
    np.testing.assert_allclose(basis, q, atol=1e-10 * np.linalg.cond(r))
    np.testing.assert_allclose(basis.T @ basis, np.eye(2), atol=1e-14)
    np.testing.assert_array_equal(plane.origin.numpy(), w1)


def test_nearly_collinear_points_give_a_basis_at_right_angles():
    """Where w3 lies all but on the line, cancellation leaves u and v at right angles all the same."""
    w1, direction, side = vectors(3, 50)
    points = [w1, w1 + direction, w1 + 1000 * direction + 0.1 * side]
    plane = Plane.through(points, ["a", "b", "c"])
    assert abs(float(plane.u @ plane.v)) < 1e-15


@settings(deadline=None, max_examples=40)
@given(st.integers(4, 100), st.integers(0, 2**32))
def test_a_projection_is_the_least_squares_solution(length: int, seed: int):
    """Coordinates and left-over distance are those of numpy's least squares, and the left-over is at right angles."""
    w1, w2, w3, point = vectors(4, length, seed=seed)
    plane = Plane.through([w1, w2, w3], ["a", "b", "c"])
    x, y, rest = plane.project(point)
    basis = torch.stack([plane.u, plane.v], 1).numpy()
    solution, residual, *_ = np.linalg.lstsq(basis, (point - w1).numpy(), rcond=None)
    np.testing.assert_allclose([x, y], solution, atol=1e-10)
    assert rest == pytest.approx(math.sqrt(residual[0]), abs=1e-9)
    left = point - plane.at(x, y)
    assert abs(float(left @ plane.u)) < 1e-10 and abs(float(left @ plane.v)) < 1e-10


def test_the_points_of_a_plane_lie_in_it():
    """The three points have no distance to their plane, the first is its origin, the second on the x axis, and all distances
    between them are those in weight space.
    """
    points = list(vectors(3, 30))
    plane = Plane.through(points, ["a", "b", "c"])
    (x1, y1, rest1), (x2, y2, rest2), (x3, y3, rest3) = [plane.project(point) for point in points]
    assert (x1, y1) == (0, 0)
    assert y2 == pytest.approx(0, abs=1e-12)
    assert y3 > 0
    assert max(rest1, rest2, rest3) < 1e-12
    w1, w2, w3 = (point.numpy() for point in points)
    assert x2 == pytest.approx(np.linalg.norm(w2 - w1))
    assert math.hypot(x3, y3) == pytest.approx(np.linalg.norm(w3 - w1))
    assert math.hypot(x3 - x2, y3) == pytest.approx(np.linalg.norm(w3 - w2))


def test_points_on_a_line_define_no_plane():
    """Three points on a line are refused by name, exactly collinear or up to the rounding of fp32 averages."""
    pretrained, captured = vectors(2, 1000).float().double()
    swa = ((pretrained + 3 * captured) / 4).float().double()  # Alg. 1's average lies between the two
    for points in ([pretrained, captured, swa], [swa, pretrained, captured]):
        line = one_line(Plane.through, points, ["a", "b", "c"])
        assert "a, b, c lie on a line" in line
    near = captured + 1e-3 * vectors(1000, seed=1)
    Plane.through([pretrained, captured, near], ["a", "b", "c"])


def test_two_points_that_are_the_same_are_refused():
    """Equal weights define neither line nor plane, and the message names the two; a small difference is one."""
    a, b = vectors(2, 100)
    assert "b and c are the same weights" in one_line(Plane.through, [a, b, b], ["a", "b", "c"])
    assert "a and c are the same weights" in one_line(Plane.through, [a, b, a.float().double()], ["a", "b", "c"])
    assert "x and y are the same weights" in one_line(check_different, a, a.float().double(), ("x", "y"))
    check_different(a, a + 1e-5 * b, ("x", "y"))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32), st.floats(-2, 3))
def test_a_line_runs_from_one_point_to_the_other(seed: int, t: float):
    """At 0 and 1 the line is at its ends to the last bit, elsewhere at t times their distance from the first."""
    a, b = vectors(2, 50, seed=seed)
    assert torch.equal(on_line(a, b, 0.0), a)
    assert torch.equal(on_line(a, b, 1.0), b)
    np.testing.assert_allclose(on_line(a, b, t).numpy(), a.numpy() + t * (b.numpy() - a.numpy()), atol=1e-12)
    assert distance(a, on_line(a, b, t)) == pytest.approx(abs(t) * distance(a, b), abs=1e-12)
