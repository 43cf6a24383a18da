"""Trap 1: a penalty must vanish on equivariant maps, and on nothing else.

A published so(3) penalty pushes the three generator images of a feature vector, (3, D), through a linear map that wants
them as columns, (D, 3), and gets there by a reshape instead of a transposition.
"""

import pytest
import torch
from torch import nn

import constrained_equiv as ce
from constrained_equiv.intertwiners import intertwiners

SPACE = intertwiners("2x0 + 2x1 + 1x2", "1x0 + 3x1 + 1x2", group=ce.groups.SO3())
A_IN, A_OUT = SPACE.inputs.generators()[0], SPACE.outputs.generators()[0]


def published_penalty(weight, x):
    """The mean over samples of || L(W x) - W L(x) ||^2, as published: the images are reshaped, not transposed."""

    def columns(images):  # (samples, 3, D) -> (samples, D, 3)
        return images.reshape(len(images), images.shape[2], 3)

    moved_inputs = columns(torch.einsum("aij,nj->nai", A_IN, x))
    moved_outputs = columns(torch.einsum("aij,nj->nai", A_OUT, x @ weight.T))
    return (moved_outputs - weight @ moved_inputs).square().sum((-2, -1)).mean()


def operator_penalty(weight, x):
    """Ours, in operator form: no samples."""
    return SPACE.defect(weight[None]).sum()


def maps():
    """An equivariant and a random map of the same norm."""
    random = torch.randn(SPACE.shape, dtype=torch.float64)
    equivariant = SPACE.project(random)
    return equivariant / equivariant.norm(), random / random.norm()


def null_dimension(penalty, x):
    """Dimension of the space on which a quadratic penalty vanishes."""
    origin = torch.zeros(SPACE.outputs.dim * SPACE.inputs.dim, dtype=torch.float64)
    values = torch.linalg.eigvalsh(torch.func.hessian(lambda flat: penalty(flat.view(SPACE.shape), x))(origin))
    return int((values < 1e-9 * values.max()).sum())


@pytest.fixture
def samples():
    return torch.randn(400, SPACE.inputs.dim, dtype=torch.float64)


def test_the_reshaped_penalty_punishes_equivariant_maps_as_much_as_random_ones(samples):
    equivariant, random = maps()
    ratio = float(published_penalty(equivariant, samples) / published_penalty(random, samples))
    assert 0.5 < ratio < 2.0
    assert null_dimension(published_penalty, samples) < SPACE.rank


def test_ours_vanishes_on_equivariant_maps_and_on_nothing_else(samples):
    equivariant, random = maps()
    assert float(operator_penalty(equivariant, samples)) < 1e-24
    assert float(operator_penalty(random, samples)) > 0.1
    assert null_dimension(operator_penalty, samples) == SPACE.rank == 2 + 6 + 1


def test_the_operator_form_is_the_mean_over_samples_of_the_transposed_penalty(samples):
    _, random = maps()
    images_in = torch.einsum("aij,nj->nia", A_IN, samples)
    images_out = torch.einsum("aij,nj->nia", A_OUT, samples @ random.T)
    sampled = (images_out - random @ images_in).square().sum((-2, -1)).mean()
    assert float(sampled) == pytest.approx(float(operator_penalty(random, samples)), rel=0.1)


@pytest.mark.parametrize("measure", ["lie", "weight"])
def test_measures_of_a_relaxed_layer_have_the_commutant_as_null_space(measure):
    layer = nn.Linear(SPACE.inputs.dim, SPACE.outputs.dim, bias=False).double()
    adapter = ce.adapters.linear(SPACE.inputs, SPACE.outputs)
    model = ce.relax(nn.Sequential(layer), where=lambda name, m: m is layer, adapter=adapter, complement=False)
    part = {"part": "non_equivariant"} if measure == "weight" else {}
    constraint = getattr(ce.constraints, measure)(model, level=0.0, **part)
    term = layer.non_equivariant
    for weight, vanishes in zip(maps(), (True, False), strict=True):
        with torch.no_grad():
            term.weight.copy_(weight)
        value = float(constraint.measure.values(constraint.terms))
        assert value < 1e-14 if vanishes else value > 0.05
