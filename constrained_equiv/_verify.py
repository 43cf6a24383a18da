"""Verification: is a model equivariant, and if not, by how much, and is it more than rounding.

What enters: any callable, its inputs and a `Symmetry`. What leaves: relative errors, an `EquivarianceReport`, or an
`EquivarianceError` that shows the worst element. Knows nothing of relaxation.
Law: the error is relative and taken over discrete generators and sampled elements, so a part of the group that random
rotations never reach (parity) is always tested; and it is shown beside the model's own rounding, measured, not assumed.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

from constrained_equiv._symmetry import Symmetry
from constrained_equiv.errors import EquivarianceError, RepresentationError
from constrained_equiv.groups import Group

_TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_ROUNDING_FACTOR = 30.0
"""Errors up to this many times the measured rounding are called rounding: it is an estimate from one or two draws."""


Method: TypeAlias = Literal["higher precision", "lower precision", "last digits"]


@dataclass(frozen=True, repr=False)
class EquivarianceReport:
    """How equivariant a model is at its worst element and output; prints in words.

    Attributes:
        group: whose elements were tried.
        error: || f(g x) - g f(x) || / || f(x) ||, the largest over elements and outputs.
        rounding: how much of that the model's own rounding accounts for, in the same unit: the change of f(x) and
            f(g x) under `method`, at least one unit in the last place.
        method: `higher precision` (the same weights and inputs in float64), for float64 models `lower precision` (in
            float32, the change scaled by the ratio of the units in the last place) and `last digits` (random changes in
            the last place of inputs and weights) together, or `last digits` alone where a model cannot be cast.
        exact: the error in float64, None by the other method.
        noise: relative change of f(x) between two calls with the same x; 0 unless the model is random.
        cancelled: whether f(x) is so small that only rounding is left of it: the gap is what a change in the last
            digits of x makes, and that change grows in proportion (ties and jumps do not).
        tolerance: largest error that passes.
        output: where in the structure of outputs, empty for a single tensor.
        dtype: of that output.
        element: the worst group element (d, d).
        entry: where along the first axis of that output the gap is largest, None for a scalar.
        inputs: the input there, by place: entry `entry` of tensors with as long a first axis, other tensors as a whole.
    """

    group: Group
    error: float
    rounding: float
    method: Method
    exact: float | None
    noise: float
    cancelled: bool
    tolerance: float
    output: str
    dtype: torch.dtype
    element: Tensor
    entry: int | None
    inputs: dict[str, Tensor]

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance, or rounding of an output that cancels."""
        return self.error <= self.tolerance or self.cancelled

    @property
    def verdict(self) -> str:
        """What the numbers mean, in one sentence."""
        if self.cancelled:
            return "rounding: the output cancels, and what is left of it is rounding"
        if self.noise > 0:
            return (
                f"two calls with the same input differ by {self.noise:.2g}: the model is random (dropout?) or keeps "
                "state; call model.eval() first"
            )
        if not math.isfinite(self.error):
            return "an output is not finite, or zero for x but not for g x"
        times = self.error / self.rounding
        if times <= _ROUNDING_FACTOR:
            return "rounding: the error is of the size of the model's own rounding"
        within = "within the tolerance, but " if self.passed else ""
        return f"{within}no rounding: {times:.3g} times the model's own rounding of {self.rounding:.2g}"

    def __repr__(self) -> str:
        exact = "" if self.exact is None else f", {self.exact:.3g} in float64"
        return (
            f"relative equivariance error {self.error:.3g} under {self.group}{exact}: expected at most "
            f"{self.tolerance:.3g} for {self.dtype}\n{self.verdict} (by {self.method})\n"
            f"worst element, output {self.output or 'tensor'}:\n{self.element}\n"
            f"worst input, entry {'all' if self.entry is None else self.entry}:"
            + "".join(f"\n{place or 'tensor'} = {value}" for place, value in self.inputs.items())
        )


@dataclass(frozen=True)
class _Gap:
    error: float
    gap: float
    excess: float
    element: Tensor
    output: str
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
        but not for g x, NaN if an output is.

    Raises:
        RepresentationError: if an action does not fit, or there is nothing to compare.

    Example:
        >>> norm = lambda x: x.norm(dim=-1, keepdim=True)
        >>> from constrained_equiv import groups
        >>> error = equivariance_error(norm, torch.randn(5, 3), symmetry=Symmetry(groups.O3(), "1x1o", "1x0e"))
        >>> error < 1e-5
        True
    """
    return _largest(_gaps(model, inputs, symmetry, _elements(symmetry, samples, generator), 0.0)).error


def equivariance_report(
    model: Callable[..., Any],
    inputs: Any,
    *,
    symmetry: Symmetry,
    tolerance: float | None = None,
    samples: int = 8,
    generator: torch.Generator | None = None,
) -> EquivarianceReport:
    """Measure the equivariance error, and how much of it is the model's own rounding.

    A float32 model is evaluated again in float64, on a deep copy; a float64 model in float32, and with the last digits
    of its inputs and weights changed at random. Arguments as for `assert_equivariant`.

    Returns:
        A record that prints in words.

    Raises:
        RepresentationError: as `equivariance_error`.

    Example:
        >>> from constrained_equiv import groups
        >>> leaky = lambda x: x + 0.003 * x.abs()
        >>> report = equivariance_report(leaky, torch.randn(5, 3), symmetry=Symmetry(groups.O3(), "1x1o", "1x1o"))
        >>> report.passed, report.error > 1_000 * report.rounding
        (False, True)
    """
    worst = _largest(_gaps(model, inputs, symmetry, _elements(symmetry, samples, generator), tolerance))
    return _report(model, inputs, symmetry, worst, tolerance)


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
            float16 and 1e-1 for bfloat16, and outputs that cancel pass where the gap is rounding (see
            `EquivarianceReport.cancelled`). A stated tolerance is taken as it is.
        samples: see `equivariance_error`.
        generator: see `equivariance_error`.

    Raises:
        EquivarianceError: with the worst element, its error, and the model's own rounding beside it.
    """
    _require(model, inputs, symmetry, _elements(symmetry, samples, generator), tolerance)


def assert_equivariant_at(
    model: Callable[..., Any], inputs: Any, element: Tensor, *, symmetry: Symmetry, tolerance: float | None = None
) -> None:
    """Raise unless the model is equivariant at given group elements, for example those of a property test.

    Args:
        model: see `equivariance_error`.
        inputs: see `equivariance_error`.
        element: (d, d) or (n, d, d), the group's defining matrices.
        symmetry: see `equivariance_error`.
        tolerance: see `assert_equivariant`.

    Raises:
        EquivarianceError: as `assert_equivariant`.
        RepresentationError: if `element` is not made of (d, d) matrices.
    """
    degree = symmetry.group.degree
    if element.ndim not in (2, 3) or element.shape[-2:] != (degree, degree):
        raise RepresentationError(
            f"element of shape {tuple(element.shape)}: expected ({degree}, {degree}) or (n, {degree}, {degree}), the "
            f"defining matrices of {symmetry.group}"
        )
    _require(model, inputs, symmetry, element.reshape(-1, degree, degree), tolerance)


def allowed_error(dtype: torch.dtype) -> float:
    """Return the relative error that passes by default for outputs of a dtype."""
    return _TOLERANCES.get(dtype, 1e-4)


def call(model: Callable[..., Any], inputs: Any) -> Any:
    """Call a model as every check does: a tuple holds several arguments.

    It gets copies, for it may change what it takes in place; they stay in the graph of a differentiated input.
    """
    # a copy made under no_grad forgets that it is differentiated
    given = map_tensors(lambda tensor: tensor.clone().requires_grad_(tensor.requires_grad), inputs)
    return model(*given) if isinstance(given, tuple) else model(given)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Replace every tensor in a structure by a function of it, the data of geometric tensors too."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if is_geometric(leaf):
            leaf = copy.copy(leaf)
            leaf.tensor = function(leaf.tensor)
        return leaf

    return tree_map(one, value)


def is_geometric(leaf: Any) -> bool:
    """Whether a leaf is one of escnn's geometric tensors."""
    return isinstance(getattr(leaf, "tensor", None), Tensor) and hasattr(leaf, "type")


def leaves(value: Any) -> dict[str, Tensor]:
    """Return the floating-point tensors in a structure by their place in it; geometric tensors give their data."""
    found = {}
    for path, leaf in tree_flatten_with_path(value)[0]:
        tensor = getattr(leaf, "tensor", leaf) if not isinstance(leaf, Tensor) else leaf
        if isinstance(tensor, Tensor) and (tensor.is_floating_point() or tensor.is_complex()):
            found[keystr(path)] = tensor.detach()
    return found


def relative_gap(found: Tensor, expected: Tensor, reference: Tensor) -> float:
    """Return || found - expected || / || reference ||, 0 if both are zero, computed in double precision.

    Raises:
        RepresentationError: if the shapes differ.
    """
    if found.shape != expected.shape:
        raise RepresentationError(
            f"f(g x) has shape {tuple(found.shape)} and g f(x) {tuple(expected.shape)}: expected equal shapes"
        )
    wide = torch.complex128 if found.is_complex() else torch.float64
    gap = float(torch.linalg.vector_norm(found.to(wide) - expected.to(wide)))
    size = float(torch.linalg.vector_norm(reference.to(wide)))
    if size > 0 or not gap <= math.inf:
        return gap / size if size else gap
    return 0.0 if gap == 0 else math.inf


def larger(first: float, second: float) -> bool:
    """Whether the first error is worse; a NaN is worse than every number."""
    return not math.isnan(second) and not first <= second


def _elements(symmetry: Symmetry, samples: int, generator: torch.Generator | None) -> Tensor:
    generator = generator or torch.Generator().manual_seed(0)
    return torch.cat([symmetry.group.generators, symmetry.group.sample(samples, generator=generator)])


def _require(
    model: Callable[..., Any], inputs: Any, symmetry: Symmetry, elements: Tensor, tolerance: float | None
) -> None:
    failed = [gap for gap in _gaps(model, inputs, symmetry, elements, tolerance) if not gap.excess <= 0]
    while failed:
        worst = _largest(failed)
        failed.remove(worst)
        report = _report(model, inputs, symmetry, worst, tolerance)
        if not report.cancelled:
            raise EquivarianceError(repr(report))


def _gaps(
    model: Callable[..., Any], inputs: Any, symmetry: Symmetry, elements: Tensor, tolerance: float | None
) -> list[_Gap]:
    """Compare every output at every element; the excess is over the tolerance (None: that of the output's dtype)."""
    # copied, for a model may hand out one buffer every time
    plain = map_tensors(torch.clone, call(model, inputs))
    sizes = leaves(plain)
    found = []
    for element in elements:
        moved = leaves(call(model, symmetry.move_inputs(element, inputs)))
        expected = leaves(symmetry.move_outputs(element, plain))
        if not moved.keys() == expected.keys() == sizes.keys():
            raise RepresentationError(
                f"the model returned tensors at {list(moved)} for g x, at {list(sizes)} for x: expected one structure"
            )
        for place, size in sizes.items():
            error = relative_gap(moved[place], expected[place], size)
            excess = error - (allowed_error(size.dtype) if tolerance is None else tolerance)
            gap = relative_gap(moved[place], expected[place], size.new_ones(1))
            found.append(_Gap(error, gap, excess, element, place, size.dtype))
    if not found:
        raise RepresentationError(
            "nothing was compared: expected samples >= 1 or a group with discrete generators, and at least one output "
            "tensor"
        )
    return found


def _largest(gaps: list[_Gap]) -> _Gap:
    worst = gaps[0]
    for gap in gaps:
        worst = gap if larger(gap.excess, worst.excess) else worst
    return worst


def _report(
    model: Callable[..., Any], inputs: Any, symmetry: Symmetry, worst: _Gap, tolerance: float | None
) -> EquivarianceReport:
    def outputs(run: Callable[..., Any], x: Any) -> Tensor:
        return leaves(call(run, x))[worst.output]

    moved = symmetry.move_inputs(worst.element, inputs)
    at_x, at_gx = outputs(model, inputs), outputs(model, moved)
    noise = relative_gap(outputs(model, inputs), at_x, at_x)
    method: Method = "last digits"
    wide = worst.dtype in (torch.float64, torch.complex128)
    unit, exact, rounding = torch.finfo(worst.dtype).eps, None, 0.0
    other = torch.float32 if wide else torch.float64
    if (recast := _evaluated_in(other, model, inputs, symmetry, worst)) is not None:
        method = "lower precision" if wide else "higher precision"
        exact = None if wide else recast[0]
        rounding = relative_gap(recast[1], at_x, at_x) + relative_gap(recast[2], at_gx, at_x)
        rounding *= unit / torch.finfo(other).eps if wide else 1.0
    if method != "higher precision":
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            shaken = _shake_weights(model, generator)
            again = outputs(shaken, _shake(inputs, generator)), outputs(shaken, _shake(moved, generator))
            rounding = max(rounding, relative_gap(again[0], at_x, at_x) + relative_gap(again[1], at_gx, at_x))
    cancelled = tolerance is None and worst.excess > 0 and _cancelled(model, inputs, symmetry, worst)
    image = leaves(symmetry.move_outputs(worst.element, call(model, inputs)))[worst.output]
    entry = None
    if at_gx.ndim and len(at_gx):
        entry = int(torch.linalg.vector_norm((at_gx - image).reshape(len(at_gx), -1), dim=1).argmax())
    shown = {
        place: value[entry] if value.ndim and entry is not None and len(value) == len(at_gx) else value
        for place, value in leaves(inputs).items()
    }
    return EquivarianceReport(
        symmetry.group,
        worst.error,
        max(rounding, unit),
        method,
        exact,
        noise,
        cancelled,
        allowed_error(worst.dtype) if tolerance is None else tolerance,
        worst.output,
        worst.dtype,
        worst.element,
        entry,
        shown,
    )


def _cancelled(model: Callable[..., Any], inputs: Any, symmetry: Symmetry, worst: _Gap) -> bool:
    """Whether the gap is what last digits of the inputs make of the output, in proportion to their change."""

    def output(x: Any) -> Tensor:
        return leaves(call(model, x))[worst.output].clone()

    moved = symmetry.move_inputs(worst.element, inputs)
    at_x, at_gx = output(inputs), output(moved)
    unit = at_x.new_ones(1)
    generator = torch.Generator().manual_seed(0)
    changes = [
        relative_gap(output(_shake(inputs, generator, k)), at_x, unit)
        + relative_gap(output(_shake(moved, generator, k)), at_gx, unit)
        for k in (1, 1, 64)
    ]
    return worst.gap <= _ROUNDING_FACTOR * max(changes[:2]) < changes[2] * _ROUNDING_FACTOR / 8


def _evaluated_in(
    dtype: torch.dtype, model: Callable[..., Any], inputs: Any, symmetry: Symmetry, worst: _Gap
) -> tuple[float, Tensor, Tensor] | None:
    """Return the error, f(x) and f(g x) in another dtype; None where the model cannot be copied or cast."""
    cast = _map_floats(lambda t: t.to(dtype), inputs)
    copied = _copy_of(model)
    if copied is None:
        return None
    try:
        if isinstance(copied, nn.Module):
            copied.to(dtype)
        at_x = call(copied, cast)
        at_gx = leaves(call(copied, symmetry.move_inputs(worst.element, cast)))[worst.output]
    except Exception:  # constants of another dtype, or a check of its own, by assert or whatever error it likes
        return None
    expected = leaves(symmetry.move_outputs(worst.element, at_x))[worst.output]
    plain = leaves(at_x)[worst.output]
    if torch.finfo(plain.dtype).eps != torch.finfo(dtype).eps:  # it casts inside
        return None
    return relative_gap(at_gx, expected, plain), plain, at_gx


def _copy_of(model: Callable[..., Any]) -> Callable[..., Any] | None:
    """Copy a module, None where it cannot be copied; functions are returned as they are."""
    if not isinstance(model, nn.Module):
        return model
    try:
        return copy.deepcopy(model)
    except Exception:  # a cached non-leaf tensor, TorchScript in e3nn 0.5, groups of escnn: each raises its own
        return None


def _shake_weights(model: Callable[..., Any], generator: torch.Generator) -> Callable[..., Any]:
    shaken = _copy_of(model)
    if not isinstance(shaken, nn.Module):
        return model
    with torch.no_grad():
        for parameter in shaken.parameters():
            parameter.copy_(_shake(parameter.detach(), generator))
    return shaken


def _shake(value: Any, generator: torch.Generator, units: int = 1) -> Any:
    """Change the last digit of every number by some units, up or down at random."""

    def one(tensor: Tensor) -> Tensor:
        up = torch.randint(2, tensor.shape, generator=generator).to(tensor) * 2 - 1
        return tensor * (1 + up * (units * torch.finfo(tensor.dtype).eps))

    return _map_floats(one, value)


def _map_floats(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    def one(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            return function(leaf.detach()).requires_grad_(leaf.requires_grad)
        return leaf

    return tree_map(one, value)
