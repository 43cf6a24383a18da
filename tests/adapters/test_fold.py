"""Folding: the equivariant part of a free term moves into the layer's own weights as far as they can hold it."""

import pytest
import torch
from torch import Tensor, nn

import constrained_equiv as ce
from tests import steerable

# --- escnn: three numbers ---------------------------------------------------------------------------------------------

CONVOLUTIONS = {
    "C_4": lambda: steerable.planar("C_4", stride=2),
    "C_4, groups": lambda: steerable.planar("C_4", groups=2),
    "C_8": lambda: steerable.planar("C_8", dilation=2),
    "D_4, transposed": lambda: steerable.planar("D_4", transposed=True),
    "SO(2), transposed": lambda: steerable.planar("SO(2)", transposed=True, stride=2),
    "linear, C_8": lambda: steerable.linear("C_8"),
    "linear, SO(3)": lambda: steerable.linear("SO(3)"),
}
BAND_LIMITED = {"C_4", "C_4, groups", "D_4, transposed"}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_kernel_falls_into_three_orthogonal_parts(name):
    pytest.importorskip("escnn")
    layer = CONVOLUTIONS[name]()
    before = layer.expand_parameters()[0].detach().clone()
    bias = None if layer.bias is None else layer.bias.detach().clone()
    ce.relax(layer, complement=False, init=1.0)
    term = layer.non_equivariant
    weight, projection = term.weight.detach().clone(), term.projection
    equivariant = projection.project(weight)
    (report,) = ce.finalize(layer, fold=True, on_violation="drop").layers
    written = layer.expand_parameters()[0].detach() - before
    assert report.folded == pytest.approx(written.norm().item(), rel=1e-4)
    assert report.removed == pytest.approx((weight - equivariant).norm().item(), rel=1e-4)
    assert report.unfolded == pytest.approx((equivariant - written).norm().item() if report.unfolded else 0, rel=1e-3)
    assert (report.unfolded > 0.1 * report.folded) == (name in BAND_LIMITED)
    squares = report.folded**2 + report.unfolded**2 + report.removed**2
    assert squares == pytest.approx(weight.square().sum().item(), rel=1e-4)
    assert bias is None or torch.equal(layer.bias, bias)


@pytest.mark.parametrize("name", sorted(BAND_LIMITED))
def test_what_is_written_is_the_nearest_kernel_of_the_layer(name):
    pytest.importorskip("escnn")
    layer = CONVOLUTIONS[name]()
    before = layer.expand_parameters()[0].detach().clone()
    ce.relax(layer, complement=False, init=1.0)
    weight = layer.non_equivariant.weight.detach().clone()
    ce.finalize(layer, fold=True, on_violation="drop")
    rest = weight - (layer.expand_parameters()[0].detach() - before)
    for _ in range(5):  # what is left over is orthogonal to every kernel that the layer can make
        layer.weights.data.normal_()
        own = layer.expand_parameters()[0].detach()
        assert (rest * own).sum().abs() < 1e-5 * rest.norm() * own.norm()


def test_a_redundant_basis_takes_the_coefficients_of_least_norm():
    pytest.importorskip("escnn")
    from escnn import gspaces
    from escnn import nn as enn

    space = gspaces.rot2dOnR2(4)
    field = space.type(space.regular_repr)
    layer = enn.R2Conv(field, field, 3, frequencies_cutoff=6.0)
    matrix = torch.stack([layer.basisexpansion(w).flatten() for w in torch.eye(layer.weights.numel())], 1).double()
    before = layer.weights.detach().clone()
    ce.relax(layer, complement=False, init=1.0)
    weight = layer.non_equivariant.weight.detach().flatten().double()
    (report,) = ce.finalize(layer, fold=True, on_violation="drop").layers
    expected = torch.linalg.pinv(matrix, rtol=1e-5) @ weight
    torch.testing.assert_close((layer.weights - before).double(), expected, rtol=0, atol=1e-5)
    assert report.unfolded == 0 and matrix.shape[1] > torch.linalg.matrix_rank(matrix, rtol=1e-4)


def test_folding_a_band_limited_part_is_reported():
    pytest.importorskip("escnn")
    layer = ce.relax(CONVOLUTIONS["C_4"](), complement=False, init=1.0)
    text = str(ce.finalize(layer, fold=True, on_violation="drop"))
    assert "unfolded" in text and "does not fit into its own weights" in text


# --- e3nn: tensor products with a constant scalar ---------------------------------------------------------------------

PRODUCTS = {
    "harmonics": ("3x0e + 2x1o", "1x0e + 1x1o", "2x0e + 4x1o"),
    "two constants": ("3x0e + 2x1o + 1x0e", "2x0e + 1x1o + 1x0e", "2x0e + 2x1o + 1x1o"),
    "high degrees": ("2x2e + 1x1e", "1x0e + 1x2e", "1x1e + 3x2e"),
}
NORMALISATIONS = [("element", "component"), ("path", "norm"), ("none", "none")]


def product(name: str, path: str = "element", irrep: str = "component") -> nn.Module:
    o3 = pytest.importorskip("e3nn.o3")
    return o3.FullyConnectedTensorProduct(*PRODUCTS[name], path_normalization=path, irrep_normalization=irrep)


def second_input(layer, count: int = 6) -> Tensor:
    """Even scalars are constant, all else is not."""
    features = torch.randn(count, layer.irreps_in2.dim)
    for i, ((mul, ir), where) in enumerate(zip(layer.irreps_in2, layer.irreps_in2.slices(), strict=True)):
        if str(ir) == "0e":
            features[:, where] = torch.linspace(0.5, 1.5, mul) * (-1) ** i
    return features


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("normalisation", NORMALISATIONS, ids="-".join)
@pytest.mark.usefixtures("float64_default")
def test_a_product_with_constant_scalars_folds_completely(name, normalisation):
    layer = product(name, *normalisation)
    x, y, other = torch.randn(6, layer.irreps_in1.dim), second_input(layer), second_input(layer)
    plain = layer(x, y), layer(x, other)
    ce.relax(layer, complement=False, init=1.0)
    term = layer.non_equivariant
    added = nn.functional.linear(x, term.projection.project(term.weight.detach()))
    report = ce.finalize(layer, fold=True, on_violation="drop", batches=[(x, y)], forward=lambda m, b: m(*b))
    for before, second in zip(plain, (y, other), strict=True):
        torch.testing.assert_close(layer(x, second) - before, added, rtol=0, atol=1e-13)
    assert report.layers[0].unfolded == 0 < report.layers[0].folded


@pytest.mark.usefixtures("float64_default")
def test_constants_share_a_map_with_least_norm():
    layer = product("two constants")
    x, y = torch.randn(6, layer.irreps_in1.dim), second_input(layer)
    before = layer.weight.detach().clone()
    ce.relax(layer, complement=False, init=1.0)
    term = layer.non_equivariant
    target = term.projection.project(term.weight.detach())
    ce.finalize(layer, fold=True, on_violation="drop", batches=[(x, y)], forward=lambda m, b: m(*b))
    even = [str(ir) == "0e" for mul, ir in layer.irreps_in2 for _ in range(mul * ir.dim)]
    scalars = y[:1] * torch.tensor(even)
    units, constant = torch.eye(layer.irreps_in1.dim), scalars.expand(layer.irreps_in1.dim, -1)
    maps = torch.stack([(layer(units, constant, w)).T.flatten() for w in torch.eye(layer.weight_numel)], 1)
    expected = torch.linalg.pinv(maps) @ target.flatten()
    torch.testing.assert_close(layer.weight.detach() - before, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "reason", ["no batch", "no constant", "one row", "two calls", "zero", "weights per edge", "another mode"]
)
@pytest.mark.usefixtures("float64_default")
def test_what_cannot_be_folded_is_said(reason):
    o3 = pytest.importorskip("e3nn.o3")
    inputs, attributes, outputs = PRODUCTS["harmonics"]
    weights: tuple[Tensor, ...] = ()
    if reason == "weights per edge":
        layer = o3.FullyConnectedTensorProduct(
            inputs, attributes, outputs, shared_weights=False, internal_weights=False
        )
        weights = (torch.randn(6, layer.weight_numel),)
    elif reason == "another mode":
        layer = o3.TensorProduct(inputs, attributes, inputs, [(0, 0, 0, "uvu", True), (1, 0, 1, "uvu", True)])
    else:
        layer = product("harmonics")
    y = second_input(layer)
    if reason in ("no constant", "zero"):
        y[:, 0] = torch.randn(6) if reason == "no constant" else 0.0
    batch = (torch.randn(6, layer.irreps_in1.dim), y, *weights)
    if reason == "one row":  # says nothing of other rows
        batch = (batch[0][:1], y[:1])
    before = [p.clone() for p in layer.parameters()]
    ce.relax(layer, complement=False, init=1.0)
    batches = None if reason == "no batch" else [batch]

    def forward(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        return model(*batch) + (model(batch[0], 2 * batch[1]) if reason == "two calls" else 0)

    report = ce.finalize(layer, fold=True, on_violation="drop", batches=batches, forward=forward)
    assert report.layers[0].folded == 0 < report.layers[0].unfolded
    assert any("does not fit into its own weights" in note for note in report.notes)
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))


@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.usefixtures("float64_default")
def test_a_second_input_that_is_overwritten_later_is_read_as_it_came(keyword):
    o3 = pytest.importorskip("e3nn.o3")

    class Scaling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.product = o3.FullyConnectedTensorProduct("1x1o", "1x0e", "1x1o")

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            result: Tensor = self.product(x, y)
            y *= 3
            return result

    model, x = Scaling(), torch.randn(5, 3)
    ce.relax(model, complement=False)
    with torch.no_grad():
        model.product.non_equivariant.weight.copy_(torch.eye(3))
    before = model(x, torch.ones(5, 1)).detach()
    report = ce.finalize(
        model,
        fold=True,
        batches=[(x, torch.ones(5, 1))],
        forward=lambda m, batch: m(batch[0], y=batch[1]) if keyword else m(*batch),
    )
    torch.testing.assert_close(model(x, torch.ones(5, 1)), before, rtol=0, atol=1e-14)
    assert report.output_change < 1e-14 and report.layers[0].output_change < 1e-14 and report.layers[0].unfolded == 0


@pytest.mark.usefixtures("float64_default")
def test_updates_of_a_steerable_network_fold_through_their_attributes():
    """The scalar attribute of a node is the constant harmonic of degree 0."""
    pytest.importorskip("e3nn")
    from examples.models.segnn import SEGNN

    model = SEGNN("4x0e + 3x1o", layers=1)
    data = torch.randn(3, 4, 3), torch.randn(3, 4, 3), torch.ones(3, 4)
    ce.relax(model, where=lambda name, layer: name == "layers.0.update.1", complement=False, init=0.3)
    (term,) = (r.term for r in ce.relaxations(model))
    with torch.no_grad():
        term.weight.copy_(term.projection.project(term.weight))
    before = model(*data)
    report = ce.finalize(model, fold=True, batches=[data], forward=lambda m, batch: m(*batch))
    torch.testing.assert_close(model(*data), before, rtol=0, atol=1e-13)
    assert report.layers[0].unfolded == 0 < report.layers[0].folded
