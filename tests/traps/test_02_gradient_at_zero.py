"""Trap 2: the square root of a squared norm has an infinite slope at zero, and one step from zero gives NaN.

Terms start at zero, so every measure is differentiated there in the first step of every run.
"""

import pytest
import torch

import constrained_equiv as ce
from tests.cases import CASES, loss
from tests.optim.toys import points

MEASURES = {
    "weight": lambda model: ce.constraints.weight(model, level=0.0),
    "relative": lambda model: ce.constraints.relative(model, level=0.0),
    "activation": lambda model: ce.constraints.activation(model, level=0.0),
    "lie": lambda model: ce.constraints.lie(model, level=0.0),
}


def test_the_square_root_of_a_squared_norm_is_not_a_number_after_one_step():
    weight = torch.zeros(3, 3, requires_grad=True)
    torch.sqrt(weight.square().sum()).backward()
    assert torch.isnan(weight.grad).all()
    torch.optim.SGD([weight], lr=0.1).step()
    assert torch.isnan(weight).all()


@pytest.mark.parametrize("make", MEASURES.values(), ids=MEASURES)
def test_every_measure_has_slope_zero_at_zero(make):
    model = points(2)
    with torch.no_grad():
        for relaxation in ce.relaxations(model):
            relaxation.term.weight.zero_()
    record = make(model)
    for layer in model:
        layer(torch.randn(5, 3, 2, dtype=torch.float64))
    record.measure.pull(record.terms, torch.ones(2, dtype=torch.float64))
    assert not record.measure.values(record.terms).any()
    assert all(term.weight.grad is not None and not term.weight.grad.any() for term in record.terms.modules)


@pytest.mark.parametrize("case", CASES)
def test_training_from_zero_stays_finite(case):
    model, data = case.relaxed(init=0.0), case.data()
    records = [ce.constraints.weight(model, level=0.0), ce.constraints.relative(model, level=0.0)]
    base = torch.optim.Adam(model.parameters(), lr=1e-3)
    optimizer = ce.ConstrainedOptimizer(base, *records, at_zero="multipliers")
    for _ in range(3):
        optimizer.zero_grad()
        loss(model(*data)).backward()
        optimizer.step()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert torch.isfinite(optimizer.readings().multipliers).all()
    assert any(r.term.weight.any() for r in ce.relaxations(model))  # they did leave zero
