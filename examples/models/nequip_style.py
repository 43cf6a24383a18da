"""Interaction networks for molecules: energies as sums over atoms, forces as their exact gradients.

Enter positions and species of a batch of molecules; leave energies and forces. The training scripts call it. The one
law: turning, reflecting, moving or renumbering a molecule leaves its energy alone and turns, reflects or renumbers its
forces.

Each layer computes, with R_ij the output of a perceptron on Bessel functions of the distance, smoothly cut off,

    h_i <- gate( L2( sum_j TP_{R_ij}( L1(h_j), Y(x_j - x_i) ) / sqrt(n) ) + S_{z_i}(h_i) )

L1 and L2 are `o3.Linear`, TP is an `o3.TensorProduct` whose weights R_ij are given per edge, S_z is a linear map that
depends on the species (a `FullyConnectedTensorProduct` with the one-hot species). The maps on atoms are
`layers.<k>.before`, `layers.<k>.after` and `layers.<k>.own`; the one on edges is `layers.<k>.message`.

The graph is complete, so edges are a dense tensor `(batch, n, n - 1, ...)`; beyond the cutoff they count for nothing.

Reference:
    S. Batzner et al., "E(3)-equivariant graph neural networks for data-efficient and accurate interatomic potentials",
    Nature Communications 13, 2022;
    J. Gasteiger, J. Gross, S. Guennemann, "Directional message passing for molecular graphs", ICLR 2020, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from e3nn import o3
from e3nn.nn import FullyConnectedNet, Gate
from torch import Tensor, nn

__all__ = ["InteractionLayer", "NequIP"]


class NequIP(nn.Module):
    """Predict energies and forces of molecules.

    Args:
        species: Atomic numbers that occur, in any order.
        hidden: Features of an atom: scalars `0e` first, then any other irreps.
        layers: Number of interactions; the last one leaves scalars only.
        lmax: Highest degree of the spherical harmonics of an edge.
        cutoff: Distance at which atoms stop to feel each other, in the unit of the positions.
        radial: Number of Bessel functions.
        radial_width: Width of the radial perceptrons.
        scale: Unit of the predicted energies per atom, for example the standard deviation of the forces.
        shift: Energy per atom of an untrained model, for example the mean of the training energies over the atoms.

    Raises:
        ValueError: If `hidden` does not begin with even scalars, or there are no species, layers or functions.

    Example:
        >>> model = NequIP([1, 6], hidden="4x0e + 2x1o", layers=2)
        >>> energy, forces = model(torch.randn(2, 5, 3), torch.tensor([6, 1, 1, 1, 1]))
        >>> energy.shape, forces.shape
        (torch.Size([2]), torch.Size([2, 5, 3]))
    """

    def __init__(
        self,
        species: Sequence[int],
        *,
        hidden: str | o3.Irreps = "32x0e + 32x1o + 32x2e",
        layers: int = 3,
        lmax: int = 2,
        cutoff: float = 5.0,
        radial: int = 8,
        radial_width: int = 64,
        scale: float = 1.0,
        shift: float = 0.0,
    ) -> None:
        super().__init__()
        irreps = o3.Irreps(hidden).simplify()
        if not irreps or not irreps[0].ir.is_scalar() or sum(ir.l == 0 for _, ir in irreps) > 1:
            raise ValueError(
                f"hidden={str(hidden)!r}, expected even scalars once, in front, and no odd ones (the gates are even "
                "functions of scalars); pass for example hidden='32x0e + 32x1o'"
            )
        kinds = sorted(set(species))
        if not kinds or layers < 1 or radial < 1:
            raise ValueError(f"species={kinds}, layers={layers}, radial={radial}, expected at least 1 each")
        self.cutoff, self.scale, self.shift = cutoff, scale, shift
        self.register_buffer("species", torch.tensor(kinds))
        self.register_buffer("waves", math.pi / cutoff * torch.arange(1, radial + 1), persistent=False)
        attributes = o3.Irreps.spherical_harmonics(lmax)
        self.harmonics = o3.SphericalHarmonics(attributes, normalize=True, normalization="component")
        one_hot = o3.Irreps([(len(kinds), "0e")])
        self.embed = o3.Linear(one_hot, irreps[:1])
        outputs = [irreps] * (layers - 1) + [irreps[:1]]
        inputs = [irreps[:1], *outputs[:-1]]
        self.layers = nn.ModuleList(
            InteractionLayer(before, after, attributes, one_hot, [radial, radial_width, radial_width])
            for before, after in zip(inputs, outputs, strict=True)
        )
        self.readout = o3.Linear(irreps[:1], "1x0e", biases=True)

    def forward(self, positions: Tensor, species: Tensor) -> tuple[Tensor, Tensor]:
        """Return energies (batch,) and forces (batch, n, 3).

        Args:
            positions: Shape `(batch, n, 3)`, any n >= 2.
            species: Atomic numbers, shape `(n,)` or `(batch, n)`.
        """
        batch, atoms = positions.shape[:2]
        if positions.shape != (batch, atoms, 3) or species.shape not in ((atoms,), (batch, atoms)):
            raise ValueError(
                f"positions {tuple(positions.shape)}, species {tuple(species.shape)}, expected (batch, n, 3) and (n,) "
                "or (batch, n)"
            )
        with torch.enable_grad():
            if not positions.requires_grad:
                positions = positions.detach().requires_grad_()
            energies = self.energy(positions, species)
            (slope,) = torch.autograd.grad(energies.sum(), positions, create_graph=self.training)
        return energies, -slope

    def energy(self, positions: Tensor, species: Tensor) -> Tensor:
        """Return energies (batch,) alone; arguments as for `forward`."""
        one_hot = (species.expand(positions.shape[:2]).unsqueeze(-1) == self.species).to(positions.dtype)
        between = _others(positions) - positions.unsqueeze(2)
        distance = torch.linalg.vector_norm(between, dim=-1, keepdim=True)
        attributes = self.harmonics(between)
        bessel = (2 / self.cutoff) ** 0.5 * torch.sin(distance * self.waves) / distance
        radial = bessel * _envelope(distance / self.cutoff)
        atoms = self.embed(one_hot)
        for layer in self.layers:
            atoms = layer(atoms, one_hot, attributes, radial)
        per_atom = self.readout(atoms).squeeze(-1)
        return (self.scale * per_atom + self.shift).sum(-1)


class InteractionLayer(nn.Module):
    """One round of messages between atoms, the species-dependent map of the atom's own features, and a gate.

    Args:
        inputs: Irreps of an atom's features.
        outputs: Irreps after the layer, even scalars first.
        attributes: Irreps of an edge's attributes.
        one_hot: Irreps of the one-hot species.
        radial: Sizes of the radial perceptron: functions, then hidden layers.
    """

    def __init__(
        self, inputs: o3.Irreps, outputs: o3.Irreps, attributes: o3.Irreps, one_hot: o3.Irreps, radial: list[int]
    ) -> None:
        super().__init__()
        scalars, rest = outputs[:1], outputs[1:]
        gates = o3.Irreps([(rest.num_irreps, "0e")]) if rest else o3.Irreps()
        self.gate = Gate(scalars, [nn.functional.silu], gates, [torch.sigmoid] * len(gates), rest)
        self.before = o3.Linear(inputs, inputs)
        wanted = {ir for _, ir in self.gate.irreps_in}
        paths = [
            (i, j, mul, ir)
            for i, (mul, left) in enumerate(inputs)
            for j, (_, right) in enumerate(attributes)
            for ir in left * right
            if ir in wanted
        ]
        middle, order, _ = o3.Irreps([(mul, ir) for _, _, mul, ir in paths]).sort()
        self.message = o3.TensorProduct(
            inputs,
            attributes,
            middle,
            [(i, j, order[k], "uvu", True) for k, (i, j, _, _) in enumerate(paths)],
            shared_weights=False,
            internal_weights=False,
        )
        self.radial = FullyConnectedNet([*radial, self.message.weight_numel], nn.functional.silu)
        self.after = o3.Linear(middle.simplify(), self.gate.irreps_in)
        self.own = o3.FullyConnectedTensorProduct(inputs, one_hot, self.gate.irreps_in)

    def forward(self, atoms: Tensor, one_hot: Tensor, attributes: Tensor, radial: Tensor) -> Tensor:
        """Pass messages once.

        Args:
            atoms: Features h_i, shape `(batch, n, inputs)`.
            one_hot: Species, shape `(batch, n, species)`.
            attributes: Spherical harmonics of the edges, shape `(batch, n, n - 1, attributes)`, receiver first.
            radial: Functions of the distances, shape `(batch, n, n - 1, functions)`, zero beyond the cutoff.
        """
        senders = _others(self.before(atoms))
        messages = self.message(senders, attributes, self.radial(radial))
        gathered = messages.sum(2) / messages.shape[2] ** 0.5
        updated: Tensor = self.gate(self.after(gathered) + self.own(atoms, one_hot))
        return updated


def _others(features: Tensor) -> Tensor:
    """Give each atom the features of all others, `(batch, n, ...) -> (batch, n, n - 1, ...)`, in cyclic order."""
    return torch.stack([features.roll(-shift, dims=1) for shift in range(1, features.shape[1])], dim=2)


def _envelope(x: Tensor) -> Tensor:
    """Fall from 1 at x = 0 to 0 at x = 1 with two smooth derivatives (Gasteiger et al., section 4, p = 6)."""
    inside = 1 - 28 * x**6 + 48 * x**7 - 21 * x**8
    return torch.where(x < 1, inside, 0.0)
