"""Weights as vectors: distances, random directions, the plane through three of them, projections. Pure, in float64.

The coordinates of a vector are the trainable floating-point parameters of a network, in the order of `named_parameters`; a
parameter that several modules share counts once. Buffers, BatchNorm's statistics above all, are no coordinates: they follow
from the weights and the training images, and are recomputed wherever a network is measured.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from imagenet_swa.config import InputError, require
from imagenet_swa.models import Weights

# Weights are kept in fp32: rounding moves a vector by up to 2^-24 of its norm, so this little is no distance.
_ROUNDING = 2.0**-22
# A point whose distance to a line is less than this share of its distance along it defines no plane.
_COLLINEAR = 1e-5
_CHUNK = 2**20


# ---------------------------------------------------------------------------------------------------- coordinates


@dataclass(frozen=True)
class Coordinates:
    """Which entries of a network's weights are coordinates, and where in the vector each is.

    Attributes:
        shapes: of the parameters by name, in the order of the vector.
        aliases: further names of shared parameters, and the name in `shapes` that each stands for.
    """

    shapes: dict[str, torch.Size]
    aliases: dict[str, str]

    @classmethod
    def of(cls, network: nn.Module) -> "Coordinates":
        """Those of a network."""
        shapes, aliases, first_name = {}, {}, {}
        for name, parameter in network.named_parameters(remove_duplicate=False):
            if not (parameter.requires_grad and parameter.is_floating_point()):
                continue
            if parameter in first_name:
                aliases[name] = first_name[parameter]
            else:
                first_name[parameter] = name
                shapes[name] = parameter.shape
        return cls(shapes, aliases)

    @property
    def num(self) -> int:
        """Length of a vector."""
        return sum(shape.numel() for shape in self.shapes.values())

    def flatten(self, weights: Weights) -> torch.Tensor:
        """The vector (num,) float64 of some weights."""
        return torch.cat([weights[name].detach().to("cpu", torch.float64).reshape(-1) for name in self.shapes])

    def unflatten(self, vector: torch.Tensor, rest: Weights) -> Weights:
        """Weights in fp32 whose coordinates are the vector's; what is no coordinate is taken from `rest`."""
        assert vector.shape == (self.num,)
        weights = {name: tensor.clone() for name, tensor in rest.items()}
        parts = vector.split([shape.numel() for shape in self.shapes.values()])
        for (name, shape), part in zip(self.shapes.items(), parts, strict=True):
            weights[name] = part.reshape(shape).float()
        return weights | {name: weights[first].clone() for name, first in self.aliases.items()}


def digest(weights: Weights) -> str:
    """A name for these very numbers: SHA-256 over names, shapes, types and bytes."""
    sha = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


# ---------------------------------------------------------------------------------------------------- directions


def random_direction(length: int, *, seed: int, number: int) -> torch.Tensor:
    """The `number`-th random unit vector (length,) of a seed, uniform on the sphere (sec. 4.2 of the paper).

    Normalised normal numbers, made by Box and Muller's formula from raw Philox words, whose bits numpy promises to keep: the
    same on every rank, device and machine.
    """
    half = -(-length // 2)
    words = np.random.Philox(key=np.array([seed, number], np.uint64)).random_raw(2 * half)
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1), ends excluded
    radius, angle = np.sqrt(-2 * np.log(uniform[:half])), 2 * math.pi * uniform[half:]
    normal = torch.from_numpy(np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:length])
    return normal / norm(normal)


def dot(a: torch.Tensor, b: torch.Tensor) -> float:
    """The inner product, to the same last bit for any number of threads, which torch's own is not."""
    parts = zip(a.split(_CHUNK), b.split(_CHUNK), strict=True)
    return math.fsum(float(np.sum((x * y).numpy())) for x, y in parts)


def norm(a: torch.Tensor) -> float:
    """Euclidean length."""
    return math.sqrt(dot(a, a))


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Euclidean distance of two vectors."""
    return norm(a - b)


def check_different(a: torch.Tensor, b: torch.Tensor, names: tuple[str, str]) -> None:
    """Raise InputError where two vectors are the same but for rounding to fp32."""
    same = distance(a, b) <= _ROUNDING * max(norm(a), norm(b))
    require(not same, f"the points {names[0]} and {names[1]} are the same weights; choose two that differ")


# --------------------------------------------------------------------------------------------------------- planes


@dataclass(frozen=True)
class Plane:
    """The plane through three vectors w1, w2, w3, as in sec. 3.1 of the paper; x and y are distances in weight space.

    Attributes:
        origin: w1, (n,).
        u: (w2 - w1), normalised, (n,).
        v: what of (w3 - w1) is at right angles to u, normalised, (n,).
    """

    origin: torch.Tensor
    u: torch.Tensor
    v: torch.Tensor

    @classmethod
    def through(cls, points: Sequence[torch.Tensor], names: Sequence[str]) -> "Plane":
        """By Gram and Schmidt.

        Raises:
            InputError: two of the points are the same, or the three are on a line.
        """
        (w1, w2, w3), largest = points, max(norm(point) for point in points)
        for i, j in ((0, 1), (0, 2), (1, 2)):
            check_different(points[i], points[j], (names[i], names[j]))
        u = (w2 - w1) / distance(w1, w2)
        side = w3 - w1
        v = side - dot(side, u) * u
        v = v - dot(v, u) * u  # once more: after cancellation what is left is not at right angles to the last bit
        height = norm(v)
        if height <= max(_COLLINEAR * norm(side), _ROUNDING * largest):
            raise InputError(
                f"the points {', '.join(names)} lie on a line and define no plane; choose three that do not, such as two "
                "captures and the average of others"
            )
        return cls(w1, u, v / height)

    def at(self, x: float, y: float) -> torch.Tensor:
        """The vector with these coordinates."""
        return self.origin + x * self.u + y * self.v

    def project(self, point: torch.Tensor) -> tuple[float, float, float]:
        """Coordinates x, y of the nearest point of the plane, and the distance to it."""
        difference = point - self.origin
        x, y = dot(difference, self.u), dot(difference, self.v)
        return x, y, norm(difference - x * self.u - y * self.v)


def on_line(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """(1 - t) a + t b: a at 0 and b at 1, both to the last bit."""
    return (1 - t) * a + t * b
