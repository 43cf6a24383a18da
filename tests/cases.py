"""The one table of cases: every kind of layer and network that can be relaxed, with inputs and symmetry.

A law is a test over `CASES`:

    @pytest.mark.parametrize("case", CASES)
    def test_law(case): ...

To add a case, append a `Case` to `_TABLE`. Frameworks are imported by its functions alone, never by this file.
"""

import copy
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import constrained_equiv as ce
from constrained_equiv import groups
from constrained_equiv.representations import Representation, defining, permutation, regular, trivial, vectors
from tests import steerable


@dataclass(frozen=True, repr=False)
class Case:
    """One model, how to relax it, what to feed it and what it is equivariant to.

    Attributes:
        name: shown by pytest.
        build: makes the model, in torch's default dtype, which is `dtype` meanwhile.
        inputs: draws the model's arguments, a tuple, in torch's default dtype.
        symmetry: of the model; `inputs` of it is a tuple where the model takes several arguments.
        where: chooses the layers; by default those with a built-in adapter.
        adapter: makes the adapter, where there is no built-in one.
        needs: the framework that has to be installed.
        dtype: in which the laws hold to `tolerance`.
        tolerance: relative equivariance error of the plain model in `dtype`.
        tolerance32: the same in float32.
        linear: whether the model is one relaxed layer, affine in its one argument (batch, ...).
        folds: how much of an equivariant term the layers' own weights can hold.
        marks: further pytest marks.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], tuple[Any, ...]]
    symmetry: Callable[[], ce.Symmetry]
    where: Callable[[str, nn.Module], bool] | None = None
    adapter: Callable[[], ce.adapters.Adapter] | None = None
    needs: str | None = None
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-13
    tolerance32: float = 1e-6
    linear: bool = False
    folds: Literal["all", "part", "none"] = "all"
    marks: tuple[pytest.MarkDecorator, ...] = ()

    def __repr__(self) -> str:
        return f"case {self.name!r}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # Hypothesis would print every field

    def model(self, dtype: torch.dtype | None = None) -> nn.Module:
        """A fresh copy of the same model at every call, in training mode."""
        model = _prototype(self, dtype or self.dtype)
        if any(isinstance(v, torch.jit.ScriptFunction) for m in model.modules() for v in vars(m).values()):
            pytest.skip("this e3nn compiled a function to TorchScript, which cannot be copied")
        return copy.deepcopy(model)

    def relax(self, model: nn.Module, *, init: Any = 1.0, seed: int = 0, **options: Any) -> nn.Module:
        """Relax a model of this case; the terms are not zero by default."""
        adapter = self.adapter and self.adapter()
        generator = torch.Generator().manual_seed(seed)
        return ce.relax(model, where=self.where, adapter=adapter, init=init, generator=generator, **options)

    def relaxed(self, dtype: torch.dtype | None = None, **options: Any) -> nn.Module:
        """A fresh relaxed copy; options as for `relax`."""
        return self.relax(self.model(dtype), **options)

    def data(self, seed: int = 0, dtype: torch.dtype | None = None) -> tuple[Any, ...]:
        """The arguments of the model."""
        with default_dtype(dtype or self.dtype):
            return self.inputs(torch.Generator().manual_seed(seed))

    def error(self, model: nn.Module, data: tuple[Any, ...]) -> float:
        """Relative equivariance error of a model of this case."""
        arguments = data if len(data) > 1 else data[0]
        return ce.equivariance_error(model, arguments, symmetry=self.symmetry(), samples=4)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Build inside in a default dtype; e3nn makes its constants in it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def tensors(output: Any) -> list[Tensor]:
    """The tensors of a model's output, a tensor, escnn's geometric tensor or a tuple of them."""
    parts = output if isinstance(output, tuple | list) else [output]
    return [part if isinstance(part, Tensor) else part.tensor for part in parts]


def loss(output: Any) -> Tensor:
    """A number that depends on every entry of the output, without symmetry."""
    return sum(
        (part.flatten() - torch.linspace(-1, 1, part.numel()).to(part)).square().mean() for part in tensors(output)
    )


@cache
def _prototype(case: Case, dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng(devices=[]), default_dtype(dtype):
        torch.manual_seed(0)
        return case.build()


def _gaussian(*shapes: tuple[int, ...]) -> Callable[[torch.Generator], tuple[Tensor, ...]]:
    return lambda generator: tuple(torch.randn(shape, generator=generator) for shape in shapes)


# --- own layers -------------------------------------------------------------------------------------------------------


class VectorMap(nn.Module):
    """Mix the channels of vectors (batch, channels, 3)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)

    def forward(self, features: Tensor) -> Tensor:
        return torch.einsum("oc,ncd->nod", self.mixing, features)


class Shrink(nn.Module):
    """Scale vectors (..., 3) by a function of their length."""

    def forward(self, features: Tensor) -> Tensor:
        return features / (1 + features.square().sum(-1, keepdim=True)).sqrt()


class Averaged(nn.Module):
    """A matrix averaged over a finite group, (1 / |G|) sum_g rho_out(g)^-1 W rho_in(g), applied to the last axis."""

    def __init__(self, inputs: Representation, outputs: Representation) -> None:
        super().__init__()
        elements = inputs.group.elements()
        self.weight = nn.Parameter(torch.randn(outputs.dim, inputs.dim))
        self.register_buffer("right", inputs.matrix(elements).to(self.weight))
        self.register_buffer("left", torch.linalg.inv(outputs.matrix(elements)).to(self.weight))

    def forward(self, features: Tensor) -> Tensor:
        return features @ (self.left @ self.weight @ self.right).mean(0).T


class SetMixing(nn.Module):
    """Add the mean over the set (..., points, channels) to every point, each through a matrix of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.each, self.mean = nn.Linear(channels, channels), nn.Linear(channels, channels, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        return self.each(features) + self.mean(features.mean(-2, keepdim=True))


class GraphMixing(nn.Module):
    """Mix features of pairs (..., n, n, channels) with their transposes, their means over columns, and the mean."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mixing = nn.Linear(4 * channels, channels)

    def forward(self, features: Tensor) -> Tensor:
        means = [features.mean(axes, keepdim=True).expand_as(features) for axes in ((-2,), (-3, -2))]
        return self.mixing(torch.cat([features, features.transpose(-3, -2), *means], -1))


def triangle_features() -> tuple[Representation, Representation]:
    """Two representations of the symmetry group of the triangle."""
    group = groups.dihedral(3)
    return defining(group, channels=2) + regular(group), regular(group) + trivial(1, group=group) + defining(group)


def lattice_features() -> tuple[Representation, Representation]:
    """Coordinates in a basis of the hexagonal lattice: six turns, whose matrices are not orthogonal."""
    group = groups.matrix_group("hexagon", generators=torch.tensor([[[1.0, -1.0], [1.0, 0.0]]]))
    return defining(group, channels=3) + trivial(1, group=group), trivial(2, group=group) + defining(group, channels=2)


# --- e3nn -------------------------------------------------------------------------------------------------------------

_AWKWARD_IN, _AWKWARD_OUT = "2x1o + 3x0e + 0x2e + 1x1o + 2x0o + 1x2e", "1x0o + 2x1o + 0x1e + 2x0e + 1x1o + 2x2e + 1x1e"
_PRODUCT = ("3x0e + 2x1o", "1x0e + 1x1o", "3x0e + 2x1o")
_UVU = [(0, 0, 0, "uvu", True), (0, 1, 1, "uvu", True), (1, 0, 2, "uvu", True), (1, 1, 3, "uvu", True)]
_UVU_OUT = "3x0e + 3x1o + 2x1o + 2x0e"
_PER_EDGE = {"internal_weights": False, "shared_weights": False}
_EXTERNAL = {"internal_weights": False, "shared_weights": True}
# how a path combines copies u and v into copies w: copies in each input, and in the output
_MODES = {"uvw": ((3, 2), 4), "uvu": ((3, 2), 3), "uvv": ((2, 3), 3), "uuw": ((2, 2), 3), "uuu": ((2, 2), 2),
          "uvuv": ((2, 3), 6), "uvu<v": ((3, 3), 3), "u<vw": ((3, 3), 2)}  # fmt: skip


def _e3nn(kind: str, *arguments: Any, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from e3nn import o3

        return getattr(o3, kind)(*arguments, **options)

    return build


def _mode(mode: str) -> Case:
    """A tensor product of scalars and vectors, both parities of the outputs, all of whose paths are of one mode."""
    copies, out = _MODES[mode]
    left, right = (f"{mul}x0e + {mul}x1o" for mul in copies)
    outputs = f"{out}x1e + {out}x0e + {out}x1o"
    paths = [(0, 0, 1, mode, True), (1, 0, 2, mode, True), (1, 1, 0, mode, True), (1, 1, 1, mode, True)]
    return Case(f"e3nn tensor product, {mode}", _e3nn("TensorProduct", left, right, outputs, instructions=paths),
                _gaussian((5, 4 * copies[0]), (5, 4 * copies[1])), _o3((left, right), outputs), needs="e3nn",
                folds="none")  # fmt: skip


class Tensored(nn.Module):
    """The tensor product of two features, without weights, and a linear map after it."""

    def __init__(self) -> None:
        from e3nn import o3

        super().__init__()
        self.product = o3.FullTensorProduct("2x0e + 1x1o", "1x0e + 1x1o")
        self.linear = o3.Linear(self.product.irreps_out, "2x0e + 2x1o + 1x1e + 1x2e")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.linear(self.product(x, y))


def _o3(inputs: Any, outputs: Any) -> Callable[[], ce.Symmetry]:
    return lambda: ce.Symmetry(groups.O3(), inputs, outputs)


def _gate_network() -> nn.Module:
    from e3nn import o3
    from e3nn.nn import Gate

    gate = Gate("4x0e", [torch.tanh], "3x0e", [torch.sigmoid], "2x1o + 1x2e")
    return nn.Sequential(o3.Linear("3x0e + 2x1o + 1x2e", gate.irreps_in, biases=True), gate,
                         o3.Linear(gate.irreps_out, "2x0e + 1x1o + 1x2e"))  # fmt: skip


def _norm_network() -> nn.Module:
    from e3nn import o3
    from e3nn.nn import BatchNorm

    return nn.Sequential(o3.Linear("3x0e + 2x1o", "4x0e + 3x1o"), BatchNorm("4x0e + 3x1o"),
                         o3.Linear("4x0e + 3x1o", "1x0e + 2x1o", biases=True))  # fmt: skip


def _segnn() -> nn.Module:
    from examples.models.segnn import SEGNN

    return SEGNN("4x0e + 3x1o", layers=1)


def _systems(generator: torch.Generator) -> tuple[Tensor, ...]:
    positions, velocities = torch.randn(2, 3, 4, 3, generator=generator)
    return positions, velocities, torch.randn(3, 4, generator=generator).sign()


_E3NN = (
    Case("e3nn linear", _e3nn("Linear", "4x0e + 3x1o", "2x0e + 3x1o"), _gaussian((5, 13)),
         _o3("4x0e + 3x1o", "2x0e + 3x1o"), needs="e3nn", linear=True),
    Case("e3nn linear, repeated, unsorted and empty irreps",
         _e3nn("Linear", _AWKWARD_IN, _AWKWARD_OUT, biases=True), _gaussian((5, 19)),
         _o3(_AWKWARD_IN, _AWKWARD_OUT), needs="e3nn", linear=True),
    Case("e3nn linear, stated paths, twice the same",
         _e3nn("Linear", "4x0e + 3x1o", "2x0e + 3x1o", instructions=[(0, 0), (1, 1), (1, 1)], biases=[True, False]),
         _gaussian((5, 13)), _o3("4x0e + 3x1o", "2x0e + 3x1o"), needs="e3nn", linear=True),
    Case("e3nn linear, external weights",
         _e3nn("Linear", "2x0e + 2x1o", "2x0e + 1x1o", internal_weights=False, shared_weights=True),
         _gaussian((5, 8), (6,)), _o3(("2x0e + 2x1o", None), "2x0e + 1x1o"), needs="e3nn", folds="none"),
    Case("e3nn linear, feature axes", _e3nn("Linear", "2x0e + 1x1o", "1x0e + 1x1o", f_in=3, f_out=2, biases=True),
         _gaussian((5, 3, 5)), _o3("2x0e + 1x1o", "1x0e + 1x1o"), needs="e3nn"),
    Case("e3nn fully connected tensor product", _e3nn("FullyConnectedTensorProduct", *_PRODUCT),
         _gaussian((5, 9), (5, 4)), _o3(_PRODUCT[:2], _PRODUCT[2]), needs="e3nn", folds="none"),
    *map(_mode, _MODES),
    Case("e3nn tensor product, weights per edge",
         _e3nn("TensorProduct", *_PRODUCT[:2], _UVU_OUT, instructions=_UVU, **_PER_EDGE),
         _gaussian((5, 9), (5, 4), (5, 10)), _o3((*_PRODUCT[:2], None), _UVU_OUT), needs="e3nn", folds="none"),
    Case("e3nn fully connected tensor product, external weights",
         _e3nn("FullyConnectedTensorProduct", *_PRODUCT, **_EXTERNAL),
         _gaussian((5, 9), (5, 4), (25,)), _o3((*_PRODUCT[:2], None), _PRODUCT[2]), needs="e3nn", folds="none"),
    Case("e3nn tensor square", _e3nn("TensorSquare", "2x0e + 2x1o", "2x0e + 2x1o + 1x1e + 1x2e"), _gaussian((5, 8)),
         _o3("2x0e + 2x1o", "2x0e + 2x1o + 1x1e + 1x2e"), needs="e3nn", folds="none"),
    Case("e3nn full tensor product and linear", Tensored, _gaussian((5, 5), (5, 4)),
         _o3(("2x0e + 1x1o", "1x0e + 1x1o"), "2x0e + 2x1o + 1x1e + 1x2e"), needs="e3nn"),
    Case("e3nn gate network", _gate_network, _gaussian((5, 14)),
         _o3("3x0e + 2x1o + 1x2e", "2x0e + 1x1o + 1x2e"), needs="e3nn"),
    Case("e3nn batch norm network", _norm_network, _gaussian((5, 9)), _o3("3x0e + 2x1o", "1x0e + 2x1o"), needs="e3nn"),
    Case("SEGNN", _segnn, _systems,
         lambda: ce.Symmetry(groups.E3(), (ce.actions.points, ce.actions.vectors, None), ce.actions.points),
         needs="e3nn", folds="part"),
)  # fmt: skip

# --- stated representations -------------------------------------------------------------------------------------------

_STATED = (
    Case("vectors, own layer", lambda: nn.Sequential(VectorMap(4, 4), Shrink(), VectorMap(4, 4)), _gaussian((5, 4, 3)),
         lambda: ce.Symmetry(groups.O3(), ce.actions.along(vectors(1), -1), ce.actions.along(vectors(1), -1)),
         where=lambda name, layer: isinstance(layer, VectorMap),
         adapter=lambda: ce.adapters.linear(vectors(4), vectors(4), axes=(1, 2)), folds="none"),
    Case("vectors, component first", lambda: nn.Linear(4, 3, bias=False), _gaussian((5, 3, 4)), linear=True,
         symmetry=lambda: ce.Symmetry(groups.O3(), ce.actions.along(vectors(1), -2), ce.actions.along(vectors(1), -2)),
         where=lambda name, layer: True, folds="none",
         adapter=lambda: ce.adapters.linear(vectors(4, layout="ir_mul"), vectors(3, layout="ir_mul"), axes=(-2, -1))),
    Case("sets, nn.Linear", lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)), _gaussian((2, 4, 3)),
         lambda: ce.Symmetry(groups.symmetric(4), ce.actions.permute(-2), ce.actions.permute(-2)),
         where=lambda name, layer: isinstance(layer, nn.Linear), folds="none",
         adapter=lambda: ce.adapters.linear(*2 * (permutation(4, channels=3),), axes=(-2, -1))),
    Case("sets, own layer", lambda: nn.Sequential(SetMixing(3), nn.Tanh(), SetMixing(3)), _gaussian((2, 4, 3)),
         lambda: ce.Symmetry(groups.symmetric(4), ce.actions.permute(-2), ce.actions.permute(-2)),
         where=lambda name, layer: isinstance(layer, SetMixing), folds="none",
         adapter=lambda: ce.adapters.linear(*2 * (permutation(4, channels=3),), axes=(-2, -1))),
    Case("graphs, own layer", lambda: nn.Sequential(GraphMixing(2), nn.Tanh(), GraphMixing(2)),
         _gaussian((2, 4, 4, 2)),
         lambda: ce.Symmetry(groups.symmetric(4), ce.actions.permute(-3, -2), ce.actions.permute(-3, -2)),
         where=lambda name, layer: isinstance(layer, GraphMixing), folds="none",
         adapter=lambda: ce.adapters.linear(*2 * (permutation(4, channels=2, order=2),), axes=(-3, -2, -1))),
    Case("group of matrices, own layer", lambda: Averaged(*lattice_features()), _gaussian((5, 7)),
         lambda: ce.Symmetry(lattice_features()[0].group, *lattice_features()), where=lambda name, layer: True,
         linear=True, folds="none", adapter=lambda: ce.adapters.linear(*lattice_features())),
    Case("finite group, own layer", lambda: Averaged(*triangle_features()), _gaussian((5, 10)),
         lambda: ce.Symmetry(groups.dihedral(3), *triangle_features()), where=lambda name, layer: True, linear=True,
         folds="none",
         adapter=lambda: ce.adapters.linear(*triangle_features())),
)  # fmt: skip

# --- vector neurons ---------------------------------------------------------------------------------------------------


def _vn(kind: str, *arguments: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from examples.models import vector_neurons

        return getattr(vector_neurons, kind)(*arguments)

    return build


class Transposing(nn.Module):
    """A vector linear layer as published: a `nn.Linear` between two transpositions."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.map = nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x.transpose(1, -1)).transpose(1, -1)


def _is_vn_linear(name: str, layer: nn.Module) -> bool:
    return type(layer).__name__ == "VNLinear"


_VECTOR_NEURONS = (
    *(Case(f"vector neurons, rank {3 + len(trailing)}", _vn("VNLinear", 4, 3), _gaussian((2, 4, 3, *trailing)),
           lambda: ce.Symmetry(groups.O3(), ce.actions.along(vectors(1), 2), ce.actions.along(vectors(1), 2)),
           where=_is_vn_linear, adapter=ce.adapters.vector_neurons, linear=not trailing)
      for trailing in ((), (5,), (5, 2))),
    Case("vector neurons, channels last", lambda: nn.Linear(4, 3, bias=False), _gaussian((5, 3, 4)),
         lambda: ce.Symmetry(groups.O3(), ce.actions.along(vectors(1), -2), ce.actions.along(vectors(1), -2)),
         where=lambda name, layer: True, adapter=lambda: ce.adapters.vector_neurons(axis=-1), linear=True),
    Case("vector neurons, between transpositions", lambda: Transposing(4, 3), _gaussian((2, 4, 3, 5, 2)),
         lambda: ce.Symmetry(groups.O3(), ce.actions.along(vectors(1), 2), ce.actions.along(vectors(1), 2)),
         where=lambda name, layer: isinstance(layer, nn.Linear),
         adapter=lambda: ce.adapters.vector_neurons(axis="swapped")),
    Case("vector neurons, network", lambda: nn.Sequential(_vn("VNLinearLeakyReLU", 2, 4)(), _vn("VNInvariant", 4)()),
         _gaussian((3, 2, 3, 7)), lambda: ce.Symmetry(groups.O3(), ce.actions.along(vectors(1), 2), None),
         where=_is_vn_linear, adapter=ce.adapters.vector_neurons, tolerance=1e-11, tolerance32=1e-5),
)  # fmt: skip

# --- escnn ------------------------------------------------------------------------------------------------------------


def _fibres(group: ce.groups.Group) -> Case:
    make = partial(steerable.linear, group.name)
    size = {"C_8": 13, "D_3": 11, "SO(2)": 5, "O(2)": 5, "cube": 7, "SO(3)": 7, "O(3)": 7}[group.name]
    return Case(f"escnn linear, {group}", partial(steerable.sharp, make), _gaussian((4, size)),
                partial(steerable.on_fibres, make, group), needs="escnn", linear=True)  # fmt: skip


def _fields(name: str, make: Callable[[], nn.Module], group: ce.groups.Group, *shape: int, folds: str = "all") -> Case:
    return Case(f"escnn {name}", partial(steerable.sharp, make), _gaussian(shape),
                partial(steerable.on_fields, make, group), needs="escnn", folds=folds)  # fmt: skip


_TURNS = groups.cyclic(4)
_SQUARE = groups.dihedral(4)

_ESCNN = (
    *map(_fibres, (groups.cyclic(8), groups.dihedral(3), groups.SO2(), groups.O2(), steerable.cube(), groups.SO3(),
                   groups.O3())),
    _fields("convolution, flips", partial(steerable.planar, "flips", padding=1), steerable.mirror(), 2, 3, 5, 5,
            folds="part"),
    _fields("convolution, C_4, stride", partial(steerable.planar, "C_4", stride=2, padding=1), _TURNS, 2, 6, 5, 5,
            folds="part"),
    _fields("convolution, D_4, mixed fields, circular",
            partial(steerable.planar, "D_4", padding=1, padding_mode="circular"), _SQUARE, 2, 12, 5, 5, folds="part"),
    _fields("convolution, D_8, mixed fields", partial(steerable.planar, "D_8", padding=1), _SQUARE, 2, 10, 5, 5),
    _fields("convolution, C_8, dilation", partial(steerable.planar, "C_8", dilation=2, padding=2), _TURNS, 2, 10, 5, 5),
    _fields("convolution, SO(2), no bias", partial(steerable.planar, "SO(2)", bias=False), _TURNS, 2, 5, 5, 5),
    _fields("convolution, O(2)", partial(steerable.planar, "O(2)", stride=2, padding=1), _SQUARE, 2, 5, 5, 5),
    _fields("convolution, C_4, groups", partial(steerable.planar, "C_4", groups=2), _TURNS, 2, 12, 5, 5, folds="part"),
    _fields("convolution, C_4, transposed, stride, groups",
            partial(steerable.planar, "C_4", transposed=True, stride=2, groups=2), _TURNS, 2, 12, 3, 3, folds="part"),
    _fields("convolution, C_8, transposed", partial(steerable.planar, "C_8", transposed=True, padding=1),
            _TURNS, 2, 10, 4, 4),
    _fields("volume, cube", partial(steerable.volume, "cube", padding=1), steerable.cube(), 2, 4, 3, 3, 3,
            folds="part"),
    _fields("volume, cube and inversion, stride", partial(steerable.volume, "cube and inversion", stride=2),
            steerable.cube(inversion=True), 2, 4, 5, 5, 5, folds="part"),
    _fields("volume, SO(3)", partial(steerable.volume, "SO(3)", dilation=2, padding=2), steerable.cube(),
            2, 4, 3, 3, 3),
    _fields("volume, O(3), groups", partial(steerable.volume, "O(3)", groups=2), steerable.cube(inversion=True),
            2, 8, 3, 3, 3),
    _fields("volume, SO(3), transposed", partial(steerable.volume, "SO(3)", transposed=True, stride=2),
            steerable.cube(), 2, 4, 2, 2, 2),
    _fields("network", steerable.network, _TURNS, 2, 2, 6, 6, folds="part"),
)  # fmt: skip

# --- networks with forces ---------------------------------------------------------------------------------------------


class Molecule(nn.Module):
    """Energies and forces of one kind of molecule."""

    def __init__(self) -> None:
        from examples.models.nequip_style import NequIP

        super().__init__()
        self.network = NequIP([1, 6, 8], hidden="3x0e + 2x1o + 1x2e", layers=2, radial=3, radial_width=4)
        self.register_buffer("species", torch.tensor([6, 1, 8, 1]))

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.network(positions, self.species)


def _molecules(generator: torch.Generator) -> tuple[Tensor, ...]:
    corners = torch.cat([torch.zeros(1, 3), torch.eye(3)])
    return (1.5 * corners + 0.2 * torch.randn(2, 4, 3, generator=generator),)


_FORCES = (
    Case("energies and forces", Molecule, _molecules,
         lambda: ce.Symmetry(groups.E3(), ce.actions.points, (None, ce.actions.vectors)), needs="e3nn", folds="part"),
)  # fmt: skip

_TABLE: tuple[Case, ...] = (*_E3NN, *_STATED, *_VECTOR_NEURONS, *_ESCNN, *_FORCES)

AVAILABLE = [case for case in _TABLE if not case.needs or importlib.util.find_spec(case.needs) is not None]
"""The cases whose framework is installed, for laws that draw a case."""

CASES = [
    pytest.param(
        case,
        id=case.name,
        marks=(
            *case.marks,
            *(
                [pytest.mark.skipif(importlib.util.find_spec(case.needs) is None, reason=f"{case.needs} is absent")]
                if case.needs
                else []
            ),
        ),
    )
    for case in _TABLE
]


def case_named(name: str) -> Case:
    """One case, for tests that need only one; skips where its framework is absent."""
    case = next(case for case in _TABLE if case.name == name)
    if case.needs:
        pytest.importorskip(case.needs)
    return case
