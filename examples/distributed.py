"""Constrained training on many processes, on one machine or several; the lines that use the library are marked.

    torchrun --nproc-per-node 2 -m examples.distributed [--strategy ddp|fsdp] [--steps 200]

Every process sees its own rows of each batch, as many as every other; multipliers are identical on all of them, and the
result is that of one process. With `fsdp` the terms are sharded, and measuring them takes one all-reduce of as many
numbers as there are layers. On several machines, start the same command on each with torchrun's --nnodes, --node-rank
and --rdzv-endpoint.
"""

import argparse
import gc
import os

import torch
import torch.distributed as dist
from e3nn import o3
from torch import Tensor, nn

import constrained_equiv as ce  # <- library

IRREPS = o3.Irreps("8x0e + 8x1o")


class Network(nn.Module):
    """A tensor product of vectors and scalars with themselves, between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = o3.Linear("1x1o", IRREPS)
        self.middle = o3.FullyConnectedTensorProduct(IRREPS, IRREPS, IRREPS)
        self.last = o3.Linear(IRREPS, "1x1o")

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(self.middle(x, x))


def parallel(model: nn.Module, strategy: str, device: torch.device) -> nn.Module:
    if strategy == "ddp":
        ids = [device.index] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids)
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


def train(options: argparse.Namespace, device: torch.device) -> None:
    rank, processes = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = ce.relax(Network().to(device))  # <- library: relax before the model is made parallel
    trained = parallel(model, options.strategy, device)
    level = ce.schedules.cosine(0.5, 0.0, round(0.8 * options.steps))  # <- library
    base = torch.optim.Adam(ce.parameter_groups(model, lr=1e-2))  # <- library: after it
    optimizer = ce.ConstrainedOptimizer(base, ce.constraints.weight(model, level=level))  # <- library

    torch.manual_seed(1)
    loss = torch.zeros(())
    for step in range(options.steps):
        x = torch.randn(options.batch, 3)[rank::processes].to(device)
        y = x * x.norm(dim=1, keepdim=True)
        optimizer.zero_grad()
        loss = (trained(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        if rank == 0 and step % max(options.steps // 5, 1) == 0:
            now = optimizer.readings()
            print(f"step {step}: loss {float(loss.detach()):.4f}, largest term {float(now.values.max()):.2e}")

    multipliers = optimizer.readings().multipliers
    everywhere = [torch.empty_like(multipliers) for _ in range(processes)]
    dist.all_gather(everywhere, multipliers)
    identical = all(torch.equal(m, multipliers) for m in everywhere)
    largest = float(optimizer.readings().values.max())
    average = loss.detach() / processes
    dist.all_reduce(average)
    if rank == 0:
        print(f"final loss {float(average):.4f}, largest term {largest:.1e}, same multipliers: {identical}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--strategy", choices=["ddp", "fsdp"], default="ddp")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64, help="rows, a multiple of the number of processes")
    options = parser.parse_args()
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if options.steps < 1:
        parser.error(f"found --steps {options.steps}: expected at least 1")
    if options.batch < 1 or options.batch % processes:
        parser.error(f"found --batch {options.batch}: expected a multiple of {processes}, the number of processes")
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    train(options, device)
    gc.collect()  # the sharded model, in circles of references, holds on to the group; its threads must end with that
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
