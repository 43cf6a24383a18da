"""Charged five-body system: positions and velocities now, positions a while later.

Enter a seed (`simulate`) or the folder of ``nbody5_charged.npz`` (`load`); leave three splits of float32 tensors, ready
for a `TensorDataset`. The training scripts call it. The one law: while no force is clipped, momentum and, to the order
of the integrator, energy stay what they were, because the walls of the original simulator act on the start only.

The recipe is the field's: five particles of charge +-1 attract and repel each other with the Coulomb force
F_i = sum_j q_i q_j (x_i - x_j) / |x_i - x_j|^3, at unit mass and unit strength.

Reference:
    T. Kipf, E. Fetaya, K.-C. Wang, M. Welling, R. Zemel, "Neural relational inference for interacting systems",
    ICML 2018 (the simulator); V. G. Satorras, E. Hoogeboom, M. Welling, "E(n) equivariant graph neural networks", ICML
    2021 (three dimensions, no walls); J. Brandstetter, R. Hesselink, E. van der Pol, E. Bekkers, M. Welling, "Geometric
    and physical quantities improve E(3) equivariant message passing", ICLR 2022 (frame 30 to frame 40).
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["NBody", "Splits", "advance", "load", "sample_start", "simulate"]

Array = NDArray[np.float64]
AnyArray = NDArray[Any]

FILE = "nbody5_charged.npz"
PARTICLES = 5
TIME_STEP = 1e-3
STEPS_PER_FRAME = 100
FORCE_LIMIT = 100.0  # per component of the net force: tames close encounters
HALF_BOX = 5.0
START_SPEED = 0.5
SPLIT_NAMES = ("train", "val", "test")
BLOCK = 512  # trajectories advanced together: every work array of a block fits in the second-level cache


@dataclass(frozen=True, slots=True, eq=False)
class NBody:
    """One split, dimensionless units.

    Attributes:
        positions: Positions at the input frame, shape `(count, particles, 3)`.
        velocities: Velocities at the input frame (of the half step before it), shape `(count, particles, 3)`.
        charges: Charges +-1, shape `(count, particles)`.
        targets: Positions at the target frame, shape `(count, particles, 3)`.
    """

    positions: Tensor
    velocities: Tensor
    charges: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four tensors in the order of the attributes: `TensorDataset(*split.tensors)`."""
        return self.positions, self.velocities, self.charges, self.targets


class Splits(NamedTuple):
    """Training, validation and test part of one data set."""

    train: NBody
    val: NBody
    test: NBody


def simulate(
    counts: Sequence[int] = (3_000, 2_000, 2_000),
    *,
    seed: int,
    input_frame: int = 30,
    target_frame: int = 40,
    particles: int = PARTICLES,
) -> Splits:
    """Simulate fresh training, validation and test trajectories.

    The draws of a split depend on the seed and the split alone: asking for fewer gives the first ones of more.

    Args:
        counts: Number of trajectories in each split; the default is the published benchmark.
        seed: Non-negative seed of all random draws.
        input_frame: Frame of the inputs. Frame c is the state after `100 (c + 1)` steps of 0.001 time units.
        target_frame: Frame of the targets; the default lies 1.0 time units after the default input frame.
        particles: Number of particles; the benchmark has five.

    Returns:
        The three splits, float32.

    Raises:
        ValueError: If a count or the seed is negative, there are no particles, or the frames are not in order.

    Example:
        >>> simulate((4, 2, 2), seed=0, input_frame=0, target_frame=1).train.targets.shape
        torch.Size([4, 5, 3])
    """
    counts = _checked_counts(counts)
    _check_frames(input_frame, target_frame)
    if seed < 0:
        raise ValueError(f"seed={seed}, expected a non-negative integer; pass for example seed=0")
    if particles < 1:
        raise ValueError(f"particles={particles}, expected at least 1; pass for example particles=10")
    streams = np.random.SeedSequence(seed).spawn(len(counts))
    return Splits(
        *(_simulate_split(n, s, input_frame, target_frame, particles) for n, s in zip(counts, streams, strict=True))
    )


def load(
    path: str | os.PathLike[str],
    counts: Sequence[int] | None = None,
    *,
    input_frame: int = 30,
    target_frame: int = 40,
) -> Splits:
    """Read stored trajectories.

    Args:
        path: The folder that holds ``nbody5_charged.npz``, or the path of an `.npz` file, with `loc_*` and `vel_*` of
            shape `(count, frames, particles, 3)`, `charge_*` of shape `(count, particles)` for `*` in train, val, test,
            and `frame`, the frame numbers along the second axis.
        counts: Keep only the first trajectories of each split; everything by default.
        input_frame: Frame of the inputs.
        target_frame: Frame of the targets.

    Returns:
        The three splits, float32.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no file of named arrays, an array or a frame is missing, or more trajectories are asked for
            than are stored.
    """
    _check_frames(input_frame, target_frame)
    path = Path(path, FILE) if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"found no file {str(path)!r}, expected {FILE} or the folder that holds it; call simulate(...) for data "
            "that need no file"
        )
    if not zipfile.is_zipfile(path):
        raise ValueError(f"found {path.stat().st_size} bytes in {path} that are no npz archive; copy the file again")
    with np.load(path) as file:
        required = ["frame", *(f"{kind}_{name}" for name in SPLIT_NAMES for kind in ("loc", "vel", "charge"))]
        if missing := [key for key in required if key not in file]:
            raise ValueError(f"path={os.fspath(path)!r} lacks {missing}, expected the arrays {required}")
        frames = [int(frame) for frame in file["frame"]]
        for name, frame in (("input_frame", input_frame), ("target_frame", target_frame)):
            if frame not in frames:
                raise ValueError(f"{name}={frame} is not stored; pass one of {frames}")
        start, end = frames.index(input_frame), frames.index(target_frame)
        stored = [len(file[f"charge_{name}"]) for name in SPLIT_NAMES]
        counts = stored if counts is None else _checked_counts(counts)
        if any(n > m for n, m in zip(counts, stored, strict=True)):
            raise ValueError(f"counts={tuple(counts)}, but the file holds {tuple(stored)}; pass at most these")
        return Splits(
            *(
                _split(
                    (loc := file[f"loc_{name}"][:n])[:, start],
                    file[f"vel_{name}"][:n, start],
                    file[f"charge_{name}"][:n],
                    loc[:, end],
                )
                for name, n in zip(SPLIT_NAMES, counts, strict=True)
            )
        )


def sample_start(
    count: int, seed: int | np.random.SeedSequence, *, particles: int = PARTICLES
) -> tuple[Array, Array, Array]:
    """Draw starting states.

    Positions are standard normal, velocities have length 0.5 and uniform directions, charges are +-1 with equal chance.
    A particle outside the box of half width 5 is reflected into it once, and its velocity turned inwards.

    Args:
        count: Number of trajectories.
        seed: Seed of the draws; the first draws do not depend on `count`.
        particles: Number of particles.

    Returns:
        Positions `(count, particles, 3)`, velocities `(count, particles, 3)`, charges `(count, particles)`.
    """
    generator = np.random.default_rng(seed)
    # One row per trajectory, so that a shorter draw is the beginning of a longer one.
    draws = generator.standard_normal((count, particles, 7))
    positions, directions, charges = draws[..., :3], draws[..., 3:6], np.where(draws[..., 6] < 0, -1.0, 1.0)
    velocities = START_SPEED * directions / np.linalg.norm(directions, axis=-1, keepdims=True)
    outside = np.abs(positions) > HALF_BOX
    velocities = np.where(outside, -np.sign(positions) * np.abs(velocities), velocities)
    positions = np.where(outside, np.sign(positions) * 2 * HALF_BOX - positions, positions)
    return positions, velocities, charges


def advance(
    positions: AnyArray,
    velocities: AnyArray,
    charges: AnyArray,
    *,
    steps: int,
    time_step: float = TIME_STEP,
) -> tuple[Array, Array]:
    """Advance all trajectories by leapfrog steps `v += dt F(x); x += dt v`, in float64.

    Velocities live half a step before positions, in the arguments, in the result and in stored trajectories, so that
    runs join without a seam: the synchronised velocity is `v + dt F(x) / 2`. At the very start the recipe takes the
    velocity of time zero for that of the half step before.

    Args:
        positions: Shape `(count, particles, 3)`.
        velocities: Shape `(count, particles, 3)`.
        charges: Shape `(count, particles)`.
        steps: Number of steps.
        time_step: Length `dt` of a step in time units; the default is the published one.

    Returns:
        Positions and velocities, shapes as given.

    Raises:
        ValueError: If the shapes do not fit together or `steps` is negative.
    """
    if positions.ndim != 3 or positions.shape != velocities.shape or charges.shape != positions.shape[:2]:
        raise ValueError(
            f"positions {positions.shape}, velocities {velocities.shape}, charges {charges.shape}, expected the shapes "
            "(count, n, 3), (count, n, 3), (count, n); for a single system pass positions[None] and so on"
        )
    if steps < 0:
        raise ValueError(f"steps={steps}, expected 0 or more; pass for example steps=100")
    particles = positions.shape[1]
    first, second = np.triu_indices(particles, k=1)
    pairs = np.arange(len(first))
    # Row p of the incidence matrix is +1 at the first and -1 at the second particle of pair p. Two small products with
    # it, particles to pairs and back, replace all gathers: x_i - x_j one way, Newton's third law the other.
    incidence = np.zeros((len(first), particles))
    incidence[pairs, first], incidence[pairs, second] = 1.0, -1.0

    final_positions = np.empty(positions.shape)
    final_velocities = np.empty(positions.shape)
    for begin in range(0, len(positions), BLOCK):
        block = slice(begin, begin + BLOCK)
        # Copies with the trajectory as contiguous last axis: every operation below is one long vector operation.
        x = np.array(positions[block].transpose(1, 2, 0), dtype=np.float64, order="C")
        v = np.array(velocities[block].transpose(1, 2, 0), dtype=np.float64, order="C")
        q = charges[block].T.astype(np.float64)
        strength = q[first] * q[second]
        force, between = np.empty_like(x), np.empty((len(first), *x.shape[1:]))
        square, size = np.empty_like(strength), np.empty_like(strength)
        for _ in range(steps):
            np.matmul(incidence, x.reshape(particles, -1), out=between.reshape(len(first), -1))
            np.einsum("pkb,pkb->pb", between, between, out=square)
            np.multiply(square, np.sqrt(square, out=size), out=size)
            between *= np.divide(strength, size, out=size)[:, None]
            np.matmul(incidence.T, between.reshape(len(first), -1), out=force.reshape(particles, -1))
            np.clip(force, -FORCE_LIMIT, FORCE_LIMIT, out=force)
            v += np.multiply(force, time_step, out=force)
            x += np.multiply(v, time_step, out=force)
        final_positions[block], final_velocities[block] = x.transpose(2, 0, 1), v.transpose(2, 0, 1)
    return final_positions, final_velocities


def _simulate_split(
    count: int, stream: np.random.SeedSequence, input_frame: int, target_frame: int, particles: int
) -> NBody:
    positions, velocities, charges = sample_start(count, stream, particles=particles)
    positions, velocities = advance(positions, velocities, charges, steps=STEPS_PER_FRAME * (input_frame + 1))
    targets, _ = advance(positions, velocities, charges, steps=STEPS_PER_FRAME * (target_frame - input_frame))
    return _split(positions, velocities, charges, targets)


def _split(*arrays: AnyArray) -> NBody:
    return NBody(*(torch.from_numpy(np.array(array, dtype=np.float32)) for array in arrays))


def _checked_counts(counts: Sequence[int]) -> Sequence[int]:
    if len(counts) != len(SPLIT_NAMES) or any(n < 0 for n in counts):
        raise ValueError(
            f"counts={tuple(counts)}, expected three non-negative numbers for {SPLIT_NAMES}; "
            "pass for example counts=(3_000, 2_000, 2_000)"
        )
    return counts


def _check_frames(input_frame: int, target_frame: int) -> None:
    if not 0 <= input_frame < target_frame:
        raise ValueError(
            f"input_frame={input_frame} and target_frame={target_frame}, expected 0 <= input_frame < target_frame; "
            "pass for example input_frame=30, target_frame=40"
        )
