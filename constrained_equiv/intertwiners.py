"""The orthogonal projection of linear maps onto equivariant ones, and its complement.

What enters: two representations of one group. What leaves: `Intertwiners`, whose `project` is P. Called by the terms
(to stay in the complement), the constraints (to measure) and `finalize` (to fold).
Law: P P = P, P is self-adjoint in the Frobenius inner product, and rank P = dim Hom_G(inputs, outputs).

Mathematics: a map is a grid of blocks (atom b <- atom a) x (multiplicities), and P acts on each block alone. With an
orthonormal basis E_1 .. E_r of the maps a -> b that commute with the group, P B = sum_k <E_k, B> E_k for every pair of
copies. For irreducible atoms of real type E_1 = I / sqrt(d) (Schur), for permutations the E_k are normalised orbit
masks, else they are the null space of the commutation constraints, which needs no orthogonality of the matrices.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol, TypeAlias

import torch
from torch import Tensor

from constrained_equiv import representations
from constrained_equiv._constants import constant
from constrained_equiv.errors import RepresentationError
from constrained_equiv.groups import O3, Group
from constrained_equiv.representations import Atom, Block, Representation, every_pair

_MAX_NULL_SPACE = 4_096
_Pair: TypeAlias = tuple[tuple[slice, slice], Block, Block]


@dataclass(frozen=True)
class MapBlock:
    """The part of a map that goes from all copies of one kind of features to all copies of another.

    Attributes:
        name: `inputs -> outputs`, for example `1o -> 0e`.
        places: ranges on the first two axes of the map that hold it together.
        equivariant: whether every such map is equivariant, so that the complement has none.
    """

    name: str
    places: tuple[tuple[slice, slice], ...]
    equivariant: bool


class Projection(Protocol):
    """What a term needs to know about equivariant maps of its shape; hashable, equal where P is equal."""

    @property
    def rank(self) -> int:
        """Dimension of the space of equivariant maps."""

    @property
    def map_blocks(self) -> tuple[MapBlock, ...]:
        """The map's blocks between irreps, or whatever atoms or field types were stated; together they are all."""

    @property
    def generator_names(self) -> tuple[str, ...]:
        """What `defect` is measured at; empty where it is undefined."""

    def complement_(self, maps: Tensor) -> Tensor:
        """Replace maps of shape (..., shape) by maps - P maps, in place, and return them."""

    def defect(self, maps: Tensor) -> Tensor:
        """Return the squared failure of maps (n, shape) to commute with each generator, (generators, n)."""


@dataclass(frozen=True)
class Intertwiners:
    """Equivariant maps between two representations.

    Attributes:
        inputs: acts on the columns.
        outputs: acts on the rows.

    Example:
        >>> space = intertwiners("2x1o", "3x0e + 4x1o")
        >>> space.rank, space.shape
        (8, (15, 6))
    """

    inputs: Representation
    outputs: Representation

    def __post_init__(self) -> None:
        if self.inputs.group != self.outputs.group:
            raise RepresentationError(
                f"inputs carry {self.inputs.group} and outputs {self.outputs.group}: expected one group"
            )

    def __deepcopy__(self, memo: dict[int, object]) -> "Intertwiners":
        return self

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(outputs.dim, inputs.dim)."""
        return self.outputs.dim, self.inputs.dim

    @property
    def rank(self) -> int:
        """Dimension of the space of equivariant maps."""
        return sum(
            len(_local_basis(self.inputs.group, b.atom, a.atom)) * b.multiplicity * a.multiplicity
            for _, b, a in _plan(self.outputs, self.inputs)
        )

    @cached_property
    def map_blocks(self) -> tuple[MapBlock, ...]:
        """One per pair of different atoms, with all their copies."""
        places: dict[tuple[Atom, Atom], list[tuple[slice, slice]]] = {}
        for b, rows, a, columns in every_pair(self.outputs, self.inputs):
            if b.dim and a.dim:
                places.setdefault((a.atom, b.atom), []).append((rows, columns))
        return tuple(
            MapBlock(f"{a.name} -> {b.name}", tuple(found), len(_local_basis(self.inputs.group, b, a)) == b.dim * a.dim)
            for (a, b), found in places.items()
        )

    @cached_property
    def generator_names(self) -> tuple[str, ...]:
        """In the order of `defect`."""
        group = self.inputs.group
        return (
            *(f"algebra {i}" for i in range(len(group.algebra))),
            *(f"generator {i}" for i in range(len(group.generators))),
        )

    def restricted(self, subgroup: Group) -> "Intertwiners":
        """Return the maps that commute with a subgroup, of which these are some; see `ce.representations.restrict`."""
        return Intertwiners(
            representations.restrict(self.inputs, subgroup), representations.restrict(self.outputs, subgroup)
        )

    def project(self, maps: Tensor) -> Tensor:
        """Return P maps.

        Args:
            maps: (..., outputs.dim, inputs.dim).
        """
        return maps - self.complement_(maps.clone())

    def complement(self, maps: Tensor) -> Tensor:
        """Return maps - P maps, exact near zero; shape as for `project`."""
        return self.complement_(maps.clone())

    def complement_(self, maps: Tensor) -> Tensor:
        """Replace maps (..., outputs.dim, inputs.dim) by maps - P maps in place, and return them."""
        self._check(maps)
        irreducible, others = self._pairs
        for place in irreducible:
            place.remove_(maps)
        for (rows, columns), b, a in others:
            block = _copies(maps[..., rows, columns], b, a)
            local = _local_basis(self.inputs.group, b.atom, a.atom, maps.dtype, maps.device)
            block.sub_(torch.einsum("...ij,kij,kpq->...pq", block, local, local))
        return maps

    def defect(self, maps: Tensor) -> Tensor:
        """Return how far maps are from commuting with each generator, squared.

        That is || M d rho_in(A) - d rho_out(A) M ||_F^2 for the algebra, || M rho_in(g) - rho_out(g) M ||_F^2 for
        discrete generators.

        Args:
            maps: (n, outputs.dim, inputs.dim).

        Returns:
            (generators, n), the algebra first; zero exactly on equivariant maps.
        """
        self._check(maps)
        total = None
        for b, rows, a, columns in every_pair(self.outputs, self.inputs):
            left = _atom_generators(self.outputs.group, b.atom, maps.dtype, maps.device)
            right = _atom_generators(self.inputs.group, a.atom, maps.dtype, maps.device)
            block = _copies(maps[..., rows, columns], b, a)
            bracket = torch.einsum("nuvij,gjk->gnuvik", block, right) - torch.einsum("gij,nuvjk->gnuvik", left, block)
            square = bracket.square().sum((-4, -3, -2, -1))
            total = square if total is None else total + square
        if total is None:  # a side without blocks: no entries, whose sum is zero and in the graph of the maps
            return maps.sum((-2, -1)).repeat(len(self.generator_names), 1)
        return total

    def basis(self) -> Tensor:
        """Return an orthonormal basis of the equivariant maps, dense; for tests and small layers.

        Returns:
            (rank, outputs.dim, inputs.dim) float64.
        """
        columns = []
        for (rows, cols), b, a in _plan(self.outputs, self.inputs):
            for u in range(b.multiplicity):
                for v in range(a.multiplicity):
                    for element in _local_basis(self.inputs.group, b.atom, a.atom):
                        dense = torch.zeros(self.shape, dtype=torch.float64)
                        _copies(dense[rows, cols], b, a)[u, v] = element
                        columns.append(dense)
        return torch.stack(columns) if columns else torch.zeros(0, *self.shape, dtype=torch.float64)

    @cached_property
    def _pairs(self) -> "tuple[list[_Place], list[_Pair]]":
        """The plan, kept here because hashing representations takes as long as projecting a small map.

        Pairs of irreducible atoms, where Schur's lemma holds, come first.
        """
        irreducible, others = [], []
        for pair in _plan(self.outputs, self.inputs):
            (rows, columns), b, a = pair
            if b.atom.kind == a.atom.kind == "irreducible":
                irreducible.append(_Place(rows, b, columns, a))
            else:
                others.append(pair)
        return irreducible, others

    def _check(self, maps: Tensor) -> None:
        if maps.shape[-2:] != self.shape:
            raise RepresentationError(
                f"a map of shape {tuple(maps.shape)} does not go from {self.inputs} to {self.outputs}: expected "
                f"(..., {self.shape[0]}, {self.shape[1]})"
            )


def intertwiners(inputs: object, outputs: object, *, group: Group | None = None) -> Intertwiners:
    """Describe the equivariant maps between two representations.

    Args:
        inputs: a Representation, or irreps of O(3) as a string or `e3nn.o3.Irreps`.
        outputs: likewise.
        group: how to read strings; by default the group of whichever argument is a Representation, else O(3).

    Raises:
        RepresentationError: if an argument cannot be read or the groups differ.
    """
    known = [r.group for r in (inputs, outputs) if isinstance(r, Representation)]
    group = group or (known[0] if known else O3())
    return Intertwiners(
        representations.as_representation(inputs, group=group), representations.as_representation(outputs, group=group)
    )


class _Place:
    """Where the copies of one irreducible atom lie in a map, as strides in units of a row and a column."""

    def __init__(self, rows: slice, outputs: Block, columns: slice, inputs: Block) -> None:
        self.rows, self.outputs, self.columns, self.inputs = rows, outputs, columns, inputs
        self.dim = outputs.atom.dim
        self.down, self.down_copy = _steps(outputs)
        self.right, self.right_copy = _steps(inputs)

    def remove_(self, maps: Tensor) -> None:
        """Subtract its mean from the diagonal of every copy.

        Diagonals of vectors in single precision are taken together with those that begin between them, which lose 0: to
        work through neighbours in memory, eight at a time, takes less than through every third entry.
        """
        if torch.compiler.is_compiling():  # which finds the order of its own
            block = _copies(maps[..., self.rows, self.columns], self.outputs, self.inputs)
            diagonals = block.diagonal(dim1=-2, dim2=-1)
            diagonals.sub_(diagonals.mean(-1, keepdim=True))
            return
        between = self.dim == self.right_copy == 3 and maps.element_size() <= 4
        step = 1 if between else self.right_copy
        width = (self.inputs.multiplicity - 1) * self.right_copy // step + 1
        *lead, row, column = maps.stride()
        diagonals = maps.as_strided(  # one operation: a chain of views would cost small maps as much as the rest
            (*maps.shape[:-2], self.outputs.multiplicity, width, self.dim),
            (*lead, self.down_copy * row, step * column, self.down * row + self.right * column),
            maps.storage_offset() + self.rows.start * row + self.columns.start * column,
        )
        if self.dim == 1:
            diagonals.zero_()
            return
        first, second, *rest = diagonals.unbind(-1)
        total = first + second  # a reduction over so short and so strided an axis takes twice as long
        for entry in rest:
            total += entry
        if between:
            diagonals.addcmul_(total.unsqueeze_(-1), _comb(width, maps.dtype, maps.device), value=-1.0 / self.dim)
        else:
            diagonals.sub_(total.unsqueeze_(-1), alpha=1.0 / self.dim)


@constant(1024)
def _comb(width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A column (width, 1) with 1 at every third place, and 0 between."""
    comb = torch.zeros(width, 1, dtype=dtype)
    comb[::3] = 1.0
    return comb.to(device)


def _steps(block: Block) -> tuple[int, int]:
    """How far apart neighbouring entries of one copy are, and neighbouring copies."""
    return (1, block.atom.dim) if block.layout == "mul_ir" else (block.multiplicity, 1)


@lru_cache(maxsize=1024)
def _plan(outputs: Representation, inputs: Representation) -> tuple[_Pair, ...]:
    """The blocks that hold equivariant maps at all."""
    return tuple(
        ((rows, columns), b, a)
        for b, rows, a, columns in every_pair(outputs, inputs)
        if b.multiplicity and a.multiplicity and len(_local_basis(outputs.group, b.atom, a.atom))
    )


def _copies(block: Tensor, outputs: Block, inputs: Block) -> Tensor:
    """View a block (..., rows, columns) as (..., mul_out, mul_in, d_out, d_in), whatever the layouts."""
    mul_first_out, mul_first_in = outputs.layout == "mul_ir", inputs.layout == "mul_ir"
    row_shape = [outputs.multiplicity, outputs.atom.dim][:: 1 if mul_first_out else -1]
    column_shape = [inputs.multiplicity, inputs.atom.dim][:: 1 if mul_first_in else -1]
    view = block.view(*block.shape[:-2], *row_shape, *column_shape)
    lead = block.ndim - 2
    out_axes = (0, 1) if mul_first_out else (1, 0)
    in_axes = (2, 3) if mul_first_in else (3, 2)
    order = (out_axes[0], in_axes[0], out_axes[1], in_axes[1])
    return view.permute(*range(lead), *(lead + axis for axis in order))


@constant(4096)
def _local_basis(
    group: Group, out: Atom, into: Atom, dtype: torch.dtype = torch.float64, device: torch.device | None = None
) -> Tensor:
    """An orthonormal basis (r, d_out, d_in) of the maps between two atoms that commute with the group."""
    if dtype != torch.float64 or device is not None:
        return _local_basis(group, out, into).to(dtype=dtype, device=device)
    if out.kind == into.kind == "irreducible":
        eye: Tensor = torch.eye(out.dim, dtype=torch.float64)[None] / out.dim**0.5
        return eye if out == into else eye.new_zeros(0, out.dim, into.dim)
    if out.kind == into.kind == "permutation":
        return _orbit_masks(out.matrix(group.generators), into.matrix(group.generators))
    return _null_space(group, out, into)


def _orbit_masks(left: Tensor, right: Tensor) -> Tensor:
    """Normalised indicators of the orbits of pairs (row, column) under permutation matrices (k, n, n) and (k, m, m)."""
    rows, columns = left.argmax(-2), right.argmax(-2)  # g maps basis vector j to argmax over rows of column j
    n, m = left.shape[-1], right.shape[-1]
    moved = (rows[:, :, None] * m + columns[:, None, :]).flatten(1)  # (k, n m): where each pair goes
    label = torch.arange(n * m)
    while True:
        smallest = label
        for step in moved:
            merged = torch.minimum(smallest, smallest[step])
            smallest = merged.scatter_reduce(0, step, merged, "amin")
        if torch.equal(smallest, label):
            break
        label = smallest
    masks = (label == torch.unique(label)[:, None]).double().view(-1, n, m)
    normalised: Tensor = masks / torch.linalg.vector_norm(masks, dim=(-2, -1), keepdim=True)
    return normalised


def _null_space(group: Group, out: Atom, into: Atom) -> Tensor:
    """Solve rho_out(g) X = X rho_in(g) for all generators by one singular value decomposition."""
    size = out.dim * into.dim
    if size > _MAX_NULL_SPACE:
        raise RepresentationError(
            f"maps from {into.name} to {out.name} of {group} have {size} entries: expected at most {_MAX_NULL_SPACE} "
            "for a numerical solution; write the representation as a direct sum of smaller ones"
        )
    left, right = _atom_generators(group, out), _atom_generators(group, into)
    eye_out, eye_in = torch.eye(out.dim, dtype=torch.float64), torch.eye(into.dim, dtype=torch.float64)
    system = torch.einsum("gij,kl->gikjl", left, eye_in) - torch.einsum("ij,gkl->gilkj", eye_out, right).permute(
        0, 1, 2, 4, 3
    )
    reduced = torch.linalg.qr(system.reshape(-1, size), mode="r")[1]  # (size, size) unless there is no generator
    _, values, vectors = torch.linalg.svd(reduced, full_matrices=True)
    rank = int((values > 1e-7 * max(1.0, float(values.max()) if len(values) else 1.0)).sum())
    solutions: Tensor = vectors[rank:].view(-1, out.dim, into.dim)
    return solutions


@constant(4096)
def _atom_generators(
    group: Group, atom: Atom, dtype: torch.dtype = torch.float64, device: torch.device | None = None
) -> Tensor:
    """d rho of the algebra and rho of the discrete generators of one atom, (m + k, d, d)."""
    if dtype != torch.float64 or device is not None:
        return _atom_generators(group, atom).to(dtype=dtype, device=device)
    return torch.cat(Representation(group, (Block(1, atom),)).generators())
