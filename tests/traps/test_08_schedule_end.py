"""Trap 8: the schedule's last trained value was 2 / E, never 0, and no step was left at zero."""

import pytest
import torch

import constrained_equiv as ce
from tests.optim.toys import points

EPOCHS = 10


def published(epoch):
    """The triangle 0 -> 1 -> 0, as it was evaluated at epochs 0 .. E - 1."""
    return 1.0 - abs(2.0 * epoch / EPOCHS - 1.0)


def test_the_published_triangle_never_came_back_to_zero():
    values = [published(epoch) for epoch in range(EPOCHS)]
    assert values[0] == 0.0 and max(values) == 1.0
    assert values[-1] == pytest.approx(2 / EPOCHS) and 0.0 not in values[1:]


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7, 10, 100])
@pytest.mark.parametrize("start, end", [(1.0, 0.0), (0.7, 0.1), (0.3, 0.3)])
def test_ramps_end_exactly_where_they_say(steps, start, end):
    for ramp in (ce.schedules.linear, ce.schedules.cosine, ce.schedules.exponential):
        schedule = ramp(start, end, steps)
        assert [schedule(steps + more) for more in (0, 1, 1000)] == [end] * 3
        assert schedule(0) == pytest.approx(start if steps else end)


@pytest.mark.parametrize("steps", [2, 3, 7, 10, 101])
def test_the_triangle_ends_at_zero(steps):
    schedule = ce.schedules.triangle(steps)
    assert schedule(0) == 0.0 and schedule(steps // 2) == 1.0
    assert [schedule(steps + more) for more in (0, 1, 1000)] == [0.0] * 3


def test_the_tail_is_trained_at_exactly_zero():
    """The steps after the schedule's end are taken with the scale, and the level, at 0."""
    model = points(1)
    (term,) = [r.term for r in ce.relaxations(model)]
    scale = ce.constraints.scale(model, schedule=ce.schedules.triangle(4))
    optimizer = ce.ConstrainedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), scale)
    trained = []
    for _ in range(7):
        trained.append(term.scale.item())
        model[0](torch.ones(1, 3, 2, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    assert trained == [0.0, 0.5, 1.0, 0.5, 0.0, 0.0, 0.0]


def test_the_term_is_exactly_zero_in_the_tail():
    model = points(1)
    (term,) = [r.term for r in ce.relaxations(model)]
    record = ce.constraints.weight(model, level=ce.schedules.linear(0.5, 0.0, 3))
    optimizer = ce.ConstrainedOptimizer(torch.optim.Adam(model.parameters(), lr=0.01), record)
    alive = []
    for _ in range(6):
        optimizer.zero_grad()
        alive.append(bool(term.weight.any()))
        model[0](torch.randn(4, 3, 2, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    assert alive == [True, True, True, False, False, False]
