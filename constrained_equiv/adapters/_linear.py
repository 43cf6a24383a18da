"""Adapter for `nn.Linear` and own layers whose representations the user states.

What enters: representations of the layer's input and output and the axes they live on. What leaves: an `Adapter`.
Law: the term acts on the named axes flattened in the order given, at the layer's own output.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from constrained_equiv.adapters._base import Adapter, Methods, Site
from constrained_equiv.errors import RelaxationError
from constrained_equiv.groups import Group
from constrained_equiv.intertwiners import Intertwiners, intertwiners


def linear(inputs: object, outputs: object, *, axes: Sequence[int] = (-1,), group: Group | None = None) -> Adapter:
    """Relax layers that carry stated representations.

    Args:
        inputs: representation of the first argument's features, or irreps of O(3).
        outputs: representation of the result's features.
        axes: the tensor axes that the representations act on, flattened in this order: `(-1,)` for features in the
            last axis, `(-2, -1)` for sets (..., points, channels), `(1, 2)` for vectors (batch, channels, 3, ...).
        group: how to read irreps strings; O(3) by default.

    Returns:
        An adapter for `ce.relax(model, where=..., adapter=...)`. The layer takes the features as its first argument and
        returns one tensor with the same axes.

    Raises:
        RepresentationError: if the representations cannot be read or belong to different groups.

    Example:
        >>> import torch, constrained_equiv as ce
        >>> points = ce.representations.permutation(6, channels=4)
        >>> layer = ce.relax(
        ...     torch.nn.Linear(4, 4),
        ...     where=lambda name, m: True,
        ...     adapter=ce.adapters.linear(points, points, axes=(-2, -1)),
        ... )
        >>> layer(torch.zeros(2, 6, 4)).shape
        torch.Size([2, 6, 4])
    """
    space = intertwiners(inputs, outputs, group=group)
    axes = tuple(axes)
    return Adapter(
        name="linear",
        matches=lambda layer: True,
        site=lambda layer: _site(layer, space),
        methods=lambda base: _methods(base, axes),
        fold=_fold,
    )


def _site(layer: nn.Module, space: Intertwiners) -> Site:
    like = next((p for p in layer.parameters() if p.is_floating_point()), None)
    if like is None:
        raise RelaxationError(
            f"{type(layer).__name__} has no parameters: expected a layer with weights, whose dtype and device the term "
            "takes"
        )
    return Site(space, space.shape, float(space.shape[0]), str(space.inputs), str(space.outputs), like)


def _methods(base: type[nn.Module], axes: tuple[int, ...]) -> Methods:
    plain_linear = base.forward is nn.Linear.forward and axes == (-1,)

    def forward(self: Any, features: Tensor, *args: Any, **kwargs: Any) -> Any:
        term = self.non_equivariant
        if not term.active:
            return base.forward(self, features, *args, **kwargs)
        if plain_linear and self.weight.shape == term.weight.shape:
            result = nn.functional.linear(features, self.weight + term.matrix(), self.bias)
            term.observe(features, result)
            return result
        result = base.forward(self, features, *args, **kwargs)
        last = tuple(range(-len(axes), 0))
        moved, target = features.movedim(axes, last), result.movedim(axes, last)
        rows = moved.flatten(-len(axes))
        extra = nn.functional.linear(rows, term.matrix()).view(target.shape)
        result = result + extra.movedim(last, axes)
        term.observe(rows, result)
        return result

    return {"forward": forward}


def _fold(layer: Any, equivariant: Tensor) -> Tensor:
    if not isinstance(layer, nn.Linear) or layer.weight.shape != equivariant.shape:
        return torch.zeros_like(equivariant)
    layer.weight.add_(equivariant)
    return equivariant
