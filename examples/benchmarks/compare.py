"""The fair comparison: strict, scheduled, gated, penalised and primal-dual training that differ in nothing else.

    python -m examples.benchmarks.compare run nbody --budget small
    python -m examples.benchmarks.compare run nbody --budget full --device cuda --arms strict primal-dual
    python -m examples.benchmarks.compare report nbody --budget small

Each experiment is a file in `experiments/`: which example it runs, its arguments at each budget, and where its recorded
data lie below the folder named by `--data` or the environment variable CONSTRAINED_EQUIV_DATA. Without that folder the
example's simulator takes its place, and the report says so. Finished runs are kept: an interrupted comparison goes on
with the same command and loses at most an epoch.
"""

import argparse
import importlib
import json
import os
import shlex
import tomllib
from pathlib import Path
from typing import Any

from examples import harness, report
from examples.methods import METHODS

EXPERIMENTS = Path(__file__).parent / "experiments"


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    for name in options.experiments or sorted(path.stem for path in EXPERIMENTS.glob("*.toml")):
        experiment = tomllib.loads((EXPERIMENTS / f"{name}.toml").read_text())
        folder = options.out / f"{name}-{options.budget}"
        if options.action == "run":
            run(name, experiment, folder, options)
        summarise(name, experiment, folder)


def run(name: str, experiment: dict[str, Any], folder: Path, options: argparse.Namespace) -> None:
    """Train every arm with every seed that has no record yet; append records to `records.jsonl`."""
    example = importlib.import_module(f"examples.{experiment['example']}")
    root = options.data or os.environ.get("CONSTRAINED_EQUIV_DATA")
    recorded = Path(root, experiment["data"]) if root else None
    found = ["--data", str(recorded)] if recorded is not None and recorded.exists() else []
    given = example.parse([*shlex.split(experiment[options.budget]["arguments"]), *found, "--device", options.device])
    task = example.make_task(given)
    settings = harness.Settings(given.epochs, given.batch, given.lr, given.device)
    folder.mkdir(parents=True, exist_ok=True)
    done = {(record["method"], record["seed"]) for record in records(folder)}
    for seed in options.seeds:
        for arm in options.arms or experiment["arms"]:
            if (arm, seed) in done:
                continue
            record = harness.run(task, METHODS[arm], seed, settings, folder, resume=True)
            record["source"] = "recorded" if found else "simulated"
            with (folder / "records.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
            print(f"{name}: {arm}, seed {seed}: test {task.metric_name} {record['test']:.4g}", flush=True)


def summarise(name: str, experiment: dict[str, Any], folder: Path) -> None:
    """Print the table of all finished runs of an experiment and draw their validation curves."""
    finished = records(folder)
    if not finished:
        print(f"{name}: no finished runs in {folder}; start them with: compare run {name}")
        return
    order = {arm: position for position, arm in enumerate(METHODS)}
    finished.sort(key=lambda record: (order[record["method"]], record["seed"]))
    sources = ", ".join(sorted({record["source"] for record in finished}))
    print(f"\n## {name} ({sources} data, {finished[0]['samples']} samples, {finished[0]['epochs']} epochs)\n")
    print(report.table(finished, metric=experiment["metric"], scale=experiment.get("scale", 1.0)))
    report.plot_validation(finished, folder / "validation.png", experiment["metric"])


def records(folder: Path) -> list[dict[str, Any]]:
    """Read the finished runs of a folder."""
    path = folder / "records.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "report"])
    parser.add_argument("experiments", nargs="*", help="names of files in experiments/; all by default")
    parser.add_argument("--budget", choices=["small", "full"], default="small")
    parser.add_argument("--arms", nargs="+", choices=list(METHODS), help="those of the experiment by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--data", type=Path, help="root of the recorded data")
    parser.add_argument("--out", type=Path, default=Path("outputs/compare"))
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
