"""Trap 4: a misspelt keyword vanished in **kwargs, so the scale stayed 1 in training and in evaluation."""

import inspect

import pytest
import torch
from torch import nn

import constrained_equiv as ce
from constrained_equiv._terms import NonEquivariantTerm
from tests.cases import case_named, tensors


class Swallowing(nn.Linear):
    """A relaxed layer as published: what it does not know, it ignores."""

    def __init__(self, inputs, outputs, **kwargs):
        super().__init__(inputs, outputs)
        self.theta = kwargs.get("theta", 1.0)
        self.extra = nn.Linear(inputs, outputs, bias=False)

    def forward(self, x):
        return super().forward(x) + self.theta * self.extra(x)


def test_a_swallowed_keyword_leaves_the_term_on():
    layer = Swallowing(3, 3, thetha=0.0)
    x = torch.randn(2, 3)
    assert layer.theta == 1.0 and not torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize(
    "function", [ce.relax, ce.finalize, ce.constraints.scale, ce.ConstrainedOptimizer, NonEquivariantTerm]
)
def test_unknown_keywords_raise(function):
    with pytest.raises(TypeError, match="unexpected keyword argument 'thetha'"):
        function(thetha=0.0)
    kinds = {parameter.kind for parameter in inspect.signature(function).parameters.values()}
    assert inspect.Parameter.VAR_KEYWORD not in kinds


@pytest.mark.parametrize("name", ["e3nn linear", "e3nn gate network", "vectors, own layer", "sets, nn.Linear"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_the_scale_reaches_the_output_and_zero_switches_the_term_off(name, training):
    case = case_named(name)
    data = case.data()

    def output(scale):
        model = case.relaxed().train(training)
        for relaxation in ce.relaxations(model):
            relaxation.term.scale.fill_(scale)
        return [part.detach() for part in tensors(model(*data))]

    plain = [part.detach() for part in tensors(case.model().train(training)(*data))]
    half, whole, off = output(0.5), output(1.0), output(0.0)
    assert any((a - b).norm() > 1e-3 * b.norm() for a, b in zip(half, whole, strict=True))
    for a, b in zip(off, plain, strict=True):
        assert (a - b).abs().max() <= 64 * torch.finfo(a.dtype).eps * max(1.0, a.abs().max().item())
    model = case.relaxed().train(training)
    with ce.disabled(model):
        assert all(torch.equal(a, b) for a, b in zip(tensors(model(*data)), plain, strict=True))
