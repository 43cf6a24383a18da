"""Trap 11: early stopping was allowed while the scale was still above 0, so a broken model was kept."""

import torch

import constrained_equiv as ce
from tests.optim.toys import points

STEPS = 10


class Patience:
    """Early stopping as it is written everywhere."""

    def __init__(self, patience):
        self.patience, self.best, self.waited = patience, float("inf"), 0

    def should_stop(self, score):
        self.waited = 0 if score < self.best else self.waited + 1
        self.best = min(self.best, score)
        return self.waited >= self.patience


def run(make):
    """Train; the score gets worse as the term is pressed to zero, then improves. Returns step and level at the stop."""
    model = points(1)
    record = ce.constraints.weight(model, level=ce.schedules.linear(0.5, 0.0, STEPS))
    optimizer = ce.ConstrainedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), record)
    stopping = make(optimizer)
    for step in range(1, 4 * STEPS):
        optimizer.zero_grad()
        model[0](torch.ones(2, 3, 2, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
        score = step if step <= STEPS else max(2.0 * STEPS - step, 5.0)
        if stopping.should_stop(score):
            break
    return step, record.level(step), bool(ce.relaxations(model)[0].term.weight.any())


def test_plain_patience_stops_while_the_symmetry_is_broken():
    step, level, broken = run(lambda optimizer: Patience(3))
    assert step == 4 and level > 0 and broken


def test_ours_waits_for_the_end_of_the_schedule():
    step, level, broken = run(lambda optimizer: ce.monitor.EarlyStopping(optimizer, patience=3))
    assert level == 0 and not broken
    assert step == STEPS + 5 + 3  # the score improved until STEPS + 5: patience counts from there


def test_scores_of_the_relaxed_model_are_not_remembered():
    model = points(1)
    record = ce.constraints.weight(model, level=ce.schedules.linear(0.5, 0.0, 2))
    optimizer = ce.ConstrainedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), record)
    stopping = ce.monitor.EarlyStopping(optimizer, patience=1)
    assert not stopping.should_stop(0.0)  # the best score of all, with a term
    for _ in range(2):
        optimizer.step()
    assert not stopping.should_stop(2.0)  # the first that counts
    assert not stopping.should_stop(1.0)
    assert stopping.should_stop(1.0)
