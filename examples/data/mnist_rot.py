"""Small grey images of digits, upright or turned by a random angle, and drawn letters in their place.

Enters the folder of ``mnist_12k_10k_<pose>.npz`` (`load`) or a seed (`synthetic`); leave images and labels. The one
law: the label of an image does not change when it is turned about its centre.

Reference:
    Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-based learning applied to document recognition", 1998 (MNIST);
    the sizes of the splits and the rotations follow H. Larochelle et al., ICML 2007 (12,000 to train and validate).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from examples.data._npz import Samples, Shape, Splits, check_choice, cut, read_npz, with_held_out

__all__ = ["LETTERS", "Images", "load", "synthetic"]

SIZE = 28

LETTERS = ("713", "931", "7913", "9731", "79 82", "71 93 46", "971 46", "17964", "7139", "73 91")
"""Strokes of the letters L J Z S T H F P U X through the keys of a number pad (7 8 9 on top).

The pad is taller than wide, so that no letter is another one turned; L and J, and Z and S, are mirror images.
"""
ASPECT = 1.5


@dataclass(frozen=True, eq=False)
class Images(Samples):
    """One split.

    Attributes:
        images: Brightness from 0 to 1, shape (count, 1, 28, 28), rows from the top, float32.
        labels: Classes 0 to 9, shape (count,), int64.
        angles: Counter-clockwise turn of each image in radians, zero if upright, shape (count,), float32.
    """

    images: Tensor
    labels: Tensor
    angles: Tensor


def load(folder: str | Path, *, pose: Literal["rotated", "upright"] = "rotated") -> Splits[Images]:
    """Load 10,000 images to train on, 2,000 to validate and 10,000 to test.

    Args:
        folder: Folder that holds ``mnist_12k_10k_rotated.npz`` and ``mnist_12k_10k_upright.npz``.
        pose: Which of the two: every image turned by its own angle, or none. The digits are the same.
    """
    check_choice("pose", pose, ("rotated", "upright"))
    letter = {"rotated": "r", "upright": "x"}[pose]
    shapes: dict[str, Shape] = {}
    for part in Splits._fields:
        shapes |= {f"{letter}_{part}": (part, SIZE, SIZE), f"y_{part}": (part,), f"angle_{part}": (part,)}
    arrays = {
        key: torch.from_numpy(value) for key, value in read_npz(folder, f"mnist_12k_10k_{pose}.npz", shapes).items()
    }

    def images(part: str) -> Images:
        angles = arrays[f"angle_{part}"].float() * (pose == "rotated")
        return Images(arrays[f"{letter}_{part}"].float().unsqueeze(1) / 255, arrays[f"y_{part}"].long(), angles)

    return Splits(*map(images, Splits._fields))


def synthetic(
    count: int, *, seed: int = 0, classes: int = 10, size: int = SIZE, pose: Literal["rotated", "upright"] = "rotated"
) -> Splits[Images]:
    """Draw letters with strokes of random width and slightly random corners.

    Args:
        count: Images to train on; a quarter as many to validate and test each.
        seed: Seed of everything.
        classes: How many of `LETTERS`.
        size: Pixels along a side.
        pose: Turn every letter by its own angle, or none.
    """
    check_choice("pose", pose, ("rotated", "upright"))
    if not 2 <= classes <= len(LETTERS):
        raise ValueError(f"found classes={classes}, expected 2 to {len(LETTERS)}")
    generator, total = np.random.default_rng(seed), with_held_out(count)
    labels = generator.integers(classes, size=total)
    angles = generator.uniform(0, 2 * np.pi, size=total) * (pose == "rotated")
    images = np.stack(
        [_draw(LETTERS[label], angle, size, generator) for label, angle in zip(labels, angles, strict=True)]
    )
    samples = Images(
        torch.from_numpy(images).float().unsqueeze(1), torch.from_numpy(labels), torch.from_numpy(angles).float()
    )
    return cut(samples, count)


def _draw(letter: str, angle: float, size: int, generator: np.random.Generator) -> NDArray[Any]:
    """Rasterise one letter, turned counter-clockwise: brightness falls with the distance to the nearest stroke."""
    keys = np.array([divmod(key, 3)[::-1] for key in range(9)], dtype=float) - 1  # key 1 at lower left, x then y
    corners = keys * [0.4, 0.4 * ASPECT] + generator.normal(scale=0.04, size=keys.shape)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    corners = generator.uniform(0.85, 1.1) * corners @ turn.T
    paths = [[int(key) - 1 for key in path] for path in letter.split()]
    start = corners[[key for path in paths for key in path[:-1]]]
    stroke = corners[[key for path in paths for key in path[1:]]] - start
    ticks = (np.arange(size) + 0.5) * 2 / size - 1
    pixels = np.stack(np.meshgrid(ticks, -ticks, indexing="xy"), axis=-1)[:, :, None]  # rows run down, y runs up
    along = ((pixels - start) * stroke).sum(-1) / (stroke**2).sum(-1)
    distance = np.linalg.norm(pixels - start - along.clip(0, 1)[..., None] * stroke, axis=-1).min(-1)
    width = generator.uniform(0.08, 0.14)
    brightness: NDArray[Any] = (1 - (distance - width) * size / 2).clip(0, 1)
    return brightness
