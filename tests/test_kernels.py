"""The projection of convolution kernels, against the group average written out, and as a projection onto a span."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import constrained_equiv as ce
from constrained_equiv import _tensors, groups
from constrained_equiv.kernels import Kernels, averaged, orbits_of, permuted, spanned
from constrained_equiv.representations import Representation, defining, frequency, regular, trivial

GROUPS = {"C_2": groups.cyclic(2), "C_4": groups.cyclic(4), "D_4": groups.dihedral(4)}
GRIDS = [1, 2, 3]
LAYOUTS = ["sorted", "interleaved", "transposed"]


def grid(size: int) -> Tensor:
    """Points (x, y) of a square grid, about its centre, rows from the top."""
    steps = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    y, x = torch.meshgrid(-steps, steps, indexing="ij")
    return torch.stack([x, y], -1).flatten(0, 1)


@dataclass(frozen=True, eq=False)
class Space:
    """Kernels between fields of two kinds, with the group's matrices on the channels."""

    kernels: Kernels
    left: Tensor
    right: Tensor
    moves: Tensor

    def average(self, kernels: Tensor) -> Tensor:
        """The group average of kernels (n, *shape), term by term."""
        flat = kernels.transpose(1, 2) if self.kernels.transposed else kernels
        stack = flat.flatten(3)
        total = sum(
            torch.einsum("oi,nojs,jk->niks", g, stack[..., move], h)
            for g, h, move in zip(self.left, self.right, self.moves, strict=True)
        )
        result = (total / len(self.left)).view(flat.shape)
        return result.transpose(1, 2) if self.kernels.transposed else result


def space_of(name: str, size: int, layout: str) -> Space:
    group = GROUPS[name]
    elements = group.elements()
    vector = defining(group) if name == "C_2" else frequency(1, group=group)
    kinds = {"regular": regular(group), "vector": vector, "scalar": trivial(1, group=group)}
    outputs, inputs = ["regular", "vector", "vector"], ["scalar", "regular", "regular"]
    if layout == "interleaved":
        outputs, inputs = ["vector", "regular", "vector"], ["regular", "scalar", "regular"]
    moves, exact = permuted(grid(size), elements)
    assert exact.all()
    generators = [int((elements - g).abs().amax((1, 2)).argmin()) for g in group.generators]

    def field(kind: str) -> tuple[str, int]:
        return kind, kinds[kind].dim

    local = tuple(
        (field(b), field(a), averaged(kinds[b].matrix(elements), kinds[a].matrix(elements), moves, generators))
        for b in dict.fromkeys(outputs)
        for a in dict.fromkeys(inputs)
    )
    left, right = (stacked([kinds[kind] for kind in fields]).matrix(elements) for fields in (outputs, inputs))
    channels = left.shape[-1], right.shape[-1]
    transposed = layout == "transposed"
    shape = (*(channels[::-1] if transposed else channels), size, size)
    kernels = Kernels(shape, tuple(map(field, outputs)), tuple(map(field, inputs)), local, transposed)
    return Space(kernels, left, right, moves)


def stacked(parts: list[Representation]) -> Representation:
    return sum(parts[1:], parts[0])


def over_spaces(test: Any) -> Any:
    for argument, values in {"name": GROUPS, "size": GRIDS, "layout": LAYOUTS}.items():
        test = pytest.mark.parametrize(argument, values)(test)
    return test


def random_kernels(space: Space, count: int = 2) -> Tensor:
    return torch.randn(count, *space.kernels.shape, dtype=torch.float64)


@over_spaces
def test_p_is_the_group_average(name, size, layout):
    space = space_of(name, size, layout)
    kernels = random_kernels(space)
    torch.testing.assert_close(space.kernels.project(kernels), space.average(kernels), rtol=0, atol=1e-13)


@over_spaces
def test_the_rank_is_the_trace_of_p(name, size, layout):
    space = space_of(name, size, layout)
    numbers = torch.Size(space.kernels.shape).numel()
    units = torch.eye(numbers, dtype=torch.float64).view(-1, *space.kernels.shape)
    assert space.kernels.rank == pytest.approx(space.average(units).reshape(numbers, numbers).trace().item(), abs=1e-9)


@over_spaces
def test_the_lie_measure_vanishes_on_equivariant_kernels_alone(name, size, layout):
    space = space_of(name, size, layout)
    equivariant = space.average(random_kernels(space))
    assert space.kernels.defect(equivariant).max() < 1e-24
    rest = space.kernels.complement(random_kernels(space))
    defects = space.kernels.defect(rest)
    assert defects.shape == (len(GROUPS[name].generators), 2)
    # over the whole group, the mean square is twice the squared distance from equivariance
    assert (defects.sum(0) > 0.1 * rest.square().flatten(1).sum(1)).all()


def test_the_mean_square_over_the_group_is_twice_the_squared_distance():
    space = space_of("D_4", 3, "sorted")
    kernels = random_kernels(space)
    gaps = [
        (kernels.flatten(3) - torch.einsum("oi,nojs,jk->niks", g, kernels.flatten(3)[..., move], h)).square().sum()
        for g, h, move in zip(space.left, space.right, space.moves, strict=True)
    ]
    distance = space.kernels.complement(kernels).square().sum()
    assert torch.stack(gaps).mean().item() == pytest.approx(2 * distance.item(), rel=1e-12)


def test_leading_axes_are_a_batch_and_views_are_changed_in_place():
    space = space_of("C_4", 3, "interleaved")
    kernels = random_kernels(space, 6)
    nested = kernels.view(2, 3, *space.kernels.shape).clone()
    expected = space.kernels.complement(kernels)
    assert space.kernels.complement_(nested) is nested
    torch.testing.assert_close(nested.view_as(expected), expected, rtol=0, atol=0)
    single = kernels[0].clone()
    torch.testing.assert_close(space.kernels.complement_(single), expected[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_order_in_memory_does_not_matter(layout):
    space = space_of("C_4", 3, layout)
    kernels = random_kernels(space)
    expected = space.kernels.complement(kernels), space.kernels.defect(kernels)
    scattered = kernels.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
    assert not scattered.is_contiguous()
    torch.testing.assert_close(space.kernels.defect(scattered), expected[1])
    assert space.kernels.complement_(scattered) is scattered
    torch.testing.assert_close(scattered, expected[0], rtol=0, atol=1e-14)
    single = kernels[0].to(memory_format=torch.channels_last)  # of a 4-d kernel
    torch.testing.assert_close(space.kernels.complement_(single), expected[0][0], rtol=0, atol=1e-14)


def test_float32_agrees_with_float64():
    space = space_of("D_4", 3, "interleaved")
    kernels = random_kernels(space)
    torch.testing.assert_close(space.kernels.project(kernels.float()).double(), space.kernels.project(kernels),
                               rtol=0, atol=1e-6)  # fmt: skip


def test_kernels_are_compared_by_content():
    first, second = (space_of("C_4", 3, "sorted").kernels for _ in range(2))
    assert first == second and hash(first) == hash(second) and copy.deepcopy(first) is first
    assert first != space_of("C_4", 3, "interleaved").kernels
    assert first.local[0][2] != space_of("C_2", 3, "sorted").kernels.local[0][2]


@pytest.mark.parametrize("redundant", [False, True])
def test_p_onto_a_span_is_its_orthogonal_projection(redundant):
    samples = torch.randn(5, 2, 3, 9, dtype=torch.float64)
    if redundant:
        samples = torch.cat([samples, samples[:2] - samples[2:4]])
    local = spanned(samples)
    kernels = Kernels((4, 3, 3, 3), (("b", 2), ("b", 2)), (("a", 3),), ((("b", 2), ("a", 3), local),))
    assert kernels.rank == 2 * 5
    drawn = torch.randn(1, 4, 3, 3, 3, dtype=torch.float64)
    basis = samples.flatten(1)
    for rows in (slice(0, 2), slice(2, 4)):
        block = drawn[0, rows].flatten()
        nearest = basis.T @ torch.linalg.lstsq(basis.T, block.unsqueeze(1), driver="gelsd").solution
        torch.testing.assert_close(kernels.project(drawn)[0, rows].flatten(), nearest.flatten(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("parts", [1, 2, 12], ids="{} uncoupled".format)
def test_p_onto_a_span_is_the_same_with_orbits(parts):
    """Also where the span falls into parts that share no orbit, which are then projected apart."""
    group = groups.cyclic(4)
    elements = group.elements()
    acting, moves = regular(group).matrix(elements), permuted(grid(3), elements)[0]
    average, (orbits,) = averaged(acting, acting, moves, [1]), orbits_of(acting, acting, moves)
    samples = average.project(torch.randn(2 * parts, 4 * 4 * 9, dtype=torch.float64))
    for i, sample in enumerate(samples):
        sample[orbits[torch.arange(len(orbits)) % parts != i % parts]] = 0
    samples = samples.view(-1, 4, 4, 9)
    plain, faster = spanned(samples), spanned(samples, (orbits,))
    blocks = torch.randn(7, 4 * 4 * 9, dtype=torch.float64)
    assert plain.rank == faster.rank == 2 * parts and plain != faster
    torch.testing.assert_close(plain.project(blocks), faster.project(blocks), rtol=0, atol=1e-13)
    assert (len(faster.parts) > 1) == (parts > 1) and sum(map(len, faster.parts)) in (0, faster.rank)
    single = faster.project(blocks.float()).double()  # float64 takes the basis whole
    torch.testing.assert_close(plain.project(blocks), single, rtol=0, atol=1e-5)


@over_spaces
def test_large_kernels_are_projected_piece_by_piece(name, size, layout, monkeypatch):
    kernels = space_of(name, size, layout).kernels
    drawn = torch.randn(2, *kernels.shape, dtype=torch.float64)
    whole = kernels.complement(drawn)
    monkeypatch.setitem(_tensors._PIECE, "cpu", 1)
    torch.testing.assert_close(kernels.complement(drawn), whole, rtol=0, atol=1e-14)


def test_a_pair_without_equivariant_kernels_is_left_alone():
    kernels = Kernels((2, 3, 1), (("b", 2),), (("a", 3),), ())
    drawn = torch.randn(1, 2, 3, 1)
    assert kernels.rank == 0 and torch.equal(kernels.complement(drawn), drawn)
    assert kernels.defect(drawn).shape == (0, 1)


def test_turns_off_the_grid_are_recognised():
    _, exact = permuted(grid(3), groups.cyclic(8).elements())
    assert exact.sum() == 4
    _, centre = permuted(grid(1), groups.cyclic(8).elements())
    assert centre.all()


def test_errors_say_what_was_expected():
    space = space_of("C_4", 3, "sorted").kernels
    with pytest.raises(ce.errors.RepresentationError, match="expected"):
        space.project(torch.zeros(2, 3, 3, 3))
    with pytest.raises(ce.errors.RepresentationError, match="expected 2 output"):
        Kernels((3, 3, 1), (("b", 2),), (("a", 3),), ())
    span = Kernels((2, 3, 9), (("b", 2),), (("a", 3),), ((("b", 2), ("a", 3), spanned(torch.randn(1, 2, 3, 9))),))
    with pytest.raises(ce.errors.ConstraintError, match="undefined for kernels of continuous groups"):
        span.defect(torch.zeros(1, 2, 3, 9))


# --- blocks and generators --------------------------------------------------------------------------------------------


@over_spaces
def test_blocks_are_pairs_of_field_types_and_cover_every_entry_once(name, size, layout):
    kernels = space_of(name, size, layout).kernels
    covered = torch.zeros(kernels.shape)
    for block in kernels.map_blocks:
        source, target = block.name.split(" -> ")
        before = covered.sum()
        for place in block.places:
            covered[place] += 1
        columns, rows = (
            sum(d for k, d in fields if k == kind)
            for fields, kind in ((kernels.inputs, source), (kernels.outputs, target))
        )
        assert covered.sum() - before == rows * columns * size**2
    assert (covered == 1).all()
    assert len(kernels.map_blocks) == 4


@over_spaces
def test_a_block_whose_kernels_are_all_equivariant_is_marked(name, size, layout):
    space = space_of(name, size, layout)
    rest = space.kernels.complement(random_kernels(space))
    for block in space.kernels.map_blocks:
        empty = all(float(rest[:, *place].abs().max()) < 1e-13 for place in block.places)
        assert block.equivariant == empty


def test_generators_have_names_where_the_measure_is_defined():
    assert space_of("D_4", 3, "sorted").kernels.generator_names == ("generator 0", "generator 1")
    field = ("scalar", 1)
    span = Kernels((1, 1, 3, 3), (field,), (field,), ((field, field, spanned(torch.ones(1, 1, 1, 9))),))
    assert span.generator_names == ()
