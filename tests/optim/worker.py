"""One process of a parallel training, started in `test_distributed`: trains, and rank 0 saves what it found.

torchrun --nproc-per-node 2 -m tests.optim.worker OUT STRATEGY MEASURE
"""

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import constrained_equiv as ce
from tests.optim.test_setups import data, loss
from tests.optim.toys import points

STEPS = 12
LEVEL = ce.schedules.linear(0.2, 0.02, 8)


class Net(nn.Module):
    """Terms of odd sizes, so that shards are uneven and cut the blocks that the projection mixes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = points(2)
        self.last = nn.Linear(2, 2, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.first:
            x = torch.tanh(layer(x))
        return self.last(x)


def records(model: nn.Module, measure: str) -> list[Any]:
    if measure == "two":
        return [
            ce.constraints.weight(model, level=LEVEL),
            ce.constraints.lie(model, level=0.2, where=lambda n: "0" in n),
        ]
    if measure == "parts":
        turns = ce.groups.matrix_group("turns", generators=torch.eye(3)[[1, 2, 0]][None])
        return [
            ce.constraints.weight(model, level=LEVEL, per="block"),
            ce.constraints.weight(model, level=0.1, per="model"),
            ce.constraints.lie(model, level=0.2, per="generator"),
            ce.constraints.subgroup(model, turns, level=ce.schedules.linear(0.2, 0.0, 6)),
        ]
    return [getattr(ce.constraints, measure)(model, level=LEVEL)]


def run(model: nn.Module, trained: nn.Module, optimizer: Any, rows: slice) -> list[torch.Tensor]:
    """Train on some rows of the batch."""
    torch.manual_seed(1)
    for _ in range(STEPS):
        x, y = data(16)
        optimizer.zero_grad()
        loss(trained, x[rows], y[rows]).backward()
        optimizer.step()
    parameters = [p.detach() for p in model.parameters()]
    return [p.full_tensor() if hasattr(p, "full_tensor") else p for p in parameters]


def main(path: str, strategy: str, measure: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model: Any = Net()
    trained = model
    if strategy == "ddp":
        trained = nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.fsdp import fully_shard

        for layer in model.first:
            fully_shard(layer)
        fully_shard(model)
    base = torch.optim.Adam(model.parameters(), lr=0.02)
    optimizer = ce.ConstrainedOptimizer(base, *records(model, measure))
    size = 16 // dist.get_world_size()
    parameters = run(model, trained, optimizer, slice(rank * size, (rank + 1) * size))
    now = optimizer.readings()
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, now.multipliers)
    state: Any = {}
    if strategy == "fsdp":
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

        state = get_optimizer_state_dict(model, optimizer)
        set_optimizer_state_dict(model, optimizer, state)
    if rank == 0:
        found = {"parameters": parameters, "multipliers": everywhere, "values": now.values, "state": sorted(state)}
        torch.save(found, path)
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
