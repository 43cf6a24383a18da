"""Constants: tensors that are worked out once and kept.

What enters: a function that makes tensors of hashable arguments. What leaves: the same function with a memory.
Law: what is kept serves every later caller: whatever its first one had switched on, it is made outside inference mode,
without a graph, and on the CPU unless the function itself names a device.
"""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch

_Made = TypeVar("_Made", bound=Callable[..., object])


def constant(most: int) -> Callable[[_Made], _Made]:
    """Remember the last results of a function, so many at most."""

    def keeping(make: _Made) -> _Made:
        @lru_cache(maxsize=most)
        @wraps(make)
        def remembered(*arguments: object) -> object:
            if torch.compiler.is_compiling():  # a compiler looks into the function, and keeps nothing
                return make(*arguments)
            with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
                return make(*arguments)

        return remembered  # type: ignore[return-value]

    return keeping


def on_cpu(function: _Made) -> _Made:
    """Run a function whose tensors are on the CPU, whatever torch's default device is."""

    @wraps(function)
    def run(*arguments: Any, **keywords: Any) -> object:
        with torch.device("cpu"):
            return function(*arguments, **keywords)

    return run  # type: ignore[return-value]
