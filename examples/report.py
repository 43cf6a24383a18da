"""Tables and pictures of finished runs.

Enter the records that `harness.run` returned; leave a text table and PNG files. Called by the examples.
The one law: means come with their spread and the number of seeds, and a difference within the spread is called that.
"""

import csv
import json
import math
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib.pyplot as plt

Record = dict[str, Any]
COLUMNS = (
    ("method", 24),
    ("seeds", 6),
    ("test", 20),
    ("relaxed error", 14),
    ("before", 9),
    ("after", 9),
    ("parameters", 11),
    ("in training", 12),
    ("step ratio", 11),
)


def write(records: list[Record], folder: Path, *, metric: str, scale: float = 1.0) -> str:
    """Write `results.json` and the plots into a folder.

    Args:
        records: of all runs.
        folder: where the runs' histories lie.
        metric: name of the metric.
        scale: factor on the metric in the table, for readable digits.

    Returns:
        The table.
    """
    (folder / "results.json").write_text(json.dumps(records, indent=1))
    plot_validation(records, folder / "validation.png", metric)
    for record in records:
        history = folder / f"{record['method']}-{record['seed']}.csv"
        if history.exists() and history.stat().st_size > 100:
            plot_constraints(history, history.with_suffix(".png"))
    return table(records, metric=metric, scale=scale)


def table(records: list[Record], *, metric: str, scale: float = 1.0) -> str:
    """Lay out one row per method: mean +- spread over seeds, errors, parameters, step time over strict."""
    groups = _by_method(records)
    reference = {r["seed"]: r["step_ms"] for r in groups.get("strict", [])}
    unit = f"test {metric}" + (f" x {scale:g}" if scale != 1.0 else "") + ", mean +- standard deviation over seeds"
    lines = [
        unit,
        "".join(f"{name:<{width}}" if i == 0 else f"{name:>{width}}" for i, (name, width) in enumerate(COLUMNS)),
    ]
    for method, runs in groups.items():
        values = [scale * r["test"] for r in runs]
        ratios = [r["step_ms"] / reference[r["seed"]] for r in runs if r["seed"] in reference]
        cells = (
            method,
            str(len(runs)),
            f"{mean(values):.4g} +- {stdev(values):.2g}" if len(values) > 1 else f"{values[0]:.4g}",
            f"{max(r['error_relaxed'] for r in runs):.1e}",
            f"{max(r['error_before'] for r in runs):.1e}",
            f"{max(r['error_after'] for r in runs):.1e}",
            f"{runs[0]['parameters']:,}",
            f"{runs[0]['parameters_trained']:,}",
            f"{mean(ratios):.2f}" if ratios else "-",
        )
        lines.append(
            "".join(
                f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, (_, w)) in enumerate(zip(cells, COLUMNS, strict=True))
            )
        )
    return "\n".join(
        lines
        + [f"{method} against strict: {_verdict(groups, method, scale)}" for method in groups if method != "strict"]
    )


def _verdict(groups: dict[str, list[Record]], method: str, scale: float) -> str:
    """Say whether the paired difference to strict is resolved: its 95 % interval (Student's t) leaves out 0."""
    strict = {r["seed"]: scale * r["test"] for r in groups.get("strict", [])}
    gaps = [scale * r["test"] - strict[r["seed"]] for r in groups[method] if r["seed"] in strict]
    if len(gaps) < 2:
        return "not resolved (needs at least two seeds of both)"
    half = _STUDENT[min(len(gaps) - 1, len(_STUDENT)) - 1] * stdev(gaps) / math.sqrt(len(gaps))
    text = f"{mean(gaps):+.3g}, 95 % interval [{mean(gaps) - half:+.3g}, {mean(gaps) + half:+.3g}], {len(gaps)} seeds"
    if abs(mean(gaps)) <= half:
        return f"{text}: within seed noise, not resolved"
    return f"{text}: {'better' if mean(gaps) < 0 else 'worse'}"


# two-sided 95 % points of Student's t with 1, 2, ... degrees of freedom
_STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def plot_validation(records: list[Record], path: Path, metric: str) -> None:
    """Draw validation curves, terms off, of all methods side by side; one line per seed."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for i, (method, runs) in enumerate(_by_method(records).items()):
        for j, record in enumerate(runs):
            curve = record["curves"]["val"]
            axes.semilogy(range(1, len(curve) + 1), curve, color=f"C{i}", linewidth=1, label=None if j else method)
    axes.set_xlabel("epoch")
    axes.set_ylabel(f"validation {metric}, terms off")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_constraints(history: Path, path: Path) -> None:
    """Draw value, level and multiplier of every layer over steps from a monitor's CSV file."""
    series: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    with history.open() as file:
        for row in csv.DictReader(file):
            numbers = tuple(float(row[key]) for key in ("step", "value", "level", "multiplier"))
            series[row["constraint"]].append(numbers)
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 6.5), sharex=True, layout="constrained")
    for name, points in series.items():
        step, value, level, multiplier = zip(*points, strict=True)
        top.plot(step, value, linewidth=1, label=name)
        bottom.plot(step, multiplier, linewidth=1)
    top.plot(step, level, color="black", linestyle="--", linewidth=1, label="level")
    top.set_ylabel("size of the term (RMS output)")
    bottom.set_ylabel("multiplier")
    bottom.set_xlabel("optimizer step")
    top.legend(fontsize="x-small", ncols=2)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _by_method(records: list[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["method"], []).append(record)
    return groups
