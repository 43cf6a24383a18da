"""Trap 3: a relaxed map was never regularised, because another map's weights were passed twice.

Every term has to receive gradient from its constraint alone.
"""

import pytest
import torch

import constrained_equiv as ce
from tests.cases import CASES
from tests.optim.toys import points


def test_the_map_whose_weights_are_not_passed_is_free():
    """Two maps, and a penalty called with the first one's weights both times."""
    scalars, vectors = (torch.randn(3, 3, requires_grad=True) for _ in range(2))

    def penalty(weight):
        return torch.linalg.vector_norm(weight)

    (penalty(scalars) + penalty(scalars)).backward()
    assert scalars.grad.any() and vectors.grad is None


def pulled(model, record):
    """The terms' gradients of one step in which the task asks for nothing."""
    optimizer = ce.ConstrainedOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), record)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return {r.name: r.term.weight.grad for r in ce.relaxations(model)}


@pytest.mark.parametrize("case", CASES)
def test_every_term_is_pulled_towards_zero(case):
    model = case.relaxed()
    gradients = pulled(model, ce.constraints.weight(model, level=0.01))
    for relaxation in ce.relaxations(model):
        gradient, weight = gradients[relaxation.name], relaxation.term.weight.detach()
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), weight.flatten(), dim=0)
        assert gradient.norm() > 0.1 and cosine.item() == pytest.approx(1.0), relaxation.name


@pytest.mark.parametrize("measure", ["weight", "relative", "activation", "lie"])
def test_every_measure_reaches_every_term(measure):
    model = points(4)
    record = getattr(ce.constraints, measure)(model, level=0.0)
    for layer in model:
        layer(torch.randn(5, 3, 2, dtype=torch.float64))
    gradients = pulled(model, ce.constraints.Constraint(record.measure, record.terms, lambda step: 1e-3))
    assert len(gradients) == 4 and all(gradient.norm() > 1e-3 for gradient in gradients.values())


def test_each_layer_has_a_multiplier_of_its_own():
    model = points(3)
    with torch.no_grad():
        for k, layer in enumerate(model):
            layer.non_equivariant.weight.mul_(k / layer.non_equivariant.weight.norm())
    optimizer = ce.ConstrainedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1e-3), ce.constraints.weight(model, level=0.01)
    )
    optimizer.step()
    readings = optimizer.readings()
    assert readings.names == ("0 (weight)", "1 (weight)", "2 (weight)")
    expected = (readings.values - 0.01).clamp_min(0)
    torch.testing.assert_close(readings.multipliers, expected)
    assert readings.multipliers[0] == 0 < readings.multipliers[1] < readings.multipliers[2]
