"""Trace: what every module of a network took and gave, in order of execution.

What enters: a module and a way to run it. What leaves: a list of events, which the audit reads.
Law: tracing changes nothing: buffers, hooks and random state are as before.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

Key = tuple[int, tuple[int, ...], tuple[int, ...], int]
"""Storage, shape, strides and version: equal for a tensor and for another handle of the same entries, until they are
changed in place. Tensors of inference mode have no version."""


class Atom(NamedTuple):
    """One floating-point tensor within an input or output.

    Attributes:
        tensor: its entries at that time.
        key: which tensor it was.
        kind: the type of a geometric tensor, else None.
    """

    tensor: Tensor
    key: Key
    kind: Any


@dataclass(eq=False)
class Call:
    """One execution of one module; `arguments` and `output` are copies made at that time, if asked for."""

    name: str
    module: nn.Module
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    taken: list[list[Atom]]
    output: Any = None
    given: list[Atom] = field(default_factory=list)


class Event(NamedTuple):
    """A module is entered or left."""

    stage: Literal["enter", "leave"]
    call: Call


@dataclass(eq=False)
class Trace:
    """The events of one run, and the original tensors, which are kept alive so that their keys stay unique."""

    events: list[Event]
    output: Any
    alive: list[Any]


def trace(
    model: Callable[..., Any], run: Callable[[], Any], *, copied: Callable[[nn.Module], bool] = lambda module: True
) -> Trace:
    """Run once and record every module of `model` that is written in Python.

    Args:
        model: whose modules are watched; a plain function has none.
        run: calls it.
        copied: of which modules the entries matter; the tensors of others may be overwritten later, which saves memory.
    """
    events: list[Event] = []
    open_calls: list[Call] = []
    alive: list[Any] = []
    names: dict[int, str] = {}

    def enter(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        copy = copied(module)
        taken = [atoms(argument, copied=copy) for argument in arguments]
        alive.append(arguments)
        call = Call(names[id(module)], module, tree_map(_copy, arguments) if copy else arguments, keywords, taken)
        open_calls.append(call)
        events.append(Event("enter", call))

    def leave(module: nn.Module, arguments: Any, keywords: Any, output: Any) -> None:
        while open_calls[-1].module is not module:  # it raised, and the exception was caught
            given_up = open_calls.pop()
            events[:] = [event for event in events if event.call is not given_up]
        call = open_calls.pop()
        copy = copied(module)
        call.output, call.given = tree_map(_copy, output) if copy else output, atoms(output, copied=copy)
        alive.append(output)
        events.append(Event("leave", call))

    handles: list[Any] = []
    for name, module in _watched(model):
        names[id(module)] = name
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        output = run()
    finally:
        for handle in handles:
            handle.remove()
    return Trace(events, output, alive)


def atoms(value: Any, *, copied: bool = True) -> list[Atom]:
    """List the floating-point tensors of a structure, with copies of their entries unless `copied` is False."""
    found = []
    for leaf in tree_flatten(value)[0]:
        geometric = not isinstance(leaf, Tensor) and isinstance(getattr(leaf, "tensor", None), Tensor)
        tensor = leaf.tensor if geometric else leaf
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            key = (
                tensor.untyped_storage().data_ptr() + int(tensor.storage_offset()),
                tuple(tensor.shape),
                tensor.stride(),
                0 if tensor.is_inference() else tensor._version,
            )
            entries = tensor.detach().clone() if copied else tensor.detach()
            found.append(Atom(entries, key, leaf.type if geometric else None))
    return found


def replace_atoms(value: Any, tensors: list[Tensor]) -> Any:
    """Return a structure with its floating-point tensors replaced, in the order of `atoms`."""
    rest = iter(tensors)

    def one(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return next(rest) if leaf.is_floating_point() else leaf
        return type(leaf)(next(rest), leaf.type) if isinstance(getattr(leaf, "tensor", None), Tensor) else leaf

    return tree_map(one, value)


@contextmanager
def unchanged(model: Callable[..., Any]) -> Iterator[None]:
    """Give buffers and torch's random state back as they were."""
    buffers = list(model.buffers()) if isinstance(model, nn.Module) else []
    before = [buffer.clone() for buffer in buffers]
    with torch.random.fork_rng():
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in zip(buffers, before, strict=True):
                    if not torch.equal(buffer, value):  # one that is expanded cannot be written, nor has it been
                        buffer.copy_(value)


def _watched(model: Callable[..., Any]) -> Iterator[tuple[str, nn.Module]]:
    """Modules written in Python: compiled ones and their parts take no hooks and state no representation."""
    compiled = torch.jit.ScriptModule, torch.fx.GraphModule
    if isinstance(model, nn.Module):
        opaque = {id(part) for module in model.modules() if isinstance(module, compiled) for part in module.modules()}
        yield from ((name, module) for name, module in model.named_modules() if id(module) not in opaque)


def _copy(leaf: Any) -> Any:
    return leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf
