"""Constraints: what is measured of the non-equivariant terms, and how large it may be.

What enters: a relaxed model and a level, a number or a schedule. What leaves: a `Constraint`, a frozen record that
`ConstrainedOptimizer` measures, differentiates and holds to its level; or a `ScaleSchedule`, which has no multiplier.
Law: every measure is of the term actually added, scale * gate * W, has a finite (zero) sub-gradient at W = 0, and is
independent of batch size.

The measures, per layer (W is orthogonal to the equivariant maps in the complement form):

    weight      || W ||_F / sqrt(out features): RMS output of the term for isotropic unit-variance input
    relative    weight / RMS of the layer's output in the last training forward
    activation  RMS of W x over the last training batch
    gate        the learnable scalar itself
    lie         sqrt(mean over generators of || W rho_in - rho_out W ||_F^2 / out features)
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from constrained_equiv import _tensors
from constrained_equiv._relax import relaxations
from constrained_equiv._terms import NonEquivariantTerm
from constrained_equiv.errors import ConstraintError
from constrained_equiv.schedules import Schedule, as_schedule, value_at

Type: TypeAlias = Literal["inequality", "equality"]
Part: TypeAlias = Literal["whole", "non_equivariant"]


@dataclass(frozen=True, eq=False)
class Terms:
    """Terms ordered so that those of equal shape, symmetry and form are neighbours and can be handled as one stack.

    Attributes:
        modules: the terms; their parameters are looked up anew at every step, for sharding replaces parameters.
        names: of their layers.
        stacks: ranges of neighbours.
    """

    modules: tuple[NonEquivariantTerm, ...] = field(repr=False)
    names: tuple[str, ...]
    stacks: tuple[slice, ...] = field(repr=False)

    @staticmethod
    def of(named: Sequence[tuple[str, NonEquivariantTerm]]) -> "Terms":
        """Order named terms into stacks."""
        groups = _tensors.grouped(
            (tuple(t.weight.shape), t.weight.dtype, t.projection, t.complement, t.rows) for _, t in named
        )
        ordered = [named[i] for group in groups for i in group]
        ends = list(accumulate(map(len, groups)))
        ranges = tuple(slice(end - len(group), end) for end, group in zip(ends, groups, strict=True))
        return Terms(tuple(term for _, term in ordered), tuple(name for name, _ in ordered), ranges)

    def __len__(self) -> int:
        return len(self.modules)

    def weights(self) -> list[nn.Parameter]:
        """The parameters W."""
        return [term.weight for term in self.modules]

    def gates(self) -> list[nn.Parameter]:
        """The gates; empty where the terms have none."""
        return [term.gate for term in self.modules if term.gate is not None]

    @property
    def precision(self) -> torch.dtype:
        """Of values and multipliers: float32, or float64 where the terms are."""
        return torch.float64 if self.modules[0].weight.dtype == torch.float64 else torch.float32

    def factors(self) -> Tensor:
        """scale * gate / sqrt(rows) of each term, (n,)."""
        factors = torch.stack([term.scale for term in self.modules]).to(self.precision)
        if gates := self.gates():
            factors = factors * torch.stack([gate.detach() for gate in gates]).to(factors)
        return torch.cat([factors[stack] * self.modules[stack.start].rows ** -0.5 for stack in self.stacks])

    def parts(self, part: Part) -> list[Tensor]:
        """W of each term, or W - P W where only the non-equivariant part of free terms is meant."""
        weights = [weight.detach() for weight in self.weights()]
        if part == "whole" or all(term.complement for term in self.modules):
            return weights
        return [
            share
            for stack in self.stacks
            for share in self.modules[stack.start].projection.complement_(torch.stack(weights[stack])).unbind()
        ]


Stack: TypeAlias = tuple[NonEquivariantTerm, ...]


@dataclass(frozen=True)
class Measure:
    """A number per term, and its gradient.

    Attributes:
        name: shown in reports.
        values: terms -> (n,) values, without a graph.
        pull: adds coefficients[i] * d values[i] / d parameter to the `.grad` of each term's parameter.
        target: the parameter of the term that is constrained.
        part: whether W as a whole or only its non-equivariant part is held to the level.
    """

    name: str
    values: Callable[[Terms], Tensor]
    pull: Callable[[Terms, Tensor], None]
    target: Literal["weight", "gate"] = "weight"
    part: Part = "whole"


@dataclass(frozen=True, eq=False)
class Constraint:
    """Hold a measure of some terms at or below a level.

    Attributes:
        measure: what is measured.
        terms: the terms and their layers' names.
        level: schedule of the bound, in the measure's unit, over successful optimizer steps.
        type: `inequality` (value <= level) or `equality` (value = level).
    """

    measure: Measure
    terms: Terms
    level: Schedule
    type: Type = "inequality"


@dataclass(frozen=True, eq=False)
class ScaleSchedule:
    """Write the scale theta of some terms along a schedule; no multiplier.

    Attributes:
        terms: the terms and their layers' names.
        schedule: of theta, over successful optimizer steps.
    """

    terms: Terms
    schedule: Schedule


def weight(
    model: nn.Module,
    *,
    level: float | Schedule,
    part: Part = "whole",
    where: Callable[[str], bool] | None = None,
    type: Type = "inequality",
) -> Constraint:
    """Bound the norm of each term: || W ||_F / sqrt(out features).

    Args:
        model: a relaxed model.
        level: bound, in units of RMS output for isotropic unit-variance input, so the same number means the same in
            every layer.
        part: `whole` bounds W; `non_equivariant` bounds W - P W, for the free form that is folded at the end. In the
            complement both are the same.
        where: chooses layers by name; all by default.
        type: `inequality` or `equality`.

    Raises:
        ConstraintError: if nothing is relaxed or chosen, or the level is negative.
        ScheduleError: if the level is not a number or schedule.
    """
    return _constraint(model, weight_measure(part), level, where, type)


def relative(
    model: nn.Module,
    *,
    level: float | Schedule,
    part: Part = "whole",
    where: Callable[[str], bool] | None = None,
    type: Type = "inequality",
) -> Constraint:
    """Bound the norm of each term as a fraction of its layer's response.

    The measure is `weight` over the RMS of the layer's output in the last training forward, which is not
    differentiated; arguments as for `weight`.
    """

    def responses(terms: Terms) -> Tensor:
        return torch.stack([term.response for term in terms.modules]).clamp_min(1e-12)

    def pull(terms: Terms, coefficients: Tensor) -> None:
        _weight_pull(terms, coefficients / responses(terms), part)

    measure = Measure("relative", lambda t: _weight_values(t, part) / responses(t), pull, part=part)
    constraint = _constraint(model, measure, level, where, type)
    for term in constraint.terms.modules:
        term.record("response")
    return constraint


def activation(
    model: nn.Module,
    *,
    level: float | Schedule,
    where: Callable[[str], bool] | None = None,
    type: Type = "inequality",
) -> Constraint:
    """Bound the RMS of what each term adds, over batch, points and output features of the last training forward.

    The layer keeps the second moment S of its (detached) inputs, so value^2 = tr(W S W^T) / out features and nothing is
    computed twice; arguments as for `weight`.
    """

    def square(stack: Tensor, terms: Stack) -> Tensor:
        moments = torch.stack([term.moment for term in terms]).to(stack)
        return torch.einsum("noi,nij,noj->n", stack, moments, stack)

    measure = _stacked_measure("activation", square)
    constraint = _constraint(model, measure, level, where, type)
    for name, term in zip(constraint.terms.names, constraint.terms.modules, strict=True):
        if term.weight.ndim != 2:
            raise ConstraintError(
                f"activation of {name!r}, a convolution: expected dense terms; use weight or relative there"
            )
        term.record("moment")
    return constraint


def lie(
    model: nn.Module,
    *,
    level: float | Schedule,
    where: Callable[[str], bool] | None = None,
    type: Type = "inequality",
) -> Constraint:
    """Bound the Lie derivative of each term, in operator form.

    Discrete generators (inversion) count beside the algebra's, so that parity is seen; arguments as for `weight`.

    Reference: for isotropic unit-variance x, the mean of || W rho_in(A) x - rho_out(A) W x ||^2 equals the squared
        Frobenius norm of the bracket; the mean over generators is taken so that the group's size does not matter.
    """

    def square(stack: Tensor, terms: Stack) -> Tensor:
        return terms[0].projection.defect(stack).mean(0)

    return _constraint(model, _stacked_measure("lie", square, part="non_equivariant"), level, where, type)


def gate(
    model: nn.Module,
    *,
    level: float | Schedule = 0.0,
    where: Callable[[str], bool] | None = None,
    type: Type = "equality",
) -> Constraint:
    """Hold the learnable scalar of each term, signed at a level (equality) or its size under one (inequality).

    The constraint does not see W: as the gate shrinks, W can grow. Prefer `weight`, which bounds the term itself.

    Args:
        model: a model relaxed with `gate=True`.
        level: 0 by default.
        where: chooses layers by name; all by default.
        type: `equality` (published form) or `inequality`.

    Reference: Manolache, Chamon, Niepert (2025), "Learning (Approximately) Equivariant Networks via Constrained
        Optimization".
    """

    def values(terms: Terms) -> Tensor:
        signed = torch.stack([g.detach() for g in terms.gates()])
        return signed if type == "equality" else signed.abs()

    def pull(terms: Terms, coefficients: Tensor) -> None:
        gates = terms.gates()
        if type == "inequality":
            coefficients = coefficients * torch.stack([g.detach() for g in gates]).sign()
        _tensors.add_(_tensors.gradients(gates), coefficients.to(gates[0].dtype).unbind())

    constraint = _constraint(model, Measure("gate", values, pull, target="gate"), level, where, type)
    if len(constraint.terms.gates()) != len(constraint.terms):
        raise ConstraintError(
            "the terms have no gate: call ce.relax(model, gate=True), or constrain ce.constraints.weight"
        )
    return constraint


def custom(
    model: nn.Module,
    function: Callable[[NonEquivariantTerm], Tensor],
    *,
    name: str,
    level: float | Schedule,
    where: Callable[[str], bool] | None = None,
    type: Type = "inequality",
) -> Constraint:
    """Bound any differentiable number of a term; its cost grows with the number of layers.

    Args:
        model: a relaxed model.
        function: maps a term to a 0-d tensor that depends on `term.weight`; must have a finite gradient at 0.
        name: shown in reports.
        level: bound in the function's own unit.
        where: chooses layers by name; all by default.
        type: `inequality` or `equality`.
    """

    def values(terms: Terms) -> Tensor:
        with torch.no_grad():
            return torch.stack([function(term) for term in terms.modules])

    def pull(terms: Terms, coefficients: Tensor) -> None:
        weights = terms.weights()
        with torch.enable_grad():
            numbers = torch.stack([function(term) for term in terms.modules])
        _tensors.add_(_tensors.gradients(weights), torch.autograd.grad(numbers, weights, coefficients.to(numbers)))

    return _constraint(model, Measure(name, values, pull), level, where, type)


def scale(model: nn.Module, *, schedule: float | Schedule, where: Callable[[str], bool] | None = None) -> ScaleSchedule:
    """Drive the scale theta of the terms along a schedule, as the published triangular method does.

    Args:
        model: a relaxed model.
        schedule: of theta, for example `ce.schedules.triangle(steps)`.
        where: chooses layers by name; all by default.

    Returns:
        A record for `ConstrainedOptimizer`, which writes theta after every successful step. Relaxing alone leaves
        theta = 1.
    """
    return ScaleSchedule(_choose(model, where), as_schedule(schedule))


def weight_measure(part: Part) -> Measure:
    """The measure of `weight`."""
    return Measure("weight", lambda t: _weight_values(t, part), lambda t, c: _weight_pull(t, c, part), part=part)


def _constraint(
    model: nn.Module, measure: Measure, level: float | Schedule, where: Callable[[str], bool] | None, type: Type
) -> Constraint:
    if type not in ("inequality", "equality"):
        raise ConstraintError(f"type={type!r}: expected 'inequality' or 'equality'")
    if measure.part not in ("whole", "non_equivariant"):
        raise ConstraintError(f"part={measure.part!r}: expected 'whole' or 'non_equivariant'")
    schedule = as_schedule(level)
    if type == "inequality" and (first := value_at(schedule, 0)) < 0:
        raise ConstraintError(
            f"level {first} at step 0: expected a bound >= 0 for {measure.name}, which is never negative"
        )
    return Constraint(measure, _choose(model, where), schedule, type)


def _choose(model: nn.Module, where: Callable[[str], bool] | None) -> Terms:
    found = relaxations(model)
    if not found:
        raise ConstraintError("the model has no relaxed layer: call ce.relax(model) before stating constraints")
    chosen = [(r.name, r.term) for r in found if where is None or where(r.name)]
    if not chosen:
        raise ConstraintError(f"where= chose none of the relaxed layers {[r.name for r in found]}")
    return Terms.of(chosen)


def _weight_values(terms: Terms, part: Part) -> Tensor:
    return terms.factors().abs() * _tensors.norms(terms.parts(part), terms.precision)


def _weight_pull(terms: Terms, coefficients: Tensor, part: Part) -> None:
    parts = terms.parts(part)
    sizes = _tensors.norms(parts, terms.precision)
    slopes = torch.where(sizes > 0, coefficients * terms.factors().abs() / sizes, 0.0)
    _tensors.add_scaled_(_tensors.gradients(terms.weights()), parts, slopes)


def _stacked_measure(name: str, square: Callable[[Tensor, Stack], Tensor], part: Part = "whole") -> Measure:
    """A measure whose square is a smooth function of scale * W / sqrt(rows), computed stack by stack.

    It is differentiated by autograd, with the sub-gradient 0 at 0.
    """

    def measure(terms: Terms, differentiate: bool) -> tuple[Tensor, list[Tensor]]:
        pieces, leaves, factors = [], [], terms.factors()
        for stack in terms.stacks:
            modules = terms.modules[stack]
            leaf = torch.stack([term.weight.detach() for term in modules]).requires_grad_(differentiate)
            with torch.set_grad_enabled(differentiate):
                squared = square(leaf * factors[stack].view(-1, *[1] * (leaf.ndim - 1)), modules)
                positive = squared > 0
                pieces.append(torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0))
            leaves.append(leaf)
        return torch.cat(pieces), leaves

    def pull(terms: Terms, coefficients: Tensor) -> None:
        values, leaves = measure(terms, True)
        slopes = torch.autograd.grad(values, leaves, coefficients.to(values))
        _tensors.add_(_tensors.gradients(terms.weights()), [g for stack in slopes for g in stack.unbind()])

    return Measure(name, lambda terms: measure(terms, False)[0], pull, part=part)
