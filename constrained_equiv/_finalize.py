"""Finish: check the terms against their levels, fold or drop them, recalibrate, measure, report.

What enters: a relaxed model, its optimizer and a few batches. What leaves: the same model without terms, of the classes
and keys it had before `relax`, and a `Report`.
Law: nothing is changed unless every term passes the check (or `on_violation` says otherwise) and everything that can
fail has run; the loss is measured.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from constrained_equiv import constraints
from constrained_equiv._certificate import Certificate, certify
from constrained_equiv._optim import Attached, ConstrainedOptimizer
from constrained_equiv._relax import Relaxation, refresh, relaxations, remove, switched_off
from constrained_equiv._stacks import Terms
from constrained_equiv._symmetry import Symmetry
from constrained_equiv._table import table
from constrained_equiv._verify import equivariance_error, is_geometric, map_tensors
from constrained_equiv.errors import ConstrainedEquivError, RelaxationError, ViolationError
from constrained_equiv.groups import Group
from constrained_equiv.schedules import final_value


@dataclass(frozen=True)
class LayerReport:
    """What happened to one layer's term.

    Attributes:
        name: of the layer.
        value: the term's measure when it was checked.
        allowed: the largest value that passed, level + atol.
        measure: name of the measure.
        folded: Frobenius norm of the equivariant part written into the layer's own weights.
        unfolded: Frobenius norm of the equivariant part that they cannot hold, which was dropped.
        removed: Frobenius norm of what was dropped: all of the term, or with `fold` its non-equivariant part.
        output_change: relative change of the layer's output on the first batch; None without batches.
        bound: of that change, B || h || / || f(h) || (see `Certificate`); None where it is not known.
        kept: whether the term is still there (`on_violation="keep"`).
        blocks: of a kept term, the blocks between irreps in which the data broke the symmetry: name and norm over
            sqrt(out features), those above `atol`, the largest first.
        generators: of a kept term, likewise the generators that it does not commute with, with its Lie measure at each.
    """

    name: str
    value: float
    allowed: float
    measure: str
    folded: float
    unfolded: float
    removed: float
    output_change: float | None
    bound: float | None
    kept: bool
    blocks: tuple[tuple[str, float], ...] = ()
    generators: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, repr=False)
class Report:
    """What `finalize` did; prints as a table.

    Attributes:
        layers: one entry per relaxed layer.
        output_change: relative change of the model's output on the first batch; None without batches.
        error_before: relative equivariance error of the relaxed model; None without a symmetry.
        error_after: the same of the finished model.
        certificate: upper bounds of what the terms did on the first batch, and of `error_before`; None without batches.
        recalibrated: number of normalisation layers whose statistics were gathered anew.
        notes: what could not be done, in words.
    """

    layers: tuple[LayerReport, ...]
    output_change: float | None
    error_before: float | None
    error_after: float | None
    certificate: Certificate | None
    recalibrated: int
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        header = "layer", "measure", "value", "allowed", "folded", "unfolded", "removed", "output change", "at most", ""
        rows = [
            (
                layer.name or "(model)",
                layer.measure,
                f"{layer.value:.3g}",
                f"{layer.allowed:.3g}",
                f"{layer.folded:.3g}",
                f"{layer.unfolded:.3g}",
                f"{layer.removed:.3g}",
                _optional(layer.output_change),
                "no bound" if layer.output_change is not None and layer.bound is None else _optional(layer.bound),
                "kept" if layer.kept else "",
            )
            for layer in self.layers
        ]
        lines = [
            *table(header, rows),
            f"output change of the model: {_optional(self.output_change)} (relative)",
            f"equivariance error {_optional(self.error_before)} before, {_optional(self.error_after)} after (relative)",
            *_words(self.certificate),
            f"normalisation layers recalibrated: {self.recalibrated}",
            *(f"symmetry broken in {layer.name or '(model)'}: {_listed(layer)}" for layer in self.layers if layer.kept),
            *self.notes,
        ]
        return "\n".join(lines)


def finalize(
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | Attached | None = None,
    batches: Iterable[Any] | None = None,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    symmetry: Symmetry | None = None,
    fold: bool = False,
    atol: float = 1e-3,
    lipschitz: Mapping[str, float] | None = None,
    on_violation: Literal["raise", "drop", "keep"] = "raise",
) -> Report:
    """Take the terms away and give back the equivariant model, in place.

    With `batches`, the statistics of all normalisation layers are gathered anew as by `ce.recalibrate`, those of frozen
    layers too: what enters them has changed. If anything fails, the model stays as it was.

    Args:
        model: a relaxed model (the bare module, not its DistributedDataParallel wrapper).
        optimizer: the optimizer; a `ConstrainedOptimizer`, or the handle of `ce.attach`, states the levels and is
            released, and the terms' parameters leave any optimizer's groups and state.
        batches: for the measured changes and their bounds, and for gathering the statistics of normalisation layers
            anew.
        forward: `forward(model, batch)` runs the model on one of `batches`; `model(batch)` by default.
        symmetry: of the model; the report then holds its equivariance error before and after, on the first batch.
        fold: write the equivariant part of free terms into the layers' own weights before the rest is dropped; a tensor
            product can hold it only where its second input has a scalar that is constant, which is read from `batches`.
        atol: how far above its level a term may be, in the measure's unit.
        lipschitz: Lipschitz constants of modules by name, for the bound of the equivariance error, where there is no
            known one: gates, tensor products, your own modules.
        on_violation: `raise` (default) changes nothing and raises; `drop` removes the terms all the same; `keep` leaves
            the terms above their level in place, so that the report names the layers, irrep blocks and generators in
            which the data broke the symmetry.

    Returns:
        The report.

    Raises:
        RelaxationError: if no layer is relaxed, `on_violation` is unknown, or `lipschitz` names an unknown module.
        ViolationError: with `on_violation="raise"`, if a term is above its level.
        ConstrainedEquivError: if `batches` is empty, or the model is not called with positional arguments.
    """
    if on_violation not in ("raise", "drop", "keep"):
        raise RelaxationError(f"on_violation={on_violation!r}: expected 'raise', 'drop' or 'keep'")
    found = relaxations(model)
    if not found:
        raise RelaxationError("the model has no relaxed layer: expected a model after ce.relax(model)")
    if unknown := sorted(set(lipschitz or ()) - {name for name, _ in model.named_modules()}):
        raise RelaxationError(f"lipschitz= names {unknown}, which the model has not: expected names of its modules")
    driver = optimizer if isinstance(optimizer, ConstrainedOptimizer | Attached) else None
    base = optimizer.optimizer if isinstance(optimizer, Attached) else optimizer
    checks: dict[int, _Check] = {}
    for term, check in _checks(found, driver, atol, fold):  # of several constraints on a term, the one least met
        checks[id(term)] = max(checks.get(id(term), check), check, key=lambda c: c.excess)
    above = [r for r in found if checks[id(r.term)].excess > 0]
    if above and on_violation == "raise":
        worst = sorted(above, key=lambda r: -checks[id(r.term)].excess)[:5]
        least_met = (checks[id(r.term)] for r in worst)
        lines = [
            f"  {c.name or '(model)'}: {c.value:.3g} > {c.allowed:.3g} ({c.measure})" for c in dict.fromkeys(least_met)
        ]
        raise ViolationError(
            f"{len(above)} of {len(found)} terms are above their level; nothing was removed:\n"
            + "\n".join(lines)
            + "\n"
            "train longer at level 0, or pass on_violation='drop' (remove them all the same) or 'keep'"
        )
    kept = [r for r in above if on_violation == "keep"]
    leaving = [r for r in found if r not in kept]

    run = forward or _call
    first, stream = (None, None) if batches is None else _begun(batches)
    notes: list[str] = []
    probe = None if stream is None else _Probe(model, [r.layer for r in found])
    if probe is not None:
        with _evaluation(model):
            probe.run(run, first)
    error_before = _model_error(model, symmetry, probe, notes)

    tied = _tied(model)
    statistics = _statistics_layers(model)
    changes: dict[int, float] = {}
    output_change = None
    with _restored_on_failure(statistics, leaving if fold else ()):
        folded = {id(r.term): _fold(r, probe, tied, notes) if fold else (0.0, 0.0) for r in leaving}
        removed = {id(r.term): _dropped_norm(r, fold) for r in leaving}
        certificate = _certificate(model, found, symmetry, probe, lipschitz, notes)
        with switched_off([r.layer for r in leaving]):
            if probe is not None:
                with _evaluation(model):
                    changes, output_change = probe.changes(run, first)
            if stream is not None:
                _recalibrate(model, statistics, stream, run)
            notes += _statistics_notes(model, statistics, gathered=stream is not None)
            error_after = _model_error(model, symmetry, probe, notes)
        layers = tuple(
            LayerReport(
                r.name,
                checks[id(r.term)].value,
                checks[id(r.term)].allowed,
                checks[id(r.term)].measure,
                *folded.get(id(r.term), (0.0, 0.0)),
                removed.get(id(r.term), 0.0),
                changes.get(id(r.layer)),
                None if certificate is None or probe is None else _bound(r, certificate, probe),
                r in kept,
                *(_broken(r, atol) if r in kept else ()),
            )
            for r in found
        )
    remove(model, [r.layer for r in leaving], base)  # nothing fails from here on
    if driver is not None and base is not None:
        _release(driver, base, leaving)
    return Report(
        layers,
        output_change,
        error_before,
        error_after,
        certificate,
        len(statistics) if stream is not None else 0,
        tuple(dict.fromkeys(notes)),
    )


def recalibrate(
    model: nn.Module, batches: Iterable[Any], *, forward: Callable[[nn.Module, Any], Any] | None = None
) -> int:
    """Gather the statistics of normalisation layers anew, as the mean over batches, the terms as they are switched now.

    Statistics gathered with the terms on say nothing about the model without them. To see that model during training,
    gather them on a copy: `with ce.disabled(twin): ce.recalibrate(twin, batches)` for `twin = copy.deepcopy(model)`.

    Args:
        model: relaxed or not; all other layers run in evaluation mode, and modes are restored. Terms relaxed with
            `evaluate_with_terms=False` are therefore off.
        batches: on which the model is run, once each.
        forward: `forward(model, batch)` runs the model on one of `batches`; `model(batch)` by default.

    Returns:
        The number of layers whose statistics were gathered, frozen ones too: those with a `momentum` and a buffer named
        `*running_var`. A layer that is called several times per batch averages over all calls.

    Raises:
        ConstrainedEquivError: if `batches` is empty. If this or the model fails, the statistics stay as they were.
    """
    layers = _statistics_layers(model)
    _, stream = _begun(batches)
    with _restored_on_failure(layers):
        _recalibrate(model, layers, stream, forward or _call)
    return len(layers)


def _call(model: nn.Module, batch: Any) -> Any:
    return model(batch)


def _begun(batches: Iterable[Any]) -> tuple[Any, Iterator[Any]]:
    """Draw the first batch; return it and the iterator over all, this one included."""
    stream = iter(batches)
    first = list(islice(stream, 1))
    if not first:
        raise ConstrainedEquivError("batches= is empty: expected at least one batch")
    return first[0], chain(first, stream)


@dataclass(frozen=True)
class _Check:
    name: str
    value: float
    allowed: float
    measure: str

    @property
    def excess(self) -> float:
        """How far the value is above what is allowed; a value that is not a number is infinitely far."""
        gap = self.value - self.allowed
        return math.inf if math.isnan(gap) else gap


def _checks(
    found: Iterable[Relaxation], driver: ConstrainedOptimizer | Attached | None, atol: float, fold: bool
) -> Iterator[tuple[Any, _Check]]:
    """Check every term by the constraints it was trained with, and by its norm against 0 where it had none."""
    stated, step = ((), 0) if driver is None else (driver.constraints, driver.finished_steps)
    covered = set()
    for record in stated:
        level = final_value(record.level, step)
        for entry, value in zip(record.entries, record.measure.values(record.terms).tolist(), strict=True):
            gap = abs(value - level) + level if record.type == "equality" else value
            check = _Check(entry.name, gap, level + atol, record.measure.name)
            for position in entry.terms:
                term = record.terms.modules[position]
                if not isinstance(record.measure.part, Group):  # a term that keeps a subgroup may break the group
                    covered.add(id(term))
                yield term, check
    bare = [r for r in found if id(r.term) not in covered]
    if bare:
        terms = Terms.of([(r.name, r.term) for r in bare])
        measure = constraints.weight_measure("non_equivariant" if fold else "whole")
        for term, name, value in zip(terms.modules, terms.names, measure.values(terms).tolist(), strict=True):
            yield term, _Check(name, value, atol, measure.name)


@torch.no_grad()
def _broken(relaxation: Relaxation, atol: float) -> Iterator[tuple[tuple[str, float], ...]]:
    """Where a term breaks the symmetry: its blocks, then the generators, each with the measure there."""
    terms = Terms.of([("", relaxation.term)])
    for measure in (constraints.weight_measure("non_equivariant", "block"), constraints.lie_measure("generator")):
        entries = terms.entries(measure.part, measure.per)
        values = measure.values(terms).tolist() if entries else []
        named = [(entry.name.strip("[]"), value) for entry, value in zip(entries, values, strict=True)]
        yield tuple(sorted((pair for pair in named if pair[1] > atol), key=lambda pair: -pair[1]))


@torch.no_grad()
def _fold(relaxation: Relaxation, probe: "_Probe | None", tied: set[int], notes: list[str]) -> tuple[float, float]:
    """Write P(scale * gate * W) into the layer's own weights; return the norms written and not written."""
    term, how, layer = relaxation.term, relaxation.adapter, relaxation.layer
    if term.complement:
        return 0.0, 0.0
    total = term.matrix().detach()
    equivariant = total - term.projection.complement_(total.clone())
    once = probe is not None and id(layer) in probe.calls and id(layer) not in probe.repeated
    arguments = probe.calls[id(layer)][0] if probe is not None and once else None
    shared = any(id(parameter) in tied for parameter in layer._parameters.values())
    written = torch.zeros_like(total) if how.fold is None or shared else how.fold(layer, equivariant, arguments)
    if (factor := term.factor()) != 0:
        term.weight.sub_(written / factor)  # so that the layer computes what it did before
    lost = float(torch.linalg.vector_norm(equivariant - written))
    if lost <= 1e-6 * max(float(torch.linalg.vector_norm(equivariant)), 1e-30):
        lost = 0.0  # rounding
    else:
        weights = "weights, which another layer shares" if shared else "own weights"
        notes.append(
            f"layer {relaxation.name!r} ({how.name}): an equivariant part of norm {lost:.3g} does not fit into its "
            f"{weights}; relax with complement=True for an exact finish"
        )
    return float(torch.linalg.vector_norm(written)), lost


def _tied(model: nn.Module) -> set[int]:
    """Parameters that several layers have."""
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return {parameter for parameter, count in owners.items() if count > 1}


@torch.no_grad()
def _release(driver: ConstrainedOptimizer | Attached, base: torch.optim.Optimizer, leaving: list[Relaxation]) -> None:
    """Let an optimizer forget its constraints, unless it still trains some of their terms."""
    trained = {id(p) for group in base.param_groups for p in group["params"]}
    if not any(id(term.weight) in trained for record in driver.constraints for term in record.terms.modules):
        driver.detach() if isinstance(driver, Attached) else driver.release()
    for r in leaving:
        r.term.weight.zero_()  # meets any bound from now on


@torch.no_grad()
def _dropped_norm(relaxation: Relaxation, fold: bool) -> float:
    total = relaxation.term.matrix().detach().clone()
    if fold:
        relaxation.term.projection.complement_(total)
    return float(torch.linalg.vector_norm(total))


class _Probe:
    """The inputs and outputs of the model and of its layers on one batch, before the terms go."""

    def __init__(self, model: nn.Module, layers: list[nn.Module]) -> None:
        self.model, self.layers = model, layers
        self.calls: dict[int, tuple[tuple[Any, ...], dict[str, Any], list[Tensor]]] = {}  # the first of each
        self.repeated: set[int] = set()
        self.output: list[Tensor] = []

    def run(self, run: Callable[[nn.Module, Any], Any], batch: Any) -> None:
        entered: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if id(module) not in entered:
                entered[id(module)] = _copied((args, kwargs))

        def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if id(module) in self.calls:
                self.repeated.add(id(module))
            else:
                self.calls[id(module)] = *entered[id(module)], _tensors_of(output)

        watched = {id(m): m for m in (self.model, *self.layers)}.values()
        handles = [m.register_forward_pre_hook(enter, with_kwargs=True) for m in watched]
        handles += [m.register_forward_hook(leave, with_kwargs=True) for m in watched]
        try:
            self.output = _tensors_of(run(self.model, _copied(batch)))
        finally:
            for handle in handles:
                handle.remove()

    def arguments(self, module: nn.Module) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a module was first called with, () and {} if it was not; copies, for it may be overwritten in place."""
        args, kwargs, _ = self.calls.get(id(module), ((), {}, []))
        copies: tuple[tuple[Any, ...], dict[str, Any]] = _copied((args, kwargs))
        return copies

    def changes(self, run: Callable[[nn.Module, Any], Any], batch: Any) -> tuple[dict[int, float], float]:
        per_layer = {}
        for layer in self.layers:
            if id(layer) in self.calls:
                args, kwargs = self.arguments(layer)
                before = self.calls[id(layer)][2]
                per_layer[id(layer)] = _relative_change(before, _tensors_of(layer(*args, **kwargs)))
        return per_layer, _relative_change(self.output, _tensors_of(run(self.model, _copied(batch))))


def _copied(value: Any) -> Any:
    """Copy the tensors of a structure, with whether they need gradients; the rest stays as it is."""
    return map_tensors(_copy_of, value)


@torch.enable_grad()
def _copy_of(tensor: Tensor) -> Tensor:
    """Copy a tensor; the copy of a computed one counts as computed, so that it too can be overwritten in place."""
    if tensor.is_leaf:
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)
    return tensor.detach().requires_grad_().clone()


def _model_error(model: nn.Module, symmetry: Symmetry | None, probe: _Probe | None, notes: list[str]) -> float | None:
    if symmetry is None:
        notes.append("equivariance of the model was not measured: pass symmetry=ce.Symmetry(group, inputs, outputs)")
        return None
    if probe is None or id(model) not in probe.calls:
        notes.append("equivariance of the model was not measured: pass batches= and a forward= that calls the model")
        return None
    args, kwargs = probe.arguments(model)
    if kwargs:
        raise ConstrainedEquivError(
            f"forward= calls the model with keywords {sorted(kwargs)}: expected positional inputs, which "
            "symmetry.inputs describes"
        )
    with _evaluation(model):
        return equivariance_error(model, args if len(args) > 1 else args[0], symmetry=symmetry)


def _certificate(
    model: nn.Module,
    found: Iterable[Relaxation],
    symmetry: Symmetry | None,
    probe: _Probe | None,
    lipschitz: Mapping[str, float] | None,
    notes: list[str],
) -> Certificate | None:
    """Bound what the terms do, on the probe's batch."""
    if probe is None:
        return None
    args, kwargs = probe.arguments(model)
    if kwargs or not args:
        notes.append("nothing was bounded: pass a forward= that calls the model, with positional inputs")
        return None
    terms = [(r.name, r.layer, r.term.matrix()) for r in found]
    with _evaluation(model):
        return certify(model, terms, args if len(args) > 1 else args[0], symmetry=symmetry, lipschitz=lipschitz)


def _bound(relaxation: Relaxation, certificate: Certificate, probe: _Probe) -> float | None:
    """The bound of the relative change of a layer's output, at its first call."""
    bound = next((b for b in certificate.bounds if b.name == relaxation.name), None)
    if bound is None or bound.truncation is None:
        return None
    size = math.hypot(*(float(torch.linalg.vector_norm(t)) for t in probe.calls[id(relaxation.layer)][2]))
    return bound.truncation / size if size else bound.truncation


def _words(certificate: Certificate | None) -> list[str]:
    if certificate is None or certificate.measured is None:
        return []
    if certificate.equivariance is None:
        missing = next(b for b in certificate.bounds if b.equivariance is None)
        return [f"no bound of the error before, for layer {missing.name!r}: {missing.reason}"]
    size = certificate.size or 1.0
    if not certificate.equivariance:
        return [f"all terms were exactly zero: the error before, {certificate.measured / size:.3g}, is rounding"]
    return [
        f"error before at most {certificate.equivariance / size:.3g}, an upper bound that is loose; measured "
        f"{certificate.measured / size:.3g} (relative; print(report.certificate) shows why)"
    ]


def _relative_change(before: list[Tensor], after: list[Tensor]) -> float:
    size = math.hypot(*(float(torch.linalg.vector_norm(t)) for t in before))
    gap = math.hypot(*(float(torch.linalg.vector_norm(a - b)) for a, b in zip(before, after, strict=True)))
    return gap / size if size else gap


def _tensors_of(value: Any) -> list[Tensor]:
    """Copy the tensors of a layer's output in float64: the next layer may overwrite it in place."""
    leaves = tree_flatten(value)[0]
    tensors = [leaf.tensor if is_geometric(leaf) else leaf for leaf in leaves]
    return [t.detach().to(torch.float64, copy=True) for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with the terms on, whatever `evaluate_with_terms` says, and modes restored afterwards."""
    found = [(r, r.term.evaluate_with_terms) for r in relaxations(model)]
    try:
        with _modes_restored(model):
            model.eval()
            for r, _ in found:
                r.term.evaluate_with_terms = True
                refresh(r.layer)
            yield
    finally:
        for r, value in found:
            r.term.evaluate_with_terms = value
            refresh(r.layer)


@contextmanager
def _restored_on_failure(statistics: Iterable[nn.Module], leaving: Iterable[Relaxation] = ()) -> Iterator[None]:
    """Give statistics, and the parameters that folding writes to, back as they were if anything fails."""
    places: list[dict[str, Any]] = [layer._buffers for layer in statistics]
    places += [place for r in leaving for place in (r.layer._parameters, r.term._parameters)]
    before = [(place, *item) for place in places for item in place.items() if item[1] is not None]
    values = [tensor.detach().clone() for _, _, tensor in before]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for (place, name, tensor), value in zip(before, values, strict=True):
                if not torch.equal(tensor, value):  # one that is expanded cannot be written, nor has it been
                    tensor.copy_(value)
                place[name] = tensor
        for r in leaving:
            refresh(r.layer)
        raise


@contextmanager
def _modes_restored(model: nn.Module) -> Iterator[None]:
    """Give every module its own training mode back, through `train`, with which layers drop filters they cached."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:  # parents come before their children
            if module.training != mode:
                module.train(mode)


def _statistics_layers(model: nn.Module) -> list[nn.Module]:
    """Layers that keep running statistics of their inputs (torch's, e3nn's and escnn's batch norms)."""
    return [
        m
        for m in model.modules()
        if hasattr(m, "momentum") and any(name.endswith("running_var") for name, _ in m.named_buffers(recurse=False))
    ]


def _statistics_notes(model: nn.Module, layers: list[nn.Module], *, gathered: bool) -> Iterator[str]:
    """Say which statistics were not gathered anew."""
    if layers and not gathered:
        yield (
            f"{len(layers)} normalisation layers keep statistics gathered with the terms on: pass batches= and forward="
        )
    for name, module in model.named_modules():
        numeric = isinstance(getattr(module, "momentum", None), int | float)
        buffers = [key for key, buffer in module.named_buffers(recurse=False) if buffer.is_floating_point()]
        if numeric and buffers and module not in layers:
            yield (
                f"layer {name!r} ({type(module).__name__}) has a momentum and buffers {buffers}, none of them named "
                "*running_var: if they are statistics, they were gathered with the terms on; gather them anew yourself"
            )


def _recalibrate(
    model: nn.Module, layers: list[nn.Module], batches: Iterable[Any], run: Callable[[nn.Module, Any], Any]
) -> None:
    """Replace running statistics by the mean over a layer's calls: momentum 1 / k at the k-th."""
    if not layers:
        return
    momenta = [layer.momentum for layer in layers]
    calls: Counter[int] = Counter()

    def enter(layer: Any, inputs: Any) -> None:
        calls[id(layer)] += 1
        layer.momentum = 1.0 / calls[id(layer)]

    handles = [layer.register_forward_pre_hook(enter) for layer in layers]
    try:
        with _modes_restored(model):
            model.eval()
            for layer in layers:
                layer.train()
            for count, batch in enumerate(batches, start=1):
                for layer in layers:  # holds where a call goes past the hook: of `forward` itself, or compiled before
                    layer.momentum = 1.0 / count  # type: ignore[assignment]
                run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def _listed(layer: LayerReport) -> str:
    """The largest blocks and generators, in words."""
    parts = [f"{name} {value:.3g}" for found in (layer.blocks, layer.generators) for name, value in found[:5]]
    return ", ".join(parts) or "nowhere above atol"


def _optional(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.3g}"
