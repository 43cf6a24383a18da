"""Adapters: which layers can be relaxed, and how the term enters their forward pass.

What enters: a module. What leaves: the `Adapter` that describes it.
Law: nothing is imported which the user's model did not import first; a framework's adapters are found through
`sys.modules`.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import nn

from constrained_equiv.adapters._base import Adapter, Methods, Site
from constrained_equiv.adapters._linear import linear
from constrained_equiv.adapters._vector_neurons import vector_neurons

__all__ = ["Adapter", "Methods", "Site", "find", "linear", "vector_neurons"]

# framework module -> room that describes its layers
_FRAMEWORKS = {
    "e3nn.o3": "constrained_equiv.adapters._e3nn",
    "escnn.nn": "constrained_equiv.adapters._escnn",
}


def find(layer: nn.Module) -> Adapter | None:
    """Return the built-in adapter of a layer, or None if there is none."""
    return next((adapter for adapter in _builtin() if adapter.matches(layer)), None)


def _builtin() -> tuple[Adapter, ...]:
    found: tuple[Adapter, ...] = ()
    for framework, room in _FRAMEWORKS.items():
        if (loaded := sys.modules.get(framework)) is not None:
            describe: Callable[[Any], tuple[Adapter, ...]] = import_module(room).adapters
            found += describe(loaded)
    return found
