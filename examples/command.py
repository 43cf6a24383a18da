"""The command line that all examples share: options in, table and plots out."""

import argparse
from pathlib import Path

from examples import harness, report
from examples.methods import METHODS


def parser(description: str, *, out: str, epochs: int, samples: int, batch: int, lr: float) -> argparse.ArgumentParser:
    """Return a parser with the shared options; an example adds its own.

    Args:
        description: the example's docstring.
        out: name of the default output folder, inside `outputs`.
        epochs: default number of passes.
        samples: default number of training samples.
        batch: default batch size.
        lr: default initial learning rate.
    """
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--methods", nargs="+", choices=list(METHODS), default=["strict", "triangle", "primal-dual"])
    result.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    result.add_argument("--epochs", type=int, default=epochs)
    result.add_argument("--samples", type=int, default=samples, help="training samples")
    result.add_argument("--batch", type=int, default=batch)
    result.add_argument("--lr", type=float, default=lr)
    result.add_argument("--device", default="cpu")
    result.add_argument("--data", type=Path, help="recorded data; simulated by default")
    result.add_argument("--data-seed", type=int, default=0, help="seed of the simulator")
    result.add_argument("--out", type=Path, default=Path("outputs", out))
    result.add_argument("--resume", action="store_true", help="go on from the checkpoints in --out")
    return result


def run(task: harness.Task, options: argparse.Namespace, *, scale: float = 1.0) -> None:
    """Train every method with every seed, then print the table and write results and plots.

    Args:
        task: what is learned.
        options: of `parser`.
        scale: factor on the metric in the table.
    """
    settings = harness.Settings(options.epochs, options.batch, options.lr, options.device)
    print(f"{task.name}: {len(task.train[0])} training samples, {options.epochs} epochs, {', '.join(options.methods)}")
    records = []
    try:
        for seed in options.seeds:
            for method in options.methods:
                record = harness.run(task, METHODS[method], seed, settings, options.out, resume=options.resume)
                records.append(record)
                result = f"test {task.metric_name} {record['test']:.4g}"
                print(f"{method}, seed {seed}: {result} after {record['wall_seconds']:.0f} s", flush=True)
    except KeyboardInterrupt:
        raise SystemExit(
            f"\ninterrupted; {options.out} holds the last finished epoch: run again with --resume"
        ) from None
    print(f"\n{report.write(records, options.out, metric=task.metric_name, scale=scale)}")
    print(f"\nresults.json and plots are in {options.out}")
