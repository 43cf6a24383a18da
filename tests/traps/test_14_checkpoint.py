"""Trap 14: multipliers, slacks and the position in the schedule were not in the checkpoint."""

import io

import pytest
import torch

import constrained_equiv as ce
from tests.cases import CASES, case_named, loss


def build(case):
    model = case.relaxed(init=0.1)
    records = [
        ce.constraints.weight(model, level=ce.schedules.cosine(0.3, 0.0, 8)),
        ce.constraints.scale(model, schedule=ce.schedules.linear(1.0, 0.5, 8)),
    ]
    base = torch.optim.Adam(ce.parameter_groups(model, lr=1e-2))
    return model, ce.ConstrainedOptimizer(base, *records)


def train(model, optimizer, case, steps):
    for step in steps:
        optimizer.zero_grad()
        loss(model(*case.data(seed=step))).backward()
        optimizer.step()


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_equal_runs(first, second):
    for (name, p), (_, q) in zip(first[0].named_parameters(), second[0].named_parameters(), strict=True):
        assert torch.equal(p, q), name
    a, b = first[1].readings(), second[1].readings()
    assert a.step == b.step and a.names == b.names
    assert torch.equal(a.multipliers, b.multipliers) and torch.equal(a.levels, b.levels)


def test_model_and_base_optimizer_alone_do_not_resume():
    case = case_named("sets, own layer")
    whole = build(case)
    train(*whole, case, range(6))
    begun, resumed = build(case), build(case)
    train(*begun, case, range(3))
    resumed[0].load_state_dict(begun[0].state_dict())
    resumed[1].base.load_state_dict(begun[1].base.state_dict())  # as published: no multipliers, no position
    train(*resumed, case, range(3, 6))
    assert resumed[1].finished_steps == 3 and not torch.equal(
        resumed[1].readings().multipliers, whole[1].readings().multipliers
    )
    with pytest.raises(AssertionError):
        assert_equal_runs(whole, resumed)


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(case):
    assert_resumes(case, stop=3)


@pytest.mark.parametrize("stop", [0, 1, 7, 8, 9])
def test_wherever_it_stopped(stop):
    """Before the first step, in the schedule, at its end and in the tail."""
    assert_resumes(case_named("sets, own layer"), stop)


def assert_resumes(case, stop):
    end = stop + 2
    whole, begun, resumed = build(case), build(case), build(case)
    train(*whole, case, range(end))
    train(*begun, case, range(stop))
    states = through_a_file([part.state_dict() for part in begun])
    for part, state in zip(resumed, states, strict=True):
        part.load_state_dict(state)
    assert resumed[1].finished_steps == stop
    assert torch.equal(resumed[1].readings().multipliers, begun[1].readings().multipliers)
    train(*resumed, case, range(stop, end))
    assert_equal_runs(whole, resumed)
