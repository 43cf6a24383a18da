"""Classify point clouds in random poses with vector neurons, strictly and through relaxation.

    python -m examples.pointcloud                               # parametric solids, a few minutes on two CPU cores
    python -m examples.pointcloud --data FOLDER                 # with modelnet10_pc1024.npz: ModelNet10
    python -m examples.pointcloud --model dgcnn --resume

The published setting: `--samples 3586 --points 300 --width 64 --epochs 200 --batch 24` (a GPU). nn.Linear does not tell
that its features are vectors, so the lines that use the library say so: `where` and `adapter` below.
"""

import argparse

import torch
from torch import Tensor, nn

import constrained_equiv as ce
from examples import command
from examples.data import modelnet
from examples.models.vector_neurons import VNDGCNN, VNLinear, VNPointNet
from examples.task import Batch, Task

MODELS = {"pointnet": VNPointNet, "dgcnn": VNDGCNN}


def main(arguments: list[str] | None = None) -> None:
    command.run(make_task, parse(arguments), scale=100)


def make_task(options: argparse.Namespace) -> Task:
    """Name the shape, whatever its pose: those to validate and to test are in random poses."""
    if options.data:
        splits = modelnet.load(options.data, points=options.points, seed=options.data_seed)
        classes = len(modelnet.CLASSES)
    else:
        splits = modelnet.synthetic(options.samples, points=options.points, seed=options.data_seed)
        classes = len(modelnet.SOLIDS)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.2 if model.training else 0.0)

    @torch.no_grad()
    def error_rate(model: nn.Module, batch: Batch) -> Tensor:
        return (model(batch[0]).argmax(-1) != batch[1]).float().mean()

    poses = torch.Generator().manual_seed(options.data_seed)
    return Task(
        name=f"point clouds, {options.model}",
        build=lambda width: MODELS[options.model](
            classes, width=round(width * options.width), k=options.neighbours, dropout=options.dropout
        ),
        train=tuple(tensor[: options.samples] for tensor in splits.train.tensors),
        val=turn(splits.val.tensors, poses),
        test=turn(splits.test.tensors, poses),
        loss=loss,
        metric=error_rate,
        inputs=lambda batch: batch[0],
        symmetry=ce.Symmetry(ce.groups.SO3(), inputs="1x1", outputs=None),
        # the pooling direction only picks a maximum and has no gradient
        where=lambda name, layer: isinstance(layer, VNLinear) and not name.endswith("pool.direction"),
        adapter=ce.adapters.vector_neurons(),
        augment=turn,
        metric_name="error rate",
    )


def turn(batch: Batch, generator: torch.Generator) -> Batch:
    """Rotate every cloud at random."""
    clouds, labels = batch
    return clouds @ modelnet.random_rotations(len(clouds), generator).to(clouds), labels


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command.parser(__doc__, out="pointcloud", epochs=20, samples=600, batch=16, lr=2e-3)
    parser.add_argument("--model", choices=list(MODELS), default="pointnet")
    parser.add_argument("--points", type=command.whole(1), default=128)
    parser.add_argument("--width", type=command.whole(1), default=12, help="64 is the published size")
    parser.add_argument("--neighbours", type=command.whole(1), default=10)
    parser.add_argument("--dropout", type=command.fraction, default=0.0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
