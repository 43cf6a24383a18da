"""Verification: is a model equivariant, and if not, by how much.

What enters: any callable, its inputs and a `Symmetry`. What leaves: relative errors, or an `EquivarianceError` that
shows the worst element. Knows nothing of relaxation.
Law: the error is relative and taken over discrete generators and sampled elements, so a part of the group that random
rotations never reach (parity) is always tested.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from constrained_equiv._symmetry import Symmetry
from constrained_equiv.errors import EquivarianceError, RepresentationError

_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class _Worst:
    error: float
    element: Tensor
    leaf: int
    dtype: torch.dtype


def equivariance_error(
    model: Callable[..., Any],
    inputs: Any,
    *,
    symmetry: Symmetry,
    samples: int = 8,
    generator: torch.Generator | None = None,
) -> float:
    """Measure the largest relative equivariance error over group elements.

    For each element g: || f(g x) - g f(x) || / || f(x) ||, Euclidean norms over each output tensor; the largest over
    outputs and elements is returned. The model is called as it is: put it in evaluation mode first.

    Args:
        model: called as `model(*inputs)` if `inputs` is a tuple, else `model(inputs)`.
        inputs: tensors, structured as `symmetry.inputs`.
        symmetry: the group and its actions.
        samples: random elements tested beside the discrete generators.
        generator: source of randomness; by default a fixed seed, so that a result can be repeated.

    Returns:
        The error; 0 for a perfect model, about 1 for one that ignores the group, infinite if an output is zero for x
        but not for g x.

    Example:
        >>> norm = lambda x: x.norm(dim=-1, keepdim=True)
        >>> from constrained_equiv import groups
        >>> error = equivariance_error(norm, torch.randn(5, 3), symmetry=Symmetry(groups.O3(), "1x1o", "1x0e"))
        >>> error < 1e-5
        True
    """
    return _worst(model, inputs, symmetry, samples, generator).error


def assert_equivariant(
    model: Callable[..., Any],
    inputs: Any,
    *,
    symmetry: Symmetry,
    tolerance: float | None = None,
    samples: int = 8,
    generator: torch.Generator | None = None,
) -> None:
    """Raise unless the model is equivariant; arguments as for `equivariance_error`.

    Args:
        model: see `equivariance_error`.
        inputs: see `equivariance_error`.
        symmetry: see `equivariance_error`.
        tolerance: largest relative error allowed; by default 1e-10 for float64 outputs, 1e-4 for float32, 2e-2 for
            float16 and 1e-1 for bfloat16.
        samples: see `equivariance_error`.
        generator: see `equivariance_error`.

    Raises:
        EquivarianceError: with the worst element and its error.
    """
    worst = _worst(model, inputs, symmetry, samples, generator)
    allowed = _TOLERANCES.get(worst.dtype, 1e-4) if tolerance is None else tolerance
    if not worst.error <= allowed:
        raise EquivarianceError(
            f"relative equivariance error {worst.error:.3g} under {symmetry.group}: expected at most {allowed:.3g} for "
            f"{worst.dtype}\nworst element, output {worst.leaf}:\n{worst.element}"
        )


def _worst(
    model: Callable[..., Any], inputs: Any, symmetry: Symmetry, samples: int, generator: torch.Generator | None
) -> _Worst:
    generator = generator or torch.Generator().manual_seed(0)
    elements = torch.cat([symmetry.group.generators, symmetry.group.sample(samples, generator=generator)])
    plain = _call(model, inputs)
    worst: _Worst | None = None
    for element in elements:
        moved = _leaves(_call(model, symmetry.move_inputs(element, inputs)))
        expected = _leaves(symmetry.move_outputs(element, plain))
        for leaf, (a, b, y) in enumerate(zip(moved, expected, _leaves(plain), strict=True)):
            size = torch.linalg.vector_norm(y.double())
            gap = torch.linalg.vector_norm(a.double() - b.double())
            error = float(gap / size) if float(size) > 0 else (0.0 if float(gap) == 0 else float("inf"))
            if worst is None or not error <= worst.error:
                worst = _Worst(error, element, leaf, y.dtype)
    if worst is None:
        raise RepresentationError(
            "nothing was compared: expected samples >= 1 or a group with discrete generators, and at least one output "
            "tensor"
        )
    return worst


def _call(model: Callable[..., Any], inputs: Any) -> Any:
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _leaves(value: Any) -> list[Tensor]:
    return [leaf.detach() for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]
