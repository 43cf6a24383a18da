"""Strategies draw what they promise, replay, and shrink to the simplest case."""

import math

import hypothesis
import pytest
import torch
from hypothesis import find, given
from hypothesis import strategies as st

from constrained_equiv import groups, testing
from constrained_equiv import representations as reps
from constrained_equiv.errors import ConstrainedEquivError

BOTH = groups.product(groups.O3(), groups.symmetric(3))
GROUPS = [
    groups.SO2(),
    groups.O2(),
    groups.SO3(),
    groups.O3(),
    groups.E3(),
    groups.SO13(),
    groups.O13(),
    groups.cyclic(5),
    groups.dihedral(3),
    groups.symmetric(4),
    groups.symmetric(7),
    groups.translations(2),
    BOTH,
]
# finding a rare case may take thousands of cheap draws
SEARCH = hypothesis.settings(max_examples=2_000, deadline=None, derandomize=True, database=None)


def is_identity(g):
    return torch.equal(g, torch.eye(len(g), dtype=g.dtype))


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_elements_shrink_to_the_identity(group):
    assert is_identity(find(testing.elements(group), lambda g: True, settings=SEARCH))


def test_the_angle_shrinks_before_the_axis():
    found = find(testing.elements(groups.SO3()), lambda g: not is_identity(g), settings=SEARCH)
    assert found[0, 0] == 1  # about the first axis, whatever the angle
    angle = math.atan2(found[2, 1], found[1, 1])
    assert angle == pytest.approx(1e-4)  # the simplest of the stated angles


def test_one_factor_of_a_product_shrinks_at_a_time():
    found = find(testing.elements(BOTH), lambda g: not is_identity(g[3:, 3:]), settings=SEARCH)
    assert is_identity(found[:3, :3]) and not is_identity(found[3:, 3:])
    found = find(testing.elements(BOTH), lambda g: torch.linalg.det(g[:3, :3]) < 0, settings=SEARCH)
    assert torch.equal(found, torch.block_diag(-torch.eye(3), torch.eye(3)).double())


@pytest.mark.parametrize(
    "property",
    [
        lambda g: torch.linalg.det(g) < 0,
        lambda g: 0 < float(torch.linalg.matrix_norm(g - torch.eye(3))) < 1e-2,
        lambda g: abs(float(g.trace()) + 1) < 1e-9 and float(torch.linalg.det(g)) > 0,  # a half turn
        lambda g: bool((g.abs() > 0.1).all()),
    ],
    ids=["reflection", "tiny turn", "half turn", "generic"],
)
def test_all_kinds_of_rotations_are_drawn(property):
    find(testing.elements(groups.O3()), property, settings=SEARCH)


def test_all_elements_of_a_small_group_are_drawn():
    for wanted in groups.dihedral(3).elements():
        find(testing.elements(groups.dihedral(3)), lambda g, w=wanted: torch.allclose(g, w), settings=SEARCH)


@given(st.data())
def test_large_finite_groups_are_drawn_from_without_listing_them(data):
    g = data.draw(testing.elements(groups.symmetric(12)))
    assert torch.equal(g @ g.mT, torch.eye(12).double()) and set(g.flatten().tolist()) == {0.0, 1.0}
    listed = groups.matrix_group("hyperoctahedral", generators=signed_permutations(4))
    g = data.draw(testing.elements(listed))
    assert torch.equal(g @ g.mT, torch.eye(4).double())


def signed_permutations(n):
    eye = torch.eye(n).double()
    return torch.stack([eye[[1, 0, *range(2, n)]], eye.roll(1, 0), torch.diag(torch.tensor([-1.0] + [1.0] * (n - 1)))])


@given(testing.groups(), st.data())
def test_representations_fit_their_group_and_shrink_to_one_copy(group, data):
    representation = data.draw(testing.representations(group))
    assert representation.group == group and 1 <= len(representation.blocks) <= 3
    element = data.draw(testing.elements(group))
    assert representation.matrix(element).shape == (representation.dim, representation.dim)


def test_groups_and_representations_shrink():
    assert find(testing.groups(), lambda g: True, settings=SEARCH) == groups.cyclic(1)
    assert find(testing.groups(), lambda g: g.factors, settings=SEARCH).name == "O(3) x S_2"
    found = find(testing.representations(groups.O3()), lambda r: True, settings=SEARCH)
    assert str(found) == "1x0e"
    assert find(testing.irreps(), lambda text: True, settings=SEARCH) == "1x0e"
    assert find(testing.irreps(), lambda text: "2o" in text, settings=SEARCH) == "1x2o"


def generic(*shape):
    """The simplest Gaussian numbers: those of seed 0."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_features_and_point_clouds_shrink_to_generic_values_of_the_first_seed():
    assert torch.equal(find(testing.tensors((2, 3)), lambda x: True, settings=SEARCH), generic(2, 3))
    features = testing.features(reps.irreps("1x0e + 1x1o"), shape=(2,))
    assert torch.equal(find(features, lambda x: bool(x.any()), settings=SEARCH), generic(2, 4))
    large = find(testing.tensors((2, 3)), lambda x: x.abs().max() > 100, settings=SEARCH)
    assert torch.equal(large, 1e3 * generic(2, 3))  # the scale is what it takes, nothing else
    assert find(testing.point_clouds(), lambda x: True, settings=SEARCH).shape == (0, 3)
    assert torch.equal(find(testing.point_clouds(), lambda x: len(x) > 1, settings=SEARCH), generic(2, 3))
    equal = find(testing.point_clouds(), lambda x: len(x) > 1 and torch.equal(x[0], x[1]), settings=SEARCH)
    assert torch.equal(equal, generic(2, 3)[:1].expand(2, 3))


def test_networks_shrink_to_one_channel_of_the_first():
    few = hypothesis.settings(SEARCH, max_examples=100)  # a network is more to build than a tensor
    found = find(testing.networks(), lambda network: True, settings=few)
    assert found.name == "deep set" and found.inputs.shape[-1] == 1
    found = find(testing.networks(), lambda network: network.name == "filter", settings=few)
    assert found.inputs.shape == (1, 1, 6, 6)


REPLAYED = {
    "groups": testing.groups(),
    "elements": testing.elements(BOTH),
    "representations": testing.representations(groups.dihedral(4)),
    "irreps": testing.irreps(),
    "features": testing.features(reps.irreps("2x1o")),
    "point clouds": testing.point_clouds(),
    "networks": testing.networks(),
}


def as_numbers(value):
    """Something to compare by `==`."""
    if isinstance(value, testing.Network):
        return value.name, value.inputs.tolist(), [p.tolist() for p in value.model.parameters()]
    return value.tolist() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("name", REPLAYED)
def test_draws_replay_from_a_seed_and_leave_torch_alone(name):
    def drawn(seed):
        values = []

        @hypothesis.seed(seed)
        @hypothesis.settings(max_examples=15, database=None, derandomize=False, phases=[hypothesis.Phase.generate])
        @given(REPLAYED[name])
        def collect(value):
            values.append(as_numbers(value))

        collect()
        return values

    torch.manual_seed(1)
    first = drawn(5)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert drawn(5) == first != drawn(6)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "property",
    [
        lambda x: not x.any(),
        lambda x: int((x != 0).sum()) == 1,
        lambda x: bool((x == x[0]).all()) and bool(x.any()),
        lambda x: x.abs().max() > 100,
        lambda x: 0 < x.abs().max() < 0.02,
        lambda x: float(x.norm(dim=1).max()) > 1e3 * float(x.norm(dim=1).min()) > 0,
    ],
    ids=["zero", "one entry", "equal rows", "large", "small", "mixed scales"],
)
def test_features_contain_the_edge_cases(property):
    find(testing.tensors((4, 3)), property, settings=SEARCH)


@given(testing.irreps(), st.sampled_from([torch.float32, torch.float64]), st.data())
def test_features_have_the_shape_and_dtype_asked_for(text, dtype, data):
    representation = reps.irreps(text)
    features = data.draw(testing.features(representation, shape=(2, 3), dtype=dtype))
    assert features.shape == (2, 3, representation.dim) and features.dtype == dtype
    assert torch.isfinite(features).all()


def gram_rank(points):
    return int(torch.linalg.matrix_rank(points - points.mean(0))) if len(points) else 0


@pytest.mark.parametrize(
    "property",
    [
        lambda x: len(x) == 0,
        lambda x: len(x) == 1,
        lambda x: len(x) > 2 and torch.equal(x[0], x[1]) and not torch.equal(x[0], x[2]),
        lambda x: len(x) > 2 and bool((x == x[0]).all()),
        lambda x: len(x) > 3 and gram_rank(x) == 1 and x[0].any() and not (x == x[0]).all(),
        lambda x: len(x) > 4 and gram_rank(x) == 2,
        lambda x: len(x) > 3 and x.std() > 100,
        lambda x: len(x) > 3 and 0 < x.abs().max() < 0.1,
        lambda x: len(x) > 3 and bool((x == x.round()).all()) and gram_rank(x) == 3,
    ],
    ids=["empty", "single", "coincident", "all equal", "collinear", "coplanar", "large", "small", "lattice"],
)
def test_point_clouds_contain_the_edge_cases(property):
    find(testing.point_clouds(), property, settings=SEARCH)


@given(testing.point_clouds(min_points=2, max_points=4, dimension=2, dtype=torch.float32))
def test_point_clouds_keep_to_the_bounds(points):
    assert 2 <= len(points) <= 4 and points.shape[1] == 2 and points.dtype == torch.float32
    assert torch.isfinite(points).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_networks_are_equivariant(dtype):
    seen = set()

    @given(testing.networks(dtype=dtype), st.data())
    def check(network, data):
        seen.add(network.name)
        element = data.draw(testing.elements(network.symmetry.group))
        testing.assert_equivariant_at(network.model, network.inputs, element, symmetry=network.symmetry)

    check()
    assert len(seen) == 5


@given(testing.networks(), st.data())
def test_networks_replay_from_their_seed(network, data):
    state = torch.get_rng_state()
    data.draw(testing.networks())
    assert torch.equal(state, torch.get_rng_state())


def test_escnn_field_types_are_drawn():
    gspaces = pytest.importorskip("escnn.gspaces")
    for space in (gspaces.rot2dOnR2(4), gspaces.rot2dOnR2(-1, maximum_frequency=3)):
        found = find(testing.field_types(space), lambda t: len(t) > 1, settings=SEARCH)
        assert found.gspace == space and len(found) == 2
        simplest = find(testing.field_types(space), lambda t: True, settings=SEARCH)
        assert tuple(simplest.representations) == (space.trivial_repr,)


def test_profiles_have_names_of_their_own_and_load_on_request():
    before = hypothesis.settings.get_current_profile_name()
    try:
        testing.load_profile("quick")
        assert hypothesis.settings.default.max_examples == 10
        assert hypothesis.settings.get_profile("equivariance-thorough").max_examples == 1_000
        assert hypothesis.settings.get_profile("equivariance-ci").derandomize
        with pytest.raises(ConstrainedEquivError, match="expected one of"):
            testing.load_profile("slow")
    finally:
        hypothesis.settings.load_profile(before)
