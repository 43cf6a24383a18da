"""Relaxed layers whose terms are the only thing that a test looks at."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import constrained_equiv as ce
from constrained_equiv._terms import NonEquivariantTerm

Loss = Callable[[], Tensor]


def layers(
    *shapes: tuple[int, int], free: bool = False, gate: bool = False, dtype: torch.dtype = torch.float64
) -> tuple[nn.Module, list[NonEquivariantTerm]]:
    """One layer per shape (out, in). Scalars go to pseudoscalars: no map is equivariant, so the complement is all."""
    model = nn.ModuleList(nn.Linear(columns, rows, dtype=dtype) for rows, columns in shapes)
    for layer, (rows, columns) in zip(model, shapes, strict=True):
        adapter = ce.adapters.linear(f"{columns}x0e", f"{rows}x0o")
        ce.relax(layer, where=lambda name, m: True, adapter=adapter, complement=not free, gate=gate)
    return model, [r.term for r in ce.relaxations(model)]


def points(count: int, *, complement: bool = True, size: int = 3, channels: int = 2) -> nn.Module:
    """Layers on sets of points: their maps have an equivariant part of dimension 2 channels^2."""
    model = nn.ModuleList(nn.Linear(channels, channels, dtype=torch.float64) for _ in range(count))
    representation = ce.representations.permutation(size, channels=channels)
    adapter = ce.adapters.linear(representation, representation, axes=(-2, -1))
    return ce.relax(
        model, where=lambda name, m: isinstance(m, nn.Linear), adapter=adapter, complement=complement, init=0.1
    )


SCATTERED = "2x0e + 1x1o + 1x1e + 1x0e", "1x1o + 2x0e + 2x1o"  # irreps whose copies do not lie side by side


def irreps(count: int, *, complement: bool = True) -> nn.Module:
    """Layers from 9 to 11 numbers that carry irreps of O(3), with six blocks each."""
    model = nn.ModuleList(nn.Linear(9, 11, bias=False, dtype=torch.float64) for _ in range(count))
    adapter = ce.adapters.linear(*SCATTERED)
    return ce.relax(
        model, where=lambda name, m: isinstance(m, nn.Linear), adapter=adapter, complement=complement, init=0.1
    )


def minimise(optimizer: torch.optim.Optimizer, loss: Loss, steps: int, *, decay: bool = False) -> None:
    """Take steps; with `decay`, the learning rate falls to 0 along a cosine."""
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if decay else None
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def multipliers(optimizer: ce.ConstrainedOptimizer) -> Tensor:
    return optimizer.readings().multipliers
