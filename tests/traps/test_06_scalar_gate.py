"""Trap 6: constraining a scalar gate lets the weight grow as the gate shrinks.

The pair has a rescaling symmetry: only their product reaches the output.
"""

import torch
from torch import nn

import constrained_equiv as ce
from constrained_equiv.representations import permutation

LEVEL = 0.05


def trained(constrain, *, level):
    """A gated term that fits a target which is not equivariant, held by a constraint."""
    torch.manual_seed(0)
    points = permutation(4, channels=1)
    adapter = ce.adapters.linear(points, points, axes=(-2, -1))
    layer = nn.Linear(1, 1, dtype=torch.float64)
    ce.relax(layer, where=lambda name, m: True, adapter=adapter, gate=True)
    target = layer.non_equivariant.projection.complement(torch.randn(4, 4, dtype=torch.float64))
    optimizer = ce.ConstrainedOptimizer(
        torch.optim.Adam(layer.parameters(), lr=0.2), constrain(layer, level=level), enforce="projection"
    )
    x = torch.randn(64, 4, 1, dtype=torch.float64)
    for _ in range(300):
        optimizer.zero_grad()
        (layer(x) - torch.einsum("pq,nqc->npc", target, x)).square().mean().backward()
        optimizer.step()
    term = layer.non_equivariant
    return term.gate.item(), term.weight.norm().item(), term.matrix().norm().item() / 2, target.norm().item() / 2


def test_a_small_gate_hides_a_large_term():
    gate, weight, added, target = trained(
        lambda m, level: ce.constraints.gate(m, level=level, type="inequality"), level=LEVEL
    )
    assert abs(gate) < LEVEL + 1e-12  # the constraint holds
    assert weight > 5 * target and added > 0.5 * target  # and the symmetry is broken all the same


def test_the_norm_of_the_term_sees_through_the_gate():
    _, _, added, target = trained(ce.constraints.weight, level=LEVEL)
    assert added < LEVEL + 1e-12 < 0.1 * target


def test_the_measure_does_not_change_under_rescaling():
    points = permutation(4, channels=2)
    adapter = ce.adapters.linear(points, points, axes=(-2, -1))
    layer = ce.relax(nn.Linear(2, 2), where=lambda name, m: True, adapter=adapter, gate=True, init=0.3)
    by_norm, by_gate = ce.constraints.weight(layer, level=0.1), ce.constraints.gate(layer)
    values = [record.measure.values(record.terms).item() for record in (by_norm, by_gate)]
    with torch.no_grad():
        layer.non_equivariant.gate.div_(8)
        layer.non_equivariant.weight.mul_(8)
    assert by_norm.measure.values(by_norm.terms).item() == values[0]
    assert by_gate.measure.values(by_gate.terms).item() == values[1] / 8
