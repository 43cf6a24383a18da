"""Findings: one network, one factor of the group, every module judged in order of execution.

What enters: a network, its pipeline, inputs, and the elements to try. What leaves: a `Finding` per module, for the
audit.
Law: a module is blamed only for what it adds: its own error is measured on moved inputs, apart from what it inherits.

The action on an inner tensor is taken from what layers state (e3nn irreps, escnn field types, relaxed terms) or the
user gives; otherwise the actions known nearby are tried, and one that fits is the answer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from constrained_equiv import _inner
from constrained_equiv._inner import Known, Section
from constrained_equiv._symmetry import Symmetry
from constrained_equiv._trace import Atom, Call, Trace, atoms, replace_atoms, trace
from constrained_equiv._verify import allowed_error, call, larger, leaves, relative_gap
from constrained_equiv.errors import RepresentationError

Status = Literal["ok", "lost", "inherited", "unknown", "random"]

SOME_LINEAR = "some linear action"
"""Label of outputs that g moves by a linear map, though nobody stated which; they are no suspects."""


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


class _Judged(NamedTuple):
    """An atom with the action that it carries, if any, and the error under it."""

    known: Known | None
    error: float | None


class Inspection:
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
        self.closed: set[str] = set()  # sound modules that state their representations: their parts do not matter
        self.troubled = False
        self.made: set[Any] = set()  # outputs of modules so far
        self.noise = _structure_gap(self.again.output, self.plain.output, self.plain.output)
        self.error = self._error_of_model()

    def _trace(self, inputs: Any) -> Trace:
        return trace(self.model, lambda: call(self.model, inputs))

    def _error_of_model(self) -> float:
        errors = [
            _structure_gap(run.output, self.symmetry.move_outputs(g, self.plain.output), self.plain.output)
            for g, run in zip(self.section.elements, self.runs, strict=True)
        ]
        return _largest([self.noise, *errors])

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
            self._remember_promises()
            for position, (stage, one) in enumerate(self.plain.events):
                moved = [run.events[position].call for run in self.runs]
                if stage == "enter":
                    found += self._enter(one, moved)
                else:
                    found.append(self._leave(one, moved, self.again.events[position].call))
            closed = tuple(f"{name}." for name in self.closed)
            return [f for f in found if not f.name.startswith(closed)]
        status: Status = "random" if self.noise else "ok" if self.error <= self.tolerance else "lost"
        name = getattr(self.model, "__name__", type(self.model).__name__)
        reason = "two calls with the same input differ" if self.noise else "in its own code"
        return [*found, Finding("", name, self.section.name, "outputs", "given", self.error, None, status, reason)]

    def _pipeline(self) -> list[Finding]:
        found = []
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
            found.append(Finding(name, "pipeline", self.section.name, "inputs", "given", worst, own, status, reason))
        if any(finding.status == "lost" for finding in found):
            self.troubled = True
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

    def _remember_promises(self) -> None:
        """A tensor also carries what its consumer states of it, or the container that hands it on."""
        self.promised: dict[Any, Known] = {}
        for stage, one in self.plain.events:
            stated = _inner.stated(one.module, self.section)
            if stage == "enter":
                taken = [
                    (row[0], known) for row, known in zip(one.taken, stated.arguments, strict=False) if len(row) == 1
                ]
            else:
                taken = list(zip(one.given, self._given_outputs(one), strict=True))
                if len(one.given) == 1:
                    taken.append((one.given[0], stated.output))
            for atom, known in taken:
                if known is not None:
                    self.promised.setdefault(atom.key, known)

    def _given_outputs(self, one: Call) -> list[Known | None]:
        given = self.layers.get(one.name) if one.name else self.symmetry
        if given is None:
            return [None] * len(one.given)
        return _inner.from_symmetry(given, one.output, "outputs", self.section)

    def _enter(self, one: Call, moved: list[Call]) -> list[Finding]:
        """Judge what a module takes; a failing tensor that no module made was spoilt by the code in between."""
        stated = _inner.stated(one.module, self.section).arguments
        given = self.layers.get(one.name) if one.name else self.symmetry
        flat = _inner.from_symmetry(given, one.arguments, "inputs", self.section) if given is not None else []
        by_user = iter(flat or [None] * sum(map(len, one.taken)))
        found: list[Finding] = []
        rows: list[list[_Judged]] = []
        for i, taken in enumerate(one.taken):
            rows.append([])
            for k, atom in enumerate(taken):
                sure = next(by_user)
                if sure is None and i < len(stated) and len(taken) == 1:
                    sure = stated[i]
                images = [m.taken[i][k].tensor for m in moved]
                judged = self._judge(atom, images, sure, near=[j.known for row in rows for j in row])
                rows[-1].append(judged)
                if judged.known is None and atom.key not in self.made and not self._linear(atom, images):
                    found += self._spoilt(one, i, "?", "", None, "unknown", "no known action fits what it takes")
                failed = judged.error is not None and not judged.error <= self.tolerance
                if sure is not None and sure.binding and failed and one.name:
                    words = f"it takes it as {sure.label}"
                    found += self._spoilt(one, i, sure.label, sure.source, judged.error, "lost", words)
        self.judged[id(one)] = rows
        return found

    def _spoilt(
        self, one: Call, i: int, action: str, source: str, error: float | None, status: Status, words: str
    ) -> list[Finding]:
        """Blame the code between modules, unless something was found before."""
        if self.troubled:
            return []
        self.troubled = True
        name, reason = f"input {i} of {one.name}", f"in the code that makes input {i} of {one.name!r}: {words}"
        kind = type(one.module).__name__
        return [Finding(name, kind, self.section.name, action, source, error, None, status, reason)]

    def _leave(self, one: Call, moved: list[Call], again: Call) -> Finding:
        by_user = self._given_outputs(one)
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
            self.made.add(atom.key)
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
        some_linear = error is None and len(one.given) == 1 and not isinstance(one.module, nn.Linear)
        some_linear = some_linear and self._linear(one.given[0], [m.given[0].tensor for m in moved])
        status: Status
        if random and all(
            torch.equal(a.tensor, b.tensor)
            for row, other in zip(one.taken, again.taken, strict=True)
            for a, b in zip(row, other, strict=True)
        ):
            status = "random"
        elif error is None:
            status = "lost" if plain_torch and sound and not some_linear else "unknown"
        elif error <= self.tolerance:
            status = "ok"
        else:
            status = "inherited" if own is not None and own <= self.tolerance else "lost"
        action = ", ".join(j.known.label if j.known else "?" for j in judged) or "no tensor"
        if some_linear:
            action = SOME_LINEAR
        source = next((j.known.source for j in judged if j.known is not None), "")
        reason = "" if status in ("ok", "inherited") else self._reason(one, status, judged, inputs)
        if status in ("ok", "inherited") and one.name and _inner.stated(one.module, self.section).output is not None:
            self.closed.add(one.name)
        self.troubled |= status in ("lost", "random") or (status == "unknown" and not some_linear)
        kind = type(one.module).__name__
        return Finding(one.name, kind, self.section.name, action, source, error, own, status, reason)

    def _own_error(
        self, one: Call, outputs: list[Known | None], inputs: list[_Judged], module: nn.Module | None = None
    ) -> float | None:
        """Run a module alone on moved inputs."""
        if any(known is None for known in outputs) or any(judged.known is None for judged in inputs):
            return None
        if not one.name and module is None:
            return None  # the model's own error stands in the column beside it
        copied = replace_atoms(one.arguments, [atom.tensor.clone() for row in one.taken for atom in row])
        plain = one.given if module is None else atoms(module(*copied, **one.keywords))
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

    def _linear(self, atom: Atom, images: list[Tensor]) -> bool:
        """Whether some linear map of the last axis takes f(x) to f(g x): a representation that nobody stated."""
        if atom.tensor.ndim < 2:
            return False
        rows = atom.tensor.double().flatten(0, -2)
        if len(rows) < 2 * rows.shape[-1]:
            return False
        for image in (image.double().flatten(0, -2) for image in images):
            fitted = rows @ torch.linalg.lstsq(rows, image).solution
            if not relative_gap(fitted, image, image) <= self.tolerance:
                return False
        return True

    def _reason(self, one: Call, status: Status, judged: list[_Judged], inputs: list[_Judged]) -> str:
        if status == "random":
            dropout = isinstance(one.module, nn.modules.dropout._DropoutNd)
            return ("dropout is on" if dropout else "two calls with equal inputs differ") + ": call model.eval() first"
        kept = [j.known for j in judged]
        if status == "unknown" and len(inputs) == len(one.given) == 1:
            kept = [inputs[0].known]  # the likeliest
        if isinstance(getattr(one.module, "bias", None), nn.Parameter):
            rest = self._error_without_bias(one, kept, inputs)
            if rest is not None and rest <= self.tolerance:
                return "its bias is added to features that are not invariant"
        entering = ", ".join(j.known.label for j in inputs if j.known is not None and j.known is not _inner.INVARIANT)
        words = _inner.culprit(one.module, [atom.tensor for row in one.taken for atom in row], entering)
        if status == "unknown":
            words += "; no known action fits its output, state it by layers={name: ce.Symmetry(group, inputs, outputs)}"
        return words

    def _error_without_bias(self, one: Call, outputs: list[Known | None], inputs: list[_Judged]) -> float | None:
        bias = one.module.bias
        assert isinstance(bias, nn.Parameter)
        kept = bias.detach().clone()
        with torch.no_grad():
            bias.zero_()
            try:
                return self._own_error(one, outputs, inputs, one.module)
            finally:
                bias.copy_(kept)


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
