"""The fair comparison: strict, scheduled, gated, penalised and primal-dual training that differ in nothing else.

    python -m examples.benchmarks.compare run nbody --budget small
    python -m examples.benchmarks.compare run nbody --arms strict "strict x2" "primal-dual, no turns" --seeds 0 1 2 3
    python -m examples.benchmarks.compare run nbody --budget full --device cuda --arms strict primal-dual
    python -m examples.benchmarks.compare run nbody --with "--samples 1500"        # a point of a curve over samples
    python -m examples.benchmarks.compare report nbody --budget small

Each experiment is a file in `experiments/`: which example it runs, its arguments at each budget, and where its recorded
data lie below the folder named by `--data` or the environment variable CONSTRAINED_EQUIV_DATA. Where neither names a
folder the example's simulator takes its place, in an output folder of its own. What cannot be run, for an arm does not
fit or data or escnn are missing, is refused before the first run. Finished runs are kept in `records.jsonl`, one line
each: an interrupted comparison goes on with the same command and loses at most an epoch.
"""

import argparse
import importlib
import json
import os
import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples import command, harness, methods, report
from examples.methods import Method
from examples.task import Task

EXPERIMENTS = Path(__file__).parent / "experiments"
NAMES = sorted(path.stem for path in EXPERIMENTS.glob("*.toml"))


@dataclass(frozen=True)
class Plan:
    """The runs of one experiment.

    Attributes:
        name: of the experiment.
        task: what is learned.
        settings: how long.
        options: what determines the task.
        arguments: of the example, as written.
        source: of the data.
        folder: for records, checkpoints and reports.
        pending: arms and seeds that have no record yet.
    """

    name: str
    task: Task
    settings: harness.Settings
    options: dict[str, Any]
    arguments: str
    source: str
    folder: Path
    pending: list[tuple[Method, int]]


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    names = options.experiments or NAMES
    experiments = {name: tomllib.loads((EXPERIMENTS / f"{name}.toml").read_text()) for name in names}
    if options.action == "run":
        for prepared in [plan(name, experiment, options) for name, experiment in experiments.items()]:
            run(prepared)
            summarise(prepared.name, experiments[prepared.name], prepared.folder, prepared.source)
        return
    for name, experiment in experiments.items():
        folders = {source: folder_of(name, options, source) for source in ("recorded", "simulated")}
        finished = {source: folder for source, folder in folders.items() if records(folder, source)}
        for source, folder in finished.items():
            summarise(name, experiment, folder, source)
        if not finished:
            print(f"{name}: no finished runs in {folders['recorded']}; start them with: compare run {name}")


def plan(name: str, experiment: dict[str, Any], options: argparse.Namespace) -> Plan:
    """Make the task of an experiment and list its runs, or end the command where one of them cannot be run."""
    written = f"{experiment[options.budget]['arguments']} {options.more}".strip()
    try:
        example = importlib.import_module(f"examples.{experiment['example']}")
        recorded = recorded_data(name, experiment, options)
        found = [] if recorded is None else ["--data", str(recorded)]
        given = example.parse([*found, *shlex.split(written), "--device", options.device])
        task = example.make_task(given)
        settings = harness.Settings(given.epochs, given.batch, given.lr, given.device)
        source = "recorded" if given.data else "simulated"
        folder = folder_of(name, options, source)
        finished = records(folder, source)
        if others := {record["arguments"] for record in finished} - {written}:
            raise ValueError(
                f"{folder} holds runs of {others.pop()!r}: expected {written!r}; run into another folder with --out"
            )
        done = {(record["method"], record["seed"]) for record in finished}
        wanted = [(methods.find(arm), seed) for seed in options.seeds for arm in options.arms or experiment["arms"]]
        pending = [(arm, seed) for arm, seed in wanted if (arm.name, seed) not in done]
        chosen = command.task_options(given)
        harness.check(task, pending, settings, folder, options=chosen, resume=True)
    except command.UNUSABLE as error:
        command.refuse(f"experiment {name}: {error}")
    return Plan(name, task, settings, chosen, written, source, folder, pending)


def recorded_data(name: str, experiment: dict[str, Any], options: argparse.Namespace) -> Path | None:
    """Return where the recorded data of an experiment lie; None where no folder is named.

    Raises:
        FileNotFoundError: if a folder is named and they are not there.
    """
    root = options.data or os.environ.get("CONSTRAINED_EQUIV_DATA")
    if not root:
        return None
    path = Path(root, experiment["data"])
    if not path.exists():
        origin = "--data" if options.data else "CONSTRAINED_EQUIV_DATA"
        raise FileNotFoundError(
            f"found no {path}, expected the recorded data of {name} below {str(root)!r}, which {origin} names; leave "
            f"{origin} out to run on the simulator"
        )
    return path


def folder_of(name: str, options: argparse.Namespace, source: str) -> Path:
    """Return the output folder of an experiment: one for each budget, `--with` and source of the data."""
    label = re.sub(r"[^\w.+]+", "-", options.more).strip("-")
    simulated = "simulated" if source == "simulated" else ""
    return Path(options.out, "-".join(filter(None, (name, options.budget, label, simulated))))


def run(prepared: Plan) -> None:
    """Carry out the runs of a plan; append their records to `records.jsonl`."""
    prepared.folder.mkdir(parents=True, exist_ok=True)
    task, folder = prepared.task, prepared.folder
    for arm, seed in prepared.pending:
        record = harness.run(task, arm, seed, prepared.settings, folder, options=prepared.options, resume=True)
        record["source"] = prepared.source
        record["arguments"] = prepared.arguments
        with (folder / "records.jsonl").open("a") as file:
            file.write(json.dumps(record) + "\n")
        result = f"test {task.metric_name} {record['test']:.4g}, {record['cpu_seconds']:.0f} s of processor time"
        print(f"{prepared.name}: {arm.name}, seed {seed}: {result}", flush=True)


def summarise(name: str, experiment: dict[str, Any], folder: Path, source: str) -> None:
    """Print the tables of all finished runs of an experiment, write them to `report.md`, and draw them."""
    finished = records(folder, source)
    order = list(methods.METHODS)
    finished.sort(key=lambda r: (order.index(methods.find(r["family"]).base), r["family"], r["arm"]["rate"], r["seed"]))
    first = finished[0]
    metric, scale = experiment["metric"], experiment.get("scale", 1.0)
    text = (
        f"## {name} ({source} data, {first['samples']} training samples, {first['epochs']} epochs)\n\n"
        f"`{first['arguments']}`\n\n{report.tables(finished, metric=metric, scale=scale)}\n"
    )
    print(f"\n{text}")
    (folder / "report.md").write_text(text)
    report.plot_validation(finished, folder / "validation.png", metric, scale=scale)
    report.plot_tests(finished, folder / "test.png", metric, scale=scale)


def records(folder: Path, source: str) -> list[dict[str, Any]]:
    """Read the finished runs of a folder on data of one source, recorded or simulated."""
    path = folder / "records.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [record for record in found if record["source"] == source]


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "report"])
    parser.add_argument("experiments", nargs="*", metavar="experiment", help=f"{', '.join(NAMES)}; all by default")
    parser.add_argument("--budget", choices=["small", "full"], default="small")
    parser.add_argument(
        "--arms",
        nargs="+",
        type=command.arm,
        action=command.Distinct,
        metavar="ARM",
        help="those of the experiment by default",
    )
    parser.add_argument("--seeds", nargs="+", type=command.whole(0), action=command.Distinct, default=[0, 1, 2])
    parser.add_argument("--with", dest="more", default="", help="more arguments of the example; a folder of their own")
    parser.add_argument("--device", type=command.device, default="cpu")
    parser.add_argument("--data", type=Path, help="root of the recorded data")
    parser.add_argument("--out", type=Path, default=Path("outputs/compare"))
    options = parser.parse_args(arguments)
    if unknown := set(options.experiments) - set(NAMES):
        parser.error(f"found experiments {sorted(unknown)}: expected some of {', '.join(NAMES)}")
    return options


if __name__ == "__main__":
    main()
