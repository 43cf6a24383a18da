"""Trap 17: a penalty on convolution kernels rotates space, but not the channel fibres.

A published penalty compares a kernel with itself turned by 90 degrees. A steerable kernel obeys
K(g y) = rho_out(g) K(y) rho_in(g)^-1 instead, so the penalty is large for exactly equivariant kernels, and vanishes for
kernels that break the symmetry of their vector and regular fields.
"""

import pytest
import torch
from torch import Tensor

pytest.importorskip("escnn")

from escnn import gspaces
from escnn import nn as enn

import constrained_equiv as ce


def convolution() -> enn.R2Conv:
    space = gspaces.rot2dOnR2(4)
    inputs = space.type(space.irrep(1), space.regular_repr)
    outputs = space.type(space.regular_repr, space.irrep(1))
    return enn.R2Conv(inputs, outputs, 3, padding=1, bias=False)


def space_alone(kernels: Tensor) -> Tensor:
    """The published penalty: the squared change of kernels (n, out, in, 3, 3) under a turn of the grid, (n,)."""
    return (kernels - kernels.rot90(1, (-2, -1))).square().flatten(1).sum(1)


def invariant_in_space(kernels: Tensor) -> Tensor:
    """The kernels that the published penalty leads to."""
    return torch.stack([kernels.rot90(k, (-2, -1)) for k in range(4)]).mean(0)


def own_and_wrong() -> tuple[enn.R2Conv, Tensor, Tensor]:
    """A relaxed layer, its own kernel, and a random one that does not change when space is turned."""
    layer = convolution()
    own = layer.expand_parameters()[0].detach()
    ce.relax(layer, complement=False)
    return layer, own, invariant_in_space(torch.randn_like(own))


def violations(layer: enn.R2Conv, kernel: Tensor) -> dict[str, float]:
    """What the library's measures say about a kernel, by the unit of the kernel's norm."""
    with torch.no_grad():
        layer.non_equivariant.weight.copy_(kernel)
    found = (ce.constraints.weight(layer, level=1.0, part="non_equivariant"), ce.constraints.lie(layer, level=1.0))
    scale = kernel.norm() / layer.non_equivariant.rows**0.5
    return {c.measure.name: (c.measure.values(c.terms) / scale).item() for c in found}


def breaks_the_symmetry(layer: enn.R2Conv, kernel: Tensor) -> float:
    """The relative equivariance error of the convolution with a kernel."""
    group = ce.groups.cyclic(4)
    vector, regular = ce.representations.frequency(1, group=group), ce.representations.regular(group)
    symmetry = ce.Symmetry(group, ce.actions.feature_maps(vector + regular), ce.actions.feature_maps(regular + vector))
    images = torch.randn(1, layer.in_type.size, 5, 5)
    return ce.equivariance_error(lambda x: torch.nn.functional.conv2d(x, kernel, padding=1), images, symmetry=symmetry)


def test_the_wrong_penalty_has_the_wrong_null_space():
    layer, own, wrong = own_and_wrong()
    random = torch.randn(20, *own.shape)
    size = space_alone(random).mean() / random[0].numel()
    # an exactly equivariant kernel costs as much as a random one
    assert breaks_the_symmetry(layer, own) < 1e-6
    assert space_alone(own[None]).item() > 0.2 * size * own.square().sum().item()
    # and a kernel that costs nothing is not equivariant
    assert space_alone(wrong[None]).item() < 1e-10
    assert breaks_the_symmetry(layer, wrong) > 0.5


def test_our_measures_turn_space_and_fibres():
    layer, own, wrong = own_and_wrong()
    assert all(value < 1e-6 for value in violations(layer, own).values())
    assert all(value > 0.3 for value in violations(layer, wrong).values())


def test_the_projection_leaves_the_layers_own_kernel_alone():
    layer, own, wrong = own_and_wrong()
    projection = layer.non_equivariant.projection
    torch.testing.assert_close(projection.project(own), own, rtol=0, atol=1e-6)
    best = projection.project(wrong)
    assert breaks_the_symmetry(layer, best) < 1e-5 and (best - wrong).norm() > 0.3 * wrong.norm()


def test_scalar_fields_are_why_it_went_unnoticed():
    """Between invariant channels both penalties agree."""
    space = gspaces.rot2dOnR2(4)
    scalars = space.type(*[space.trivial_repr] * 2)
    layer = ce.relax(enn.R2Conv(scalars, scalars, 3), complement=False)
    kernels = torch.randn(4, *layer.non_equivariant.weight.shape)
    torch.testing.assert_close(layer.non_equivariant.projection.project(kernels), invariant_in_space(kernels))
    torch.testing.assert_close(layer.non_equivariant.projection.defect(kernels)[0], space_alone(kernels))
