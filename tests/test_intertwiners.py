"""The projection onto equivariant maps is orthogonal, complete, exact near zero, and the average over the group."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from constrained_equiv import groups
from constrained_equiv import representations as reps
from constrained_equiv.errors import RepresentationError
from constrained_equiv.intertwiners import intertwiners

ATOL = 1e-10
SO2, C8, D4, S3 = groups.SO2(), groups.cyclic(8), groups.dihedral(4), groups.symmetric(3)
O3_SET = groups.product(groups.O3(), S3)
BOTH = groups.product(groups.O3(), groups.SO3())


def lorentz():
    """The proper Lorentz group: three boosts and three rotations, not orthogonal."""
    algebra = torch.zeros(6, 4, 4, dtype=torch.float64)
    for a in range(3):
        algebra[a, 0, a + 1] = algebra[a, a + 1, 0] = 1.0
    algebra[3:, 1:, 1:] = groups.SO3().algebra
    return groups.matrix_group("SO(1, 3)", algebra=algebra)


LORENTZ = lorentz()
FOUR = reps.defining(LORENTZ)
TENSOR = reps.from_function(
    LORENTZ, "tensors", 16, lambda g: torch.einsum("...ij,...kl->...ikjl", g, g).flatten(-4, -3).flatten(-2, -1)
)
UNIT_SHEAR = groups.matrix_group("shears", generators=torch.tensor([[[1.0, 1.0], [0.0, -1.0]]]))

# name -> (inputs, outputs, dimension of the equivariant maps, orthogonal)
CASES = {
    "parity": (reps.irreps("3x0e + 2x1o + 2x1e + 1x2e"), reps.irreps("2x0e + 4x1o + 1x2e"), 15, True),
    "no parity": (
        reps.irreps("3x0 + 2x1 + 2x1 + 1x2", group=groups.SO3()),
        reps.irreps("2x0 + 4x1 + 1x2", group=groups.SO3()),
        23,
        True,
    ),
    "mixed layouts": (
        reps.irreps("2x0e + 3x1o", layout="ir_mul"),
        reps.irreps("2x1o + 1x0e + 1x1o"),
        11,
        True,
    ),
    "components first": (reps.vectors(3, layout="ir_mul"), reps.vectors(2, layout="ir_mul"), 6, True),
    "nothing in common": (reps.irreps("2x1o"), reps.irreps("3x1e + 2x0o"), 0, True),
    "empty and zero blocks": (reps.irreps("0x1o + 2x0e"), reps.irreps("1x0e + 0x2e"), 2, True),
    "frequencies of SO(2)": (
        reps.frequency(1, group=SO2, channels=3),
        reps.frequency(1, group=SO2, channels=2),
        12,
        True,
    ),
    "different frequencies": (reps.frequency(1, group=SO2), reps.frequency(2, group=SO2), 0, True),
    "frequencies of O(2)": (
        reps.frequency(2, group=groups.O2(), channels=3) + reps.trivial(2, group=groups.O2()),
        reps.frequency(2, group=groups.O2(), channels=2, layout="ir_mul") + reps.trivial(1, group=groups.O2()),
        8,
        True,
    ),
    "frequency k is n - k": (reps.frequency(3, group=C8, channels=2), reps.frequency(5, group=C8), 4, True),
    "frequency n / 2 is not irreducible": (reps.frequency(4, group=C8), reps.frequency(4, group=C8), 4, True),
    "frequencies of D_4": (reps.frequency(1, group=D4, channels=2), reps.frequency(3, group=D4, channels=2), 4, True),
    "points": (reps.permutation(4, channels=2), reps.permutation(4, channels=3), 12, True),
    "points to pairs": (reps.permutation(4), reps.permutation(4, order=2, channels=2, layout="mul_ir"), 10, True),
    "pairs": (reps.permutation(4, order=2), reps.permutation(4, order=2), 15, True),
    "pairs of three": (reps.permutation(3, order=2, channels=2), reps.permutation(3, order=2), 28, True),
    "regular of D_4": (reps.regular(D4, channels=2), reps.regular(D4, channels=3), 48, True),
    "regular of S_3 to a sum": (
        reps.regular(S3),
        reps.permutation(3, channels=2) + reps.trivial(3, group=S3),
        9,
        True,
    ),
    "regular to frequency": (reps.regular(D4), reps.frequency(1, group=D4, channels=2), 4, True),
    "first factor": (
        reps.lift(reps.irreps("2x0e + 1x1o"), O3_SET, 0) + reps.lift(reps.permutation(3), O3_SET, 1),
        reps.lift(reps.permutation(3), O3_SET, 1) + reps.lift(reps.irreps("1x1o"), O3_SET, 0),
        5,
        True,
    ),
    "trivial in two factors": (
        reps.lift(reps.irreps("1x0e + 1x0o"), BOTH, 0),
        reps.lift(reps.irreps("2x0 + 1x1", group=groups.SO3()), BOTH, 1),
        2,
        True,
    ),
    "Lorentz vectors": (reps.defining(LORENTZ, channels=2), FOUR, 2, False),
    "Lorentz tensors": (TENSOR, TENSOR + reps.trivial(1, group=LORENTZ), 5, False),
    "shears": (reps.defining(UNIT_SHEAR), reps.defining(UNIT_SHEAR, channels=2), 4, False),
}
SPACES = {name: intertwiners(inputs, outputs) for name, (inputs, outputs, *_) in CASES.items()}
ORTHOGONAL = [name for name, case in CASES.items() if case[3]]
FINITE = [name for name in CASES if SPACES[name].inputs.group.order is not None]
seeds = st.integers(0, 2**32)


def random_maps(space, seed, *lead) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*lead, *space.shape, dtype=torch.float64, generator=generator)


def solved(space) -> Tensor:
    """An orthonormal basis of the maps that commute with all generators, from one dense system over the whole map."""
    rows, columns = space.shape
    constraints = [torch.zeros(1, rows * columns, dtype=torch.float64)]
    for left, right in zip(torch.cat(space.outputs.generators()), torch.cat(space.inputs.generators()), strict=True):
        eye_out, eye_in = torch.eye(rows, dtype=torch.float64), torch.eye(columns, dtype=torch.float64)
        constraints.append(torch.kron(left, eye_in) - torch.kron(eye_out, right.T.contiguous()))
    _, values, vectors = torch.linalg.svd(torch.cat(constraints))
    return vectors[int((values > 1e-9).sum()) :]


@pytest.mark.parametrize("name", CASES)
def test_rank_is_the_dimension_of_the_equivariant_maps(name):
    space = SPACES[name]
    assert space.rank == CASES[name][2] == len(solved(space)) == len(space.basis())


@pytest.mark.parametrize("name", CASES)
def test_the_projection_is_the_one_onto_the_solutions_of_the_commutation_relations(name):
    space, basis = SPACES[name], solved(SPACES[name])
    maps = random_maps(space, 0, 5)
    expected = (maps.flatten(1) @ basis.T @ basis).view_as(maps)
    assert torch.allclose(space.project(maps), expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", CASES)
@given(seeds)
def test_the_projection_is_idempotent_and_self_adjoint(name, seed):
    space = SPACES[name]
    first, second = random_maps(space, seed, 2)
    projected = space.project(first)
    assert torch.allclose(space.project(projected), projected, rtol=0, atol=1e-13)
    assert torch.allclose(space.complement(projected), torch.zeros_like(first), rtol=0, atol=1e-13)
    assert torch.allclose(projected + space.complement(first), first, rtol=0, atol=1e-14)
    assert float((projected * second).sum()) == pytest.approx(float((first * space.project(second)).sum()), abs=ATOL)
    assert float((projected * space.complement(second)).sum()) == pytest.approx(0.0, abs=ATOL)


@pytest.mark.parametrize("name", CASES)
@given(seeds)
def test_projected_maps_commute_with_every_element(name, seed):
    space = SPACES[name]
    g = space.inputs.group.sample(generator=torch.Generator().manual_seed(seed))[0]
    equivariant = space.project(random_maps(space, seed))
    left, right = space.outputs.matrix(g) @ equivariant, equivariant @ space.inputs.matrix(g)
    scale = max(1.0, float(left.abs().max()) if left.numel() else 1.0)
    assert torch.allclose(left, right, rtol=0, atol=ATOL * scale)
    assert float(space.defect(equivariant[None]).sum()) < ATOL


@pytest.mark.parametrize("name", CASES)
def test_the_basis_is_orthonormal_and_spans_the_projection(name):
    space = SPACES[name]
    basis = space.basis().flatten(1)
    assert torch.allclose(basis @ basis.T, torch.eye(len(basis), dtype=torch.float64), atol=ATOL)
    maps = random_maps(space, 1, 3)
    assert torch.allclose(space.project(maps), (maps.flatten(1) @ basis.T @ basis).view_as(maps), atol=ATOL)


@pytest.mark.parametrize("name", CASES)
def test_the_defect_is_what_it_says(name):
    space = SPACES[name]
    maps = random_maps(space, 2, 3)
    left, right = torch.cat(space.outputs.generators()), torch.cat(space.inputs.generators())
    brackets = torch.einsum("nij,gjk->gnik", maps, right) - torch.einsum("gij,njk->gnik", left, maps)
    assert torch.allclose(space.defect(maps), brackets.square().sum((-2, -1)), rtol=1e-12, atol=1e-12)


def rotations(degree):
    """Points and weights that average polynomials of a degree over SO(3) exactly (Gauss-Legendre times trapezoid)."""
    nodes, weights = map(torch.from_numpy, np.polynomial.legendre.leggauss(degree + 1))
    turns = 2 * math.pi * torch.arange(degree + 1, dtype=torch.float64) / (degree + 1)
    x, y = groups.SO3().algebra[:2]

    def about(axis, angles):
        return torch.linalg.matrix_exp(angles[:, None, None] * axis)

    points = torch.einsum("aij,bjk,ckl->abcil", about(y, turns), about(x, torch.arccos(nodes)), about(y, turns))
    weight = (weights / 2)[None, :, None].expand(len(turns), -1, len(turns)) / len(turns) ** 2
    return points.flatten(0, 2), weight.flatten()


def averaged(space, maps, elements, weights):
    left, right = space.outputs.matrix(elements), space.inputs.matrix(elements)
    return torch.einsum("g,gij,nik,gkl->njl", weights, left, maps, right)


def quadrature(group, degree):
    """Elements and weights whose average over a compact group is exact for products of two representations."""
    if group.order is not None:
        elements = group.elements()
        return elements, torch.full((len(elements),), 1 / len(elements), dtype=torch.float64)
    if group.name in ("SO(2)", "O(2)"):
        angles = 2 * math.pi * torch.arange(2 * degree + 1, dtype=torch.float64) / (2 * degree + 1)
        elements = group.element(angles[:, None])
    else:
        elements, weights = rotations(2 * degree)
        extra = group.generators
        elements = torch.cat([elements, *(elements @ g for g in extra)])
        return elements, weights.repeat(1 + len(extra)) / (1 + len(extra))
    elements = torch.cat([elements, *(elements @ g for g in group.generators)])
    return elements, torch.full((len(elements),), 1 / len(elements), dtype=torch.float64)


AVERAGED = [name for name in ORTHOGONAL if not SPACES[name].inputs.group.factors]


@pytest.mark.parametrize("name", AVERAGED)
def test_the_projection_is_the_average_over_the_group(name):
    space = SPACES[name]
    maps = random_maps(space, 3, 4)
    average = averaged(space, maps, *quadrature(space.inputs.group, 4))
    assert torch.allclose(space.project(maps), average, rtol=0, atol=ATOL)


@pytest.mark.parametrize("name", AVERAGED)
def test_the_mean_squared_defect_is_twice_the_squared_distance(name):
    """METHOD section 6: the average of || rho_out W - W rho_in ||^2 is 2 || W - P W ||^2."""
    space = SPACES[name]
    elements, weights = quadrature(space.inputs.group, 4)
    maps = random_maps(space, 4)
    gaps = space.outputs.matrix(elements) @ maps - maps @ space.inputs.matrix(elements)
    mean = float(weights @ gaps.square().sum((-2, -1)))
    assert mean == pytest.approx(2 * float(space.complement(maps).square().sum()), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize(("l_in", "l_out"), [(0, 0), (0, 2), (1, 1), (1, 2), (2, 2), (3, 1)])
def test_the_lie_defect_weighs_spin_j_by_j_times_j_plus_one(l_in, l_out):
    """METHOD section 6, Casimir: sum_a || A_out W - W A_in ||^2 = sum_J J (J + 1) || W_J ||^2."""
    space = intertwiners(f"{l_in}", f"{l_out}", group=groups.SO3())
    maps = random_maps(space, 5)
    elements, weights = rotations(2 * (l_in + l_out))
    moved = space.outputs.matrix(elements) @ maps @ space.inputs.matrix(elements).mT
    expected = total = 0.0
    for spin in range(abs(l_in - l_out), l_in + l_out + 1):
        characters = reps.wigner_matrix(spin, elements).diagonal(dim1=-2, dim2=-1).sum(-1)
        part = (2 * spin + 1) * torch.einsum("g,g,gij->ij", weights, characters, moved)
        expected += spin * (spin + 1) * float(part.square().sum())
        total += float(part.square().sum())
        if spin == 0:
            assert torch.allclose(part, space.project(maps), atol=ATOL)
    assert total == pytest.approx(float(maps.square().sum()), rel=1e-10)
    assert float(space.defect(maps[None]).sum()) == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_complex_type_keeps_the_quarter_turn():
    """METHOD section 2: for SO(2) a block goes to (tr B / 2) I + (tr(J^T B) / 2) J; the trace alone loses half."""
    space = intertwiners(reps.frequency(3, group=SO2), reps.frequency(3, group=SO2))
    block = random_maps(space, 6)
    j = SO2.algebra[0]
    eye = torch.eye(2, dtype=torch.float64)
    expected = block.trace() / 2 * eye + (j.T @ block).trace() / 2 * j
    assert torch.allclose(space.project(block), expected, atol=ATOL) and space.rank == 2


def test_real_type_forgets_the_quarter_turn():
    space = intertwiners(reps.frequency(3, group=groups.O2()), reps.frequency(3, group=groups.O2()))
    block = random_maps(space, 7)
    assert torch.allclose(space.project(block), block.trace() / 2 * torch.eye(2, dtype=torch.float64), atol=ATOL)


@given(st.integers(3, 16), st.integers(1, 20), st.integers(1, 20))
def test_frequencies_of_a_cyclic_group_count_modulo_its_order(n, k, l):
    group = groups.cyclic(n)
    rank = intertwiners(reps.frequency(k, group=group), reps.frequency(l, group=group)).rank
    same = ((k - l) % n == 0) + ((k + l) % n == 0)  # each sign contributes a two-dimensional family
    assert rank == 2 * same


@given(st.integers(1, 3), st.integers(1, 3), seeds)
def test_vector_channels_keep_the_trace_over_components(first, second, seed):
    space = intertwiners(reps.vectors(first), reps.vectors(second))
    maps = random_maps(space, seed)
    mixing = torch.einsum("dici->dc", maps.view(second, 3, first, 3)) / 3
    assert torch.allclose(space.project(maps), torch.kron(mixing, torch.eye(3).double()), atol=1e-14)


@given(st.integers(2, 60), st.integers(1, 3), st.integers(1, 3), seeds)
def test_permutations_keep_two_means_per_channel_pair_however_many_points(points, first, second, seed):
    space = intertwiners(reps.permutation(points, channels=first), reps.permutation(points, channels=second))
    maps = random_maps(space, seed)
    grid = maps.view(points, second, points, first)
    diagonal = torch.einsum("idic->dc", grid) / points
    rest = (grid.sum((0, 2)) - points * diagonal) / (points * (points - 1))
    eye = torch.eye(points, dtype=torch.float64)
    expected = torch.einsum("ij,dc->idjc", eye, diagonal) + torch.einsum("ij,dc->idjc", 1 - eye, rest)
    assert torch.allclose(space.project(maps), expected.reshape(maps.shape), atol=1e-12)
    assert space.rank == 2 * first * second


@pytest.mark.parametrize(
    "group", [groups.cyclic(5), D4, groups.symmetric(4), groups.product(S3, groups.cyclic(2))], ids=str
)
def test_regular_representations_have_as_many_maps_as_elements(group):
    space = intertwiners(reps.regular(group, channels=2), reps.regular(group))
    assert space.rank == 2 * group.order
    maps = random_maps(space, 8, 2)
    assert torch.allclose(space.project(maps), averaged(space, maps, *quadrature(group, 0)), rtol=0, atol=ATOL)


def test_without_orthogonality_the_projection_is_not_the_average():
    """METHOD section 2: for a shear, the average with the inverse is an oblique projection; ours is the nearest map."""
    space = SPACES["shears"]
    elements = UNIT_SHEAR.elements()
    maps = random_maps(space, 9)
    oblique = torch.stack(
        [torch.linalg.inv(space.outputs.matrix(g)) @ maps @ space.inputs.matrix(g) for g in elements]
    ).mean(0)
    assert float(space.defect(oblique[None]).sum()) < ATOL  # equivariant, too
    assert float((maps - space.project(maps)).norm()) < float((maps - oblique).norm()) - 0.1


@pytest.mark.parametrize("name", ["parity", "points", "frequencies of SO(2)", "regular of D_4"])
def test_the_complement_is_exact_near_zero_in_float32(name):
    """METHOD section 6: || W ||^2 - || P W ||^2 has no digits left there; the complement of W has."""
    space = SPACES[name]
    broken = space.complement(random_maps(space, 10))
    maps = (space.project(random_maps(space, 11)) + 1e-4 * broken / broken.norm()).float()
    exact = float(space.complement(maps.double()).norm())
    ours = float(space.complement(maps).norm())
    subtracted = float(maps.square().sum() - space.project(maps).square().sum())
    assert ours == pytest.approx(exact, rel=5e-3)
    assert abs(subtracted - exact**2) > 0.25 * exact**2


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("lead", [(), (0,), (1,), (4,), (2, 3)])
def test_stacks_equal_loops(name, lead):
    space = SPACES[name]
    maps = random_maps(space, 12, *lead)
    flat = maps.reshape(-1, *space.shape)
    loop = [space.complement(single) for single in flat]
    expected = torch.stack(loop).view_as(maps) if loop else maps
    assert torch.allclose(space.complement(maps), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", CASES)
def test_in_place_means_in_place_whatever_the_memory_format(name):
    space = SPACES[name]
    rows, columns = space.shape
    expected = space.complement(random_maps(space, 13, 2))
    layouts = {
        "contiguous": lambda m: m.clone(),
        "transposed": lambda m: m.mT.contiguous().mT,
        "strided": lambda m: torch.zeros(2, 2 * rows, 3 * columns).double()[:, ::2, ::3].copy_(m),
        "stack last": lambda m: m.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        "slice of more": lambda m: torch.zeros(2, rows + 2, columns + 1).double()[:, 1:-1, 1:].copy_(m),
    }
    for layout in layouts.values():
        maps = layout(random_maps(space, 13, 2))
        storage = maps.data_ptr()
        returned = space.complement_(maps)
        assert returned is maps and maps.data_ptr() == storage
        assert torch.allclose(maps, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_other_operations_leave_their_argument_alone(name):
    space = SPACES[name]
    maps = random_maps(space, 14, 2)
    before = maps.clone()
    space.project(maps), space.complement(maps), space.defect(maps)
    assert torch.equal(maps, before)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-6), (torch.bfloat16, 0.1), (torch.float16, 1e-2)])
def test_precision_and_device_are_those_of_the_maps(name, dtype, atol, device):
    space = SPACES[name]
    maps = random_maps(space, 15, 2).to(dtype=dtype, device=device)
    ours = space.complement(maps)
    assert ours.dtype == dtype and ours.device == maps.device
    assert space.defect(maps).dtype == dtype
    assert torch.allclose(ours.double().cpu(), space.complement(maps.double().cpu()), rtol=0, atol=atol)


def test_spaces_are_equal_where_their_projections_are():
    assert intertwiners("2x1o", "1x1o") == intertwiners(reps.vectors(2), "1x1o") != intertwiners("1x1o", "2x1o")
    assert hash(intertwiners("2x1o", "1x1o")) == hash(intertwiners("2x1o", "1x1o"))
    assert copy.deepcopy(SPACES["pairs"]) == SPACES["pairs"]
    assert intertwiners("1x1", reps.vectors(2, group=groups.SO3())).inputs.group == groups.SO3()


def test_a_reused_name_does_not_reuse_another_representations_maps():
    once = reps.from_function(SO2, "mine", 2, lambda g: g)
    twice = reps.from_function(SO2, "mine", 2, lambda g: g @ g)
    assert intertwiners(once, reps.frequency(1, group=SO2)).rank == 2
    assert intertwiners(twice, reps.frequency(1, group=SO2)).rank == 0


BAD = {
    "two groups": (lambda: intertwiners(reps.vectors(1), reps.frequency(1, group=SO2)), "belongs to SO"),
    "transposed map": (lambda: SPACES["parity"].project(torch.zeros(20, 19)), r"\(\.\.\., 19, 20\)"),
    "a vector": (lambda: SPACES["parity"].complement(torch.zeros(20)), r"shape \(20,\)"),
    "defect of a transposed map": (lambda: SPACES["points"].defect(torch.zeros(1, 8, 12)), r"\(\.\.\., 12, 8\)"),
    "unreadable": (lambda: intertwiners("vectors", "1x0e"), "cannot read 'vectors'"),
    "too large to solve": (
        lambda: (
            intertwiners(
                reps.from_function(SO2, "large", 80, lambda g: torch.eye(80).double().expand(*g.shape[:-2], 80, 80)),
                reps.from_function(SO2, "large", 80, lambda g: torch.eye(80).double().expand(*g.shape[:-2], 80, 80)),
            ).rank
        ),
        "direct sum of smaller ones",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    make, message = BAD[case]
    with pytest.raises(RepresentationError, match=message):
        make()


@pytest.mark.parametrize(("inputs", "outputs"), [("", "1x1o"), ("1x1o", ""), ("", ""), ("0x1o", "1x1o")])
def test_maps_from_or_to_nothing_have_no_defect(inputs, outputs):
    space = intertwiners(inputs, outputs)
    maps = torch.zeros(5, *space.shape, requires_grad=True)
    defect = space.defect(maps)
    assert torch.equal(defect, torch.zeros(len(space.generator_names), 5))
    assert torch.autograd.grad(defect.sum(), maps)[0].shape == maps.shape


@pytest.mark.parametrize("layout", ["mul_ir", "ir_mul"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_precision_leaves_what_double_leaves(dtype, layout):
    """Vectors, whose diagonals are worked through together with their neighbours there, between other irreps."""
    space = intertwiners(
        reps.irreps("3x0e + 5x1o + 2x1o + 1x2e", layout=layout), reps.irreps("4x1o + 2x0e + 1x1e + 3x1o", layout=layout)
    )
    maps = torch.randn(2, 3, *space.shape).to(dtype)
    expected = space.complement(maps.double())
    found = space.complement(maps)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)
    untouched = expected == maps.double()  # what has no equivariant part
    assert 0.4 < untouched.double().mean() < 0.9
    assert torch.equal(found[untouched], maps[untouched])
