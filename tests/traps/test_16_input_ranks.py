"""Trap 16: the relaxed path handles one input rank by a `view` without a permute.

A published vector network flattens features (batch, channels, 3, ...) to rows (..., 3 channels) for a dense layer and
brings the result back. For one rank it used `view` where the axes had to be permuted first, which mixes points,
channels and components; the other ranks were right, and every shape was.
"""

import pytest
import torch
from torch import Tensor, nn

import constrained_equiv as ce
from examples.models.vector_neurons import VNLinear

CHANNELS, OUTPUTS = 4, 5
TRAILING = {3: (), 4: (6,), 5: (6, 2)}
ranks = pytest.mark.parametrize("rank", TRAILING)


def scrambled(features: Tensor, weight: Tensor) -> Tensor:
    """The published path: right for ranks 3 and 5, a bare view for rank 4."""
    batch, channels, _, *trailing = features.shape
    if features.ndim == 4:
        rows = features.reshape(batch, trailing[0], 3 * channels)  # should have moved the points before the channels
        return nn.functional.linear(rows, weight).view(batch, -1, 3, trailing[0])
    rows = features.flatten(1, 2).movedim(1, -1)
    return nn.functional.linear(rows, weight).movedim(-1, 1).reshape(batch, -1, 3, *trailing)


def ours(features: Tensor, weight: Tensor) -> Tensor:
    """What the term of a relaxed layer adds."""
    layer = VNLinear(CHANNELS, OUTPUTS).double()
    plain = layer(features)
    ce.relax(layer, where=lambda name, m: True, adapter=ce.adapters.vector_neurons(), complement=False)
    with torch.no_grad():
        layer.non_equivariant.weight.copy_(weight)
    return layer(features) - plain


def drawn(rank: int) -> tuple[Tensor, Tensor]:
    features = torch.randn(2, CHANNELS, 3, *TRAILING[rank], dtype=torch.float64)
    return features, torch.randn(3 * OUTPUTS, 3 * CHANNELS, dtype=torch.float64)


def by_points(path, features: Tensor, weight: Tensor) -> Tensor:
    """Apply a path to one point after another, as rank 3, which leaves no axis to be confused."""
    points = features.flatten(3) if features.ndim > 3 else features.unsqueeze(-1)
    result = torch.stack([path(points[..., i], weight) for i in range(points.shape[-1])], -1)
    return result.reshape(len(features), OUTPUTS, 3, *features.shape[3:])


def equivariance_gap(path, rank: int) -> float:
    """How much the path breaks the symmetry with a weight that does not: kron(map, identity)."""
    features, _ = drawn(rank)
    weight = torch.kron(torch.randn(OUTPUTS, CHANNELS, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    turn = ce.actions.along(ce.representations.vectors(1), 2)
    symmetry = ce.Symmetry(ce.groups.O3(), inputs=turn, outputs=turn)
    return ce.equivariance_error(lambda x: path(x, weight), features, symmetry=symmetry)


def pointwise_gap(path, rank: int) -> float:
    """How much a result differs from that of its points alone."""
    features, weight = drawn(rank)
    return (path(features, weight) - by_points(path, features, weight)).abs().max().item()


def test_the_wrong_path_fails_for_one_rank_alone():
    for rank in (3, 5):
        assert pointwise_gap(scrambled, rank) < 1e-13 and equivariance_gap(scrambled, rank) < 1e-13
    assert pointwise_gap(scrambled, 4) > 1 and equivariance_gap(scrambled, 4) > 0.1
    features, weight = drawn(4)
    assert scrambled(features, weight).shape == ours(features, weight).shape  # nothing to see in the shapes


@ranks
def test_the_term_acts_on_every_point_alone(rank):
    assert pointwise_gap(ours, rank) < 1e-13


@ranks
def test_an_equivariant_term_breaks_nothing(rank):
    assert equivariance_gap(ours, rank) < 1e-13
