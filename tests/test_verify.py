"""The checker passes what is equivariant, and fails every function that breaks one thing."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from constrained_equiv import Symmetry, actions, assert_equivariant, equivariance_error, groups
from constrained_equiv import representations as reps
from constrained_equiv._verify import call
from constrained_equiv.errors import EquivarianceError, RepresentationError

O3, SO3, E3, S5 = groups.O3(), groups.SO3(), groups.E3(), groups.symmetric(5)
VECTORS = Symmetry(O3, "1x1o", "1x1o")
ENERGY = Symmetry(E3, actions.points, None)
FORCES = Symmetry(E3, actions.points, {"energy": None, "forces": actions.vectors})
SET = Symmetry(S5, actions.permute(-2), None)
NODES = Symmetry(S5, actions.permute(-2), actions.permute(-2))
MOTION = Symmetry(E3, (actions.points, actions.vectors), (actions.points, actions.vectors))
SHIFTS = Symmetry(groups.translations(3), actions.points, None)
LORENTZ = groups.O13()
MOMENTA = Symmetry(LORENTZ, actions.along(reps.defining(LORENTZ), -1), None)
GRAPH = Symmetry(S5, (actions.permute(-2), actions.permute(-2, -1)), (actions.permute(-2), actions.permute(-2, -1)))
IMAGES = Symmetry(groups.dihedral(4), actions.pixels, actions.pixels)
BOTH = groups.product(O3, S5)
TURNED = actions.through(BOTH, 0, actions.along(reps.vectors(1), -1))
CLOUD = Symmetry(
    BOTH,
    actions.chain(TURNED, actions.through(BOTH, 1, actions.permute(-2))),
    {"center": TURNED, "size": None},
)

norm = torch.linalg.vector_norm
cross = torch.linalg.cross


def centred(x):
    return x - x.mean(-2, keepdim=True)


def distances(x):
    return norm(x.unsqueeze(-2) - x.unsqueeze(-3) + 1e-300, dim=-1)


def with_forces(energy):
    def model(x):
        x = x.detach().requires_grad_()
        value = energy(x)
        return {"energy": value.detach(), "forces": -torch.autograd.grad(value.sum(), x)[0]}

    return model


def pair_energy(x):
    """Sum over pairs of 1 / (1 + squared distance)."""
    return (1 / (1 + (x.unsqueeze(-2) - x.unsqueeze(-3)).square().sum(-1))).sum((-2, -1))


def minkowski(x):
    """Inner products of four-vectors."""
    return x @ torch.diag(x.new_tensor([1.0, -1.0, -1.0, -1.0])) @ x.mT


def messages(nodes, adjacency):
    """New nodes and a new adjacency matrix of a graph."""
    return torch.tanh(adjacency @ nodes), adjacency * (nodes @ nodes.mT)


def blurred(images):
    return torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1)


def second_moment(x):
    """The traceless part of the covariance, read along the symmetric matrices that e3nn's 2e is made of."""
    x, y, z = centred(x).unbind(-1)
    root = math.sqrt(3)
    return torch.stack(
        [root * x * z, root * x * y, y * y - (x * x + z * z) / 2, root * y * z, root / 2 * (z * z - x * x)], -1
    ).mean(-2)


W = torch.tensor([[0.3, -1.2, 0.7]])

# name -> (function, shapes of its inputs, symmetry); the same table for what must pass and, below, what must not
GOOD = {
    "identity": (lambda x: x, [(5, 3)], VECTORS),
    "gated vectors": (lambda x: x * torch.sigmoid(norm(x, dim=-1, keepdim=True)), [(5, 3)], VECTORS),
    "cross product of polar vectors": (
        lambda x, v: cross(x, v),
        [(5, 3), (5, 3)],
        Symmetry(O3, ("1x1o", "1x1o"), "1x1e"),
    ),
    "triple product": (
        lambda x: torch.linalg.det(x.unflatten(-1, (3, 3)))[..., None],
        [(5, 9)],
        Symmetry(O3, "3x1o", "1x0o"),
    ),
    "norms": (lambda x: norm(x, dim=-1), [(5, 3)], Symmetry(O3, "1x1o", None)),
    "quadrupole": (second_moment, [(5, 3)], Symmetry(O3, "1x1o", "1x2e")),
    "distances": (lambda x: distances(x).sum((-2, -1)), [(5, 3)], ENERGY),
    "forces as gradients": (with_forces(pair_energy), [(2, 5, 3)], FORCES),
    "mean over points": (lambda x: torch.tanh(x).mean(-2), [(5, 3)], SET),
    "deep set layer": (lambda x: torch.tanh(x + 2 * x.mean(-2, keepdim=True)), [(2, 5, 3)], NODES),
    "free fall": (lambda x, v: (x + 0.1 * v, v - centred(x)), [(5, 3), (5, 3)], MOTION),
    "nested outputs": (
        lambda x: [{"x": x}, (x, norm(x, dim=-1))],
        [(5, 3)],
        Symmetry(O3, "1x1o", [{"x": "1x1o"}, ("1x1o", None)]),
    ),
    "zero": (lambda x: 0 * x, [(5, 3)], VECTORS),
    "no points": (lambda x: 2 * x, [(0, 3)], VECTORS),
    "complex amplitudes": (lambda x: norm(x, dim=-1) * (1 + 2j), [(5, 3)], Symmetry(O3, "1x1o", None)),
    "differences, shifted": (lambda x: x - x.roll(1, -2), [(5, 3)], SHIFTS),
    "invariant masses": (minkowski, [(2, 5, 4)], MOMENTA),
    "graph": (messages, [(5, 3), (5, 5)], GRAPH),
    "blur of images": (blurred, [(1, 2, 6, 6)], IMAGES),
    "rotations and permutations at once": (
        lambda x: {"center": torch.tanh(x.square().sum((-2, -1)))[:, None] * x.mean(-2), "size": norm(x, dim=(-2, -1))},
        [(2, 5, 3)],
        CLOUD,
    ),
}

BROKEN = {
    "wrong parity": (lambda x, v: cross(x, v), [(5, 3), (5, 3)], Symmetry(O3, ("1x1o", "1x1o"), "1x1o")),
    "pseudoscalar called scalar": (
        lambda x: torch.linalg.det(x.unflatten(-1, (3, 3)))[..., None],
        [(5, 9)],
        Symmetry(O3, "3x1o", "1x0e"),
    ),
    "axes permuted": (lambda x: x.roll(1, -1), [(5, 3)], VECTORS),
    "bias on vectors": (lambda x: x + 0.01, [(5, 3)], VECTORS),
    "z scaled": (lambda x: x * torch.tensor([1.0, 1.0, 1.01]).to(x), [(5, 3)], VECTORS),
    "pointwise nonlinearity": (torch.tanh, [(5, 3)], VECTORS),
    "layer norm over x, y, z": (lambda x: torch.nn.functional.layer_norm(x, (3,)), [(5, 3)], VECTORS),
    "linear map of components": (lambda x: x @ W.to(x).mT, [(5, 3)], Symmetry(O3, "1x1o", None)),
    "centred over the wrong axis": (lambda x: x - x.mean(-1, keepdim=True), [(5, 3)], VECTORS),
    "absolute positions": (lambda x: pair_energy(x) + 0.1 * norm(x, dim=-1).sum(-1), [(5, 3)], ENERGY),
    "height as a scalar": (lambda x: centred(x)[..., 2].square().mean(-1), [(5, 3)], ENERGY),
    "forces with the wrong energy": (
        lambda x: {"energy": pair_energy(x), "forces": x},
        [(5, 3)],
        FORCES,
    ),
    "uses the first point": (lambda x: torch.tanh(x[..., 0, :]), [(5, 3)], SET),
    "mean over the wrong axis": (lambda x: x.mean(-1), [(5, 3)], SET),
    "order of the points": (lambda x: torch.cumsum(x, -2), [(5, 3)], NODES),
    "neighbour in the list": (lambda x: x + 0.1 * x.roll(1, -2), [(5, 3)], NODES),
    "one output of two": (lambda x, v: (x + 0.1 * v, v + 0.1 * x), [(5, 3), (5, 3)], MOTION),
    "one key of two": (
        lambda x: {"n": norm(x, dim=-1), "x": x.abs()},
        [(5, 3)],
        Symmetry(O3, "1x1o", {"n": None, "x": "1x1o"}),
    ),
    "quadrupole in another basis": (
        lambda x: second_moment(x)[..., [1, 0, 2, 3, 4]],
        [(5, 3)],
        Symmetry(O3, "1x1o", "1x2e"),
    ),
    "imaginary part": (
        lambda x: torch.complex(norm(x, dim=-1), 0.1 * x[..., 0]),
        [(5, 3)],
        Symmetry(O3, "1x1o", None),
    ),
    "dropout": (lambda x: torch.nn.functional.dropout(x, 0.5), [(5, 3)], VECTORS),
    "absolute positions, shifted": (lambda x: x - 0.9 * x.roll(1, -2), [(5, 3)], SHIFTS),
    "invariant under rotations, not under boosts": (lambda x: norm(x[..., 1:], dim=-1), [(2, 5, 4)], MOMENTA),
    "Euclidean products of four-vectors": (lambda x: x @ x.mT, [(2, 5, 4)], MOMENTA),
    "edges to earlier nodes only": (lambda n, a: messages(n, a.tril()), [(5, 3), (5, 5)], GRAPH),
    "direction of the edges": (
        lambda n, a: (messages(n, a)[0], a * n[:, :1] * torch.arange(5).to(n)),
        [(5, 3), (5, 5)],
        GRAPH,
    ),
    "shifted images": (lambda x: blurred(x) + 0.1 * x.roll(1, -1), [(1, 2, 6, 6)], IMAGES),
    "flipped images": (lambda x: x + 0.1 * x.rot90(1, (-2, -1)), [(1, 2, 6, 6)], IMAGES),
    "one factor of two": (
        lambda x: {"center": x[..., 0, :], "size": norm(x, dim=(-2, -1))},
        [(2, 5, 3)],
        CLOUD,
    ),
    "the other factor": (
        lambda x: {"center": x.mean(-2), "size": x.abs().sum((-2, -1))},
        [(2, 5, 3)],
        CLOUD,
    ),
}


def inputs_of(shapes, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = tuple(torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype) for shape in shapes)
    return made if len(made) > 1 else made[0]


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equivariant_functions_pass(name, dtype):
    function, shapes, symmetry = GOOD[name]
    assert_equivariant(function, inputs_of(shapes, dtype), symmetry=symmetry)
    error = equivariance_error(function, inputs_of(shapes, dtype), symmetry=symmetry)
    assert error < (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_broken_functions_fail(name, dtype):
    function, shapes, symmetry = BROKEN[name]
    with pytest.raises(EquivarianceError, match="relative equivariance error"):
        assert_equivariant(function, inputs_of(shapes, dtype), symmetry=symmetry)
    assert equivariance_error(function, inputs_of(shapes, dtype), symmetry=symmetry) > 1e-3


def test_an_edge_index_is_relabelled_with_the_nodes():
    """A graph as nodes and pairs of node numbers, which are integers and not compared."""
    edges, nodes = torch.tensor([[0, 1, 3, 3, 4], [1, 2, 0, 2, 4]]), inputs_of([(5, 3)], torch.float64)
    symmetry = Symmetry(S5, (actions.permute(-2), actions.relabel), {"nodes": actions.permute(-2), "edges": None})

    def model(nodes, edges, order=False):
        sent = nodes[edges[0]] + (0.1 * edges[0][:, None] if order else 0)
        return {"nodes": torch.zeros_like(nodes).index_add(0, edges[1], sent), "edges": norm(sent, dim=-1)}

    assert_equivariant(model, (nodes, edges), symmetry=symmetry)
    with pytest.raises(EquivarianceError):
        assert_equivariant(lambda n, e: model(n, e, order=True), (nodes, edges), symmetry=symmetry)


@given(st.floats(1e-6, 1e3), st.integers(0, 2**32))
def test_the_error_is_relative_to_the_size_of_the_output(scale, seed):
    x = inputs_of([(5, 3)], torch.float64, seed)

    def leaky(x):
        return x + 0.01 * x.abs()

    plain = equivariance_error(leaky, x, symmetry=VECTORS)
    assert 1e-4 < plain < 0.04
    assert equivariance_error(lambda x: scale * leaky(x), x, symmetry=VECTORS) == pytest.approx(plain, rel=1e-9)
    assert equivariance_error(leaky, scale * x, symmetry=VECTORS) == pytest.approx(plain, rel=1e-9)


def test_the_error_is_the_definition_at_the_worst_element():
    x = inputs_of([(5, 3)], torch.float64)
    g = torch.cat([O3.generators, O3.sample(8, generator=torch.Generator().manual_seed(0))])
    expected = max(float(norm((x @ h.T).exp() - x.exp() @ h.T) / norm(x.exp())) for h in g)
    assert equivariance_error(torch.exp, x, symmetry=VECTORS) == pytest.approx(expected, rel=1e-12)


def test_the_inversion_is_always_among_the_elements():
    """Nothing but the discrete generator is tried with samples=0, and it alone tells the parity."""
    wrong = BROKEN["wrong parity"]
    x = inputs_of(wrong[1], torch.float64)
    assert equivariance_error(wrong[0], x, symmetry=wrong[2], samples=0) == pytest.approx(2.0)
    polar = Symmetry(SO3, ("1x1", "1x1"), "1x1")
    assert equivariance_error(wrong[0], x, symmetry=polar) < 1e-14


def test_the_worst_element_stands_in_the_message():
    group = groups.cyclic(4)
    turn = group.generators[0]

    def only_half_turns(x):
        return x * torch.tensor([1.0, 2.0], dtype=x.dtype)

    with pytest.raises(EquivarianceError) as caught:
        assert_equivariant(
            only_half_turns,
            torch.ones(3, 2, dtype=torch.float64),
            symmetry=Symmetry(group, reps.defining(group), reps.defining(group)),
            samples=0,
        )
    assert "under C_4" in str(caught.value) and str(turn) in str(caught.value)
    assert "expected at most 1e-10 for torch.float64" in str(caught.value)


def test_the_worst_input_stands_in_the_message():
    """Of five vectors, the fourth alone leaves the symmetry; a second input of another length is shown as a whole."""
    x = inputs_of([(5, 3)], torch.float64)

    def model(x, scale):
        return torch.where(torch.arange(5)[:, None] == 3, x.abs(), x) * scale.sum()

    scale = torch.tensor([0.5, 0.25], dtype=torch.float64)
    with pytest.raises(EquivarianceError) as caught:
        assert_equivariant(model, (x, scale), symmetry=Symmetry(O3, ("1x1o", None), "1x1o"))
    message = str(caught.value)
    assert f"worst input, entry 3:\n[0] = {x[3]}\n[1] = {scale}" in message
    with pytest.raises(EquivarianceError, match=r"worst input, entry all:\ntensor = "):
        assert_equivariant(lambda x: x.sum(), x, symmetry=Symmetry(O3, "1x1o", None))


def test_the_broken_output_is_named():
    function, shapes, symmetry = BROKEN["one key of two"]
    with pytest.raises(EquivarianceError, match=r"output .*x"):
        assert_equivariant(function, inputs_of(shapes, torch.float64), symmetry=symmetry)


def test_the_tolerance_is_that_of_each_outputs_dtype():
    """A float32 output with the larger, allowed error does not hide a float64 output beyond its own tolerance."""

    def mixed(x):
        return x + 1e-7 * x.abs(), (x + 1e-6 * x.abs()).float()

    x = inputs_of([(5, 3)], torch.float64)
    with pytest.raises(EquivarianceError, match=r"1e-10 for torch\.float64"):
        assert_equivariant(mixed, x, symmetry=Symmetry(O3, "1x1o", ("1x1o", "1x1o")))
    assert_equivariant(mixed, x, symmetry=Symmetry(O3, "1x1o", ("1x1o", "1x1o")), tolerance=1e-4)


@pytest.mark.parametrize("tolerance", [0.0, 1e-3, 1.0])
def test_the_tolerance_decides(tolerance):
    x = inputs_of([(5, 3)], torch.float64)
    error = equivariance_error(torch.tanh, x, symmetry=VECTORS)
    assert_equivariant(torch.tanh, x, symmetry=VECTORS, tolerance=error)
    with pytest.raises(EquivarianceError, match="expected at most"):
        assert_equivariant(torch.tanh, x, symmetry=VECTORS, tolerance=tolerance * error * 0.999)


def failing_at(call, value):
    """The identity, which returns `value` at one of its calls; call 0 is f(x) itself."""
    calls = iter(range(10**6))
    return lambda x: torch.full_like(x, value) if next(calls) == call else x.clone()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("call", [0, 1, 2, 5, 9])
def test_outputs_that_are_not_finite_fail_wherever_they_appear(call, value):
    x = inputs_of([(5, 3)], torch.float64)
    assert not math.isfinite(equivariance_error(failing_at(call, value), x, symmetry=VECTORS))
    with pytest.raises(EquivarianceError):
        assert_equivariant(failing_at(call, value), x, symmetry=VECTORS)
    assert equivariance_error(failing_at(99, value), x, symmetry=VECTORS) < 1e-14


def test_one_nan_among_many_numbers_fails():
    def holed(x):
        y = x.clone()
        y[0, 0] = math.nan
        return y

    with pytest.raises(EquivarianceError):
        assert_equivariant(holed, inputs_of([(500, 3)], torch.float64), symmetry=VECTORS)


def test_zero_only_for_x_is_an_infinite_error():
    x = torch.tensor([[1.0, 1.0, 1.0]], dtype=torch.float64)
    assert (
        equivariance_error(lambda x: x * (x.abs() - 1).abs().max().round(decimals=6), x, symmetry=VECTORS) == math.inf
    )


def test_a_model_that_hands_out_one_buffer_is_compared_with_its_first_answer():
    buffer = torch.zeros(5, dtype=torch.float64)
    with pytest.raises(EquivarianceError):
        assert_equivariant(
            lambda x: buffer.copy_(x[:, 0]), inputs_of([(5, 3)], torch.float64), symmetry=Symmetry(O3, "1x1o", None)
        )


def test_results_repeat_and_follow_the_generator():
    x = inputs_of([(5, 3)], torch.float64)

    def measured(seed):
        source = torch.Generator().manual_seed(seed) if seed is not None else None
        return equivariance_error(torch.tanh, x, symmetry=VECTORS, generator=source)

    state = torch.get_rng_state()
    assert measured(None) == measured(None) == measured(0) != measured(1)
    assert torch.equal(state, torch.get_rng_state())  # the global generator is not touched


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_passes_and_still_fails_where_broken(dtype):
    x = inputs_of([(50, 3)], dtype)
    assert_equivariant(lambda x: x * norm(x, dim=-1, keepdim=True), x, symmetry=VECTORS)
    with pytest.raises(EquivarianceError):
        assert_equivariant(lambda x: x + x.abs(), x, symmetry=VECTORS)


def test_checks_run_where_the_model_is(device):
    x = inputs_of([(5, 3)], torch.float32).to(device)
    assert_equivariant(lambda x: 2 * x, x, symmetry=VECTORS)


BAD = {
    "nothing to compare": (
        lambda: equivariance_error(lambda x: x, torch.ones(2, 3), symmetry=Symmetry(SO3, "1x1", "1x1"), samples=0),
        "samples >= 1",
    ),
    "no output": (
        lambda: equivariance_error(lambda x: "text", torch.ones(2, 3), symmetry=Symmetry(O3, "1x1o", None)),
        "at least one output tensor",
    ),
    "wrong features": (lambda: equivariance_error(lambda x: x, torch.ones(2, 4), symmetry=VECTORS), "expected 3"),
    "outputs of another structure": (
        lambda: equivariance_error(lambda x: (x, x), torch.ones(2, 3), symmetry=VECTORS),
        "found tuple",
    ),
    "outputs that change shape": (
        lambda: equivariance_error(lambda x: x[x[:, 0] > 0], torch.ones(2, 3), symmetry=VECTORS),
        "expected equal shapes",
    ),
    "outputs that come and go": (
        lambda: equivariance_error(
            lambda x: [x.sum()] if x.sum() > 0 else [], torch.ones(2, 3), symmetry=Symmetry(O3, "1x1o", None)
        ),
        "expected one structure",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    make, message = BAD[case]
    with pytest.raises(RepresentationError, match=message):
        make()


# --- models with manners of their own ---------------------------------------------------------------------------------


def doubled_in_place(x):
    x *= 2
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_model_may_change_its_inputs_in_place(dtype):
    x = inputs_of([(5, 3)], dtype)
    before = x.clone()
    assert_equivariant(doubled_in_place, x, symmetry=VECTORS)
    assert equivariance_error(doubled_in_place, x, symmetry=VECTORS) < 1e-5
    with pytest.raises(EquivarianceError):
        assert_equivariant(lambda x: doubled_in_place(x).abs(), x, symmetry=VECTORS)
    assert torch.equal(x, before)
    pair = {"x": x, "scale": torch.ones(5, 1).to(x)}

    def scaled(data):
        data["scale"].mul_(3)
        return data["x"].mul_(data["scale"])

    assert_equivariant(scaled, pair, symmetry=Symmetry(O3, {"x": "1x1o", "scale": None}, "1x1o"))
    assert torch.equal(x, before) and pair["scale"].max() == 1


def test_a_model_may_differentiate_what_it_takes():
    """Copies of inputs that want a gradient want one too, under no_grad as well."""
    x = inputs_of([(2, 5, 3)], torch.float64).requires_grad_()

    def model(x):
        with torch.enable_grad():
            energy = pair_energy(x)
            return {"energy": energy, "forces": -torch.autograd.grad(energy.sum(), x)[0]}

    with torch.no_grad():
        assert torch.equal(call(model, x)["forces"], model(x)["forces"])
    (slope,) = torch.autograd.grad(call(pair_energy, x).sum(), x)  # the copy is in the graph
    assert slope.any()


def test_a_model_may_change_geometric_tensors_in_place():
    pytest.importorskip("escnn")
    from escnn import gspaces
    from escnn import nn as enn

    space = gspaces.rot2dOnR2(4)
    kind = enn.FieldType(space, 2 * [space.regular_repr])
    layer = enn.R2Conv(kind, kind, 3, padding=1)
    seen = []

    def model(features):
        seen.append(features)
        features.tensor.mul_(2)
        return layer(features).tensor

    features = enn.GeometricTensor(torch.randn(2, 8, 5, 5), kind)
    before = features.tensor.clone()
    assert torch.equal(call(model, features), call(model, features))
    assert torch.equal(features.tensor, before)
    assert type(seen[0]) is enn.GeometricTensor and seen[0].type == kind and seen[0] is not features


def asserting(x):
    assert x.dtype == torch.float32, "this model takes float32"
    return x + 0.01 * x.abs()


def refusing(x):
    if x.dtype != torch.float32:
        raise ValueError("this model takes float32")
    return x + 0.01 * x.abs()


@pytest.mark.parametrize("model", [asserting, refusing])
def test_models_that_refuse_another_dtype_are_judged_in_their_own(model):
    x = inputs_of([(5, 3)], torch.float32)
    with pytest.raises(EquivarianceError, match="last digits"):
        assert_equivariant(model, x, symmetry=VECTORS)
