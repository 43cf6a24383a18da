"""ConstrainedOptimizer: any torch optimizer, with the non-equivariant terms held to their constraints.

What enters: a base optimizer and constraint records. What leaves: a `torch.optim.Optimizer` whose `step` is

    project term gradients -> measure -> dual step -> multipliers' pull -> base step -> project terms -> next level

Sees terms through the records alone and never walks models.
Law: learning-rate schedulers, hooks, scalers, clipping, accumulation and closures work as on the base optimizer; the
host reads nothing from the device in a step (unless `on_nonfinite` asks for it).
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from constrained_equiv import _tensors
from constrained_equiv._dual import DualFactory, DualName, FormulationName, Multipliers
from constrained_equiv._terms import NonEquivariantTerm
from constrained_equiv.constraints import Constraint, ScaleSchedule, Terms
from constrained_equiv.errors import CheckpointError, ConstraintError, NonFiniteError
from constrained_equiv.schedules import value_at

_VERSION = 1
_KEY = "constrained"


class Readings(NamedTuple):
    """The state of all constraints after a step, on the device; reading them is the caller's choice.

    Attributes:
        step: finished steps.
        names: `layer (measure)`, one per entry of the vectors.
        values: what was measured in the last step.
        levels: the bound that it was compared with.
        multipliers: after the last dual step.
    """

    step: int
    names: tuple[str, ...]
    values: Tensor
    levels: Tensor
    multipliers: Tensor


class ConstrainedOptimizer(torch.optim.Optimizer):
    """Wrap an optimizer so that it solves min loss subject to value_i <= level_i(step).

    Args:
        base: an optimizer over a relaxed model's parameters, terms included (see `ce.parameter_groups`).
        *constraints: records of `ce.constraints`; several are stacked into one vector.
        formulation: `augmented_lagrangian` (default), `lagrangian`, or a Cooper formulation class.
        penalty: c of the augmented Lagrangian, > 0, in units of loss per squared unit of the measure.
        dual: `sgd` (default), `nupi`, or a function that makes a maximizing optimizer of the multipliers. An Adam here
            takes sign-like steps: its multipliers lose their meaning and may cycle.
        dual_lr: ascent rate of the multipliers; the penalty by default.
        order: `dual-primal` (default: multipliers move first, on the same measurement), `simultaneous`, or
            `primal-dual` (the terms are measured again after the base step).
        enforce: `multipliers`, or `projection`: scale each term back onto its level's ball after every step instead.
        at_zero: what happens while a level is exactly 0: `clear` (default) sets the term to exactly 0 and forgets its
            base state, so that the tail of the schedule trains the equivariant model alone; `multipliers` leaves it to
            the multipliers.
        on_nonfinite: `ignore` (default) keeps multipliers and terms finite and costs nothing; `skip` leaves everything
            as it was when a gradient is not finite; `raise` raises NonFiniteError then. The last two read the device
            once per step.

    Raises:
        ConstraintError: if no constraint is given, a term is missing in the base optimizer, a term is constrained twice
            by the same measure, or an option is unknown.

    Example:
        >>> import torch, constrained_equiv as ce
        >>> points = ce.representations.permutation(4, channels=2)
        >>> model = ce.relax(
        ...     torch.nn.Linear(2, 2),
        ...     where=lambda name, layer: True,
        ...     adapter=ce.adapters.linear(points, points, axes=(-2, -1)),
        ... )
        >>> constraint = ce.constraints.weight(model, level=ce.schedules.linear(1.0, 0.0, 100))
        >>> optimizer = ce.ConstrainedOptimizer(torch.optim.Adam(model.parameters(), lr=1e-3), constraint)
        >>> model(torch.randn(8, 4, 2)).square().mean().backward()
        >>> optimizer.step()

    Reference: Gallego-Posada et al. (2025), "Cooper: a library for constrained optimization in deep learning", for the
        formulations; Pertigkiozoglou et al. (2024) for relaxed training.
    """

    _step_supports_amp_scaling = False  # GradScaler then unscales first, so that the pull is added in unscaled units

    def __init__(
        self,
        base: torch.optim.Optimizer,
        *constraints: Constraint | ScaleSchedule,
        formulation: FormulationName | type[Any] = "augmented_lagrangian",
        penalty: float = 1.0,
        dual: DualName | DualFactory = "sgd",
        dual_lr: float | None = None,
        order: Literal["dual-primal", "simultaneous", "primal-dual"] = "dual-primal",
        enforce: Literal["multipliers", "projection"] = "multipliers",
        at_zero: Literal["clear", "multipliers"] = "clear",
        on_nonfinite: Literal["ignore", "skip", "raise"] = "ignore",
    ) -> None:
        if not isinstance(base, torch.optim.Optimizer):
            raise ConstraintError(f"base={base!r}: expected a torch optimizer, for example torch.optim.AdamW(...)")
        for name, value, known in (
            ("order", order, ("dual-primal", "simultaneous", "primal-dual")),
            ("enforce", enforce, ("multipliers", "projection")),
            ("at_zero", at_zero, ("clear", "multipliers")),
            ("on_nonfinite", on_nonfinite, ("ignore", "skip", "raise")),
        ):
            if value not in known:
                raise ConstraintError(f"{name}={value!r}: expected one of {known}")
        self.base = base
        self._building = True  # torch's constructor fills param_groups, which here belong to the base
        super().__init__(base.param_groups, base.defaults)
        self._building = False
        self._on_nonfinite = on_nonfinite
        self._engine = _Engine(base, constraints, order, enforce, at_zero, formulation, penalty, dual, dual_lr)

    # --- the wrapped optimizer's own state, never a copy of it ---

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of the base optimizer."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        if not self._building:
            self.base.param_groups = value

    @property
    def state(self) -> Any:
        """State of the base optimizer."""
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        if not self._building:
            self.base.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """Default options of the base optimizer."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        if not self._building:
            self.base.defaults = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the base optimizer."""
        if not self._building:
            self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters."""
        self.base.zero_grad(set_to_none)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base!r}, {len(self._engine.names)} constraints, step {self._engine.step})"

    # --- a step ---

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one constrained step; the gradients of the task are in `.grad`, or a closure computes them.

        Args:
            closure: clears the gradients, computes the loss, calls backward and returns the loss; evaluated as often as
                the base optimizer wants.

        Returns:
            The loss of the closure's first evaluation, else None.

        Raises:
            NonFiniteError: with `on_nonfinite="raise"`, if a gradient is not finite; nothing was updated.
        """
        engine = self._engine
        if closure is None:
            if self._finite():
                engine.before(first=True)
                self.base.step()
                engine.after()
            return None
        losses: list[Any] = []

        def constrained() -> Any:
            with torch.enable_grad():
                loss = closure()
            if not losses and not self._finite():
                raise _Skipped
            engine.before(first=not losses)
            losses.append(loss.detach() if isinstance(loss, Tensor) else loss)
            return loss if loss is None else loss + engine.lagrangian()

        try:
            self.base.step(constrained)
        except _Skipped:
            return None
        engine.after()
        return losses[0]

    def _finite(self) -> bool:
        if self._on_nonfinite == "ignore":
            return True
        bad = _nonfinite(self.param_groups)
        if bad and self._on_nonfinite == "raise":
            raise NonFiniteError(
                f"step {self._engine.step}: {len(bad)} parameters have gradients that are not finite, first {bad[0]}; "
                "nothing was updated. Lower the learning rate, clip gradients, or pass on_nonfinite='skip'"
            )
        return not bad

    # --- reading and saving ---

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """The constraint records, inequalities first; empty after `ce.finalize`."""
        return self._engine.records

    @property
    def multipliers(self) -> Multipliers | None:
        """Multipliers, Cooper problem and dual optimizer; None where only a scale schedule is driven."""
        return self._engine.multipliers

    @property
    def finished_steps(self) -> int:
        """Number of successful steps, the position in all schedules."""
        return self._engine.step

    def readings(self) -> Readings:
        """Return values, levels and multipliers of all constraints as copies on the device."""
        return self._engine.readings()

    def release(self) -> None:
        """Forget all constraints, so that the optimizer steps like its base; `ce.finalize` calls this."""
        self._engine.release()

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state and, under `constrained`, multipliers, dual state and schedule position.

        A plain optimizer of the base's class loads it too and ignores the extra key.
        """
        return {**self.base.state_dict(), _KEY: self._engine.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class, or of a plain optimizer of the base's class (constraints then start afresh).

        Raises:
            CheckpointError: if the constraints of the checkpoint are others than this optimizer's; nothing was loaded.
        """
        own = state_dict.get(_KEY)
        if own is not None:
            self._engine.check_state_dict(own)
        self.base.load_state_dict({key: value for key, value in state_dict.items() if key != _KEY})
        if own is not None:
            self._engine.load_state_dict(own)


class _Skipped(Exception):
    """Leaves a base optimizer's step before it changed anything."""


class _Engine:
    """What surrounds a base step. One vector holds all constraints, inequalities first."""

    def __init__(
        self,
        base: torch.optim.Optimizer,
        records: tuple[Constraint | ScaleSchedule, ...],
        order: str,
        enforce: str,
        at_zero: str,
        formulation: Any,
        penalty: float,
        dual: Any,
        dual_lr: float | None,
    ) -> None:
        if unknown := [record for record in records if not isinstance(record, Constraint | ScaleSchedule)]:
            raise ConstraintError(f"constraint {unknown[0]!r}: expected a record of ce.constraints")
        if not records:
            raise ConstraintError(
                "no constraint was given: expected for example ce.constraints.weight(model, level=...)"
            )
        self.base = base
        self.order, self.enforce, self.at_zero = order, enforce, at_zero
        self.step = 0
        self.scales = tuple(record for record in records if isinstance(record, ScaleSchedule))
        stated = [record for record in records if isinstance(record, Constraint)]
        self.records = tuple(sorted(stated, key=lambda record: record.type == "equality"))
        self.slices = list(_ranges([len(record.terms) for record in self.records]))
        self.names = tuple(f"{name} ({record.measure.name})" for record in self.records for name in record.terms.names)
        self.terms = Terms.of(list(_unique(records)))
        self._check_base(records)
        weight = self.terms.modules[0].weight
        self.multipliers: Multipliers | None = None
        if self.records:
            kinds = [record.type for record in self.records for _ in record.terms.names]
            self.multipliers = Multipliers(
                kinds.count("inequality"),
                kinds.count("equality"),
                formulation=formulation,
                penalty=penalty,
                dual=dual,
                dual_lr=dual_lr,
                dtype=self.terms.precision,
                device=weight.device,
            )
        self.values = torch.zeros(len(self.names), dtype=self.terms.precision, device=weight.device)
        self.levels = torch.zeros_like(self.values)
        self.compared = torch.zeros_like(self.values)
        self.violations = torch.zeros_like(self.values)
        self._levels = [0.0] * len(self.records)
        self._trained = self._warned = False
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        """Take up the schedules at the current step, without touching the terms."""
        self._write_levels()
        self._write_scales()
        self._set_pinned([self._pins(record, level) for record, level in zip(self.records, self._levels, strict=True)])

    @torch.no_grad()
    def before(self, *, first: bool) -> None:
        """Turn the task's gradients into those of the Lagrangian.

        Args:
            first: whether this is the first evaluation of the step, the one that the multipliers see.
        """
        self._project_gradients()
        if self.multipliers is None:
            return
        self._measure()
        moving = first and self.enforce == "multipliers" and not self._frozen()
        if moving and self.order == "dual-primal":
            self.multipliers.ascend(self.violations)
        if self.enforce == "multipliers":
            coefficients = self.multipliers.coefficients(self.violations)
            for record, part, pinned in zip(self.records, self.slices, self._pinned, strict=True):
                if not pinned:
                    record.measure.pull(record.terms, coefficients[part])
        if moving and self.order == "simultaneous":
            self.multipliers.ascend(self.violations)

    @torch.no_grad()
    def after(self) -> None:
        """Put the terms back where they belong, and move on to the next level."""
        self._project_weights()
        primal_dual = self.enforce == "multipliers" and self.order == "primal-dual"
        if primal_dual and self.multipliers is not None and not self._frozen():
            self._measure()
            self.multipliers.ascend(self.violations)
        self.step += 1
        self._write_levels()
        self._write_scales()
        if self.enforce == "projection":
            self._project_onto_balls()
        self._pin()

    def lagrangian(self) -> Tensor | float:
        """What the constraints add to the loss in the last evaluation."""
        return 0.0 if self.multipliers is None else self.multipliers.lagrangian(self.violations)

    def readings(self) -> Readings:
        multipliers = self.values.clone() if self.multipliers is None else self.multipliers.values.to(self.values)
        return Readings(self.step, self.names, self.values.clone(), self.compared.clone(), multipliers.clone())

    def release(self) -> None:
        self.records, self.scales, self.names, self.slices = (), (), (), []
        self.terms = Terms((), (), ())
        self.multipliers = None
        self._levels = []
        self._set_pinned([])

    # --- state ---

    def state_dict(self) -> dict[str, Any]:
        return {
            "version": _VERSION,
            "step": self.step,
            "names": list(self.names),
            "trained": self._trained,
            "dual": {} if self.multipliers is None else self.multipliers.state_dict(),
        }

    def check_state_dict(self, state: dict[str, Any]) -> None:
        if state.get("version") != _VERSION:
            raise CheckpointError(f"checkpoint version {state.get('version')!r}: expected {_VERSION}")
        if list(state["names"]) != list(self.names):
            raise CheckpointError(
                f"the checkpoint's constraints are {state['names']}: expected {list(self.names)}; relax and constrain "
                "as in the saved run"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.multipliers is not None:
            self.multipliers.load_state_dict(state["dual"])
        self.step, self._trained = state["step"], state["trained"]
        self._start()

    # --- parts of a step ---

    def _measure(self) -> None:
        values = torch.cat([record.measure.values(record.terms).to(self.values) for record in self.records])
        violations = values - self.levels
        self.values.copy_(values)
        self.compared.copy_(self.levels)
        # a violation that is not finite moves no multiplier
        self.violations.copy_(torch.where(torch.isfinite(violations), violations, 0.0))

    def _project_gradients(self) -> None:
        for terms in self._awake_stacks():
            present = [term.weight.grad for term in terms if term.weight.grad is not None]
            if present:
                _tensors.map_stacked_(present, partial(_finite_complement, terms[0]))
        for record, pinned in zip(self.records, self._pinned, strict=True):
            if pinned and _pins_whole(record):
                for weight in record.terms.weights():
                    weight.grad = None
            elif pinned:  # the equivariant part of a free term goes on learning
                for stack in record.terms.stacks:
                    gradients = _tensors.gradients(record.terms.weights()[stack])
                    _tensors.map_stacked_(gradients, partial(_equivariant_part, record.terms.modules[stack.start]))

    def _project_weights(self) -> None:
        for terms in self._awake_stacks():
            if terms[0].complement:
                _tensors.map_stacked_([term.weight.data for term in terms], terms[0].projection.complement_)

    def _project_onto_balls(self) -> None:
        """Scale what is constrained by min(1, level / value); every measure is homogeneous in it."""
        for record, part in zip(self.records, self.slices, strict=True):
            values = record.measure.values(record.terms).to(self.levels).abs()
            excess = torch.where(values > self.levels[part], self.levels[part] / values, 1.0) - 1.0
            if record.measure.target == "gate":
                _tensors.scale_([gate.data for gate in record.terms.gates()], excess + 1.0)
            else:
                weights = [weight.data for weight in record.terms.weights()]
                _tensors.add_scaled_(weights, record.terms.parts(record.measure.part), excess)

    def _pin(self) -> None:
        """Where a level is exactly 0, set what is constrained to exactly 0 and forget its base state."""
        pinned = [self._pins(record, level) for record, level in zip(self.records, self._levels, strict=True)]
        for record, now, before in zip(self.records, pinned, self._pinned, strict=True):
            if not now:
                continue
            weights = record.terms.weights()
            if _pins_whole(record):
                _tensors.zero_([weight.data for weight in weights])
                if not before:
                    for weight in weights:
                        self.base.state.pop(weight, None)
            else:
                parts = record.terms.parts(record.measure.part)
                _tensors.add_scaled_(
                    [weight.data for weight in weights], parts, -torch.ones_like(self.levels[: len(parts)])
                )
        self._set_pinned(pinned)

    def _pins(self, record: Constraint, level: float) -> bool:
        return (
            self.at_zero == "clear" and level == 0 and record.type == "inequality" and record.measure.target == "weight"
        )

    def _set_pinned(self, pinned: list[bool]) -> None:
        self._pinned = pinned
        self._asleep = {
            id(term)
            for record, now in zip(self.records, pinned, strict=True)
            if now and _pins_whole(record)
            for term in record.terms.modules
        }

    def _awake_stacks(self) -> Iterator[tuple[NonEquivariantTerm, ...]]:
        for stack in self.terms.stacks:
            terms = tuple(term for term in self.terms.modules[stack] if id(term) not in self._asleep)
            if terms:
                yield terms

    def _write_levels(self) -> None:
        for i, (record, part) in enumerate(zip(self.records, self.slices, strict=True)):
            level = value_at(record.level, self.step)
            if level < 0 and record.type == "inequality":
                raise ConstraintError(
                    f"level {level} at step {self.step}: expected a bound >= 0, for {record.measure.name} is never "
                    "negative"
                )
            if level != self._levels[i]:
                self.levels[part].fill_(level)
                self._levels[i] = level

    def _write_scales(self) -> None:
        for record in self.scales:
            _tensors.fill_([term.scale for term in record.terms.modules], value_at(record.schedule, self.step))

    def _frozen(self) -> bool:
        """Whether the terms cannot move, so that multipliers would wind up; only rates known to the host count."""
        groups = self.base.param_groups
        marked = [group for group in groups if group.get("terms")] or groups
        frozen = all(isinstance(group["lr"], int | float) and group["lr"] == 0 for group in marked)
        if frozen and self._trained and not self._warned and any(level > 0 for level in self._levels):
            self._warned = True
            warnings.warn(
                f"step {self.step}: the learning rate of the terms is 0 while a level is {max(self._levels):.3g}: "
                "the terms are frozen and cannot follow; end the level schedule before the learning-rate schedule",
                stacklevel=4,
            )
        self._trained |= not frozen
        return frozen

    def _check_base(self, records: tuple[Constraint | ScaleSchedule, ...]) -> None:
        if repeated := sorted({name for name in self.names if self.names.count(name) > 1}):
            raise ConstraintError(
                f"{repeated[0]!r} is constrained twice: expected each layer once per measure; use where="
            )
        known = {id(p) for group in self.base.param_groups for p in group["params"]}
        missing = [
            name
            for name, term in zip(self.terms.names, self.terms.modules, strict=True)
            if any(id(p) not in known for p in term.parameters())
        ]
        if missing:
            raise ConstraintError(
                f"the base optimizer does not hold the terms of {missing}: build it after ce.relax(model), for example "
                "torch.optim.AdamW(ce.parameter_groups(model, lr=1e-3))"
            )


def _finite_complement(term: NonEquivariantTerm, gradients: Tensor) -> Tensor:
    """Drop from the gradients of a stack what is not finite and, in the complement, their equivariant part."""
    finite = torch.nan_to_num_(gradients, 0.0, 0.0, 0.0)
    return term.projection.complement_(finite) if term.complement else finite


def _equivariant_part(term: NonEquivariantTerm, gradients: Tensor) -> Tensor:
    return gradients - term.projection.complement_(gradients.clone())


def _pins_whole(record: Constraint) -> bool:
    """Whether the constrained part is all of W, so that a level of 0 ends the term."""
    return record.measure.part == "whole" or all(term.complement for term in record.terms.modules)


def _unique(records: Iterable[Constraint | ScaleSchedule]) -> Iterator[tuple[str, NonEquivariantTerm]]:
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
    if not gradients or bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients))):
        return []
    return [tuple(g.shape) for g in gradients if not bool(torch.isfinite(g).all())]
