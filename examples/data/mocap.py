"""People in motion: the joints of a skeleton now, and where they are a while later.

Enters the folder of recorded trials (`load`) or a seed (`synthetic`); leave positions, velocities, targets. The one
law: the floor and gravity fix the axis y, so the motion is symmetric under rotations about y and level translations
only; a model with full rotation symmetry is too strict here, in a known way.

Reference:
    Carnegie Mellon Graphics Lab motion capture database, mocap.cs.cmu.edu, created with funding from NSF EIA-0196217.
    The task is that of W. Huang et al., "Equivariant graph mechanics networks with constraints", ICLR 2022, and of
    M. Xu et al., "Equivariant graph neural operator", ICML 2024.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Generator, Tensor

from examples.data._npz import Samples, Shape, Splits, check_choice, cut, read_npz, with_held_out

__all__ = ["BONES", "METRES", "Motions", "load", "synthetic"]

METRES = 0.056444
"""Metres in the unit of length of the recordings."""

FILES = {"walk": "walk_subject35.npz", "run": "run_subject09.npz"}
JOINTS = 31

BONES = ((0, 1, 0.6), (0, 2, 0.45), (2, 3, 0.45), (0, 4, 0.45), (4, 5, 0.45), (1, 6, 0.3), (6, 7, 0.3))
"""Simulated walker: joint, next joint, length in metres. Hips 0 and shoulders 1; two legs and an arm of two bones."""
GRAVITY, STIFFNESS, DAMPING = 9.81, 4000.0, 4.0  # m/s^2, 1/s^2, 1/s
FRAME, SUBSTEPS = 1 / 120, 8


@dataclass(frozen=True, eq=False)
class Motions(Samples):
    """One split, in the unit of length of its source.

    Attributes:
        positions: Joints at the input frame, shape (count, joints, 3), float32.
        velocities: Displacement to the next frame, 1/120 s later, as the benchmark has it; same shape, float32.
        targets: Joints `ahead` frames after the input, same shape, float32.
        edges: Pairs of joints with a bone between, shape (count, bones, 2), int64, the same in every row.
    """

    positions: Tensor
    velocities: Tensor
    targets: Tensor
    edges: Tensor


def load(folder: str | Path, *, motion: Literal["walk", "run"] = "walk", ahead: int = 30) -> Splits[Motions]:
    """Load recorded trials, split by trial: 900 / 400 / 500 starts of walking, or 400 / 240 / 240 of running.

    Args:
        folder: Folder that holds ``walk_subject35.npz`` and ``run_subject09.npz``.
        motion: Which of the two. The split of the run is the published one, that of the walk is not.
        ahead: Frames from input to target, 1 to 30.
    """
    check_choice("motion", motion, tuple(FILES))
    if not 1 <= ahead <= 30:
        raise ValueError(f"found ahead={ahead}, expected 1 to 30, the frames that follow every start")
    shapes: dict[str, Shape] = {"pos": ("frames", JOINTS, 3), "edges": (JOINTS - 1, 2)}
    shapes |= {"trial": ("trials",), "trial_start": ("trials",), "trial_len": ("trials",)}
    for part in Splits._fields:
        shapes |= {f"{part}_trial": (part,), f"{part}_start": (part, "starts")}
    arrays = read_npz(folder, FILES[motion], shapes)
    frames, edges = torch.from_numpy(arrays["pos"]).float(), torch.from_numpy(arrays["edges"]).long()

    def motions(part: str) -> Motions:
        # The trial numbers are labels, not indices: look each up among those of the file.
        found, row = np.nonzero(arrays[f"{part}_trial"][:, None] == arrays["trial"])
        starts, lengths = arrays[f"{part}_start"], arrays["trial_len"][row, None]
        if len(found) != len(starts) or (starts + ahead >= lengths).any():
            raise ValueError(f"found {part} starts outside the trials of {FILES[motion]}; copy the file again")
        at = torch.from_numpy((arrays["trial_start"][row, None] + starts).ravel()).long()
        return _motions(frames[at], frames[at + 1], frames[at + ahead], edges)

    return Splits(*map(motions, Splits._fields))


def synthetic(count: int, *, seed: int = 0, ahead: int = 30) -> Splits[Motions]:
    """Simulate a walker in metres: hips and shoulders glide along a random level heading, the limbs swing below.

    Limbs are pendulums of unit masses on stiff springs, in gravity along -y. They start near their rest, swung
    aside at random, and every frame is integrated in substeps.

    Args:
        count: Starts to train on; a quarter as many to validate and test each.
        seed: Seed of everything.
        ahead: Frames from input to target.
    """
    if ahead < 1:
        raise ValueError(f"found ahead={ahead}, expected at least 1")
    generator, total = Generator().manual_seed(seed), with_held_out(count)
    tail, head = (torch.tensor([bone[end] for bone in BONES]) for end in (0, 1))
    length = torch.tensor([bone[2] for bone in BONES], dtype=torch.float64)
    heading = 2 * math.pi * torch.rand(total, generator=generator, dtype=torch.float64)
    speed = 1 + torch.rand(total, generator=generator, dtype=torch.float64)
    glide = speed.unsqueeze(1) * torch.stack([heading.cos(), 0 * heading, heading.sin()], dim=1)

    x = torch.zeros(total, len(BONES) + 1, 3, dtype=torch.float64)
    for i, (a, b, size) in enumerate(BONES):
        aside = 0.4 * torch.randn(total, 3, generator=generator, dtype=torch.float64) * (i > 0)
        down = torch.tensor([0.0, -1.0 if i else 1.0, 0.0], dtype=torch.float64)
        x[:, b] = x[:, a] + size * torch.nn.functional.normalize(down + aside, dim=1)
    v = glide.unsqueeze(1) + 0.5 * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    v[:, :2] = glide.unsqueeze(1)

    frames, step = [x], FRAME / SUBSTEPS
    for _ in range(ahead):
        for _ in range(SUBSTEPS):
            bone, rate = x[:, head] - x[:, tail], v[:, head] - v[:, tail]
            along = bone / bone.square().sum(2, keepdim=True).sqrt()
            stretch = (bone * along).sum(2) - length
            pull = -(STIFFNESS * stretch + DAMPING * (rate * along).sum(2)).unsqueeze(2) * along
            force = torch.zeros_like(x).index_add(1, head, pull).index_add(1, tail, -pull)
            force[..., 1] -= GRAVITY
            force[:, :2] = 0  # hips and shoulders are carried
            v = v + step * force
            x = x + step * v
        frames.append(x)
    return cut(_motions(frames[0], frames[1], frames[ahead], torch.stack([tail, head], dim=1)), count)


def _motions(now: Tensor, following: Tensor, later: Tensor, edges: Tensor) -> Motions:
    rows = edges.expand(len(now), -1, -1)
    return Motions(now.float(), (following - now).float(), later.float(), rows)
