"""Adapter for `nn.Linear` and own layers whose representations the user states.

What enters: representations of the layer's input and output and the axes they live on. What leaves: an `Adapter`.
Law: the term acts on the named axes flattened in the order given, at the layer's own output.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from constrained_equiv.adapters._base import Adapter, Methods, Site, first_argument
from constrained_equiv.errors import RelaxationError, RepresentationError
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
        site=lambda layer: _site(layer, space, axes),
        methods=_methods,
        fold=_fold,
    )


def _site(layer: nn.Module, space: Intertwiners, axes: tuple[int, ...]) -> Site:
    like = next((p for p in layer.parameters() if p.is_floating_point()), None)
    if like is None:
        raise RelaxationError(
            f"{type(layer).__name__} has no parameters: expected a layer with weights, whose dtype and device the term "
            "takes"
        )
    dense = (
        axes == (-1,)
        and type(layer).forward is nn.Linear.forward
        and layer.weight.shape == space.shape
        and "weight" in layer._parameters  # not computed from others, as by torch.nn.utils.parametrize
    )
    return Site(
        space,
        space.shape,
        float(max(space.shape[0], 1)),
        str(space.inputs),
        str(space.outputs),
        like,
        _Plan(axes, dense),
    )


class _Plan(NamedTuple):
    axes: tuple[int, ...]
    dense: bool  # the layer's own weight is the matrix that the term adds to


def _methods(base: type[nn.Module]) -> Methods:
    first = first_argument(base)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        term = self.non_equivariant
        if not term.active:
            return base.forward(self, *args, **kwargs)
        features: Tensor = first(args, kwargs)
        if term.plan.dense:
            result = nn.functional.linear(features, self.weight + term.matrix(), self.bias)
            term.observe(features, result)
            return result
        result = base.forward(self, *args, **kwargs)
        axes = term.plan.axes
        last = tuple(range(-len(axes), 0))
        moved, target = features.movedim(axes, last), result.movedim(axes, last)
        for found, shape, size, carried in (
            ("features", features.shape, moved.shape[-len(axes) :].numel(), term.projection.inputs),
            ("a result", result.shape, target.shape[-len(axes) :].numel(), term.projection.outputs),
        ):
            if size != carried.dim:
                raise RepresentationError(
                    f"{type(self).__name__}: {found} of shape {tuple(shape)} with {size} entries on axes {axes}: "
                    f"expected {carried.dim} for {carried}; state other representations or axes= in ce.adapters.linear"
                )
        rows = moved.flatten(-len(axes))
        result = term.added_to(target.flatten(-len(axes)), rows).view(target.shape).movedim(last, axes)
        term.observe(rows, result)
        return result

    return {"forward": forward}


def _fold(layer: Any, equivariant: Tensor, inputs: object = None) -> Tensor:
    if not layer.non_equivariant.plan.dense or "weight" not in layer._parameters:  # by now computed from others
        return torch.zeros_like(equivariant)
    layer.weight.add_(equivariant)
    return equivariant
