"""e3nn layers: one merged product for linear maps, one added product for tensor products, O(3) parity exactly."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("e3nn")

from e3nn import o3
from e3nn.nn import Gate

import constrained_equiv as ce
from constrained_equiv import groups
from constrained_equiv.representations import irreps
from tests.cases import CASES, case_named

pytestmark = pytest.mark.usefixtures("float64_default")

BATCHES = [(), (1,), (5,), (0,), (2, 3), (2, 0, 3)]
LINEARS = {
    "plain": lambda: o3.Linear("3x0e + 2x1o + 1x1e + 1x2e", "2x0e + 4x1o + 1x2e"),
    "biases": lambda: o3.Linear("3x0e + 2x1o", "2x0e + 1x0o + 2x1o + 1x0e", biases=True),
    "unsorted, repeated, empty": lambda: o3.Linear(
        "2x1o + 3x0e + 0x2e + 1x1o + 2x0o", "1x0o + 2x1o + 0x1e + 2x0e + 1x1o", biases=True
    ),
    "stated paths": lambda: o3.Linear(
        "3x0e + 2x1o + 2x1o", "2x1o + 2x0e", instructions=[(1, 0), (0, 1), (1, 0)], biases=[False, True]
    ),
    "element normalised": lambda: o3.Linear("3x0e + 2x1o", "2x0e + 4x1o", path_normalization="path"),
    "no equivariant map": lambda: o3.Linear("2x0e", "1x1o"),
}
linears = pytest.mark.parametrize("make", LINEARS.values(), ids=LINEARS)


def relaxed(layer, **options):
    return ce.relax(layer, init=1.0, generator=torch.Generator().manual_seed(0), **options)


def base_output(layer, *arguments):
    with ce.disabled(layer):
        return layer(*arguments)


# --- linear -----------------------------------------------------------------------------------------------------------


@linears
@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_the_merged_product_is_the_sum(make, batch):
    layer = relaxed(make())
    x = torch.randn(*batch, layer.irreps_in.dim)
    expected = base_output(layer, x) + x @ layer.non_equivariant.matrix().T
    torch.testing.assert_close(layer(x), expected, rtol=1e-14, atol=1e-14)


@linears
def test_merged_gradients_equal_those_of_the_sum(make):
    layer = relaxed(make())
    other = copy.deepcopy(layer)
    x = torch.randn(5, layer.irreps_in.dim)
    layer(x).square().sum().backward()
    (base_output(other, x) + x @ other.non_equivariant.matrix().T).square().sum().backward()
    for p, q in zip(layer.parameters(), other.parameters(), strict=True):
        if q.numel():
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("biases", [True, False])
def test_weights_given_in_the_call_are_used(biases):
    layer = relaxed(o3.Linear("3x0e + 2x1o", "2x0e + 2x1o", biases=biases))
    x, weight = torch.randn(5, 9), torch.randn(10)
    bias = torch.randn(2) if biases else None
    expected = base_output(layer, x, weight, bias) + x @ layer.non_equivariant.matrix().T
    torch.testing.assert_close(layer(x, weight, bias), expected, rtol=1e-14, atol=1e-14)
    assert not torch.allclose(layer(x, weight, bias), layer(x))


def test_weights_per_sample():
    layer = relaxed(o3.Linear("3x0e + 2x1o", "2x0e + 2x1o", internal_weights=False, shared_weights=False))
    x, weight = torch.randn(5, 9), torch.randn(5, 10)
    expected = base_output(layer, x, weight) + x @ layer.non_equivariant.matrix().T
    torch.testing.assert_close(layer(x, weight), expected, rtol=1e-14, atol=1e-14)


@linears
def test_the_terms_complement_is_that_of_the_layers_own_maps(make):
    """What the layer's own weights can produce lies in the image of P; e3nn itself says what they produce."""
    layer = make()
    own = []
    for k in range(layer.weight_numel):
        with torch.no_grad():
            layer.weight.zero_()[k] = 1.0
            own.append((layer(torch.eye(layer.irreps_in.dim)) - layer(torch.zeros(1, layer.irreps_in.dim))).T)
    space = ce.intertwiners.intertwiners(layer.irreps_in, layer.irreps_out)
    for matrix in own:
        torch.testing.assert_close(space.project(matrix), matrix, rtol=0, atol=1e-14)


def test_parity_counts():
    """For this pair rotations alone leave 23 maps, the full group 15 (METHOD: an SO(3)-only rule misses parity)."""
    layer = relaxed(o3.Linear("3x0e + 2x1o + 2x1e + 1x2e", "2x0e + 4x1o + 1x2e"))
    (found,) = ce.relaxations(layer)
    assert found.site.projection.rank == 15 == layer.weight_numel
    rotations = ce.intertwiners.intertwiners(
        irreps("3x0 + 2x1 + 2x1 + 1x2", group=groups.SO3()), irreps("2x0 + 4x1 + 1x2", group=groups.SO3())
    )
    assert rotations.rank == 23


@linears
def test_folding_gives_the_projection_of_the_whole_layer(make):
    layer = relaxed(make(), complement=False)
    x = torch.randn(5, layer.irreps_in.dim)
    term = layer.non_equivariant
    broken = term.projection.complement(term.matrix().detach())
    expected = layer(x) - x @ broken.T
    report = ce.finalize(layer, fold=True, on_violation="drop")
    (entry,) = report.layers
    if entry.unfolded:  # paths that the layer does not have
        assert not torch.allclose(layer(x), expected)
    else:
        torch.testing.assert_close(layer(x), expected, rtol=1e-13, atol=1e-13)
    assert entry.removed == pytest.approx(broken.norm().item())


def test_paths_that_are_missing_do_not_fold():
    layer = relaxed(o3.Linear("2x0e + 2x1o", "2x0e + 2x1o", instructions=[(1, 1)]), complement=False)
    scalars = layer.non_equivariant.weight[:2, :2].detach().norm().item()
    report = ce.finalize(layer, fold=True, on_violation="drop")
    assert report.layers[0].unfolded == pytest.approx(scalars)
    assert any(f"norm {scalars:.3g} does not fit" in note for note in report.notes)


def test_feature_axes_are_refused():
    layer = o3.Linear("2x0e", "1x0e + 1x1o", f_in=3, f_out=2)
    with pytest.raises(ce.errors.RelaxationError, match=r"f_in, f_out.*expected a layer without feature axes"):
        ce.relax(layer)
    assert type(layer) is o3.Linear


# --- tensor products --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if "tensor product" in case.values[0].name])
@pytest.mark.parametrize("batch", [(1,), (5,), (0,), (2, 3)], ids=str)
def test_the_term_acts_on_the_first_input_alone(case, batch):
    layer = case.relaxed()
    arguments = [torch.randn(*batch, part.shape[-1]) for part in case.data()]
    expected = base_output(layer, *arguments) + arguments[0] @ layer.non_equivariant.matrix().T
    torch.testing.assert_close(layer(*arguments), expected, rtol=1e-14, atol=1e-14)


def test_one_second_input_for_a_whole_batch():
    layer = case_named("e3nn fully connected tensor product").relaxed()
    x, y = torch.randn(5, 9), torch.randn(1, 4)
    expected = base_output(layer, x, y) + x @ layer.non_equivariant.matrix().T
    torch.testing.assert_close(layer(x, y), expected, rtol=1e-14, atol=1e-14)


def test_a_tensor_product_folds_through_a_constant_scalar():
    """With y = (1, vector) a path of `uvw` holds equivariant maps of the first input."""
    layer = relaxed(o3.FullyConnectedTensorProduct("3x0e + 2x1o", "1x0e + 1x1o", "2x0e + 2x1o"), complement=False)
    x, y = torch.randn(5, 9), torch.cat([torch.full((5, 1), 0.7), torch.randn(5, 3)], -1)
    term = layer.non_equivariant
    expected = layer(x, y) - x @ term.projection.complement(term.matrix().detach()).T
    report = ce.finalize(layer, fold=True, batches=[(x, y)], forward=lambda m, batch: m(*batch), on_violation="drop")
    torch.testing.assert_close(layer(x, y), expected, rtol=1e-13, atol=1e-13)
    assert report.layers[0].unfolded == 0 and report.layers[0].folded > 0


@pytest.mark.parametrize("case", [case for case in CASES if "tensor product" in case.values[0].name])
def test_without_a_constant_scalar_nothing_folds(case):
    layer, plain, data = case.relaxed(complement=False), case.model(), case.data()
    report = ce.finalize(layer, fold=True, batches=[data], forward=lambda m, batch: m(*batch), on_violation="drop")
    assert report.layers[0].folded == 0 and "does not fit" in str(report)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), layer.parameters(), strict=True))


# --- which layers are found -------------------------------------------------------------------------------------------


def test_layers_without_weights_are_left_alone():
    model = nn.ModuleList(
        [
            o3.FullTensorProduct("2x1o", "1x1o"),
            o3.ElementwiseTensorProduct("2x1o", "2x0e"),
            o3.TensorSquare("2x1o"),
            o3.Norm("2x1o"),
            Gate("2x0e", [torch.tanh], "1x0e", [torch.sigmoid], "1x1o"),
            o3.Linear("2x1o", "2x1o"),
        ]
    )
    assert [r.name for r in ce.relaxations(ce.relax(model))] == ["5"]


def test_a_full_tensor_product_followed_by_a_linear_map():
    product = o3.FullTensorProduct("2x0e + 1x1o", "1x0e + 1x1o")
    linear = o3.Linear(product.irreps_out, "2x0e + 2x1o")

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.product, self.linear = product, linear

        def forward(self, x, y):
            return self.linear(self.product(x, y))

    model = relaxed(Both())
    symmetry = ce.Symmetry(groups.O3(), ("2x0e + 1x1o", "1x0e + 1x1o"), "2x0e + 2x1o")
    data = torch.randn(4, 5), torch.randn(4, 4)
    assert ce.equivariance_error(model, data, symmetry=symmetry) > 1e-2
    ce.finalize(model, on_violation="drop")
    assert ce.equivariance_error(model, data, symmetry=symmetry) < 1e-13


def test_subclasses_of_layers_are_relaxed_and_restored():
    class Named(o3.Linear):
        def forward(self, features):
            return 2 * super().forward(features)

    layer = relaxed(Named("2x0e + 1x1o", "1x0e + 2x1o"))
    assert isinstance(layer, Named)
    ce.finalize(layer, on_violation="drop")
    assert type(layer) is Named


def test_a_scripted_network_is_refused_by_name():
    from e3nn.util import jit

    scripted = jit.script(o3.Linear("2x0e + 1x1o", "1x0e + 2x1o"))
    with pytest.raises(ce.errors.RelaxationError, match=r"TorchScript.*before scripting"):
        ce.relax(
            scripted, where=lambda name, layer: name == "", adapter=ce.adapters.linear("2x0e + 1x1o", "1x0e + 2x1o")
        )
    with pytest.raises(ce.errors.RelaxationError, match=r"Linear in TorchScript \(relax the model before"):
        ce.relax(scripted)
