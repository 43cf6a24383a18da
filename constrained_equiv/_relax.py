"""Relaxation: attach a non-equivariant term to chosen layers, switch it off, list it, take it away.

What enters: a model. What leaves: the same model, whose chosen layers are of a subclass made on the fly and hold one
child module `non_equivariant`.
Law: `isinstance`, base `state_dict` keys, parameters and inactive outputs stay bit for bit; removal restores the class.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from constrained_equiv import adapters
from constrained_equiv._table import table
from constrained_equiv._terms import CHILD, Init, NonEquivariantTerm
from constrained_equiv.adapters import Adapter, Site
from constrained_equiv.errors import RelaxationError, SerializationError

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class Relaxation:
    """One relaxed layer, as `relaxations` lists it.

    Attributes:
        name: of the layer in the model.
        layer: the relaxed layer.
        term: its child module.
        adapter: how it was relaxed.
        site: representations and shape of the term.
    """

    name: str
    layer: nn.Module
    term: NonEquivariantTerm
    adapter: Adapter
    site: Site


class Relaxations(tuple[Relaxation, ...]):
    """The relaxed layers of a model, in the model's order; prints as a table."""

    def __repr__(self) -> str:
        header = ("layer", "class", "term", "inputs -> outputs", "parameters", "equivariant maps")
        rows = [
            (
                r.name or "(model)",
                _unrelaxed(type(r.layer)).__name__,
                r.term.extra_repr(),
                f"{r.site.inputs} -> {r.site.outputs}",
                f"{r.term.weight.numel():,}",
                f"{r.site.projection.rank:,}",
            )
            for r in self
        ]
        return "\n".join(table(header, rows))


def relax(
    model: Module,
    *,
    where: Callable[[str, nn.Module], bool] | None = None,
    adapter: Adapter | None = None,
    complement: bool = True,
    gate: bool = False,
    init: Init = 0.0,
    evaluate_with_terms: bool = True,
    generator: torch.Generator | None = None,
) -> Module:
    """Give chosen layers an extra non-equivariant term, in place: f(x) = E(x) + scale * gate * W x.

    Args:
        model: an equivariant network, built and, if wanted, loaded; relax before building the optimizer and before
            wrapping in DistributedDataParallel.
        where: `where(name, layer)` chooses layers; by default every layer with a built-in adapter: e3nn's `Linear` and
            weighted tensor products, escnn's `Linear` and convolutions.
        adapter: how to relax the layers that `where` chooses, for example `ce.adapters.linear(...)`; by default the
            built-in one of each.
        complement: keep W orthogonal to the equivariant maps, so that its norm is the layer's distance from
            equivariance. False gives the published free form.
        gate: multiply W by a learnable scalar, initially 1.
        init: standard deviation of W's entries, or a function such as `torch.nn.init.kaiming_uniform_`; the default 0
            starts training at the equivariant model.
        evaluate_with_terms: whether `model.eval()` keeps the terms on.
        generator: source of randomness of `init`.

    Returns:
        The same model. `print(ce.relaxations(model))` shows what was matched.

    Raises:
        RelaxationError: if no layer was matched, a layer is relaxed already, or a term cannot be attached; the model is
            then unchanged.
    """
    if adapter is not None and where is None:
        raise RelaxationError(
            "relax got adapter= without where=: expected where=lambda name, layer: ... to choose its layers"
        )
    if not callable(init) and not (isinstance(init, int | float) and init >= 0):
        raise RelaxationError(
            f"init={init!r}: expected a standard deviation >= 0 or a function such as torch.nn.init.kaiming_uniform_"
        )
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        raise RelaxationError(
            "the model is wrapped in DistributedDataParallel, which would not synchronise the terms: expected the bare "
            "module; call ce.relax(model) first and wrap the result"
        )
    chosen: list[tuple[nn.Module, Any, NonEquivariantTerm]] = []
    bypassed = _bypassed(model)
    matched = 0
    for name, layer in _candidates(model):
        if where is not None and not where(name, layer):
            continue
        how = adapter or adapters.find(layer)
        if how is None:
            if where is None:
                continue
            raise RelaxationError(
                f"layer {name!r} of class {type(layer).__name__} has no built-in adapter: state its representations by "
                "adapter=ce.adapters.linear(inputs, outputs), or choose fewer layers in where="
            )
        _check_attachable(name, layer)
        if id(layer) in bypassed:
            raise RelaxationError(
                f"layer {name!r} is inside nn.TransformerEncoderLayer, which in evaluation reads its weight without "
                "calling it: call torch.backends.mha.set_fastpath_enabled(False) first, or leave it out in where="
            )
        site = how.site(layer)
        matched += 1
        if complement and site.projection.rank == math.prod(site.shape):
            continue
        term = NonEquivariantTerm(
            site.projection,
            site.shape,
            rows=site.rows,
            complement=complement,
            gated=gate,
            evaluate_with_terms=evaluate_with_terms,
            like=site.like,
            plan=site.plan,
        )
        term.initialise(init, generator)
        term.requires_grad_(_trainable(layer))
        term.train(layer.training)
        base: Any = type(layer)
        chosen.append((layer, _relaxed_class(base, how), term))
    if not chosen:
        raise RelaxationError(_nothing_matched(model, matched))
    for layer, relaxed, term in chosen:  # nothing was changed so far, and nothing fails from here on
        layer.add_module(CHILD, term)
        layer.__class__ = relaxed
        refresh(layer)
    model.register_load_state_dict_pre_hook(_check_state_dict)  # type: ignore[no-untyped-call]
    return model


def relaxations(model: nn.Module) -> Relaxations:
    """List the relaxed layers of a model."""
    found = []
    for name, layer in model.named_modules():
        if is_relaxed(layer):
            how = adapter_of(layer)
            found.append(Relaxation(name, layer, term_of(layer), how, how.site(layer)))
    return Relaxations(found)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Switch all terms off within a `with` block: the layers run their own forward, bit for bit.

    Running statistics of normalisation layers, gathered with the terms on, say nothing about the model without them:
    there, gather them anew by `ce.recalibrate` on a copy of the model.

    Args:
        model: a relaxed model; a plain one is left alone.
    """
    with switched_off([layer for layer in model.modules() if is_relaxed(layer)]):
        yield


@contextmanager
def switched_off(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Switch the terms of some relaxed layers off within a `with` block."""
    before = [term_of(layer).enabled for layer in layers]
    _enable(layers, [False] * len(layers))
    try:
        yield
    finally:
        _enable(layers, before)


def parameter_groups(
    model: nn.Module, *, lr: float, term_lr: float | None = None, term_weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Split a relaxed model's parameters for an optimizer: the model's own, and the terms' without weight decay.

    Args:
        model: a relaxed model.
        lr: learning rate of the model's own parameters.
        term_lr: learning rate of the terms; a tenth of `lr` by default. At the model's own rate terms run up to their
            level at once, which did harm on most of the tasks that were measured.
        term_weight_decay: decay of the terms; 0 by default, for the constraint is what shrinks them.

    Returns:
        Two parameter groups for any `torch.optim` optimizer that takes weight_decay.
    """
    terms = [p for layer in model.modules() if is_relaxed(layer) for p in term_of(layer).parameters()]
    if not terms:
        raise RelaxationError(
            "the model has no relaxed layer: call ce.relax(model) before ce.parameter_groups(model, ...)"
        )
    ours = {id(p) for p in terms}
    own = [p for p in model.parameters() if id(p) not in ours]
    term_lr = lr / 10 if term_lr is None else term_lr
    return [
        {"params": own, "lr": lr},
        {"params": terms, "lr": term_lr, "weight_decay": term_weight_decay, "terms": True},
    ]


def remove(model: nn.Module, layers: Iterable[nn.Module], optimizer: torch.optim.Optimizer | None = None) -> None:
    """Take the terms of some layers away: restore class and keys, and forget their parameters in an optimizer."""
    gone = set()
    for layer in layers:
        gone |= {id(p) for p in term_of(layer).parameters()}
        how = adapter_of(layer)
        layer.__class__ = _unrelaxed(type(layer))
        delattr(layer, CHILD)
        if how.refresh is not None:
            how.refresh(layer)
    if not relaxations(model):
        for hooks in (m._load_state_dict_pre_hooks for m in model.modules()):
            for key in [key for key, hook in hooks.items() if getattr(hook, "hook", None) is _check_state_dict]:
                del hooks[key]
    if optimizer is not None:
        for group in optimizer.param_groups:
            for parameter in [p for p in group["params"] if id(p) in gone]:
                optimizer.state.pop(parameter, None)
            group["params"] = [p for p in group["params"] if id(p) not in gone]


def is_relaxed(layer: nn.Module) -> bool:
    """Whether this very module, not a child, carries a term."""
    return hasattr(type(layer), "_relaxed_from")


def term_of(layer: nn.Module) -> NonEquivariantTerm:
    """Return the term of a relaxed layer."""
    term = getattr(layer, CHILD)
    assert isinstance(term, NonEquivariantTerm)
    return term


def _unrelaxed(kind: Any) -> Any:
    """Return a relaxed class as it was before, with what was put on top since, such as torch's parametrizations."""
    if "_relaxed_from" in vars(kind):
        return kind._relaxed_from[0]
    if not hasattr(kind, "_relaxed_from"):
        return kind
    members = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind.__name__.replace("Relaxed", "", 1), tuple(map(_unrelaxed, kind.__bases__)), members)


def adapter_of(layer: nn.Module) -> Adapter:
    """Return the adapter that a layer was relaxed with."""
    how: Adapter = type(layer)._relaxed_from[1]  # type: ignore[attr-defined]
    return how


@cache
def _relaxed_class(base: Any, how: Adapter) -> Any:
    """The subclass of a layer's class whose forward pass adds the term; one per class and adapter."""

    def refuse(self: nn.Module, protocol: Any) -> Any:
        raise SerializationError(
            f"{type(self).__name__} cannot be pickled while relaxed: save model.state_dict(), or finish with "
            "ce.finalize(model)"
        )

    def deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        if hasattr(base, "__deepcopy__"):
            return cast(nn.Module, base.__deepcopy__(self, memo))
        make, arguments, state = base.__reduce_ex__(self, 4)[:3]
        replica = make(*arguments)
        memo[id(self)] = replica
        replica.__setstate__(copy.deepcopy(state, memo))
        return cast(nn.Module, replica)

    members = how.methods(base) | {"__reduce_ex__": refuse, "__deepcopy__": deepcopy}
    return type(
        f"Relaxed{base.__name__}", (base,), {**members, "_relaxed_from": (base, how), "__module__": base.__module__}
    )


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    inside = {id(m) for layer in model.modules() if is_relaxed(layer) for m in term_of(layer).modules()}
    return ((name, layer) for name, layer in model.named_modules() if id(layer) not in inside)


def _bypassed(model: nn.Module) -> set[int]:
    """Layers that torch's fast path of transformers goes around."""
    if not torch.backends.mha.get_fastpath_enabled():
        return set()
    encoders = (m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer))
    return {id(layer) for encoder in encoders for layer in (encoder.linear1, encoder.linear2)}


def _check_attachable(name: str, layer: nn.Module) -> None:
    if is_relaxed(layer):
        raise RelaxationError(
            f"layer {name!r} is relaxed already: call ce.finalize(model) first, or leave it out in where="
        )
    if hasattr(layer, CHILD):
        raise RelaxationError(
            f"layer {name!r} has an attribute {CHILD!r} of its own: expected none, for the term takes that name; "
            "rename it, or leave the layer out in where="
        )
    if isinstance(layer, nn.Sequential | nn.ModuleList | nn.ModuleDict):
        raise RelaxationError(
            f"layer {name!r} is a {type(layer).__name__}, which runs through its children, and the term would be one "
            "of them: expected a layer; relax its layers, or wrap it in a module of its own whose forward calls it"
        )
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise RelaxationError(
            f"layer {name!r} is the output map of nn.MultiheadAttention, which reads its weight and never calls it: "
            "leave it out in where="
        )
    if isinstance(layer, torch.jit.ScriptModule):
        raise RelaxationError(
            f"layer {name!r} is a TorchScript module: expected a Python module; relax the model before scripting it"
        )
    if "forward" in vars(layer):
        raise RelaxationError(
            f"layer {name!r} has a forward of its own, set on the instance, which would go around the term: expected "
            "the forward of its class; call ce.relax(model) first and wrap the forward afterwards"
        )
    if any(isinstance(p, UninitializedParameter) for p in layer.parameters()):
        raise RelaxationError(f"layer {name!r} is lazily built: run one batch through the model before ce.relax(model)")
    if any(p.is_meta for p in layer.parameters()):
        raise RelaxationError(
            f"layer {name!r} is on the meta device, its weights have no values: expected a built layer; call "
            "model.to_empty(device=...) and load or reset its weights before ce.relax(model)"
        )


def _check_state_dict(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Refuse a checkpoint of a differently relaxed model before anything of it was loaded."""
    for name, layer in model.named_modules(prefix=prefix.rstrip(".")):
        if is_relaxed(layer):
            term_of(layer).check_state_dict(state_dict, f"{name}.{CHILD}.".lstrip("."))


def _trainable(layer: nn.Module) -> bool:
    """Whether the term of a layer learns: not where the layer's own weights are frozen."""
    own = [p.requires_grad for p in layer.parameters()]
    return any(own) or not own


def _nothing_matched(model: nn.Module, matched: int) -> str:
    if matched:
        return (
            f"{matched} layers were matched, but every linear map of their representations is equivariant already: "
            "nothing to relax; expected at least one layer with non-scalar features"
        )
    kinds = sorted({_kind(m) for m in model.modules() if next(m.parameters(recurse=False), None) is not None})
    return (
        f"no layer was matched; layers with weights here: {', '.join(kinds) or 'none'}; expected e3nn or escnn layers, "
        "or state representations: "
        "ce.relax(model, where=lambda name, layer: ..., adapter=ce.adapters.linear(inputs, outputs))"
    )


def _kind(layer: nn.Module) -> str:
    if isinstance(layer, torch.jit.ScriptModule):
        return f"{layer.original_name} in TorchScript (relax the model before scripting it)"
    return type(layer).__name__


def _enable(layers: Sequence[nn.Module], states: Sequence[bool]) -> None:
    for layer, state in zip(layers, states, strict=True):
        if is_relaxed(layer):  # not finalized meanwhile
            term_of(layer).enabled = state
            refresh(layer)


def refresh(layer: nn.Module) -> None:
    """Drop what a relaxed layer has cached of its filters."""
    if (drop := adapter_of(layer).refresh) is not None:
        drop(layer)
