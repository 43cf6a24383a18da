"""The arms of the comparison: they differ in what they name, end as they say, and are compared fairly."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import constrained_equiv as ce
from examples import harness, methods, mocap, optimizers, report
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


def test_compare_keeps_what_is_finished_and_reports_against_strict_and_tuned_strict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CONSTRAINED_EQUIV_DATA", raising=False)
    arms = ["--arms", "strict", "strict x2", "primal-dual", "--seeds", "0", "1"]
    chosen = ["mocap", "--with", SMALL, "--out", str(tmp_path)]
    compare.main(["run", *chosen, *arms])
    (folder,) = tmp_path.iterdir()
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
    capsys.readouterr()
    compare.main(["report", *chosen])
    printed = capsys.readouterr().out
    assert "simulated data, 16 training samples" in printed
    assert "test minus strict" in printed
    assert "test minus tuned strict (strict" in printed
    assert (folder / "report.md").read_text() in printed
    assert {path.name for path in folder.glob("*.png")} == {"validation.png", "test.png"}
