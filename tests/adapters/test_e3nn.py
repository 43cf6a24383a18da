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


def base_output(layer, *arguments, **options):
    with ce.disabled(layer):
        return layer(*arguments, **options)


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


@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_feature_axes_are_mixed_by_the_term(batch):
    layer = relaxed(o3.Linear("2x0e + 1x1o", "1x0e + 1x1o", f_in=3, f_out=2, biases=True))
    x = torch.randn(*batch, 3, 5)
    matrix = layer.non_equivariant.matrix().view(2, 4, 3, 5)
    expected = base_output(layer, x) + torch.einsum("oafb,...fb->...oa", matrix, x)
    torch.testing.assert_close(layer(x), expected, rtol=1e-14, atol=1e-14)
    (found,) = ce.relaxations(layer)
    assert found.site.projection.rank == layer.weight.numel()


def test_subclasses_keep_their_own_forward():
    """The term is added to what the subclass returns, whatever its signature; its weights do not mean what ours do."""

    class Doubled(o3.Linear):
        def forward(self, features, *, shift):
            return 2 * super().forward(features) + shift

    layer = Doubled("2x0e + 1x1o", "1x0e + 2x1o")
    x, plain = torch.randn(4, 5), copy.deepcopy(layer)
    relaxed(layer, complement=False)
    assert torch.equal(base_output(layer, x, shift=1.0), plain(x, shift=1.0))
    expected = plain(x, shift=1.0) + x @ layer.non_equivariant.matrix().T
    torch.testing.assert_close(layer(x, shift=1.0), expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(layer(features=x, shift=1.0), expected, rtol=1e-14, atol=1e-14)
    report = ce.finalize(layer, fold=True, on_violation="drop")
    assert type(layer) is Doubled and torch.equal(layer.weight, plain.weight) and "does not fit" in str(report)


def test_parametrized_weights_are_relaxed_and_not_folded():
    """A write into a weight that is computed from others would be lost."""
    layer = nn.utils.parametrizations.weight_norm(o3.Linear("2x0e + 1x1o", "1x0e + 2x1o"), dim=None)
    x, plain = torch.randn(4, 5), copy.deepcopy(layer)
    relaxed(layer, complement=False)
    expected = plain(x) + x @ layer.non_equivariant.matrix().T
    torch.testing.assert_close(layer(x), expected, rtol=1e-14, atol=1e-14)
    report = ce.finalize(layer, fold=True, on_violation="drop")
    assert torch.equal(layer(x), plain(x)) and report.layers[0].folded == 0 and "does not fit" in str(report)


# --- tensor products --------------------------------------------------------------------------------------------------


PRODUCTS = [case for case in CASES if case.id.startswith(("e3nn tensor", "e3nn fully connected"))]


@pytest.mark.parametrize("case", PRODUCTS)
@pytest.mark.parametrize("batch", [(1,), (5,), (0,), (2, 3)], ids=str)
def test_the_term_acts_on_the_first_input_alone(case, batch):
    layer = case.relaxed()
    arguments = [torch.randn(*(batch if part.ndim > 1 else ()), part.shape[-1]) for part in case.data()]
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


@pytest.mark.parametrize("batch", [(1,), (5,)], ids=str)
def test_the_matrix_for_a_given_second_input_contains_the_term(batch):
    layer = relaxed(o3.FullyConnectedTensorProduct("2x0e + 1x1o", "1x0e + 1x1o", "1x0e + 2x1o", compile_right=True))
    x, y = torch.randn(*batch, 5), torch.randn(*batch, 4)
    for matrix, expected in (
        (layer.right(y), layer(x, y)),
        (base_right(layer, y), base_output(layer, x, y)),
    ):
        torch.testing.assert_close(torch.einsum("ni,nij->nj", x, matrix), expected, rtol=1e-13, atol=1e-13)


def base_right(layer, y):
    with ce.disabled(layer):
        return layer.right(y)


@pytest.mark.parametrize("case", PRODUCTS)
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
            o3.TensorSquare("2x1o"),  # all of its outputs, without weights
            o3.Norm("2x1o"),
            Gate("2x0e", [torch.tanh], "1x0e", [torch.sigmoid], "1x1o"),
            o3.Linear("2x1o", "2x1o"),
        ]
    )
    assert [r.name for r in ce.relaxations(ce.relax(model))] == ["5"]


def test_a_scripted_network_is_refused_by_name():
    from e3nn.util import jit

    scripted = jit.script(o3.Linear("2x0e + 1x1o", "1x0e + 2x1o"))
    with pytest.raises(ce.errors.RelaxationError, match=r"TorchScript.*before scripting"):
        ce.relax(
            scripted, where=lambda name, layer: name == "", adapter=ce.adapters.linear("2x0e + 1x1o", "1x0e + 2x1o")
        )
    with pytest.raises(ce.errors.RelaxationError, match=r"Linear in TorchScript \(relax the model before"):
        ce.relax(scripted)
