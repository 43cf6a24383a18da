"""Every example in small: it runs, and what it leaves is as equivariant as the plain model."""

import importlib
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

CASES = [
    # batch norm over few, nearly constant vector lengths magnifies float32 rounding: in float64 the error is 1e-11
    ("pointcloud", "--samples 64 --points 48 --width 6 --neighbours 4 --batch 16", None, 3e-2),
    ("pointcloud", "--model dgcnn --samples 64 --points 48 --width 6 --neighbours 4 --batch 16", None, 3e-2),
    ("images", "--samples 16 --width 1 --rotations 4 --batch 8 --held-out 8", "escnn", 1e-4),
    ("molecules", "--samples 16 --hidden 4x0e+4x1o --layers 2 --batch 8", "e3nn", 1e-5),
    ("images", "--samples 16 --width 1 --rotations 4 --reflections --batch 8 --held-out 8", "escnn", 1e-4),
    ("smoke", "--samples 16 --width 1 --layers 2 --batch 8", "escnn", 1e-5),
    ("qm9", "--samples 16 --hidden 4x0e+4x1o --layers 2 --batch 8", "e3nn", 1e-5),
    ("mocap", "--samples 16 --width 4 --layers 1 --batch 8", None, 1e-5),
]


@pytest.mark.parametrize(
    ("name", "small", "framework", "tolerance"), CASES, ids=lambda value: value if isinstance(value, str) else None
)
def test_example_runs_in_small(name: str, small: str, framework: str | None, tolerance: float, tmp_path: Path) -> None:
    if framework is not None:
        pytest.importorskip(framework)
    example = importlib.import_module(f"examples.{name}")
    example.main([*small.split(), "--epochs", "6", "--seeds", "0", "--out", str(tmp_path)])
    records = json.loads((tmp_path / "results.json").read_text())
    found = {record["method"]: record for record in records}
    strict, ours = found["strict"], found["primal-dual"]
    assert set(found) >= {"strict", "gate", "primal-dual"}
    assert any(method.startswith("triangle") for method in found)
    assert ours["parameters_trained"] > strict["parameters_trained"] == ours["parameters"]
    assert ours["error_relaxed"] > 10 * strict["error_relaxed"]  # the symmetry was left
    assert ours["error_after"] < tolerance  # and is back
    if resilient := found.get("resilient"):
        assert resilient["kept"]
        assert resilient["error_after"] > tolerance
    assert all((tmp_path / picture).stat().st_size > 10_000 for picture in ("validation.png", "test.png"))


@pytest.mark.parametrize("name", ["images", "smoke"])
def test_without_escnn_its_examples_say_how_to_install_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "escnn", None)
    monkeypatch.delitem(sys.modules, "examples.models.steerable_cnn", raising=False)
    example = importlib.import_module(f"examples.{name}")
    with pytest.raises(SystemExit, match="0"):
        example.main(["--help"])
    with pytest.raises(SystemExit, match="2"):
        example.main(["--samples", "8", "--out", str(tmp_path)])
    assert 'pip install ".[escnn-deps]" && python -m pip install --no-deps escnn==' in capsys.readouterr().err


@pytest.mark.parametrize("rotations", ["6", "2", "0"])
def test_images_refuse_groups_without_quarter_turns(rotations: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module("examples.images").parse(["--rotations", rotations])
    assert f"--rotations: found '{rotations}': expected" in capsys.readouterr().err


def test_the_lie_penalty_on_images_is_refused_before_the_first_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("escnn")
    images = importlib.import_module("examples.images")
    small = ["--samples", "8", "--width", "1", "--held-out", "4", "--batch", "8", "--epochs", "1"]
    with pytest.raises(SystemExit, match="2"):
        images.main([*small, "--methods", "strict", "triangle", "--out", str(tmp_path)])
    assert "error: arm 'triangle' does not fit the task 'rotated images'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
