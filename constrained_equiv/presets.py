"""Presets: ours and the published methods as ready-made settings.

What enters: a model and the number of training steps. What leaves: the same model, relaxed as the method asks, and a
`Preset` whose `optimizer(base)` wraps the user's optimizer.
Law: a preset is nothing but calls of the public functions; whatever it does can be written out by hand.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from constrained_equiv import constraints, schedules
from constrained_equiv._optim import ConstrainedOptimizer
from constrained_equiv._options import Record
from constrained_equiv._relax import relax
from constrained_equiv._terms import Init
from constrained_equiv.adapters import Adapter
from constrained_equiv.errors import ConstraintError

Where = Callable[[str, nn.Module], bool]


@dataclass(frozen=True)
class Preset:
    """Constraints of a relaxed model and options of the optimizer.

    Attributes:
        constraints: records of `ce.constraints`.
        options: keyword arguments of `ConstrainedOptimizer`.
    """

    constraints: tuple[Record, ...]
    options: dict[str, Any] = field(default_factory=dict)

    def optimizer(self, base: torch.optim.Optimizer) -> ConstrainedOptimizer:
        """Wrap an optimizer over the relaxed model's parameters.

        Args:
            base: for example `torch.optim.AdamW(ce.parameter_groups(model, lr=1e-3))`, built after the preset.
        """
        return ConstrainedOptimizer(base, *self.constraints, **self.options)


def ours(
    model: nn.Module,
    *,
    steps: int,
    start: float = 0.5,
    tail: float = 0.2,
    where: Where | None = None,
    adapter: Adapter | None = None,
) -> Preset:
    """Bound each term's norm by a level that falls to 0 along a cosine, and train the equivariant model in the tail.

    Args:
        model: relaxed in place, in the complement form, starting at zero.
        steps: optimizer steps of the whole training.
        start: level at step 0, as the RMS output of a term for unit-variance input.
        tail: fraction of the steps at level 0.
        where: layers, as for `ce.relax`.
        adapter: as for `ce.relax`.

    Raises:
        ConstraintError: if `tail` is not in [0, 1).

    Example:
        >>> import torch, constrained_equiv as ce
        >>> points = ce.representations.permutation(4, channels=2)
        >>> model = torch.nn.Linear(2, 2)
        >>> adapter = ce.adapters.linear(points, points, axes=(-2, -1))
        >>> preset = ours(model, steps=100, where=lambda name, m: True, adapter=adapter)
        >>> optimizer = preset.optimizer(torch.optim.Adam(model.parameters()))
        >>> [round(preset.constraints[0].level(step), 2) for step in (0, 40, 80, 100)]
        [0.5, 0.25, 0.0, 0.0]
    """
    if not 0 <= tail < 1:
        raise ConstraintError(f"tail={tail!r}: expected a fraction of the steps in [0, 1)")
    relax(model, where=where, adapter=adapter)
    level = schedules.cosine(start, 0.0, round((1 - tail) * steps))
    return Preset((constraints.weight(model, level=level),))


def triangle(
    model: nn.Module,
    *,
    steps: int,
    coefficient: float = 0.01,
    norm: Literal["activation", "weight"] = "activation",
    init: Init = nn.init.kaiming_uniform_,
    where: Where | None = None,
    adapter: Adapter | None = None,
) -> Preset:
    """Drive the scale of free terms from 0 to 1 and back to 0, with two penalties of constant coefficient.

    Args:
        model: relaxed in place, in the free form.
        steps: optimizer steps of the whole training; the scale is 0 at both ends.
        coefficient: of the Lie derivative (in operator form) and of the term's size, in units of loss.
        norm: what the size is: RMS of what the term adds to the batch, or the norm of its weight (for convolutions).
        init: of the terms.
        where: layers, as for `ce.relax`.
        adapter: as for `ce.relax`.

    Raises:
        ConstraintError: if `norm` is unknown.

    Reference: Pertigkiozoglou et al. (2024), "Improving Equivariant Model Training via Constraint Relaxation". Sampled
        generators are replaced by their expectation, and sums over batch and points by means.
    """
    if norm not in ("activation", "weight"):
        raise ConstraintError(f"norm={norm!r}: expected 'activation' or 'weight'")
    relax(model, where=where, adapter=adapter, complement=False, init=init)
    size = constraints.activation if norm == "activation" else constraints.weight
    penalties = [
        constraints.penalty(record, coefficient=coefficient)
        for record in (constraints.lie(model, level=0.0), size(model, level=0.0))
    ]
    return Preset((constraints.scale(model, schedule=schedules.triangle(steps)), *penalties))


def gate(
    model: nn.Module,
    *,
    dual_lr: float = 1e-3,
    init: Init = nn.init.kaiming_uniform_,
    where: Where | None = None,
    adapter: Adapter | None = None,
) -> Preset:
    """Hold a learnable scalar before each free term at 0 by plain, simultaneous dual ascent.

    Args:
        model: relaxed in place, in the free form with gates that start at 1.
        dual_lr: ascent rate of the multipliers, which start at 0.
        init: of the terms.
        where: layers, as for `ce.relax`.
        adapter: as for `ce.relax`.

    Reference: Manolache, Chamon, Niepert (2025), "Learning (Approximately) Equivariant Networks via Constrained
        Optimization". The constraint does not see W, and without an augmented term the gates may cycle.
    """
    relax(model, where=where, adapter=adapter, complement=False, gate=True, init=init)
    options = {"formulation": "lagrangian", "order": "simultaneous", "dual_lr": dual_lr}
    return Preset((constraints.gate(model),), options)


def ridge(
    model: nn.Module,
    *,
    weight: float = 1.0,
    where: Where | None = None,
    adapter: Adapter | None = None,
) -> Preset:
    """Add (weight / 2) || W ||^2 / out features to the loss, always on: a prior towards equivariance, never exact.

    Args:
        model: relaxed in place, in the complement form.
        weight: of the penalty, in units of loss per squared unit of the term's RMS output.
        where: layers, as for `ce.relax`.
        adapter: as for `ce.relax`.

    Reference: Finzi, Benton, Wilson (2021), "Residual Pathway Priors for Soft Equivariance Constraints".
    """
    relax(model, where=where, adapter=adapter)
    options = {"formulation": "quadratic_penalty", "penalty": weight, "at_zero": "multipliers"}
    return Preset((constraints.weight(model, level=0.0),), options)
