"""The methods that are compared: each relaxes a model in place and returns its optimizer, nothing else.

Enter a plain model, the task, the number of steps and the learning rate; leave the optimizer of the run. The one law:
what is not named by a method (base optimizer, rate, batches, initial weights) is the same for all.
"""

import math

import torch
from torch import Tensor, nn

import constrained_equiv as ce
from examples.harness import LEVEL_ENDS, Method, Task


def strict(model: nn.Module, task: Task, steps: int, lr: float) -> torch.optim.Optimizer:
    """The equivariant model alone."""
    return torch.optim.Adam(model.parameters(), lr=lr)


def triangle(model: nn.Module, task: Task, steps: int, lr: float) -> torch.optim.Optimizer:
    """The published schedule: free terms whose scale rises from 0 to 1 and falls back to 0, with two small penalties.

    The penalties are on the distance from equivariance (whose zeros are those of the Lie derivative) and on the norm.
    """
    ce.relax(model, where=task.where, adapter=task.adapter, complement=False, init=1e-2)
    records = [
        ce.constraints.scale(model, schedule=ce.schedules.triangle(int(LEVEL_ENDS * steps))),
        ce.constraints.penalty(ce.constraints.weight(model, level=0.0, part="non_equivariant"), coefficient=0.01),
        ce.constraints.penalty(ce.constraints.weight(model, level=0.0), coefficient=0.01),
    ]
    return ce.ConstrainedOptimizer(torch.optim.Adam(ce.parameter_groups(model, lr=lr)), *records)


def gate(model: nn.Module, task: Task, steps: int, lr: float) -> torch.optim.Optimizer:
    """The published gates: free terms times a learnable scalar that starts at 1 and is driven to 0 by a multiplier."""
    ce.relax(model, where=task.where, adapter=task.adapter, complement=False, gate=True, init=_like_linear)
    return ce.ConstrainedOptimizer(
        torch.optim.Adam(ce.parameter_groups(model, lr=lr)),
        ce.constraints.gate(model, level=0.0),
        formulation="lagrangian",
        dual=lambda multipliers: torch.optim.Adam(multipliers, lr=lr, maximize=True),
        order="simultaneous",
    )


def ridge(model: nn.Module, task: Task, steps: int, lr: float) -> torch.optim.Optimizer:
    """Terms that a squared norm of weight 1 keeps small, dropped at the end."""
    ce.relax(model, where=task.where, adapter=task.adapter)
    return ce.ConstrainedOptimizer(
        torch.optim.Adam(ce.parameter_groups(model, lr=lr)),
        ce.constraints.weight(model, level=0.0),
        formulation="quadratic_penalty",
        penalty=1.0,
        at_zero="multipliers",
    )


def primal_dual(model: nn.Module, task: Task, steps: int, lr: float) -> torch.optim.Optimizer:
    """Ours: terms in the complement of the equivariant maps, held under a falling level by multipliers."""
    ce.relax(model, where=task.where, adapter=task.adapter)
    level = ce.schedules.cosine(start=0.5, end=0.0, steps=int(LEVEL_ENDS * steps))
    base = torch.optim.Adam(ce.parameter_groups(model, lr=lr))
    return ce.ConstrainedOptimizer(base, ce.constraints.weight(model, level=level))


def projection(model: nn.Module, task: Task, steps: int, lr: float) -> torch.optim.Optimizer:
    """The same level, enforced by scaling each term back onto its ball instead of by multipliers."""
    ce.relax(model, where=task.where, adapter=task.adapter)
    level = ce.schedules.cosine(start=0.5, end=0.0, steps=int(LEVEL_ENDS * steps))
    base = torch.optim.Adam(ce.parameter_groups(model, lr=lr))
    return ce.ConstrainedOptimizer(base, ce.constraints.weight(model, level=level), enforce="projection")


def folded(model: nn.Module, task: Task, steps: int, lr: float) -> torch.optim.Optimizer:
    """Free terms whose non-equivariant part is held under a falling level and whose equivariant part is folded in."""
    ce.relax(model, where=task.where, adapter=task.adapter, complement=False)
    level = ce.schedules.cosine(start=0.5, end=0.0, steps=int(LEVEL_ENDS * steps))
    base = torch.optim.Adam(ce.parameter_groups(model, lr=lr))
    return ce.ConstrainedOptimizer(base, ce.constraints.weight(model, level=level, part="non_equivariant"))


def equivariant_path(model: nn.Module, task: Task, steps: int, lr: float) -> torch.optim.Optimizer:
    """The control: an extra equivariant linear path and no broken symmetry at all, folded in."""
    ce.relax(model, where=task.where, adapter=task.adapter, complement=False)
    base = torch.optim.Adam(ce.parameter_groups(model, lr=lr))
    return ce.ConstrainedOptimizer(base, ce.constraints.weight(model, level=0.0, part="non_equivariant"))


def _like_linear(weight: Tensor) -> Tensor:
    return nn.init.kaiming_uniform_(weight.flatten(1), a=math.sqrt(5))


def _at(factor: float) -> Method:
    return Method(f"strict x{factor:g}", lambda model, task, steps, lr: strict(model, task, steps, factor * lr))


METHODS = {
    method.name: method
    for method in (
        Method("strict", strict),
        _at(0.5),
        _at(2),
        _at(4),
        Method("triangle", triangle),
        Method("gate", gate, finish={"on_violation": "drop"}),
        Method("ridge", ridge, finish={"on_violation": "drop"}),
        Method("primal-dual", primal_dual),
        Method("primal-dual, no turns", primal_dual, augment=False),
        Method("projection", projection),
        Method("folded", folded, finish={"fold": True}, folds=True),
        Method("equivariant path", equivariant_path, finish={"fold": True}, folds=True),
    )
}
