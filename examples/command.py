"""The command line that all examples share: options in, table and plots out."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from examples import harness, methods, report
from examples.task import Task

DEFAULT_METHODS = ("strict", "triangle", "gate", "primal-dual")


def parser(
    description: str,
    *,
    out: str,
    epochs: int,
    samples: int,
    batch: int,
    lr: float,
    default: Sequence[str] = DEFAULT_METHODS,
) -> argparse.ArgumentParser:
    """Return a parser with the shared options; an example adds its own.

    Args:
        description: the example's docstring.
        out: name of the default output folder, inside `outputs`.
        epochs: default number of passes.
        samples: default number of training samples.
        batch: default batch size.
        lr: default initial learning rate.
        default: arms that run without --methods.
    """
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    arms = f"arms of methods.py, for example {', '.join(default)} (the default)"
    result.add_argument("--methods", nargs="+", type=arm, metavar="ARM", default=list(default), help=arms)
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


def arm(name: str) -> str:
    """Return the name of an arm, or tell argparse which there are."""
    try:
        return methods.find(name).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def widened(irreps: str, width: float) -> str:
    """Multiply the multiplicities of e3nn's irreps: `widened("8x0e+4x1o", 1.5)` is `"12x0e+6x1o"`."""
    parts = (part.strip().split("x") for part in irreps.split("+"))
    return "+".join(f"{max(1, round(width * int(count)))}x{irrep}" for count, irrep in parts)


def run(task: Task, options: argparse.Namespace, *, scale: float = 1.0) -> None:
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
                record = harness.run(task, methods.find(method), seed, settings, options.out, resume=options.resume)
                records.append(record)
                result = f"test {task.metric_name} {record['test']:.4g}"
                print(f"{method}, seed {seed}: {result} after {record['wall_seconds']:.0f} s", flush=True)
    except KeyboardInterrupt:
        raise SystemExit(
            f"\ninterrupted; {options.out} holds the last finished epoch: run again with --resume"
        ) from None
    print(f"\n{report.write(records, options.out, metric=task.metric_name, scale=scale)}")
    print(f"\nresults.json and plots are in {options.out}")
