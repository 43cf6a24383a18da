"""Actions: how a group element moves a tensor, where "multiply the last axis by rho(g)" is not enough.

What enters: a representation and an axis. What leaves: functions `(element, tensor) -> tensor` for `Symmetry`.
Law: act(g, act(h, x)) = act(g h, x), and act(identity, x) = x; of `pixels` up to interpolation where the grid does not
carry the group.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from constrained_equiv import groups
from constrained_equiv.errors import RepresentationError
from constrained_equiv.groups import Group
from constrained_equiv.representations import Representation

Action: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Maps a group element (d, d) and a tensor to the moved tensor."""


def along(representation: Representation, axis: int) -> Action:
    """Act by a representation along one axis of a tensor, for example `along(vectors(1), -2)` on (batch, 3, points)."""
    return lambda element, tensor: representation.act(element, tensor, axis=axis)


def chain(*actions: Action) -> Action:
    """Act by several actions one after another; they have to commute, as those of different axes or factors do."""

    def act(element: Tensor, tensor: Tensor) -> Tensor:
        for action in actions:
            tensor = action(element, tensor)
        return tensor

    return act


def through(group: Group, index: int, action: Action) -> Action:
    """Let a direct product act by an action of one of its factors.

    Args:
        group: made by `ce.groups.product`.
        index: which factor.
        action: of that factor.

    Raises:
        RepresentationError: if there is no such factor.

    Example:
        >>> both = groups.product(groups.O3(), groups.symmetric(5))
        >>> turn = lambda element, tensor: tensor @ element.to(tensor).mT
        >>> cloud = chain(through(both, 0, turn), through(both, 1, permute(-2)))
        >>> cloud(both.identity, torch.zeros(2, 5, 3)).shape
        torch.Size([2, 5, 3])
    """
    if not 0 <= index < len(group.factors):
        raise RepresentationError(f"through({group}, {index}): expected one of {list(enumerate(group.factors))}")
    return lambda element, tensor: action(groups.factor_of(group, element, index), tensor)


def permute(*axes: int) -> Action:
    """Permute the entries along axes by an element of a symmetric group, for example `permute(-2, -1)` an adjacency."""

    def act(element: Tensor, tensor: Tensor) -> Tensor:
        order = element.argmax(-1).to(tensor.device)
        for axis in axes:
            tensor = tensor.index_select(axis, order)
        return tensor

    return act


def relabel(element: Tensor, tensor: Tensor) -> Tensor:
    """Rename nodes in a tensor of node numbers, such as an edge index (2, edges), as `permute` moves the nodes."""
    return element.argmax(-2).to(tensor.device)[tensor]


def points(element: Tensor, tensor: Tensor) -> Tensor:
    """Move positions (..., 3) by an affine matrix (4, 4) of E(3)."""
    affine = element.to(tensor)
    return tensor @ affine[:-1, :-1].mT + affine[:-1, -1]


def vectors(element: Tensor, tensor: Tensor) -> Tensor:
    """Turn vectors (..., 3), velocities or forces, by the linear part of an affine matrix (4, 4) of E(3)."""
    return tensor @ element.to(tensor)[:-1, :-1].mT


def pixels(element: Tensor, tensor: Tensor) -> Tensor:
    """Rotate or flip images (..., height, width) about their centre, x to the right and y up: (g f)(p) = f(g^-1 p).

    Quarter turns and flips move pixels and are exact; they exchange height and width where they exchange the axes. For
    other elements the image is interpolated bilinearly with zeros outside: then use `disc`, and a tolerance from
    `interpolation_error`.

    Args:
        element: (2, 2) orthogonal.
        tensor: (..., height, width).

    Raises:
        RepresentationError: if the element is being differentiated.
    """
    forward_ad: Any = torch.autograd.forward_ad
    if forward_ad.unpack_dual(element).tangent is not None:
        raise RepresentationError(
            "pixels cannot be differentiated in the group element, for a grid has no infinitesimal motion: expected a "
            "finite group, for example ce.groups.cyclic(4), and assert_equivariant"
        )
    height, width = tensor.shape[-2:]
    lattice = element.round()
    exact = bool((element - lattice).abs().max() < 1e-6)
    if exact and lattice[0, 0] == 0:
        rows, columns = width, height
    else:
        rows, columns = height, width
    x = torch.arange(columns, dtype=torch.float64) - (columns - 1) / 2
    y = (rows - 1) / 2 - torch.arange(rows, dtype=torch.float64)
    targets = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)  # (rows, columns, 2)
    sources = targets @ (lattice if exact else element)  # g^-1 p = g^T p, as rows
    column, row = sources[..., 0] + (width - 1) / 2, (height - 1) / 2 - sources[..., 1]
    if exact:
        return tensor[..., row.round().long().to(tensor.device), column.round().long().to(tensor.device)]
    grid = torch.stack([2 * column / max(width - 1, 1) - 1, 2 * row / max(height - 1, 1) - 1], -1).to(tensor)
    moved = torch.nn.functional.grid_sample(tensor.reshape(1, -1, height, width), grid[None], align_corners=True)
    return moved.reshape(tensor.shape)


def feature_maps(representation: Representation) -> Action:
    """Move maps (..., channels, height, width): the grid as `pixels`, the channels by a representation."""
    return chain(along(representation, -3), pixels)


def disc(images: Tensor) -> Tensor:
    """Set images (..., height, width) to zero outside the disc that every rotation keeps inside the image."""
    height, width = images.shape[-2:]
    y = torch.arange(height, dtype=torch.float64) - (height - 1) / 2
    x = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    inside = y[:, None].square() + x.square() <= (min(height, width) / 2 - 1) ** 2
    return images * inside.to(images)


def interpolation_error(images: Tensor, elements: Tensor) -> float:
    """Measure what interpolation costs: the relative change of images moved there and back, the largest over elements.

    A model that is equivariant up to interpolation has an error of this size for elements off the grid; smooth images
    have a small one.

    Args:
        images: (..., height, width), zero outside `disc`.
        elements: (n, 2, 2) orthogonal.

    Example:
        >>> y, x = torch.meshgrid(torch.linspace(-4, 4, 33), torch.linspace(-4, 4, 33), indexing="ij")
        >>> interpolation_error(torch.exp(-(x**2) - (y - 1) ** 2), groups.cyclic(8).elements()) < 0.05
        True
    """
    size = float(torch.linalg.vector_norm(images))
    gaps = [float(torch.linalg.vector_norm(pixels(g.mT, pixels(g, images)) - images)) for g in elements]
    return max(gaps, default=0.0) / size if size else 0.0
