"""The fair comparison: strict, scheduled, gated, penalised and primal-dual training that differ in nothing else.

    python -m examples.benchmarks.compare run nbody --budget small
    python -m examples.benchmarks.compare run nbody --arms strict "strict x2" "primal-dual, no turns" --seeds 0 1 2 3
    python -m examples.benchmarks.compare run nbody --budget full --device cuda --arms strict primal-dual
    python -m examples.benchmarks.compare run nbody --with "--samples 1500"        # a point of a curve over samples
    python -m examples.benchmarks.compare report nbody --budget small

Each experiment is a file in `experiments/`: which example it runs, its arguments at each budget, and where its recorded
data lie below the folder named by `--data` or the environment variable CONSTRAINED_EQUIV_DATA. Without that folder the
example's simulator takes its place, and the report says so. Finished runs are kept in `records.jsonl`, one line each:
an interrupted comparison goes on with the same command and loses at most an epoch.
"""

import argparse
import importlib
import json
import os
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

from examples import command, harness, methods, report

EXPERIMENTS = Path(__file__).parent / "experiments"
NAMES = sorted(path.stem for path in EXPERIMENTS.glob("*.toml"))


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    for name in options.experiments or NAMES:
        experiment = tomllib.loads((EXPERIMENTS / f"{name}.toml").read_text())
        label = re.sub(r"[^\w.+]+", "-", options.more).strip("-")
        folder = options.out / "-".join(filter(None, (name, options.budget, label)))
        if options.action == "run":
            run(name, experiment, folder, options)
        summarise(name, experiment, folder)


def run(name: str, experiment: dict[str, Any], folder: Path, options: argparse.Namespace) -> None:
    """Train every arm with every seed that has no record yet; append records to `records.jsonl`."""
    example = importlib.import_module(f"examples.{experiment['example']}")
    root = options.data or os.environ.get("CONSTRAINED_EQUIV_DATA")
    recorded = Path(root, experiment["data"]) if root else None
    found = ["--data", str(recorded)] if recorded is not None and recorded.exists() else []
    written = f"{experiment[options.budget]['arguments']} {options.more}"
    given = example.parse([*shlex.split(written), *found, "--device", options.device])
    task = example.make_task(given)
    settings = harness.Settings(given.epochs, given.batch, given.lr, given.device)
    folder.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for arm in options.arms or experiment["arms"]:
            if any((record["method"], record["seed"]) == (arm, seed) for record in records(folder)):
                continue
            record = harness.run(task, methods.find(arm), seed, settings, folder, resume=True)
            record["source"] = "recorded" if found else "simulated"
            record["arguments"] = written.strip()
            with (folder / "records.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
            result = f"test {task.metric_name} {record['test']:.4g}, {record['cpu_seconds']:.0f} s of processor time"
            print(f"{name}: {arm}, seed {seed}: {result}", flush=True)


def summarise(name: str, experiment: dict[str, Any], folder: Path) -> None:
    """Print the tables of all finished runs of an experiment, write them to `report.md`, and draw them."""
    finished = records(folder)
    if not finished:
        print(f"{name}: no finished runs in {folder}; start them with: compare run {name}")
        return
    order = list(methods.METHODS)
    finished.sort(key=lambda r: (order.index(methods.find(r["family"]).base), r["family"], r["arm"]["rate"], r["seed"]))
    sources = ", ".join(sorted({record["source"] for record in finished}))
    first = finished[0]
    metric, scale = experiment["metric"], experiment.get("scale", 1.0)
    text = (
        f"## {name} ({sources} data, {first['samples']} training samples, {first['epochs']} epochs)\n\n"
        f"`{first['arguments']}`\n\n{report.tables(finished, metric=metric, scale=scale)}\n"
    )
    print(f"\n{text}")
    (folder / "report.md").write_text(text)
    report.plot_validation(finished, folder / "validation.png", metric, scale=scale)
    report.plot_tests(finished, folder / "test.png", metric, scale=scale)


def records(folder: Path) -> list[dict[str, Any]]:
    """Read the finished runs of a folder."""
    path = folder / "records.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "report"])
    parser.add_argument("experiments", nargs="*", metavar="experiment", help=f"{', '.join(NAMES)}; all by default")
    parser.add_argument("--budget", choices=["small", "full"], default="small")
    parser.add_argument("--arms", nargs="+", type=command.arm, metavar="ARM", help="those of the experiment by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--with", dest="more", default="", help="more arguments of the example; a folder of their own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", type=Path, help="root of the recorded data")
    parser.add_argument("--out", type=Path, default=Path("outputs/compare"))
    options = parser.parse_args(arguments)
    if unknown := set(options.experiments) - set(NAMES):
        parser.error(f"found experiments {sorted(unknown)}: expected some of {', '.join(NAMES)}")
    return options


if __name__ == "__main__":
    main()
