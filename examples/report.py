"""Tables and pictures of finished runs.

Enter the records that `harness.run` returned; leave Markdown tables and PNG files. Called by examples and benchmarks.
The one law: means come with their spread and the number of seeds, and a difference is called better or worse only where
the 95 % interval of the differences between runs of one seed leaves out 0.
"""

import csv
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import matplotlib.pyplot as plt

Record = dict[str, Any]


class Difference(NamedTuple):
    """A method minus a reference, over the seeds that both have.

    Attributes:
        mean: of the differences; negative is better.
        half: half the 95 % interval (Student's t); infinite below two seeds.
        seeds: how many.
    """

    mean: float
    half: float
    seeds: int

    @property
    def verdict(self) -> str:
        """`better` or `worse` where the interval leaves out 0, else `not resolved`."""
        if not abs(self.mean) > self.half:
            return "not resolved"
        return "better" if self.mean < 0 else "worse"

    def __str__(self) -> str:
        if self.seeds < 2:
            return "not resolved (fewer than 2 seeds)"
        return f"{self.mean:+.3g} [{self.mean - self.half:+.3g}, {self.mean + self.half:+.3g}] {self.verdict}"


def write(records: list[Record], folder: Path, *, metric: str, scale: float = 1.0) -> str:
    """Write `results.json` and the plots into a folder.

    Args:
        records: of all runs.
        folder: where the runs' histories lie.
        metric: name of the metric.
        scale: factor on the metric in tables and plots, for readable digits.

    Returns:
        The tables.
    """
    (folder / "results.json").write_text(json.dumps(records, indent=1))
    plot_validation(records, folder / "validation.png", metric, scale=scale)
    plot_tests(records, folder / "test.png", metric, scale=scale)
    for record in records:
        history = folder / f"{record['method']}-{record['seed']}.csv"
        if history.exists() and history.stat().st_size > 100:
            plot_constraints(history, history.with_suffix(".png"))
    return tables(records, metric=metric, scale=scale)


def tables(records: list[Record], *, metric: str, scale: float = 1.0) -> str:
    """Lay out the main table and, where there are any, those of further tests and of terms that stayed."""
    named = f"{metric} x {scale:g}" if scale != 1.0 else metric
    parts = [
        f"Test {named}: mean ± standard deviation over seeds; differences between runs of one seed with 95 % interval.",
        table(records, scale=scale),
        *(f"{name}:\n\n{extra_table(records, name, scale)}" for name in records[0]["extra"]),
    ]
    if kept := kept_table(records):
        parts.append(f"Size of the terms that stayed (RMS output), mean over seeds:\n\n{kept}")
    if notes := {note: record["method"] for record in records for note in record["notes"]}:
        parts.append("\n".join(f"{method}: {note}" for note, method in notes.items()))
    return "\n\n".join(parts)


def table(records: list[Record], *, scale: float = 1.0) -> str:
    """One row per arm: metric, differences to strict and to tuned strict, equivariance errors, size, step time."""
    groups, references = _by_method(records), _references(records)
    strict_time = {r["seed"]: r["step_ms"] for r in records if r["method"] == "strict"}
    header = ["arm", "seeds", "test", "validation", *(f"test minus {name}" for name in references)]
    header += ["equivariance error relaxed", "after", "parameters trained", "step over strict"]
    rows = []
    for name, runs in groups.items():
        ratios = [r["step_ms"] / strict_time[r["seed"]] for r in runs if r["seed"] in strict_time]
        rows.append(
            [
                name,
                str(len(runs)),
                _spread([scale * r["test"] for r in runs]),
                f"{scale * mean(r['val'] for r in runs):.4g}",
                *(
                    "" if _same(runs, reference) else str(difference(runs, reference, scale=scale))
                    for reference in references.values()
                ),
                f"{max(r['error_relaxed'] for r in runs):.1e}",
                f"{max(r['error_after'] for r in runs):.1e}",
                f"{runs[0]['parameters_trained']:,}",
                f"{mean(ratios):.2f}" if ratios else "",
            ]
        )
    return markdown(header, rows)


def extra_table(records: list[Record], name: str, scale: float) -> str:
    """One row per arm: a further test, and differences to the references in it."""
    groups, references = _by_method(records), _references(records)
    rows = []
    for arm, runs in groups.items():
        values = [scale * r["extra"][name] for r in runs]
        gaps = (
            "" if _same(runs, reference) else str(difference(runs, reference, scale=scale, extra=name))
            for reference in references.values()
        )
        rows.append([arm, _spread(values), *gaps])
    return markdown(["arm", "mean ± sd", *(f"minus {reference}" for reference in references)], rows)


def kept_table(records: list[Record]) -> str:
    """One row per layer, one column per arm that kept terms; empty where none did."""
    arms = {name: runs for name, runs in _by_method(records).items() if any(r["kept"] for r in runs)}
    layers = list(dict.fromkeys(layer for runs in arms.values() for r in runs for layer in r["kept"]))
    rows = [
        [layer, *(f"{mean(r['kept'].get(layer, 0.0) for r in runs):.3g}" for runs in arms.values())] for layer in layers
    ]
    return markdown(["layer", *arms], rows) if arms else ""


def tuned_strict(records: list[Record]) -> tuple[str, list[Record]] | None:
    """Choose among all runs of the plain network, whatever its optimizer and rate, by validation alone.

    Args:
        records: of all runs.

    Returns:
        The name of the arm whose mean validation metric over the seeds that all of these have is best, and its runs;
        None where there are fewer than two. A widened network is another network.
    """
    plain = {
        name: runs
        for name, runs in _by_method(records).items()
        if runs[0]["arm"]["recipe"] == "strict" and not runs[0]["arm"]["widen"]
    }
    if len(plain) < 2:
        return None
    common = set.intersection(*({r["seed"] for r in runs} for runs in plain.values()))
    if not common:
        return None

    def validation(name: str) -> float:
        value = mean(r["val"] for r in plain[name] if r["seed"] in common)
        return math.inf if math.isnan(value) else value

    best = min(plain, key=validation)
    return best, plain[best]


def difference(
    runs: Sequence[Record], reference: Sequence[Record], *, scale: float = 1.0, extra: str | None = None
) -> Difference:
    """Compare the tests of two arms seed by seed.

    Args:
        runs: of one arm.
        reference: of the other.
        scale: factor on the metric.
        extra: name of a further test; the main one by default.
    """

    def value(record: Record) -> float:
        return scale * float(record["test"] if extra is None else record["extra"][extra])

    other = {r["seed"]: value(r) for r in reference}
    gaps = [value(r) - other[r["seed"]] for r in runs if r["seed"] in other]
    if len(gaps) < 2:
        return Difference(mean(gaps) if gaps else math.nan, math.inf, len(gaps))
    quantile = _STUDENT[min(len(gaps) - 1, len(_STUDENT)) - 1]
    return Difference(mean(gaps), quantile * deviation(gaps) / math.sqrt(len(gaps)), len(gaps))


def deviation(values: Sequence[float]) -> float:
    """Standard deviation; not a number where a run diverged."""
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))


# two-sided 95 % points of Student's t with 1, 2, ... degrees of freedom
_STUDENT = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a Markdown table whose source is readable as well."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def plot_validation(records: list[Record], path: Path, metric: str, *, scale: float = 1.0) -> None:
    """Draw validation curves of all arms, the mean over seeds and the range between them."""
    groups = _by_method(records)
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for i, (method, runs) in enumerate(groups.items()):
        epochs = [1 + epoch for epoch, _ in runs[0]["curves"]["val"]]
        values = list(zip(*([scale * value for _, value in r["curves"]["val"]] for r in runs), strict=True))
        style = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3]}
        axes.plot(epochs, [mean(v) for v in values], linewidth=1.5, label=method, **style)
        axes.fill_between(epochs, [min(v) for v in values], [max(v) for v in values], color=f"C{i % 10}", alpha=0.12)
    axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.set_ylabel(_label("validation", metric, scale))
    axes.set_title("validation as the test will be: terms off unless they are folded or kept", fontsize="medium")
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_tests(records: list[Record], path: Path, metric: str, *, scale: float = 1.0) -> None:
    """Draw the test metric of every arm: a dot per seed and a bar at the mean."""
    groups = _by_method(records)
    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.32 * len(groups)), layout="constrained")
    for i, runs in enumerate(groups.values()):
        values = [scale * r["test"] for r in runs]
        axes.plot(values, [i] * len(values), "o", color="C0", alpha=0.5, markersize=5)
        axes.plot(mean(values), i, "|", color="black", markersize=16)
    if "strict" in groups:
        axes.axvline(scale * mean(r["test"] for r in groups["strict"]), color="black", linestyle="--", linewidth=0.8)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.invert_yaxis()
    axes.set_xlabel(f"{_label('test', metric, scale)}; dot: a seed, bar: mean, dashed: strict")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_constraints(history: Path, path: Path) -> None:
    """Draw value, level and multiplier of every layer over steps from a monitor's CSV file."""
    series: dict[str, list[tuple[float, ...]]] = defaultdict(list)
    with history.open() as file:
        for row in csv.DictReader(file):
            numbers = tuple(float(row[key]) for key in ("step", "value", "level", "multiplier"))
            series[row["constraint"]].append(numbers)
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6.5), sharex=True, layout="constrained")
    for i, (name, points) in enumerate(series.items()):
        step, value, level, multiplier = zip(*points, strict=True)
        style = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3], "linewidth": 1}
        top.plot(step, value, label=name, **style)
        bottom.plot(step, multiplier, **style)
    top.plot(step, level, color="black", linestyle="-.", linewidth=1.5, label="level")
    top.set_ylabel("size of the term (RMS output)")
    bottom.set_ylabel("multiplier")
    bottom.set_xlabel("optimizer step")
    figure.legend(*top.get_legend_handles_labels(), loc="outside right upper", fontsize="x-small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _references(records: list[Record]) -> dict[str, list[Record]]:
    """Strict, and the best of its kind on validation, where several were run."""
    references = {name: runs for name, runs in _by_method(records).items() if name == "strict"}
    best = tuned_strict(records)
    if best is not None:
        references[f"tuned strict ({best[0]})"] = best[1]
    return references


def _same(runs: Sequence[Record], reference: Sequence[Record]) -> bool:
    """Whether an arm is its own reference."""
    return bool(reference) and runs[0]["method"] == reference[0]["method"]


def _spread(values: Sequence[float]) -> str:
    return f"{mean(values):.4g} ± {deviation(values):.2g}" if len(values) > 1 else f"{values[0]:.4g}"


def _label(split: str, metric: str, scale: float) -> str:
    return f"{split} {metric}" + (f" x {scale:g}" if scale != 1.0 else "")


def _by_method(records: list[Record]) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["method"], []).append(record)
    return groups
