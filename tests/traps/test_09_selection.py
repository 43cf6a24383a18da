"""Trap 9: checkpoints were selected on the test set, or with the term still on.

The library cannot know which data are the test set; it scores with the terms off, and the score is that of the model
which `finalize` gives back.
"""

import copy

import pytest
import torch
from torch import nn

import constrained_equiv as ce
from tests.cases import CASES, loss


def settled(model):
    """An optimizer whose levels have reached their end."""
    return ce.ConstrainedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), ce.constraints.weight(model, level=9.0))


def candidates():
    """Two relaxed models and a score: the first is perfect with its term and poor without, the second the opposite."""
    torch.manual_seed(0)
    teacher, noise = torch.randn(2, 3, 3)
    x = torch.randn(20, 3)
    models = []
    for own, term in ((teacher + noise, -noise), (teacher + 0.1 * noise, noise)):
        model = nn.Linear(3, 3, bias=False)
        ce.relax(model, where=lambda name, m: True, adapter=ce.adapters.linear("3x0e", "3x0e"), complement=False)
        with torch.no_grad():
            model.weight.copy_(own)
            model.non_equivariant.weight.copy_(term)
        models.append(model)

    def score(model):
        with torch.no_grad():
            return (model(x) - x @ teacher.T).square().mean().item()

    def score_as_used(model):
        finished = copy.deepcopy(model)
        ce.finalize(finished, on_violation="drop")
        return score(finished)

    return *models, score, score_as_used


def test_a_score_with_terms_on_prefers_the_worse_model():
    first, second, score, score_as_used = candidates()
    assert score(first) < 1e-10 < score(second)
    assert score_as_used(first) > score_as_used(second)


def test_the_kept_model_is_the_one_that_is_better_with_terms_off():
    first, second, score, score_as_used = candidates()
    model = copy.deepcopy(first)
    best = ce.monitor.BestModel(model, settled(model))
    for candidate in (first, second, first):
        model.load_state_dict(candidate.state_dict())
        assert best.consider(score) == score_as_used(candidate)
    best.restore()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), second.parameters(), strict=True))
    assert best.score == score_as_used(model)


@pytest.mark.parametrize("case", CASES)
def test_the_score_is_that_of_the_finished_model(case):
    model, data = case.relaxed(), case.data()
    model.eval()
    best = ce.monitor.BestModel(model, settled(model))

    def score(m):
        return loss(m(*data)).item()

    found = best.consider(score)
    assert found != score(model)
    ce.finalize(model, on_violation="drop")
    assert found == score(model)
