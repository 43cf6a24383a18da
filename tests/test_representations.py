"""Representations respect products, their derivatives generate them, and irreps are e3nn's."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from constrained_equiv import groups
from constrained_equiv import representations as reps
from constrained_equiv.errors import RepresentationError

ATOL = 1e-10
O3_SET = groups.product(groups.O3(), groups.symmetric(3))
QUATERNIONS = groups.matrix_group(
    "Q_8",
    generators=torch.tensor(
        [
            [[0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, -1], [0, 0, 1, 0]],
            [[0, 0, -1, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, -1, 0, 0]],
        ]
    ).double(),
)


def boosts():
    """O(1, 1) with its boosts: a group whose matrices are not orthogonal."""
    swap = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    return groups.matrix_group("SO(1, 1)", algebra=swap)


def corners(count):
    """Three unit vectors, permuted by S_3 acting on the plane: the matrices of its two generators."""
    angle = torch.tensor(2 * math.pi / 3, dtype=torch.float64)
    points = torch.stack([torch.cos(angle * torch.arange(3)), torch.sin(angle * torch.arange(3))])
    return points @ groups.symmetric(3).generators[:count] @ torch.linalg.pinv(points)


# name -> (representation, whether its matrices are orthogonal)
CASES = {
    "irreps": (reps.irreps("2x0e + 1x0o + 3x1o + 1x1e + 2x2e + 1x3o"), True),
    "irreps of SO(3)": (reps.irreps("2x0 + 3x1 + 1x4", group=groups.SO3()), True),
    "irreps, components first": (reps.irreps("2x0e + 3x1o + 2x2e", layout="ir_mul"), True),
    "repeated, unsorted and empty irreps": (reps.irreps("1x2e + 0x1o + 2x0e + 1x2e"), True),
    "vectors": (reps.vectors(4), True),
    "trivial": (reps.trivial(3, group=groups.cyclic(5)), True),
    "frequency 2 of SO(2)": (reps.frequency(2, group=groups.SO2(), channels=2), True),
    "frequency 3 of O(2)": (reps.frequency(3, group=groups.O2()), True),
    "frequency 3 of C_8": (reps.frequency(3, group=groups.cyclic(8), channels=2, layout="ir_mul"), True),
    "frequency 2 of D_6": (reps.frequency(2, group=groups.dihedral(6)), True),
    "points": (reps.permutation(4, channels=3), True),
    "pairs": (reps.permutation(3, channels=2, order=2, layout="mul_ir"), True),
    "regular of D_4": (reps.regular(groups.dihedral(4), channels=2), True),
    "regular of Q_8": (reps.regular(QUATERNIONS), True),
    "defining of Q_8": (reps.defining(QUATERNIONS, channels=2), True),
    "corners of S_3": (reps.from_matrices(groups.symmetric(3), "corners", corners(2)), True),
    "boosts": (reps.defining(boosts(), channels=2), False),
    "motions": (reps.defining(groups.E3()), False),
    "first factor": (reps.lift(reps.irreps("1x0e + 2x1o"), O3_SET, 0), True),
    "both factors": (
        reps.lift(reps.irreps("1x2e"), O3_SET, 0) + reps.lift(reps.permutation(3, channels=2), O3_SET, 1),
        True,
    ),
}
LIE = [name for name, (r, _) in CASES.items() if len(r.group.algebra)]
seeds = st.integers(0, 2**32)
FEW = settings(max_examples=settings().max_examples // 4)  # for laws whose every example is slow


def drawn(group, seed, count):
    return group.sample(count, generator=torch.Generator().manual_seed(seed))


def close(a, b, atol=ATOL):
    return torch.allclose(a, b, rtol=0, atol=atol * max(1.0, float(b.abs().max()) if b.numel() else 1.0))


@pytest.mark.parametrize("name", CASES)
@given(seeds)
def test_products_go_to_products_and_the_identity_to_the_identity(name, seed):
    r, orthogonal = CASES[name]
    g, h = drawn(r.group, seed, 2)
    one, first, second, both = r.matrix(torch.stack([r.group.identity, g, h, g @ h]))
    eye = torch.eye(r.dim, dtype=torch.float64)
    assert close(one, eye) and close(first @ second, both)
    assert close(r.matrix(torch.linalg.inv(g)) @ first, eye, atol=1e-9)
    assert not orthogonal or close(first.mT @ first, eye)


@pytest.mark.parametrize("name", LIE)
@FEW
@given(st.data())
def test_the_derivative_generates_the_representation(name, data):
    r, orthogonal = CASES[name]
    size = len(r.group.algebra)
    numbers = st.lists(st.floats(-2, 2), min_size=size, max_size=size)
    a, b = torch.tensor([data.draw(numbers), data.draw(numbers)]).double()
    direction, other = (torch.einsum("a,aij->ij", c, r.group.algebra) for c in (a, b))
    slope = r.derivative(direction)
    assert close(torch.linalg.matrix_exp(slope), r.matrix(r.group.element(a)), atol=1e-9)
    assert close(slope, torch.einsum("a,aij->ij", a, r.generators()[0]))  # linear
    bracket = slope @ r.derivative(other) - r.derivative(other) @ slope
    assert close(bracket, r.derivative(direction @ other - other @ direction))
    assert not orthogonal or close(slope, -slope.mT)


@pytest.mark.parametrize("name", CASES)
def test_generators_are_those_of_the_group(name):
    r, _ = CASES[name]
    continuous, discrete = r.generators()
    assert continuous.shape == (len(r.group.algebra), r.dim, r.dim)
    assert discrete.shape == (len(r.group.generators), r.dim, r.dim)
    assert torch.equal(discrete, r.matrix(r.group.generators))
    assert continuous.dtype == discrete.dtype == torch.float64


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("shape", "axis"), [((), -1), ((5,), -1), ((2, 5), 0), ((2, 5), 1), ((2, 5), -2)])
def test_a_representation_acts_along_any_axis(name, shape, axis):
    r, _ = CASES[name]
    sizes = list(shape)
    sizes.insert(axis if axis >= 0 else len(sizes) + 1 + axis, r.dim)
    features = torch.randn(sizes, dtype=torch.float64)
    element = drawn(r.group, 1, 1)[0]
    moved = r.act(element, features, axis=axis)
    expected = torch.tensordot(r.matrix(element), features, dims=([1], [axis])).movedim(0, axis)
    assert moved.shape == features.shape and close(moved, expected, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_batches_of_elements_equal_loops_and_features_keep_dtype_and_device(name, device):
    r, _ = CASES[name]
    elements = drawn(r.group, 2, 6).view(2, 3, r.group.degree, r.group.degree)
    loop = torch.stack([torch.stack([r.matrix(g) for g in row]) for row in elements])
    assert torch.allclose(r.matrix(elements), loop, rtol=0, atol=1e-13)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        features = torch.ones(3, r.dim, dtype=dtype, device=device)
        moved = r.act(elements[0, 0], features)
        assert moved.dtype == dtype and moved.device == features.device
        assert torch.allclose(moved.double().cpu(), r.act(elements[0, 0], features.double().cpu()), rtol=0.05, atol=0.2)


def test_matrix_functions_may_return_float32():
    r = reps.from_function(groups.SO2(), "coarse", 2, lambda g: g.float(), channels=2)
    assert r.matrix(r.group.identity).dtype == torch.float64
    assert all(part.dtype == torch.float64 for part in r.generators())


@pytest.mark.usefixtures("float64_default")
@pytest.mark.parametrize("parity", [1, -1])
@pytest.mark.parametrize("degree", range(7))
def test_irreps_are_those_of_e3nn(degree, parity):
    o3 = pytest.importorskip("e3nn.o3")
    elements = drawn(groups.O3(), degree, 20)
    theirs = o3.Irrep(degree, parity).D_from_matrix(elements)
    ours = reps.irreps(f"{degree}{'e' if parity == 1 else 'o'}").matrix(elements)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("float64_default")
def test_whole_e3nn_irreps_are_read_in_their_order():
    o3 = pytest.importorskip("e3nn.o3")
    irreps = o3.Irreps("2x1e + 3x0o + 1x2o + 2x1e + 0x4e")
    ours = reps.irreps(irreps)
    elements = drawn(groups.O3(), 0, 5)
    assert ours == reps.irreps(str(irreps)) and ours.dim == irreps.dim
    assert torch.allclose(ours.matrix(elements), irreps.D_from_matrix(elements), rtol=0, atol=1e-10)


@pytest.mark.usefixtures("float64_default")
@pytest.mark.parametrize("degree", range(1, 7))
def test_irreps_turn_the_spherical_harmonics_of_e3nn(degree):
    o3 = pytest.importorskip("e3nn.o3")
    points = torch.randn(10, 3)
    r = reps.irreps(f"{degree}{'oe'[(degree + 1) % 2]}")
    for g in drawn(groups.O3(), degree, 4):
        turned = o3.spherical_harmonics(degree, points @ g.T, normalize=True)
        assert torch.allclose(turned, r.act(g, o3.spherical_harmonics(degree, points, normalize=True)), atol=1e-10)


def rodrigues(axis, angle):
    """A rotation by its axis and angle; 1 - cos is written without cancellation."""
    cross = torch.einsum("a,aij->ij", axis, groups.SO3().algebra)
    return torch.eye(3).double() + math.sin(angle) * cross + 2 * math.sin(angle / 2) ** 2 * cross @ cross


@given(
    st.integers(0, 6),
    st.tuples(*[st.floats(-1, 1)] * 3).filter(lambda v: math.hypot(*v) > 1e-3),
    st.one_of(
        st.floats(0, math.pi),
        st.floats(-300, 0).map(lambda exponent: 10**exponent),
        st.floats(-16, 0).map(lambda exponent: math.pi - 10**exponent),
        st.sampled_from([0.0, 1e-300, 1e-160, math.pi / 2, 2 * math.pi / 3, math.nextafter(math.pi, 0), math.pi]),
    ),
)
def test_wigner_matrices_are_exact_for_tiny_angles_and_half_turns(degree, axis, angle):
    axis = torch.tensor(axis, dtype=torch.float64)
    axis = axis / torch.linalg.vector_norm(axis)
    generator = torch.einsum("a,aij->ij", axis, reps.rotation_generators(degree))
    ours = reps.wigner_matrix(degree, rodrigues(axis, angle))
    assert torch.allclose(ours, torch.linalg.matrix_exp(angle * generator), rtol=0, atol=1e-12)
    if angle < 1e-6:  # tiny angles do not vanish: the antisymmetric part keeps its relative precision
        assert torch.allclose((ours - ours.T) / 2, angle * generator, rtol=0, atol=1e-9 * angle)


@pytest.mark.parametrize("degree", range(1, 7))
@pytest.mark.parametrize("axis", range(3))
def test_half_turns_about_the_axes_square_to_the_identity(degree, axis):
    turn = -torch.eye(3, dtype=torch.float64)
    turn[axis, axis] = 1.0
    d = reps.wigner_matrix(degree, turn)
    assert torch.allclose(d @ d, torch.eye(2 * degree + 1).double(), atol=1e-13)
    assert float(d.trace()) == pytest.approx((-1) ** degree, abs=1e-13)


@pytest.mark.parametrize("degree", range(7))
def test_rotation_generators_obey_their_brackets_and_casimir(degree):
    x, y, z = generators = reps.rotation_generators(degree)
    for a, b, c in ((x, y, z), (y, z, x), (z, x, y)):
        assert torch.allclose(a @ b - b @ a, c, atol=1e-12)
    casimir = -(generators @ generators).sum(0)
    assert torch.allclose(casimir, degree * (degree + 1) * torch.eye(2 * degree + 1).double(), atol=1e-12)


@given(seeds, st.integers(0, 4), st.integers(0, 4), st.integers(0, 4))
def test_the_two_layouts_are_related_by_a_permutation(seed, scalars, vectors, tensors):
    muls, sizes = (scalars, vectors, tensors), (1, 3, 5)
    text = " + ".join(f"{mul}x{ir}" for mul, ir in zip(muls, ("0e", "1o", "2e"), strict=True))
    g = drawn(groups.O3(), seed, 1)[0]
    copy_first, component_first = (reps.irreps(text, layout=layout).matrix(g) for layout in ("mul_ir", "ir_mul"))
    order, start = [], 0
    for mul, size in zip(muls, sizes, strict=True):
        order += [start + u * size + i for i in range(size) for u in range(mul)]
        start += mul * size
    assert torch.equal(copy_first[order][:, order], component_first)


def test_layouts_are_what_tensors_flatten_to():
    g = drawn(groups.O3(), 3, 1)[0]
    features = torch.randn(4, 3, dtype=torch.float64)
    assert close(reps.vectors(4).act(g, features.flatten()), (features @ g.T).flatten())
    assert close(reps.vectors(4, layout="ir_mul").act(g, features.T.flatten()), (features @ g.T).T.flatten())


@pytest.mark.parametrize("points", [1, 2, 5])
def test_permutations_move_points_and_pairs(points):
    p = drawn(groups.symmetric(points), points, 1)[0]
    order = p.argmax(-1)
    nodes, edges = torch.randn(points, 3).double(), torch.randn(points, points, 2).double()
    assert torch.equal(reps.permutation(points, channels=3).act(p, nodes.flatten()), nodes[order].flatten())
    pairs = reps.permutation(points, channels=2, order=2)
    assert torch.equal(pairs.act(p, edges.flatten()), edges[order][:, order].flatten())
    channels_first = reps.permutation(points, channels=3, layout="mul_ir")
    assert torch.equal(channels_first.act(p, nodes.T.flatten()), nodes[order].T.flatten())


@pytest.mark.parametrize("group", [groups.cyclic(5), groups.dihedral(3), groups.symmetric(4), QUATERNIONS], ids=str)
def test_the_regular_representation_is_left_multiplication(group):
    elements, r = group.elements(), reps.regular(group)
    functions = r.matrix(elements)
    assert torch.equal(functions.sum(-1), torch.ones(len(elements), len(elements)).double())
    traces = functions.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert traces.tolist() == [float(len(elements))] + [0.0] * (len(elements) - 1)
    for g, matrix in zip(elements, functions, strict=True):
        for h, column in enumerate(matrix.T):
            assert torch.allclose(elements[column.argmax()], g @ elements[h], atol=1e-12)


def test_matrices_must_satisfy_the_relations_of_the_group():
    group = groups.dihedral(4)
    turn, flip = group.generators
    assert reps.from_matrices(group, "same", group.generators).dim == 2
    signs = reps.from_matrices(group, "signs", torch.tensor([[[-1.0]], [[1.0]]]))
    assert signs.matrix(turn @ turn @ flip).item() == 1.0 and signs.matrix(turn @ flip).item() == -1.0
    broken = {
        "not of order four": torch.stack([groups.cyclic(3).generators[0], flip]),
        "does not conjugate the turn to its inverse": torch.stack([turn, torch.eye(2).double()]),
        "twice the turn": torch.stack([2 * turn, flip]),
    }
    for name, matrices in broken.items():
        with pytest.raises(RepresentationError, match=name):
            reps.from_matrices(group, name, matrices)


def test_a_lift_acts_through_its_factor_alone():
    vectors, points = reps.irreps("2x1o"), reps.permutation(3)
    g = drawn(O3_SET, 4, 1)[0]
    assert torch.equal(reps.lift(vectors, O3_SET, 0).matrix(g), vectors.matrix(g[:3, :3]))
    assert torch.equal(reps.lift(points, O3_SET, 1).matrix(g), points.matrix(g[3:, 3:]))
    assert reps.lift(vectors, O3_SET, 0) == reps.lift(reps.irreps("2x1o"), O3_SET, 0)


def test_representations_are_equal_when_they_act_alike():
    so2 = groups.SO2()
    assert reps.frequency(2, group=so2) == reps.frequency(2, group=so2) != reps.frequency(3, group=so2)
    assert reps.vectors(2) != reps.vectors(2, layout="ir_mul")
    assert reps.vectors(2, group=groups.SO3()) == reps.irreps("2x1", group=groups.SO3()) != reps.vectors(2)
    one = reps.from_function(so2, "mine", 2, lambda g: g)
    other = reps.from_function(so2, "mine", 2, lambda g: g @ g)  # the same name, as when a notebook cell is run again
    assert one == reps.from_function(so2, "mine", 2, lambda g: g.clone()) != other


def test_sums_and_multiples_put_blocks_side_by_side():
    first, second = reps.irreps("2x0e + 1x1o"), reps.irreps("1x2e")
    g = drawn(groups.O3(), 5, 1)[0]
    assert torch.equal((first + second).matrix(g), torch.block_diag(first.matrix(g), second.matrix(g)))
    assert 3 * first == reps.irreps("6x0e + 3x1o")
    assert str(first + second) == "2x0e + 1x1o + 1x2e" and str(reps.irreps("")) == "0"


IRREPS = {"": 0, "0e": 1, "3x1o": 9, "2x0e+1x1o": 5, " 1x2e  +  4x0o ": 9, "0x3o + 2e": 5, "12x10e": 252}


@pytest.mark.parametrize("text", IRREPS)
def test_irreps_are_read_as_e3nn_writes_them(text):
    assert reps.irreps(text).dim == IRREPS[text]


def test_parity_is_ignored_where_the_group_has_none():
    assert reps.irreps("2x1o + 1x0e", group=groups.SO3()) == reps.irreps("2x1 + 0", group=groups.SO3())


SO2 = groups.SO2()
BAD = {
    "unreadable irreps": (lambda: reps.irreps("2x1o, 1x0e"), "cannot read '2x1o, 1x0e'"),
    "no parity for O(3)": (lambda: reps.irreps("2x1"), "cannot read '2x1'"),
    "negative multiplicity": (lambda: reps.irreps("-2x1o"), "cannot read '-2x1o'"),
    "empty summand": (lambda: reps.irreps("1x0e + "), "cannot read ''"),
    "irreps of another group": (lambda: reps.irreps("1x0e", group=SO2), r"irreps '1x0e' of SO\(2\)"),
    "sum over two groups": (lambda: reps.irreps("1x0e") + reps.irreps("1", group=groups.SO3()), "expected one group"),
    "frequency zero": (lambda: reps.frequency(0, group=SO2), r"frequency\(0\)"),
    "frequency in space": (lambda: reps.frequency(1, group=groups.SO3()), r"of SO\(3\)"),
    "triples": (lambda: reps.permutation(3, order=3), "order=3"),
    "regular of a Lie group": (lambda: reps.regular(SO2), "infinitely many"),
    "identity not kept": (lambda: reps.from_function(SO2, "double", 2, lambda g: 2 * g), "at the identity"),
    "wrong size": (lambda: reps.from_function(SO2, "three", 3, lambda g: g), r"\(7, 3, 3\)"),
    "no batches": (lambda: reps.from_function(SO2, "first", 2, lambda g: g[0]), r"expected \(7, 2, 2\)"),
    "anti-homomorphism": (
        lambda: reps.from_function(groups.SO3(), "transposed", 3, lambda g: g.mT),
        "found a difference",
    ),
    "squares in O(2)": (lambda: reps.from_function(groups.O2(), "twice", 2, lambda g: g @ g), "found a difference"),
    "squares in D_4": (
        lambda: reps.from_function(groups.dihedral(4), "twice", 2, lambda g: g @ g),
        "found a difference",
    ),
    "integer features": (
        lambda: reps.vectors(1).act(-groups.O3().identity, torch.ones(3, dtype=torch.long)),
        r"torch\.int64: expected floating point or complex, .*features\.double\(\)",
    ),
    "boolean features": (lambda: reps.vectors(1).act(-groups.O3().identity, torch.ones(3).bool()), r"torch\.bool"),
    "not differentiable": (lambda: reps.from_function(SO2, "detached", 2, lambda g: g.detach()), "without detach"),
    "too few matrices": (
        lambda: reps.from_matrices(groups.dihedral(3), "one", torch.eye(2)[None]),
        r"expected \(2, d, d\)",
    ),
    "matrices of a Lie group": (lambda: reps.from_matrices(SO2, "turn", torch.eye(2)[None]), "expected a finite group"),
    "lift to no product": (lambda: reps.lift(reps.irreps("1x0e"), groups.O3(), 0), "factor 0"),
    "lift to another factor": (lambda: reps.lift(reps.irreps("1x0e"), O3_SET, 1), "factor 1"),
    "lift past the end": (lambda: reps.lift(reps.irreps("1x0e"), O3_SET, 2), "factor 2"),
    "features too short": (lambda: reps.vectors(2).act(groups.O3().identity, torch.ones(5)), "expected 6"),
    "another group": (lambda: reps.as_representation(reps.vectors(1), group=groups.SO3()), r"belongs to O\(3\)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    make, message = BAD[case]
    with pytest.raises(RepresentationError, match=message):
        make()


RESTRICTED = {
    "irreps to rotations": (reps.irreps("2x1o + 1x2e + 1x0o"), groups.SO3(), "2x1 + 1x2 + 1x0"),
    "irreps to turns": (
        reps.irreps("2x1o + 1x2e"),
        groups.matrix_group("turns", algebra=groups.SO3().algebra[2:]),
        "2x1o of O(3) + 1x2e of O(3)",
    ),
    "frequencies": (reps.frequency(3, group=SO2), groups.cyclic(3), "1xk=3 of SO(2)"),
    "regular": (reps.regular(groups.dihedral(3)), groups.cyclic(3), "1xregular of D_3"),
    "points": (
        reps.permutation(3, channels=2),
        groups.matrix_group("cycle", generators=torch.eye(3)[[1, 2, 0]][None]),
        "2xpoints of S_3",
    ),
    "itself": (reps.vectors(2), groups.O3(), "2x1o"),
}


@pytest.mark.parametrize("name", RESTRICTED)
def test_a_restriction_has_the_same_matrices(name):
    representation, subgroup, text = RESTRICTED[name]
    restricted = reps.restrict(representation, subgroup)
    assert str(restricted) == text and restricted.group == subgroup
    elements = drawn(subgroup, 3, 3)
    assert torch.allclose(restricted.matrix(elements), representation.matrix(elements), atol=1e-12)
    for direction in subgroup.algebra:
        assert torch.allclose(restricted.derivative(direction), representation.derivative(direction), atol=1e-12)


def test_restrictions_of_different_groups_are_told_apart():
    """The regular representations of C_8 and D_4, each restricted to C_4, have equal names, dimensions and group."""
    first, second = (reps.restrict(reps.regular(g), groups.cyclic(4)) for g in (groups.cyclic(8), groups.dihedral(4)))
    assert first.dim == second.dim == 8 and first != second


def test_representations_that_differ_at_flips_alone_are_told_apart():
    o2 = groups.O2()
    polar = reps.from_function(o2, "mine", 2, lambda g: g)
    axial = reps.from_function(o2, "mine", 2, lambda g: g * torch.linalg.det(g)[..., None, None])
    assert polar == reps.from_function(o2, "mine", 2, lambda g: g.clone()) != axial


def test_complex_features_are_acted_on():
    x = torch.randn(5, 3, dtype=torch.complex128)
    g = drawn(groups.O3(), 6, 1)[0]
    moved = reps.vectors(1).act(g, x)
    assert close(moved.real, x.real @ g.T) and close(moved.imag, x.imag @ g.T)


@pytest.mark.parametrize("order", [20, 21, 26])
def test_rounded_matrices_make_representations(order):
    turn = groups.cyclic(order).generators
    rounded = groups.matrix_group("rounded", generators=turn.float())
    for group, generators in ((rounded, turn), (groups.cyclic(order), turn.float())):
        r = reps.from_matrices(group, "turn", generators)
        assert torch.allclose(r.matrix(group.elements()), group.elements(), atol=1e-5)
    columns = reps.regular(rounded).matrix(rounded.elements()).sum(-2)
    assert torch.equal(columns, torch.ones(order, order, dtype=torch.float64))


def test_integers_that_do_not_move_stay_as_they_are():
    species = torch.tensor([[1, 6], [8, 1]])
    assert reps.irreps("2x0e").act(-groups.O3().identity, species) is species
