"""Multi-tensor arithmetic: one call for a whole list of tensors, whatever its length.

What enters: lists of tensors. What leaves: the same, updated in place, or one stacked tensor. Called by constraints and
the optimizer.
Law: the number of dispatched operations does not depend on the length of the lists, and nothing is read by the host.

torch's multi-tensor functions are private by name until its public `torch.foreach`; this is the one place that calls
them.
"""

from collections.abc import Callable, Hashable, Iterable, Sequence

import torch
from torch import Tensor


def norms(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the Euclidean norm of each tensor, stacked (n,)."""
    return torch.stack(torch._foreach_norm(list(tensors), 2, dtype=dtype))


def add_scaled_(targets: Sequence[Tensor], sources: Sequence[Tensor], factors: Tensor) -> None:
    """targets[i] += factors[i] * sources[i], with factors (n,) on the device."""
    scaled = torch._foreach_mul(list(sources), list(factors.to(sources[0].dtype).unbind()))
    torch._foreach_add_(list(targets), scaled)


def add_(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """targets[i] += sources[i]."""
    torch._foreach_add_(list(targets), list(sources))


def scale_(targets: Sequence[Tensor], factors: Tensor) -> None:
    """targets[i] *= factors[i], with factors (n,) on the device."""
    torch._foreach_mul_(list(targets), list(factors.to(targets[0].dtype).unbind()))


def zero_(targets: Sequence[Tensor]) -> None:
    """Set every tensor to zero."""
    if targets:
        torch._foreach_zero_(list(targets))


def fill_(targets: Sequence[Tensor], value: float) -> None:
    """Set every entry of every tensor to a number."""
    zero_(targets)
    torch._foreach_add_(list(targets), value)


def map_stacked_(targets: Sequence[Tensor], function: Callable[[Tensor], Tensor]) -> None:
    """Replace tensors of one shape by function(stack of them), computed at once."""
    if len(targets) == 1:
        targets[0].copy_(function(targets[0].unsqueeze(0).clone())[0])
    else:
        torch._foreach_copy_(list(targets), list(function(torch.stack(list(targets))).unbind()))


def gradients(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return the gradients, allocating zeros where there is none yet."""
    result = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        result.append(parameter.grad)
    return result


def grouped(keys: Iterable[Hashable]) -> list[list[int]]:
    """Return the positions of equal keys, in order of first appearance."""
    groups: dict[Hashable, list[int]] = {}
    for position, key in enumerate(keys):
        groups.setdefault(key, []).append(position)
    return list(groups.values())
