"""Trap 15: generators were plain CUDA tensors made in __init__: no CPU, no `.to()`, no `.double()`.

A term keeps tensors in parameters and buffers alone; the projection's constants follow what they are applied to.
"""

import dataclasses

import pytest
import torch
from torch import nn

import constrained_equiv as ce
from tests.cases import CASES, case_named, loss, tensors


class Bound(nn.Module):
    """A Lie penalty as published: its generators are attributes, and stay where and what they were."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 3))
        self.generators = torch.tensor([[[0.0, -1, 0], [1, 0, 0], [0, 0, 0]]])

    def forward(self):
        return (self.weight @ self.generators - self.generators @ self.weight).square().sum()


def test_tensors_that_are_attributes_do_not_move():
    module = Bound()
    assert torch.isfinite(module())
    with pytest.raises(RuntimeError, match="dtype"):
        module.double()()
    moved = Bound().to("meta")
    assert moved.weight.is_meta and not moved.generators.is_meta


def hidden_tensors(value, depth=6):
    """Tensors inside plain Python values."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, nn.Module) or depth == 0:
        return []
    if isinstance(value, dict):
        parts = list(value.values())
    elif isinstance(value, list | tuple | set | frozenset):
        parts = list(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, ce.groups.Group):  # defined once, on the CPU
        parts = [getattr(value, f.name) for f in dataclasses.fields(value)]
    else:
        return []
    return [tensor for part in parts for tensor in hidden_tensors(part, depth - 1)]


@pytest.mark.parametrize("case", CASES)
def test_a_term_hides_no_tensor(case):
    untouched = case.model()
    for relaxation in ce.relaxations(case.relaxed(gate=True)):
        term = relaxation.term
        attributes = {
            key: value for key, value in vars(term).items() if key not in ("_parameters", "_buffers", "projection")
        }
        assert not hidden_tensors(attributes)
        plain = {key for key in vars(relaxation.layer) if not key.startswith("_")}
        assert plain == {key for key in vars(untouched.get_submodule(relaxation.name)) if not key.startswith("_")}


@pytest.mark.parametrize("case", CASES)
def test_terms_follow_to_and_double(case):
    model = case.relaxed(torch.float32, gate=True)
    for relaxation in ce.relaxations(model):
        relaxation.term.record("response")
    model.double()
    for relaxation in ce.relaxations(model):
        assert {t.dtype for t in (*relaxation.term.parameters(), *relaxation.term.buffers())} == {torch.float64}
    record = ce.constraints.lie(model, level=0.1) if case.needs != "escnn" else ce.constraints.weight(model, level=0.1)
    assert record.measure.values(record.terms).dtype == torch.float64
    for relaxation in ce.relaxations(model.to("meta")):
        assert all(t.is_meta for t in (*relaxation.term.parameters(), *relaxation.term.buffers()))


@pytest.mark.parametrize("name", ["sets, nn.Linear", "vectors, own layer", "e3nn gate network"])
def test_a_relaxed_model_runs_on_the_meta_device(name):
    case = case_named(name)
    model = case.relaxed().to("meta")
    data = [part.to("meta") for part in case.data()]
    assert all(part.is_meta for part in tensors(model(*data)))


@pytest.mark.parametrize("case", CASES)
def test_the_whole_way_on_every_device(case, device):
    model = case.relaxed(init=0.1).to(device)
    data = [part.to(device) if isinstance(part, torch.Tensor) else part for part in case.data()]
    record = ce.constraints.weight(model, level=ce.schedules.linear(0.1, 0.0, 2))
    optimizer = ce.ConstrainedOptimizer(torch.optim.Adam(model.parameters(), lr=1e-3), record)
    for _ in range(3):
        optimizer.zero_grad()
        loss(model(*data)).backward()
        optimizer.step()
    assert {p.device.type for p in model.parameters()} == {device.type}
    assert optimizer.readings().multipliers.device.type == device.type
    ce.finalize(model, optimizer=optimizer)
    assert all(part.device.type == device.type for part in tensors(model(*data)))


def test_relaxing_a_model_that_was_moved(device):
    case = case_named("vectors, own layer")
    model = case.relax(case.model().to(device))
    for relaxation in ce.relaxations(model):
        tensors_of_term = (*relaxation.term.parameters(), *relaxation.term.buffers())
        assert {t.device.type for t in tensors_of_term} == {device.type}
