"""A run is never lost: saved, killed and resumed, it walks on bit for bit."""

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cooper
import pytest
import torch
from torch import Tensor

import constrained_equiv as ce
from constrained_equiv.monitor import Monitor
from tests.optim.test_setups import Net, data, loss, parameters, same, train, wrap

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "growing penalty": {"penalty_growth": 1.05},
    "dual momentum": {"dual": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, maximize=True)},
    "dual adam": {"dual": lambda ps: torch.optim.Adam(ps, lr=0.1, maximize=True)},
    "nupi": {"formulation": "lagrangian", "dual": "nupi", "dual_lr": 0.1},
    "quadratic penalty": {"formulation": "quadratic_penalty"},
    "projection": {"enforce": "projection"},
    "proximal": {"enforce": "proximal"},
}
FALLING = ce.schedules.linear(0.2, 0.0, 12)
TURNS = ce.groups.matrix_group("turns", generators=torch.eye(3)[[1, 2, 0]][None])


def restored(path: Path, **options: Any) -> tuple[Net, ce.ConstrainedOptimizer]:
    torch.manual_seed(99)
    model = Net()
    optimizer = wrap(model, level=FALLING, **options)
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    return model, optimizer


@pytest.mark.parametrize("steps", [4, 14], ids=["while falling", "in the tail"])
@pytest.mark.parametrize("option", OPTIONS)
def test_resumed_equals_uninterrupted(option: str, steps: int, tmp_path: Path) -> None:
    model = Net()
    optimizer = wrap(model, level=FALLING, **OPTIONS[option])
    x, y = data()
    train(model, optimizer, x, y, steps)
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    other, resumed = restored(path, **OPTIONS[option])
    assert resumed.finished_steps == steps
    train(model, optimizer, x, y, 10)
    train(other, resumed, x, y, 10)
    assert same(model, other)
    for one, two in zip(optimizer.readings()[2:], resumed.readings()[2:], strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    "record", ["resilient", "scale", "penalty", "gate", "blocks", "shared", "generators", "subgroup"]
)
def test_every_record_resumes(record: str, tmp_path: Path) -> None:
    def build() -> tuple[Any, Any]:
        model = Net()
        weight = ce.constraints.weight(model, level=0.0)
        records = {
            "resilient": [ce.constraints.resilient(weight, price=0.1)],
            "scale": [ce.constraints.scale(model, schedule=ce.schedules.triangle(12))],
            "penalty": [ce.constraints.penalty(weight, coefficient=ce.schedules.linear(0.0, 1.0, 9))],
            "gate": [ce.constraints.weight(model, level=FALLING)],
            "blocks": [ce.constraints.weight(model, level=FALLING, per="block")],
            "shared": [ce.constraints.weight(model, level=FALLING, per="model")],
            "generators": [ce.constraints.lie(model, level=FALLING, per="generator")],
            "subgroup": [ce.constraints.subgroup(model, TURNS, level=FALLING)],
        }
        return model, ce.ConstrainedOptimizer(torch.optim.Adam(model.parameters(), lr=0.02), *records[record])

    model, optimizer = build()
    x, y = data()
    train(model, optimizer, x, y, 5)
    other, resumed = build()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, x, y, 5)
    train(other, resumed, x, y, 5)
    assert same(model, other)
    assert all(
        torch.equal(a.term.scale, b.term.scale) for a, b in zip(*map(ce.relaxations, (model, other)), strict=True)
    )


def killable(how: str) -> tuple[Net, Any, Any, Monitor]:
    """A model, what steps it, what tells about it, and a monitor, of one of the kinds that a killed run resumes."""
    model = Net()
    options = {
        "default": {},
        "growing penalty, dual momentum": {**OPTIONS["growing penalty"], **OPTIONS["dual momentum"]},
        "nupi": OPTIONS["nupi"],
        "resilient": {},
        "attached": {},
    }[how]
    record = ce.constraints.weight(model, level=FALLING)
    if how == "resilient":
        record = ce.constraints.resilient(record, price=0.1, cost="quadratic")
    base = torch.optim.Adam(model.parameters(), lr=0.02)
    if how == "attached":
        handle = ce.attach(base, record, **options)
        return model, base, handle, Monitor(handle)
    optimizer = ce.ConstrainedOptimizer(base, record, **options)
    return model, optimizer, optimizer, Monitor(optimizer)


KILLABLE = ["default", "growing penalty, dual momentum", "nupi", "resilient", "attached"]
RUN = """
import os, signal, sys, torch
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
from tests.optim.test_state import KILLABLE, data, killable, train
path, until, kill = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "kill"
torch.manual_seed(0)
runs = [killable(how) for how in KILLABLE]
x, y = data()
if os.path.exists(path):
    for (model, optimizer, _, monitor), saved in zip(runs, torch.load(path, weights_only=True)):
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        monitor.load_state_dict(saved["monitor"])
def save():
    torch.save(
        [{{"model": m.state_dict(), "optimizer": o.state_dict(), "monitor": w.state_dict()}} for m, o, _, w in runs],
        path + ".new",
    )
    os.replace(path + ".new", path)
while (step := runs[0][2].finished_steps) < until:
    for model, optimizer, _, _ in runs:
        train(model, optimizer, x, y, 1)
    if (step + 1) % 4 == 0:
        save()
    if kill and step + 1 == 10:
        os.kill(os.getpid(), signal.SIGKILL)
save()
"""


def test_killed_runs_resume_bit_for_bit(tmp_path: Path) -> None:
    """Plain and resilient, every state that a dual has, through hooks, and what the monitor has seen."""
    script = tmp_path / "run.py"
    script.write_text(RUN.format(root=str(Path(__file__).parents[2])))

    def run(name: str, mode: str) -> int:
        command = [sys.executable, str(script), str(tmp_path / name), "18", mode]
        return subprocess.run(command, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode

    assert run("killed.pt", "kill") == -signal.SIGKILL
    assert run("killed.pt", "on") == 0
    assert run("whole.pt", "on") == 0
    saved = [torch.load(tmp_path / name, weights_only=True) for name in ("killed.pt", "whole.pt")]
    assert [len(s["monitor"]["steps"]) for s in saved[0]] == [18] * len(KILLABLE)
    flat = [torch.utils._pytree.tree_flatten(s)[0] for s in saved]
    assert len(flat[0]) == len(flat[1])
    for one, two in zip(*flat, strict=True):
        assert torch.equal(one, two) if isinstance(one, Tensor) else one == two


def test_plain_and_wrapped_checkpoints_are_exchanged() -> None:
    model, other = Net(), Net()
    x, y = data()
    plain = torch.optim.Adam(model.parameters(), lr=0.02)
    train(model, plain, x, y, 3)
    other.load_state_dict(model.state_dict())
    wrapped = wrap(other)
    wrapped.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert wrapped.finished_steps == 0
    assert torch.equal(wrapped.state[next(iter(other.parameters()))]["step"], torch.tensor(3.0))
    train(other, wrapped, x, y, 2)
    plain.load_state_dict(copy.deepcopy(wrapped.state_dict()))
    assert torch.equal(plain.state[next(iter(model.parameters()))]["step"], torch.tensor(5.0))


def _names(state: dict[str, Any]) -> None:
    state["constrained"]["names"][0] = "elsewhere (weight)"


def _version(state: dict[str, Any]) -> None:
    state["constrained"]["version"] = 99


def _size(state: dict[str, Any]) -> None:
    state["constrained"]["dual"]["multipliers"]["inequality.weight"] = torch.zeros(7)


def _formulation(state: dict[str, Any]) -> None:
    state["constrained"]["dual"]["penalties"] = {}


def _groups(state: dict[str, Any]) -> None:
    state["constrained"]["dual"]["rates"] = [0.1, 0.2]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_names, "elsewhere"),
        (_version, "99"),
        (_size, "7"),
        (_formulation, "formulation of the saved run"),
        (_groups, "2 parameter groups"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_nothing_is_loaded(damage: Any, message: str) -> None:
    model = Net()
    optimizer = wrap(model)
    x, y = data()
    train(model, optimizer, x, y, 2)
    state = copy.deepcopy(optimizer.state_dict())
    damage(state)
    train(model, optimizer, x, y, 2)
    moments = optimizer.state[next(iter(model.parameters()))]["exp_avg"].clone()
    with pytest.raises(ce.errors.CheckpointError, match=message):
        optimizer.load_state_dict(state)
    assert optimizer.finished_steps == 4
    assert torch.equal(optimizer.state[next(iter(model.parameters()))]["exp_avg"], moments)


def test_distributed_checkpoint_state_of_one_process() -> None:
    """torch's helper steps the optimizer with zero rates to create state; multipliers must not move by that."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = Net()
    optimizer = wrap(model, level=0.01)
    before = parameters(copy.deepcopy(model))
    state = get_optimizer_state_dict(model, optimizer)
    assert torch.equal(optimizer.readings().multipliers, torch.zeros(2).double())
    assert all(torch.allclose(a, b, atol=1e-15) for a, b in zip(before, parameters(model), strict=True))
    train(model, optimizer, *data(), 2)
    set_optimizer_state_dict(model, optimizer, state)
    loss(model, *data()).backward()
    optimizer.step()


def test_cooper_optimizers_with_enums_stay_loadable(tmp_path: Path) -> None:
    """nuPI keeps an enum in its parameter groups, which `weights_only=True` refuses; it is not saved."""
    model = Net()
    make = lambda ps: cooper.optim.nuPI(ps, lr=0.1, Kp=torch.tensor(1.0), maximize=True)  # noqa: E731
    optimizer = wrap(model, dual=make, formulation="lagrangian")
    train(model, optimizer, *data(), 2)
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    assert torch.load(tmp_path / "o.pt", weights_only=True)["constrained"]["step"] == 2


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_checkpoint_helpers_move_no_schedule(momentum: float) -> None:
    """An optimizer without state, such as SGD, is stepped by the helper at every checkpoint, with all rates 0."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = Net()
    optimizer = wrap(model, lambda ps, lr: torch.optim.SGD(ps, lr=lr, momentum=momentum), level=FALLING)
    for step in range(3):
        train(model, optimizer, *data(), 1)
        optimizer.zero_grad()
        before, now = parameters(copy.deepcopy(model)), optimizer.readings()
        set_optimizer_state_dict(model, optimizer, get_optimizer_state_dict(model, optimizer))
        assert optimizer.finished_steps == step + 1
        assert torch.equal(optimizer.readings().multipliers, now.multipliers)
        assert all(map(torch.equal, before, parameters(model)))


@pytest.mark.parametrize("level", [FALLING, 0.0, ce.schedules.join([ce.schedules.constant(0.0), FALLING], [2])])
def test_distributed_checkpoints_know_the_state_of_terms_at_zero(level: Any) -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model = Net()
    optimizer = wrap(model, level=level)
    train(model, optimizer, *data(), 14)  # in the tail
    if isinstance(level, float):
        optimizer.state.clear()  # as before the first step
        optimizer.zero_grad()
    state = get_optimizer_state_dict(model, optimizer)
    assert set(state["state"]) == {name for name, _ in model.named_parameters()}
    fresh = Net()
    set_optimizer_state_dict(fresh, wrap(fresh, level=level), state)


def test_a_level_that_rises_again_finds_fresh_base_state() -> None:
    model = Net()
    level = ce.schedules.join(
        [ce.schedules.constant(0.1), ce.schedules.constant(0.0), ce.schedules.constant(0.1)], [2, 4]
    )
    optimizer = wrap(model, level=level)
    term = ce.relaxations(model)[0].term
    train(model, optimizer, *data(), 3)
    assert torch.equal(term.weight, torch.zeros_like(term.weight))
    train(model, optimizer, *data(), 2)
    assert optimizer.state[term.weight]["step"] == 1 and optimizer.state[model.layers[0].weight]["step"] == 5


@pytest.mark.parametrize("attached", [False, True])
def test_the_constraints_part_is_an_entry_of_its_own(attached: bool) -> None:
    model, optimizer, handle, _ = killable("attached" if attached else "nupi")
    train(model, optimizer, *data(), 3)
    saved = handle.constraint_state.state_dict()
    now = handle.readings().multipliers
    train(model, optimizer, *data(), 2)
    handle.constraint_state.load_state_dict(saved)
    assert handle.finished_steps == 3 and torch.equal(handle.readings().multipliers, now)
    other = Net()
    wrong = wrap(other, level=0.1, formulation="quadratic_penalty")
    with pytest.raises(ce.errors.CheckpointError, match="formulation of the saved run"):
        wrong.constraint_state.load_state_dict(saved)
    assert wrong.finished_steps == 0


def test_no_two_tensors_of_a_checkpoint_share_memory() -> None:
    """Terms lie in one block; formats that keep one of several tensors that share memory would lose the others."""
    model = Net()
    wrap(model)
    blocks = [tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()]
    assert len(set(blocks)) == len(blocks)
    weights = [r.term.weight for r in ce.relaxations(model)]
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) == 1


def test_records_of_other_constraints_are_refused() -> None:
    model, other = Net(), Net()
    optimizer = wrap(model)
    monitor = Monitor(optimizer)
    train(model, optimizer, *data(), 1)
    first = ce.constraints.weight(other, level=0.1, where=lambda name: "0" in name)
    elsewhere = Monitor(ce.ConstrainedOptimizer(torch.optim.Adam(other.parameters()), first))
    with pytest.raises(ce.errors.CheckpointError, match=r"layers\.1 .*expected"):
        elsewhere.load_state_dict(monitor.state_dict())


@pytest.mark.parametrize("formulation", ["augmented_lagrangian", "quadratic_penalty"])
@pytest.mark.parametrize("growth", [1.0, 1.05])
def test_the_penalty_of_a_checkpoint_holds_everywhere(formulation: Any, growth: float) -> None:
    """In the pull as in the value of the Lagrangian, whatever the optimizer was built with."""

    def optimizer(**options: Any) -> Any:
        model = Net()
        return ce.ConstrainedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            ce.constraints.weight(model, level=0.01),
            formulation=formulation,
            **options,
        )

    saved = optimizer(penalty=1.0, penalty_growth=growth)
    excess = torch.tensor([0.3, -0.1], dtype=torch.float64)
    with torch.no_grad():
        for _ in range(3):
            saved.multipliers.ascend(excess)
    resumed = optimizer(penalty=10.0)
    resumed.load_state_dict(saved.state_dict())
    with torch.no_grad():
        expected = saved.multipliers.coefficients(excess)
        assert torch.equal(resumed.multipliers.coefficients(excess), expected)
    leaf = excess.clone().requires_grad_()
    step = 1e-6
    for i in range(2):
        there, here = leaf.detach().clone(), leaf.detach().clone()
        there[i] += step
        here[i] -= step
        rise = (resumed.multipliers.lagrangian(there) - resumed.multipliers.lagrangian(here)) / (2 * step)
        assert rise == pytest.approx(float(expected[i]), abs=1e-6)


def test_a_dual_of_another_kind_is_refused() -> None:
    def optimizer(kind: Any) -> Any:
        model = Net()
        return ce.ConstrainedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1),
            ce.constraints.weight(model, level=0.01),
            dual=lambda ps: kind(ps, lr=0.1, maximize=True),
        )

    with pytest.raises(ce.errors.CheckpointError, match="moved by SGD: expected Adam"):
        optimizer(torch.optim.Adam).load_state_dict(optimizer(torch.optim.SGD).state_dict())
