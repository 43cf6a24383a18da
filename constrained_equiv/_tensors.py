"""Multi-tensor arithmetic: one call for a whole list of tensors, whatever its length.

What enters: lists of tensors, plain or sharded over processes. What leaves: the same, updated in place, or one stacked
tensor. Called by kernels, constraints and the optimizer.
Law: the number of dispatched operations does not depend on the length of the lists (stacks are worked through in pieces
of four megabytes, so that they stay in the processor's cache), and nothing is read by the host.

torch's multi-tensor functions are private by name until its public `torch.foreach`; this is the one place that calls
them.
"""

import sys
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_PIECE = {"cpu": 4 << 20}  # bytes; beyond the cache a stacked pass costs several times as much
_PIECE_ELSEWHERE = 256 << 20


class Scratch:
    """Room for one stack, kept between calls: fresh memory costs more than the arithmetic done in it."""

    def __init__(self) -> None:
        self._rooms: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Scratch":
        return Scratch()

    def stack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Stack tensors of one shape; the result is overwritten by the next call."""
        first = tensors[0]
        if first.device.type != "cpu":  # there the allocator keeps the room
            return torch.stack(list(tensors))
        size, key = len(tensors) * first.numel(), (first.dtype, first.device)
        room = self._rooms.get(key)
        if room is None or len(room) < size:
            self._rooms[key] = room = torch.empty(size, dtype=first.dtype, device=first.device)
        return torch.stack(list(tensors), out=room[:size].view(len(tensors), *first.shape))


def norms(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the Euclidean norm of each tensor, stacked (n,); of whole tensors, where they are sharded."""
    if any_sharded(tensors):
        return _sum_over_shards(tensors, torch.stack(torch._foreach_norm(locals_(tensors), 2, dtype=dtype)))
    if (stack := _adjoined(tensors)) is not None:
        sizes: Tensor = torch.linalg.vector_norm(stack, dim=tuple(range(1, stack.ndim)), dtype=dtype)
        return sizes
    return torch.stack(torch._foreach_norm(list(tensors), 2, dtype=dtype))


def add_scaled_(targets: Sequence[Tensor], sources: Sequence[Tensor], factors: Tensor) -> None:
    """targets[i] += factors[i] * sources[i], with factors (n,) on the device."""
    if any_sharded(targets):
        targets, sources = locals_(targets), locals_(sources)
    if (stack := _adjoined(targets)) is not None:
        _add_scaled_stack_(stack, sources, factors)
    elif targets[0].device.type == "cpu":
        torch._foreach_addcmul_(list(targets), list(sources), factors.to(sources[0].dtype).unbind())
    else:
        add_scaled_stacked_(list(targets), list(sources), factors)


def add_scaled_stacked_(targets: list[Tensor], sources: list[Tensor], factors: Tensor) -> None:
    """The same for accelerators, where factors on the device would cost one kernel per tensor: one per shape."""
    single = factors.unbind()
    for group in grouped(tuple(source.shape) for source in sources):
        stacked = torch.stack([sources[i] for i in group])
        column = torch.stack([single[i] for i in group]).to(stacked.dtype)
        stacked.mul_(column.view(-1, *[1] * (stacked.ndim - 1)))
        torch._foreach_add_([targets[i] for i in group], list(stacked.unbind()))


def _add_scaled_stack_(targets: Tensor, sources: Sequence[Tensor], factors: Tensor) -> None:
    """The same for targets that are one stack."""
    if (stack := _adjoined(sources)) is not None:
        targets.addcmul_(stack, factors.to(targets.dtype).view(-1, *[1] * (targets.ndim - 1)))
    elif targets.device.type == "cpu":
        torch._foreach_addcmul_(targets.unbind(), list(sources), factors.to(targets.dtype).unbind())
    else:
        add_scaled_stacked_(list(targets.unbind()), list(sources), factors)


def add_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """targets[i] += sources[i]; sources are whole tensors."""
    if any_sharded(targets):
        sources = [shard_like(source, target) for source, target in zip(sources, targets, strict=True)]
    torch._foreach_add_(locals_(targets), list(sources))


def scale_(targets: Sequence[Tensor], factors: Tensor) -> None:
    """targets[i] *= factors[i], with factors (n,) on the device; for small tensors."""
    torch._foreach_mul_(locals_(targets), list(factors.to(targets[0].dtype).unbind()))


def zero_(targets: Sequence[Tensor]) -> None:
    """Set every tensor to zero."""
    if targets:
        torch._foreach_zero_(locals_(targets))


def fill_(targets: Sequence[Tensor], value: float) -> None:
    """Set every entry of every tensor to a number."""
    zero_(targets)
    torch._foreach_add_(locals_(targets), value)


def map_stacked_(
    targets: Sequence[Tensor],
    function: Callable[[Tensor], Tensor],
    scratch: Scratch | None = None,
    *,
    plus: tuple[Sequence[Tensor], Tensor] | None = None,
) -> None:
    """Replace tensors of one shape by function(stack of them); the function may work in place.

    It sees whole tensors: sharded ones are gathered one at a time.

    Args:
        targets: replaced in place.
        function: maps (k, *shape) to the same.
        scratch: where stacks are made.
        plus: sources and factors; factors[i] * sources[i] is added to the i-th result while it is in the cache.
    """
    if any_sharded(targets):
        for target in targets:
            result = function(whole(target).clone().unsqueeze(0))[0]
            locals_([target])[0].copy_(shard_like(result, target))
        if plus is not None:
            add_scaled_(targets, *plus)
        return
    scratch = scratch or Scratch()
    sources, factors = plus or ((), None)
    for piece in pieces(targets):
        here = targets[piece]
        view = _adjoined(here)
        stack = scratch.stack(here) if view is None else view
        result = function(stack)
        if factors is not None:
            _add_scaled_stack_(result, sources[piece], factors if len(here) == len(targets) else factors[piece])
        if result is not view:
            torch._foreach_copy_(list(here), result.unbind())


@torch.no_grad()
def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Return a copy of whole tensors of one shape as a stack without history."""
    return torch.stack([whole(tensor) for tensor in tensors])


def adjoin_(parameters: Sequence[Tensor]) -> None:
    """Move parameters of one shape into one block of memory, where `map_stacked_` finds them without copying.

    Nothing breaks where they are moved apart again later: they are then copied.
    """
    if len(parameters) < 2 or any(is_sharded(p) or not p.is_contiguous() for p in parameters):
        return
    if _adjoined(parameters) is None:
        for parameter, place in zip(parameters, torch.stack([p.detach() for p in parameters]), strict=True):
            parameter.data = place


def _adjoined(tensors: Sequence[Tensor]) -> Tensor | None:
    """View tensors of one shape as a stack without history, where they lie one behind the other in one block."""
    if torch.compiler.is_compiling():  # a compiler knows no addresses
        return None
    first, count = tensors[0], len(tensors)
    if count == 1:
        return first.unsqueeze(0) if first.is_contiguous() else None
    key = id(first), count
    known, places = _found.get(key), list(map(Tensor.data_ptr, tensors))
    if known is not None and known.places == places and known.first() is first:
        return known.stack if all(map(Tensor.is_contiguous, tensors)) else None
    size, shape = first.numel(), first.shape
    step = size * first.element_size()
    if not step or places != [places[0] + i * step for i in range(count)]:  # empty shards, and the usual answer no
        return None
    if not all(map(Tensor.is_contiguous, tensors)) or any(t.shape != shape for t in tensors):
        return None
    if tensors[-1].untyped_storage().data_ptr() != first.untyped_storage().data_ptr():  # neighbours by chance
        return None
    # detached, for a view would keep its first tensor alive
    stack = first.detach().as_strided((count, *shape), (size, *first.stride()), first.storage_offset())
    _found[key] = _Found(weakref.ref(first, lambda _: _found.pop(key, None)), places, stack)
    return stack


class _Found(NamedTuple):
    """Tensors that lie one behind the other, remembered while the first one lives and none has moved.

    To find them anew in every step takes longer than many a thing that is then done with them.
    """

    first: weakref.ref[Tensor]
    places: list[int]
    stack: Tensor


_found: dict[tuple[int, int], _Found] = {}


def pieces(tensors: Sequence[Tensor], *, copies: int = 1) -> Iterator[slice]:
    """Cut a list of tensors of one shape into ranges that are worked through at once, with so many copies of each."""
    size = copies * tensors[0].numel() * tensors[0].element_size()
    count = max(_PIECE.get(tensors[0].device.type, _PIECE_ELSEWHERE) // max(size, 1), 1)
    return (slice(start, start + count) for start in range(0, len(tensors), count))


def gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return the gradients to write into, allocating zeros where there is none yet; of what is frozen, none is kept."""
    result = []
    for parameter in parameters:
        if not parameter.requires_grad:
            result.append(torch.zeros_like(parameter))
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        result.append(parameter.grad)
    return result


def unfrozen(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return the parameters to write into, with a copy in place of each that is frozen."""
    return [parameter if parameter.requires_grad else parameter.detach().clone() for parameter in parameters]


def grouped(keys: Iterable[Hashable]) -> list[list[int]]:
    """Return the positions of equal keys, in order of first appearance."""
    groups: dict[Hashable, list[int]] = {}
    for position, key in enumerate(keys):
        groups.setdefault(key, []).append(position)
    return list(groups.values())


# --- tensors sharded over processes (DTensor, as fully_shard makes them) ---


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is distributed over processes; its class is not imported for those who have none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def any_sharded(tensors: Sequence[Tensor]) -> bool:
    """Whether any tensor is distributed over processes."""
    if "torch.distributed.tensor" not in sys.modules or not torch.distributed.is_initialized():
        return False
    return any(map(is_sharded, tensors))


def locals_(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return what this process holds of each tensor, sharing memory with it."""
    if not any_sharded(tensors):
        return list(tensors)
    return [tensor.to_local() if is_sharded(tensor) else tensor for tensor in tensors]  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """Return a sharded tensor as a whole (a collective), any other as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def shard_like(tensor: Tensor, target: Tensor) -> Tensor:
    """Return this process's part of a tensor that every process holds as a whole, cut like the target."""
    if not is_sharded(target):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    placed: Any = target
    cut = distribute_tensor(tensor, placed.device_mesh, placed.placements, src_data_rank=None)
    return cut.to_local()


def average_over_processes_(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their mean over the processes of the default group, in one collective."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    torch._foreach_copy_(list(tensors), [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)])


def _sum_over_shards(tensors: Sequence[Tensor], sizes: Tensor) -> Tensor:
    """Turn norms of parts into norms of whole tensors: one all-reduce per mesh dimension that cuts any of them."""
    squares = sizes.square()
    cuts: dict[tuple[Any, int], list[int]] = {}
    for position, tensor in enumerate(tensors):
        placed: Any = tensor
        for dim, placement in enumerate(placed.placements if is_sharded(tensor) else ()):
            if placement.is_shard():
                cuts.setdefault((placed.device_mesh, dim), []).append(position)
    for (mesh, dim), positions in cuts.items():
        part = squares[positions] if len(positions) < len(squares) else squares
        torch.distributed.all_reduce(part, group=mesh.get_group(dim))
        if part is not squares:
            squares[positions] = part
    return squares.sqrt()
