"""The Lie derivative by forward mode agrees with the operator form, with finite elements, and with double backward."""

import pytest
import torch
from hypothesis import find, given
from hypothesis import strategies as st
from torch import nn

import constrained_equiv as ce
from constrained_equiv import Symmetry, actions, groups, testing
from constrained_equiv import representations as reps
from constrained_equiv._audit import lie_derivatives
from constrained_equiv._lie import lie_derivative
from constrained_equiv.intertwiners import Intertwiners
from tests.cases import case_named, default_dtype
from tests.testing.zoo import Mix, network

O3, SO3 = groups.O3(), groups.SO3()
VECTORS = Symmetry(SO3, "1x1", "1x1")
LIE_GROUPS = [groups.SO2(), groups.O2(), SO3, O3, groups.SO13(), groups.product(SO3, groups.cyclic(3))]


@given(st.sampled_from(LIE_GROUPS), st.data(), st.integers(0, 2**31 - 1))
def test_on_linear_maps_it_is_the_operator_form(group, data, seed):
    """Summed over an orthonormal basis of inputs, the square is || W d rho_in(A) - d rho_out(A) W ||_F^2."""
    inputs = data.draw(testing.representations(group, max_blocks=2, max_degree=2))
    outputs = data.draw(testing.representations(group, max_blocks=2, max_degree=2))
    w = torch.randn(outputs.dim, inputs.dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    basis = torch.eye(inputs.dim, dtype=torch.float64)
    found = lie_derivative(lambda x: x @ w.mT, basis, symmetry=Symmetry(group, inputs, outputs))
    expected = Intertwiners(inputs, outputs).defect(w[None])[:, 0].sqrt() / torch.linalg.vector_norm(w)
    measured = torch.tensor(found.continuous + found.discrete, dtype=torch.float64)
    torch.testing.assert_close(measured, expected, rtol=1e-9, atol=1e-9)
    assert found.value == pytest.approx(float(expected.square().mean().sqrt()), abs=1e-9)
    assert found.mode == "forward"


def wobbly(x):
    return torch.tanh(x) * torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def test_it_is_the_slope_of_the_error_at_finite_elements():
    x = torch.randn(6, 3, dtype=torch.float64)
    found = lie_derivative(wobbly, x, symmetry=VECTORS)
    for axis, slope in enumerate(found.continuous):
        finite = []
        for angle in (1e-3, 1e-4):
            g = SO3.element(angle * torch.eye(3, dtype=torch.float64)[axis])
            gap = torch.linalg.vector_norm(wobbly(x @ g.mT) - wobbly(x) @ g.mT) / torch.linalg.vector_norm(wobbly(x))
            finite.append(float(gap) / angle)
        assert finite[1] == pytest.approx(slope, rel=1e-3)
        assert abs(finite[1] - slope) < abs(finite[0] - slope) / 5  # first order in the angle


class NoForward(torch.autograd.Function):
    """tanh without a forward mode, but twice differentiable backward."""

    @staticmethod
    def forward(context, x):
        y = torch.tanh(x)
        context.save_for_backward(y)
        return y

    @staticmethod
    def backward(context, slope):
        (y,) = context.saved_tensors
        return slope * (1 - y.square())


def test_operations_without_forward_mode_are_differentiated_backward_and_it_is_said():
    x = torch.randn(5, 3, dtype=torch.float64)
    forward = lie_derivative(torch.tanh, x, symmetry=VECTORS)
    lstm = nn.LSTM(3, 3, batch_first=True).double()

    def sampled(x):
        grid = (x / 10).view(1, 1, -1, 3)[..., :2]
        images = torch.linspace(0, 1, 16, dtype=x.dtype).view(1, 1, 4, 4)
        return nn.functional.grid_sample(images, grid, align_corners=True).view(-1)

    for model in (sampled, lambda x: lstm(x[None])[0][0]):
        outputs = VECTORS if model is not sampled else Symmetry(SO3, "1x1", None)
        found = lie_derivative(model, x, symmetry=outputs)
        assert found.mode in ("forward", "double backward") and found.value > 1e-3
        for axis, slope in enumerate(found.continuous):
            g = SO3.element(1e-6 * torch.eye(3, dtype=torch.float64)[axis])
            with torch.no_grad():
                gap = model(x @ g.mT) - outputs.move_outputs(g, model(x))
                finite = torch.linalg.vector_norm(gap) / torch.linalg.vector_norm(model(x)) / 1e-6
            assert float(finite) == pytest.approx(slope, rel=1e-3)
    assert lie_derivative(sampled, x, symmetry=Symmetry(SO3, "1x1", None)).mode == "double backward"
    assert forward.mode == "forward" and "forward mode" in repr(forward)


def test_custom_operations_are_differentiated_too():
    x = torch.randn(5, 3, dtype=torch.float64)
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.func.jvp(NoForward.apply, (x,), (x,))
    expected = lie_derivative(torch.tanh, x, symmetry=VECTORS)
    found = lie_derivative(NoForward.apply, x, symmetry=VECTORS)
    assert found.mode == "double backward"
    assert found.continuous == pytest.approx(expected.continuous, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["SEGNN", "vector neurons, network"])
def test_equivariant_networks_have_none(name, dtype):
    case = case_named(name)
    with default_dtype(dtype):
        model, data = case.model(dtype).eval(), case.data(dtype=dtype)
    symmetry = case.symmetry()
    found = lie_derivative(model, data if len(data) > 1 else data[0], symmetry=symmetry)
    assert len(found.continuous) == len(symmetry.group.algebra)
    assert found.value < (1e-10 if dtype == torch.float64 else 2e-3)


@given(testing.networks())
def test_drawn_networks_have_none(network):
    if len(network.symmetry.group.algebra):
        assert lie_derivative(network.model, network.inputs, symmetry=network.symmetry).value < 1e-9


def test_forces_are_differentiated_through():
    """A model that differentiates inside, whose forces are wrong by a factor per axis."""
    network = find(testing.networks(), lambda network: network.name == "energy and forces")
    assert lie_derivative(network.model, network.inputs, symmetry=network.symmetry).value < 1e-9

    def skewed(x):
        found = network.model(x)
        return found | {"forces": found["forces"] * x.new_tensor([1.0, 1.0, 2.0])}

    assert lie_derivative(skewed, network.inputs, symmetry=network.symmetry).value > 1e-2


def test_detached_inputs_are_refused_and_constants_are_not():
    x = torch.randn(5, 3, dtype=torch.float64)
    with pytest.raises(ce.errors.RepresentationError, match="detaches its inputs"):
        lie_derivative(lambda x: torch.tanh(x.detach()), x, symmetry=VECTORS)
    found = lie_derivative(lambda x: (x, torch.ones(2)), x, symmetry=Symmetry(SO3, "1x1", ("1x1", None)))
    assert found.value < 1e-15


def test_a_rotation_breaking_direction_is_told_from_the_others():
    """Stretching z leaves the rotations about z alone."""
    x = torch.randn(6, 3, dtype=torch.float64)
    found = lie_derivative(lambda x: x * x.new_tensor([1.0, 1.0, 1.5]), x, symmetry=VECTORS)
    assert found.continuous[2] < 1e-15 and min(found.continuous[:2]) > 0.1


def test_parity_is_seen_by_the_discrete_generator_alone():
    x = torch.randn(6, 3, dtype=torch.float64)
    found = lie_derivative(
        lambda x: torch.linalg.cross(x, x.roll(1, 0)),
        x,
        symmetry=Symmetry(O3, actions.along(reps.vectors(1), -1), "1x1o"),
    )
    assert max(found.continuous) < 1e-14 and found.discrete == pytest.approx((2.0,))


def test_layers_of_a_relaxed_network_show_where_it_is_broken():
    case = case_named("SEGNN")
    model, data = case.model().eval(), case.data()
    plain = lie_derivatives(model, data, symmetry=case.symmetry())
    assert plain[-1].name == "" and all(record.value < 1e-12 for record in plain)
    ce.relax(model)
    relaxed = ce.relaxations(model)
    with torch.no_grad():
        relaxed[2].term.weight.normal_()
    broken = {r.name for r in lie_derivatives(model, data, symmetry=case.symmetry()) if r.value > 1e-6}
    assert broken == {relaxed[2].name, ""}


def test_stated_symmetries_are_used_for_modules_that_state_none():
    torch.manual_seed(0)
    rows = actions.along(reps.vectors(1), -1)
    model, symmetry = network(Mix(), nn.Tanh()).double(), Symmetry(O3, rows, rows)
    layers = {"0": symmetry, "1": symmetry}
    found = lie_derivatives(model, torch.randn(6, 4, 3).double(), symmetry=symmetry, layers=layers)
    assert [record.name for record in found] == ["0", "1", ""]
    assert found[0].value < 1e-14 < 1e-2 < found[1].value == pytest.approx(found[2].value, rel=0.5)


def test_groups_without_a_continuous_part_use_their_generators():
    turn = groups.cyclic(4)
    found = lie_derivative(torch.tanh, torch.randn(5, 2), symmetry=Symmetry(turn, reps.defining(turn), None))
    assert found.continuous == () and len(found.discrete) == 1 and found.value == found.discrete[0] > 0.1


def test_images_on_a_grid_are_refused():
    with pytest.raises(ce.errors.RepresentationError, match="no infinitesimal motion"):
        lie_derivative(torch.neg, torch.randn(1, 4, 4), symmetry=Symmetry(groups.SO2(), actions.pixels, actions.pixels))
