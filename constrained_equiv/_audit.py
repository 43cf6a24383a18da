"""Audit: which module of a network is the first to lose equivariance, by how much, and the likely reason.

What enters: a network, its data pipeline, inputs and a `Symmetry`. What leaves: an `Audit`, a table of findings.
Law: a network that is equivariant within the tolerance has no culprit; otherwise one is named.

The network runs on x and on g x. The action on an inner tensor is taken from what layers state (e3nn irreps, escnn field
types, relaxed terms, `layers=`); otherwise the actions that are known nearby are tried, and one that fits is the answer.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from constrained_equiv import _inner
from constrained_equiv._inner import Known, Section
from constrained_equiv._lie import LieDerivative, lie_derivative
from constrained_equiv._symmetry import Symmetry
from constrained_equiv._trace import Atom, Call, Trace, atoms, replace_atoms, trace, unchanged
from constrained_equiv._verify import allowed_error, call, larger, leaves, relative_gap
from constrained_equiv.errors import RepresentationError

Status = Literal["ok", "lost", "inherited", "unknown", "random"]


@dataclass(frozen=True)
class Finding:
    """What the audit found at the output of one module (or step of the pipeline).

    Attributes:
        name: of the module.
        kind: its class.
        group: the group, or the factor of a product, that was tried.
        action: how the group acts on the module's output, in words.
        source: where that is known from: `stated` by a layer, `given` by the user, `kept` from the input of a plain
            torch layer, or `inferred`, because it fits.
        error: relative equivariance error at this point of the network; None where no action is known.
        own: relative error of this module alone, on moved inputs; None where an action is not known.
        status: `ok`; `lost` here; `inherited` from before; `unknown`, no known action fits; `random`, two calls differ.
        reason: what probably causes it, in words.
    """

    name: str
    kind: str
    group: str
    action: str
    source: str
    error: float | None
    own: float | None
    status: Status
    reason: str


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
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in (header, *rows)]
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
            auditor = _Auditor(model, steps, inputs, symmetry, section, layers or {}, tolerance)
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


class _Judged(NamedTuple):
    """An atom with the action that it carries, if any, and the error under it."""

    known: Known | None
    error: float | None


class _Auditor:
    """One factor of the group: the traces of x and of each g x, read side by side."""

    def __init__(
        self,
        model: Callable[..., Any],
        steps: list[Callable[..., Any]],
        inputs: Any,
        symmetry: Symmetry,
        section: Section,
        layers: Mapping[str, Symmetry],
        tolerance: float | None,
    ) -> None:
        self.model, self.steps, self.symmetry, self.section = model, steps, symmetry, section
        self.inputs, self.layers = inputs, layers
        self.notes: list[str] = []
        self.prepared = [inputs]
        for step in steps:
            self.prepared.append(_prepare(step, self.prepared[-1]))
        self.moved = [[symmetry.move_inputs(g, inputs)] for g in section.elements]
        for run in self.moved:
            for step in steps:
                run.append(_prepare(step, run[-1]))
        state = torch.get_rng_state()
        self.plain = self._trace(self.prepared[-1])
        self.again = self._trace(self.prepared[-1])
        torch.set_rng_state(state)  # the same draws for g x: what is random is found by `again` alone
        self.runs = [self._trace(run[-1]) for run in self.moved]
        self.output = leaves(self.plain.output)
        if not self.output:
            raise RepresentationError("nothing was compared: expected at least one floating-point output tensor")
        dtype = next(iter(self.output.values())).dtype
        self.tolerance = allowed_error(dtype) if tolerance is None else tolerance
        self.carried: dict[Any, Known] = {}
        self.judged: dict[int, list[list[_Judged]]] = {}
        self.error = self._error_of_model()

    def _trace(self, inputs: Any) -> Trace:
        return trace(self.model, lambda: call(self.model, inputs))

    def _error_of_model(self) -> float:
        worst = 0.0
        for g, run in zip(self.section.elements, self.runs, strict=True):
            found, expected = leaves(run.output), leaves(self.symmetry.move_outputs(g, self.plain.output))
            for place, reference in self.output.items():
                error = relative_gap(found[place], expected[place], reference)
                worst = error if larger(error, worst) else worst
        return worst

    def findings(self) -> list[Finding]:
        """Judge every event; pipeline first, the model's own output last."""
        found = self._pipeline()
        self._note_ties()
        sequences = [[(e.stage, e.call.name) for e in run.events] for run in (self.plain, *self.runs)]
        if any(sequence != sequences[0] for sequence in sequences):
            self.notes.append(
                f"the model runs other modules for g x than for x (under {self.section.name}): inner modules were not "
                "compared"
            )
        elif self.plain.events:
            self._remember_what_consumers_state()
            for position, (stage, one) in enumerate(self.plain.events):
                moved = [run.events[position].call for run in self.runs]
                if stage == "enter":
                    found += self._enter(one, moved)
                else:
                    found.append(self._leave(one, moved, self.again.events[position].call, position))
        if isinstance(self.model, nn.Module) and self.plain.events:
            return found
        random = any(not torch.equal(a, b) for a, b in zip(self.output.values(), leaves(self.again.output).values()))
        status: Status = "random" if random else "ok" if self.error <= self.tolerance else "lost"
        name = getattr(self.model, "__name__", type(self.model).__name__)
        found.append(self._finding("", name, "outputs", "given", self.error, None, status, "in its own code"))
        return found

    def _finding(
        self,
        name: str,
        kind: str,
        action: str,
        source: str,
        error: float | None,
        own: float | None,
        status: Status,
        reason: str,
    ) -> Finding:
        return Finding(name, kind, self.section.name, action, source, error, own, status, reason)

    def _pipeline(self) -> list[Finding]:
        found = []
        previous = 0.0
        for i, step in enumerate(self.steps, start=1):
            worst = own = 0.0
            for g, run in zip(self.section.elements, self.moved, strict=True):
                expected = self.symmetry.move_inputs(g, self.prepared[i])
                worst = max(worst, _structure_gap(run[i], expected, self.prepared[i]))
                alone = _prepare(step, self.symmetry.move_inputs(g, self.prepared[i - 1]))
                own = max(own, _structure_gap(alone, expected, self.prepared[i]))
            status: Status = "ok" if worst <= self.tolerance else "lost" if own > self.tolerance else "inherited"
            name = getattr(step, "__name__", type(step).__name__)
            reason = "this step of the data pipeline does not commute with the group, whatever the network does"
            found.append(self._finding(name, "pipeline", "inputs", "given", worst, own, status, reason))
            previous = worst
        if self.steps and previous > self.tolerance:
            self.notes.append("what enters the network is not the moved data: repair the pipeline before its modules")
        return found

    def _note_ties(self) -> None:
        """Errors that vanish when the inputs are shaken come from equal distances, equal values, or a rounded index."""
        if self.error <= self.tolerance:
            return
        generator = torch.Generator().manual_seed(0)

        def shake(tensor: Tensor) -> Tensor:
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
            return tensor + 1e-2 * tensor.square().mean().sqrt() * noise

        start = replace_atoms(self.inputs, [shake(atom.tensor) for atom in atoms(self.inputs)])

        def run(value: Any) -> Any:
            for step in self.steps:
                value = _prepare(step, value)
            return call(self.model, value)

        plain = run(start)
        for g in self.section.elements:
            gap = _structure_gap(run(self.symmetry.move_inputs(g, start)), self.symmetry.move_outputs(g, plain), plain)
            if not gap <= self.tolerance:
                return
        self.notes.append(
            "the error vanishes when the inputs are shaken by 1 %: ties in them (equal distances among nearest "
            "neighbours, equal values in a sort or a maximum) are broken by rounding or by order"
        )

    def _remember_what_consumers_state(self) -> None:
        self.promised: dict[Any, Known] = {}
        for stage, one in self.plain.events:
            if stage == "enter":
                stated = _inner.stated(one.module, self.section)
                for taken, known in zip(one.taken, stated.arguments, strict=False):
                    if known is not None and len(taken) == 1:
                        self.promised.setdefault(taken[0].key, known)

    def _enter(self, one: Call, moved: list[Call]) -> list[Finding]:
        stated = _inner.stated(one.module, self.section).arguments
        given = self.layers.get(one.name)
        if not one.name:
            given = self.symmetry
        flat = _inner.from_symmetry(given, one.arguments, "inputs", self.section) if given is not None else []
        by_user = iter(flat or [None] * sum(map(len, one.taken)))
        found = []
        rows = []
        for i, taken in enumerate(one.taken):
            row = []
            for k, atom in enumerate(taken):
                images = [m.taken[i][k].tensor for m in moved]
                sure = next(by_user)
                if sure is None and i < len(stated) and len(taken) == 1:
                    sure = stated[i]
                judged = self._judge(atom, images, sure, near=[j.known for r in rows for j in r])
                row.append(judged)
                if sure is not None and judged.error is not None and not judged.error <= self.tolerance and one.name:
                    reason = f"lost before it, in the code that computes its input {i}; it states {sure.label}"
                    found.append(
                        self._finding(
                            f"input {i} of {one.name}",
                            type(one.module).__name__,
                            sure.label,
                            sure.source,
                            judged.error,
                            None,
                            "inherited" if atom.key in self.carried else "lost",
                            reason,
                        )
                    )
            rows.append(row)
        self.judged[id(one)] = rows
        return found

    def _leave(self, one: Call, moved: list[Call], again: Call, position: int) -> Finding:
        given = self.symmetry if not one.name else self.layers.get(one.name)
        by_user = (
            _inner.from_symmetry(given, one.output, "outputs", self.section)
            if given is not None
            else [None] * len(one.given)
        )
        stated = _inner.stated(one.module, self.section).output if len(one.given) == 1 else None
        inputs = [judged for row in self.judged[id(one)] for judged in row]
        near = [judged.known for judged in inputs]
        plain_torch = type(one.module).__module__.startswith("torch.nn.") and not any(one.module.children())
        judged = []
        for k, atom in enumerate(one.given):
            images = [m.given[k].tensor for m in moved]
            sure = by_user[k] or stated or self.promised.get(atom.key)
            kept = self._kept(one, atom) if plain_torch else None
            judged.append(self._judge(atom, images, sure, near=near, guess=kept))
        return self._conclude(one, moved, again, judged, inputs, plain_torch)

    def _kept(self, one: Call, atom: Atom) -> Known | None:
        """A plain torch layer that keeps the shape of its only input has to keep the action on it."""
        rows = self.judged[id(one)]
        if len(rows) == 1 and len(rows[0]) == 1 and one.taken[0][0].tensor.shape == atom.tensor.shape:
            known = rows[0][0].known
            return None if known is None else known._replace(source="kept")
        return None

    def _judge(
        self,
        atom: Atom,
        images: list[Tensor],
        sure: Known | None,
        *,
        near: list[Known | None],
        guess: Known | None = None,
    ) -> _Judged:
        """Find the action on a tensor: what is stated; else what it carried before; else the first that fits."""
        geometric = _inner.of_geometric(atom.kind, self.section)
        if sure is not None or geometric is not None:
            sure = sure or geometric
            assert sure is not None
            error = self._error(sure, atom, images)
            if error is not None and (error <= self.tolerance or sure.binding):
                self.carried[atom.key] = sure
                return _Judged(sure, error)
        before = self.carried.get(atom.key)
        tried = [before, guess, _inner.INVARIANT, *near, *_inner.guesses(atom.tensor, self.section, self.symmetry)]
        if sure is not None:
            tried = [sure, *_inner.permuted(sure, atom.tensor, self.section), *tried]
        for known in tried:
            if known is not None:
                error = self._error(known, atom, images)
                if error is not None and error <= self.tolerance:
                    self.carried[atom.key] = known
                    return _Judged(known, error)
        fallback = guess or before
        if fallback is not None and (error := self._error(fallback, atom, images)) is not None:
            return _Judged(fallback, error)
        return _Judged(None, None)

    def _error(self, known: Known, atom: Atom, images: list[Tensor]) -> float | None:
        worst = 0.0
        for g, image in zip(self.section.elements, images, strict=True):
            expected = known.move(g, atom.tensor)
            if expected is None or expected.shape != image.shape:
                return None
            error = relative_gap(image, expected, atom.tensor)
            worst = error if larger(error, worst) else worst
        return worst

    def _conclude(
        self,
        one: Call,
        moved: list[Call],
        again: Call,
        judged: list[_Judged],
        inputs: list[_Judged],
        plain_torch: bool,
    ) -> Finding:
        errors = [j.error for j in judged]
        error = None if not errors or any(e is None for e in errors) else _largest([e for e in errors if e is not None])
        own = self._own_error(one, [j.known for j in judged], inputs)
        random = any(not torch.equal(a.tensor, b.tensor) for a, b in zip(one.given, again.given, strict=True))
        sound = all(j.error is not None and j.error <= self.tolerance for j in inputs)
        status: Status
        if random and all(
            torch.equal(a.tensor, b.tensor)
            for row, other in zip(one.taken, again.taken, strict=True)
            for a, b in zip(row, other, strict=True)
        ):
            status = "random"
        elif error is None:
            status = "lost" if plain_torch and sound and not self._linear(one, moved) else "unknown"
        elif error <= self.tolerance:
            status = "ok"
        else:
            status = "inherited" if own is not None and own <= self.tolerance else "lost"
        action = ", ".join(j.known.label if j.known else "?" for j in judged) or "no tensor"
        source = next((j.known.source for j in judged if j.known is not None), "")
        reason = "" if status in ("ok", "inherited") else self._reason(one, status, judged, inputs)
        return self._finding(one.name, type(one.module).__name__, action, source, error, own, status, reason)

    def _own_error(
        self, one: Call, outputs: list[Known | None], inputs: list[_Judged], module: nn.Module | None = None
    ) -> float | None:
        """Run a module alone on moved inputs."""
        if any(known is None for known in outputs) or any(judged.known is None for judged in inputs):
            return None
        if not one.name and module is None:
            return None  # the model's own error stands in the column beside it
        plain = one.given if module is None else atoms(module(*one.arguments, **one.keywords))
        tensors = [atom.tensor for row in one.taken for atom in row]
        worst = 0.0
        for g in self.section.elements:
            moved = [j.known.move(g, t) if j.known else None for j, t in zip(inputs, tensors, strict=True)]
            if any(m is None for m in moved):
                return None
            arguments = replace_atoms(one.arguments, [m for m in moved if m is not None])
            found = atoms((module or one.module)(*arguments, **one.keywords))
            for image, atom, known in zip(found, plain, outputs, strict=True):
                expected = known.move(g, atom.tensor) if known else None
                if expected is None or expected.shape != image.tensor.shape:
                    return None
                error = relative_gap(image.tensor, expected, atom.tensor)
                worst = error if larger(error, worst) else worst
        return worst

    def _linear(self, one: Call, moved: list[Call]) -> bool:
        """Whether some linear map of the last axis takes f(x) to f(g x): a representation that nobody stated."""
        if len(one.given) != 1 or not one.given[0].tensor.ndim:
            return False
        rows = one.given[0].tensor.double().flatten(0, -2) if one.given[0].tensor.ndim > 1 else None
        if rows is None or len(rows) < 2 * rows.shape[-1] or isinstance(one.module, nn.Linear):
            return False
        for call_ in moved:
            image = call_.given[0].tensor.double().flatten(0, -2)
            fitted = rows @ torch.linalg.lstsq(rows, image).solution
            if not relative_gap(fitted, image, image) <= self.tolerance:
                return False
        return True

    def _reason(self, one: Call, status: Status, judged: list[_Judged], inputs: list[_Judged]) -> str:
        if status == "random":
            dropout = isinstance(one.module, nn.modules.dropout._DropoutNd)
            return (
                "dropout is on" if dropout else "two calls with the same input differ"
            ) + ": call model.eval() first"
        if status == "unknown":
            return "no known action fits its output: state it by layers={name: ce.Symmetry(group, inputs, outputs)}"

        def without_bias() -> float | None:
            bias = one.module.bias
            if not isinstance(bias, nn.Parameter):
                return None
            kept = bias.detach().clone()
            with torch.no_grad():
                bias.zero_()
                try:
                    return self._own_error(one, [j.known for j in judged], inputs, one.module)
                finally:
                    bias.copy_(kept)

        if isinstance(getattr(one.module, "bias", None), nn.Parameter):
            rest = without_bias()
            if rest is not None and rest <= self.tolerance:
                return "its bias is added to features that are not invariant"
        entering = ", ".join(j.known.label for j in inputs if j.known is not None and j.known is not _inner.INVARIANT)
        return _inner.culprit(one.module, [atom.tensor for row in one.taken for atom in row], entering)


def _culprit(findings: list[Finding]) -> Finding | None:
    """The first that lost it and is not inside a module whose output is sound; else the first unknown; else the end."""

    def excused(finding: Finding) -> bool:
        return any(
            other.status == "ok" and other.group == finding.group and finding.name.startswith(other.name + ".")
            for other in findings
            if other.name
        )

    def own_fault(finding: Finding) -> bool:
        return finding.status in ("lost", "random") and not excused(finding)

    first = next((f for f in findings if own_fault(f)), None)
    suspects = [f for f in findings if f.status == "unknown" and not excused(f)]
    if first is None or (first.name == "" and suspects):
        return suspects[0] if suspects else next((f for f in reversed(findings) if f.status == "inherited"), None)
    return first


def _prepare(step: Callable[..., Any], value: Any) -> Any:
    return call(step, value)


def _structure_gap(found: Any, expected: Any, reference: Any) -> float:
    a, b, c = leaves(found), leaves(expected), leaves(reference)
    return _largest([relative_gap(a[place], b[place], c[place]) for place in c])


def _largest(errors: list[float]) -> float:
    worst = 0.0
    for error in errors:
        worst = error if larger(error, worst) else worst
    return worst


def _number(value: float | None) -> str:
    return "" if value is None else "nan" if math.isnan(value) else f"{value:.1e}"
