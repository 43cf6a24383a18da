"""The arms of the comparison: they differ in what they name, end as they say, and are compared fairly."""

import copy
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import constrained_equiv as ce
from examples import harness, methods, mocap, optimizers, pointcloud, report
from examples.benchmarks import compare
from examples.methods import METHODS
from examples.task import Batch, Task

SMALL = "--samples 16 --width 4 --layers 1 --batch 8 --epochs 6"
SETTINGS = harness.Settings(epochs=6, batch_size=8, lr=1e-2)


@pytest.fixture(scope="module")
def task() -> Task:
    """A small one whose layers are quick to build."""
    task = mocap.make_task(mocap.parse(SMALL.split()))
    halves = lambda name, layer: task.where is not None and task.where(name, layer) and "block" in name  # noqa: E731
    return replace(task, published=halves)


@pytest.mark.parametrize("name", METHODS)
def test_every_arm_ends_as_it_says(name: str, task: Task, tmp_path: Path) -> None:
    method = METHODS[name]
    record = harness.run(task, method, 0, SETTINGS, tmp_path)
    assert math.isfinite(record["test"])
    assert record["best_epoch"] == SETTINGS.selection_starts == 5
    if method.recipe != "strict":
        assert record["parameters_trained"] > record["parameters"]
    if method.ends == "keep":
        assert record["kept"]
        assert record["error_after"] > 1e-3
    else:
        assert not record["kept"]
        assert record["error_after"] < 1e-6
    if method.recipe in ("level", "gate", "ridge") and method.start and method.until > 0.2:
        assert record["error_relaxed"] > 1e-4  # the symmetry was left
    json.dumps(record)


@pytest.mark.parametrize("name", ["strict x2", "gate", "primal-dual", "folded, no turns", "triangle", "strict, muon"])
def test_arms_of_a_seed_start_alike_and_see_the_same_batches(name: str, task: Task, tmp_path: Path) -> None:
    def seen(arm: str) -> tuple[dict[str, Tensor], list[Batch]]:
        start: dict[str, Tensor] = {}
        batches: list[Batch] = []

        def loss(model: nn.Module, batch: Batch) -> Tensor:
            if not start:
                start.update({k: v.clone() for k, v in model.named_parameters() if "non_equivariant" not in k})
            batches.append(batch)
            return task.loss(model, batch)

        harness.run(replace(task, loss=loss), methods.find(arm), 3, SETTINGS, tmp_path)
        return start, batches

    other = "strict, no turns" if name.endswith("no turns") else "strict"
    (weights, batches), (expected_weights, expected_batches) = seen(name), seen(other)
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=0)
    torch.testing.assert_close(batches, expected_batches, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["strict", "primal-dual", "resilient"])
def test_validation_is_of_the_model_that_is_tested(name: str) -> None:
    """Statistics of batch norm that were gathered with terms on would make it another one."""
    small = "--samples 32 --points 32 --width 4 --neighbours 4 --batch 8 --epochs 2"
    task, method = pointcloud.make_task(pointcloud.parse(small.split())), METHODS[name]
    torch.manual_seed(0)
    model = methods.build(method, task).train()
    optimizer = methods.prepare(method, model, task, steps=8, lr=1e-2)
    for relaxation in ce.relaxations(model):
        torch.nn.init.normal_(relaxation.term.weight, std=0.3)
    for batch in harness.batches(task.train, SETTINGS, None):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    before = copy.deepcopy(model.state_dict())
    found = harness.validate(task, method, model, SETTINGS)
    assert all(map(torch.equal, before.values(), model.state_dict().values()))
    if name == "strict":
        ce.recalibrate(model, harness.batches(task.train, SETTINGS, None), forward=lambda m, b: m(task.inputs(b)))
    else:
        ce.finalize(
            model,
            batches=harness.batches(task.train, SETTINGS, None),
            forward=lambda m, b: m(task.inputs(b)),
            on_violation="keep" if method.ends == "keep" else "drop",
        )
    assert harness.evaluate(task, model, SETTINGS) == pytest.approx(found, abs=1e-9)


def test_no_turns_leaves_the_batches_alone(task: Task, tmp_path: Path) -> None:
    def refuse(batch: Batch, generator: torch.Generator) -> Batch:
        raise AssertionError("turned")

    still = replace(task, augment=refuse)
    harness.run(still, methods.find("primal-dual, no turns"), 0, SETTINGS, tmp_path)
    with pytest.raises(AssertionError, match="turned"):
        harness.run(still, methods.find("primal-dual"), 0, SETTINGS, tmp_path)


def test_a_name_is_an_arm_a_rate_and_no_turns() -> None:
    method = methods.find("primal-dual, start 0.1 x0.5, no turns")
    assert (method.start, method.rate, method.augment) == (0.1, 0.5, False)
    assert (method.base, method.family) == ("primal-dual, start 0.1", "primal-dual, start 0.1, no turns")
    assert {method.family for method in METHODS.values()} == set(METHODS)
    with pytest.raises(ValueError, match=r"found arm 'strickt'.*expected one of strict"):
        methods.find("strickt")


def test_rate_reaches_every_group_and_anneals_to_a_hundredth(task: Task) -> None:
    for name in ("strict x2", "primal-dual x2", "strict, muon x2", "strict, block adam x2"):
        optimizer = methods.prepare(methods.find(name), task.build(1.0), task, steps=10, lr=1e-3)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, methods.annealing(methods.find(name), 10))
        assert {group["lr"] for group in optimizer.param_groups} == {2e-3}
        for _ in range(10):
            optimizer.step()
            scheduler.step()
        assert all(group["lr"] == pytest.approx(2e-5) for group in optimizer.param_groups)
    slow = methods.prepare(METHODS["primal-dual, term rate 0.1"], task.build(1.0), task, steps=10, lr=1e-3)
    assert {group.get("terms", False): group["lr"] for group in slow.param_groups} == {False: 1e-3, True: 1e-4}
    factor = methods.annealing(METHODS["strict, tail annealing"], 10)
    assert [factor(step) for step in (0, 8)] == [1.0, 1.0]
    assert factor(10) == pytest.approx(0.01)


def test_wide_model_has_the_parameters_of_the_relaxed_one(task: Task) -> None:
    task = replace(task, build=mocap.make_task(mocap.parse([*SMALL.split(), "--width", "16"])).build)
    wide = methods.build(METHODS["strict, wide"], task)
    relaxed = ce.relax(task.build(1.0), where=task.where, adapter=task.adapter)
    count = [sum(p.numel() for p in model.parameters()) for model in (wide, relaxed)]
    assert count[0] == pytest.approx(count[1], rel=0.1)


def test_agreement_of_gradients() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    for gradients, expected in (
        ([[1.0, 2, 3]] * 4, 1.0),
        ([[1.0, 0, 0], [0.0, 1, 0], [0.0, 0, 1]], 0.0),
        ([[1.0, 0, 0], [-1.0, 0, 0]], -1.0),
        ([[1.0, 0, 0]], 0.0),
    ):
        agreement = harness._Agreement([parameter])
        for gradient in gradients:
            parameter.grad = torch.tensor(gradient)
            agreement.add()
        assert agreement.value() == pytest.approx(expected)


def test_noise_moves_terms_within_their_level_whatever_the_data(task: Task) -> None:
    model = task.build(1.0)
    optimizer = methods.prepare(METHODS["projection, noise"], model, task, steps=20, lr=1e-2)
    assert isinstance(optimizer, ce.ConstrainedOptimizer)
    for _ in range(5):
        optimizer.zero_grad()
        (0.0 * task.loss(model, task.train)).backward()
        optimizer.step()
    sizes = [harness._size(relaxation) for relaxation in ce.relaxations(model)]
    level = float(optimizer.readings().levels[0])
    assert all(0.01 < size <= level * (1 + 1e-6) for size in sizes)


def test_restart_forgets_the_moments_once_when_the_level_reaches_zero(task: Task) -> None:
    model = task.build(1.0)
    optimizer = methods.prepare(METHODS["primal-dual, restart"], model, task, steps=20, lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        task.loss(model, task.train).backward()
        optimizer.step()
    assert {float(optimizer.state[p]["step"]) for n, p in model.named_parameters() if "non_equi" not in n} == {4.0}


def test_halves_share_the_layers_out(task: Task) -> None:
    def names(arm: str) -> list[str]:
        model = task.build(1.0)
        methods.prepare(METHODS[arm], model, task, steps=10, lr=1e-3)
        return [relaxation.name for relaxation in ce.relaxations(model)]

    assert names("primal-dual, first half") + names("primal-dual, second half") == names("primal-dual")
    assert names("primal-dual, published layers") == ["blocks.0.0.direction", "blocks.0.1"]
    with pytest.raises(ValueError, match="names the published layers"):
        methods.prepare(
            METHODS["primal-dual, published layers"], task.build(1.0), replace(task, published=None), steps=1, lr=1.0
        )


def test_terms_that_outlive_the_start_of_selection_are_refused(task: Task, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected at most 0\.8"):
        harness.run(task, replace(METHODS["primal-dual"], until=0.9), 0, SETTINGS, tmp_path)


def test_block_adam_gives_every_block_steps_of_one_size() -> None:
    flat, whole = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(2, 3))
    optimizer = optimizers.BlockAdam([flat, whole], sizes={flat: [2, 3]}, lr=0.1)
    flat.grad, whole.grad = torch.tensor([3.0, 4.0, 1.0, 2.0, 2.0]), torch.arange(6.0).view(2, 3)
    expected = [-0.1 * g / g.square().mean().sqrt() for g in (flat.grad[:2], flat.grad[2:], whole.grad)]
    optimizer.step()
    torch.testing.assert_close(flat.detach(), torch.cat(expected[:2]))
    torch.testing.assert_close(whole.detach(), expected[2])


def test_block_adam_is_adam_on_blocks_of_one() -> None:
    torch.manual_seed(0)
    pair = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    ours = optimizers.BlockAdam([pair[0]], sizes={pair[0]: [1, 1, 1, 1]}, lr=0.1)
    theirs = torch.optim.Adam([pair[1]], lr=0.1)
    for _ in range(5):
        gradient = torch.randn(4)
        for parameter, optimizer in zip(pair, (ours, theirs), strict=True):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(pair[0], pair[1])


@pytest.mark.parametrize("name", ["strict, muon", "strict, block adam", "primal-dual, muon", "primal-dual, block adam"])
def test_optimizers_go_on_from_their_state(name: str, task: Task) -> None:
    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = task.build(1.0)
        return model, methods.prepare(METHODS[name], model, task, steps=10, lr=1e-2)

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            task.loss(model, task.train).backward()
            optimizer.step()

    model, optimizer = fresh()
    train(model, optimizer, 3)
    again, other = fresh()
    again.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 3)
    train(again, other, 3)
    torch.testing.assert_close(dict(again.named_parameters()), dict(model.named_parameters()), rtol=0, atol=0)


def test_blocks_are_the_paths_between_irreps() -> None:
    o3 = pytest.importorskip("e3nn.o3")
    linear = o3.Linear("2x0e + 3x1o", "4x0e + 5x1o", biases=True)
    product = o3.FullyConnectedTensorProduct("2x0e + 1x1o", "1x0e + 1x1o", "3x0e + 2x1o")
    sizes = optimizers.irrep_blocks(nn.ModuleList([linear, product]))
    assert sizes == {linear.weight: [8, 15], product.weight: [6, 4, 2, 3]}


def test_muon_needs_a_matrix() -> None:
    model = nn.BatchNorm1d(3)
    with pytest.raises(ValueError, match="no parameter of BatchNorm1d is a matrix"):
        optimizers.muon(model, [{"params": list(model.parameters()), "lr": 0.1}])


def runs(method: str, test: list[float], val: list[float]) -> list[dict[str, Any]]:
    found = methods.find(method)
    arm = {"recipe": found.recipe, "widen": found.widen}
    return [
        {"method": method, "arm": arm, "seed": seed, "test": t, "val": v}
        for seed, (t, v) in enumerate(zip(test, val, strict=True))
    ]


def test_tuned_strict_is_chosen_by_validation_on_the_seeds_that_all_have() -> None:
    plain = runs("strict", [1.0, 1.0], [2.0, 2.0])
    double = runs("strict x2", [5.0, 5.0, 5.0], [1.0, 1.0, 99.0])  # better on validation, worse on the test
    late = runs("strict, tail annealing", [4.0, 4.0], [1.5, 1.5])
    other = [*runs("strict, wide", [0.0, 0.0], [0.0, 0.0]), *runs("primal-dual", [0.0, 0.0], [0.0, 0.0])]
    assert report.tuned_strict([*plain, *double, *late, *other]) == ("strict x2", double)
    assert report.tuned_strict([*plain, *late, *other]) == ("strict, tail annealing", late)
    assert report.tuned_strict([*plain, *other]) is None


@pytest.mark.parametrize("name", ["strict x.", "strict x0", "strict x0.0", "strict x1.2.3", "strict x-1"])
def test_a_factor_on_the_rate_is_a_number_above_zero(name: str) -> None:
    with pytest.raises(ValueError, match=f"found arm '{name}': expected one of"):
        methods.find(name)


def test_compare_keeps_what_is_finished_and_reports_against_strict_and_tuned_strict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CONSTRAINED_EQUIV_DATA", raising=False)
    arms = ["--arms", "strict", "strict x2", "primal-dual", "--seeds", "0", "1"]
    chosen = ["mocap", "--with", SMALL, "--out", str(tmp_path)]
    compare.main(["run", *chosen, *arms])
    (folder,) = tmp_path.iterdir()
    assert folder.name.endswith("-simulated")
    lines = (folder / "records.jsonl").read_text().splitlines()
    assert len(lines) == 6
    record = json.loads(lines[-1])
    assert record["source"] == "simulated"
    assert record["versions"]["torch"] == torch.__version__
    for curve in ("train", "gradient", "term_gradient", "value", "level", "multiplier"):
        assert len(record["curves"][curve]) == 6
    assert record["curves"]["level"][-1] == 0.0 < record["curves"]["level"][0]
    for curve in ("agreement", "term_agreement"):
        assert all(-1 <= value <= 1 for _, value in record["curves"][curve]) and record["curves"][curve]

    def again(*_: Any, **__: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(harness, "run", again)
    compare.main(["run", *chosen, *arms])
    with pytest.raises(SystemExit, match="2"):  # another command whose folder has the same name
        compare.main(["run", "mocap", "--with", SMALL.replace(" 6", "  6"), "--out", str(tmp_path), *arms])
    assert f"{folder} holds runs of" in capsys.readouterr().err
    compare.main(["report", *chosen])
    printed = capsys.readouterr().out
    assert "simulated data, 16 training samples" in printed
    assert "test minus strict" in printed
    assert "test minus tuned strict (strict" in printed
    assert (folder / "report.md").read_text() in printed
    assert {path.name for path in folder.glob("*.png")} == {"validation.png", "test.png"}


def write_walk(folder: Path) -> None:
    """Write a recording of three short trials."""
    folder.mkdir(parents=True)
    rows = {f"{part}_trial": [i] for i, part in enumerate(("train", "val", "test"))}
    starts = {f"{part}_start": np.arange(16).reshape(1, 16) for part in ("train", "val", "test")}
    places = np.random.default_rng(0).normal(size=(150, 31, 3)).astype(np.float32)
    trials = {"trial": [0, 1, 2], "trial_start": [0, 50, 100], "trial_len": [50, 50, 50]}
    np.savez(folder / "walk_subject35.npz", pos=places, edges=np.zeros((30, 2), dtype=int), **trials, **rows, **starts)


def test_compare_keeps_recorded_and_simulated_data_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CONSTRAINED_EQUIV_DATA", raising=False)
    chosen = ["mocap", "--with", SMALL, "--out", str(tmp_path / "out")]
    once = [*chosen, "--arms", "strict", "--seeds", "0"]
    compare.main(["run", *once])
    write_walk(tmp_path / "data" / "cmu_mocap")
    compare.main(["run", *once, "--data", str(tmp_path / "data")])
    found = {path.parent.name: path.read_text().splitlines() for path in (tmp_path / "out").rglob("records.jsonl")}
    assert sorted(len(lines) for lines in found.values()) == [1, 1]
    sources = {folder: json.loads(lines[0])["source"] for folder, lines in found.items()}
    assert set(sources.values()) == {"recorded", "simulated"}
    assert all(folder.endswith("-simulated") == (source == "simulated") for folder, source in sources.items())
    capsys.readouterr()
    compare.main(["report", *chosen])
    printed = capsys.readouterr().out
    assert "mocap (recorded data" in printed and "mocap (simulated data" in printed


@pytest.mark.parametrize("named", ["--data", "CONSTRAINED_EQUIV_DATA"])
def test_compare_refuses_a_data_folder_that_lacks_the_data(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CONSTRAINED_EQUIV_DATA", raising=False)
    if named == "CONSTRAINED_EQUIV_DATA":
        monkeypatch.setenv(named, str(tmp_path / "nowhere"))
    more = ["--data", str(tmp_path / "nowhere")] if named == "--data" else []
    with pytest.raises(SystemExit, match="2"):
        compare.main(["run", "mocap", "--with", SMALL, "--out", str(tmp_path / "out"), *more])
    printed = capsys.readouterr().err
    assert f"found no {tmp_path / 'nowhere' / 'cmu_mocap'}, expected the recorded data of mocap" in printed
    assert f"leave {named} out to run on the simulator" in printed
    (tmp_path / "data" / "cmu_mocap").mkdir(parents=True)
    with pytest.raises(SystemExit, match="2"):
        compare.main(
            ["run", "mocap", "--with", SMALL, "--out", str(tmp_path / "out"), "--data", str(tmp_path / "data")]
        )
    assert "expected the file walk_subject35.npz" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_compare_checks_all_experiments_before_the_first_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CONSTRAINED_EQUIV_DATA", raising=False)
    monkeypatch.setitem(sys.modules, "escnn", None)
    monkeypatch.delitem(sys.modules, "examples.models.steerable_cnn", raising=False)
    with pytest.raises(SystemExit, match="2"):
        compare.main(["run", "mocap", "mnist_rot", "--arms", "strict", "--seeds", "0", "--out", str(tmp_path)])
    printed = capsys.readouterr().err
    assert "error: experiment mnist_rot" in printed and "pip install --no-deps escnn" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("program", [compare.main, mocap.main])
@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--seeds 0 1 0", "--seeds: found 0 1 0: expected each of them once"),
        ("--seeds -1", "found '-1': expected a whole"),
    ],
)
def test_a_seed_counts_once(
    program: Any, more: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["run", "mocap", "--with", SMALL] if program is compare.main else SMALL.split()
    with pytest.raises(SystemExit, match="2"):
        program([*chosen, "--out", str(tmp_path), *more.split()])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--epochs", "0"], "--epochs: found '0': expected a whole number of at least 1"),
        (["--samples", "0"], "--samples: found '0': expected a whole number of at least 1"),
        (["--batch", "0"], "--batch: found '0': expected a whole number of at least 1"),
        (["--batch", "2.5"], "--batch: found '2.5': expected a whole number of at least 1"),
        (["--lr", "-1"], "--lr: found '-1': expected a finite number above 0"),
        (["--lr", "nan"], "--lr: found 'nan': expected a finite number above 0"),
        (["--lr", "inf"], "--lr: found 'inf': expected a finite number above 0"),
        (["--device", "warp"], "--device: found 'warp': expected a device of this machine"),
        (["--methods", "strict x."], "--methods: found arm 'strict x.': expected one of strict"),
        (["--methods", "strict", "strict"], "--methods: found strict strict: expected each of them once"),
        (["--methods", "strict", "gate, published layers"], "error: arm 'gate, published layers' does not fit"),
        (["--data", "nowhere"], "error: found no such folder, expected the file walk_subject35.npz"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_run_is_refused_before_the_first_run(
    more: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        mocap.main([*SMALL.split(), "--out", str(tmp_path), *more])
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_options_that_determine_the_task_are_part_of_a_record(tmp_path: Path) -> None:
    mocap.main([*SMALL.split(), "--methods", "strict", "--seeds", "0", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "strict-0.json").read_text())["options"]
    assert found == {"data": None, "data_seed": 0, "motion": "walk", "ahead": 30, "width": 4, "layers": 1}
