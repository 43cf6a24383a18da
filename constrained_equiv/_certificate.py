"""Certificate: how much the terms can do at most, beside what they are measured to do.

What enters: a relaxed network, the map that each term adds, and one batch. What leaves: a `Certificate`, upper bounds
per layer, or the reason why there is none. Called by `finalize` before the terms go.
Law: up to rounding a bound is never below what is measured; it is loose, for it assumes that every layer is hit where
it reacts most.

Mathematics. With T_i = scale * gate * W_i the map added, B_i its largest singular value (an upper bound of it for
convolutions), and h the input of layer i in the *relaxed* network on the batch (Euclidean norm over all entries),

    || (E_i + T_i) h - E_i h ||  <=  B_i || h ||                                               truncation of one layer
    || f(g x) - g f(x) ||        <=  sum_i B_i (|| h_i(x) || + || h_i(g x) ||) L_i             equivariance error

where L_i is a Lipschitz constant of what comes after layer i in the *equivariant* network. The second line replaces
one layer at a time, the last first, and needs that the group keeps lengths; a term that is zero has no share in it,
whatever follows. L_i is a product over the modules that follow: known constants of linear maps and activations, or
those that the user states. Gates, tensor products and norms with statistics of the batch have no constant that holds
everywhere, nor has code between modules, or in hooks: there is no bound then.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from constrained_equiv._symmetry import Symmetry
from constrained_equiv._table import table
from constrained_equiv._trace import Call, Trace, trace, unchanged
from constrained_equiv._verify import call, larger, leaves, map_tensors

_ONE_LIPSCHITZ = (nn.Identity, nn.ReLU, nn.Tanh, nn.Softplus, nn.Flatten, nn.Unflatten, nn.Hardtanh, nn.Softsign)
_CURVED = {nn.SiLU: 1.0999, nn.GELU: 1.1290, nn.Sigmoid: 0.25, nn.Mish: 1.0885}  # suprema of |slope|, rounded up


class Lipschitz(NamedTuple):
    """A number L with || m(x) - m(y) || <= L || x - y || for all x and y.

    Attributes:
        name: of the module m, without its term.
        kind: its class.
        value: L.
        meaning: what L is, in words.
    """

    name: str
    kind: str
    value: float
    meaning: str


@dataclass(frozen=True)
class Bound:
    """What one term can do at most, on one batch.

    Attributes:
        name: of the layer.
        strength: B, the largest singular value of the map added, or an upper bound of it; None where none is known.
        entering: || h ||, the norm of the layer's input over the batch; None where it was passed by keyword.
        truncation: B || h ||, bounds the change of the layer's output when the term goes.
        lipschitz: L, a Lipschitz constant of the rest of the equivariant network; None where there is none.
        equivariance: this layer's share in the bound of the equivariance error; None where there is none.
        reason: why a bound is missing, in words.
    """

    name: str
    strength: float | None
    entering: float | None
    truncation: float | None
    lipschitz: float | None
    equivariance: float | None
    reason: str


@dataclass(frozen=True, repr=False)
class Certificate:
    """Upper bounds beside measurements, absolute, on one batch; prints as a table.

    Attributes:
        bounds: one per call of a relaxed layer, in order of execution.
        constants: of the modules behind the first relaxed layer, of which the bounds are made.
        equivariance: bound of || f(g x) - g f(x) || over the elements tried; None where one layer has none.
        measured: the same, measured on the relaxed network; None without a symmetry.
        size: || f(x) ||, to compare with.
    """

    bounds: tuple[Bound, ...]
    constants: tuple[Lipschitz, ...]
    equivariance: float | None
    measured: float | None
    size: float

    def __repr__(self) -> str:
        header = ("layer", "B", "|h|", "truncation at most", "L of the rest", "share in the error at most")
        rows = [
            (b.name or "(model)", *map(_number, (b.strength, b.entering, b.truncation, b.lipschitz, b.equivariance)))
            for b in self.bounds
        ]
        lines = table(header, rows)
        lines += dict.fromkeys(f"{b.name or '(model)'}: {b.reason}" for b in self.bounds if b.reason)
        lines += [f"L of {c.name!r} ({c.kind}) is {c.value:.3g}, {c.meaning}" for c in self.constants]
        if self.measured is not None:
            most = "no bound" if self.equivariance is None else f"at most {self.equivariance:.3g}"
            lines.append(f"equivariance error {most}, measured {self.measured:.3g}, output {self.size:.3g} (norms)")
        lines.append(
            "B bounds what the term adds to an input of norm 1, |h| is the norm of the layer's input over the batch,\n"
            "L bounds how the equivariant rest of the network stretches differences; upper bounds, usually far above\n"
            "what is measured"
        )
        return "\n".join(lines)


def certify(
    model: nn.Module,
    terms: Sequence[tuple[str, nn.Module, Tensor]],
    inputs: Any,
    *,
    symmetry: Symmetry | None = None,
    lipschitz: Mapping[str, float] | None = None,
    samples: int = 8,
    generator: torch.Generator | None = None,
) -> Certificate:
    """Bound what the terms of a network can do, on one batch.

    Args:
        model: the relaxed network, with its terms on, in evaluation mode.
        terms: name, layer and map added (out, in) or convolution kernel (out, in, ...), for every term.
        inputs: one batch, as for `equivariance_error`.
        symmetry: for the bound of the equivariance error; None gives the truncations alone.
        lipschitz: constants of modules by name, for those that have no known one.
        samples: random elements beside the discrete generators; those of `equivariance_error` by default.
        generator: source of randomness; a fixed seed by default.
    """
    stated = dict(lipschitz or {})
    maps = {id(layer): matrix.detach() for _, layer, matrix in terms}

    def run(value: Any) -> Trace:
        return trace(model, partial(call, model, value), copied=lambda module: id(module) in maps)

    with unchanged(model):
        plain = run(inputs)
        output = map_tensors(torch.clone, plain.output)
        size = _norm(leaves(output).values())
        moved: list[list[float | None]] = []
        measured, isometric = None, True
        for g in [] if symmetry is None else _elements(symmetry, samples, generator):
            assert symmetry is not None
            other = run(symmetry.move_inputs(g, inputs))
            found, expected = leaves(other.output), leaves(symmetry.move_outputs(g, output))
            gap = _norm(found[place] - expected[place] for place in expected)
            measured = gap if measured is None or larger(gap, measured) else measured
            isometric &= abs(_norm(expected.values()) - size) <= 1e-5 * size
            moved.append([_entering(one) for one in _relaxed_calls(other, maps)])
    calls = _relaxed_calls(plain, maps)
    rest, constants, broken = _remainders(plain, maps, stated)
    if not broken and len(rest) != len(calls):
        broken = "a relaxed layer is inside another one, or inside a module whose constant was stated"
    if not broken and not isometric:
        broken = "the group does not keep the length of the outputs"
    if not broken and any(len(norms) != len(calls) for norms in moved):
        broken = "the model runs other layers for g x than for x"
    bounds = []
    for i, one in enumerate(calls):
        constant = broken or rest[i]
        strength, reason = _strength(one.module, maps[id(one.module)])
        entering, share = _entering(one), None
        if not reason and entering is None:
            reason = "its input is passed by keyword"
        if symmetry is not None and strength == 0:
            share = 0.0
        elif symmetry is not None and not reason and isinstance(constant, str):
            reason = (
                broken or f"no Lipschitz constant of {constant} holds everywhere; state one by lipschitz={{name: L}}"
            )
        elif symmetry is not None and strength is not None and entering is not None and isinstance(constant, float):
            share = strength * constant * (entering + max(norms[i] or 0.0 for norms in moved))
        truncation = None if strength is None or entering is None else strength * entering
        known = constant if isinstance(constant, float) else None
        bounds.append(Bound(one.name, strength, entering, truncation, known, share, reason))
    shares = [bound.equivariance for bound in bounds if bound.equivariance is not None]
    total = math.fsum(shares) if symmetry is not None and len(shares) == len(bounds) else None
    return Certificate(tuple(bounds), tuple(constants), total, measured, size)


def _elements(symmetry: Symmetry, samples: int, generator: torch.Generator | None) -> Tensor:
    generator = generator or torch.Generator().manual_seed(0)
    return torch.cat([symmetry.group.generators, symmetry.group.sample(samples, generator=generator)])


def _relaxed_calls(run: Trace, maps: Mapping[int, Tensor]) -> list[Call]:
    return [event.call for event in run.events if event.stage == "leave" and id(event.call.module) in maps]


def _entering(one: Call) -> float | None:
    """Norm of what the term acts on, the first argument, with the rows that a tensor product repeats."""
    if not one.taken:
        return None
    norm = _norm(atom.tensor for atom in one.taken[0][:1])
    if not (hasattr(one.module, "irreps_in1") and hasattr(one.module, "irreps_out")):
        return norm
    rows = [math.prod(atom.tensor.shape[:-1]) for atom in (*one.taken[0][:1], *one.given)]
    return norm * math.sqrt(rows[-1] / rows[0]) if all(rows) else norm


def _strength(layer: nn.Module, matrix: Tensor) -> tuple[float | None, str]:
    """The operator norm of a dense map, or the sum over kernel points of the norms there, which bounds it."""
    if matrix.ndim > 2 and getattr(layer, "padding_mode", "zeros") not in ("zeros", "circular"):
        return None, f"padding {layer.padding_mode!r} repeats entries of the input"
    return _operator_norm(matrix), ""


def _operator_norm(matrix: Tensor) -> float:
    if not matrix.any():
        return 0.0
    points = matrix.double().flatten(2).movedim(-1, 0) if matrix.ndim > 2 else matrix.double()[None]
    return float(torch.linalg.matrix_norm(points, 2).sum())


def _remainders(
    run: Trace, maps: Mapping[int, Tensor], stated: Mapping[str, float]
) -> tuple[list[float | str], list[Lipschitz], str]:
    """For each relaxed call the constant of the modules after it, or the name of one without; or why it is no chain."""
    known = cache(_constant)  # of each module once
    chain = _units(run, lambda module, name: id(module) in maps or name in stated or known(module) is not None)
    for before, after in pairwise(chain):
        if not _hands_over(before, after):
            words = f"there is code between {before.name!r} and {after.name!r}, whose Lipschitz constant is unknown"
            return [], [], words
    ends = [event.call for event in run.events if event.stage == "leave" and not event.call.name]
    if any(atom.tensor.is_inference() for unit in chain for atom in unit.given):
        return [], [], "inference mode does not record what code between modules changes in place"
    if not chain or [a.key for a in chain[-1].given] != [a.key for a in ends[-1].given]:
        return [], [], f"there is code after {chain[-1].name!r}" if chain else "no module was called"
    first = next((i for i, unit in enumerate(chain) if id(unit.module) in maps), len(chain))
    for unit in chain[first:]:  # a constant that was stated counts the hooks in; that of a term's own layer cannot
        if (id(unit.module) in maps or unit.name not in stated) and _hooked(unit.module):
            return [], [], f"hooks on {unit.name or '(model)'!r} may change what it takes or gives"
    rest: list[float | str] = []
    constants: list[Lipschitz] = []
    constant: float | str = 1.0
    for unit in reversed(chain[first:]):
        if id(unit.module) in maps:
            rest.append(constant)
        if unit is chain[first] or not isinstance(constant, float):
            continue
        own = (stated[unit.name], "as stated") if unit.name in stated else known(unit.module)
        if own is None:
            constant = f"{unit.name!r} ({_kind(unit.module)})"
        else:
            constants.append(Lipschitz(unit.name, _kind(unit.module), *own))
            constant *= own[0]
    return rest[::-1], constants[::-1], ""


def _units(run: Trace, whole: Callable[[nn.Module, str], bool]) -> list[Call]:
    """The outermost calls of whole modules and of leaves, in order."""
    units, inside = [], None
    for stage, one in run.events:
        if stage == "enter":
            leaf = not any(one.module.children()) or hasattr(one.module, "irreps_out")  # e3nn wires parts up in code
            if inside is None and one.name and (leaf or whole(one.module, one.name)):
                inside = one
        elif one is inside:
            units.append(one)
            inside = None
    if not units and run.events and whole(run.events[0].call.module, ""):
        return [run.events[0].call]  # the model is itself the relaxed layer
    return units


def _hooked(unit: nn.Module) -> bool:
    """Whether a module, or a part of it, has hooks of its own around its forward pass."""
    return any(part._forward_hooks or part._forward_pre_hooks for part in unit.modules())


def _hands_over(before: Call, after: Call) -> bool:
    taken = [atom for row in after.taken for atom in row]
    return len(taken) == len(before.given) == 1 and taken[0].key == before.given[0].key


def _constant(module: nn.Module) -> tuple[float, str] | None:
    """A Lipschitz constant of a module without its term, and what it is; None where none holds everywhere.

    Subclasses outside the frameworks have none: they may compute something else.
    """
    if _plain_class(module).__module__ == "e3nn.o3._linear":
        return _dense_norm(module)
    if not _plain_class(module).__module__.startswith("torch.nn."):
        return None
    if isinstance(module, nn.Linear):
        return _operator_norm(module.weight.detach()), "the largest singular value"
    if isinstance(module, nn.modules.conv._ConvNd):
        if module.padding_mode not in ("zeros", "circular"):
            return None
        return _operator_norm(module.weight.detach()), "the sum over kernel points of the largest singular values"
    if isinstance(module, _ONE_LIPSCHITZ) or (
        isinstance(module, nn.modules.dropout._DropoutNd) and not module.training
    ):
        return 1.0, "the largest slope"
    if isinstance(module, nn.LeakyReLU):
        return max(1.0, abs(module.negative_slope)), "the largest slope"
    if isinstance(module, nn.ELU):
        return max(1.0, abs(module.alpha)), "the largest slope"
    if _plain_class(module) in _CURVED:
        return _CURVED[_plain_class(module)], "the largest slope"
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.training and module.running_var is not None:
        scale = torch.ones_like(module.running_var) if module.weight is None else module.weight.detach()
        slopes = scale.abs() / (module.running_var + module.eps).sqrt()
        return float(slopes.max()), "the largest scale over running deviation"
    return None


def _plain_class(module: nn.Module) -> type:
    """The class of a module, without the subclass that holds a term."""
    return next(base for base in type(module).__mro__ if "_relaxed_from" not in vars(base))


@torch.no_grad()
def _dense_norm(module: Any) -> tuple[float, str] | None:
    """Push the identity through an affine layer without its term."""
    if not module.internal_weights:
        return None
    like = module.weight
    shape = (*like.shape[:-1][:1], module.irreps_in.dim)  # (f_in, irreps) where it has feature axes
    size = math.prod(shape)
    term = getattr(module, "non_equivariant", None)
    enabled = None if term is None else term.enabled
    if term is not None:
        term.enabled = False
    try:
        rows = module(torch.cat([torch.eye(size), torch.zeros(1, size)]).view(-1, *shape).to(like)).flatten(1)
    finally:
        if term is not None:
            term.enabled = enabled
    return _operator_norm((rows[:-1] - rows[-1:]).mT), "the largest singular value"


def _kind(module: nn.Module) -> str:
    trained = module.training and isinstance(module, nn.modules.batchnorm._BatchNorm)
    return _plain_class(module).__name__ + (", statistics of the batch" if trained else "")


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.hypot(*(float(torch.linalg.vector_norm(t.double())) for t in tensors))


def _number(value: float | None) -> str:
    return "no bound" if value is None else f"{value:.3g}"
