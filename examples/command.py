"""The command line that all examples share: options in, table and plots out.

The one law: what cannot be run is refused before the first run, with exit status 2 and a line that names the value
found and what was expected.
"""

import argparse
import importlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import torch

from examples import harness, methods, report
from examples.task import Task

DEFAULT_METHODS = ("strict", "triangle", "gate", "primal-dual")

UNUSABLE = (ValueError, OSError, ImportError)
"""What `make_task` and `harness.check` raise for options that cannot be run."""

# what `harness` knows of a run besides, and what changes no result
_NOT_OF_THE_TASK = {"methods", "seeds", "epochs", "samples", "batch", "lr", "device", "out", "resume"}


class Distinct(argparse.Action):
    """Refuse a value that is given twice: a run that is counted twice makes every interval too short."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        if len(set(values)) < len(values):
            raise argparse.ArgumentError(self, f"found {' '.join(map(str, values))}: expected each of them once")
        setattr(namespace, self.dest, values)


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
    result.add_argument(
        "--methods", nargs="+", type=arm, action=Distinct, metavar="ARM", default=list(default), help=arms
    )
    result.add_argument("--seeds", nargs="+", type=whole(0), action=Distinct, default=[0, 1])
    result.add_argument("--epochs", type=whole(1), default=epochs)
    result.add_argument("--samples", type=whole(1), default=samples, help="training samples")
    result.add_argument("--batch", type=whole(1), default=batch)
    result.add_argument("--lr", type=positive, default=lr)
    result.add_argument("--device", type=device, default="cpu")
    result.add_argument("--data", type=Path, help="recorded data; simulated by default")
    result.add_argument("--data-seed", type=whole(0), default=0, help="seed of the simulator")
    result.add_argument("--out", type=Path, default=Path("outputs", out))
    result.add_argument(
        "--resume", action="store_true", help="go on from the checkpoints in --out; repeat all other options"
    )
    return result


def arm(name: str) -> str:
    """Return the name of an arm, or tell argparse which there are."""
    try:
        return methods.find(name).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def whole(least: int) -> Callable[[str], int]:
    """Return a type for argparse: whole numbers of at least `least`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"found {text!r}: expected a whole number of at least {least}")
        return value

    return read


def positive(text: str) -> float:
    """Read a finite number above 0 for argparse."""
    return _number(text, lambda value: 0 < value < math.inf, "a finite number above 0")


def fraction(text: str) -> float:
    """Read a number from 0 to below 1 for argparse."""
    return _number(text, lambda value: 0 <= value < 1, "a number from 0 to below 1")


def device(text: str) -> str:
    """Return the name of a device that is there, for argparse."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"found {text!r}: expected a device of this machine ({reason})") from None
    return text


def widened(irreps: str, width: float) -> str:
    """Multiply the multiplicities of e3nn's irreps: `widened("8x0e+4x1o", 1.5)` is `"12x0e+6x1o"`."""
    parts = (part.strip().split("x") for part in irreps.split("+"))
    return "+".join(f"{max(1, round(width * int(count)))}x{irrep}" for count, irrep in parts)


def steerable() -> ModuleType:
    """Return `examples.models.steerable_cnn`.

    Raises:
        ModuleNotFoundError: if escnn, or a package that it needs, is not installed; with the line that installs it.
    """
    try:
        return importlib.import_module("examples.models.steerable_cnn")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}: this example expects escnn (Linux x86-64, Python 3.11 or 3.12); install it by\n"
            '  python -m pip install ".[escnn-deps]" && python -m pip install --no-deps escnn==1.0.11'
        ) from None


def task_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the options that determine the task, data and model, as strings, numbers and None."""
    return {
        name: str(value.resolve()) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name not in _NOT_OF_THE_TASK
    }


def refuse(error: object) -> NoReturn:
    """Print what is wrong and end with the exit status of a wrong command line."""
    print(f"error: {error}", file=sys.stderr)
    raise SystemExit(2)


def run(make_task: Callable[[argparse.Namespace], Task], options: argparse.Namespace, *, scale: float = 1.0) -> None:
    """Train every method with every seed, then print the table and write results and plots.

    Args:
        make_task: makes what is learned out of the options.
        options: of `parser`.
        scale: factor on the metric in the table.
    """
    settings = harness.Settings(options.epochs, options.batch, options.lr, options.device)
    runs = [(methods.find(name), seed) for seed in options.seeds for name in options.methods]
    chosen = {"options": task_options(options), "resume": options.resume}
    try:
        task = make_task(options)
        harness.check(task, runs, settings, options.out, **chosen)
    except UNUSABLE as error:
        refuse(error)
    print(f"{task.name}: {len(task.train[0])} training samples, {options.epochs} epochs, {', '.join(options.methods)}")
    records = []
    try:
        for method, seed in runs:
            record = harness.run(task, method, seed, settings, options.out, **chosen)
            records.append(record)
            result = f"test {task.metric_name} {record['test']:.4g}"
            print(f"{method.name}, seed {seed}: {result} after {record['wall_seconds']:.0f} s", flush=True)
    except KeyboardInterrupt:
        raise SystemExit(
            f"\ninterrupted; {options.out} holds the last finished epoch: repeat the command with --resume added"
        ) from None
    print(f"\n{report.write(records, options.out, metric=task.metric_name, scale=scale)}")
    print(f"\nresults.json and plots are in {options.out}")


def _number(text: str, fits: Callable[[float], bool], expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not fits(value):
        raise argparse.ArgumentTypeError(f"found {text!r}: expected {expected}")
    return value
