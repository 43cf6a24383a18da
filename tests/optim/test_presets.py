"""Presets relax, constrain and train as their methods say."""

from typing import Any

import pytest
import torch
from torch import nn

import constrained_equiv as ce
from constrained_equiv import presets

STEPS = 40


def layer() -> tuple[nn.Module, dict[str, Any]]:
    points = ce.representations.permutation(3, channels=2)
    adapter = ce.adapters.linear(points, points, axes=(-2, -1))
    return nn.Linear(2, 2, dtype=torch.float64), {"where": lambda name, m: True, "adapter": adapter}


def train(model: nn.Module, optimizer: ce.ConstrainedOptimizer, steps: int = STEPS) -> None:
    x = torch.randn(16, 3, 2, dtype=torch.float64)
    y = x + 0.5 * x[:, [1, 2, 0]] * torch.tensor([1.0, 2.0, 3.0])[:, None]
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def term(model: nn.Module) -> Any:
    return ce.relaxations(model)[0].term


def test_ours_ends_at_exact_zero_after_its_tail_began() -> None:
    model, how = layer()
    preset = presets.ours(model, steps=STEPS, **how)
    optimizer = preset.optimizer(torch.optim.Adam(model.parameters(), lr=1e-2))
    train(model, optimizer, 31)
    assert term(model).weight.abs().max() > 0
    train(model, optimizer, 1)
    assert torch.equal(term(model).weight, torch.zeros_like(term(model).weight))


def test_triangle_drives_the_scale_and_adds_both_penalties() -> None:
    model, how = layer()
    preset = presets.triangle(model, steps=STEPS, **how)
    optimizer = preset.optimizer(torch.optim.SGD(model.parameters(), lr=1e-2))
    seen = []
    for _ in range(STEPS):
        seen.append(float(term(model).scale))
        train(model, optimizer, 1)
    assert seen[0] == 0.0 and max(seen) == 1.0 and float(term(model).scale) == 0.0
    assert {r.measure.name for r in preset.constraints if hasattr(r, "measure")} == {"lie", "activation"}


@pytest.mark.parametrize("norm", ["activation", "weight"])
def test_penalties_add_their_gradient(norm: Any) -> None:
    """The gradient after a step is that of loss + 0.01 (lie + size), by autograd."""
    model, how = layer()
    preset = presets.triangle(model, steps=4, norm=norm, **how)
    optimizer = preset.optimizer(torch.optim.SGD(model.parameters(), lr=1e-15))
    train(model, optimizer, 2)  # the scale is 1 now
    x = torch.randn(16, 3, 2, dtype=torch.float64)
    optimizer.zero_grad()
    model(x).square().mean().backward()
    own = term(model)
    expected = own.weight.grad.clone()
    leaf = own.weight.detach().clone().requires_grad_()
    lie = own.projection.defect(leaf[None]).mean(0).sum().div(own.rows).sqrt()
    rows = x.flatten(1)
    size = (rows @ leaf.T).square().mean().sqrt() if norm == "activation" else leaf.norm() / own.rows**0.5
    expected += torch.autograd.grad(0.01 * (lie + size), leaf)[0]
    optimizer.step()
    assert torch.allclose(own.weight.grad, expected, rtol=1e-5)


def test_gate_starts_at_one_and_climbs_by_its_own_value() -> None:
    model, how = layer()
    preset = presets.gate(model, dual_lr=0.1, **how)
    optimizer = preset.optimizer(torch.optim.SGD(model.parameters(), lr=1e-15))
    train(model, optimizer, 3)
    assert term(model).gate.item() == pytest.approx(1.0)
    assert optimizer.readings().multipliers.tolist() == pytest.approx([0.3])


def test_ridge_keeps_a_term_for_asymmetric_data() -> None:
    model, how = layer()
    optimizer = presets.ridge(model, weight=0.1, **how).optimizer(torch.optim.Adam(model.parameters(), lr=0.05))
    train(model, optimizer, 100)
    assert term(model).weight.norm() > 0.1
    assert torch.equal(optimizer.readings().multipliers, torch.zeros(1).double())


def test_a_tail_is_a_fraction() -> None:
    model, how = layer()
    with pytest.raises(ce.errors.ConstraintError, match="tail=1"):
        presets.ours(model, steps=STEPS, tail=1.0, **how)


def test_an_unknown_size_is_refused_before_anything_is_relaxed() -> None:
    model, how = layer()
    norm: Any = "activations"
    with pytest.raises(ce.errors.ConstraintError, match="norm='activations': expected 'activation' or 'weight'"):
        presets.triangle(model, steps=STEPS, norm=norm, **how)
    assert not ce.relaxations(model)
