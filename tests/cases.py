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
from typing import Any

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
    marks: tuple[pytest.MarkDecorator, ...] = ()

    def __repr__(self) -> str:
        return f"case {self.name!r}"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))  # Hypothesis would print every field

    def model(self, dtype: torch.dtype | None = None) -> nn.Module:
        """A fresh copy of the same model at every call, in training mode."""
        return copy.deepcopy(_prototype(self, dtype or self.dtype))

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


def triangle_features() -> tuple[Representation, Representation]:
    """Two representations of the symmetry group of the triangle."""
    group = groups.dihedral(3)
    return defining(group, channels=2) + regular(group), regular(group) + trivial(1, group=group) + defining(group)


# --- e3nn -------------------------------------------------------------------------------------------------------------

_AWKWARD_IN, _AWKWARD_OUT = "2x1o + 3x0e + 0x2e + 1x1o + 2x0o + 1x2e", "1x0o + 2x1o + 0x1e + 2x0e + 1x1o + 2x2e + 1x1e"
_PRODUCT = ("3x0e + 2x1o", "1x0e + 1x1o", "3x0e + 2x1o")
_UVU = [(0, 0, 0, "uvu", True), (0, 1, 1, "uvu", True), (1, 0, 2, "uvu", True), (1, 1, 3, "uvu", True)]
_UVU_OUT = "3x0e + 3x1o + 2x1o + 2x0e"
_PER_EDGE = {"internal_weights": False, "shared_weights": False}
_UVW = [(0, 0, 0, "uvw", True), (1, 1, 0, "uvw", True), (1, 0, 1, "uvw", True)]


def _e3nn(kind: str, *arguments: Any, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from e3nn import o3

        return getattr(o3, kind)(*arguments, **options)

    return build


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
         _gaussian((5, 8), (6,)), _o3(("2x0e + 2x1o", None), "2x0e + 1x1o"), needs="e3nn"),
    Case("e3nn fully connected tensor product", _e3nn("FullyConnectedTensorProduct", *_PRODUCT),
         _gaussian((5, 9), (5, 4)), _o3(_PRODUCT[:2], _PRODUCT[2]), needs="e3nn"),
    Case("e3nn tensor product, uvw", _e3nn("TensorProduct", *_PRODUCT, instructions=_UVW),
         _gaussian((5, 9), (5, 4)), _o3(_PRODUCT[:2], _PRODUCT[2]), needs="e3nn"),
    Case("e3nn tensor product, uvu", _e3nn("TensorProduct", *_PRODUCT[:2], _UVU_OUT, instructions=_UVU),
         _gaussian((5, 9), (5, 4)), _o3(_PRODUCT[:2], _UVU_OUT), needs="e3nn"),
    Case("e3nn tensor product, weights per edge",
         _e3nn("TensorProduct", *_PRODUCT[:2], _UVU_OUT, instructions=_UVU, **_PER_EDGE),
         _gaussian((5, 9), (5, 4), (5, 10)), _o3((*_PRODUCT[:2], None), _UVU_OUT), needs="e3nn"),
    Case("e3nn gate network", _gate_network, _gaussian((5, 14)),
         _o3("3x0e + 2x1o + 1x2e", "2x0e + 1x1o + 1x2e"), needs="e3nn"),
    Case("e3nn batch norm network", _norm_network, _gaussian((5, 9)), _o3("3x0e + 2x1o", "1x0e + 2x1o"), needs="e3nn"),
    Case("SEGNN", _segnn, _systems,
         lambda: ce.Symmetry(groups.E3(), (ce.actions.points, ce.actions.vectors, None), ce.actions.points),
         needs="e3nn"),
)  # fmt: skip

# --- stated representations -------------------------------------------------------------------------------------------

_STATED = (
    Case("vectors, own layer", lambda: nn.Sequential(VectorMap(4, 4), Shrink(), VectorMap(4, 4)), _gaussian((5, 4, 3)),
         lambda: ce.Symmetry(groups.O3(), ce.actions.along(vectors(1), -1), ce.actions.along(vectors(1), -1)),
         where=lambda name, layer: isinstance(layer, VectorMap),
         adapter=lambda: ce.adapters.linear(vectors(4), vectors(4), axes=(1, 2))),
    Case("vectors, component first", lambda: nn.Linear(4, 3, bias=False), _gaussian((5, 3, 4)), linear=True,
         symmetry=lambda: ce.Symmetry(groups.O3(), ce.actions.along(vectors(1), -2), ce.actions.along(vectors(1), -2)),
         where=lambda name, layer: True,
         adapter=lambda: ce.adapters.linear(vectors(4, layout="ir_mul"), vectors(3, layout="ir_mul"), axes=(-2, -1))),
    Case("sets, nn.Linear", lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)), _gaussian((2, 4, 3)),
         lambda: ce.Symmetry(groups.symmetric(4), ce.actions.permute(-2), ce.actions.permute(-2)),
         where=lambda name, layer: isinstance(layer, nn.Linear),
         adapter=lambda: ce.adapters.linear(*2 * (permutation(4, channels=3),), axes=(-2, -1))),
    Case("sets, own layer", lambda: nn.Sequential(SetMixing(3), nn.Tanh(), SetMixing(3)), _gaussian((2, 4, 3)),
         lambda: ce.Symmetry(groups.symmetric(4), ce.actions.permute(-2), ce.actions.permute(-2)),
         where=lambda name, layer: isinstance(layer, SetMixing),
         adapter=lambda: ce.adapters.linear(*2 * (permutation(4, channels=3),), axes=(-2, -1))),
    Case("finite group, own layer", lambda: Averaged(*triangle_features()), _gaussian((5, 10)),
         lambda: ce.Symmetry(groups.dihedral(3), *triangle_features()), where=lambda name, layer: True, linear=True,
         adapter=lambda: ce.adapters.linear(*triangle_features())),
)  # fmt: skip

# --- vector neurons ---------------------------------------------------------------------------------------------------


def _vn(kind: str, *arguments: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from examples.models import vector_neurons

        return getattr(vector_neurons, kind)(*arguments)

    return build


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
    Case("vector neurons, network", lambda: nn.Sequential(_vn("VNLinearLeakyReLU", 2, 4)(), _vn("VNInvariant", 4)()),
         _gaussian((3, 2, 3, 7)), lambda: ce.Symmetry(groups.O3(), ce.actions.along(vectors(1), 2), None),
         where=_is_vn_linear, adapter=ce.adapters.vector_neurons, tolerance=1e-11),
)  # fmt: skip

# --- escnn ------------------------------------------------------------------------------------------------------------


def _fibres(group: ce.groups.Group) -> Case:
    make = partial(steerable.linear, group.name)
    size = {"C_8": 13, "SO(2)": 5, "O(2)": 5, "SO(3)": 7, "O(3)": 7}[group.name]
    return Case(f"escnn linear, {group}", partial(steerable.sharp, make), _gaussian((4, size)),
                partial(steerable.on_fibres, make, group), needs="escnn", linear=True)  # fmt: skip


def _fields(name: str, make: Callable[[], nn.Module], group: ce.groups.Group, *shape: int) -> Case:
    return Case(f"escnn {name}", partial(steerable.sharp, make), _gaussian(shape),
                partial(steerable.on_fields, make, group), needs="escnn")  # fmt: skip


_TURNS = groups.cyclic(4)

_ESCNN = (
    *map(_fibres, (groups.cyclic(8), groups.SO2(), groups.O2(), groups.SO3(), groups.O3())),
    _fields("convolution, C_4, stride", partial(steerable.planar, "C_4", stride=2, padding=1), _TURNS, 2, 6, 5, 5),
    _fields("convolution, D_4, mixed fields, circular",
            partial(steerable.planar, "D_4", padding=1, padding_mode="circular"), groups.dihedral(4), 2, 12, 5, 5),
    _fields("convolution, C_8, dilation", partial(steerable.planar, "C_8", dilation=2, padding=2), _TURNS, 2, 10, 5, 5),
    _fields("convolution, SO(2), no bias", partial(steerable.planar, "SO(2)", bias=False), _TURNS, 2, 5, 5, 5),
    _fields("convolution, C_4, groups", partial(steerable.planar, "C_4", groups=2), _TURNS, 2, 12, 5, 5),
    _fields("convolution, C_4, transposed, stride, groups",
            partial(steerable.planar, "C_4", transposed=True, stride=2, groups=2), _TURNS, 2, 12, 3, 3),
    _fields("convolution, C_8, transposed", partial(steerable.planar, "C_8", transposed=True, padding=1),
            _TURNS, 2, 10, 4, 4),
    _fields("network", steerable.network, _TURNS, 2, 2, 6, 6),
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
         lambda: ce.Symmetry(groups.E3(), ce.actions.points, (None, ce.actions.vectors)), needs="e3nn"),
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
