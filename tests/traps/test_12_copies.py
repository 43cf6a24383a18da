"""Trap 12: the "best model" was an alias of the live model, and followed it. Copies are copies."""

import copy

import pytest
import torch

import constrained_equiv as ce
from tests.cases import CASES, case_named, loss, tensors


def train(model, data, steps=1):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(*data)).backward()
        optimizer.step()


def values(model):
    return {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def test_a_state_dict_is_an_alias_of_the_live_model():
    case = case_named("sets, own layer")
    model = case.relaxed()
    best, expected = model.state_dict(), values(model)
    train(model, case.data())
    assert not any(
        torch.equal(best[key], value) for key, value in expected.items() if value.dtype.is_floating_point and value.ndim
    )


@pytest.mark.parametrize("case", CASES)
def test_a_deepcopy_of_a_relaxed_model_is_independent(case):
    model, data = case.relaxed(gate=True), case.data()
    clone = copy.deepcopy(model)
    shared = {t.data_ptr() for t in (*model.parameters(), *model.buffers()) if t.numel()}
    assert not shared & {t.data_ptr() for t in clone.parameters() if t.numel()}
    for mine, other in zip(ce.relaxations(model), ce.relaxations(clone), strict=True):
        assert mine.term is not other.term and mine.layer is not other.layer
    expected = values(clone)
    train(model, data)
    with torch.no_grad():
        for relaxation in ce.relaxations(model):
            relaxation.term.scale.fill_(0.25)
            relaxation.term.gate.fill_(0.25)
    for key, value in expected.items():
        assert torch.equal(clone.state_dict()[key], value), key
    with ce.disabled(model):
        assert all(r.term.active for r in ce.relaxations(clone))


def test_the_best_model_does_not_follow_the_live_one():
    case = case_named("sets, own layer")
    model, data = case.relaxed(), case.data()
    optimizer = ce.ConstrainedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05), ce.constraints.weight(model, level=9.0)
    )
    best = ce.monitor.BestModel(model, optimizer)
    best.consider(lambda m: 0.0)
    expected = values(model)
    train(model, data, steps=2)
    best.consider(lambda m: 1.0)
    saved = best.state_dict()["copy"]
    assert all(torch.equal(saved[key], value) for key, value in expected.items())
    best.restore()
    assert all(torch.equal(model.state_dict()[key], value) for key, value in expected.items())
    train(model, data)  # restoring did not hand out the copy either
    assert all(torch.equal(saved[key], value) for key, value in expected.items())


def test_terms_whose_storage_is_shared_between_layers_are_copied_one_by_one():
    """The optimizer may lay terms of one shape side by side in memory; a copy keeps nothing of that."""
    case = case_named("sets, nn.Linear")
    model, data = case.relaxed(), case.data()
    ce.ConstrainedOptimizer(torch.optim.Adam(model.parameters()), ce.constraints.weight(model, level=1.0))
    clone = copy.deepcopy(model)
    expected = [part.detach() for part in tensors(model(*data))]
    train(clone, data)
    assert all(torch.equal(a, b) for a, b in zip(tensors(model(*data)), expected, strict=True))
