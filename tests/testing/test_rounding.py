"""The error stands beside the model's own rounding: 0.3 % is never taken for it, and rounding never for a defect."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from constrained_equiv import Symmetry, actions, groups, testing
from constrained_equiv import representations as reps
from constrained_equiv._verify import (
    EquivarianceReport,
    assert_equivariant,
    assert_equivariant_at,
    equivariance_error,
    equivariance_report,
)
from constrained_equiv.errors import EquivarianceError, RepresentationError
from tests.testing.zoo import Mix, Neighbours, lattice, network

O3 = groups.O3()
ROWS = actions.along(reps.vectors(1), -1)
VECTORS = Symmetry(O3, ROWS, ROWS)


class Leaky(nn.Module):
    """Vectors with a share of their absolute values: not equivariant by about that share."""

    def __init__(self, share):
        super().__init__()
        self.mix, self.share = Mix(), share

    def forward(self, x):
        mixed = self.mix(x)
        return mixed + self.share * mixed.abs()


def report(model, dtype, **options):
    torch.manual_seed(0)
    x = torch.randn(6, 4, 3).to(dtype)
    return equivariance_report(model.to(dtype) if isinstance(model, nn.Module) else model, x, **options)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rounding_is_called_rounding(dtype):
    found = report(network(Mix(), Mix(), Mix()), dtype, symmetry=VECTORS)
    assert found.passed and found.verdict.startswith("rounding")
    unit = torch.finfo(dtype).eps
    assert unit <= found.rounding < 50 * unit and found.error < 30 * found.rounding
    assert found.method == ("lower precision" if dtype == torch.float64 else "higher precision")
    assert found.exact is None if dtype == torch.float64 else found.exact < 1e-14


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("share", [3e-3, 1e-4, 1e-5])
def test_small_defects_are_not(dtype, share):
    found = report(Leaky(share), dtype, symmetry=VECTORS)
    assert share / 10 < found.error < 10 * share
    assert "times the model's own rounding" in found.verdict and not found.verdict.startswith("rounding")
    if dtype == torch.float32:
        assert found.exact == pytest.approx(found.error, rel=0.1)  # it is still there in float64
    assert found.passed == (found.error <= found.tolerance)
    assert found.verdict.startswith("within the tolerance") == found.passed


@given(st.floats(-8, 0), st.integers(0, 2**31 - 1))
def test_the_verdict_follows_the_defect_not_the_tolerance(exponent, seed):
    torch.manual_seed(seed)
    share = 10**exponent
    model, x = Leaky(share), torch.randn(6, 4, 3)
    found = equivariance_report(model, x, symmetry=VECTORS, tolerance=1.0)
    exact = equivariance_report(model.double(), x.double(), symmetry=VECTORS).error
    if exact > 1e-5:
        assert not found.verdict.startswith("rounding")
    if exact < 1e-7:
        assert found.verdict.startswith("rounding")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ill_conditioned_models_have_more_rounding_of_their_own(dtype):
    """1e4 + x - 1e4 loses four digits; the report measures that, where a fixed table could not know."""
    plain, lossy = (report(f, dtype, symmetry=VECTORS) for f in (lambda x: 2 * x, lambda x: (x + 1e4) - 1e4))
    assert lossy.rounding > 1e2 * plain.rounding
    assert lossy.error > 1e2 * plain.error and lossy.verdict.startswith("rounding")


def test_the_last_digits_of_the_input_count_in_float64():
    """A difference that is exact, of inputs that were rounded."""
    large = 1e6 * torch.randn(6, 1, 3, dtype=torch.float64)

    def offsets(x):
        return x[:, :1] - x[:, 1:]

    x = large + torch.randn(6, 4, 3, dtype=torch.float64)
    found = equivariance_report(offsets, x, symmetry=VECTORS)
    assert found.rounding > 1e-11 and found.verdict.startswith("rounding")


def test_weights_of_float64_models_are_changed_on_a_copy():
    model = network(Mix()).double()
    before = model[0].weight.detach().clone()
    report(model, torch.float64, symmetry=VECTORS)
    assert torch.equal(model[0].weight, before)


def test_models_stay_as_they_are_and_copies_are_not_needed():
    model = network(Mix())
    report(model, torch.float32, symmetry=VECTORS)
    assert model[0].weight.dtype == torch.float32
    cached = Leaky(0.0)
    cached.cache = cached.mix.weight * 2  # not a leaf: torch refuses to copy such modules
    found = report(cached, torch.float32, symmetry=VECTORS)
    assert found.method == "last digits" and found.exact is None and found.verdict.startswith("rounding")

    class Uncopyable(Leaky):  # as TorchScript functions of e3nn 0.5 and groups of escnn are, each with its own error
        def __deepcopy__(self, memo):
            raise AttributeError

    for dtype in (torch.float32, torch.float64):
        assert report(Uncopyable(0.0), dtype, symmetry=VECTORS).exact is None


def test_constants_of_another_dtype_fall_back_to_last_digits():
    matrix = 2 * torch.eye(3)
    found = report(lambda x: x @ matrix, torch.float32, symmetry=VECTORS)
    assert found.method == "last digits" and found.passed


def test_random_models_are_told_apart():
    found = report(nn.Sequential(Mix(), nn.Dropout(0.5)).train(), torch.float32, symmetry=VECTORS)
    assert found.noise > 0.1 and "model.eval()" in found.verdict


def test_the_message_of_a_failure_is_the_report():
    torch.manual_seed(0)
    with pytest.raises(EquivarianceError) as caught:
        assert_equivariant(Leaky(3e-3), torch.randn(6, 4, 3), symmetry=VECTORS)
    text = str(caught.value)
    assert "times the model's own rounding" in text and "in float64" in text and "worst element" in text
    assert "0.00" in text.splitlines()[0] and "expected at most 0.0001 for torch.float32" in text


def test_outputs_that_are_not_finite_have_a_verdict():
    found = report(lambda x: x / 0, torch.float32, symmetry=VECTORS)
    assert not found.passed and "not finite" in found.verdict


def test_records_are_frozen():
    found = report(network(Mix()), torch.float32, symmetry=VECTORS)
    assert isinstance(found, EquivarianceReport)
    with pytest.raises(AttributeError):
        found.error = 0.0


# --- outputs that cancel ---------------------------------------------------------------------------------------------


def centred(x):
    return x - x.mean(-2, keepdim=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outputs_that_cancel_pass_where_only_rounding_is_left(dtype):
    seen = set()

    @given(testing.point_clouds(min_points=1, dtype=dtype), testing.elements(O3))
    def check(points, element):
        symmetry = Symmetry(O3, "1x1o", "1x1o")
        seen.add(equivariance_error(centred, points, symmetry=symmetry) > 1e-3)
        assert_equivariant_at(centred, points, element, symmetry=symmetry)
        assert_equivariant(centred, points, symmetry=symmetry)

    check()
    assert seen == {True, False}  # some errors are not small at all


COINCIDENT = torch.randn(1, 3, generator=torch.Generator().manual_seed(0)).double().repeat(3, 1)


def test_a_stated_tolerance_is_taken_as_it_is():
    symmetry = Symmetry(O3, "1x1o", "1x1o")
    assert_equivariant(centred, COINCIDENT, symmetry=symmetry)
    report = equivariance_report(centred, COINCIDENT, symmetry=symmetry)
    assert report.cancelled and report.passed and "cancels" in report.verdict and report.error > 1
    with pytest.raises(EquivarianceError):
        assert_equivariant(centred, COINCIDENT, symmetry=symmetry, tolerance=1e-10)


@pytest.mark.parametrize(
    "model",
    [
        lambda x: centred(x) + 1e-9 * x.abs(),
        lambda x: centred(x) + 1e-12,
        lambda x: 1e-14 * centred(x).sign(),
        Neighbours(2),
    ],
    ids=["a small defect", "a tiny constant", "a jump", "ties"],
)
def test_what_only_looks_like_rounding_fails(model):
    x = COINCIDENT if not isinstance(model, nn.Module) else lattice(torch.float64)
    symmetry = Symmetry(O3, "1x1o", "1x1o")
    with pytest.raises(EquivarianceError):
        assert_equivariant(model, x, symmetry=symmetry)


def test_one_cancelled_output_does_not_hide_a_broken_one():
    symmetry = Symmetry(O3, "1x1o", ("1x1o", "1x1o"))
    with pytest.raises(EquivarianceError):
        assert_equivariant(lambda x: (centred(x), x.abs()), COINCIDENT, symmetry=symmetry)
    for element in O3.sample(3):
        assert_equivariant_at(lambda x: (centred(x), 2 * x), COINCIDENT, element, symmetry=symmetry)
        with pytest.raises(EquivarianceError, match=r"output \[1\]"):
            assert_equivariant_at(lambda x: (centred(x), x.abs()), COINCIDENT, element, symmetry=symmetry)


# --- at given elements -----------------------------------------------------------------------------------------------


def half_turn_only(x):
    """Equivariant under half turns about z, not under quarter turns."""
    return x * x.new_tensor([1.0, 2.0, 1.0])


def test_only_the_given_elements_are_tried():
    x = torch.randn(6, 4, 3)
    half, quarter = torch.diag(torch.tensor([-1.0, -1.0, 1.0])).double(), torch.eye(3).double()[[1, 0, 2]]
    assert_equivariant_at(half_turn_only, x, half, symmetry=VECTORS)
    assert_equivariant_at(half_turn_only, x, torch.stack([half, torch.eye(3).double()]), symmetry=VECTORS)
    with pytest.raises(EquivarianceError, match="worst element"):
        assert_equivariant_at(half_turn_only, x, torch.stack([half, quarter]), symmetry=VECTORS)
    assert_equivariant_at(half_turn_only, x, quarter, symmetry=VECTORS, tolerance=1.0)
    with pytest.raises(RepresentationError, match=r"expected \(3, 3\)"):
        assert_equivariant_at(half_turn_only, x, torch.eye(4), symmetry=VECTORS)


@given(testing.elements(O3), testing.point_clouds())
def test_a_property_test_in_two_lines(element, points):
    assert_equivariant_at(lambda x: x - x.sum(0), points, element, symmetry=Symmetry(O3, "1x1o", "1x1o"))


# --- images ----------------------------------------------------------------------------------------------------------


def smooth_images(size=33):
    axis = torch.linspace(-4, 4, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([torch.exp(-((x - 0.5) ** 2) - (y - 1) ** 2), torch.exp(-(x**2) / 2 - (y + 0.8) ** 2)])


def test_interpolation_sets_the_tolerance_off_the_grid():
    images, octagon = actions.disc(smooth_images()), groups.cyclic(8)
    symmetry = Symmetry(octagon, actions.pixels, actions.pixels)
    blur = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]) / 16

    def filtered(x, kernel=blur):
        return nn.functional.conv2d(x[:, None], kernel[None, None], padding=1)[:, 0]

    allowed = actions.interpolation_error(images, octagon.elements())
    assert 1e-3 < allowed < 0.1
    assert_equivariant(filtered, images, symmetry=symmetry, tolerance=allowed)
    sideways = torch.tensor([[0.0, 0, 0], [1, 0, -1], [0, 0, 0]])
    with pytest.raises(EquivarianceError):
        assert_equivariant(lambda x: filtered(x, sideways), images, symmetry=symmetry, tolerance=allowed)
    assert actions.interpolation_error(images, groups.dihedral(4).elements()) == 0.0
    assert actions.interpolation_error(torch.zeros(3, 3), octagon.elements()) == 0.0


def test_pixels_turn_as_escnn_turns_them():
    pytest.importorskip("escnn")
    from escnn import gspaces
    from escnn import nn as enn

    for space in (gspaces.rot2dOnR2(4), gspaces.flipRot2dOnR2(4)):
        kind = enn.FieldType(space, [space.regular_repr, space.trivial_repr])
        images = torch.randn(2, kind.size, 5, 5)
        for element in space.fibergroup.elements:
            expected = enn.GeometricTensor(images, kind).transform(element).tensor
            fibre = torch.as_tensor(kind.representation(element)).to(images)
            turned = torch.einsum("ij,bjhw->bihw", fibre, images)
            found = actions.pixels(torch.as_tensor(space.basespace_action(element)), turned)
            torch.testing.assert_close(found, expected)
