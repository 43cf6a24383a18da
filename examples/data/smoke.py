"""Velocity fields of a flow in the plane whose symmetry under quarter turns is broken by a known amount.

Enters the folder of ``smoke64.npz`` (`load`) or a seed (`synthetic`); leave fields now and later. The one law: a set-up
turned by d quarter turns gives the field turned likewise (`quarter_turn`), up to a factor of its strength that grows
with d and breaks the symmetry; direction 0 alone, and ``breaking=0``, obey it.

Units: cells of the grid and steps of time. Row = y, counted upwards; column = x.

Reference:
    R. Wang, R. Walters, R. Yu, "Approximately equivariant networks for imperfectly symmetric dynamics", ICML 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor
from torch.nn.functional import avg_pool2d

from examples.data._npz import Samples, Splits, check_choice, read_npz, with_held_out

__all__ = ["Flows", "load", "quarter_turn", "synthetic"]

CONFIGURATIONS: Splits[tuple[int, ...]] = Splits(train=(0, 1, 2, 3), val=(4,), test=(5,))
DIRECTIONS = (0, 1, 2, 3)
CORE = 0.15
"""Radius of a simulated vortex, in units of half the side of the grid."""


@dataclass(frozen=True, eq=False)
class Flows(Samples):
    """One split.

    Attributes:
        inputs: Velocities (vx, vy) of `history` frames, oldest first, shape (count, 2 history, size, size), float32.
        targets: Velocities `ahead` frames later, shape (count, 2, size, size), float32.
        directions: Quarter turns of the set-up, 0 to 3, shape (count,), int64.
    """

    inputs: Tensor
    targets: Tensor
    directions: Tensor


def load(
    folder: str | Path,
    *,
    history: int = 1,
    ahead: int = 1,
    coarsen: int = 1,
    directions: Sequence[int] = DIRECTIONS,
    frames: slice = slice(None),
) -> Splits[Flows]:
    """Load rising smoke: of its six configurations four to train on, one to validate, one to test.

    Args:
        folder: Folder that holds ``smoke64.npz``.
        history: Frames in the input; a frame is two steps of the simulation.
        ahead: Frames from the last input to the target.
        coarsen: Average blocks of so many cells a side, a divisor of 64; commutes with quarter turns.
        directions: Which set-ups to keep; ``(0,)`` gives data with unbroken symmetry, once turned.
        frames: Of the 51 frames of every run those to cut windows from, for a split by time.
    """
    for number in directions:
        check_choice("direction", number, DIRECTIONS)
    check_choice("coarsen", coarsen, (1, 2, 4, 8, 16, 32))
    arrays = read_npz(
        folder, "smoke64.npz", {"vel": ("runs", "frames", 2, 64, 64), "config": ("runs",), "direction": ("runs",)}
    )
    direction = torch.from_numpy(arrays["direction"]).long()
    configuration = torch.from_numpy(arrays["config"]).long()

    def flows(configurations: tuple[int, ...]) -> Flows:
        keep = torch.isin(configuration, torch.tensor(configurations)) & torch.isin(direction, torch.tensor(directions))
        runs = torch.from_numpy(arrays["vel"][keep.numpy(), frames]).float()
        coarse = avg_pool2d(runs.flatten(0, 1), coarsen)
        return _windows(coarse.view(*runs.shape[:3], *coarse.shape[2:]), direction[keep], history, ahead)

    return Splits(*map(flows, CONFIGURATIONS))


def synthetic(
    count: int, *, seed: int = 0, size: int = 16, vortices: int = 4, breaking: float = 0.3, history: int = 1
) -> Splits[Flows]:
    """Simulate smoothed point vortices, which carry each other along, in an incompressible flow without walls.

    Four samples in turn share one set-up, which is in one split only, turned by 0, 1, 2 and 3 quarter turns; with d of
    them the vortices are ``1 + breaking d`` times as strong. Vortex i moves every point y around itself with
    ``s_i / (2 pi) J (y - x_i) / (|y - x_i|^2 + core^2)``, J the quarter turn.

    Args:
        count: Samples to train on; a quarter as many to validate and test each.
        seed: Seed of the places and strengths.
        size: Cells along a side.
        vortices: How many in a sample.
        breaking: How much the symmetry is broken; 0 keeps it.
        history: Frames in the input; the target is one frame later.
    """
    generator, held_out = Generator().manual_seed(seed), (with_held_out(count) - count) // 2
    shares = [-(-rows // 4) for rows in (count, held_out, held_out)]  # set-ups of each split
    groups = sum(shares)
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    directions = torch.arange(4).repeat(groups)
    turns = torch.stack([torch.linalg.matrix_power(turn, d) for d in DIRECTIONS]).repeat(groups, 1, 1)
    places = (torch.rand(groups, vortices, 2, generator=generator) * 1.4 - 0.7).repeat_interleave(4, 0) @ turns.mT
    strengths = torch.randn(groups, vortices, generator=generator).repeat_interleave(4, 0)
    strengths = strengths * (1 + breaking * directions).unsqueeze(1)
    ticks = (torch.arange(size) + 0.5) * 2 / size - 1
    cells = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), dim=-1).reshape(1, -1, 2)

    def velocity(at: Tensor) -> Tensor:
        apart = at.unsqueeze(2) - places.unsqueeze(1)
        pull = strengths.unsqueeze(1) / (2 * torch.pi * (apart.square().sum(-1) + CORE**2))
        return (pull.unsqueeze(-1) * apart).sum(2) @ turn.T

    frames, step = [], 0.02
    for _ in range(history + 1):
        frames.append(velocity(cells).mT.reshape(-1, 2, size, size))
        for _ in range(5):
            places = places + step * velocity(places)
    flows = _windows(torch.stack(frames, dim=1), directions, history, 1)
    starts = (0, 4 * shares[0], 4 * (shares[0] + shares[1]))
    sizes = (count, held_out, held_out)
    return Splits(*(flows.select(slice(at, at + rows)) for at, rows in zip(starts, sizes, strict=True)))


def quarter_turn(fields: Tensor, times: int = 1) -> Tensor:
    """Turn velocity fields (..., 2 frames, size, size) counter-clockwise by `times` quarter turns, arrows included."""
    for _ in range(times % 4):
        fields = torch.rot90(fields, -1, dims=(-2, -1))
        x, y = fields[..., 0::2, :, :], fields[..., 1::2, :, :]
        fields = torch.stack([-y, x], dim=-3).flatten(-4, -3)
    return fields


def _windows(runs: Tensor, directions: Tensor, history: int, ahead: int) -> Flows:
    """Cut runs (runs, frames, 2, size, size) into every window of inputs and target."""
    frames = runs.shape[1]
    starts = range(frames - history - ahead + 1)
    if history < 1 or ahead < 1 or not starts:
        raise ValueError(f"found history={history}, ahead={ahead}, expected at least 1 each, at most {frames} in all")
    inputs = torch.stack([runs[:, t : t + history].flatten(1, 2) for t in starts], dim=1).flatten(0, 1)
    targets = runs[:, history + ahead - 1 :].flatten(0, 1)
    return Flows(inputs, targets, directions.repeat_interleave(len(starts)))
