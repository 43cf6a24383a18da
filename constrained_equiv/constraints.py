"""Constraints: what is measured of the non-equivariant terms, and how large it may be.

What enters: a relaxed model and a level, a number or a schedule. What leaves: a `Constraint`, a frozen record that
`ConstrainedOptimizer` measures, differentiates and holds to its level; or a `Penalty` or `ScaleSchedule`, which have no
multiplier.
Law: every measure is of the term actually added, scale * gate * W, has a finite (zero) sub-gradient at W = 0, and is
independent of batch size.

The measures, per layer (W is orthogonal to the equivariant maps in the complement form):

    weight      || W ||_F / sqrt(out features): RMS output of the term for isotropic unit-variance input
    relative    weight / RMS of the layer's output in the last training forward
    activation  RMS of W x over the last training batch
    gate        the learnable scalar itself
    lie         sqrt(mean over generators of || W rho_in - rho_out W ||_F^2 / out features)
    subgroup    || W - P_H W ||_F / sqrt(out features), P_H onto the maps that commute with a subgroup H

What a measure yields are *entries*, one number per constraint: `per="layer"` one for each term, `"block"` one for each
pair of irreps of each term, `"generator"` one for each generator of the group, `"model"` one for all terms together.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from constrained_equiv import _tensors
from constrained_equiv._relax import relaxations
from constrained_equiv._stacks import Entry, Part, Per, Share, Terms
from constrained_equiv._terms import NonEquivariantTerm
from constrained_equiv.errors import ConstraintError
from constrained_equiv.groups import Group
from constrained_equiv.schedules import Schedule, as_schedule, value_at

Type: TypeAlias = Literal["inequality", "equality"]
Stack: TypeAlias = tuple[NonEquivariantTerm, ...]


@dataclass(frozen=True)
class Slack:
    """A price on exceeding the level by u, for data that are only partly symmetric; made by `resilient`.

    Minimising the augmented Lagrangian over u as well has the closed forms below, with w = value - level and
    s = lambda + c w the multiplier that would act without slack. The pull is then s - c u.

        quadratic  (price / 2) u^2                   u = s / (price + c)
        linear     price * u                         u = [s - price]_+ / c
        budget     sum over the record's u <= price  u = [s - mu]_+ / c, with mu >= 0 such that the budget holds

    Attributes:
        cost: `quadratic`, `linear` or `budget`.
        price: see above; of the budget, the total.
    """

    cost: Literal["quadratic", "linear", "budget"]
    price: float

    def solve(self, multipliers: Tensor, excess: Tensor, penalty: Tensor, signed: bool) -> Tensor:
        """Return the best slack (n,); nothing is read by the host.

        Args:
            multipliers: (n,).
            excess: w (n,), value - level.
            penalty: c (n,); 0 for the plain Lagrangian.
            signed: True for equalities, whose slack has the sign of s.
        """
        force = multipliers + penalty * excess
        size = force.abs() if signed else force.clamp_min(0)
        if self.cost == "quadratic":
            slack = size / (self.price + penalty)
        elif self.cost == "linear":
            slack = (size - self.price).clamp_min(0) / penalty
        else:
            slack = (size - _water_level(size, penalty, self.price)).clamp_min(0) / penalty
        return slack * force.sign() if signed else slack

    def charge(self, slacks: Tensor) -> Tensor | float:
        """Return what slacks (n,) cost, in units of loss; those within a budget cost nothing."""
        if self.cost == "quadratic":
            return self.price / 2 * slacks.square().sum()
        return self.price * slacks.abs().sum() if self.cost == "linear" else 0.0


def _water_level(forces: Tensor, penalty: Tensor, budget: float) -> Tensor:
    """The mu >= 0 with sum [forces - mu]_+ / penalty = budget, or 0 where the sum is smaller at mu = 0."""
    ordered, order = forces.sort(descending=True)
    inverse = (1.0 / penalty)[order]
    levels = ((ordered * inverse).cumsum(0) - budget) / inverse.cumsum(0)  # mu if the k largest forces stand out
    return levels.amax().clamp_min(0)


@dataclass(frozen=True)
class Measure:
    """Numbers of some terms, the entries, and their gradients.

    Attributes:
        name: shown in reports.
        values: terms -> (m,) values, one per entry, without a graph.
        pull: adds sum over i of coefficients[i] * d values[i] / d parameter to the `.grad` of each term's parameter.
        target: the parameter of the term that is constrained.
        part: whether W as a whole, only its non-equivariant part, or only what breaks a subgroup is held to the level.
        per: what has an entry of its own.
        slope: where the value is slope * || part or block of it ||: terms -> (m,) slopes. The optimizer can then take
            proximal steps, and pulls whole terms with the values that it has; None where the value is no such norm.
        synchronise: averages what the terms recorded in their forward pass over the processes of a parallel training,
            once per step, before `values`.
        homogeneous: whether the value is never negative and grows in proportion to what is constrained.
    """

    name: str
    values: Callable[[Terms], Tensor]
    pull: Callable[[Terms, Tensor], None]
    target: Literal["weight", "gate"] = "weight"
    part: Share = "whole"
    per: Per = "layer"
    slope: Callable[[Terms], Tensor] | None = None
    synchronise: Callable[[Terms], None] | None = None
    homogeneous: bool = True


@dataclass(frozen=True, eq=False)
class Constraint:
    """Hold a measure of some terms at or below a level.

    Attributes:
        measure: what is measured.
        terms: the terms and their layers' names.
        level: schedule of the bound, in the measure's unit, over successful optimizer steps.
        type: `inequality` (value <= level) or `equality` (value = level).
        slack: what exceeding the level costs; None where it is forbidden.
    """

    measure: Measure
    terms: Terms
    level: Schedule
    type: Type = "inequality"
    slack: Slack | None = None

    @property
    def entries(self) -> tuple[Entry, ...]:
        """What the measure's values, in their order, are of."""
        return self.terms.entries(self.measure.part, self.measure.per)


@dataclass(frozen=True, eq=False)
class Penalty:
    """Add coefficient * value of some terms to the loss; no level, no multiplier.

    Attributes:
        measure: what is measured.
        terms: the terms and their layers' names.
        coefficient: schedule of the coefficient, in units of loss per unit of the measure.
    """

    measure: Measure
    terms: Terms
    coefficient: Schedule


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
    per: Literal["layer", "block", "model"] = "layer",
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
        per: `layer` bounds each term. `block` bounds, in each term, each block from one irrep (or permutation, or field
            type of a convolution) to another, divided by the square root of the *layer's* out features, so that the
            squares of a layer's blocks add up to its own; blocks that hold equivariant maps only are left out in the
            complement. `model` holds the root mean square over all chosen terms in one shared constraint.
        where: chooses layers by name; all by default.
        type: `inequality` or `equality`.

    Raises:
        ConstraintError: if nothing is relaxed or chosen, or the level is negative.
        ScheduleError: if the level is not a number or schedule.
    """
    _known(per, "layer", "block", "model")
    return _constraint(model, weight_measure(part, per), level, where, type)


def relative(
    model: nn.Module,
    *,
    level: float | Schedule,
    part: Part = "whole",
    per: Literal["layer", "block", "model"] = "layer",
    where: Callable[[str], bool] | None = None,
    type: Type = "inequality",
) -> Constraint:
    """Bound the norm of each term as a fraction of its layer's response.

    The measure is `weight` over the RMS of the layer's output in the last training forward whose output was not zero,
    which is not differentiated; arguments as for `weight`.
    """
    _known(per, "layer", "block", "model")

    def slope(terms: Terms) -> Tensor:
        responses = torch.stack([term.response for term in terms.modules])
        return torch.where(responses > 0, terms.factors().abs() / responses, 0.0)  # nothing to compare with so far

    def synchronise(terms: Terms) -> None:
        kept = [term.response for term in terms.modules]
        torch._foreach_mul_(kept, kept)  # mean squares are what can be averaged
        _tensors.average_over_processes_(kept)
        torch._foreach_sqrt_(kept)

    measure = _norm_measure("relative", slope, part, per, synchronise)
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

    def synchronise(terms: Terms) -> None:
        _tensors.average_over_processes_([term.moment for term in terms.modules])

    measure = _stacked_measure("activation", square, synchronise=synchronise)
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
    per: Literal["layer", "generator"] = "layer",
    where: Callable[[str], bool] | None = None,
    type: Type = "inequality",
) -> Constraint:
    """Bound the Lie derivative of each term, in operator form.

    Discrete generators (inversion) count beside the algebra's, so that parity is seen; arguments as for `weight`. With
    `per="generator"` each generator has a constraint of its own, named by its place in `group.algebra` or
    `group.generators`; the square of a layer's value is the mean of theirs.

    Reference: for isotropic unit-variance x, the mean of || W rho_in(A) x - rho_out(A) W x ||^2 equals the squared
        Frobenius norm of the bracket; the mean over generators is taken so that the group's size does not matter.
    """
    _known(per, "layer", "generator")
    return _constraint(model, lie_measure(per), level, where, type)


def subgroup(
    model: nn.Module,
    group: Group,
    *,
    level: float | Schedule,
    where: Callable[[str], bool] | None = None,
    type: Type = "inequality",
) -> Constraint:
    """Bound what of each term breaks a subgroup H: || W - P_H W ||_F / sqrt(out features).

    P_H projects onto the maps that commute with H, of which the equivariant ones are some. At level 0 a term is left
    with W = P_H W: it breaks the group no further than to H. `finalize` checks such a term by its other constraints, or
    by its norm, for it is not equivariant; `on_violation="keep"` keeps it.

    Args:
        model: a relaxed model.
        group: H, as matrices of the same degree as those of the layers' group: `ce.groups.SO3()` where that is O(3),
            `ce.groups.cyclic(4)` of SO(2), or a `ce.groups.matrix_group` such as the turns about one axis.
        level: as for `weight`. The value grows with H, up to that of `weight` where H is the whole group.
        where: chooses layers by name; all by default.
        type: `inequality` or `equality`.

    Raises:
        ConstraintError: if a chosen layer is of escnn, whose terms are kernels; further as for `weight`.
        RepresentationError: if `group` is no subgroup of a layer's group, as far as its generators tell.
    """
    measure = _norm_measure(f"subgroup {group}", lambda t: t.factors().abs(), part=group)
    constraint = _constraint(model, measure, level, where, type)
    constraint.terms.projections(group)  # refuses what cannot be restricted
    return constraint


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
        function: maps a term to a 0-d tensor that depends on `term.weight`; must have a finite gradient at 0. A gate is
            not pulled by it.
        name: shown in reports.
        level: bound in the function's own unit.
        where: chooses layers by name; all by default.
        type: `inequality` or `equality`.
    """

    def values(terms: Terms) -> Tensor:
        with torch.no_grad():
            return torch.stack([_tensors.whole(function(term)) for term in terms.modules])

    def pull(terms: Terms, coefficients: Tensor) -> None:
        trained = [i for i, weight in enumerate(terms.weights()) if weight.requires_grad]
        if not trained:
            return
        weights, single = [terms.weights()[i] for i in trained], coefficients.unbind()
        with torch.enable_grad():
            numbers = torch.stack([_tensors.whole(function(terms.modules[i])) for i in trained])
        slopes = torch.autograd.grad(numbers, weights, torch.stack([single[i] for i in trained]).to(numbers))
        _tensors.add_(_tensors.gradients(weights), [_tensors.whole(slope) for slope in slopes])

    return _constraint(model, Measure(name, values, pull, homogeneous=False), level, where, type)


def resilient(
    constraint: Constraint, *, price: float, cost: Literal["quadratic", "linear", "budget"] = "linear"
) -> Constraint:
    """Let terms exceed their level at a price, for data that are only partly symmetric.

    Args:
        constraint: a record of this module.
        price: of the excess u of each layer over its level. `linear`: price * u, in units of loss per unit of the
            measure; layers whose asymmetry earns less than that become exactly equivariant, and no multiplier grows
            beyond the price. `quadratic`: (price / 2) u^2; with level 0 this is a ridge penalty of weight `price`, and
            no layer becomes exactly equivariant. `budget`: the excesses of all the record's layers may sum up to
            `price`, in the measure's unit; the layers that need asymmetry most share it.
        cost: `linear` (default), `quadratic` or `budget`.

    Returns:
        The same record with a slack; the optimizer solves for u in closed form.

    Raises:
        ConstraintError: if the price is not positive, the cost is unknown, or the record is no constraint.

    Example:
        >>> resilient(weight(model, level=0.0), price=0.1).slack  # doctest: +SKIP
        Slack(cost='linear', price=0.1)

    Reference: Hounie, Ribeiro, Chamon (2023), "Resilient constrained learning", for slacks with a cost.
    """
    if not isinstance(constraint, Constraint):
        raise ConstraintError(f"constraint={constraint!r}: expected a record such as ce.constraints.weight(model, ...)")
    if cost not in ("quadratic", "linear", "budget"):
        raise ConstraintError(f"cost={cost!r}: expected 'quadratic', 'linear' or 'budget'")
    if not (price > 0 and math.isfinite(price)):
        raise ConstraintError(f"price={price!r}: expected a finite number > 0")
    return replace(constraint, slack=Slack(cost, float(price)))


def penalty(constraint: Constraint, *, coefficient: float | Schedule) -> Penalty:
    """Add a constraint's measure to the loss with a given coefficient, instead of bounding it.

    Args:
        constraint: a record of this module; its level is not used.
        coefficient: a number or a schedule, in units of loss per unit of the measure.

    Returns:
        A record for `ConstrainedOptimizer`, which adds coefficient * sum of values to the loss it minimises.

    Raises:
        ConstraintError: if the record is no constraint.
        ScheduleError: if the coefficient is not a number or schedule.
    """
    if not isinstance(constraint, Constraint):
        raise ConstraintError(f"constraint={constraint!r}: expected a record such as ce.constraints.lie(model, ...)")
    return Penalty(constraint.measure, constraint.terms, as_schedule(coefficient))


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


def weight_measure(part: Part, per: Per = "layer") -> Measure:
    """The measure of `weight`."""
    return _norm_measure("weight", lambda t: t.factors().abs(), part, per)


def lie_measure(per: Per = "layer") -> Measure:
    """The measure of `lie`."""

    def square(stack: Tensor, terms: Stack) -> Tensor:
        defects = terms[0].projection.defect(stack)
        return defects.T.flatten() if per == "generator" else defects.mean(0)

    return _stacked_measure("lie", square, part="non_equivariant", per=per)


def _constraint(
    model: nn.Module, measure: Measure, level: float | Schedule, where: Callable[[str], bool] | None, type: Type
) -> Constraint:
    if type not in ("inequality", "equality"):
        raise ConstraintError(f"type={type!r}: expected 'inequality' or 'equality'")
    if measure.part not in ("whole", "non_equivariant") and not isinstance(measure.part, Group):
        raise ConstraintError(f"part={measure.part!r}: expected 'whole' or 'non_equivariant'")
    schedule = as_schedule(level)
    if type == "inequality" and (first := value_at(schedule, 0)) < 0:
        raise ConstraintError(
            f"level {first} at step 0: expected a bound >= 0 for {measure.name}, which is never negative"
        )
    constraint = Constraint(measure, _choose(model, where), schedule, type)
    measured = {i for entry in constraint.entries for i in entry.terms}
    if missing := [name for i, name in enumerate(constraint.terms.names) if i not in measured]:
        raise ConstraintError(
            f"{measure.name} per={measure.per!r} at layer {missing[0]!r}, whose group has no generator that can be "
            "tried there: expected another measure, for example ce.constraints.weight; choose layers in where="
        )
    return constraint


def _known(per: str, *expected: str) -> None:
    if per not in expected:
        raise ConstraintError(f"per={per!r}: expected one of {expected}")


def _choose(model: nn.Module, where: Callable[[str], bool] | None) -> Terms:
    found = relaxations(model)
    if not found:
        raise ConstraintError("the model has no relaxed layer: call ce.relax(model) before stating constraints")
    chosen = [(r.name, r.term) for r in found if where is None or where(r.name)]
    if not chosen:
        raise ConstraintError(f"where= chose none of the relaxed layers {[r.name for r in found]}")
    return Terms.of(chosen)


def norm_shares(coefficients: Tensor, slopes: Tensor, values: Tensor) -> Tensor:
    """Factors (n,) by which `part` is to be added to the gradients of norms with given slopes and values.

    d value / d W = slope^2 * part / value, and 0 at 0.
    """
    return slopes.square().mul_(coefficients).div_(values).nan_to_num_(0.0, 0.0, 0.0)


def _norm_measure(
    name: str,
    slope: Callable[[Terms], Tensor],
    part: Share,
    per: Per = "layer",
    synchronise: Callable[[Terms], None] | None = None,
) -> Measure:
    """A measure of the form slope * || part of W ||, with slopes (n,); shared, the root mean square of those."""

    def slopes(terms: Terms) -> Tensor:
        return terms.spread(slope(terms), part, per)

    def values(terms: Terms) -> Tensor:
        found = slopes(terms) * terms.norms(part, per)
        return torch.linalg.vector_norm(found, dim=0, keepdim=True) / len(terms) ** 0.5 if per == "model" else found

    def pull(terms: Terms, coefficients: Tensor) -> None:
        steepness, sizes = slopes(terms), terms.norms(part, per)
        found = steepness * sizes
        value = torch.linalg.vector_norm(found) if per == "model" else found
        if per == "model":
            coefficients = coefficients / len(terms) ** 0.5
        if not terms.whole(part):  # beside the rest of W, what is left of a part that is 0 is rounding
            rounding = 32 * torch.finfo(terms.weights()[0].dtype).eps * terms.spread(terms.norms("whole"), part, per)
            coefficients = torch.where(sizes > rounding, coefficients, 0.0)
        shares = norm_shares(coefficients, steepness, value)
        terms.add_parts_(_tensors.gradients(terms.weights()), part, per, shares)
        terms.pull_gates_(terms.gathered(shares * sizes.square(), part, per))

    single = None if per == "model" else slopes
    return Measure(name, values, pull, part=part, per=per, slope=single, synchronise=synchronise)


def _stacked_measure(
    name: str,
    square: Callable[[Tensor, Stack], Tensor],
    part: Part = "whole",
    per: Per = "layer",
    synchronise: Callable[[Terms], None] | None = None,
) -> Measure:
    """A measure whose squares are smooth functions of scale * W / sqrt(rows), computed stack by stack.

    It is differentiated by autograd, with the sub-gradient 0 at 0.
    """

    def evaluate(terms: Terms, differentiate: bool) -> tuple[Tensor, list[Tensor]]:
        pieces, leaves, factors = [], [], terms.factors().requires_grad_(differentiate)
        with torch.set_grad_enabled(differentiate):
            for stack in terms.stacks:
                modules = terms.modules[stack]
                leaf = _tensors.stacked([term.weight for term in modules]).requires_grad_(differentiate)
                squared = square(leaf * factors[stack].view(-1, *[1] * (leaf.ndim - 1)), modules)
                positive = squared > 0
                pieces.append(torch.where(positive, torch.where(positive, squared, 1.0).sqrt(), 0.0))
                leaves.append(leaf)
            return torch.cat(pieces), [*leaves, factors]

    def pull(terms: Terms, coefficients: Tensor) -> None:
        values, leaves = evaluate(terms, True)
        *slopes, steepness = torch.autograd.grad(values, leaves, coefficients.to(values))
        _tensors.add_(_tensors.gradients(terms.weights()), [g for stack in slopes for g in stack.unbind()])
        terms.pull_gates_(steepness * leaves[-1].detach())

    return Measure(name, lambda terms: evaluate(terms, False)[0], pull, part=part, per=per, synchronise=synchronise)
