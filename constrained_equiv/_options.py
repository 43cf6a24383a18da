"""What a user may ask of a constrained step, and what is refused.

What enters: the options of `ConstrainedOptimizer` and `attach`. What leaves: `Options`, whose words are known, and
`check`, which compares them with the records and the base optimizer before anything is built.
Law: whatever cannot be done is refused here, by name and with the remedy, and never met in a step.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch

from constrained_equiv._dual import DualFactory, DualName, FormulationName, MultiplierFactory
from constrained_equiv._stacks import Terms
from constrained_equiv.constraints import Constraint, Penalty, ScaleSchedule
from constrained_equiv.errors import ConstraintError

Record: TypeAlias = Constraint | Penalty | ScaleSchedule
Order: TypeAlias = Literal["dual-primal", "simultaneous", "primal-dual"]
Enforce: TypeAlias = Literal["multipliers", "projection", "proximal"]
AtZero: TypeAlias = Literal["clear", "multipliers"]
OnNonFinite: TypeAlias = Literal["ignore", "skip", "raise"]

_KNOWN: Mapping[str, tuple[str, ...]] = {
    "order": ("dual-primal", "simultaneous", "primal-dual"),
    "enforce": ("multipliers", "projection", "proximal"),
    "at_zero": ("clear", "multipliers"),
    "on_nonfinite": ("ignore", "skip", "raise"),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """How constraints are enforced; documented at `ConstrainedOptimizer`."""

    formulation: FormulationName | type[Any] = "augmented_lagrangian"
    penalty: float = 1.0
    penalty_growth: float = 1.0
    dual: DualName | DualFactory = "sgd"
    dual_lr: float | None = None
    multiplier: MultiplierFactory | None = None
    order: Order = "dual-primal"
    enforce: Enforce = "multipliers"
    at_zero: AtZero = "clear"
    on_nonfinite: OnNonFinite = "ignore"

    def __post_init__(self) -> None:
        for name, known in _KNOWN.items():
            if getattr(self, name) not in known:
                raise ConstraintError(f"{name}={getattr(self, name)!r}: expected one of {known}")


def check_records(records: Sequence[object]) -> None:
    """Refuse what is no record, and none at all."""
    if unknown := [record for record in records if not isinstance(record, Record)]:
        raise ConstraintError(f"constraint {unknown[0]!r}: expected a record of ce.constraints")
    if not records:
        raise ConstraintError("no constraint was given: expected for example ce.constraints.weight(model, level=...)")


def check(
    base: torch.optim.Optimizer, terms: Terms, names: Sequence[str], records: Sequence[Constraint], options: Options
) -> None:
    """Refuse what a step could not do.

    Args:
        base: the optimizer that is wrapped.
        terms: all that it has to hold.
        names: of the constraints' entries.
        records: the constraints.
        options: how they are enforced.
    """
    if repeated := sorted(name for name, count in Counter(names).items() if count > 1):
        raise ConstraintError(f"{repeated[0]!r} is constrained twice: expected each layer once per measure; use where=")
    _check_base(base, terms)
    for record in records:
        if options.enforce == "projection" and record.type == "equality":
            raise ConstraintError(
                f"enforce='projection' of an equality ({record.measure.name}): expected an inequality, onto whose "
                "ball terms are scaled, or enforce='multipliers'"
            )
        if options.enforce == "projection" and not record.measure.homogeneous:
            raise ConstraintError(
                f"enforce='projection' with measure {record.measure.name!r}, of which nothing is known: expected one "
                "that grows in proportion to the term, which scaling then takes to its level; or enforce='multipliers'"
            )
        if options.enforce == "proximal" and record.measure.slope is None and record.measure.target != "gate":
            raise ConstraintError(
                f"enforce='proximal' with measure {record.measure.name!r}: expected a norm (weight, relative), not "
                "shared by layers, or a gate, whose proximal step has a closed form"
            )
        if record.slack is not None and options.enforce == "projection":
            raise ConstraintError(
                "enforce='projection' allows no excess over a level: use enforce='multipliers' with "
                "ce.constraints.resilient"
            )
        named = options.formulation
        if record.slack is not None and record.slack.cost != "quadratic" and named != "augmented_lagrangian":
            raise ConstraintError(
                f"a slack of {record.slack.cost} cost with formulation {named!r}: expected 'augmented_lagrangian', "
                "which determines the slack"
            )


def _check_base(base: torch.optim.Optimizer, terms: Terms) -> None:
    known = {id(p) for group in base.param_groups for p in group["params"]}
    missing = [
        name
        for name, term in zip(terms.names, terms.modules, strict=True)
        if any(id(p) not in known for p in term.parameters())
    ]
    if missing:
        raise ConstraintError(
            f"the base optimizer does not hold the terms of {missing}: build it after ce.relax(model), for example "
            "torch.optim.AdamW(ce.parameter_groups(model, lr=1e-3))"
        )
    own = {id(p) for term in terms.modules for p in term.parameters()}
    if any(g.get("maximize") and any(id(p) in own for p in g["params"]) for g in base.param_groups):
        raise ConstraintError(
            "the base optimizer has maximize=True, so that it would push terms away from their levels: expected "
            "one that minimises, and a loss of the other sign"
        )
