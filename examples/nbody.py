"""The main job: a steerable E(3) network learns charged five-body dynamics, strictly and through relaxation.

    python -m examples.nbody                      # about five minutes on two CPU cores, simulated data
    python -m examples.nbody --data FOLDER        # with nbody5_charged.npz, or the file itself
    python -m examples.nbody --resume             # after Ctrl-C: goes on; with all other options as before

The published setting: `--samples 3000 --validation 2000 --hidden 32x0e+32x1o --layers 4 --batch 100 --epochs 1000
--seeds 0 1 2 --lr 5e-4` (hours on a CPU). Writes a table, `results.json` and plots into `--out`. The lines that use the
library are the symmetry below and `methods.py`.
"""

import argparse

import torch
from torch import Tensor, nn

import constrained_equiv as ce
from examples import command
from examples.data import nbody
from examples.models.segnn import SEGNN
from examples.task import Batch, Extra, Task


def main(arguments: list[str] | None = None) -> None:
    command.run(make_task, parse(arguments), scale=1e3)


def make_task(options: argparse.Namespace) -> Task:
    """Predict positions 1.0 time units ahead from positions, velocities and charges."""
    counts = (options.samples, options.validation, options.validation)
    splits = nbody.load(options.data, counts) if options.data else nbody.simulate(counts, seed=options.data_seed)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        positions, velocities, charges, targets = batch
        return (model(positions, velocities, charges) - targets).square().mean()

    metric = torch.no_grad()(loss)
    more = (
        nbody.simulate((0, 0, options.ten_bodies), seed=options.data_seed, particles=10).test
        if options.ten_bodies
        else None
    )
    return Task(
        name="charged N-body",
        build=lambda width: SEGNN(command.widened(options.hidden, width), layers=options.layers),
        train=splits.train.tensors,
        val=splits.val.tensors,
        test=splits.test.tensors,
        loss=loss,
        metric=metric,
        inputs=lambda batch: batch[:3],
        symmetry=ce.Symmetry(
            ce.groups.E3(), inputs=(ce.actions.points, ce.actions.vectors, None), outputs=ce.actions.points
        ),
        published=updates,
        augment=turn,
        extra={} if more is None else {"MSE, ten bodies": Extra(more.tensors, metric)},
    )


def updates(name: str, layer: nn.Module) -> bool:
    """Choose the products that update the nodes, as published."""
    return name.endswith((".update.0", ".update.1"))


def turn(batch: Batch, generator: torch.Generator) -> Batch:
    """Rotate or reflect every sample at random: strict networks do not notice, relaxed ones cannot memorise poses."""
    positions, velocities, charges, targets = batch
    motions = ce.groups.O3().sample(len(positions), generator=generator).to(positions)
    return positions @ motions, velocities @ motions, charges, targets @ motions


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command.parser(__doc__, out="nbody", epochs=120, samples=500, batch=50, lr=4e-3)
    parser.add_argument("--validation", type=command.whole(1), default=500, help="validation and test samples, each")
    parser.add_argument("--hidden", default="16x0e+16x1o", help="irreps of the features")
    parser.add_argument("--layers", type=command.whole(1), default=3)
    parser.add_argument(
        "--ten-bodies", type=command.whole(0), default=0, help="also test on so many simulated systems of ten bodies"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
