"""Trap 10: batch-norm statistics were gathered with the term on and used with it off."""

import copy

import pytest
import torch
from torch import nn

import constrained_equiv as ce
from tests.cases import case_named


class PointNorm(nn.BatchNorm1d):
    def forward(self, features):
        return super().forward(features.mT).mT


def set_network():
    return nn.Sequential(nn.Linear(3, 3), PointNorm(3), nn.Tanh(), nn.Linear(3, 3)).double()


def relaxed_sets():
    points = ce.representations.permutation(4, channels=3)
    adapter = ce.adapters.linear(points, points, axes=(-2, -1))
    plain = set_network()
    model = ce.relax(copy.deepcopy(plain), where=lambda n, m: isinstance(m, nn.Linear), adapter=adapter, init=1.0)
    return plain, model, [torch.randn(16, 4, 3, dtype=torch.float64) for _ in range(5)]


def relaxed_irreps():
    case = case_named("e3nn batch norm network")
    return case.model(), case.relaxed(), [case.data(seed)[0] for seed in range(5)]


def statistics(model):
    (layer,) = (m for m in model.modules() if isinstance(getattr(m, "running_var", None), torch.Tensor))
    return torch.cat([layer.running_mean.flatten(), layer.running_var.flatten()])


def gather(model, batches):
    """Average the statistics of the batches, as recalibration does."""
    (layer,) = (m for m in model.modules() if isinstance(getattr(m, "running_var", None), torch.Tensor))
    for count, batch in enumerate(batches, start=1):
        layer.momentum = 1 / count
        model(batch)
    return statistics(model)


@pytest.mark.parametrize("make", [relaxed_sets, relaxed_irreps])
def test_statistics_gathered_with_the_term_on_are_wrong_with_it_off(make):
    plain, model, batches = make()
    gather(model, batches)
    ce.finalize(model, on_violation="drop")
    expected = gather(plain, batches)
    assert (statistics(model) - expected).norm() > 0.1 * expected.norm()
    assert not torch.allclose(model.eval()(batches[0]), plain.eval()(batches[0]), rtol=0.1)


@pytest.mark.parametrize("make", [relaxed_sets, relaxed_irreps])
def test_after_finalize_with_batches_they_are_those_of_a_model_without_terms(make):
    plain, model, batches = make()
    gather(model, batches)
    report = ce.finalize(model, batches=iter(batches), on_violation="drop")
    expected = gather(plain, batches)
    torch.testing.assert_close(statistics(model), expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(model.eval()(batches[0]), plain.eval()(batches[0]), rtol=1e-12, atol=1e-14)
    assert report.recalibrated == 1 and all(m.training is False for m in model.modules())


def test_without_batches_the_report_warns():
    _, model, _ = relaxed_sets()
    assert "1 normalisation layers keep statistics gathered with the terms on" in str(
        ce.finalize(model, on_violation="drop")
    )
