"""Laws of the data: one table of sources, one law for each test, then what is particular to each source."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from examples.data import mnist_rot, mocap, modelnet, qm9, rmd17, smoke
from examples.data._npz import Samples, Splits, cut, read_npz, with_held_out

Make = Callable[..., Splits[Any]]
ROOT = os.environ.get("CONSTRAINED_EQUIV_DATA")


@dataclass(frozen=True)
class Source:
    """One data set: how it is simulated and loaded, its file, the split sizes and one sample's shapes when loaded."""

    synthetic: Make
    load: Make
    folder: str
    file: str
    sizes: tuple[int, int, int]
    shapes: Mapping[str, tuple[int, ...]]
    bad: dict[str, Any]
    floats: dict[str, torch.dtype] = field(default_factory=dict)


MOVING = {"positions": (31, 3), "velocities": (31, 3), "targets": (31, 3), "edges": (30, 2)}
IMAGES = {"images": (1, 28, 28), "labels": (), "angles": ()}
MOLECULE = {"numbers": (9,), "positions": (9, 3), "energies": (), "forces": (9, 3)}
SOURCES = {
    "modelnet": Source(
        modelnet.synthetic,
        partial(modelnet.load, points=64),
        "modelnet10",
        "modelnet10_pc1024.npz",
        (3586, 398, 907),
        {"points": (64, 3), "labels": ()},
        {"points": 2000},
    ),
    "rmd17": Source(
        rmd17.synthetic,
        rmd17.load,
        "rmd17",
        "rmd17_ethanol.npz",
        (950, 50, 1000),
        MOLECULE,
        {"molecule": "water"},
        {"energies": torch.float64},
    ),
    "mnist-rotated": Source(
        mnist_rot.synthetic,
        mnist_rot.load,
        "mnist_rot",
        "mnist_12k_10k_rotated.npz",
        (10000, 2000, 10000),
        IMAGES,
        {"pose": "sideways"},
    ),
    "mnist-upright": Source(
        partial(mnist_rot.synthetic, pose="upright"),
        partial(mnist_rot.load, pose="upright"),
        "mnist_rot",
        "mnist_12k_10k_upright.npz",
        (10000, 2000, 10000),
        IMAGES,
        {"pose": "sideways"},
    ),
    "smoke": Source(
        smoke.synthetic,
        partial(smoke.load, coarsen=4, history=2),
        "smoke_plume",
        "smoke64.npz",
        (16 * 49, 4 * 49, 4 * 49),
        {"inputs": (4, 16, 16), "targets": (2, 16, 16), "directions": ()},
        {"history": 51},
    ),
    "qm9": Source(
        qm9.synthetic,
        qm9.load,
        "qm9_subset",
        "qm9_train.npz",
        (20000, 2000, 5000),
        {"numbers": (29,), "positions": (29, 3), "charges": (29,), "targets": ()},
        {"target": "colour"},
        {"targets": torch.float64},
    ),
    "walk": Source(
        mocap.synthetic, mocap.load, "cmu_mocap", "walk_subject35.npz", (900, 400, 500), MOVING, {"ahead": 31}
    ),
    "run": Source(
        mocap.synthetic,
        partial(mocap.load, motion="run"),
        "cmu_mocap",
        "run_subject09.npz",
        (400, 240, 240),
        MOVING,
        {"motion": "fly"},
    ),
}

each_source = pytest.mark.parametrize("source", [pytest.param(source, id=name) for name, source in SOURCES.items()])
on_files = pytest.mark.skipif(ROOT is None, reason="CONSTRAINED_EQUIV_DATA does not name the folder of the data sets")


def equal(a: Samples, b: Samples) -> bool:
    return all(map(torch.equal, a.tensors, b.tensors))


def check_tensors(splits: Splits[Any], floats: dict[str, torch.dtype]) -> None:
    for samples in splits:
        for name, tensor in vars(samples).items():
            wanted = floats.get(name, torch.float32) if tensor.is_floating_point() else torch.int64
            assert tensor.dtype == wanted, name
            assert tensor.isfinite().all(), name
            assert tensor.shape[1:] == getattr(splits.train, name).shape[1:], name


@each_source
def test_simulated_data_have_the_counts_and_types_asked_for(source: Source) -> None:
    splits = source.synthetic(12, seed=1)
    assert tuple(map(len, splits)) == (12, 3, 3)
    check_tensors(splits, source.floats)
    assert set(vars(splits.train)) == set(source.shapes)


@each_source
def test_simulated_data_repeat_with_the_seed_and_differ_without(source: Source) -> None:
    one, again, other = (source.synthetic(8, seed=seed) for seed in (1, 1, 2))
    assert all(map(equal, one, again))
    assert not equal(one.train, other.train)


@each_source
def test_simulating_leaves_the_global_random_state_alone(source: Source) -> None:
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    source.synthetic(4)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # type: ignore[index]


@each_source
def test_a_missing_file_is_an_error_that_names_it(source: Source, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"found no such folder, expected the file .*synthetic"):
        source.load(tmp_path / "nowhere")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileNotFoundError, match=r"found \['notes.txt'\] in it, expected the file .*\.npz in "):
        source.load(tmp_path)


@each_source
def test_a_file_in_place_of_its_folder_is_an_error_that_names_the_folder(source: Source, tmp_path: Path) -> None:
    (tmp_path / source.file).touch()
    with pytest.raises(NotADirectoryError, match=f"found the file .*expected the folder .*pass '{tmp_path}'"):
        source.load(tmp_path / source.file)


@each_source
def test_a_file_of_something_else_is_an_error_that_says_so(source: Source, tmp_path: Path) -> None:
    (tmp_path / source.file).write_text("version https://git-lfs")
    with pytest.raises(ValueError, match=r"found 23 bytes in .* no npz archive"):
        source.load(tmp_path)
    np.savez(tmp_path / source.file, other=np.zeros(3))
    with pytest.raises(ValueError, match=r"found arrays \['other'\] in .*, expected also"):
        source.load(tmp_path)


@each_source
def test_a_wrong_argument_is_named_with_its_value(source: Source, tmp_path: Path) -> None:
    ((name, value),) = source.bad.items()
    if name == "history":  # known to be too long only once the file is read
        frames = np.zeros((6, 51, 2, 64, 64), dtype=np.float16)
        np.savez(tmp_path / source.file, vel=frames, config=np.arange(6), direction=np.zeros(6, dtype=int))
    with pytest.raises(ValueError, match=f"found .*{name}={value!r}.*, expected"):
        source.load(tmp_path, **source.bad)


@each_source
@on_files
def test_loaded_data_have_the_published_sizes(source: Source) -> None:
    assert ROOT is not None
    splits = source.load(Path(ROOT) / source.folder)
    assert tuple(map(len, splits)) == source.sizes
    check_tensors(splits, source.floats)
    assert {name: tuple(value.shape[1:]) for name, value in vars(splits.train).items()} == source.shapes


def test_shapes_are_checked_across_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", z=np.zeros(4), R=np.zeros((2, 5, 3)))
    with pytest.raises(ValueError, match=r"found shape \(2, 5, 3\) for 'R' in a.npz, expected \(frames, 4, 3\)"):
        read_npz(tmp_path, "a.npz", {"z": ("atoms",), "R": ("frames", "atoms", 3)})
    assert read_npz(tmp_path, "a.npz", {"z": ("atoms",), "R": ("frames", "joints", 3)})["R"].shape == (2, 5, 3)


@pytest.mark.parametrize("count", [1, 3, 4, 10])
def test_cutting_hands_out_every_row_once(count: int) -> None:
    rows = torch.arange(with_held_out(count))
    splits = cut(modelnet.Clouds(rows, rows), count)
    assert len(splits.train) == count
    assert min(map(len, splits)) >= 1
    assert torch.equal(torch.cat([samples.points for samples in splits]), rows)


def test_rows_must_match() -> None:
    with pytest.raises(ValueError, match=r"found \{'points': 2, 'labels': 3\} rows"):
        modelnet.Clouds(torch.zeros(2), torch.zeros(3))


def test_simulated_forces_are_minus_the_gradient_of_the_energy() -> None:
    frames = rmd17.synthetic(4, seed=3).train
    x, step = frames.positions.double(), 1e-5
    found = torch.empty_like(x)
    for atom in range(x.shape[1]):
        for axis in range(3):
            shift = torch.zeros_like(x)
            shift[:, atom, axis] = step
            found[:, atom, axis] = (rmd17.energy(x - shift) - rmd17.energy(x + shift)) / (2 * step)
    torch.testing.assert_close(found, frames.forces.double(), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(rmd17.energy(x), frames.energies)
    assert frames.forces.sum(1).abs().max() < 1e-4


def test_simulated_letters_turn_counter_clockwise_with_their_angle(monkeypatch: pytest.MonkeyPatch) -> None:
    letters = [mnist_rot._draw("713", angle, 28, np.random.default_rng(0)) for angle in (0.0, math.pi / 2)]
    np.testing.assert_allclose(np.rot90(letters[0]), letters[1], atol=1e-12)
    assert letters[0][-8:].sum() > letters[0][:8].sum()  # the foot of an L is at the bottom


@pytest.mark.parametrize("breaking", [0.0, 0.3])
def test_simulated_flow_commutes_with_quarter_turns_unless_broken(breaking: float) -> None:
    flows = smoke.synthetic(8, breaking=breaking, history=2).train
    for name in ("inputs", "targets"):
        first, second = getattr(flows, name)[0::4], getattr(flows, name)[1::4]
        error = float((smoke.quarter_turn(first) - second).norm() / second.norm())
        assert error < 1e-5 if breaking == 0 else error > 0.1
    assert torch.equal(smoke.quarter_turn(flows.inputs, 4), flows.inputs)
    assert torch.equal(smoke.quarter_turn(smoke.quarter_turn(flows.inputs), 3), flows.inputs)


@pytest.mark.parametrize("count", [1, 5, 10, 16])
def test_a_simulated_set_up_is_in_one_split_only(count: int) -> None:
    splits = smoke.synthetic(count, breaking=0.0, history=2)
    assert [len(flows) for flows in splits] == [count, max(count // 4, 1), max(count // 4, 1)]
    assert all(torch.equal(flows.directions, torch.arange(len(flows)) % 4) for flows in splits)
    uprights = [flows.inputs[i].sub(flows.inputs[i].mean()) for flows in splits for i in range(0, len(flows), 4)]
    turned = torch.stack([smoke.quarter_turn(upright, k) for upright in uprights for k in range(4)])
    found = torch.cdist(turned.flatten(1), turned.flatten(1)).fill_diagonal_(1.0)
    assert found.min() > 1e-3  # no two of the first of each four are one another turned


@on_files
def test_smoke_keeps_only_the_directions_asked_for() -> None:
    assert ROOT is not None
    splits = smoke.load(Path(ROOT) / "smoke_plume", coarsen=8, directions=(0, 2))
    assert [len(flows) for flows in splits] == [8 * 50, 2 * 50, 2 * 50]
    assert set(splits.train.directions.tolist()) == {0, 2}


def test_simulated_molecules_have_an_invariant_property_and_no_net_charge() -> None:
    molecules = qm9.synthetic(16, seed=5).train
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0))).Q
    order = torch.randperm(molecules.numbers.shape[1], generator=torch.Generator().manual_seed(0))
    moved = qm9.screened_repulsion(molecules.numbers[:, order], (molecules.positions @ turn.T + 1)[:, order])
    torch.testing.assert_close(moved, molecules.targets, atol=1e-4, rtol=1e-5)
    assert molecules.charges.sum(1).abs().max() < 1e-5
    assert (molecules.positions[molecules.numbers == 0] == 0).all()


def test_simulated_walker_keeps_its_bones_and_falls_along_y() -> None:
    motions = mocap.synthetic(16, seed=2).train
    for positions in (motions.positions, motions.targets):
        bones = positions.gather(1, motions.edges[..., 1:].expand(-1, -1, 3)) - positions.gather(
            1, motions.edges[..., :1].expand(-1, -1, 3)
        )
        lengths = torch.tensor([length for _, _, length in mocap.BONES])
        assert (bones.norm(dim=2) - lengths).abs().max() < 0.05
    assert motions.velocities[:, :2, 1].abs().max() == 0
    below = motions.positions[:, 3, 1] < motions.positions[:, 0, 1]
    assert below.float().mean() > 0.8
