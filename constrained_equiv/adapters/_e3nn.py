"""Adapters for e3nn: `o3.Linear` and the weight-carrying tensor products.

What enters: an e3nn layer. What leaves: adapters that read `irreps_in`, `irreps_in1` and `irreps_out` (attributes that
e3nn has had since 0.4) and know how the layer's own weights span the equivariant maps.
Law: a linear layer and its term are one dense product; a tensor product and its term are two, the second on the first
input only.

A subclass that overrides `forward` keeps it: the term is added to what it returns, and nothing is folded, for nobody
knows what such a layer makes of its weights. So is `TensorSquare`, whose weights are quadratic in the input.
"""

import math
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from constrained_equiv.adapters._base import Adapter, Methods, Site, first_argument
from constrained_equiv.intertwiners import intertwiners


@cache  # the relaxed class of a layer is made once per adapter
def adapters(e3nn_o3: Any) -> tuple[Adapter, ...]:
    """Return the adapters, given the imported module `e3nn.o3`."""
    linear, product = e3nn_o3.Linear, e3nn_o3.TensorProduct

    def is_linear(layer: nn.Module) -> bool:
        return isinstance(layer, linear)

    def is_product(layer: nn.Module) -> bool:
        return isinstance(layer, product) and layer.weight_numel > 0

    return (
        Adapter(
            "e3nn linear",
            is_linear,
            partial(_linear_site, own=linear.forward),
            partial(_linear_methods, own=linear.forward),
            _fold_linear,
        ),
        Adapter(
            "e3nn tensor product",
            is_product,
            partial(_product_site, own=product.forward),
            partial(_product_methods, own=product.forward),
            _fold_product,
        ),
    )


def _site(inputs: Any, outputs: Any, layer: Any, plan: Any = None) -> Site:
    space = intertwiners(inputs, outputs)
    tensors = [t for t in (*layer.parameters(), *layer.buffers()) if t.is_floating_point()]
    like = tensors[0] if tensors else torch.empty(0)
    return Site(space, space.shape, float(max(space.shape[0], 1)), str(inputs), str(outputs), like, plan)


def _linear_site(layer: Any, *, own: Any) -> Site:
    plan = _plan(layer, type(layer).forward is own)
    into, out = (axis or 1 for axis in plan.features)
    return _site(layer.irreps_in * into, layer.irreps_out * out, layer, plan)


def _product_site(layer: Any, *, own: Any) -> Site:
    return _site(layer.irreps_in1, layer.irreps_out, layer, _Product(type(layer).forward is own))


def _linear_methods(base: Any, *, own: Any) -> Methods:
    def forward(self: Any, features: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        term = self.non_equivariant
        if not term.active:
            return base.forward(self, features, weight, bias)  # type: ignore[no-any-return]
        if weight is None and bias is None and self.internal_weights and term.plan.features == (None, None):
            result = nn.functional.linear(
                features, _add_equivariant(self, term.plan, term.matrix()), _dense_bias(self, term.plan)
            )
            term.observe(features, result)
            return result
        return _added(self, features, base.forward(self, features, weight, bias))

    return {"forward": forward if base.forward is own else _adding(base)}


def _product_methods(base: Any, *, own: Any) -> Methods:
    def forward(self: Any, x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
        result: Tensor = base.forward(self, x, y, weight)
        return _added(self, x, result) if self.non_equivariant.active else result

    def right(self: Any, y: Tensor, weight: Tensor | None = None) -> Tensor:
        matrix: Tensor = base.right(self, y, weight)
        return matrix + self.non_equivariant.matrix().T if self.non_equivariant.active else matrix

    return {"forward": forward if base.forward is own else _adding(base), "right": right}


def _adding(base: Any) -> Any:
    """A forward pass of any signature whose first argument is the features."""
    first = first_argument(base)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = base.forward(self, *args, **kwargs)
        return _added(self, first(args, kwargs), result) if self.non_equivariant.active else result

    return forward


def _added(layer: Any, features: Tensor, result: Tensor) -> Tensor:
    """Add the term to a result; a linear layer with feature axes has them before the irreps, (..., f, irreps)."""
    term = layer.non_equivariant
    into, out = term.plan.features
    rows = features if into is None else features.flatten(-2)
    target = result if out is None else result.flatten(-2)
    result = term.added_to(target, rows).view(result.shape)
    term.observe(rows, result)
    return result


class _Product(NamedTuple):
    own: bool  # whether `forward` is e3nn's, so that weights mean what their instructions say
    features: tuple[None, None] = (None, None)


class _Path(NamedTuple):
    """One linear path of the layer: where its block and its weights are, as plain numbers that a compiler can read."""

    rows: slice
    columns: slice
    dim: int
    factor: float
    weights: slice
    shape: tuple[int, int]

    def view(self, weight: Tensor) -> Tensor:
        return weight[self.weights].view(self.shape)


class _Plan(NamedTuple):
    own: bool  # as of `_Product`
    features: tuple[int | None, int | None]  # f_in, f_out
    outputs: int
    paths: tuple[_Path, ...]
    biases: tuple[tuple[slice, float, slice], ...]  # rows, factor, entries of the flat bias


def _plan(layer: Any, own: bool) -> _Plan:
    columns, rows = layer.irreps_in.slices(), layer.irreps_out.slices()
    paths, biases = [], []
    at_weight = at_bias = 0
    for path in layer.instructions:
        size = math.prod(path.path_shape)
        if path.i_in == -1:
            biases.append((rows[path.i_out], float(path.path_weight), slice(at_bias, at_bias + size)))
            at_bias += size
        elif size:
            dim = layer.irreps_in[path.i_in].ir.dim
            entries = slice(at_weight, at_weight + size)
            where = rows[path.i_out], columns[path.i_in]
            paths.append(_Path(*where, dim, float(path.path_weight), entries, tuple(path.path_shape)))
            at_weight += size
    features = tuple(layer.weight.shape[:2]) if layer.weight.ndim > 1 else (None, None)
    return _Plan(own, features, layer.irreps_out.dim, tuple(paths), tuple(biases))


def _copies(matrix: Tensor, path: _Path) -> Tensor:
    """View one block (mul_out d, mul_in d) as the (mul_out, mul_in, d) numbers that multiply identities."""
    inputs, outputs = path.shape
    block = matrix[path.rows, path.columns].view(outputs, path.dim, inputs, path.dim)
    return block.diagonal(dim1=1, dim2=3)


def _add_equivariant(layer: Any, plan: _Plan, matrix: Tensor) -> Tensor:
    """Add the layer's own map, as a dense matrix, to a fresh matrix (out, in)."""
    for path in plan.paths:
        _copies(matrix, path).add_(path.view(layer.weight).T.unsqueeze(-1), alpha=path.factor)
    return matrix


def _dense_bias(layer: Any, plan: _Plan) -> Tensor | None:
    if not plan.biases:
        return None
    dense: Tensor = layer.bias.new_zeros(plan.outputs)
    for rows, factor, entries in plan.biases:
        dense[rows] = factor * layer.bias[entries]
    return dense


def _fold_linear(layer: Any, equivariant: Tensor, inputs: object = None) -> Tensor:
    """Write the block multiples of the identity into the path weights, for every pair of feature axes if there are."""
    plan, written = layer.non_equivariant.plan, torch.zeros_like(equivariant)
    if not plan.own or "weight" not in layer._parameters:
        return written
    into, out = (axis or 1 for axis in plan.features)
    shape = out, layer.irreps_out.dim, into, layer.irreps_in.dim
    for i in range(into):
        for o in range(out):
            weight = layer.weight[i, o] if plan.features != (None, None) else layer.weight
            _fold_paths(plan.paths, weight, equivariant.view(shape)[o, :, i], written.view(shape)[o, :, i])
    return written


def _fold_paths(paths: tuple[_Path, ...], weight: Tensor, equivariant: Tensor, written: Tensor) -> None:
    """Write one map into weights; paths that are repeated share it with minimal norm."""
    strength: dict[tuple[int, int], float] = {}
    for path in paths:
        block = path.rows.start, path.columns.start
        strength[block] = strength.get(block, 0.0) + path.factor**2
    for path in paths:
        share = path.factor / strength[path.rows.start, path.columns.start]
        change = _copies(equivariant, path).mean(-1)
        path.view(weight).add_(change.T, alpha=share)
        _copies(written, path).add_(change.unsqueeze(-1), alpha=share * path.factor)


def _fold_product(layer: Any, equivariant: Tensor, inputs: tuple[Any, ...] | None) -> Tensor:
    """Write multiples of the identity into the `uvw` paths through scalars of the second input that are constant.

    With such scalars y_v, a path maps copy u to copy w by sum_v path_weight y_v weight[u, v, w] / sqrt(d).
    """
    written = torch.zeros_like(equivariant)
    own = layer.non_equivariant.plan.own and "weight" in layer._parameters
    if not own or inputs is None or len(inputs) < 2:
        return written
    constants = _constant_scalars(layer.irreps_in2, inputs[1])
    rows, columns = layer.irreps_out.slices(), layer.irreps_in1.slices()
    found = []
    strength: dict[tuple[int, int], float] = {}
    for _, path, weight in layer.weight_views(yield_instruction=True):
        block, dim = (path.i_out, path.i_in1), layer.irreps_out[path.i_out].ir.dim
        if path.connection_mode == "uvw" and path.i_in2 in constants:
            response = constants[path.i_in2].to(weight) * (float(path.path_weight) * dim**-0.5)
            multiplicities = layer.irreps_in1[path.i_in1].mul, layer.irreps_out[path.i_out].mul
            place = _Path(rows[path.i_out], columns[path.i_in1], dim, 1.0, slice(0), multiplicities)
            found.append((block, place, weight, response))
            strength[block] = strength.get(block, 0.0) + float(response.square().sum())
    for block, place, weight, response in found:
        share = response / strength[block]
        change = _copies(equivariant, place).mean(-1)
        weight.add_(change.T.unsqueeze(1) * share.view(1, -1, 1))
        _copies(written, place).add_(change.unsqueeze(-1) * (share @ response))
    return written


def _constant_scalars(irreps: Any, features: Tensor) -> dict[int, Tensor]:
    """Find the even scalars with one value on a whole batch of two or more; others of their block count as zero."""
    constants = {}
    for i, ((mul, ir), where) in enumerate(zip(irreps, irreps.slices(), strict=True)):
        values = features[..., where].detach().reshape(-1, mul * ir.dim)
        if ir.dim == 1 and ir.p == 1 and mul and len(values) > 1:
            lowest, highest = values.aminmax(dim=0)
            constant = highest - lowest <= 16 * torch.finfo(values.dtype).eps * highest.abs()
            if bool((constant & (highest != 0)).any()):
                constants[i] = torch.where(constant, highest, 0.0)
    return constants
