"""Processes of a parallel training, started in `test_distributed`: they train, and the first one saves what it found.

Law: a case is trained by the same function everywhere; only the strategy and the rows of the batch differ.
"""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import constrained_equiv as ce
from tests.optim.test_setups import data, loss
from tests.optim.toys import points

BATCH, STEPS, SAVED = 16, 10, 5
FALLING = ce.schedules.linear(0.2, 0.02, 8)


class Case(NamedTuple):
    """How to train.

    Attributes:
        strategy: `ddp` or `fsdp`.
        records: of `records`.
        options: of the optimizer.
        complement: of the terms.
        accumulate: halves of a batch that are accumulated, without communication in DDP.
        clip: largest norm of the task's gradient.
        poison: step at which the first process, and the single one, meets a number that is not finite.
    """

    strategy: str
    records: str = "weight"
    options: Mapping[str, Any] = MappingProxyType({})
    complement: bool = True
    accumulate: bool = False
    clip: float | None = None
    poison: int | None = None


CASES = {
    "ddp": Case("ddp"),
    "ddp, relative": Case("ddp", "relative"),
    "ddp, activation": Case("ddp", "activation"),
    "ddp, no_sync": Case("ddp", accumulate=True),
    "ddp, clipped, free": Case("ddp", complement=False, clip=0.1),
    "ddp, one sees nan": Case("ddp", options={"on_nonfinite": "skip"}, poison=3),
    "fsdp": Case("fsdp"),
    "fsdp, two records": Case("fsdp", "two"),
    "fsdp, blocks, generators, a subgroup": Case("fsdp", "parts"),
    "fsdp, relative": Case("fsdp", "relative"),
    "fsdp, activation": Case("fsdp", "activation"),
    "fsdp, custom": Case("fsdp", "custom"),
    "fsdp, clipped": Case("fsdp", clip=0.1),
    "fsdp, free": Case("fsdp", complement=False),
    "fsdp, its other part": Case("fsdp", "non_equivariant", complement=False),
    "fsdp, projection": Case("fsdp", options={"enforce": "projection"}),
    "fsdp, proximal": Case("fsdp", options={"enforce": "proximal"}),
    "fsdp, primal-dual nuPI": Case("fsdp", options={"order": "primal-dual", "dual": "nupi", "dual_lr": 0.5}),
    "fsdp, linear slack": Case("fsdp", "resilient"),
    "fsdp, to zero": Case("fsdp", "zero"),
    "fsdp, one sees nan": Case("fsdp", options={"on_nonfinite": "skip"}, poison=3),
}
# Saved by two processes, loaded by another number: while levels fall, and in the tail.
CHECKPOINTS = {
    "nuPI": Case("fsdp", options={"dual": "nupi", "dual_lr": 0.5, "formulation": "lagrangian"}),
    "growing penalty, momentum": Case(
        "fsdp",
        options={
            "penalty_growth": 1.1,
            "dual": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.5, maximize=True),
        },
    ),
    "in the tail": Case("fsdp", "zero"),
}


class Net(nn.Module):
    """Terms of odd sizes, so that shards are uneven and cut the blocks that the projection mixes."""

    def __init__(self, complement: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = points(2, complement=complement)
        self.last = nn.Linear(2, 2, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.first:
            x = torch.tanh(layer(x))
        return self.last(x)


def records(model: nn.Module, which: str) -> list[Any]:
    weight = ce.constraints.weight
    if which == "two":
        return [weight(model, level=FALLING), ce.constraints.lie(model, level=0.2, where=lambda n: "0" in n)]
    if which == "parts":
        turns = ce.groups.matrix_group("turns", generators=torch.eye(3)[[1, 2, 0]][None])
        return [
            weight(model, level=FALLING, per="block"),
            weight(model, level=0.1, per="model"),
            ce.constraints.lie(model, level=0.2, per="generator"),
            ce.constraints.subgroup(model, turns, level=ce.schedules.linear(0.2, 0.0, 6)),
        ]
    if which == "custom":
        return [ce.constraints.custom(model, lambda t: t.weight.square().sum(), name="square", level=FALLING)]
    if which == "non_equivariant":
        return [weight(model, level=FALLING, part="non_equivariant")]
    if which == "resilient":
        return [ce.constraints.resilient(weight(model, level=FALLING), price=0.02)]
    if which == "zero":
        return [weight(model, level=ce.schedules.linear(0.2, 0.0, SAVED - 1))]
    return [getattr(ce.constraints, which)(model, level=FALLING)]


class Run:
    """One training, of one or several processes."""

    def __init__(self, case: Case, *, rank: int = 0, processes: int = 1) -> None:
        self.case, self.rank, self.parallel = case, rank, processes > 1
        self.model = self.trained = Net(case.complement)
        if self.parallel and case.strategy == "ddp":
            self.trained = nn.parallel.DistributedDataParallel(self.model)
        elif self.parallel:
            for layer in self.model.first:
                fully_shard(layer)
            fully_shard(self.model)
        base = torch.optim.Adam(self.model.parameters(), lr=0.02)
        self.optimizer = ce.ConstrainedOptimizer(base, *records(self.model, case.records), **case.options)
        size = BATCH // processes
        self.rows = list(range(rank * size, (rank + 1) * size))

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            self.optimizer.zero_grad()
            torch.manual_seed(step)
            x, y = data(BATCH)
            poisoned = step == self.case.poison and self.rank == 0
            if poisoned and self.case.strategy == "ddp":  # which averages gradients: all see it
                x[0] = torch.nan
            half = len(self.rows) // 2
            parts = [self.rows[:half], self.rows[half:]] if self.case.accumulate else [self.rows]
            for i, rows in enumerate(parts):
                if self.parallel and self.case.strategy == "ddp":
                    self.trained.require_backward_grad_sync = i == len(parts) - 1  # as in `no_sync`
                (loss(self.trained, x[rows], y[rows]) / len(parts)).backward()
            if poisoned and self.case.strategy == "fsdp":  # where it stays in the shard of one
                gradient = self.model.first[0].non_equivariant.weight.grad
                (gradient.to_local() if hasattr(gradient, "to_local") else gradient)[0, 0] = torch.nan
            if self.case.clip is not None:
                nn.utils.clip_grad_norm_(self.model.parameters(), self.case.clip)
            self.optimizer.step()

    def parameters(self) -> list[torch.Tensor]:
        found = [p.detach() for p in self.model.parameters()]
        return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in found]

    def result(self) -> dict[str, Any]:
        now, everywhere = self.optimizer.readings(), [None]
        mine = {"multipliers": now.multipliers, "values": now.values, "step": now.step}
        if self.parallel:
            everywhere = [None] * dist.get_world_size()
            dist.all_gather_object(everywhere, mine)
        return {"parameters": self.parameters(), "processes": everywhere if self.parallel else [mine]}

    def save(self, path: Path) -> None:
        dcp.save(self._state(), checkpoint_id=str(path))

    def load(self, path: Path) -> None:
        state = self._state()
        dcp.load(state, checkpoint_id=str(path))
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "constraints": self.optimizer.constraint_state}


def main(rank: int, processes: int, folder: Path) -> None:
    """Train every case, save checkpoints if there are none yet, or go on from them."""
    torch.set_num_threads(1)
    rendezvous = f"file://{folder / f'rendezvous-{processes}'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=processes)
    found = {}
    for name, case in CASES.items():
        run = Run(case, rank=rank, processes=processes)
        run.train(0, STEPS)
        found[name] = run.result()
    for name, case in CHECKPOINTS.items():
        run, path = Run(case, rank=rank, processes=processes), folder / name
        if processes == 2:
            run.train(0, SAVED)
            run.save(path)
        else:
            run.load(path)
        run.train(SAVED, STEPS)
        found[name] = run.result()
    if rank == 0:
        torch.save(found, folder / f"found-{processes}.pt")
    dist.destroy_process_group()
