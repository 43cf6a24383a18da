"""The Lie derivative of a model: how fast it leaves equivariance along each direction of the group.

What enters: any callable, its inputs and a `Symmetry`. What leaves: a `LieDerivative`, one number per generator.
Law: for a linear map W the square, summed over an orthonormal basis of inputs, is || W rho_in(A) - rho_out(A) W ||_F^2.

Derivatives are taken by automatic differentiation in forward mode, never by finite differences. Where an operation has
no forward mode, the model is differentiated twice backward instead, and the record says so.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from constrained_equiv._symmetry import Symmetry
from constrained_equiv._verify import call, leaves, relative_gap
from constrained_equiv.errors import RepresentationError

Mode = Literal["forward", "double backward"]

# torch.func.jvp refuses models that differentiate inside, such as forces from an energy; dual tensors do not
forward_ad: Any = torch.autograd.forward_ad


@dataclass(frozen=True, repr=False)
class LieDerivative:
    """How far a model is from commuting with each generator, relative to its output.

    Attributes:
        name: of the module; empty for the model itself.
        continuous: per direction A of the algebra, || d/dt [f(exp(tA) x) - exp(tA) f(x)] || / || f(x) || at t = 0, the
            largest over outputs; the unit is that of the algebra: per radian for rotations.
        discrete: per discrete generator g, || f(g x) - g f(x) || / || f(x) ||.
        mode: how it was differentiated: `forward`, or `double backward` where an operation has no forward mode.
    """

    name: str
    continuous: tuple[float, ...]
    discrete: tuple[float, ...]
    mode: Mode

    @property
    def value(self) -> float:
        """Root mean square over all generators."""
        numbers = self.continuous + self.discrete
        return math.hypot(*numbers) / math.sqrt(len(numbers)) if numbers else 0.0

    def __repr__(self) -> str:
        directions = ", ".join(f"{v:.3g}" for v in self.continuous) or "none"
        elements = ", ".join(f"{v:.3g}" for v in self.discrete) or "none"
        return (
            f"Lie derivative of {self.name or 'the model'} {self.value:.3g} (along the algebra {directions}; at "
            f"discrete generators {elements}; {self.mode} mode)"
        )


def lie_derivative(model: Callable[..., Any], inputs: Any, *, symmetry: Symmetry, name: str = "") -> LieDerivative:
    """Measure how fast a model leaves equivariance along each generator of the group.

    Args:
        model: called as `model(*inputs)` if `inputs` is a tuple, else `model(inputs)`; as it is, so put it in
            evaluation mode first.
        inputs: tensors, structured as `symmetry.inputs`.
        symmetry: the group and its actions, which have to be differentiable in the group element (all but those of
            images on a grid are).
        name: kept in the record.

    Returns:
        One number per generator; all zero exactly for an equivariant model, up to rounding.

    Raises:
        RepresentationError: if an output depends on the inputs, but not differentiably: the model detaches them.

    Example:
        >>> from constrained_equiv import groups
        >>> stretch = lambda x: x * torch.tensor([1.0, 1.0, 2.0])
        >>> lie_derivative(stretch, torch.eye(3), symmetry=Symmetry(groups.SO3(), "1x1", "1x1")).continuous[2]
        0.0

    Reference: Gruver, Finzi, Goldblum, Wilson (2023), "The Lie Derivative for Measuring Learned Equivariance".
    """
    plain = leaves(call(model, inputs))
    mode: Mode = "forward"
    continuous = []
    for direction in symmetry.group.algebra:
        flow = _tangents(lambda g: symmetry.move_inputs(g, inputs), direction, inputs)
        try:
            output, slope = _forward(model, inputs, flow)
        except NotImplementedError:  # an operation of the model has no forward mode
            mode = "double backward"
            output, slope = _double_backward(model, inputs, flow)
        if lost := [place for place in plain if place not in slope]:
            _require_constant(model, inputs, symmetry, direction, lost)
            slope |= {place: torch.zeros_like(plain[place]) for place in lost}
        expected = _structured(_tangents(partial(_move_outputs, symmetry, output), direction, output), output)
        continuous.append(max(relative_gap(slope[place], expected[place], plain[place]) for place in plain))
    discrete = []
    for element in symmetry.group.generators:
        moved = leaves(call(model, symmetry.move_inputs(element, inputs)))
        image = leaves(symmetry.move_outputs(element, call(model, inputs)))
        discrete.append(max(relative_gap(moved[place], image[place], plain[place]) for place in plain))
    return LieDerivative(name, tuple(continuous), tuple(discrete), mode)


def _move_outputs(symmetry: Symmetry, output: Any, element: Tensor) -> Any:
    return symmetry.move_outputs(element, output)


def _differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _tangents(move: Callable[[Tensor], Any], direction: Tensor, value: Any) -> list[Tensor | None]:
    """Return d/dt move(exp(t A)) at t = 0, for each leaf of `value`; None for what is no floating-point tensor."""
    identity = torch.eye(len(direction), dtype=torch.float64)
    with forward_ad.dual_level():
        moved = tree_flatten(move(forward_ad.make_dual(identity, direction)))[0]
        tangents = [forward_ad.unpack_dual(m).tangent if _differentiable(m) else None for m in moved]
    return [
        (torch.zeros_like(x) if tangent is None else tangent.detach()) if _differentiable(x) else None
        for x, tangent in zip(tree_flatten(value)[0], tangents, strict=True)
    ]


def _structured(tangents: list[Tensor | None], value: Any) -> dict[str, Tensor]:
    return leaves(tree_unflatten(tangents, tree_flatten(value)[1]))


def _forward(model: Callable[..., Any], inputs: Any, flow: list[Tensor | None]) -> tuple[Any, dict[str, Tensor]]:
    """Return f(x) and its directional derivative."""
    values, structure = tree_flatten(inputs)
    with forward_ad.dual_level():
        duals = [
            x if tangent is None else forward_ad.make_dual(x.detach(), tangent)
            for x, tangent in zip(values, flow, strict=True)
        ]
        outputs, shape = tree_flatten(call(model, tree_unflatten(duals, structure)))
        pairs = [forward_ad.unpack_dual(y) if _differentiable(y) else (y, None) for y in outputs]
        primal = [y.detach() if isinstance(y, Tensor) else y for y, _ in pairs]
        slopes = [None if t is None else t.detach() for _, t in pairs]
    return _assembled(primal, slopes, shape)


def _double_backward(
    model: Callable[..., Any], inputs: Any, flow: list[Tensor | None]
) -> tuple[Any, dict[str, Tensor]]:
    values, structure = tree_flatten(inputs)
    moving = [i for i, tangent in enumerate(flow) if tangent is not None]
    kept: list[Any] = []

    def function(*tensors: Tensor) -> tuple[Tensor, ...]:
        arguments = list(values)
        for i, tensor in zip(moving, tensors, strict=True):
            arguments[i] = tensor
        kept[:] = tree_flatten(call(model, tree_unflatten(arguments, structure)))
        return tuple(y for y in kept[0] if _differentiable(y))

    starts = tuple(values[i].detach() for i in moving)
    jvp: Any = torch.autograd.functional.jvp
    _, found = jvp(function, starts, tuple(flow[i] for i in moving))
    primal = [y.detach() if isinstance(y, Tensor) else y for y in kept[0]]
    rest = iter(slope if bool(slope.any()) else None for slope in found)  # torch gives zeros where nothing depends
    return _assembled(primal, [next(rest) if _differentiable(y) else None for y in primal], kept[1])


def _assembled(primal: list[Any], slopes: list[Tensor | None], shape: Any) -> tuple[Any, dict[str, Tensor]]:
    return tree_unflatten(primal, shape), leaves(tree_unflatten(slopes, shape))


def _require_constant(
    model: Callable[..., Any], inputs: Any, symmetry: Symmetry, direction: Tensor, places: list[str]
) -> None:
    """Outputs without a derivative have to be constant."""
    moved = symmetry.move_inputs(torch.linalg.matrix_exp(0.1 * direction), inputs)
    before, after = leaves(call(model, inputs)), leaves(call(model, moved))
    if changing := [place or "tensor" for place in places if not torch.equal(before[place], after[place])]:
        raise RepresentationError(
            f"outputs {changing} depend on the inputs but have no derivative: the model detaches its inputs; expected "
            "for example x = x.clone().requires_grad_() instead of x.detach().requires_grad_()"
        )
