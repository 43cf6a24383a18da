"""Point clouds of household objects in an upright pose, and simple solids in their place.

Enters the folder of ``modelnet10_pc1024.npz`` (`load`) or a seed (`synthetic`); leave clouds and labels. The one law:
every cloud has its mean at the origin and its furthest point at distance one. The last axis is up; turn the clouds with
`random_rotations` to learn in any pose.

Reference:
    Z. Wu, S. Song, A. Khosla, F. Yu, L. Zhang, X. Tang, J. Xiao, "3D ShapeNets: A deep representation for volumetric
    shapes", CVPR 2015 (ModelNet10, for academic research).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from examples.data._npz import Samples, Shape, Splits, cut, read_npz, with_held_out

__all__ = ["CLASSES", "SOLIDS", "Clouds", "load", "random_rotations", "synthetic"]

FILE = "modelnet10_pc1024.npz"
STORED = 1024
CLASSES = ("bathtub", "bed", "chair", "desk", "dresser", "monitor", "night_stand", "sofa", "table", "toilet")
SHAPES: dict[str, Shape] = {
    "pts_train": ("train", STORED, 3),
    "n_train": ("train",),
    "y_train": ("train",),
    "pts_test": ("test", STORED, 3),
    "n_test": ("test",),
    "y_test": ("test",),
}


@dataclass(frozen=True, eq=False)
class Clouds(Samples):
    """One split.

    Attributes:
        points: Clouds of unit radius, centred, shape (count, points, 3), float32.
        labels: Classes, shape (count,), int64.
    """

    points: Tensor
    labels: Tensor


def load(folder: str | Path, *, points: int = 128, validation: float = 0.1, seed: int = 0) -> Splits[Clouds]:
    """Load ModelNet10: 3,984 training and 907 test shapes of the official split, without the 8 empty ones.

    The points are cells of a grid of 30 to the cube, furthest first, so any number of them covers the shape evenly.
    Each is moved at random inside its cell: distances on a grid are often equal, and which neighbour is nearest would
    then be left to rounding.

    Args:
        folder: Folder that holds the file ``modelnet10_pc1024.npz``.
        points: Points to keep in a cloud, at most 1,024.
        validation: Fraction of the official training shapes held out, by `seed`.
        seed: Seed of the held-out choice and of the places in the cells.
    """
    if not 1 <= points <= STORED:
        raise ValueError(f"found points={points}, expected 1 to {STORED}, the points stored for a shape")
    if not 0 < validation < 1:
        raise ValueError(f"found validation={validation}, expected a fraction between 0 and 1")
    arrays = read_npz(folder, FILE, SHAPES)
    generator = Generator().manual_seed(seed)
    official = []
    for part in ("train", "test"):
        filled = arrays[f"n_{part}"] > 0
        cells = torch.from_numpy(arrays[f"pts_{part}"][filled, :points]).float()
        labels = torch.from_numpy(arrays[f"y_{part}"][filled]).long()
        official.append(Clouds(_normalise(cells + torch.rand(cells.shape, generator=generator)), labels))
    train, test = official
    order = torch.randperm(len(train), generator=generator)
    held_out = round(validation * len(train))
    return Splits(train.select(order[held_out:]), train.select(order[:held_out]), test)


def synthetic(count: int, *, classes: int = 6, seed: int = 0, points: int = 128, noise: float = 0.02) -> Splits[Clouds]:
    """Sample boxes, cylinders, spheres, cones, tori and planes of random proportions, upright.

    Args:
        count: Clouds to train on; a quarter as many to validate and test each.
        classes: How many of the six kinds, in this order.
        seed: Seed of everything.
        points: Points of a cloud, on its surface.
        noise: Standard deviation added to every coordinate; the solids measure about 2.
    """
    if not 2 <= classes <= len(SOLIDS):
        raise ValueError(f"found classes={classes}, expected 2 to {len(SOLIDS)}")
    generator, total = Generator().manual_seed(seed), with_held_out(count)
    labels = torch.randint(classes, (total,), generator=generator)
    clouds = torch.empty(total, points, 3)
    for label, solid in enumerate(list(SOLIDS.values())[:classes]):
        clouds[labels == label] = solid(int((labels == label).sum()), points, generator)
    clouds += noise * torch.randn(clouds.shape, generator=generator)
    return cut(Clouds(_normalise(clouds), labels), count)


def random_rotations(count: int, generator: Generator | None = None) -> Tensor:
    """Draw rotations (count, 3, 3) uniformly, from unit quaternions uniform on their sphere (K. Shoemake, 1992).

    Turn clouds by ``points @ rotations.mT``.
    """
    w, x, y, z = torch.nn.functional.normalize(torch.randn(count, 4, generator=generator), dim=1).unbind(1)
    rows = (
        (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
        (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
        (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
    )
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def _normalise(clouds: Tensor) -> Tensor:
    centred = clouds - clouds.mean(1, keepdim=True)
    return centred / centred.square().sum(2, keepdim=True).amax(1, keepdim=True).sqrt()


def _uniform(low: float, high: float, shape: tuple[int, ...], generator: Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _ring(radius: Tensor, height: Tensor, generator: Generator) -> Tensor:
    """Put points at given distances from the axis, at random angles."""
    angle = _uniform(0, 2 * math.pi, tuple(radius.shape), generator)
    return torch.stack([radius * angle.cos(), radius * angle.sin(), height], dim=-1)


def _box(count: int, points: int, generator: Generator) -> Tensor:
    half = _uniform(0.4, 1.0, (count, 3), generator)
    inside = _uniform(-1, 1, (count, points, 3), generator)
    faces = (half.prod(1, keepdim=True) / half).cumsum(1).unsqueeze(1)  # areas across each axis, summed up
    axis = (torch.rand(count, points, 1, generator=generator) * faces[..., -1:] > faces).sum(-1, keepdim=True)
    return inside.scatter(2, axis, inside.gather(2, axis).sign()) * half.unsqueeze(1)


def _cylinder(count: int, points: int, generator: Generator) -> Tensor:
    radius, height = _uniform(0.3, 0.7, (count, 1), generator), _uniform(-1, 1, (count, points), generator)
    side = torch.rand(count, points, generator=generator) < 2 / (2 + radius)
    disc = torch.rand(count, points, generator=generator).sqrt()
    return _ring(radius * torch.where(side, 1.0, disc), torch.where(side, height, height.sign()), generator)


def _sphere(count: int, points: int, generator: Generator) -> Tensor:
    unit = torch.nn.functional.normalize(torch.randn(count, points, 3, generator=generator), dim=2)
    return unit * _uniform(0.85, 1.15, (count, 1, 3), generator)


def _cone(count: int, points: int, generator: Generator) -> Tensor:
    radius, fall = _uniform(0.5, 1.0, (count, 1), generator), torch.rand(count, points, generator=generator).sqrt()
    side = torch.rand(count, points, generator=generator) < 1 / (1 + radius / (radius.square() + 4).sqrt())
    return _ring(radius * fall, torch.where(side, 1 - 2 * fall, -1.0), generator)


def _torus(count: int, points: int, generator: Generator) -> Tensor:
    tube, angle = _uniform(0.2, 0.4, (count, 1), generator), _uniform(0, 2 * math.pi, (count, points), generator)
    return _ring(1 + tube * angle.cos(), tube * angle.sin(), generator)


def _plane(count: int, points: int, generator: Generator) -> Tensor:
    half = torch.cat([_uniform(0.5, 1.0, (count, 1, 2), generator), torch.zeros(count, 1, 1)], dim=2)
    return _uniform(-1, 1, (count, points, 3), generator) * half


SOLIDS: dict[str, Callable[[int, int, Generator], Tensor]] = {
    "box": _box,
    "cylinder": _cylinder,
    "sphere": _sphere,
    "cone": _cone,
    "torus": _torus,
    "plane": _plane,
}
