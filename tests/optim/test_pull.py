"""What a step adds to the gradients is the derivative of the measure, for every measure, and finite at W = 0."""

import copy
import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import constrained_equiv as ce
from constrained_equiv import _tensors
from tests.optim.toys import irreps, layers, minimise, points

COEFFICIENT = 0.3
MEASURES: dict[str, Any] = {
    "weight": ce.constraints.weight,
    "weight, non-equivariant part": lambda m, level: ce.constraints.weight(m, level=level, part="non_equivariant"),
    "relative": ce.constraints.relative,
    "activation": ce.constraints.activation,
    "lie": ce.constraints.lie,
    "weight, blocks": lambda m, level: ce.constraints.weight(m, level=level, per="block"),
    "weight, blocks of the non-equivariant part": lambda m, level: ce.constraints.weight(
        m, level=level, per="block", part="non_equivariant"
    ),
    "relative, blocks": lambda m, level: ce.constraints.relative(m, level=level, per="block"),
    "weight, shared": lambda m, level: ce.constraints.weight(m, level=level, per="model"),
    "relative, shared": lambda m, level: ce.constraints.relative(m, level=level, per="model"),
    "lie, generators": lambda m, level: ce.constraints.lie(m, level=level, per="generator"),
    "subgroup": lambda m, level: ce.constraints.subgroup(
        m, ce.groups.SO3(), level=level, where=lambda name: name in ("4", "5")
    ),
    "custom": lambda m, level: ce.constraints.custom(m, lambda term: term.weight.abs().sum(), name="l1", level=level),
}


def network(complement: bool) -> nn.Module:
    """Three stacks of two layers."""
    sets = [*points(2, complement=complement), *points(2, complement=complement, size=4)]
    return nn.ModuleList([*sets, *irreps(2, complement=complement)])


def forward(model: nn.Module) -> None:
    for i, layer in enumerate(model):
        layer(torch.randn(16, *[(3, 2), (4, 2), (9,)][i // 2], dtype=torch.float64))


def numeric(record: Any, index: int) -> Tensor:
    """The derivative of the sum of values, by central differences."""
    weight = record.terms.modules[index].weight
    slopes = torch.zeros_like(weight)
    with torch.no_grad():
        for entry in range(weight.numel()):
            ends = []
            for sign in (1.0, -1.0):
                weight.view(-1)[entry] += sign * 1e-6
                ends.append(record.measure.values(record.terms).sum())
                weight.view(-1)[entry] -= sign * 1e-6
            slopes.view(-1)[entry] = (ends[0] - ends[1]) / 2e-6
    return slopes.detach()


@pytest.mark.parametrize("complement", [True, False], ids=["complement", "free"])
@pytest.mark.parametrize("measure", MEASURES)
def test_the_pull_is_the_derivative(measure: str, complement: bool) -> None:
    model = network(complement)
    record = MEASURES[measure](model, level=1.0)
    model.train()
    forward(model)
    penalty = ce.constraints.penalty(record, coefficient=COEFFICIENT)
    optimizer = ce.ConstrainedOptimizer(torch.optim.SGD(model.parameters(), lr=1e-15), penalty)
    expected = [COEFFICIENT * numeric(record, i) for i in range(len(record.terms))]
    optimizer.step()
    for term, slope in zip(record.terms.modules, expected, strict=True):
        found = term.weight.grad
        if complement:  # what leaves the complement is taken back after the step anyhow
            found, slope = (term.projection.complement_(g.clone()) for g in (found, slope))
        assert torch.allclose(found, slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["multipliers", "penalty"])
@pytest.mark.parametrize("measure", MEASURES)
def test_the_pull_is_finite_and_zero_at_zero(measure: str, kind: str) -> None:
    model = network(True)
    with torch.no_grad():
        for r in ce.relaxations(model):
            r.term.weight.zero_()
    record = MEASURES[measure](model, level=0.0)
    model.train()
    forward(model)
    stated = record if kind == "multipliers" else ce.constraints.penalty(record, coefficient=1.0)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    ce.ConstrainedOptimizer(base, stated, at_zero="multipliers").step()
    for r in ce.relaxations(model):
        assert torch.equal(r.term.weight, torch.zeros_like(r.term.weight))


def test_every_term_is_pulled_when_records_overlap() -> None:
    """Records over some of the terms, in another order than the optimizer's stacks, add up."""
    model = network(True)
    names = [r.name for r in ce.relaxations(model)]
    some = ce.constraints.weight(model, level=1.0, where=lambda name: name in names[1:])
    record = ce.constraints.relative(model, level=1.0, where=lambda name: name in names[:3])
    model.train()
    forward(model)
    stated = [ce.constraints.penalty(r, coefficient=COEFFICIENT) for r in (record, some)]
    expected = {id(term): torch.zeros_like(term.weight) for term in (r.term for r in ce.relaxations(model))}
    for r in (record, some):
        for i, term in enumerate(r.terms.modules):
            expected[id(term)] += COEFFICIENT * numeric(r, i)
    ce.ConstrainedOptimizer(torch.optim.SGD(model.parameters(), lr=1e-15), *stated).step()
    for r in ce.relaxations(model):
        assert r.term.weight.grad.norm() > 0
        assert torch.allclose(r.term.weight.grad, expected[id(r.term)], rtol=1e-5, atol=1e-6)


# --- multi-tensor arithmetic ---


def test_both_ways_of_adding_agree() -> None:
    """The way for accelerators, which cannot run here otherwise, against the plain loop."""
    shapes = [(2, 3), (4,), (2, 3)]
    targets = [torch.randn(s) for s in shapes]
    sources, factors = [torch.randn(s) for s in shapes], torch.randn(3)
    other = copy.deepcopy(targets)
    expected = [t + f * s for t, s, f in zip(targets, sources, factors, strict=True)]
    _tensors.add_scaled_(targets, sources, factors)
    _tensors.add_scaled_stacked_(other, sources, factors)
    for found in (targets, other):
        assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("adjoined", [True, False])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_stacks_are_mapped_in_place_wherever_they_lie(count: int, adjoined: bool, monkeypatch: Any) -> None:
    monkeypatch.setitem(_tensors._PIECE, "cpu", 3 * 12 * 8)  # three tensors at a time
    tensors = [nn.Parameter(torch.randn(3, 4, dtype=torch.float64)) for _ in range(count)]
    sources, factors = [torch.randn(3, 4, dtype=torch.float64) for _ in tensors], torch.randn(count).double()
    expected = [2 * t.detach() + f * s for t, s, f in zip(tensors, sources, factors, strict=True)]
    places = [t.data_ptr() for t in tensors]
    if adjoined:
        _tensors.adjoin_(tensors)
        assert (count > 1) == (places != [t.data_ptr() for t in tensors])
    with torch.no_grad():
        _tensors.map_stacked_(tensors, lambda stack: stack.mul_(2), plus=(sources, factors))
    assert all(torch.allclose(a, b) for a, b in zip(tensors, expected, strict=True))


def test_empty_tensors_are_scaled_and_added() -> None:
    """As a process has them that holds no row of a sharded term."""
    empty = list(torch.zeros(4, 0, 3).unbind())
    _tensors.add_scaled_(empty, list(torch.zeros(4, 0, 3).unbind()), torch.ones(4))
    assert torch.equal(_tensors.norms(empty, torch.float32), torch.zeros(4))


def test_transposed_neighbours_are_no_stack() -> None:
    """Square matrices that lie side by side but are read by columns must not be taken for a stack."""
    block = torch.randn(3, 4, 4)
    tensors = [block[0], block[1].T, block[2]]
    expected = [float(t.norm()) for t in tensors]
    assert _tensors._adjoined(tensors) is None
    assert _tensors.norms(tensors, torch.float32).tolist() == pytest.approx(expected)
    assert _tensors._adjoined([block[0], block[2]]) is None
    assert _tensors._adjoined([block[1], block[0]]) is None


@torch.no_grad()
def test_a_remembered_stack_is_forgotten_when_its_tensors_move_turn_or_die() -> None:
    parameters = [nn.Parameter(torch.randn(4, 4)) for _ in range(3)]
    _tensors.adjoin_(parameters)
    stack = _tensors._adjoined(parameters)
    assert stack is not None and _tensors._adjoined(parameters) is stack  # remembered
    parameters[2].data = parameters[2].data.T  # at the same address
    assert _tensors._adjoined(parameters) is None
    parameters[2].data = parameters[2].data.T
    assert _tensors._adjoined(parameters) is stack
    parameters[1].data = parameters[1].data.clone()
    assert _tensors._adjoined(parameters) is None
    key = id(parameters[0]), 3
    assert key in _tensors._found
    del parameters
    gc.collect()
    assert key not in _tensors._found


def test_terms_that_moved_apart_are_still_projected() -> None:
    """A state loaded by assignment, or a move to another device, replaces the memory that terms shared."""
    model = network(True)
    optimizer = ce.ConstrainedOptimizer(
        torch.optim.Adam(model.parameters(), lr=0.1), ce.constraints.weight(model, level=1.0)
    )
    other = copy.deepcopy((model, optimizer))
    for r in ce.relaxations(model):
        r.term.weight.data = r.term.weight.detach().clone()
    for net, stepper in ((model, optimizer), other):
        for i, r in enumerate(ce.relaxations(net)):
            torch.manual_seed(i)
            r.term.weight.grad = torch.randn_like(r.term.weight)
        stepper.step()
    for one, two in zip(ce.relaxations(model), ce.relaxations(other[0]), strict=True):
        assert torch.allclose(one.term.weight, two.term.weight, rtol=0, atol=1e-15)


GATED = {
    "weight": ce.constraints.weight,
    "blocks": lambda m, level: ce.constraints.weight(m, level=level, per="block"),
    "shared": lambda m, level: ce.constraints.weight(m, level=level, per="model"),
    "non-equivariant part": lambda m, level: ce.constraints.weight(m, level=level, part="non_equivariant"),
    "relative": ce.constraints.relative,
    "activation": ce.constraints.activation,
    "lie": ce.constraints.lie,
    "generators": lambda m, level: ce.constraints.lie(m, level=level, per="generator"),
}


def gated(count: int = 3, ungated: int = 1) -> nn.Module:
    """Layers whose terms have gates, and some without."""
    model = nn.ModuleList(nn.Linear(2, 2, dtype=torch.float64) for _ in range(count))
    sets = ce.representations.permutation(3, channels=2)
    adapter = ce.adapters.linear(sets, sets, axes=(-2, -1))
    for i, layer in enumerate(model):
        ce.relax(layer, where=lambda n, m: True, adapter=adapter, complement=False, gate=i >= ungated, init=0.3)
    for i, r in enumerate(ce.relaxations(model)):
        if r.term.gate is not None:
            nn.init.constant_(r.term.gate, (-1) ** i * (0.5 + 0.2 * i))
    return model


@pytest.mark.parametrize("measure", GATED)
def test_gates_are_pulled_too(measure: str) -> None:
    """Else a gate grows without bound while W shrinks: only their product is held."""
    model = gated()
    record = GATED[measure](model, level=0.01)
    for layer in model:
        layer(torch.randn(8, 3, 2, dtype=torch.float64))
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = ce.ConstrainedOptimizer(base, ce.constraints.penalty(record, coefficient=COEFFICIENT))
    gates = [r.term.gate for r in ce.relaxations(model) if r.term.gate is not None]
    assert len(gates) == 2
    optimizer.zero_grad()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for gate in gates:
        rises = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                gate += step
                rises.append(float(COEFFICIENT * record.measure.values(record.terms).sum()))
                gate -= step
        assert float(gate.grad) == pytest.approx((rises[0] - rises[1]) / 2e-6, abs=1e-6)


def test_a_gate_at_zero_hides_its_own_term_alone() -> None:
    model = gated()
    terms = [r.term for r in ce.relaxations(model)]
    nn.init.zeros_(terms[1].gate)
    record = ce.constraints.weight(model, level=0.01)
    sizes = dict(zip(record.terms.names, record.measure.values(record.terms).tolist(), strict=True))
    for name, term in zip(("0", "1", "2"), terms, strict=True):
        assert sizes[name] == pytest.approx(float(term.matrix().detach().norm()) / term.rows**0.5)
    assert sizes["1"] == 0 < sizes["0"]


def test_a_gate_comes_to_rest() -> None:
    model, (term,) = layers((2, 2), free=True, gate=True)
    nn.init.constant_(term.weight, 0.3)
    base = torch.optim.SGD(model.parameters(), lr=0.02)
    optimizer = ce.ConstrainedOptimizer(base, ce.constraints.weight(model, level=0.3))
    minimise(optimizer, lambda: (0.5 * (term.matrix() - 1) ** 2).sum(), 4000)
    assert float(optimizer.readings().values) == pytest.approx(0.3, abs=1e-9)
    assert abs(float(term.gate.detach())) < 1


def test_a_penalty_leaves_what_is_equivariant_up_to_rounding() -> None:
    """Of a part that is pinned at 0, rounding is left, which must not be taken for a direction."""
    model = points(1, complement=False)
    (relaxation,) = ce.relaxations(model)
    target = relaxation.term.projection.project(torch.randn_like(relaxation.term.weight)).detach()
    record = ce.constraints.weight(model, level=0.0, part="non_equivariant")
    penalty = ce.constraints.penalty(ce.constraints.weight(model, level=0.0, part="non_equivariant"), coefficient=10.0)
    optimizer = ce.ConstrainedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), record, penalty)
    minimise(optimizer, lambda: 0.5 * (relaxation.term.weight - target).square().sum(), 300)
    assert torch.allclose(relaxation.term.weight, target, rtol=0, atol=1e-12)
