"""Adapter for vector neurons: linear maps between lists of 3-vectors, given as a `nn.Linear` over the channels.

What enters: the axis on which the channels are. What leaves: an `Adapter` for the layers that the user chooses, for
nothing in a `nn.Linear` tells that its features are vectors.
Law: the layer and its term are one dense product with kron(weight, I_3) + scale * gate * W, for every rank of input,
and nothing is stored for the backward pass but the features and that matrix.

A layer that holds more than its weight keeps its forward pass: the term is added to what it returns, and nothing is
folded, for nobody knows what such a layer makes of its weight.
"""

from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from constrained_equiv._terms import CHILD
from constrained_equiv.adapters._base import Adapter, Methods, Site, first_argument
from constrained_equiv.errors import RelaxationError, RepresentationError
from constrained_equiv.intertwiners import intertwiners
from constrained_equiv.representations import Layout, vectors

Axis: TypeAlias = Literal[1, -1, "swapped"]

_FEATURES: dict[Axis, str] = {
    1: "1 for subclasses of nn.Linear called on features (batch, channels, 3, ...)",
    -1: "-1 for features (..., 3, channels)",
    "swapped": "'swapped' for nn.Linear called on features.transpose(1, -1)",
}


def vector_neurons(axis: Axis = 1) -> Adapter:
    """Relax linear maps between lists of vectors: `nn.Linear`, or a subclass of it, that acts on the channels alone.

    Args:
        axis: of the channels, 1 for features (batch, channels, 3, ...) with any number of trailing axes, whose layers
            are subclasses of `nn.Linear` that contract this axis; -1 for plain `nn.Linear` layers called on features
            (..., 3, channels); `swapped` for plain `nn.Linear` layers between two transpositions,
            `linear(features.transpose(1, -1)).transpose(1, -1)` with features (batch, channels, 3, ...), as the
            published networks have them.

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
            f"vector_neurons(axis={axis!r}): expected {_remedy()}; for other layouts use "
            "ce.adapters.linear(inputs, outputs, axes=...)"
        )
    return _ADAPTERS[axis]


def _site(layer: nn.Module, *, axis: Axis) -> Site:
    if not isinstance(layer, nn.Linear):
        raise RelaxationError(
            f"{type(layer).__name__}: expected nn.Linear or a subclass of it; choose such layers in where="
        )
    layout: Layout = "ir_mul" if axis == -1 else "mul_ir"
    space = intertwiners(vectors(layer.in_features, layout=layout), vectors(layer.out_features, layout=layout))
    if CHILD not in layer._modules:
        _check(layer, axis)
    plan = _Plan(axis, _is_weight_alone(layer))
    return Site(space, space.shape, float(space.shape[0]), str(space.inputs), str(space.outputs), layer.weight, plan)


class _Plan(NamedTuple):
    axis: Axis
    dense: bool  # whether the layer is its weight and nothing else


def _is_weight_alone(layer: nn.Linear) -> bool:
    held = {**layer._parameters, **layer._buffers, **layer._modules}
    return {name for name, value in held.items() if value is not None and name != CHILD} == {"weight"}


def _check(layer: nn.Linear, axis: Axis) -> None:
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
        raise RelaxationError(f"{layer} on features of shape {tuple(probe.shape)} fails: {_other(axis)}") from error
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-2, atol=1e-2):
        raise RelaxationError(
            f"{layer} maps features of shape {tuple(probe.shape)} to {tuple(found.shape)} other than by its weight: "
            f"{_other(axis)}"
        )


def _other(axis: Axis) -> str:
    return (
        f"expected a layer that contracts axis {1 if axis == 1 else -1} with its weight; choose other layers in where= "
        f"or another axis= of ce.adapters.vector_neurons: {_remedy()}"
    )


def _remedy() -> str:
    return ", ".join(_FEATURES.values())


def _methods(base: type[nn.Module]) -> Methods:
    first = first_argument(base)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        term = self.non_equivariant
        if not term.active:
            return base.forward(self, *args, **kwargs)  # type: ignore[no-any-return]
        axis, dense = term.plan
        dense = dense and len(args) + len(kwargs) == 1  # a second argument is known to the layer's own forward alone
        input: Tensor = first(args, kwargs)
        features = input.transpose(1, -1) if axis == "swapped" else input
        _check_features(self, features)
        matrix = term.matrix()
        if dense:
            _diagonal(self, matrix).add_(self.weight.unsqueeze(-1))
        rows, product = _product(self, features, matrix)
        result = product.transpose(1, -1) if axis == "swapped" else product
        if not dense:
            result = base.forward(self, *args, **kwargs) + result
        term.observe(rows, result)
        return result

    return {"forward": forward}


def _product(layer: Any, features: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Multiply features by a matrix (out, in); return them as rows (..., in), and the product in their layout."""
    if layer.non_equivariant.plan.axis == -1:
        rows = features.flatten(-2)
        return rows, nn.functional.linear(rows, matrix).view(*features.shape[:-1], layer.out_features)
    columns = features.flatten(1, 2)
    product = _contract(matrix, columns).view(len(features), layer.out_features, *features.shape[2:])
    return columns.movedim(1, -1), product


def _check_features(layer: Any, features: Tensor) -> None:
    axis: Axis = layer.non_equivariant.plan.axis
    found = features.shape[-2:][::-1] if axis == -1 else features.shape[1:3]
    if features.ndim < 2 or tuple(found) != (layer.in_features, 3):
        swapped = " after transpose(1, -1)" if axis == "swapped" else ""
        raise RepresentationError(
            f"{type(layer).__name__}: features of shape {tuple(features.shape)}{swapped}: expected {layer.in_features} "
            f"channels of 3 components; ce.adapters.vector_neurons(axis=) takes {_remedy()}"
        )


def _contract(matrix: Tensor, columns: Tensor) -> Tensor:
    """Multiply features (batch, in, ...) by a matrix (out, in)."""
    if columns.ndim == 2:
        return nn.functional.linear(columns, matrix)
    flat = columns.flatten(2)
    if columns.device.type == "cpu" and flat.numel() and matrix.numel() > flat.shape[1:].numel():
        # Of a product with an expanded matrix, autograd makes one gradient per element of the batch and then their sum.
        # A convolution makes the sum alone, but is slow with few channels, and rounds to TF32 on CUDA.
        product = nn.functional.conv1d(flat, matrix.unsqueeze(-1))
    else:
        product = torch.bmm(matrix.expand(len(flat), -1, -1), flat)
    return product.view(len(columns), len(matrix), *columns.shape[2:])


def _diagonal(layer: Any, matrix: Tensor) -> Tensor:
    """View the entries (out, in, 3) of a matrix at which kron(weight, I_3), or kron(I_3, weight), has its weights."""
    if layer.non_equivariant.plan.axis == -1:
        return matrix.view(3, layer.out_features, 3, layer.in_features).diagonal(dim1=0, dim2=2)
    return matrix.view(layer.out_features, 3, layer.in_features, 3).diagonal(dim1=1, dim2=3)


def _fold(layer: Any, equivariant: Tensor, inputs: object = None) -> Tensor:
    if not layer.non_equivariant.plan.dense or "weight" not in layer._parameters:  # by now computed from others
        return torch.zeros_like(equivariant)
    layer.weight.add_(_diagonal(layer, equivariant).mean(-1))
    return equivariant


_ADAPTERS: dict[Axis, Adapter] = {
    axis: Adapter(
        "vector neurons", lambda layer: isinstance(layer, nn.Linear), partial(_site, axis=axis), _methods, _fold
    )
    for axis in _FEATURES
}
