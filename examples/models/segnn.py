"""Steerable E(3) equivariant message passing between a handful of particles.

Enter positions, velocities and charges of a batch of systems; leave predicted positions. The training scripts call it.
The one law: the prediction rotates, reflects, translates and permutes with the particles.

Each layer computes, with brackets for the direct sum and Y for the spherical harmonics of a direction,

    a_ij = Y(x_j - x_i),    a_i = (mean_j a_ij + Y(v_i)) / 2
    m_ij = M1(M0([h_i, h_j, |x_j - x_i|, q_i q_j]; a_ij); a_ij)
    h_i <- h_i + U1(U0([h_i, sum_j m_ij / sqrt(n - 1)]; a_i); a_i)

Every map is an e3nn `FullyConnectedTensorProduct` steered by its second input; M0, M1 and U0 are followed by a gate. No
e3nn layer is subclassed or hidden, so what works on those layers works here: U0 and U1 are `layers.<k>.update.0` and
`layers.<k>.update.1`, M0 and M1 are `layers.<k>.message.0` and `layers.<k>.message.1`.

The graph is complete, so edges are a dense tensor `(batch, n, n - 1, ...)` and aggregation is a sum over one axis.

Reference:
    J. Brandstetter, R. Hesselink, E. van der Pol, E. Bekkers, M. Welling, "Geometric and physical quantities improve
    E(3) equivariant message passing", ICLR 2022, section 3.
"""

from __future__ import annotations

import math

import torch
from e3nn import o3
from e3nn.nn import Gate
from torch import Tensor, nn

__all__ = ["SEGNN", "SEGNNLayer"]

INPUTS = o3.Irreps("1x0e + 2x1o")  # speed; centred position and velocity
PAIR_SCALARS = o3.Irreps("2x0e")  # distance, product of charges
OUTPUT = o3.Irreps("1x1o")  # displacement


class SEGNN(nn.Module):
    """Predict where particles will be: where they are, plus a displacement built from steerable features.

    The full size, the default, has 146,368 parameters (the published network 147,424: it also has biases everywhere).

    Args:
        hidden: Features of a node and of a message: scalars `0e` first, then any other irreps. The default is the
            published size for this task.
        layers: Number of message passing layers.
        lmax: Highest degree of the steering attributes.

    Raises:
        ValueError: If `hidden` does not begin with even scalars, has odd ones, or `layers` or `lmax` is too small.

    Example:
        >>> model = SEGNN("4x0e + 4x1o", layers=1)
        >>> model(torch.randn(2, 5, 3), torch.randn(2, 5, 3), torch.ones(2, 5)).shape
        torch.Size([2, 5, 3])
    """

    def __init__(self, hidden: str | o3.Irreps = "32x0e + 32x1o", *, layers: int = 4, lmax: int = 1) -> None:
        super().__init__()
        irreps = o3.Irreps(hidden).simplify()
        if not irreps or not irreps[0].ir.is_scalar() or sum(ir.l == 0 for _, ir in irreps) > 1:
            raise ValueError(
                f"hidden={str(hidden)!r}, expected even scalars once, in front, and no odd ones (the gates are even "
                "functions of scalars); pass for example hidden='32x0e + 32x1o'"
            )
        if layers < 1:
            raise ValueError(f"layers={layers}, expected at least 1; pass for example layers=4")
        if lmax < 1:
            raise ValueError(f"lmax={lmax}, expected at least 1, or no vector could enter or leave; pass lmax=1")
        attributes = o3.Irreps.spherical_harmonics(lmax)
        self.harmonics = o3.SphericalHarmonics(attributes, normalize=True, normalization="component")
        self.embed = o3.Linear(INPUTS, irreps, biases=True)
        self.layers = nn.ModuleList(SEGNNLayer(irreps, attributes) for _ in range(layers))
        gate = _gate(irreps)
        self.readout = nn.ModuleList(
            [_product(irreps, attributes, gate.irreps_in), _product(irreps, attributes, OUTPUT)]
        )
        self.gate = gate

    def forward(self, positions: Tensor, velocities: Tensor, charges: Tensor) -> Tensor:
        """Predict positions at the target time.

        Args:
            positions: Shape `(batch, n, 3)`, any n >= 2.
            velocities: Shape `(batch, n, 3)`.
            charges: Shape `(batch, n)`.

        Returns:
            Positions, shape `(batch, n, 3)`, in the unit of the given ones.
        """
        if positions.ndim != 3 or positions.shape != velocities.shape or charges.shape != positions.shape[:2]:
            raise ValueError(
                f"positions {tuple(positions.shape)}, velocities {tuple(velocities.shape)}, charges "
                f"{tuple(charges.shape)}, expected the shapes (batch, n, 3), (batch, n, 3), (batch, n); for a "
                "single system pass positions[None], velocities[None], charges[None]"
            )
        between = _others(positions) - positions.unsqueeze(2)
        distance = torch.linalg.vector_norm(between, dim=-1)
        pair_scalars = torch.stack([distance, _others(charges) * charges.unsqueeze(2)], dim=-1)
        edge_attributes = self.harmonics(between)
        node_attributes = (edge_attributes.mean(dim=2) + self.harmonics(velocities)) / 2

        # Centred over the particles, which takes translations out; over the coordinates it would break rotations.
        centred = positions - positions.mean(dim=1, keepdim=True)
        speed = torch.linalg.vector_norm(velocities, dim=-1, keepdim=True)
        nodes = self.embed(torch.cat([speed, centred, velocities], dim=-1))
        for layer in self.layers:
            nodes = layer(nodes, node_attributes, edge_attributes, pair_scalars)
        nodes = self.gate(self.readout[0](nodes, node_attributes))
        displacement: Tensor = self.readout[1](nodes, node_attributes)
        return positions + displacement


class SEGNNLayer(nn.Module):
    """One round of messages along all ordered pairs, and the update of the nodes by their sum.

    Args:
        hidden: Features of a node and of a message, even scalars first.
        attributes: Steering attributes of nodes and edges.
    """

    def __init__(self, hidden: o3.Irreps, attributes: o3.Irreps) -> None:
        super().__init__()
        gate = _gate(hidden)
        self.sizes = [mul * ir.dim for mul, ir in hidden]
        # Equal irreps of sender and receiver side by side make one block: half the contractions of [h_i, h_j].
        pairs = o3.Irreps([(2 * mul, ir) for mul, ir in hidden])
        self.message = nn.ModuleList(
            [
                _product((PAIR_SCALARS + pairs).simplify(), attributes, gate.irreps_in),
                _product(hidden, attributes, gate.irreps_in),
            ]
        )
        self.update = nn.ModuleList([_product(pairs, attributes, gate.irreps_in), _product(hidden, attributes, hidden)])
        self.gate = gate  # without parameters, hence shared by the three products that it follows

    def forward(self, nodes: Tensor, node_attributes: Tensor, edge_attributes: Tensor, pair_scalars: Tensor) -> Tensor:
        """Pass messages once.

        Args:
            nodes: Features h_i, shape `(batch, n, hidden)`.
            node_attributes: Attributes a_i, shape `(batch, n, attributes)`.
            edge_attributes: Attributes a_ij, shape `(batch, n, n - 1, attributes)`, receiver i first.
            pair_scalars: Invariants of the pair, shape `(batch, n, n - 1, 2)`.

        Returns:
            New features, shape of `nodes`.
        """
        senders = _others(nodes)
        receivers = nodes.unsqueeze(2).expand_as(senders)
        messages = torch.cat([pair_scalars, self._interleave(receivers, senders)], dim=-1)
        for product in self.message:
            messages = self.gate(product(messages, edge_attributes))
        gathered = messages.sum(dim=2) / math.sqrt(messages.shape[2])
        hidden = self.gate(self.update[0](self._interleave(nodes, gathered), node_attributes))
        updated: Tensor = nodes + self.update[1](hidden, node_attributes)
        return updated

    def _interleave(self, first: Tensor, second: Tensor) -> Tensor:
        blocks = zip(torch.split(first, self.sizes, dim=-1), torch.split(second, self.sizes, dim=-1), strict=True)
        return torch.cat([block for pair in blocks for block in pair], dim=-1)


def _others(features: Tensor) -> Tensor:
    """Give each particle the features of all others, `(batch, n, ...) -> (batch, n, n - 1, ...)`, in cyclic order."""
    return torch.stack([features.roll(-shift, dims=1) for shift in range(1, features.shape[1])], dim=2)


def _gate(hidden: o3.Irreps) -> Gate:
    """Build the nonlinearity: SiLU on scalars, everything else multiplied by the sigmoid of an extra scalar."""
    scalars, rest = hidden[:1], hidden[1:]
    gates = o3.Irreps([(rest.num_irreps, "0e")]) if rest else o3.Irreps()
    return Gate(scalars, [nn.functional.silu], gates, [torch.sigmoid] * len(gates), rest)


def _product(left: o3.Irreps, right: o3.Irreps, out: o3.Irreps) -> o3.FullyConnectedTensorProduct:
    """Build a tensor product whose weights are drawn like those of a `nn.Linear` of the same fan-in.

    By itself e3nn draws weights of unit variance and divides by the square root of the fan-in on every call. Adaptive
    optimizers step by the learning rate whatever the scale of a weight: the relative step would shrink with the width.
    """
    product = o3.FullyConnectedTensorProduct(left, right, out, path_normalization="none")
    fan_in = [0] * len(product.irreps_out)
    for instruction in product.instructions:
        fan_in[instruction.i_out] += math.prod(instruction.path_shape[:2])
    with torch.no_grad():
        for instruction, weight in zip(product.instructions, product.weight_views(), strict=True):
            bound = 1.0 / math.sqrt(fan_in[instruction.i_out])
            weight.uniform_(-bound, bound)
    return product
