"""The engine: what surrounds a step of the base optimizer, whoever calls that step.

What enters: a base optimizer and constraint records. What leaves: `before`, which turns the task's gradients into those
of the Lagrangian, and `after`, which puts the terms back where they belong. Driven by `ConstrainedOptimizer` and by the
hooks of `attach`.

    project term gradients -> measure -> slack -> dual step -> pull  |  base step  |  project terms, prox -> next level

Law: one vector holds all constraints, inequalities first; nothing in a step is read by the host, and the number of
dispatched operations does not depend on the number of terms per distinct shape.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial, wraps
from itertools import compress
from typing import Any, Concatenate, NamedTuple, ParamSpec

import torch
from torch import Tensor, nn

from constrained_equiv import _tensors
from constrained_equiv._dual import Multipliers
from constrained_equiv._levels import Levels
from constrained_equiv._options import Options, Record, check, check_records
from constrained_equiv._stacks import Terms
from constrained_equiv._terms import NonEquivariantTerm
from constrained_equiv.constraints import Constraint, Penalty, ScaleSchedule, norm_shares
from constrained_equiv.errors import CheckpointError, NonFiniteError
from constrained_equiv.intertwiners import Projection
from constrained_equiv.schedules import value_at

_VERSION = 1
_SWEEPS = 32  # of projections that do not commute, onto what they leave together
_Arguments = ParamSpec("_Arguments")


def _in_own_precision(
    method: Callable[Concatenate["Engine", _Arguments], None],
) -> Callable[Concatenate["Engine", _Arguments], None]:
    """Leave autocast for a method of `Engine`: in bfloat16 a projection would be orthogonal to three digits."""

    @wraps(method)
    def run(self: "Engine", /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> None:
        kind = self.values.device.type
        if not torch.is_autocast_enabled(kind):
            return method(self, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return method(self, *args, **kwargs)

    return run


class Readings(NamedTuple):
    """The state of all constraints after a step, on the device; reading them is the caller's choice.

    Attributes:
        step: finished steps.
        names: `layer (measure)`, one per entry of the vectors.
        values: what was measured in the last step.
        levels: the bound that it was compared with.
        multipliers: after the last dual step.
        slacks: by how much each level was given way in the last step; zeros without `ce.constraints.resilient`.
    """

    step: int
    names: tuple[str, ...]
    values: Tensor
    levels: Tensor
    multipliers: Tensor
    slacks: Tensor


class _Charge(NamedTuple):
    """What one record adds to the gradients: coefficients times the slopes of its values."""

    at: int  # position in `Engine._charged`
    coefficients: Tensor
    values: Tensor


class _Stack(NamedTuple):
    """Terms of one shape and symmetry that are not pinned at zero."""

    term: NonEquivariantTerm
    positions: list[int]
    tables: list[dict[str, Any]]

    def trained(self, *, without_gradient: bool = True) -> tuple[list[nn.Parameter], list[int]]:
        """The parameters that are not frozen, and their terms' positions."""
        weights = [table["weight"] for table in self.tables]
        chosen = [w.requires_grad and (without_gradient or w.grad is not None) for w in weights]
        if all(chosen):
            return weights, self.positions
        return list(compress(weights, chosen)), list(compress(self.positions, chosen))


class Engine:
    """What surrounds a base step."""

    def __init__(self, base: torch.optim.Optimizer, records: tuple[Record, ...], options: Options) -> None:
        check_records(records)
        self.base, self.options = base, options
        self.step = 0
        self.penalties = tuple(record for record in records if isinstance(record, Penalty))
        stated = [record for record in records if isinstance(record, Constraint)]
        self.records = tuple(sorted(stated, key=lambda record: record.type == "equality"))
        entries = [record.entries for record in self.records]
        self.slices = tuple(_ranges([len(part) for part in entries]))
        self.names = tuple(
            f"{entry.name} ({record.measure.name})"
            for record, part in zip(self.records, entries, strict=True)
            for entry in part
        )
        self.terms = Terms.of(list(_unique(records)))
        check(base, self.terms, self.names, self.records, options)
        self._charged: list[Constraint | Penalty] = [*self.records, *self.penalties]
        for stack in self.terms.stacks:
            _tensors.adjoin_(self.terms.weights()[stack])
        self.multipliers = self._make_multipliers() if self.records else None
        weight = self.terms.modules[0].weight
        zeros = partial(torch.zeros, len(self.names), dtype=self.terms.precision, device=weight.device)
        self.values, self.excess, self.slacks = zeros(), zeros(), zeros()
        scales = [record for record in records if isinstance(record, ScaleSchedule)]
        self.levels = Levels(self.records, self.slices, scales, zeros())
        self.violations = self.excess if not self._resilient else zeros()
        position = {id(term): i for i, term in enumerate(self.terms.modules)}
        self._places = [
            torch.tensor([position[id(term)] for term in record.terms.modules], device=weight.device)
            for record in self._charged
        ]
        self._aligned = [record.terms.modules == self.terms.modules for record in self._charged]
        self._slopes: list[Tensor] = [self.values] * len(self._charged)
        self._trained = self._warned = False
        self._idle = 0
        self._pending: Tensor | None = None
        self._scratch = _tensors.Scratch()
        self._take_up()

    def _make_multipliers(self) -> Multipliers:
        options, weight = self.options, self.terms.modules[0].weight
        precision, device = self.terms.precision, weight.device
        prices = [
            record.slack.price if record.slack and record.slack.cost == "linear" else torch.inf
            for record, part in zip(self.records, self.slices, strict=True)
            for _ in range(part.start, part.stop)
        ]
        inequalities = max(
            (p.stop for r, p in zip(self.records, self.slices, strict=True) if r.type == "inequality"), default=0
        )
        return Multipliers(
            inequalities,
            len(prices) - inequalities,
            formulation=options.formulation,
            penalty=options.penalty,
            penalty_growth=options.penalty_growth,
            dual=options.dual,
            dual_lr=options.dual_lr,
            multiplier=options.multiplier,
            dtype=precision,
            device=device,
            ceilings=torch.tensor(prices, dtype=precision, device=device) if min(prices) < torch.inf else None,
        )

    @property
    def _resilient(self) -> bool:
        return any(record.slack for record in self.records)

    @torch.no_grad()
    def _take_up(self) -> None:
        """Take up the schedules at the current step, without touching the terms."""
        self.levels.move_to(self.step)
        self._set_pinned(self._to_pin())

    # --- a step ---

    @torch.no_grad()
    @_in_own_precision
    def before(self, *, first: bool = True) -> None:
        """Turn the task's gradients into those of the Lagrangian.

        Args:
            first: whether this is the first evaluation of the step, the one that the multipliers see.
        """
        self._follow()
        moving = first and not self._frozen() and self.options.enforce != "projection"
        if self.multipliers is not None:
            self._measure(synchronise=first)
            if moving and self.options.order == "dual-primal":
                self.multipliers.ascend(self.violations)
                self._give_way()
            self._coefficients = self.multipliers.coefficients(self.violations)
        charges = [self._charge(at) for at in range(len(self.records), len(self._charged))]
        if self.options.enforce == "multipliers":
            charges += [
                _Charge(at, self._part(self._coefficients, part), self._part(self.values, part))
                for at, (part, pinned) in enumerate(zip(self.slices, self._pinned, strict=True))
                if not pinned
            ]
        self._write_gradients(charges)
        if moving and self.options.order == "simultaneous":  # after the step: a closure's later evaluations are of it
            self._pending = self.violations.clone()

    @torch.no_grad()
    @_in_own_precision
    def after(self) -> None:
        """Put the terms back where they belong, and move on to the next level."""
        if self._waiting():
            self._idle += 1
            return
        self._idle = 0
        if self._pending is not None and self.multipliers is not None:
            self.multipliers.ascend(self._pending)
        self._pending = None
        self._project_weights()
        if self.options.enforce == "proximal":
            self._shrink()
        late = self.options.order == "primal-dual" and self.options.enforce != "projection" and not self._frozen()
        if late and self.multipliers is not None:
            self._measure(synchronise=False)
            self.multipliers.ascend(self.violations)
        self.step += 1
        self.levels.move_to(self.step)
        if self.options.enforce == "projection":
            self._project_onto_balls()
        self._pin()

    def finite(self) -> bool:
        """Whether the step may be taken, as `on_nonfinite` says; reads the device unless that is `ignore`."""
        if self.options.on_nonfinite == "ignore":
            return True
        bad = _nonfinite(self.base.param_groups)
        if bad and self.options.on_nonfinite == "raise":
            raise NonFiniteError(
                f"step {self.step}: {len(bad)} parameters have gradients that are not finite, first of shape {bad[0]}; "
                "nothing was updated. Lower the learning rate, clip gradients, or pass on_nonfinite='skip'"
            )
        return not bad

    def lagrangian(self) -> Tensor | float:
        """What the constraints added to the loss in the last evaluation."""
        total: Tensor | float = 0.0
        if self.multipliers is not None and self.options.enforce == "multipliers":
            total = self.multipliers.lagrangian(self.violations)
            for record, part in zip(self.records, self.slices, strict=True):
                if record.slack is not None:
                    total = total + record.slack.charge(self.slacks[part])
        for penalty in self.penalties:
            total = total + value_at(penalty.coefficient, self.step) * penalty.measure.values(penalty.terms).sum()
        return total

    def readings(self) -> Readings:
        """Return copies of the vectors."""
        levels = self.levels.last_compared()
        multipliers = self.values if self.multipliers is None else self.multipliers.values.to(self.values)
        return Readings(self.step, self.names, self.values.clone(), levels, multipliers.clone(), self.slacks.clone())

    def release(self) -> None:
        """Forget all constraints."""
        self.records, self.penalties, self.names, self.slices = (), (), (), ()
        self.terms = Terms((), (), ())
        self._charged = []
        self.multipliers = None
        self.levels = Levels((), (), (), self.levels.bounds)
        self._set_pinned([])

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        """Return plain tensors and numbers, loadable with `weights_only=True`."""
        return {
            "version": _VERSION,
            "step": self.step,
            "names": list(self.names),
            "trained": self._trained,
            "dual": {} if self.multipliers is None else self.multipliers.state_dict(),
        }

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse a state that belongs to other constraints."""
        if state.get("version") != _VERSION:
            raise CheckpointError(f"checkpoint version {state.get('version')!r}: expected {_VERSION}")
        if list(state["names"]) != list(self.names):
            raise CheckpointError(
                f"the checkpoint's constraints are {state['names']}: expected {list(self.names)}; relax and constrain "
                "as in the saved run"
            )
        if self.multipliers is not None:
            self.multipliers.check_state_dict(state["dual"])

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the state was saved."""
        if self.multipliers is not None:
            self.multipliers.load_state_dict(state["dual"])
        self.step, self._trained = state["step"], state["trained"]
        self._take_up()
        self.levels.compare()

    # --- parts of a step ---

    def _follow(self) -> None:
        """Move to where the model was moved after the optimizer had been built, as launchers do."""
        device = self.terms.modules[0].weight.device if self.terms.modules else self.values.device
        if device == self.values.device:
            return
        resilient = self.violations is not self.excess
        self.values, self.excess, self.slacks = (v.to(device) for v in (self.values, self.excess, self.slacks))
        self.violations = self.violations.to(device) if resilient else self.excess
        self.levels.bounds = self.levels.bounds.to(device)
        self._places = [place.to(device) for place in self._places]
        self._pending = None if self._pending is None else self._pending.to(device)
        if self.multipliers is not None:
            self.multipliers.to_(device)
        for stack in self.terms.stacks:
            _tensors.adjoin_(self.terms.weights()[stack])

    def _stated(self) -> Iterator[tuple[Constraint, slice, bool]]:
        return zip(self.records, self.slices, self._pinned, strict=True)

    def _part(self, vector: Tensor, part: slice) -> Tensor:
        return vector if len(self.slices) == 1 else vector[part]

    def _measure(self, *, synchronise: bool) -> None:
        for at, (record, part, pinned) in enumerate(self._stated()):
            if pinned:  # a part of a term is zero up to rounding, which would be read as a sign of resistance
                self._part(self.values, part).zero_()
                continue
            if synchronise and record.measure.synchronise is not None:
                record.measure.synchronise(record.terms)
            self._value(at, out=self._part(self.values, part))
        torch.sub(self.values, self.levels.bounds, out=self.excess)
        self.excess.nan_to_num_(0.0, 0.0, 0.0)  # what is not finite moves no multiplier
        self.levels.compare()
        self._give_way()

    def _value(self, at: int, *, out: Tensor | None = None) -> Tensor:
        """A record's values; of a norm the slopes are kept, for they are needed again to pull it."""
        record = self._charged[at]
        measure = record.measure
        if measure.slope is not None:
            slopes = self._slopes[at] = measure.slope(record.terms)
            return torch.mul(slopes, record.terms.norms(measure.part, measure.per), out=out)
        values = measure.values(record.terms)
        return values if out is None else out.copy_(values)

    def _give_way(self) -> None:
        """Subtract the slack that is best for the current multipliers."""
        if self.multipliers is None or not self._resilient:
            return
        multipliers, penalties = self.multipliers.values, self.multipliers.penalties
        for record, part in zip(self.records, self.slices, strict=True):
            if record.slack is not None:
                signed = record.type == "equality"
                slack = record.slack.solve(multipliers[part], self.excess[part], penalties[part], signed)
                self.slacks[part].copy_(slack)
        torch.sub(self.excess, self.slacks, out=self.violations)

    def _charge(self, at: int) -> _Charge:
        penalty = self.penalties[at - len(self.records)]
        if penalty.measure.synchronise is not None:
            penalty.measure.synchronise(penalty.terms)
        values = self._value(at)
        return _Charge(at, torch.full_like(values, value_at(penalty.coefficient, self.step)), values)

    def _write_gradients(self, charges: Sequence[_Charge]) -> None:
        """Project the task's gradients and add what the constraints pull with.

        Whole norms are added in the same pass over memory, for a second pass would cost as much as the first.
        """
        shares = self._shares([charge for charge in charges if _is_whole_norm(self._charged[charge.at])])
        for stack in self._awake:
            weights, positions = stack.trained(without_gradient=shares is not None)
            if not weights or (shares is None and not stack.term.complement):
                continue
            gradients = _tensors.gradients(weights)
            plus = None if shares is None else (weights, _take(shares, positions))
            if stack.term.complement:
                _tensors.map_stacked_(gradients, partial(_finite_complement, stack.term), self._scratch, plus=plus)
            elif plus is not None:
                _tensors.add_scaled_(gradients, *plus)
        others = [charge for charge in charges if not _is_whole_norm(self._charged[charge.at])]
        plain = isinstance(self.base, torch.optim.SGD | torch.optim.ASGD)
        before = [g.clone() for g in _tensors.gradients(self.terms.weights())] if plain and others else []
        for at, coefficients, values in charges:
            record = self._charged[at]
            if not _is_whole_norm(record):
                record.measure.pull(record.terms, coefficients)
            elif record.terms.gates():  # a norm is homogeneous in the gate
                record.terms.pull_gates_(coefficients * values)
        if plain and charges:
            self._shorten_steps(shares, before)
        for record, _, pinned in self._stated():
            if pinned and _pins_whole(record):
                if not self._waiting():  # for a checkpoint helper, which wants state of all parameters
                    for weight in record.terms.weights():
                        weight.grad = None
            elif pinned:  # what is not constrained goes on learning
                projections = record.terms.projections(record.measure.part)
                for rows, projection in zip(record.terms.stacks, projections, strict=True):
                    gradients = _tensors.gradients(record.terms.weights()[rows])
                    _tensors.map_stacked_(gradients, partial(_projected, projection), self._scratch)

    def _shares(self, charges: Sequence[_Charge]) -> Tensor | None:
        """By how much of each of `self.terms` the gradient grows."""
        total = None
        for at, coefficients, values in charges:
            shares = norm_shares(coefficients, self._slopes[at], values)
            if not self._aligned[at]:
                place = self._places[at]
                shares = self.values.new_zeros(len(self.terms)).index_add_(0, place, shares)
            total = shares if total is None else total + shares
        return total

    def _shorten_steps(self, shares: Tensor | None, before: list[Tensor]) -> None:
        """Divide the gradients of terms by rate * |pull|^2 / <pull, W> where that exceeds 1.

        The pull alone would carry such a term past zero: it would come out on the other side, at a distance on which
        multipliers grow, and so on without bound. Where the total gradient vanishes stays the same. Only the step of
        SGD is known to be rate * gradient; the steps of adaptive optimizers have bounded lengths of their own.

        Args:
            shares: of W in the pull of whole norms.
            before: gradients without the pulls of other measures; empty where there are none.
        """
        lengths = shares
        if before:
            weights = self.terms.weights()
            pulls = [g - b for g, b in zip(_tensors.gradients(weights), before, strict=True)]
            if shares is not None:
                _tensors.add_scaled_(pulls, weights, shares)
            along = self.terms.products(pulls)
            lengths = torch.where(along > 0, _tensors.norms(pulls, self.values.dtype).square() / along, 0.0)
        if lengths is None:
            return
        factors = (lengths * self._rates(self.terms.weights())).clamp_min_(1.0).reciprocal_().sub_(1.0)
        for stack in self._awake:
            weights, positions = stack.trained()
            if weights:
                gradients = _tensors.gradients(weights)
                _tensors.add_scaled_(gradients, gradients, _take(factors, positions))

    def _project_weights(self) -> None:
        for stack in self._awake:
            if stack.term.complement and (weights := stack.trained()[0]):
                _tensors.map_stacked_(weights, stack.term.projection.complement_, self._scratch)

    def _project_onto_balls(self) -> None:
        """Scale what is constrained by min(1, level / value); every measure is homogeneous in it."""
        for record, part in zip(self.records, self.slices, strict=True):
            values, levels = record.measure.values(record.terms).to(self.values).abs(), self.levels.bounds[part]
            self._rescale(record, torch.where(values > levels, levels / values, 1.0))

    def _shrink(self) -> None:
        """Take the proximal step of rate * slope^2 * coefficient: what is constrained moves to 0 and stops there."""
        for record, part, pinned in self._stated():
            if pinned:
                continue
            values = record.measure.values(record.terms).to(self.values)  # signed, like its coefficient
            slopes = 1.0 if record.measure.slope is None else record.measure.slope(record.terms).square()
            targets = record.terms.gates() if record.measure.target == "gate" else record.terms.weights()
            rates = self._rates(targets)
            if isinstance(rates, Tensor) and rates.ndim:
                rates = record.terms.spread(rates, record.measure.part, record.measure.per)
            pull = rates * slopes * self._coefficients[part]
            self._rescale(record, torch.where(values != 0, 1.0 - pull / values, 1.0).clamp_min_(0))

    def _rates(self, parameters: Sequence[nn.Parameter]) -> Tensor | float:
        """Learning rates of parameters: one number where they share it, which is the rule, else one for each.

        Terms that left the base optimizer, when a part of the model was finalized, do not move.
        """
        rate = {id(p): group["lr"] for group in self.base.param_groups for p in group["params"]}
        rates = [rate.get(id(parameter), 0.0) for parameter in parameters]
        if all(r is rates[0] or (isinstance(r, float) and r == rates[0]) for r in rates):
            return rates[0]  # type: ignore[no-any-return]
        return torch.stack([torch.as_tensor(r, device=self.values.device) for r in rates]).to(self.values)

    def _rescale(self, record: Constraint, factors: Tensor) -> None:
        """Multiply what is constrained by factors (n,); what is frozen stays."""
        if record.measure.target == "gate":
            _tensors.scale_(_tensors.unfrozen(record.terms.gates()), factors)
        else:
            weights = _tensors.unfrozen(record.terms.weights())
            record.terms.rescale_(weights, record.measure.part, record.measure.per, factors)

    def _pin(self) -> None:
        """Where a level is exactly 0, set what is constrained to exactly 0.

        Its base state is forgotten when the level rises again and no earlier: a distributed checkpoint expects state of
        every parameter, in the tail too.
        """
        before = self._pinned
        pinned = self._to_pin()
        if pinned != before:
            self._set_pinned(pinned)
        partly = []
        for (record, part, now), earlier in zip(self._stated(), before, strict=True):
            if earlier and not now and _pins_whole(record):
                for weight in record.terms.weights():
                    self.base.state.pop(weight, None)
            elif now and _pins_whole(record):
                _tensors.zero_(record.terms.weights())
            elif now:
                partly.append((record, part))
        for _ in range(_SWEEPS if len(partly) > 1 else 1):
            for record, part in partly:  # by 0, what is frozen too
                weights = record.terms.weights()
                record.terms.rescale_(weights, record.measure.part, record.measure.per, self.levels.bounds[part])
        if pinned != before and isinstance(self.base, torch.optim.LBFGS):
            self.base.state.clear()  # its directions lead out of what is pinned now; one parameter has them for all

    def _to_pin(self) -> list[bool]:
        """Which records' levels are 0 and end what they constrain."""
        return [
            level == 0
            and self.options.at_zero == "clear"
            and record.type == "inequality"
            and record.slack is None
            and record.measure.target == "weight"
            for record, level in zip(self.records, self.levels.now, strict=True)
        ]

    def _set_pinned(self, pinned: list[bool]) -> None:
        self._pinned = pinned
        asleep = {
            id(term)
            for record, now in zip(self.records, pinned, strict=True)
            if now and _pins_whole(record)
            for term in record.terms.modules
        }
        self._awake = []
        for stack in self.terms.stacks:
            places = [i for i in range(stack.start, stack.stop) if id(self.terms.modules[i]) not in asleep]
            terms = [self.terms.modules[i] for i in places]
            if terms:
                self._awake.append(_Stack(terms[0], places, [_parameters(term) for term in terms]))

    def _waiting(self) -> bool:
        """Whether this step moves nothing: checkpoint helpers take one with all rates 0 to create state."""
        return all(isinstance(g["lr"], int | float) and not g["lr"] for g in self.base.param_groups)

    def _frozen(self) -> bool:
        """Whether the terms cannot move, so that multipliers would wind up; only rates known to the host count."""
        frozen = all(isinstance(group["lr"], int | float) and group["lr"] == 0 for group in self._groups())
        meant = self._idle > 1 or not self._waiting()  # and is not what a checkpoint helper does, once or twice
        if frozen and meant and self._trained and not self._warned and any(level > 0 for level in self.levels.now):
            self._warned = True
            warnings.warn(
                f"step {self.step}: the learning rate of the terms is 0 while a level is {max(self.levels.now):.3g}: "
                "the terms are frozen and cannot follow; end the level schedule before the learning-rate schedule",
                stacklevel=4,
            )
        self._trained |= not frozen
        return frozen

    def _groups(self) -> list[dict[str, Any]]:
        """The base's parameter groups that are marked as those of terms, or all."""
        return [group for group in self.base.param_groups if group.get("terms")] or self.base.param_groups


def _is_whole_norm(record: Constraint | Penalty) -> bool:
    return record.measure.slope is not None and record.measure.per == "layer" and _pins_whole(record)


def _take(vector: Tensor, positions: list[int]) -> Tensor:
    """Entries at positions known to the host, without a copy to the device."""
    if len(positions) == len(vector):
        return vector
    if positions[-1] - positions[0] == len(positions) - 1:
        return vector[positions[0] : positions[-1] + 1]
    single = vector.unbind()
    return torch.stack([single[i] for i in positions])


def _parameters(term: nn.Module) -> dict[str, Any]:
    """A module's own table of parameters, which outlives the parameters in it and is quick to look up."""
    return term._parameters


def _finite_complement(term: NonEquivariantTerm, gradients: Tensor) -> Tensor:
    """Drop from the gradients of a stack what is not finite and their equivariant part."""
    return term.projection.complement_(torch.nan_to_num_(gradients, 0.0, 0.0, 0.0))


def _projected(projection: Projection, gradients: Tensor) -> Tensor:
    return gradients - projection.complement_(gradients.clone())


def _pins_whole(record: Constraint | Penalty) -> bool:
    """Whether the constrained part is all of W, so that a level of 0 ends the term."""
    return record.terms.whole(record.measure.part)


def _unique(records: Iterable[Record]) -> Iterator[tuple[str, NonEquivariantTerm]]:
    seen: set[int] = set()
    for record in records:
        for name, term in zip(record.terms.names, record.terms.modules, strict=True):
            if id(term) not in seen:
                seen.add(id(term))
                yield name, term


def _ranges(sizes: list[int]) -> Iterator[slice]:
    start = 0
    for size in sizes:
        yield slice(start, start + size)
        start += size


def _nonfinite(param_groups: list[dict[str, Any]]) -> list[tuple[int, ...]]:
    """Shapes of the parameters whose gradients are not finite; one host read when all is well."""
    gradients = [p.grad for group in param_groups for p in group["params"] if p.grad is not None]
    if not gradients:
        return []
    total = _tensors.whole(torch.nn.utils.get_total_norm(gradients))
    if bool(torch.isfinite(total)):
        return []
    # of whole gradients: where they are sharded, every process has to come to the same answer
    return [tuple(g.shape) for g in gradients if not bool(torch.isfinite(_tensors.whole(g)).all())]
