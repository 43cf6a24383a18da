"""Predict where the joints of a moving person will be with vector neurons, strictly and through relaxation.

    python -m examples.mocap                                    # a simulated walker, a minute on two CPU cores
    python -m examples.mocap --data FOLDER --motion run         # with run_subject09.npz: CMU motion capture

The published horizon: 30 frames, a quarter of a second, ahead. The network is symmetric under all motions of space, but
people are not: gravity and the floor leave the rotations about the vertical and the level translations. So batches are
turned about the vertical only, and methods that may keep terms (`resilient`, `ridge, kept`, `unconstrained`) can learn
which way is up, while those that end equivariant cannot.
"""

import argparse
import math

import torch
from torch import Tensor, nn

import constrained_equiv as ce
from examples import command
from examples.data import mocap
from examples.models.vector_neurons import VNLeakyReLU, VNLinear
from examples.task import Batch, Task


class VNMotion(nn.Module):
    """Move every joint on at its speed, and add what residual vector layers make of the whole pose.

    Channels are joints: two vectors each, its place relative to the mean and its velocity.
    """

    def __init__(self, joints: int, *, width: int, layers: int, ahead: int) -> None:
        super().__init__()
        self.ahead = ahead
        self.embed = VNLinear(2 * joints, width)
        self.blocks = nn.ModuleList(nn.Sequential(VNLeakyReLU(width), VNLinear(width, width)) for _ in range(layers))
        self.readout = VNLinear(width, joints)
        nn.init.zeros_(self.readout.weight)

    def forward(self, positions: Tensor, velocities: Tensor) -> Tensor:
        """Map positions and displacements in a frame (batch, joints, 3) to positions `ahead` frames later."""
        centred = positions - positions.mean(1, keepdim=True)
        moved = self.ahead * velocities
        x = self.embed(torch.cat([centred, moved], dim=1))
        for block in self.blocks:
            x = x + block(x)
        return positions + moved + self.readout(x)


def main(arguments: list[str] | None = None) -> None:
    command.run(make_task, parse(arguments))


def make_task(options: argparse.Namespace) -> Task:
    """Predict positions from positions and velocities."""
    if options.data:
        splits = mocap.load(options.data, motion=options.motion, ahead=options.ahead)
    else:
        splits = mocap.synthetic(options.samples, seed=options.data_seed, ahead=options.ahead)
    order = torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(options.data_seed))
    train = splits.train.select(order[: options.samples])
    joints = train.positions.shape[1]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        positions, velocities, targets = batch
        return (model(positions, velocities) - targets).square().mean()

    return Task(
        name=f"motion, {options.motion if options.data else 'simulated walker'}",
        build=lambda width: VNMotion(
            joints, width=round(width * options.width), layers=options.layers, ahead=options.ahead
        ),
        train=train.tensors[:3],
        val=splits.val.tensors[:3],
        test=splits.test.tensors[:3],
        loss=loss,
        metric=torch.no_grad()(loss),
        inputs=lambda batch: batch[:2],
        symmetry=ce.Symmetry(ce.groups.E3(), inputs=(ce.actions.points, ce.actions.vectors), outputs=ce.actions.points),
        where=lambda name, layer: isinstance(layer, VNLinear),
        adapter=ce.adapters.vector_neurons(),
        augment=turn,
    )


def turn(batch: Batch, generator: torch.Generator) -> Batch:
    """Rotate every pose about the vertical axis y by its own angle."""
    angle = 2 * math.pi * torch.rand(len(batch[0]), generator=generator)
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    rows = ((cos, zero, sin), (zero, one, zero), (-sin, zero, cos))
    turns = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2).to(batch[0])
    return tuple(tensor @ turns.mT for tensor in batch)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    default = [*command.DEFAULT_METHODS, "resilient"]
    parser = command.parser(__doc__, out="mocap", epochs=100, samples=300, batch=20, lr=2e-3, default=default)
    parser.add_argument("--motion", choices=["walk", "run"], default="walk")
    parser.add_argument("--ahead", type=command.whole(1), default=30, help="frames from input to target")
    parser.add_argument("--width", type=command.whole(1), default=32, help="vectors in a layer")
    parser.add_argument("--layers", type=command.whole(1), default=3)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
