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


RUN = """
import os, signal, sys, torch
sys.path.insert(0, {root!r})
torch.set_num_threads(1)
from tests.optim.test_state import FALLING, Net, data, train, wrap
path, until, kill = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "kill"
torch.manual_seed(0)
model = Net()
x, y = data()
optimizer = wrap(model, level=FALLING)
if os.path.exists(path):
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
while optimizer.finished_steps < until:
    train(model, optimizer, x, y, 1)
    if optimizer.finished_steps % 4 == 0:
        torch.save({{"model": model.state_dict(), "optimizer": optimizer.state_dict()}}, path + ".new")
        os.replace(path + ".new", path)
    if kill and optimizer.finished_steps == 10:
        os.kill(os.getpid(), signal.SIGKILL)
torch.save({{"model": model.state_dict(), "optimizer": optimizer.state_dict()}}, path)
"""


def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(RUN.format(root=str(Path(__file__).parents[2])))

    def run(name: str, mode: str) -> int:
        command = [sys.executable, str(script), str(tmp_path / name), "18", mode]
        return subprocess.run(command, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode

    assert run("killed.pt", "kill") == -signal.SIGKILL
    assert run("killed.pt", "on") == 0
    assert run("whole.pt", "on") == 0
    saved = [torch.load(tmp_path / name, weights_only=True) for name in ("killed.pt", "whole.pt")]
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
    state["constrained"]["dual"]["multipliers"]["inequality"] = torch.zeros(7)


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
