"""Audit: which module of a network is the first to lose equivariance, by how much, and the likely reason.

What enters: a network, its data pipeline, inputs and a `Symmetry`. What leaves: an `Audit`, a table of findings, or the
Lie derivative of every layer.
Law: a network that is equivariant within the tolerance has no culprit; otherwise one is named.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from constrained_equiv import _inner
from constrained_equiv._findings import SOME_LINEAR, Finding, Inspection
from constrained_equiv._lie import LieDerivative, lie_derivative
from constrained_equiv._symmetry import Symmetry
from constrained_equiv._table import table
from constrained_equiv._trace import trace, unchanged
from constrained_equiv._verify import call, larger
from constrained_equiv.errors import RepresentationError


@dataclass(frozen=True, repr=False)
class Audit:
    """The findings in order of execution; prints as a table.

    Attributes:
        findings: one per module and factor of the group.
        culprit: the first at which equivariance is lost, or None.
        error: of the network as a whole, pipeline included.
        tolerance: largest error that counts as equivariant.
        notes: what else a reader should know.
    """

    findings: tuple[Finding, ...]
    culprit: Finding | None
    error: float
    tolerance: float
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether the network is equivariant within the tolerance."""
        return self.error <= self.tolerance

    def __repr__(self) -> str:
        factors = len({f.group for f in self.findings}) > 1
        header = ("module", "class", *(["under"] if factors else []), "action", "error", "own error", "")
        rows = [
            (
                finding.name or "(model)",
                finding.kind,
                *([finding.group] if factors else []),
                f"{finding.action} ({finding.source})" if finding.source else finding.action,
                _number(finding.error),
                _number(finding.own),
                ("-> " if finding is self.culprit else "") + finding.status,
            )
            for finding in self.findings
        ]
        lines = table(header, rows)
        if self.passed:
            lines.append(f"equivariant: error {self.error:.3g}, allowed {self.tolerance:.3g} (relative)")
        elif self.culprit is not None:
            found = self.culprit
            place = f"{found.name!r} ({found.kind})" if found.name else f"the model ({found.kind})"
            lines.append(f"not equivariant: error {self.error:.3g}, allowed {self.tolerance:.3g} (relative)")
            lines.append(f"first lost at {place} under {found.group}: {found.reason}")
        return "\n".join([*lines, *self.notes])


def audit(
    model: Callable[..., Any],
    inputs: Any,
    *,
    symmetry: Symmetry,
    pipeline: Callable[..., Any] | Sequence[Callable[..., Any]] = (),
    layers: Mapping[str, Symmetry] | None = None,
    tolerance: float | None = None,
    samples: int = 2,
    generator: torch.Generator | None = None,
) -> Audit:
    """Find the first module at which equivariance is lost.

    Every module written in Python is watched while the model runs on x and on g x; a direct product is tried one factor
    at a time. The model is run as it is, so that dropout and batch statistics show; buffers are given back unchanged.

    Args:
        model: called as `model(*inputs)` if `inputs` is a tuple, else `model(inputs)`.
        inputs: tensors, structured as `symmetry.inputs`; of the pipeline, where there is one.
        symmetry: the group and its actions on inputs and outputs.
        pipeline: the steps that prepare the data, functions of the inputs that return inputs of the same structure, so
            that `symmetry.inputs` describes what enters and leaves each.
        layers: symmetries of inner modules by name, for modules that state none (as e3nn's and escnn's do).
        tolerance: largest relative error that counts as equivariant; by default as for `assert_equivariant`.
        samples: random elements tried beside the discrete generators, per factor.
        generator: source of randomness; a fixed seed by default.

    Returns:
        The table.

    Raises:
        RepresentationError: if `layers` names no module, or an action does not fit.

    Example:
        >>> from torch import nn
        >>> from constrained_equiv import groups
        >>> model = nn.Sequential(nn.Identity(), nn.LayerNorm(3))
        >>> vectors = Symmetry(groups.O3(), "1x1o", "1x1o")
        >>> audit(model, torch.randn(8, 3), symmetry=vectors).culprit.name
        '1'
    """
    steps = [pipeline] if callable(pipeline) else list(pipeline)
    if not isinstance(model, nn.Module) and layers:
        raise RepresentationError(f"layers= names {sorted(layers)} of a function: expected a module as model")
    known = {} if not isinstance(model, nn.Module) else dict(model.named_modules())
    if missing := sorted(set(layers or {}) - known.keys()):
        raise RepresentationError(
            f"layers= names {missing}, which the model does not have: expected some of {[*known]}"
        )
    generator = generator or torch.Generator().manual_seed(0)
    findings: list[Finding] = []
    notes: list[str] = []
    worst, allowed = 0.0, tolerance
    with unchanged(model):
        for section in _inner.sections(symmetry.group, samples, generator):
            auditor = Inspection(model, steps, inputs, symmetry, section, layers or {}, tolerance)
            findings += auditor.findings()
            notes += auditor.notes
            allowed = auditor.tolerance
            if larger(auditor.error, worst):
                worst = auditor.error
    assert allowed is not None  # a group has at least one section
    passed = worst <= allowed
    return Audit(tuple(findings), None if passed else _culprit(findings), worst, allowed, tuple(dict.fromkeys(notes)))


def lie_derivatives(
    model: nn.Module, inputs: Any, *, symmetry: Symmetry, layers: Mapping[str, Symmetry] | None = None
) -> tuple[LieDerivative, ...]:
    """Measure the Lie derivative of every layer whose actions are known, on the inputs that it gets, and of the model.

    Args:
        model: as for `audit`.
        inputs: as for `audit`.
        symmetry: of the model, of a group that is no product.
        layers: symmetries of inner modules by name, for modules that state none.

    Returns:
        One record per call of a layer with stated representations, in order of execution, the model last.
    """
    section = _inner.sections(symmetry.group, 0, None)[0]
    result = []
    with unchanged(model):
        recorded = trace(model, lambda: call(model, inputs))
        for stage, one in recorded.events:
            if stage == "leave" and one.name and not one.keywords:
                stated = (layers or {}).get(one.name) or _inner.symmetry_of(
                    _inner.stated(one.module, section), one.arguments, symmetry.group
                )
                if stated is not None:
                    arguments = one.arguments if isinstance(stated.inputs, tuple) else one.arguments[0]
                    result.append(lie_derivative(one.module, arguments, symmetry=stated, name=one.name))
        result.append(lie_derivative(model, inputs, symmetry=symmetry))
    return tuple(result)


def _culprit(findings: list[Finding]) -> Finding | None:
    """Name the first module that loses equivariance by itself, or what within it is suspicious.

    Suspects that are inside a module whose output is sound are excused (a network may leave the symmetry and return). A
    module that fails on inputs nobody knows the action on is a suspect only; so is one whose output no action fits.
    """
    sound = {(f.name, f.group) for f in findings if f.status == "ok" and f.name}

    def excused(finding: Finding) -> bool:
        place = finding.name.split(" of ")[-1].split(".")
        return any((".".join(place[:k]), finding.group) in sound for k in range(1, len(place)))

    suspects = [
        f for f in findings if f.status in ("lost", "random", "unknown") and f.action != SOME_LINEAR and not excused(f)
    ]
    proven = next((f for f in suspects if f.status == "random" or (f.status == "lost" and f.own is not None)), None)
    if proven is None:
        return next(iter(suspects), None)
    within = [f for f in suspects if f"{f.name.split(' of ')[-1]}.".startswith(f"{proven.name}.") and f is not proven]
    return within[0] if within and findings.index(within[0]) < findings.index(proven) else proven


def _number(value: float | None) -> str:
    return "" if value is None else "nan" if math.isnan(value) else f"{value:.1e}"
