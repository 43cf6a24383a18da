"""Trap 7: penalties summed over batch, points and layers change their meaning with the batch size."""

import pytest
import torch
from torch import nn

import constrained_equiv as ce
from constrained_equiv.representations import permutation

MEASURES = ("weight", "relative", "activation", "lie")


def network(layers=1, channels=2):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(channels, channels, dtype=torch.float64) for _ in range(layers)))
    points = permutation(3, channels=channels)
    adapter = ce.adapters.linear(points, points, axes=(-2, -1))
    generator = torch.Generator().manual_seed(0)
    return ce.relax(
        model, where=lambda name, m: isinstance(m, nn.Linear), adapter=adapter, init=0.1, generator=generator
    )


def measured(model, measure, x):
    record = getattr(ce.constraints, measure)(model, level=1.0)
    model(x)
    return record.measure.values(record.terms)


@pytest.fixture
def x():
    return torch.randn(8, 3, 2, dtype=torch.float64)


def test_a_sum_doubles_with_the_batch(x):
    (layer,) = model = network()
    with torch.no_grad():

        def penalty(batch):
            extra = layer(batch)
            with ce.disabled(model):
                return (extra - layer(batch)).square().sum()

        assert penalty(torch.cat([x, x])).item() == pytest.approx(2 * penalty(x).item())


@pytest.mark.parametrize("measure", MEASURES)
def test_the_same_samples_twice_measure_the_same(measure, x):
    once, twice = (measured(network(2), measure, batch) for batch in (x, torch.cat([x, x])))
    torch.testing.assert_close(once, twice, rtol=1e-6, atol=0)
    more_axes = measured(network(2), measure, torch.stack([x, x]))
    torch.testing.assert_close(once, more_axes, rtol=1e-6, atol=0)


@pytest.mark.parametrize("measure", MEASURES)
def test_a_layer_measures_the_same_among_few_and_many(measure, x):
    one, many = measured(network(1), measure, x), measured(network(8), measure, x)
    torch.testing.assert_close(many[:1], one, rtol=1e-6, atol=0)


@pytest.mark.parametrize("measure", ["weight", "activation"])
def test_a_value_is_an_output_per_feature_whatever_the_width(measure):
    """Terms whose entries have the same scale per input give RMS outputs that do not grow with the outputs' number."""
    values = []
    for channels in (2, 32):
        model = network(channels=channels)
        with torch.no_grad():
            model[0].non_equivariant.weight.div_(channels**0.5)
        values.append(measured(model, measure, torch.randn(4000, 3, channels, dtype=torch.float64)).item())
    assert values[0] == pytest.approx(values[1], rel=0.3)
