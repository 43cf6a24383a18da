"""Layers with stated representations: the term acts on the named axes, at the layer's own output, for every rank."""

import copy

import pytest
import torch
from torch import nn

import constrained_equiv as ce
from constrained_equiv.intertwiners import intertwiners
from constrained_equiv.representations import permutation, vectors
from tests.cases import VectorMap, case_named

BATCHES = [(), (1,), (5,), (0,), (2, 3), (2, 0, 3), (2, 1, 3, 2)]
POINTS = permutation(4, channels=3)


def relaxed(layer, inputs, outputs, **options):
    adapter = ce.adapters.linear(inputs, outputs, **options)
    generator = torch.Generator().manual_seed(0)
    return ce.relax(layer.double(), where=lambda name, m: m is layer, adapter=adapter, init=1.0, generator=generator)


def base_output(layer, *arguments):
    with ce.disabled(layer):
        return layer(*arguments)


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_one_product_on_the_last_axis(batch, bias):
    layer = relaxed(nn.Linear(9, 8, bias=bias), "3x0e + 2x1o", "2x0e + 2x1o")
    x = torch.randn(*batch, 9, dtype=torch.float64)
    expected = base_output(layer, x) + x @ layer.non_equivariant.matrix().T
    torch.testing.assert_close(layer(x), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_sets_on_the_last_two_axes(batch):
    layer = relaxed(nn.Linear(3, 3), POINTS, POINTS, axes=(-2, -1))
    x = torch.randn(*batch, 4, 3, dtype=torch.float64)
    added = torch.einsum("pcqd,...qd->...pc", layer.non_equivariant.matrix().view(4, 3, 4, 3), x)
    torch.testing.assert_close(layer(x), base_output(layer, x) + added, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_vectors_component_first(batch):
    representations = vectors(4, layout="ir_mul"), vectors(2, layout="ir_mul")
    layer = relaxed(nn.Linear(4, 2, bias=False), *representations, axes=(-2, -1))
    x = torch.randn(*batch, 3, 4, dtype=torch.float64)
    added = torch.einsum("dokc,...kc->...do", layer.non_equivariant.matrix().view(3, 2, 3, 4), x)
    torch.testing.assert_close(layer(x), base_output(layer, x) + added, rtol=1e-14, atol=1e-14)


class Trailing(nn.Module):
    """Mix the channels of vectors (batch, channels, 3, ...)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4))

    def forward(self, x):
        return torch.einsum("oc,nc...->no...", self.weight, x)


@pytest.mark.parametrize("trailing", [(), (5,), (0,), (5, 2)], ids=str)
@pytest.mark.parametrize("axes", [(1, 2), (2, 1)])
def test_axes_in_the_middle_and_in_any_order(trailing, axes):
    """A `.view` without a permutation would scramble points, channels and components here."""
    layout = "mul_ir" if axes == (1, 2) else "ir_mul"
    layer = relaxed(Trailing(), vectors(4, layout=layout), vectors(2, layout=layout), axes=axes)
    x = torch.randn(3, 4, 3, *trailing, dtype=torch.float64)
    matrix = layer.non_equivariant.matrix()
    if axes == (1, 2):
        added = torch.einsum("odck,nck...->nod...", matrix.view(2, 3, 4, 3), x)
    else:
        added = torch.einsum("dokc,nck...->nod...", matrix.view(3, 2, 3, 4), x)
    torch.testing.assert_close(layer(x), base_output(layer, x) + added, rtol=1e-14, atol=1e-14)


def test_features_that_are_not_contiguous():
    layer = relaxed(VectorMap(4, 2), vectors(4), vectors(2), axes=(1, 2))
    x = torch.randn(3, 4, 5, dtype=torch.float64).mT
    x = torch.stack([x[:, :4], x[:, 1:], x[:, :4]], dim=1).transpose(1, 3)[:, :, :3, 0].expand(-1, -1, 3)
    assert not x.is_contiguous() and x.shape[1:] == (4, 3)
    torch.testing.assert_close(layer(x), layer(x.contiguous()), rtol=0, atol=0)


def test_further_arguments_reach_the_layer():
    class Scaled(nn.Linear):
        def forward(self, x, factor, *, shift=0.0):
            return factor * super().forward(x) + shift

    layer = relaxed(Scaled(3, 3, bias=False), "1x1o", "1x1o")
    x = torch.randn(2, 3, dtype=torch.float64)
    expected = 2.0 * base_output(layer, x, 1.0) + 1.0 + x @ layer.non_equivariant.matrix().T
    torch.testing.assert_close(layer(x, 2.0, shift=1.0), expected, rtol=1e-14, atol=1e-14)


def test_merged_gradients_equal_those_of_the_sum():
    layer = relaxed(nn.Linear(9, 8), "3x0e + 2x1o", "2x0e + 2x1o")
    other = copy.deepcopy(layer)
    x = torch.randn(5, 9, dtype=torch.float64)
    layer(x).square().sum().backward()
    (base_output(other, x) + x @ other.non_equivariant.matrix().T).square().sum().backward()
    for p, q in zip(layer.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-13, atol=1e-13)


def test_the_dense_layer_is_one_product():
    """The term of a dense layer is added to its weight; no second product and no stored activation."""
    layer = relaxed(nn.Linear(9, 8), "3x0e + 2x1o", "2x0e + 2x1o")
    x = torch.randn(5, 9, dtype=torch.float64)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        layer(x)
    assert sum(event.count for event in profile.key_averages() if event.key in ("aten::addmm", "aten::mm")) == 1


# --- folding ----------------------------------------------------------------------------------------------------------


def test_a_dense_layer_folds_exactly():
    """The folded layer is the orthogonal projection of the relaxed one, when it was equivariant before."""
    space = intertwiners("3x0e + 2x1o", "2x0e + 2x1o")
    layer = nn.Linear(9, 8, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(space.project(layer.weight))
    adapter = ce.adapters.linear("3x0e + 2x1o", "2x0e + 2x1o")
    ce.relax(layer, where=lambda n, m: True, adapter=adapter, complement=False, init=1.0)
    total = (layer.weight + layer.non_equivariant.weight).detach()
    report = ce.finalize(layer, fold=True, on_violation="drop")
    torch.testing.assert_close(layer.weight.detach(), space.project(total), rtol=0, atol=1e-14)
    (entry,) = report.layers
    assert entry.removed == pytest.approx(space.complement(total).norm().item()) and entry.unfolded == 0


@pytest.mark.parametrize("name", ["sets, nn.Linear", "vectors, own layer", "vectors, component first"])
def test_what_does_not_fold_is_reported_and_changes_no_weight(name):
    case = case_named(name)
    plain, model = case.model(), case.relaxed(complement=False)
    norms = [r.site.projection.project(r.term.weight.detach()).norm().item() for r in ce.relaxations(model)]
    report = ce.finalize(model, fold=True, on_violation="drop")
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), model.parameters(), strict=True))
    assert [layer.unfolded for layer in report.layers] == pytest.approx(norms)
    assert all(layer.folded == 0 for layer in report.layers) and "does not fit" in str(report)


def test_a_subclass_with_another_forward_is_not_mistaken_for_a_dense_layer():
    class Transposing(nn.Linear):
        def forward(self, x):
            return super().forward(x.flip(-1))

    layer = relaxed(Transposing(3, 3), "1x1o", "1x1o")
    x = torch.randn(2, 3, dtype=torch.float64)
    expected = base_output(layer, x) + x @ layer.non_equivariant.matrix().T
    torch.testing.assert_close(layer(x), expected, rtol=1e-14, atol=1e-14)


# --- what the user stated does not fit --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inputs, outputs, axes, match",
    [
        (permutation(5, channels=3), POINTS, (-2, -1), "belongs to S_4: expected S_5"),
        ("4x1o", "1x1x1", (-1,), "cannot read '1x1x1'"),
        ("1x1o", "2x1", (-1,), "cannot read '2x1'"),
    ],
)
def test_representations_that_cannot_be_read(inputs, outputs, axes, match):
    with pytest.raises(ce.errors.RepresentationError, match=match):
        ce.adapters.linear(inputs, outputs, axes=axes)


@pytest.mark.parametrize(
    "inputs, outputs, match",
    [
        (
            permutation(4, channels=2),
            POINTS,
            r"features of shape \(2, 4, 3\) with 12 entries .* expected 8 for 2xpoints",
        ),
        (POINTS, permutation(4, channels=2), r"result of shape \(2, 4, 3\) with 12 entries .* expected 8 for 2xpoints"),
    ],
)
def test_features_of_another_size(inputs, outputs, match):
    layer = relaxed(nn.Linear(3, 3), inputs, outputs, axes=(-2, -1))
    with pytest.raises(ce.errors.RepresentationError, match=match):
        layer(torch.zeros(2, 4, 3, dtype=torch.float64))


def test_a_layer_without_weights_is_refused():
    with pytest.raises(ce.errors.RelaxationError, match="Tanh has no parameters: expected a layer with weights"):
        ce.relax(nn.Tanh(), where=lambda n, m: True, adapter=ce.adapters.linear("1x1o", "1x1o"))
