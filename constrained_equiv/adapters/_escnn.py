"""Adapters for escnn: `Linear` and the (transposed) convolutions of planes and volumes.

What enters: an escnn layer. What leaves: adapters that add the term to the expanded kernel, so that one convolution
does both, whatever its stride, padding, dilation and groups.
Law: P leaves every kernel of the layer alone, and a cached kernel always holds what the layer would expand anew.

P is the group average where the group is finite and permutes the points of the kernel, so that equivariant kernels
which escnn's band limit cannot hold do not count as broken symmetry; else P is onto the layer's sampled basis. A layer
with a stride is equivariant only where (size + 2 padding - dilation (k - 1) - 1) is a multiple of it.
"""

import math
import warnings
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from constrained_equiv._constants import constant
from constrained_equiv._terms import CHILD
from constrained_equiv.adapters._base import Adapter, Methods, Site
from constrained_equiv.errors import RelaxationError
from constrained_equiv.kernels import Field, Kernels, LocalKernels, averaged, orbits_of, permuted, spanned

_LAYERS = ("Linear", "R2Conv", "R2ConvTransposed", "R3Conv", "R3ConvTransposed")
_FLOOR = 1e-5  # escnn's bases are float32, so its own kernels are equivariant to about 1e-7


@cache
def adapters(escnn_nn: Any) -> tuple[Adapter, ...]:
    """Return the adapters, given the imported module `escnn.nn`."""
    kinds = tuple(getattr(escnn_nn, name) for name in _LAYERS)

    def matches(layer: nn.Module) -> bool:
        return isinstance(layer, kinds)

    return (Adapter("escnn", matches, _site, _methods, _fold, _refresh),)


def _site(layer: Any) -> Site:
    expansion = layer.basisexpansion
    inputs, outputs = tuple(expansion._in_reprs), tuple(expansion._out_reprs)  # of one group where groups > 1
    term = layer._modules.get(CHILD)
    kernels: Kernels = _kernels(layer, inputs, outputs) if term is None else term.projection
    # an upsampling layer spreads its kernel over this many output points per input point
    spread = _volume(layer.stride, layer.d) if kernels.transposed else 1
    rows = float(layer.out_type.size * spread)
    return Site(kernels, kernels.shape, rows, _words(inputs), _words(outputs), layer.weights)


def _kernels(layer: Any, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> Kernels:
    with torch.no_grad():
        own = layer.expand_parameters()[0]
    if torch.finfo(own.dtype).eps > _FLOOR:
        raise RelaxationError(
            f"{type(layer).__name__} is in {own.dtype}, in which its sampled basis is too coarse to project onto: "
            "expected float32 or float64; call ce.relax(model) first, then cast the result"
        )
    pairs = [(b, a) for b in dict.fromkeys(outputs) for a in dict.fromkeys(inputs)]
    found = [(_field(b), _field(a), _local(layer, b, a)) for b, a in pairs]
    kernels = Kernels(
        tuple(own.shape),
        tuple(map(_field, outputs)),
        tuple(map(_field, inputs)),
        tuple((b, a, local) for b, a, local in found if local is not None),
        hasattr(layer, "output_padding"),
    )
    lost = torch.linalg.vector_norm(kernels.complement_(own.clone()))
    if not bool(lost <= _FLOOR * torch.linalg.vector_norm(own)):
        raise RelaxationError(
            f"{type(layer).__name__} {_words(inputs)} -> {_words(outputs)}: a part of norm {float(lost):.3g} of the "
            "layer's own kernel breaks the symmetry of its field types; expected a layer of escnn 1.0 with its own "
            "sampled bases; leave it out with where=lambda name, layer: ..."
        )
    return kernels


def _local(layer: Any, out: Any, into: Any) -> LocalKernels | None:
    grid = np.asarray(layer.basisexpansion.points)
    whole, orbits = _averaged(_Space(layer.space.name, layer.space), out, into, grid.tobytes(), grid.shape)
    if whole is not None:
        return whole
    block = _block(layer, (into.name, out.name))
    return None if block is None else spanned(block.sampled_basis, orbits)


def _block(layer: Any, pair: tuple[str, str]) -> Any:
    """The module with the sampled basis of one pair (input, output) of field types, None where there are no kernels."""
    return layer.basisexpansion._modules.get(f"block_expansion_{layer.basisexpansion._escape_pair(pair)}")


@dataclass(frozen=True)
class _Space:
    """A space that is compared by its name: escnn cannot hash those of one point."""

    name: str
    gspace: Any = field(compare=False)


@constant(512)
def _averaged(
    named: _Space, out: Any, into: Any, grid: bytes, shape: tuple[int, int]
) -> tuple[LocalKernels | None, tuple[Tensor, ...]]:
    """The kernels that a finite group leaves alone, None where it does not permute the grid; orbits of what does."""
    space = named.gspace
    if space.fibergroup.continuous:
        return None, ()
    elements = space.fibergroup.elements
    points = torch.from_numpy(np.frombuffer(grid).reshape(shape).copy())
    still = np.eye(shape[1])  # a space of one point has no action
    matrices = np.stack([space.basespace_action(g) if space.dimensionality else still for g in elements])
    moves, exact = permuted(points, torch.from_numpy(matrices))
    outputs, inputs = (torch.from_numpy(np.stack([r(g) for g in elements])).double() for r in (out, into))
    if bool(exact.all()) and _orthogonal(outputs) and _orthogonal(inputs):
        return averaged(outputs, inputs, moves, [elements.index(g) for g in space.fibergroup.generators]), ()
    return None, orbits_of(outputs[exact], inputs[exact], moves[exact])


def _orthogonal(matrices: Tensor) -> bool:
    return torch.allclose(matrices @ matrices.mT, torch.eye(matrices.shape[-1], dtype=matrices.dtype), atol=1e-6)


def _methods(base: type[nn.Module]) -> Methods:
    plain: Any = base

    def expand_parameters(self: Any) -> tuple[Tensor, Tensor | None]:
        kernel, bias = plain.expand_parameters(self)
        term = self.non_equivariant
        return (kernel + term.matrix() if term.active else kernel), bias

    def forward(self: Any, input: Any) -> Any:
        result = plain.forward(self, input)
        if self.non_equivariant.active:
            self.non_equivariant.observe(input.tensor, result.tensor)
        return result

    def train(self: Any, mode: bool = True) -> Any:
        self.non_equivariant.train(mode)  # first, for the base class caches the kernel before it reaches its children
        return plain.train(self, mode)

    def export(self: Any) -> nn.Module:
        exported: nn.Module = plain.export(self)
        if self.non_equivariant.active:
            warnings.warn(
                f"the exported {type(exported).__name__} contains the non-equivariant term of a relaxed "
                f"{base.__name__}: call ce.finalize(model) first, or export within ce.disabled(model)",
                stacklevel=2,
            )
        return exported

    return {"expand_parameters": expand_parameters, "forward": forward, "train": train, "export": export}


def _fold(layer: Any, equivariant: Tensor, inputs: object = None) -> Tensor:
    """Write a kernel into the expansion coefficients by least squares, of minimal norm where the basis is redundant."""
    if "weights" not in layer._parameters:  # computed from others, as by torch.nn.utils.parametrize
        return torch.zeros_like(equivariant)
    expansion, kernels = layer.basisexpansion, layer.non_equivariant.projection
    change = torch.zeros_like(layer.weights)
    for pair, (start, stop) in expansion._weights_ranges.items():
        basis = _block(layer, pair).sampled_basis
        blocks = kernels.blocks(equivariant, (pair[1], basis.shape[1]), (pair[0], basis.shape[2]))
        inverse = torch.linalg.pinv(basis.double().flatten(1), rtol=_FLOOR)
        change[start:stop] = (blocks.double() @ inverse).flatten()
    layer.weights.add_(change)
    kernel: Tensor = expansion(change)
    return (kernel.transpose(0, 1) if kernels.transposed else kernel).reshape(equivariant.shape)


def _refresh(layer: Any) -> None:
    if not layer.training:
        layer.training = True  # escnn caches the kernel on the way from training to evaluation
        layer.train(False)


def _volume(stride: int | tuple[int, ...], dimension: int) -> int:
    return math.prod(stride) if isinstance(stride, tuple) else int(stride**dimension)


def _field(representation: Any) -> Field:
    return representation.name, representation.size


def _words(representations: tuple[Any, ...]) -> str:
    return " + ".join(f"{len(list(copies))}x{name}" for name, copies in groupby(r.name for r in representations))
