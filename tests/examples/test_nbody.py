"""The main job in small: it runs, selects with the terms off, and goes on exactly after an interruption."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("e3nn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from examples import harness, methods, nbody, report
from examples.data.nbody import simulate

SMALL = "--epochs 6 --samples 24 --validation 16 --hidden 4x0e+4x1o --layers 1 --batch 8"


def options(folder: Path, *more: str) -> list[str]:
    return [*SMALL.split(), "--out", str(folder), *more]


def record(folder: Path, stem: str) -> dict[str, Any]:
    content = json.loads((folder / f"{stem}.json").read_text())
    return {key: value for key, value in content.items() if key not in ("step_ms", "wall_seconds", "cpu_seconds")}


def test_main_writes_table_results_and_plots(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nbody.main(options(tmp_path))
    printed = capsys.readouterr().out
    for method in ("strict", "triangle", "gate", "primal-dual"):
        assert method in printed
        assert record(tmp_path, f"{method}-1")["error_after"] < 1e-6
    assert "not resolved" in printed
    runs = {f"{method}-{seed}.png" for method in ("gate", "primal-dual") for seed in (0, 1)}
    assert {f.name for f in tmp_path.glob("*.png")} == {"validation.png", "test.png"} | runs
    assert len(json.loads((tmp_path / "results.json").read_text())) == 8


def test_relaxed_run_ends_with_the_plain_model_and_was_relaxed_before(tmp_path: Path) -> None:
    nbody.main(options(tmp_path, "--seeds", "0", "--methods", "strict", "primal-dual", "--epochs", "10"))
    plain, ours = record(tmp_path, "strict-0"), record(tmp_path, "primal-dual-0")
    assert ours["parameters"] == plain["parameters_trained"] < ours["parameters_trained"]
    assert ours["error_relaxed"] > 1e-3 > 1e-6 > ours["error_before"]
    assert ours["best_epoch"] >= 8  # selected after the level reached zero


@pytest.mark.parametrize("method", ["strict", "primal-dual"])
def test_interrupted_run_resumes_exactly(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = ("--methods", method, "--seeds", "3")
    nbody.main(options(tmp_path / "whole", *chosen))

    original, calls = harness._epoch, []

    def interrupted(*arguments: Any) -> float:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(harness, "_epoch", interrupted)
    with pytest.raises(SystemExit, match="--resume"):
        nbody.main(options(tmp_path / "parts", *chosen))
    monkeypatch.undo()
    nbody.main(options(tmp_path / "parts", *chosen, "--resume"))
    assert record(tmp_path / "parts", f"{method}-3") == record(tmp_path / "whole", f"{method}-3")
    if method == "primal-dual":
        histories = [(tmp_path / part / "primal-dual-3.csv").read_text() for part in ("whole", "parts")]
        assert histories[0] == histories[1]


def test_runs_whose_names_hold_dots_keep_apart(tmp_path: Path) -> None:
    nbody.main(options(tmp_path, "--methods", "strict x0.5", "--seeds", "0", "1", "--resume"))
    assert {path.name for path in tmp_path.glob("*.pt")} == {"strict x0.5-0.pt", "strict x0.5-1.pt"}


@pytest.mark.parametrize(
    ("more", "there", "here"),
    [
        ("--lr 1e-4", "lr=0.004", "lr=0.0001"),
        ("--data-seed 1", "options.data_seed=0", "options.data_seed=1"),
        ("--validation 8", "options.validation=16", "options.validation=8"),
        ("--hidden 2x0e+2x1o", "options.hidden='4x0e+4x1o'", "options.hidden='2x0e+2x1o'"),
        ("--ten-bodies 2", "options.ten_bodies=0", "options.ten_bodies=2"),
    ],
)
def test_resume_refuses_another_run_and_says_what_differs(
    more: str, there: str, here: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ("--methods", "strict", "--seeds", "0")
    nbody.main(options(tmp_path, *chosen))
    before = (tmp_path / "strict-0.pt").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        nbody.main(options(tmp_path, *chosen, "--resume", *more.split()))
    printed = capsys.readouterr().err
    assert f"strict-0.pt was written with {there}: expected {here}; repeat the options" in printed
    assert (tmp_path / "strict-0.pt").read_bytes() == before


def test_an_arm_that_does_not_fit_is_refused_before_the_first_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        nbody.main(options(tmp_path, "--methods", "strict", "strict, muon"))
    assert "error: arm 'strict, muon' does not fit the task 'charged N-body'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_data_may_be_a_folder_or_its_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits = simulate((2, 1, 1), seed=3)
    arrays: dict[str, Any] = {"frame": np.array([30, 40])}
    for part, samples in zip(splits._fields, splits, strict=True):
        places = torch.stack([samples.positions, samples.targets], dim=1).numpy()
        speeds = torch.stack([samples.velocities] * 2, dim=1).numpy()
        arrays |= {f"loc_{part}": places, f"vel_{part}": speeds, f"charge_{part}": samples.charges.numpy()}
    np.savez(tmp_path / "nbody5_charged.npz", **arrays)
    for path in (tmp_path, tmp_path / "nbody5_charged.npz"):
        loaded = nbody.make_task(nbody.parse(["--data", str(path), "--samples", "2", "--validation", "1"]))
        assert torch.equal(loaded.train[0], splits.train.positions)
    with pytest.raises(SystemExit, match="2"):
        nbody.main(["--data", str(tmp_path / "elsewhere")])
    assert f"error: found no file '{tmp_path / 'elsewhere'}', expected nbody5_charged.npz" in capsys.readouterr().err


def test_whole_pipeline_is_equivariant_in_float64(float64_default: None) -> None:
    import constrained_equiv as ce

    task = nbody.make_task(
        nbody.parse(["--samples", "8", "--validation", "8", "--hidden", "4x0e+4x1o", "--layers", "2"])
    )
    model = task.build(1.0)
    optimizer = methods.prepare(methods.find("primal-dual"), model, task, steps=20, lr=1e-3)
    batch = tuple(tensor.double() for tensor in task.train)
    for _ in range(20):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    ce.finalize(model, optimizer=optimizer)
    ce.assert_equivariant(model, task.inputs(batch), symmetry=task.symmetry, tolerance=1e-13)


def test_verdict_needs_the_interval_to_leave_out_zero() -> None:
    def runs(method: str, values: list[float]) -> list[dict[str, Any]]:
        return [{"method": method, "seed": seed, "test": value} for seed, value in enumerate(values)]

    strict = runs("strict", [1.0, 2.0, 3.0])
    assert report.difference(runs("a", [0.9, 1.91, 2.89]), strict).verdict == "better"
    assert report.difference(runs("a", [1.1, 2.09, 3.11]), strict).verdict == "worse"
    assert report.difference(runs("a", [0.5, 2.4, 3.0]), strict).verdict == "not resolved"
    assert report.difference(runs("a", [0.9]), strict).verdict == "not resolved"
    assert report.difference(runs("a", [math.nan, 1.0, 2.0]), strict).verdict == "not resolved"
    assert torch.tensor(report._STUDENT).diff().max() < 0
