"""Energies and forces of one small molecule in thermal motion, from quantum mechanics or from springs.

Enters the folder of ``rmd17_<molecule>.npz`` (`load`) or a seed (`synthetic`); leave geometries, energies, forces. The
one law: forces are minus the gradient of the energy, so they sum to zero and turn with the molecule.

Units: positions in angstrom, energies in kcal/mol (1 kcal/mol = 43.3641 meV), forces in kcal/mol/angstrom.

Reference:
    A. S. Christensen, O. A. von Lilienfeld, "On the role of gradients for machine learning of molecular energies and
    forces", Mach. Learn.: Sci. Technol. 1, 2020 (rMD17, CC0), which recomputed geometries of S. Chmiela et al., 2017.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor

from examples.data._npz import Samples, Splits, check_choice, cut, read_npz, with_held_out

__all__ = ["MOLECULES", "Frames", "energy", "load", "synthetic"]

MOLECULES = ("aspirin", "benzene", "ethanol", "malonaldehyde", "naphthalene", "toluene")
STORED = 1000

BOND, ANGLE = (1.5, 300.0), (2.5, 100.0)
"""Rest length (angstrom) and stiffness (kcal/mol/angstrom^2) between neighbours of a chain, and one further apart."""
WELL_DEPTH, WELL_RADIUS = 0.1, 3.0
"""Lennard-Jones depth (kcal/mol) and radius of zero energy (angstrom) between all other atoms."""


@dataclass(frozen=True, eq=False)
class Frames(Samples):
    """One split.

    Attributes:
        numbers: Atomic numbers, shape (count, atoms), int64, the same in every row.
        positions: Angstrom, shape (count, atoms, 3), float32.
        energies: Potential energy in kcal/mol, shape (count,), float64. Totals are about -1e5 with differences of 1:
            subtract the mean of the training energies before rounding to float32.
        forces: kcal/mol/angstrom, shape (count, atoms, 3), float32.
    """

    numbers: Tensor
    positions: Tensor
    energies: Tensor
    forces: Tensor


def load(
    folder: str | Path, *, molecule: str = "ethanol", split: int = 1, train: int = 950, validation: int = 50
) -> Splits[Frames]:
    """Load one of the five published splits: 1,000 frames to train and validate, 1,000 to test.

    Args:
        folder: Folder that holds ``rmd17_<molecule>.npz``.
        molecule: One of `MOLECULES`.
        split: Number of the published split, 1 to 5.
        train: Frames to train on, from the start of the 1,000, whose order is random.
        validation: Frames to validate on, from their end.
    """
    check_choice("molecule", molecule, MOLECULES)
    check_choice("split", split, (1, 2, 3, 4, 5))
    if train < 1 or validation < 1 or train + validation > STORED:
        raise ValueError(
            f"found train={train}, validation={validation}, expected at least 1 each, at most {STORED} in all"
        )
    rows = {"train": f"train_{split:02d}", "test": f"test_{split:02d}"}
    arrays = read_npz(
        folder,
        f"rmd17_{molecule}.npz",
        {"z": ("atoms",), "R": ("frames", "atoms", 3), "E": ("frames",), "F": ("frames", "atoms", 3)}
        | dict.fromkeys(rows.values(), (STORED,)),
    )
    frames = _frames(*(torch.from_numpy(arrays[key]) for key in "zREF"))
    first, test = (frames.select(torch.from_numpy(arrays[name]).long()) for name in rows.values())
    return Splits(first.select(slice(0, train)), first.select(slice(STORED - validation, None)), test)


def synthetic(count: int, *, seed: int = 0, atoms: int = 8, displacement: float = 0.05) -> Splits[Frames]:
    """Displace the atoms of a zigzag carbon chain and evaluate `energy` and its gradient exactly.

    Args:
        count: Frames to train on; a quarter as many to validate and test each.
        seed: Seed of the displacements.
        atoms: Length of the chain.
        displacement: Standard deviation of every coordinate in angstrom; 0.05 is room temperature for such springs.
    """
    if atoms < 2:
        raise ValueError(f"found atoms={atoms}, expected at least 2, one bond")
    step = torch.arange(atoms, dtype=torch.float64)
    along, across = ANGLE[0] / 2, (BOND[0] ** 2 - (ANGLE[0] / 2) ** 2) ** 0.5
    chain = torch.stack([along * step, across * (step % 2), 0 * step], dim=1)
    shape, generator = (with_held_out(count), atoms, 3), Generator().manual_seed(seed)
    positions = chain + displacement * torch.randn(shape, generator=generator, dtype=torch.float64)
    # Labels belong to the positions that are handed out, which are rounded.
    positions = (positions - positions.mean(1, keepdim=True)).float().double().requires_grad_()
    energies = energy(positions)
    (gradient,) = torch.autograd.grad(energies.sum(), positions)
    return cut(_frames(torch.full((atoms,), 6), positions.detach(), energies.detach(), -gradient), count)


def energy(positions: Tensor) -> Tensor:
    """Return the energy (...,) in kcal/mol of chains (..., atoms, 3): springs k (r - r0)^2 / 2 and Lennard-Jones pairs.

    Pairs of atoms three or more apart along the chain attract and repel with ``4 e ((s / r)^12 - (s / r)^6)``.
    """
    i, j = torch.triu_indices(positions.shape[-2], positions.shape[-2], offset=1).unbind(0)
    r: Tensor = torch.linalg.vector_norm(positions[..., i, :] - positions[..., j, :], dim=-1)
    sixth = (WELL_RADIUS / r[..., j - i > 2]) ** 6
    total = 4 * WELL_DEPTH * (sixth.square() - sixth).sum(-1)
    for apart, (rest, stiffness) in enumerate((BOND, ANGLE), start=1):
        total = total + stiffness / 2 * (r[..., j - i == apart] - rest).square().sum(-1)
    return total


def _frames(numbers: Tensor, positions: Tensor, energies: Tensor, forces: Tensor) -> Frames:
    rows = numbers.long().expand(len(positions), -1)
    return Frames(rows, positions.float(), energies.double(), forces.float())
