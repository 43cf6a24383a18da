"""The main job: a steerable E(3) network learns charged five-body dynamics, strictly and through relaxation.

    python -m examples.nbody                      # about five minutes on two CPU cores, simulated data
    python -m examples.nbody --data PATH/nbody5_charged.npz
    python -m examples.nbody --resume             # after Ctrl-C: goes on from the last finished epoch

The published setting: `--samples 3000 --validation 2000 --hidden 32x0e+32x1o --layers 4 --batch 100 --epochs 1000
--seeds 0 1 2 --lr 5e-4` (hours on a CPU). Writes a table, `results.json` and plots into `--out`. The lines that use the
library are `make_task`'s symmetry here and `primal_dual` in `harness.py`.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import constrained_equiv as ce
from examples import harness, report
from examples.data import nbody
from examples.models.segnn import SEGNN


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    task = make_task(options)
    settings = harness.Settings(options.epochs, options.batch, options.lr, options.device)
    print(f"{len(task.train[0])} training samples, {options.epochs} epochs, methods {', '.join(options.methods)}")
    try:
        records = []
        for seed in options.seeds:
            for method in options.methods:
                record = harness.run(task, harness.METHODS[method], seed, settings, options.out, resume=options.resume)
                records.append(record)
                print(
                    f"{method}, seed {seed}: test MSE {record['test']:.4g} after {record['wall_seconds']:.0f} s",
                    flush=True,
                )
    except KeyboardInterrupt:
        raise SystemExit(
            f"\ninterrupted; {options.out} holds the last finished epoch: run again with --resume"
        ) from None
    print(f"\n{report.write(records, options.out, metric=task.metric_name, scale=1e3)}")
    print(f"\nresults.json and plots are in {options.out}")


def make_task(options: argparse.Namespace) -> harness.Task:
    """Predict positions 1.0 time units ahead from positions, velocities and charges."""
    counts = (options.samples, options.validation, options.validation)
    splits = nbody.load(options.data, counts) if options.data else nbody.simulate(counts, seed=options.data_seed)

    def loss(model: nn.Module, batch: harness.Batch) -> Tensor:
        positions, velocities, charges, targets = batch
        return (model(positions, velocities, charges) - targets).square().mean()

    @torch.no_grad()
    def metric(model: nn.Module, batch: harness.Batch) -> Tensor:
        return loss(model, batch)

    return harness.Task(
        name="charged N-body",
        build=lambda: SEGNN(options.hidden, layers=options.layers),
        train=splits.train.tensors,
        val=splits.val.tensors,
        test=splits.test.tensors,
        loss=loss,
        metric=metric,
        inputs=lambda batch: batch[:3],
        symmetry=ce.Symmetry(
            ce.groups.E3(), inputs=(ce.actions.points, ce.actions.vectors, None), outputs=ce.actions.points
        ),
        where=lambda name, layer: name.endswith((".update.0", ".update.1")),  # as published: the update products
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(harness.METHODS), default=list(harness.METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--epochs", type=int, default=150)
    parser.add_argument("--samples", type=int, default=500, help="training samples")
    parser.add_argument("--validation", type=int, default=500, help="validation and test samples, each")
    parser.add_argument("--hidden", default="16x0e+16x1o", help="irreps of the features")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", type=Path, help="file nbody5_charged.npz; simulated by default")
    parser.add_argument("--data-seed", type=int, default=0, help="seed of the simulator")
    parser.add_argument("--out", type=Path, default=Path("outputs/nbody"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
