"""Representations: how a group acts on the features of a layer.

What enters: irreps strings, `e3nn.o3.Irreps`, channel counts, permutations, explicit matrices. What leaves: a
`Representation`, a direct sum of blocks (multiplicity x atom). Called by intertwiners, symmetries and adapters.
Law: rho(g h) = rho(g) rho(h), and rho(exp(t A)) = exp(t d rho(A)).

Layout: a block of `multiplicity` copies of an atom of dimension d is stored as `mul_ir` (copy by copy, as e3nn does;
vector features (channels, 3) flattened are this) or `ir_mul` (component by component, as (3, channels) flattened).
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product as pairs
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from constrained_equiv import groups
from constrained_equiv._constants import constant, on_cpu
from constrained_equiv.errors import RepresentationError
from constrained_equiv.groups import Group

Layout: TypeAlias = Literal["mul_ir", "ir_mul"]
MatrixFunction: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Atom:
    """A building block whose equivariant maps to other blocks are known, compared by name (and fingerprint) in a group.

    Attributes:
        name: unique within the group, for example `1o`.
        dim: d.
        matrix: maps group elements (..., n, n) to (..., d, d).
        kind: `irreducible` of real type (Schur: maps between equal atoms are multiples of the identity, between others
            zero), `permutation` (matrices permute a basis), or `matrix` (anything else; maps found numerically).
        fingerprint: of two sampled matrices, where the name alone does not determine them.
    """

    name: str
    dim: int
    matrix: MatrixFunction = field(compare=False, repr=False)
    kind: Literal["irreducible", "permutation", "matrix"] = "matrix"
    fingerprint: int = field(default=0, repr=False)

    def __deepcopy__(self, memo: dict[int, object]) -> "Atom":
        return self


@dataclass(frozen=True)
class Block:
    """`multiplicity` copies of an atom, stored in a layout."""

    multiplicity: int
    atom: Atom
    layout: Layout = "mul_ir"

    @property
    def dim(self) -> int:
        """Number of entries of the block."""
        return self.multiplicity * self.atom.dim


@dataclass(frozen=True)
class Representation:
    """A direct sum of blocks on which a group acts linearly.

    Attributes:
        group: the group.
        blocks: the summands, in the order of the entries.
    """

    group: Group
    blocks: tuple[Block, ...]

    @property
    def dim(self) -> int:
        """Number of entries of a feature vector."""
        return sum(block.dim for block in self.blocks)

    def __str__(self) -> str:
        return " + ".join(f"{b.multiplicity}x{b.atom.name}" for b in self.blocks) or "0"

    def __add__(self, other: "Representation") -> "Representation":
        if other.group != self.group:
            raise RepresentationError(
                f"cannot add representations of {self.group} and {other.group}: expected one group"
            )
        return Representation(self.group, self.blocks + other.blocks)

    def __rmul__(self, multiplicity: int) -> "Representation":
        """Return `multiplicity` copies, kept together block by block (mul_ir)."""
        return Representation(
            self.group, tuple(replace(b, multiplicity=multiplicity * b.multiplicity) for b in self.blocks)
        )

    @on_cpu
    def matrix(self, element: Tensor) -> Tensor:
        """Return rho(g).

        Args:
            element: (..., n, n) elements of the group.

        Returns:
            (..., dim, dim) float64.
        """
        return self._assemble([block.atom.matrix(element.double()) for block in self.blocks], element.shape[:-2])

    @on_cpu
    def derivative(self, direction: Tensor) -> Tensor:
        """Return d rho(A) for a Lie algebra element A (n, n), as (dim, dim) float64."""
        return self._assemble([_derivative(block.atom, direction.double()) for block in self.blocks], torch.Size())

    @on_cpu
    def generators(self) -> tuple[Tensor, Tensor]:
        """Return what an equivariant map has to commute with.

        Returns:
            d rho of the algebra (m, dim, dim), and rho of the discrete generators (k, dim, dim).
        """
        empty = torch.zeros(0, self.dim, self.dim, dtype=torch.float64)
        continuous = [self.derivative(direction) for direction in self.group.algebra]
        return torch.stack(continuous) if continuous else empty, self.matrix(self.group.generators)

    def act(self, element: Tensor, features: Tensor, *, axis: int = -1) -> Tensor:
        """Apply rho(g) along one axis of a feature tensor, in the dtype and on the device of the features.

        Raises:
            RepresentationError: if the axis has another size, or the features are integers and would move.
        """
        if features.shape[axis] != self.dim:
            raise RepresentationError(
                f"features of shape {tuple(features.shape)} have {features.shape[axis]} entries on axis {axis}: "
                f"expected {self.dim} for {self}"
            )
        matrix = self.matrix(element)
        if not (features.is_floating_point() or features.is_complex()):
            if torch.equal(matrix, torch.eye(self.dim).to(matrix).expand_as(matrix)):
                return features
            raise RepresentationError(
                f"features of dtype {features.dtype}: expected floating point or complex, for integers cannot hold "
                f"rho(g) x of {self}; pass features.double(), or None as the action on what does not move"
            )
        matrix = matrix.to(features)
        return (features.movedim(axis, -1) @ matrix.mT).movedim(-1, axis)

    def _assemble(self, atoms: list[Tensor], batch: torch.Size) -> Tensor:
        result = torch.zeros(*batch, self.dim, self.dim, dtype=torch.float64)
        start = 0
        for block, small in zip(self.blocks, atoms, strict=True):
            eye = torch.eye(block.multiplicity, dtype=torch.float64)
            pattern = "uv,...ij->...uivj" if block.layout == "mul_ir" else "uv,...ij->...iujv"
            stop = start + block.dim
            result[..., start:stop, start:stop] = torch.einsum(pattern, eye, small.double()).reshape(
                *batch, block.dim, block.dim
            )
            start = stop
        return result


def _derivative(atom: Atom, direction: Tensor) -> Tensor:
    identity, zero, one = torch.eye(direction.shape[-1]).double(), torch.zeros(()).double(), torch.ones(()).double()
    slope: Tensor = torch.func.jvp(lambda t: atom.matrix(identity + t * direction), (zero,), (one,))[1]
    return slope


# --- O(3) and SO(3) -------------------------------------------------------------------------------------------------


@constant(128)
def rotation_generators(degree: int) -> Tensor:
    """Return d D^l of the cross products with x, y, z in e3nn's real basis, (3, 2l + 1, 2l + 1) float64.

    The complex angular momentum matrices (quantised along e3nn's polar axis y) are turned into the real spherical
    harmonics' basis; for l = 1 that basis is (x, y, z).

    Args:
        degree: l >= 0.

    Reference: Edmonds (1957), "Angular Momentum in Quantum Mechanics", section 2.3, for the ladder operators.
    """
    l = degree
    m = torch.arange(-l, l + 1, dtype=torch.float64)
    ladder = torch.diag(torch.sqrt(l * (l + 1) - m[:-1] * (m[:-1] + 1)), -1)  # <m + 1| J+ |m>
    j_first = (ladder + ladder.T) / 2
    j_second = (ladder - ladder.T) / 2j
    real = torch.zeros(2 * l + 1, 2 * l + 1, dtype=torch.complex128)  # rows: complex m, columns: real index
    real[l, l] = 1.0
    for k in range(1, l + 1):
        cosine, sine = torch.tensor([1.0, -1j], dtype=torch.complex128) * math.sqrt(0.5)
        real[l - k, l + k], real[l - k, l - k] = cosine, -sine
        real[l + k, l + k], real[l + k, l - k] = cosine * (-1) ** k, sine * (-1) ** k

    def to_real(operator: Tensor) -> Tensor:
        return (real.conj().T @ (-1j * operator.to(torch.complex128)) @ real).real

    # the polar axis (third of the angular momentum convention) is y, the first is z and the second is x
    return torch.stack([to_real(j_second), to_real(torch.diag(m)), to_real(j_first)])


@on_cpu
def wigner_matrix(degree: int, rotations: Tensor) -> Tensor:
    """Return D^l(R) = exp(theta n . X) in e3nn's real basis; reflections enter through their rotation part det(R) R.

    Args:
        degree: l >= 0.
        rotations: (..., 3, 3) orthogonal matrices.

    Returns:
        (..., 2l + 1, 2l + 1) float64, exact to rounding whatever torch's default dtype.
    """
    proper: Tensor = rotations.double() * torch.linalg.det(rotations.double())[..., None, None]
    if degree == 0:
        return torch.ones(*rotations.shape[:-2], 1, 1, dtype=torch.float64)
    if degree == 1:
        return proper
    generator = torch.einsum("...a,aij->...ij", _rotation_vector(proper), rotation_generators(degree))
    result: Tensor = torch.linalg.matrix_exp(generator)
    return result


def _rotation_vector(rotations: Tensor) -> Tensor:
    """Axis times angle, through the quaternion so that small angles and half turns are both accurate."""
    r = rotations
    trace = r.diagonal(dim1=-2, dim2=-1).sum(-1)
    # K = 4 q q^T - 1 for the quaternion q = (x, y, z, w); its best conditioned column gives q without cancellation
    skew = torch.stack([r[..., 2, 1] - r[..., 1, 2], r[..., 0, 2] - r[..., 2, 0], r[..., 1, 0] - r[..., 0, 1]], -1)
    vector_part = r + r.mT + (1 - trace)[..., None, None] * torch.eye(3, dtype=r.dtype)
    outer = torch.cat(
        [torch.cat([vector_part, skew[..., None]], -1), torch.cat([skew, 1 + trace[..., None]], -1)[..., None, :]], -2
    )
    best = outer.diagonal(dim1=-2, dim2=-1).argmax(-1)
    column = torch.gather(outer, -1, best[..., None, None].expand(*best.shape, 4, 1)).squeeze(-1)
    quaternion = column / torch.linalg.vector_norm(column, dim=-1, keepdim=True)
    quaternion = torch.where(quaternion[..., 3:] < 0, -quaternion, quaternion)
    axis = quaternion[..., :3]
    sine = torch.linalg.vector_norm(axis, dim=-1, keepdim=True)
    angle = 2 * torch.atan2(sine, quaternion[..., 3:])
    return torch.where(sine > 0, axis * (angle / sine.clamp_min(torch.finfo(r.dtype).tiny)), 2 * axis)


@lru_cache
def _rotation_atom(degree: int, parity: int) -> Atom:
    """The irrep of O(3) with degree l and parity +1 or -1; parity 0 means an irrep of SO(3)."""

    def matrix(rotations: Tensor) -> Tensor:
        small = wigner_matrix(degree, rotations)
        return small * torch.linalg.det(rotations)[..., None, None] if parity < 0 else small

    return Atom(f"{degree}{ {1: 'e', -1: 'o', 0: ''}[parity] }", 2 * degree + 1, matrix, "irreducible")


_IRREP = re.compile(r"^(?:(\d+)x)?(\d+)([eo]?)$")


def irreps(text: object, *, group: Group | None = None, layout: Layout = "mul_ir") -> Representation:
    """Read irreps of O(3) or SO(3) as e3nn writes them.

    Args:
        text: `"4x0e + 2x1o"` or an `e3nn.o3.Irreps`; for SO(3) the parity letter may be left out and is ignored.
        group: O(3) by default, or SO(3).
        layout: order of the entries within a block.

    Returns:
        The direct sum in the written order; e3nn's basis and normalisation.

    Raises:
        RepresentationError: if the text cannot be read or the group has no such irreps.

    Example:
        >>> irreps("4x0e + 2x1o").dim
        10
    """
    group = group or groups.O3()
    if group.name not in ("O(3)", "SO(3)"):
        raise RepresentationError(
            f"irreps {str(text)!r} of {group}: expected O(3) or SO(3); pass a Representation, for example "
            "ce.representations.regular(group)"
        )
    blocks = []
    for part in re.split(r"\s*\+\s*", str(text).strip()) if str(text).strip() else []:
        if (match := _IRREP.match(part)) is None or (group.name == "O(3)" and not match[3]):
            raise RepresentationError(
                f"cannot read {part!r} in irreps {str(text)!r}: expected for example '4x0e + 2x1o'"
            )
        parity = {"e": 1, "o": -1, "": 0}[match[3]] if group.name == "O(3)" else 0
        blocks.append(Block(int(match[1] or 1), _rotation_atom(int(match[2]), parity), layout))
    return Representation(group, tuple(blocks))


def vectors(channels: int, *, layout: Layout = "mul_ir", group: Group | None = None) -> Representation:
    """`channels` ordinary vectors, as vector neurons carry them.

    Args:
        channels: number of vectors.
        layout: `mul_ir` for features (channels, 3) flattened, `ir_mul` for (3, channels).
        group: O(3) by default, or SO(3).
    """
    return irreps(f"{channels}x1o", group=group, layout=layout)


# --- all other groups -----------------------------------------------------------------------------------------------


def trivial(dim: int, *, group: Group) -> Representation:
    """`dim` invariant numbers."""

    def matrix(elements: Tensor) -> Tensor:
        return torch.ones(*elements.shape[:-2], 1, 1, dtype=torch.float64)

    if group.name in ("O(3)", "SO(3)"):
        return irreps(f"{dim}x0e", group=group)
    return Representation(group, (Block(dim, Atom("trivial", 1, matrix, "permutation")),))


def defining(group: Group, *, channels: int = 1, layout: Layout = "mul_ir") -> Representation:
    """Channels on which a group acts by its own matrices."""
    if group.name in ("O(3)", "SO(3)"):
        return vectors(channels, layout=layout, group=group)
    return from_function(group, "defining", group.degree, lambda elements: elements, channels=channels, layout=layout)


def frequency(k: int, *, group: Group, channels: int = 1, layout: Layout = "mul_ir") -> Representation:
    """The k-th harmonic of SO(2), O(2), C_n or D_n: rotations turn k times as fast, flips stay flips.

    Args:
        k: frequency >= 1.
        group: a group of plane rotations.
        channels: number of copies.
        layout: order of the entries.
    """
    if group.degree != 2 or k < 1:
        raise RepresentationError(f"frequency({k}) of {group}: expected k >= 1 and SO(2), O(2), cyclic or dihedral")

    def matrix(elements: Tensor) -> Tensor:
        determinant = torch.linalg.det(elements)
        turned = torch.linalg.matrix_power(
            torch.stack([elements[..., 0], elements[..., 1] * determinant[..., None]], -1), k
        )
        return torch.stack([turned[..., 0], turned[..., 1] * determinant[..., None]], -1)

    return from_function(group, f"k={k}", 2, matrix, channels=channels, layout=layout)


def permutation(points: int, *, channels: int = 1, order: int = 1, layout: Layout = "ir_mul") -> Representation:
    """Features on the points (order 1) or ordered pairs of points (order 2) of a set or graph.

    Args:
        points: n, the number of things that S_n permutes.
        channels: C, features per point or pair.
        order: 1 or 2.
        layout: `ir_mul` (default) for tensors (n, C) or (n, n, C) flattened, `mul_ir` for (C, n) or (C, n, n).

    Raises:
        RepresentationError: if `order` is neither 1 nor 2.
    """
    if order not in (1, 2):
        raise RepresentationError(f"permutation(order={order}): expected 1 (points) or 2 (ordered pairs)")

    def pair_matrix(p: Tensor) -> Tensor:
        return torch.einsum("...ij,...kl->...ikjl", p, p).flatten(-4, -3).flatten(-2, -1)

    matrix, name, dim = ((lambda p: p), "points", points) if order == 1 else (pair_matrix, "pairs", points**2)
    atom = Atom(name, dim, matrix, "permutation")
    return Representation(groups.symmetric(points), (Block(channels, atom, layout),))


@on_cpu
def regular(group: Group, *, channels: int = 1, layout: Layout = "mul_ir") -> Representation:
    """Functions on a finite group: g moves elements (in the order of `group.elements()`) by left multiplication."""
    elements = group.elements()

    def matrix(acting: Tensor) -> Tensor:
        moved = acting[..., None, :, :] @ elements  # column h goes to row g h
        distance = torch.linalg.matrix_norm(moved[..., None, :, :, :] - elements[:, None])
        rows = distance.argmin(-2)  # the nearest: the elements of a rounded group are no exact products
        return torch.nn.functional.one_hot(rows, len(elements)).mT.double()

    atom = Atom("regular", len(elements), matrix, "permutation")
    return Representation(group, (Block(channels, atom, layout),))


@on_cpu
def from_function(
    group: Group, name: str, dim: int, matrix: MatrixFunction, *, channels: int = 1, layout: Layout = "mul_ir"
) -> Representation:
    """Make a representation from a function g -> rho(g); its maps to other representations are found numerically.

    Args:
        group: the group.
        name: shown in messages.
        dim: d, the size of rho(g).
        matrix: maps (..., n, n) elements to (..., d, d) matrices, differentiable in the element for Lie groups.
        channels: number of copies.
        layout: order of the entries.

    Raises:
        RepresentationError: if rho(identity) is not the identity, rho(g h) differs from rho(g) rho(h), or rho(exp A)
            differs from exp(d rho(A)).
    """
    # samples alone may lie in a subgroup: a law has to hold, and a name to tell apart, at the generators too
    tried = torch.cat([group.generators, group.sample(2, generator=torch.Generator().manual_seed(0))])
    count = len(tried)
    products = torch.cat([tried @ tried.roll(1, 0), tried @ tried])
    with torch.no_grad():
        images = matrix(torch.cat([group.identity[None], tried, products])).double()
    total, eye = 1 + 3 * count, torch.eye(dim, dtype=torch.float64)
    if images.shape != (total, dim, dim) or not torch.allclose(images[0], eye, atol=1e-6):
        raise RepresentationError(
            f"representation {name!r} of {group} maps elements ({total}, {group.degree}, {group.degree}) to "
            f"{tuple(images.shape)}: expected ({total}, {dim}, {dim}), and the identity matrix at the identity"
        )
    factors = images[1 : 1 + count]
    expected = torch.cat([factors @ factors.roll(1, 0), factors @ factors])
    if not torch.allclose(images[1 + count :], expected, atol=1e-5):
        raise RepresentationError(
            f"representation {name!r} of {group}: expected rho(g h) = rho(g) rho(h), found a difference"
        )
    atom = Atom(name, dim, matrix, fingerprint=groups.fingerprint(factors))
    for direction in group.algebra:
        if not torch.allclose(
            torch.linalg.matrix_exp(_derivative(atom, direction).double()),
            matrix(torch.linalg.matrix_exp(direction)).double(),
            atol=1e-5,
        ):
            raise RepresentationError(
                f"representation {name!r} of {group}: expected rho(exp A) = exp(d rho(A)), found a difference; write "
                "rho with torch functions of the element, without detach, so that it can be differentiated"
            )
    return Representation(group, (Block(channels, atom, layout),))


@on_cpu
def from_matrices(
    group: Group, name: str, generators: Tensor, *, channels: int = 1, layout: Layout = "mul_ir"
) -> Representation:
    """Make a representation of a finite group from the matrices of its generators.

    Args:
        group: a finite group.
        name: unique name within the group.
        generators: (k, d, d), one matrix for each of `group.generators`.
        channels: number of copies.
        layout: order of the entries.

    Raises:
        RepresentationError: if the count is wrong, or the matrices do not satisfy the relations of the group.
    """
    if group.order is None:
        raise RepresentationError(
            f"from_matrices({name!r}) of {group}: expected a finite group; write rho as a function of the element, "
            "ce.representations.from_function(group, name, dim, rho)"
        )
    if generators.ndim != 3 or len(generators) != len(group.generators):
        raise RepresentationError(
            f"from_matrices({name!r}) got shape {tuple(generators.shape)}: expected ({len(group.generators)}, d, d), "
            f"one matrix per generator of {group}"
        )
    # enumerate the graph {(g, rho(g))} as one matrix group: as many elements as the group iff rho is well defined
    size, dim = group.degree, generators.shape[-1]
    joint = torch.zeros(len(generators), size + dim, size + dim, dtype=torch.float64)
    joint[:, :size, :size], joint[:, size:, size:] = group.generators, generators.double()
    try:
        graph = groups.close_under_products(joint, torch.eye(size + dim, dtype=torch.float64), most=group.order)
    except RepresentationError as error:
        raise RepresentationError(
            f"from_matrices({name!r}): the matrices generate more than {group.order} pairs (g, rho(g)) for "
            f"{group.order} elements of {group}: expected matrices that satisfy the relations of the group"
        ) from error
    elements, images = graph[:, :size, :size], graph[:, size:, size:]

    def matrix(acting: Tensor) -> Tensor:
        distance = torch.linalg.matrix_norm(acting[..., None, :, :] - elements)
        return images[distance.argmin(-1)]

    return from_function(group, name, dim, matrix, channels=channels, layout=layout)


def lift(representation: Representation, group: Group, index: int) -> Representation:
    """Let a direct product act through one of its factors.

    Args:
        representation: of `group.factors[index]`.
        group: made by `ce.groups.product`.
        index: which factor.
    """
    if not 0 <= index < len(group.factors) or group.factors[index] != representation.group:
        raise RepresentationError(
            f"lift of {representation.group} to factor {index} of {group}: expected one of "
            f"{list(enumerate(group.factors))}"
        )

    def through(atom: Atom) -> Atom:
        matrix = atom.matrix
        # one-dimensional atoms of different factors can be equal (all trivial ones are), which names do not tell
        kind = "matrix" if atom.dim == 1 else atom.kind
        return replace(
            atom, name=f"{atom.name}@{index}", matrix=lambda g: matrix(groups.factor_of(group, g, index)), kind=kind
        )

    return Representation(group, tuple(replace(b, atom=through(b.atom)) for b in representation.blocks))


def restrict(representation: Representation, subgroup: Group) -> Representation:
    """Let a subgroup act alone: the same matrices, of fewer elements, so that more maps commute with them.

    Args:
        representation: of a group.
        subgroup: of that group, as matrices of the same degree, for example `ce.groups.SO3()` of O(3).

    Raises:
        RepresentationError: if it is no subgroup, as far as its generators tell.

    Example:
        >>> str(restrict(irreps("2x1o + 1x1e"), groups.SO3()))
        '2x1 + 1x1'
    """
    group = representation.group
    if subgroup == group:
        return representation
    groups.require_subgroup(subgroup, group)

    def part(atom: Atom) -> Atom:
        if (group.name, subgroup.name) == ("O(3)", "SO(3)") and _IRREP.match(atom.name):
            return _rotation_atom(atom.dim // 2, 0)  # parity is all that is lost
        # other irreps may fall apart, and different ones become equal
        kind: Literal["permutation", "matrix"] = "permutation" if atom.kind == "permutation" else "matrix"
        unique = hash((atom.fingerprint, group.fingerprint))
        return replace(atom, name=f"{atom.name} of {group}", kind=kind, fingerprint=unique)

    return Representation(subgroup, tuple(replace(b, atom=part(b.atom)) for b in representation.blocks))


def as_representation(value: object, *, group: Group) -> Representation:
    """Read a representation, an irreps string or an `e3nn.o3.Irreps` as a representation of `group`.

    Raises:
        RepresentationError: if it belongs to another group or cannot be read.
    """
    if isinstance(value, Representation):
        if value.group != group:
            raise RepresentationError(f"representation {value} belongs to {value.group}: expected {group}")
        return value
    return irreps(value, group=group)


def every_pair(outputs: Representation, inputs: Representation) -> list[tuple[Block, slice, Block, slice]]:
    """List the blocks of a linear map inputs -> outputs with their row and column slices."""

    def sliced(representation: Representation) -> list[tuple[Block, slice]]:
        starts = [0]
        for block in representation.blocks:
            starts.append(starts[-1] + block.dim)
        return [(b, slice(i, j)) for b, i, j in zip(representation.blocks, starts, starts[1:], strict=False)]

    return [(b, rows, a, columns) for (b, rows), (a, columns) in pairs(sliced(outputs), sliced(inputs))]
