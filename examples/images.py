"""Classify rotated digits with a steerable CNN, strictly and through relaxation.

    python -m examples.images                                   # drawn letters, a few minutes on two CPU cores
    python -m examples.images --data FOLDER                     # with mnist_12k_10k_rotated.npz: rotated MNIST
    python -m examples.images --reflections --rotations 4       # another group

The published setting: `--samples 10000 --width 24 --epochs 40 --batch 64` (a GPU). The term is a kernel, added to
the expanded filter of each `R2Conv`, so that one convolution does both. Needs escnn.
"""

import argparse
from typing import Literal

import torch
from torch import Tensor, nn

import constrained_equiv as ce
from examples import command
from examples.data import mnist_rot
from examples.data._npz import Splits
from examples.task import Batch, Task


def main(arguments: list[str] | None = None) -> None:
    command.run(make_task, parse(arguments), scale=100)


def make_task(options: argparse.Namespace) -> Task:
    """Name the digit, however it is turned."""
    network = command.steerable().SteerableCNN

    def load(pose: Literal["rotated", "upright"]) -> Splits[mnist_rot.Images]:
        if options.data:
            return mnist_rot.load(options.data, pose=pose)
        return mnist_rot.synthetic(options.samples, seed=options.data_seed, pose=pose)

    splits = load("rotated")
    if options.upright:
        splits = load("upright")._replace(test=splits.test)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    @torch.no_grad()
    def error_rate(model: nn.Module, batch: Batch) -> Tensor:
        return (model(batch[0]).argmax(-1) != batch[1]).float().mean()

    # other turns of the network's group hold as well as pixels allow: the check takes those that the grid carries
    group = ce.groups.dihedral(4) if options.reflections else ce.groups.cyclic(4)
    return Task(
        name="rotated images",
        build=lambda width: network(
            10, width=round(width * options.width), rotations=options.rotations, reflections=options.reflections
        ),
        train=tuple(tensor[: options.samples] for tensor in splits.train.tensors),
        val=splits.val.select(slice(0, options.held_out)).tensors,
        test=splits.test.select(slice(0, options.held_out)).tensors,
        loss=loss,
        metric=error_rate,
        inputs=lambda batch: batch[0],
        symmetry=ce.Symmetry(group, inputs=ce.actions.pixels, outputs=None),
        augment=turn,
        metric_name="error rate",
    )


def turn(batch: Batch, generator: torch.Generator) -> Batch:
    """Turn every image by a random multiple of 90 degrees."""
    images, *rest = batch
    turns = torch.randint(4, (len(images),), generator=generator).tolist()
    return torch.stack([image.rot90(k, (-2, -1)) for image, k in zip(images, turns, strict=True)]), *rest


def quarters(text: str) -> int:
    """Read the order of a group of rotations that holds the quarter turns, by which batches are turned and checked."""
    count = command.whole(4)(text)
    if count % 4:
        raise argparse.ArgumentTypeError(
            f"found {text!r}: expected a multiple of 4, for batches are turned by 90 degrees"
        )
    return count


def parse(arguments: list[str] | None) -> argparse.Namespace:
    # the Lie derivative is undefined for kernels of groups that the grid does not carry, so that the triangle's penalty
    # is the distance from equivariance, which vanishes where the Lie derivative does
    default = ["strict", "triangle, distance", "gate", "primal-dual"]
    parser = command.parser(__doc__, out="images", epochs=8, samples=500, batch=32, lr=2e-3, default=default)
    parser.add_argument("--width", type=command.whole(1), default=2, help="24 is the published size")
    parser.add_argument("--rotations", type=quarters, default=8, help="order of the group, a multiple of 4")
    parser.add_argument("--reflections", action="store_true")
    parser.add_argument("--upright", action="store_true", help="train on upright images, test on turned ones")
    parser.add_argument(
        "--held-out", type=command.whole(1), default=2_000, help="images to validate and to test, at most"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
