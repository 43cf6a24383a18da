"""The same training on every device that is there, with the host waiting for none of it."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import constrained_equiv as ce
from tests.optim.test_setups import Net, data, loss, same, train

FALLING = ce.schedules.linear(0.2, 0.0, 6)
WEIGHT = ce.constraints.weight
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "default": (lambda m: [WEIGHT(m, level=FALLING)], {}, {}),
    "foreach": (lambda m: [WEIGHT(m, level=FALLING)], {"foreach": True}, {}),
    "fused": (lambda m: [WEIGHT(m, level=FALLING)], {"fused": True}, {}),
    "capturable": (lambda m: [WEIGHT(m, level=FALLING)], {"capturable": True}, {}),
    "nuPI, growing penalty": (
        lambda m: [WEIGHT(m, level=0.05)],
        {},
        {"dual": "nupi", "dual_lr": 0.5, "penalty_growth": 1.1},
    ),
    "primal-dual": (lambda m: [WEIGHT(m, level=0.05)], {}, {"order": "primal-dual"}),
    "projection": (lambda m: [WEIGHT(m, level=0.05)], {}, {"enforce": "projection"}),
    "proximal": (lambda m: [WEIGHT(m, level=0.05)], {}, {"enforce": "proximal"}),
    "relative and lie": (lambda m: [ce.constraints.relative(m, level=0.1), ce.constraints.lie(m, level=0.1)], {}, {}),
    "budget": (lambda m: [ce.constraints.resilient(WEIGHT(m, level=0.0), cost="budget", price=0.1)], {}, {}),
}


@contextmanager
def no_waiting(device: torch.device, optimizer: Any) -> Iterator[None]:
    """Fail where the host waits for a CUDA device; the first step allocates and may."""
    watched = device.type == "cuda" and optimizer.finished_steps > 0
    if watched:
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if watched:
            torch.cuda.set_sync_debug_mode("default")


def trained(name: str, device: torch.device, dtype: torch.dtype, steps: int = 8) -> tuple[nn.Module, Any]:
    records, base, options = CASES[name]
    torch.manual_seed(0)
    model = Net(dtype).to(device)
    x, y = (tensor.to(device, dtype) for tensor in data())
    optimizer = ce.ConstrainedOptimizer(
        torch.optim.Adam(model.parameters(), lr=0.02, **base), *records(model), **options
    )
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, x, y).backward()
        with no_waiting(device, optimizer):
            optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("name", CASES)
def test_every_device_walks_the_same_way(name: str, device: torch.device) -> None:
    if name == "capturable" and device.type == "cpu":
        pytest.skip("capturable optimizers are for accelerators")
    model, optimizer = trained(name, device, torch.float32)
    exact = "foreach" if name == "capturable" else name
    reference, expected = trained(exact, torch.device("cpu"), torch.float64)
    now, then = optimizer.readings(), expected.readings()
    assert now.values.device.type == now.multipliers.device.type == device.type
    assert same(model.cpu().double(), reference, 1e-4)
    for one, two in zip(now[2:], then[2:], strict=True):
        assert torch.allclose(one.cpu().double(), two, rtol=0, atol=1e-3)


def test_a_checkpoint_moves_between_devices(device: torch.device) -> None:
    model, optimizer = trained("nuPI, growing penalty", device, torch.float32, 3)
    other, moved = trained("nuPI, growing penalty", torch.device("cpu"), torch.float32, 0)
    other.load_state_dict(model.state_dict())
    moved.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert moved.finished_steps == 3
    assert torch.equal(moved.readings().multipliers, optimizer.readings().multipliers.cpu())
    again, back = trained("nuPI, growing penalty", device, torch.float32, 0)
    again.load_state_dict(other.state_dict())
    back.constraint_state.load_state_dict(moved.constraint_state.state_dict())
    assert torch.equal(back.readings().multipliers, optimizer.readings().multipliers)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("attached", [False, True])
def test_mixed_precision_under_a_scaler(fused: bool, attached: bool, device: torch.device) -> None:
    torch.manual_seed(0)
    model = Net(torch.float32).to(device)
    x, y = (tensor.to(device, torch.float32) for tensor in data())
    base = torch.optim.Adam(model.parameters(), lr=0.02, fused=fused)
    record = WEIGHT(model, level=0.05)
    handle = ce.attach(base, record) if attached else ce.ConstrainedOptimizer(base, record)
    optimizer = base if attached else handle
    scaler = torch.amp.GradScaler(device.type, init_scale=2.0**8)
    for step in range(5):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.float16 if device.type == "cuda" else torch.bfloat16):
            value = loss(model, x, y)
        scaler.scale(value * torch.inf if step == 2 else value).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    now = handle.readings()
    assert handle.finished_steps == 4  # the step that overflowed does not count
    assert now.multipliers.dtype == torch.float32 and (now.multipliers > 0).all()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_checking_gradients_is_the_one_time_that_a_gpu_is_waited_for(policy: Any) -> None:
    torch.manual_seed(0)
    model = Net(torch.float32).cuda()
    x, y = (tensor.to("cuda", torch.float32) for tensor in data())
    base = torch.optim.Adam(model.parameters(), lr=0.02)
    optimizer = ce.ConstrainedOptimizer(base, WEIGHT(model, level=0.05), on_nonfinite=policy)
    loss(model, x, y).backward()
    optimizer.step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as seen:
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(seen) == 1


@pytest.mark.parametrize("name", CASES)
def test_constraints_follow_a_model_that_is_moved_after_them(name: str, device: torch.device) -> None:
    """As launchers move it: the walk is that of a model that was there from the start."""
    records, base, options = CASES[name]
    if base.get("capturable") and device.type == "cpu":
        pytest.skip("capturable optimizers are for accelerators")
    walks = []
    for early in (True, False):
        torch.manual_seed(0)
        model = Net()
        model.to(device if early else "cpu")
        optimizer = ce.ConstrainedOptimizer(
            torch.optim.Adam(model.parameters(), lr=0.02, **base), *records(model), **options
        )
        model.to(device)
        train(model, optimizer, *(tensor.to(device) for tensor in data()), 8)
        walks.append((*model.parameters(), *optimizer.readings()[2:]))
    for there, moved in zip(*walks, strict=True):
        torch.testing.assert_close(moved, there)


@pytest.mark.parametrize("name", CASES)
def test_all_vectors_follow(name: str) -> None:
    """Tensors without entries stand for a device that is not there."""
    records, _, options = CASES[name]
    if options.get("dual"):
        pytest.skip("reads entries")
    model = Net()
    optimizer = ce.ConstrainedOptimizer(torch.optim.SGD(model.parameters(), lr=0.02), *records(model), **options)
    train(model, optimizer, *data(), 2)
    model.to("meta")
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer._engine.before()
    readings = optimizer.readings()
    assert {v.device.type for v in (readings.values, readings.levels, readings.multipliers)} == {"meta"}
