"""Adapter for vector neurons: linear maps between lists of 3-vectors, given as a `nn.Linear` over the channels.

What enters: the axis on which the channels are. What leaves: an `Adapter` for the layers that the user chooses, for
nothing in a `nn.Linear` tells that its features are vectors.
Law: the layer and its term are one dense product with kron(weight, I_3) + scale * gate * W, for every rank of input.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from constrained_equiv._terms import CHILD
from constrained_equiv.adapters._base import Adapter, Methods, Site
from constrained_equiv.errors import RelaxationError
from constrained_equiv.intertwiners import intertwiners
from constrained_equiv.representations import Layout, vectors


def vector_neurons(axis: int = 1) -> Adapter:
    """Relax linear maps between lists of vectors: `nn.Linear`, or a subclass of it, that acts on the channels alone.

    Args:
        axis: of the channels, 1 for features (batch, channels, 3, ...) with any number of trailing axes, whose layers
            are subclasses of `nn.Linear` that contract this axis; or -1 for plain `nn.Linear` layers called on features
            (..., 3, channels).

    Returns:
        An adapter for `ce.relax(model, where=..., adapter=...)`. It refuses layers that have a bias, for no vector is
        the same in every frame, or that do not act on the stated axis.

    Raises:
        RelaxationError: if `axis` is another one.

    Example:
        >>> import torch, constrained_equiv as ce
        >>> layer = ce.relax(
        ...     torch.nn.Linear(4, 8, bias=False),
        ...     where=lambda name, m: True,
        ...     adapter=ce.adapters.vector_neurons(axis=-1),
        ... )
        >>> layer(torch.zeros(2, 100, 3, 4)).shape
        torch.Size([2, 100, 3, 8])

    Reference: Deng et al. (2021), "Vector Neurons: A General Framework for SO(3)-Equivariant Networks", section 3.1.
    """
    if axis not in _ADAPTERS:
        raise RelaxationError(
            f"vector_neurons(axis={axis!r}): expected 1 for features (batch, channels, 3, ...) or -1 for features "
            "(..., 3, channels); for other layouts use ce.adapters.linear(inputs, outputs, axes=...)"
        )
    return _ADAPTERS[axis]


def _site(layer: nn.Module, *, axis: int) -> Site:
    if not isinstance(layer, nn.Linear):
        raise RelaxationError(
            f"{type(layer).__name__}: expected nn.Linear or a subclass of it; choose such layers in where="
        )
    layout: Layout = "mul_ir" if axis == 1 else "ir_mul"
    space = intertwiners(vectors(layer.in_features, layout=layout), vectors(layer.out_features, layout=layout))
    if CHILD not in layer._modules:
        _check(layer, axis)
    return Site(space, space.shape, float(space.shape[0]), str(space.inputs), str(space.outputs), layer.weight, axis)


def _check(layer: nn.Linear, axis: int) -> None:
    """Ask the layer itself whether it contracts the stated axis and nothing else."""
    if layer.bias is not None:
        raise RelaxationError(
            f"{layer} has a bias, which is not equivariant on vectors: expected nn.Linear(..., bias=False)"
        )
    probe = torch.randn(2, 3, layer.in_features, generator=torch.Generator().manual_seed(0)).to(layer.weight)
    expected = probe @ layer.weight.detach().mT
    if axis == 1:
        probe, expected = probe.mT, expected.mT
    try:
        with torch.no_grad():
            found = layer(probe)
    except (RuntimeError, ValueError) as error:
        raise RelaxationError(f"{layer} on features of shape {tuple(probe.shape)}: {_remedy(axis)}") from error
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-2, atol=1e-2):
        raise RelaxationError(
            f"{layer} maps features of shape {tuple(probe.shape)} to {tuple(found.shape)} other than by its weight: "
            f"{_remedy(axis)}"
        )


def _remedy(axis: int) -> str:
    return (
        f"expected a layer that contracts axis {axis} with its weight; choose other layers in where=, or "
        f"ce.adapters.vector_neurons(axis={-axis})"
    )


def _methods(base: type[nn.Module]) -> Methods:
    def forward(self: Any, input: Tensor) -> Tensor:
        term = self.non_equivariant
        if not term.active:
            return base.forward(self, input)  # type: ignore[no-any-return]
        matrix = term.matrix()
        _diagonal(self, matrix).add_(self.weight.unsqueeze(-1))
        if term.plan == -1:
            rows = input.flatten(-2)
            result = nn.functional.linear(rows, matrix).view(*input.shape[:-1], self.out_features)
        else:
            columns = input.flatten(1, 2)
            rows = columns.movedim(1, -1)
            result = _contract(matrix, columns).view(len(input), self.out_features, *input.shape[2:])
        term.observe(rows, result)
        return result

    return {"forward": forward}


def _contract(matrix: Tensor, columns: Tensor) -> Tensor:
    """Multiply features (batch, in, ...) by a matrix (out, in)."""
    if columns.ndim == 2:
        return nn.functional.linear(columns, matrix)
    product = torch.bmm(matrix.expand(len(columns), -1, -1), columns.flatten(2))
    return product.view(len(columns), -1, *columns.shape[2:])


def _diagonal(layer: Any, matrix: Tensor) -> Tensor:
    """View the entries (out, in, 3) of a matrix at which kron(weight, I_3), or kron(I_3, weight), has its weights."""
    if layer.non_equivariant.plan == -1:
        return matrix.view(3, layer.out_features, 3, layer.in_features).diagonal(dim1=0, dim2=2)
    return matrix.view(layer.out_features, 3, layer.in_features, 3).diagonal(dim1=1, dim2=3)


def _fold(layer: Any, equivariant: Tensor, inputs: object = None) -> Tensor:
    if "weight" not in layer._parameters:  # computed from others, as by torch.nn.utils.parametrize
        return torch.zeros_like(equivariant)
    layer.weight.add_(_diagonal(layer, equivariant).mean(-1))
    return equivariant


_ADAPTERS = {
    axis: Adapter(
        "vector neurons", lambda layer: isinstance(layer, nn.Linear), partial(_site, axis=axis), _methods, _fold
    )
    for axis in (1, -1)
}
