"""Strategies: what a property test draws.

What enters: sizes, groups, representations. What leaves: Hypothesis strategies.
Law: draws are made of few small choices (a kind, an angle, a scale, a seed), so that they are fast, replay, and shrink:
group elements to the identity, the angle before the axis, one factor of a product at a time.
"""

import math
from functools import lru_cache
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from torch import Tensor

from constrained_equiv import groups as _groups
from constrained_equiv import representations as _representations
from constrained_equiv.groups import Group
from constrained_equiv.representations import Representation

_ENUMERATED = 200
"""Finite groups up to this order are drawn from the list of their elements."""

_ANGLES = (1e-4, math.pi / 2, math.pi, -math.pi / 2, 2.0)
_SEEDS = st.integers(0, 2**31 - 1)


def groups() -> SearchStrategy[Group]:
    """Draw groups of all kinds: finite, rotations, reflections, translations, Lorentz, permutations, products."""
    orders = st.integers(1, 8)
    return st.one_of(
        orders.map(_groups.cyclic),
        st.sampled_from([_groups.SO2, _groups.SO3, _groups.O2, _groups.O3]).map(lambda make: make()),
        orders.map(_groups.dihedral),
        st.integers(1, 5).map(_groups.symmetric),
        st.integers(1, 3).map(_groups.translations),
        st.sampled_from([_groups.E3, _groups.SO13, _groups.O13]).map(lambda make: make()),
        st.integers(2, 4).map(lambda n: _groups.product(_groups.O3(), _groups.symmetric(n))),
    )


@st.composite
def elements(draw: DrawFn, group: Group) -> Tensor:
    """Draw group elements (d, d): the identity, tiny and half turns, turns about the axes, and generic ones.

    Elements of the connected part are exp(angle * direction), multiplied by discrete generators. They shrink to the
    identity: first the discrete generators leave, then the angle, then the axis becomes the first; in a product one
    factor after the other.

    Args:
        draw: given by Hypothesis.
        group: any group.

    Example:
        >>> from hypothesis import find
        >>> bool((find(elements(_groups.O3()), lambda g: True) == torch.eye(3)).all())
        True
    """
    if group.factors:
        product = group.identity
        for index, factor in enumerate(group.factors):
            _groups.factor_of(group, product, index).copy_(draw(elements(factor)))
        return product
    if group.order is not None:
        return draw(_finite(group))
    element = group.identity
    for generator in group.generators:
        if draw(st.booleans()):
            hypothesis.event("discrete generator")
            element = element @ generator
    if not len(group.algebra):
        return element
    compact = torch.equal(group.algebra, -group.algebra.mT)
    largest = math.pi if compact else 1.0
    scales = st.one_of(st.just(0.0), st.sampled_from(_ANGLES), st.floats(-math.pi, math.pi, allow_subnormal=False))
    angle = draw(scales) * largest / math.pi
    if angle == 0:
        hypothesis.event("no turn")
        return element
    axis = draw(st.integers(0, len(group.algebra)))
    if axis < len(group.algebra):
        hypothesis.event("along an axis")
        coordinates = torch.eye(len(group.algebra), dtype=torch.float64)[axis]
    else:
        hypothesis.event("generic direction")
        noise = torch.randn(len(group.algebra), dtype=torch.float64, generator=_generator(draw(_SEEDS)))
        coordinates = noise / torch.linalg.vector_norm(noise)
    return group.element(angle * coordinates) @ element


def _finite(group: Group) -> SearchStrategy[Tensor]:
    if group.order is not None and group.order <= _ENUMERATED:
        table = _elements_of(group)
        return st.integers(0, len(table) - 1).map(lambda i: table[i])
    if group == _groups.symmetric(group.degree):
        return st.permutations(range(group.degree)).map(lambda order: group.identity[list(order)])

    def word(letters: list[int]) -> Tensor:
        element = group.identity
        for letter in letters:
            element = element @ group.generators[letter]
        return element

    return st.lists(st.integers(0, len(group.generators) - 1), max_size=8).map(word)


@lru_cache
def _elements_of(group: Group) -> Tensor:
    return group.elements()


@st.composite
def representations(
    draw: DrawFn, group: Group, *, max_blocks: int = 3, max_multiplicity: int = 3, max_degree: int = 3
) -> Representation:
    """Draw representations: direct sums of the usual building blocks of a group, in both layouts.

    Args:
        draw: given by Hypothesis.
        group: any group; a product acts through one of its factors in each block.
        max_blocks: largest number of summands, at least one.
        max_multiplicity: largest number of copies.
        max_degree: largest degree l or frequency k.
    """
    total = None
    for _ in range(draw(st.integers(1, max_blocks))):
        copies = draw(st.integers(1, max_multiplicity))
        layout = draw(st.sampled_from(["mul_ir", "ir_mul"]))
        block = draw(_blocks(group, copies, layout, max_degree))
        total = block if total is None else total + block
    assert total is not None
    return total


def _blocks(group: Group, copies: int, layout: Any, max_degree: int) -> SearchStrategy[Representation]:
    trivial = st.just(_representations.trivial(copies, group=group))
    if group.factors:
        return st.integers(0, len(group.factors) - 1).flatmap(
            lambda i: _blocks(group.factors[i], copies, layout, max_degree).map(
                lambda r: _representations.lift(r, group, i)
            )
        )
    if group.name in ("O(3)", "SO(3)"):
        letters = st.sampled_from("eo")
        return st.builds(
            lambda l, p: _representations.irreps(f"{copies}x{l}{p}", group=group, layout=layout),
            st.integers(0, max_degree),
            letters,
        )
    if group == _groups.symmetric(group.degree):
        orders = st.integers(1, 2)
        return orders.map(lambda k: _representations.permutation(group.degree, channels=copies, order=k, layout=layout))
    choices = [trivial, st.just(_representations.defining(group, channels=copies, layout=layout))]
    if group.degree == 2 and group.name.startswith(("SO(", "O(", "C_", "D_")):
        frequencies = st.integers(1, max(max_degree, 1))
        choices.append(
            frequencies.map(lambda k: _representations.frequency(k, group=group, channels=copies, layout=layout))
        )
    if group.order is not None and group.order <= 12:
        choices.append(st.just(_representations.regular(group, channels=copies, layout=layout)))
    return st.one_of(choices)


@st.composite
def irreps(
    draw: DrawFn, *, max_blocks: int = 3, max_multiplicity: int = 3, max_degree: int = 3, parities: str = "eo"
) -> str:
    """Draw irreps of O(3) as e3nn writes them, such as `2x0e + 1x1o`; they shrink to `1x0e`."""
    count = draw(st.integers(1, max_blocks))
    parts = []
    for _ in range(count):
        degree, copies = draw(st.integers(0, max_degree)), draw(st.integers(1, max_multiplicity))
        parts.append(f"{copies}x{degree}{draw(st.sampled_from(parities))}")
    return " + ".join(parts)


@st.composite
def field_types(draw: DrawFn, gspace: Any, *, max_fields: int = 3) -> Any:
    """Draw escnn field types of a G-space: trivial, regular and irreducible fields; needs escnn.

    Args:
        draw: given by Hypothesis.
        gspace: for example `escnn.gspaces.rot2dOnR2(4)`.
        max_fields: largest number of fields, at least one.
    """
    from escnn import nn as escnn_nn

    fields = [gspace.trivial_repr, *gspace.fibergroup.irreps()[1:4]]
    if gspace.fibergroup.order() > 0:
        fields.append(gspace.regular_repr)
    chosen = draw(st.lists(st.integers(0, len(fields) - 1), min_size=1, max_size=max_fields))
    return escnn_nn.FieldType(gspace, [fields[i] for i in chosen])


@st.composite
def tensors(draw: DrawFn, shape: tuple[int, ...], *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Draw tensors of a shape from a kind, a scale in 1, 1e-3, 1e3, and a seed.

    The kinds are Gaussian entries, one entry, equal rows, rows of very different scale, and zeros.
    """
    kind = draw(st.sampled_from(["generic", "one entry", "equal rows", "mixed scales", "zeros"]))
    scale = draw(st.sampled_from([1.0, 1e-3, 1e3]))
    hypothesis.event(f"tensor: {kind}")
    generator = _generator(draw(_SEEDS))
    values = torch.randn(shape, dtype=torch.float64, generator=generator)
    if kind == "one entry":
        flat = torch.zeros(values.numel(), dtype=torch.float64)
        if len(flat):
            flat[int(torch.randint(len(flat), (), generator=generator))] = 1.0
        values = flat.view(shape)
    elif kind == "equal rows" and len(shape) > 1 and shape[-2]:
        values = values[..., :1, :].expand(shape)
    elif kind == "mixed scales" and len(shape) > 1:
        values = values * 10 ** torch.empty(*shape[:-1], 1, dtype=torch.float64).uniform_(-3, 3, generator=generator)
    elif kind == "zeros":
        values = torch.zeros(shape, dtype=torch.float64)
    return (values * scale).to(dtype)


def features(
    representation: Representation, *, shape: tuple[int, ...] = (4,), dtype: torch.dtype = torch.float64
) -> SearchStrategy[Tensor]:
    """Draw features of a representation, ``(*shape, dim)``, as `tensors` does."""
    return tensors((*shape, representation.dim), dtype=dtype)


@st.composite
def point_clouds(
    draw: DrawFn,
    *,
    min_points: int = 0,
    max_points: int = 8,
    dimension: int = 3,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Draw positions (points, dimension), degenerate ones too.

    The kinds are generic, two coincident points, all coincident, collinear, coplanar, a lattice (equal distances, so
    that nearest neighbours tie) and far from the origin; the number of points may be 0 and 1; the scale is 1, 1e-3 or
    1e3.

    Args:
        draw: given by Hypothesis.
        min_points: fewest points; 0 allows the empty set.
        max_points: most points.
        dimension: of space.
        dtype: of the positions.
    """
    count = draw(st.integers(min_points, max_points))
    kinds = ["generic", "coincident pair", "all coincident", "collinear", "coplanar", "lattice", "far away"]
    kind = draw(st.sampled_from(kinds))
    scale = draw(st.sampled_from([1.0, 1e-3, 1e3]))
    hypothesis.event(f"point cloud: {kind}")
    generator = _generator(draw(_SEEDS))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    positions = normal(count, dimension)
    if kind == "coincident pair" and count > 1:
        positions[1] = positions[0]
    elif kind == "all coincident":
        positions = normal(1, dimension).repeat(count, 1)
    elif kind == "collinear":
        positions = normal(count, 1) @ normal(1, dimension)
    elif kind == "coplanar":
        positions = normal(count, 2) @ normal(2, dimension)
    elif kind == "lattice":
        positions = torch.randint(-1, 2, (count, dimension), generator=generator).double()
    elif kind == "far away":
        positions = positions + 100 * normal(1, dimension)
    return (positions * scale).to(dtype)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
