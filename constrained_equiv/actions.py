"""Actions: how a group element moves a tensor, where "multiply the last axis by rho(g)" is not enough.

What enters: a representation and an axis. What leaves: functions `(element, tensor) -> tensor` for `Symmetry`.
Law: act(g, act(h, x)) = act(g h, x), and act(identity, x) = x.
"""

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from constrained_equiv.representations import Representation

Action: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Maps a group element (d, d) and a tensor to the moved tensor."""


def along(representation: Representation, axis: int) -> Action:
    """Act by a representation along one axis of a tensor, for example `along(vectors(1), -2)` on (batch, 3, points)."""
    return lambda element, tensor: representation.act(element, tensor, axis=axis)


def permute(axis: int) -> Action:
    """Permute the entries along an axis by an element of a symmetric group."""
    return lambda element, tensor: tensor.index_select(axis, element.argmax(-1).to(tensor.device))


def points(element: Tensor, tensor: Tensor) -> Tensor:
    """Move positions (..., 3) by an affine matrix (4, 4) of E(3)."""
    affine = element.to(tensor)
    return tensor @ affine[:-1, :-1].mT + affine[:-1, -1]


def vectors(element: Tensor, tensor: Tensor) -> Tensor:
    """Turn vectors (..., 3), velocities or forces, by the linear part of an affine matrix (4, 4) of E(3)."""
    return tensor @ element.to(tensor)[:-1, :-1].mT
