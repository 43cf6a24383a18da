"""Small organic molecules with a property each, from quantum mechanics or from a formula.

Enters the folder of ``qm9_{train,val,test}.npz`` (`load`) or a seed (`synthetic`); leave atoms, positions, targets. The
one law: the target does not change when a molecule is moved, turned, reflected or its atoms are numbered anew.

Units: angstrom, elementary charges; targets as in `PROPERTIES` (1 hartree = 27.2114 eV).

Reference:
    R. Ramakrishnan, P. O. Dral, M. Rupp, O. A. von Lilienfeld, "Quantum chemistry structures and properties of 134 kilo
    molecules", Sci. Data 1, 2014 (QM9).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad

from examples.data._npz import Samples, Splits, check_choice, cut, read_npz, with_held_out

__all__ = ["PROPERTIES", "Molecules", "load", "screened_repulsion", "synthetic"]

PROPERTIES = {
    "A": "GHz",
    "B": "GHz",
    "C": "GHz",
    "mu": "D",
    "alpha": "bohr^3",
    "homo": "hartree",
    "lumo": "hartree",
    "gap": "hartree",
    "r2": "bohr^2",
    "zpve": "hartree",
    "U0": "hartree",
    "U": "hartree",
    "H": "hartree",
    "G": "hartree",
    "Cv": "cal/mol/K",
}
"""Unit of each property."""

ATOMS = 29
ELEMENTS = (1, 6, 7, 8, 9)
SCREENING = 2.0
"""Range of the simulated property in angstrom."""


@dataclass(frozen=True, eq=False)
class Molecules(Samples):
    """One split; rows are padded to the largest molecule, with zeros.

    Attributes:
        numbers: Atomic numbers, 0 where there is no atom, shape (count, atoms), int64.
        positions: Angstrom, shape (count, atoms, 3), float32.
        charges: Partial charges in units of e, shape (count, atoms), float32.
        targets: The property, shape (count,), float64: total energies need more digits than float32 has.
    """

    numbers: Tensor
    positions: Tensor
    charges: Tensor
    targets: Tensor


def load(folder: str | Path, *, target: str = "alpha") -> Splits[Molecules]:
    """Load 20,000 molecules to train on, 2,000 to validate and 5,000 to test, of at most 29 atoms.

    Args:
        folder: Folder that holds ``qm9_train.npz``, ``qm9_val.npz`` and ``qm9_test.npz``.
        target: One of `PROPERTIES`.
    """
    check_choice("target", target, tuple(PROPERTIES))

    def molecules(part: str) -> Molecules:
        name = f"qm9_{part}.npz"
        arrays = read_npz(
            folder,
            name,
            {
                "z": ("molecules", "atoms"),
                "R": ("molecules", "atoms", 3),
                "q": ("molecules", "atoms"),
                "y": ("molecules", len(PROPERTIES)),
                "y_names": (len(PROPERTIES),),
            },
        )
        column = arrays["y_names"].tolist().index(target)
        numbers, positions, charges = (torch.from_numpy(arrays[key]) for key in "zRq")
        missing = ATOMS - numbers.shape[1]
        if missing < 0:
            raise ValueError(f"found {numbers.shape[1]} atoms in {name}, expected at most {ATOMS}")
        return Molecules(
            pad(numbers.long(), (0, missing)),
            pad(positions.float(), (0, 0, 0, missing)),
            pad(charges.float(), (0, missing)),
            torch.from_numpy(arrays["y"][:, column].copy()),
        )

    return Splits(*map(molecules, Splits._fields))


def synthetic(count: int, *, seed: int = 0, atoms: int = 9) -> Splits[Molecules]:
    """Grow random chains of 3 to `atoms` atoms with steps of 1.4 angstrom and evaluate `screened_repulsion`.

    Args:
        count: Molecules to train on; a quarter as many to validate and test each.
        seed: Seed of everything.
        atoms: Atoms of the largest molecule.
    """
    if atoms < 3:
        raise ValueError(f"found atoms={atoms}, expected at least 3")
    generator, total = Generator().manual_seed(seed), with_held_out(count)
    there = torch.arange(atoms) < torch.randint(3, atoms + 1, (total, 1), generator=generator)
    numbers = torch.tensor(ELEMENTS)[torch.randint(len(ELEMENTS), (total, atoms), generator=generator)] * there
    # A drift along x keeps the chain from crossing itself; the random turn then hides the direction.
    steps = torch.nn.functional.normalize(torch.randn(total, atoms, 3, generator=generator), dim=2)
    steps = 1.4 * torch.nn.functional.normalize(steps + torch.tensor([1.5, 0, 0]), dim=2)
    turns = torch.linalg.qr(torch.randn(total, 3, 3, generator=generator)).Q
    positions = steps.cumsum(1) @ turns * there.unsqueeze(2)
    positions = (positions - positions.sum(1, keepdim=True) / there.sum(1)[:, None, None]) * there.unsqueeze(2)
    charges = (numbers.sum(1, keepdim=True) / there.sum(1, keepdim=True) - numbers) / 20 * there
    return cut(Molecules(numbers, positions, charges, screened_repulsion(numbers, positions)), count)


def screened_repulsion(numbers: Tensor, positions: Tensor) -> Tensor:
    """Return ``sum_(i<j) sqrt(Z_i Z_j) exp(-|x_i - x_j| / 2 angstrom)``, shape (...,), float64."""
    root = numbers.double().sqrt()
    pairs = root.unsqueeze(-1) * root.unsqueeze(-2) * (-torch.cdist(positions, positions).double() / SCREENING).exp()
    return pairs.triu(1).sum((-2, -1))
