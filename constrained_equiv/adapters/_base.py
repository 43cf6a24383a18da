"""What relaxation has to know about a kind of layer.

What enters: a layer. What leaves: a `Site` (representations, shape of the term) and the methods of the relaxed class.
Law: an adapter only describes; `relax` alone changes modules.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn

from constrained_equiv.intertwiners import Projection

Methods: TypeAlias = dict[str, Callable[..., Any]]


@dataclass(frozen=True)
class Site:
    """Where and how a term enters one layer.

    Attributes:
        projection: onto the equivariant maps of the term's shape.
        shape: of W.
        rows: output features over which a norm of W is spread.
        inputs: what the term acts on, in words.
        outputs: what it produces, in words.
        like: a tensor of the layer, whose dtype and device the term takes.
        plan: constants that the relaxed forward pass needs, worked out once; there as `self.non_equivariant.plan`.
    """

    projection: Projection
    shape: tuple[int, ...]
    rows: float
    inputs: str
    outputs: str
    like: Tensor
    plan: Any = None


@dataclass(frozen=True)
class Adapter:
    """How one kind of layer is relaxed.

    Attributes:
        name: shown in reports.
        matches: whether a module is of this kind.
        site: describes a layer; raises RelaxationError with the remedy where a term cannot be attached.
        methods: given the layer's class, the methods that its relaxed subclass overrides. They find the term as
            `self.non_equivariant`, call the base class alone while `self.non_equivariant.active` is False, and
            otherwise add `self.non_equivariant.matrix()` where it is cheapest.
        fold: `fold(layer, equivariant, inputs)` writes an equivariant map of the term's shape into the layer's own
            weights as far as they can hold it, and returns what it wrote; `inputs` are the layer's arguments on one
            batch, None where there was none. None where nothing can be folded.
        refresh: called after a term changed or left, to drop cached filters; None where there are none.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    site: Callable[[nn.Module], Site]
    methods: Callable[[type[nn.Module]], Methods]
    fold: Callable[[Any, Tensor, tuple[Any, ...] | None], Tensor] | None = None
    refresh: Callable[[Any], None] | None = None


def first_argument(base: type[nn.Module]) -> Callable[[tuple[Any, ...], Mapping[str, Any]], Any]:
    """Return how to pick the first argument of a class's forward pass, given by position or by name."""
    names = list(inspect.signature(base.forward).parameters)[1:]
    return lambda args, kwargs: args[0] if args else kwargs[names[0]]
