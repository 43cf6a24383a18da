"""Laws of the point clouds: centred, of unit radius, seeded splits; rotations uniform on SO(3)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Generator, Tensor

from examples.data import modelnet
from examples.data._npz import Splits

ROOT = os.environ.get("CONSTRAINED_EQUIV_DATA")


@pytest.fixture(params=["synthetic", "stored", "real"])
def splits(request: pytest.FixtureRequest, tmp_path: Path) -> Splits[modelnet.Clouds]:
    """Clouds from each source; "stored" is a small file in the layout of the real one, one shape in ten empty."""
    if request.param == "synthetic":
        return modelnet.synthetic(40, points=50)
    if request.param == "stored":
        return modelnet.load(write(tmp_path), points=50)
    if ROOT is None:
        pytest.skip("CONSTRAINED_EQUIV_DATA does not name the folder of the data sets")
    return modelnet.load(Path(ROOT) / "modelnet10", points=50)


def write(folder: Path) -> Path:
    generator, arrays = np.random.default_rng(0), {}
    for part, count in (("train", 50), ("test", 20)):
        arrays[f"pts_{part}"] = generator.integers(3, 27, size=(count, 1024, 3), dtype=np.uint8)
        arrays[f"n_{part}"] = np.where(np.arange(count) % 10, 900, 0).astype(np.int16)
        arrays[f"y_{part}"] = generator.integers(10, size=count, dtype=np.uint8)
    np.savez(folder / modelnet.FILE, **arrays)
    return folder


def test_clouds_are_centred_and_of_unit_radius(splits: Splits[modelnet.Clouds]) -> None:
    for clouds in splits:
        assert clouds.points.shape[1:] == (50, 3)
        assert clouds.points.mean(1).abs().max() < 1e-5
        torch.testing.assert_close(clouds.points.norm(dim=2).amax(1), torch.ones(len(clouds)))


def test_no_two_points_of_a_cloud_coincide(splits: Splits[modelnet.Clouds]) -> None:
    points = splits.test.points
    assert (torch.cdist(points, points) + torch.eye(50)).amin() > 0


def test_empty_shapes_are_dropped_and_a_fraction_is_held_out(tmp_path: Path) -> None:
    splits = modelnet.load(write(tmp_path), validation=0.2)
    assert tuple(map(len, splits)) == (36, 9, 18)


def test_the_seed_chooses_what_is_held_out(tmp_path: Path) -> None:
    first, again, other = (modelnet.load(write(tmp_path), seed=seed).val.points for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("classes", [2, 6])
def test_every_kind_of_solid_is_drawn(classes: int) -> None:
    clouds = modelnet.synthetic(200, classes=classes).train
    assert set(clouds.labels.tolist()) == set(range(classes))


@pytest.mark.parametrize("kind", modelnet.SOLIDS)
def test_solids_may_be_absent(kind: str) -> None:
    assert modelnet.SOLIDS[kind](0, 5, Generator()).shape == (0, 5, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: modelnet.synthetic(8, classes=7), "found classes=7, expected 2 to 6"),
        (lambda: modelnet.synthetic(0), "found count=0, expected at least 1"),
        (lambda: modelnet.load("", points=0), "found points=0, expected 1 to 1024"),
        (lambda: modelnet.load("", validation=1.5), "found validation=1.5, expected a fraction"),
    ],
)
def test_errors_say_what_was_found_and_what_was_expected(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


@pytest.fixture(scope="module")
def rotations() -> Tensor:
    return modelnet.random_rotations(20_000, Generator().manual_seed(0))


def test_rotations_are_proper(rotations: Tensor) -> None:
    torch.testing.assert_close(rotations @ rotations.mT, torch.eye(3).expand_as(rotations), atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(rotations), torch.ones(len(rotations)))


def test_rotations_are_uniform(rotations: Tensor) -> None:
    """Moments of the uniform measure: E R = 0, E R_ij R_kl = delta / 3, and E (tr R)^n = 0, 1, 1, 3 (n = 1 to 4)."""
    flat, trace = rotations.flatten(1), rotations.diagonal(dim1=1, dim2=2).sum(1)
    assert flat.mean(0).abs().max() < 0.02
    assert (flat.T @ flat / len(flat) - torch.eye(9) / 3).abs().max() < 0.02
    for power, moment in ((1, 0.0), (2, 1.0), (3, 1.0), (4, 3.0)):
        assert float(trace.pow(power).mean()) == pytest.approx(moment, abs=0.15)
