"""Predict velocity fields whose symmetry is broken by a known amount with a C4 steerable CNN.

    python -m examples.smoke                                    # advected vortices, a few minutes on two CPU cores
    python -m examples.smoke --data FOLDER --coarsen 4          # with smoke64.npz: rising smoke

The buoyancy grows with the direction of the flow, so that a quarter turn of the input is only nearly a quarter turn of
the output. Needs escnn. The published setting, on a GPU: `--samples 1000000 --history 10 --coarsen 1 --width 92
--layers 5 --epochs 100 --batch 16`.
"""

import argparse
import math

import torch
from torch import Tensor, nn

import constrained_equiv as ce
from examples import command
from examples.data import smoke
from examples.task import Batch, Extra, Task

PAST = 31  # of the 51 frames of a run, those to train on; the others test the future
ROLLOUT = 6


def main(arguments: list[str] | None = None) -> None:
    command.run(make_task, parse(arguments))


def make_task(options: argparse.Namespace) -> Task:
    """Predict the next velocity field."""
    network = command.steerable().FlowCNN
    extra = {}
    if options.data:
        kept = {"history": options.history, "coarsen": options.coarsen}
        early, late = slice(0, PAST), slice(PAST - options.history, None)
        splits = smoke.load(options.data, **kept, frames=early)._replace(test=smoke.load(options.data, **kept).test)
        extra["RMSE, later times"] = Extra(smoke.load(options.data, **kept, frames=late).train.tensors, error)
        far = smoke.load(options.data, **kept, ahead=ROLLOUT).test
        extra[f"RMSE, rolled out {ROLLOUT} frames"] = Extra(far.tensors, rollout_error)
    else:
        splits = smoke.synthetic(options.samples, seed=options.data_seed, history=options.history)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    order = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(options.data_seed))
    return Task(
        name="smoke",
        build=lambda width: network(history=options.history, width=round(width * options.width), layers=options.layers),
        train=tuple(tensor[order[: options.samples]] for tensor in splits.train.tensors),
        val=splits.val.tensors,
        test=splits.test.tensors,
        loss=loss,
        metric=error,
        inputs=lambda batch: batch[0],
        symmetry=ce.Symmetry(ce.groups.cyclic(4), inputs=quarter_turn, outputs=quarter_turn),
        metric_name="RMSE",
        extra=extra,
    )


@torch.no_grad()
def error(model: nn.Module, batch: Batch) -> Tensor:
    """Root mean square over the cells of a field, mean over the batch."""
    return (model(batch[0]) - batch[1]).square().mean((1, 2, 3)).sqrt().mean()


@torch.no_grad()
def rollout_error(model: nn.Module, batch: Batch) -> Tensor:
    """The same for the last frame of a forecast that the model makes from its own forecasts."""
    fields, target, *_ = batch
    for _ in range(ROLLOUT):
        fields = torch.cat([fields[:, 2:], model(fields)], dim=1)
    return (fields[:, -2:] - target).square().mean((1, 2, 3)).sqrt().mean()


def quarter_turn(element: Tensor, fields: Tensor) -> Tensor:
    """Turn velocity fields (..., 2 frames, size, size), whose rows count upwards, by an element of C4."""
    return smoke.quarter_turn(fields, round(2 * math.atan2(element[1, 0], element[0, 0]) / math.pi))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    default = [*command.DEFAULT_METHODS, "resilient"]
    parser = command.parser(__doc__, out="smoke", epochs=30, samples=300, batch=16, lr=2e-3, default=default)
    parser.add_argument("--history", type=command.whole(1), default=2, help="frames in the input")
    parser.add_argument(
        "--coarsen", type=command.whole(1), default=2, help="of recorded data: average blocks of so many cells"
    )
    parser.add_argument("--width", type=command.whole(1), default=4)
    parser.add_argument("--layers", type=command.whole(2), default=4)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
