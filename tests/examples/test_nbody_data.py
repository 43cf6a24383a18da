"""The charged five-body data obey the recipe of the field: its physics, its draws, and the stored trajectories."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.data.nbody import advance, load, sample_start, simulate

STORED = Path("nbody_charged") / "nbody5_charged.npz"


@pytest.fixture
def stored_path() -> Path:
    folder = os.environ.get("CONSTRAINED_EQUIV_DATA")
    if not folder:
        pytest.skip("set CONSTRAINED_EQUIV_DATA to the folder that holds nbody_charged/nbody5_charged.npz")
    return Path(folder) / STORED


def literal_force(positions, charges):
    """The published force on each particle of one system, one pair at a time."""
    force = np.zeros_like(positions)
    for i in range(len(charges)):
        for j in range(len(charges)):
            if i != j:
                between = positions[i] - positions[j]
                force[i] += charges[i] * charges[j] * between / np.linalg.norm(between) ** 3
    return np.clip(force, -100.0, 100.0)


def energy(positions, velocities, charges):
    """Kinetic plus potential energy of one system."""
    potential = sum(
        charges[i] * charges[j] / np.linalg.norm(positions[i] - positions[j])
        for i in range(len(charges))
        for j in range(i)
    )
    return 0.5 * (velocities**2).sum() + potential


@pytest.fixture(scope="module")
def calm():
    """Starts without close pairs: no force is clipped, no error is amplified."""
    rng = np.random.default_rng(7)
    corners = 2.0 * np.array([[0, 0, 0], [1, 1, 0], [1, 0, 1], [0, 1, 1], [2, 2, 2]], dtype=float)
    positions = corners + 0.2 * rng.standard_normal((6, 5, 3))
    return positions, 0.3 * rng.standard_normal((6, 5, 3)), rng.choice([-1.0, 1.0], (6, 5))


def test_advance_agrees_with_a_literal_loop():
    positions, velocities, charges = sample_start(3, 0)
    fast = advance(positions, velocities, charges, steps=50)
    for _ in range(50):
        for system in range(3):
            velocities[system] += 1e-3 * literal_force(positions[system], charges[system])
            positions[system] += 1e-3 * velocities[system]
    np.testing.assert_allclose(fast[0], positions, rtol=0, atol=1e-12)
    np.testing.assert_allclose(fast[1], velocities, rtol=0, atol=1e-12)


def test_force_is_clipped_per_component():
    positions = np.array([[[0.0, 0.0, 0.0], [0.05, 0.01, 0.0]]])
    _, velocities = advance(positions, np.zeros_like(positions), np.ones((1, 2)), steps=1)
    expected = 1e-3 * literal_force(positions[0], np.ones(2))
    np.testing.assert_allclose(velocities[0], expected, rtol=1e-12)
    assert np.abs(velocities[0, :, 0]).tolist() == [0.1, 0.1] and 0 < velocities[0, 1, 1] < 0.1


@pytest.mark.parametrize("count", [1, 6])
def test_advance_joins_without_a_seam_and_leaves_its_arguments_alone(calm, count):
    arguments = [array[:count].copy() for array in calm]
    positions, velocities, charges = arguments
    joined = advance(*advance(positions, velocities, charges, steps=40), charges, steps=60)
    np.testing.assert_array_equal(np.stack(joined), np.stack(advance(positions, velocities, charges, steps=100)))
    for array, original in zip(arguments, calm, strict=True):
        np.testing.assert_array_equal(array, original[:count])


def test_advance_refuses(calm):
    positions, velocities, charges = calm
    with pytest.raises(ValueError, match=r"charges \(5,\)"):
        advance(positions, velocities, charges[0], steps=1)
    with pytest.raises(ValueError, match="steps=-1"):
        advance(positions, velocities, charges, steps=-1)


def test_momentum_is_conserved(calm):
    positions, velocities, charges = calm
    _, later = advance(positions, velocities, charges, steps=500)
    np.testing.assert_allclose(later.sum(1), velocities.sum(1), rtol=0, atol=1e-12)


def test_energy_error_is_of_second_order(calm):
    positions, velocities, charges = calm

    def error(time_step):
        def half_kick(x, v, sign):
            return v + sign * 0.5 * time_step * np.stack(
                [literal_force(*pair) for pair in zip(x, charges, strict=True)]
            )

        x, v = advance(
            positions, half_kick(positions, velocities, -1), charges, steps=round(1 / time_step), time_step=time_step
        )
        v = half_kick(x, v, +1)
        pairs = zip(zip(x, v, charges, strict=True), zip(positions, velocities, charges, strict=True), strict=True)
        return np.array([energy(*after) - energy(*before) for after, before in pairs])

    coarse, fine = error(4e-2), error(1e-2)
    assert np.abs(fine).max() < 1e-4
    np.testing.assert_allclose(np.linalg.norm(coarse) / np.linalg.norm(fine), 16.0, rtol=0.05)


def test_start_has_the_published_distribution():
    positions, velocities, charges = sample_start(20_000, 1)
    assert set(np.unique(charges)) == {-1.0, 1.0}
    assert abs(charges.mean()) < 5 / np.sqrt(charges.size)
    np.testing.assert_allclose(np.linalg.norm(velocities, axis=-1), 0.5, rtol=1e-12)
    np.testing.assert_allclose((velocities**2).mean((0, 1)), 0.25 / 3, rtol=0.02)
    np.testing.assert_allclose(positions.mean((0, 1)), 0.0, atol=5 / np.sqrt(1e5))
    np.testing.assert_allclose(positions.std((0, 1)), 1.0, rtol=0.02)
    assert np.abs(positions).max() <= 5.0


def test_frames_count_from_the_first_hundred_steps():
    start = sample_start(2, np.random.SeedSequence(5).spawn(3)[0])
    first = simulate((2, 0, 0), seed=5, input_frame=0, target_frame=1).train
    positions, velocities = advance(*start, steps=100)
    targets, _ = advance(positions, velocities, start[2], steps=100)
    np.testing.assert_allclose(first.positions, positions, rtol=1e-6)
    np.testing.assert_allclose(first.velocities, velocities, rtol=1e-6)
    np.testing.assert_allclose(first.targets, targets, rtol=1e-6)


def test_simulate_is_determined_by_the_seed():
    def draw(counts, seed):
        return simulate(counts, seed=seed, input_frame=0, target_frame=1)

    once, again, fewer, other = draw((6, 4, 4), 3), draw((6, 4, 4), 3), draw((2, 4, 0), 3), draw((6, 4, 4), 4)
    for first, second in zip(once, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first.tensors, second.tensors, strict=True))
    torch.testing.assert_close(fewer.train.targets, once.train.targets[:2])
    torch.testing.assert_close(fewer.val.targets, once.val.targets)
    assert len(fewer.test) == 0
    assert not torch.equal(other.train.positions, once.train.positions)
    assert not torch.equal(once.train.positions[:4], once.val.positions)


def test_simulate_returns_float32_of_the_stated_shapes():
    splits = simulate((3, 2, 1), seed=0, input_frame=0, target_frame=1)
    for split, count in zip(splits, (3, 2, 1), strict=True):
        assert [tuple(t.shape) for t in split.tensors] == [(count, 5, 3), (count, 5, 3), (count, 5), (count, 5, 3)]
        assert {t.dtype for t in split.tensors} == {torch.float32}


@pytest.mark.parametrize(
    ("counts", "keywords", "message"),
    [
        ((1, 1), {"seed": 0}, "counts=.*three non-negative"),
        ((1, -1, 1), {"seed": 0}, "counts=.*three non-negative"),
        ((1, 1, 1), {"seed": -1}, "seed=-1"),
        ((1, 1, 1), {"seed": 0, "input_frame": 40, "target_frame": 30}, "input_frame=40 and target_frame=30"),
    ],
)
def test_simulate_refuses(counts, keywords, message):
    with pytest.raises(ValueError, match=message):
        simulate(counts, **keywords)


def write(path, **changes):
    rng = np.random.default_rng(0)
    arrays = {"frame": np.array([30, 40])}
    for name in ("train", "val", "test"):
        arrays |= {f"loc_{name}": rng.standard_normal((4, 2, 5, 3)), f"vel_{name}": rng.standard_normal((4, 2, 5, 3))}
        arrays[f"charge_{name}"] = rng.choice([-1, 1], (4, 5)).astype(np.int8)
    arrays |= changes
    np.savez(path, **{key: array for key, array in arrays.items() if array is not None})
    return arrays


def test_load_reads_the_first_of_each_split(tmp_path):
    arrays = write(tmp_path / "data.npz")
    splits = load(tmp_path / "data.npz", (4, 2, 1))
    assert [len(split) for split in splits] == [4, 2, 1]
    np.testing.assert_array_equal(splits.val.positions, arrays["loc_val"][:2, 0].astype(np.float32))
    np.testing.assert_array_equal(splits.val.velocities, arrays["vel_val"][:2, 0].astype(np.float32))
    np.testing.assert_array_equal(splits.val.targets, arrays["loc_val"][:2, 1].astype(np.float32))
    np.testing.assert_array_equal(splits.val.charges, arrays["charge_val"][:2])
    assert splits.val.charges.dtype == torch.float32


def test_load_refuses_a_path_without_trajectories(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"found no file .*nbody5_charged\.npz.*expected"):
        load(tmp_path)
    (tmp_path / "nbody5_charged.npz").write_text("version https://git-lfs")
    with pytest.raises(ValueError, match=r"found 23 bytes in .* no npz archive"):
        load(tmp_path)


def test_load_refuses_what_is_not_there(tmp_path):
    write(tmp_path / "data.npz")
    with pytest.raises(ValueError, match=r"target_frame=41 is not stored; pass one of \[30, 40\]"):
        load(tmp_path / "data.npz", target_frame=41)
    with pytest.raises(ValueError, match=r"holds \(4, 4, 4\)"):
        load(tmp_path / "data.npz", (5, 1, 1))
    write(tmp_path / "data.npz", vel_val=None)
    with pytest.raises(ValueError, match=r"lacks \['vel_val'\]"):
        load(tmp_path / "data.npz")


def test_stored_frames_follow_from_each_other(stored_path):
    """Each stored frame restarts to the next within the rounding of the stored numbers.

    A frame is stored in float32, half a unit in the last place of numbers up to 8; close encounters amplify that, hence
    quantiles for most systems and a looser bound for all.
    """
    with np.load(stored_path) as file:
        positions, velocities = file["loc_test"][:300], file["vel_test"][:300]
        charges = file["charge_test"][:300]
    for frame in range(positions.shape[1] - 1):
        next_positions, next_velocities = advance(positions[:, frame], velocities[:, frame], charges, steps=100)
        position_error = np.abs(next_positions - positions[:, frame + 1]).max((1, 2))
        velocity_error = np.abs(next_velocities - velocities[:, frame + 1]).max((1, 2))
        assert np.quantile(position_error, 0.95) < 5e-7 and np.quantile(velocity_error, 0.9) < 1e-6
    assert position_error.max() < 1e-3


def test_simulated_data_resemble_the_stored_ones(stored_path):
    """The error of two baselines agrees: constant velocity, and no motion."""
    stored, fresh = load(stored_path).train, simulate((1_000, 0, 0), seed=0).train
    for horizon in (1.0, 0.0):
        errors = [((s.positions + horizon * s.velocities - s.targets) ** 2).mean((1, 2)) for s in (stored, fresh)]
        spread = sum(error.var() / len(error) for error in errors).sqrt()
        assert abs(errors[0].mean() - errors[1].mean()) < 4 * spread
