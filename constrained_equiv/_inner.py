"""Inner actions: how a group acts on the tensors between the layers of a network.

What enters: a module, a tensor, a `Symmetry`. What leaves: `Known` actions, stated by layers, given by the user or
worth trying, and words for what goes wrong in common layers. Called by the audit.
Law: a statement binds (its failure is an error); a guess that fails says nothing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from constrained_equiv import actions, representations
from constrained_equiv._symmetry import Symmetry
from constrained_equiv._trace import atoms
from constrained_equiv.errors import RepresentationError
from constrained_equiv.groups import O3, Group, factor_of, symmetric
from constrained_equiv.representations import Representation

Element = Callable[[Tensor], Tensor]


class Known(NamedTuple):
    """An action on one tensor.

    Attributes:
        label: in words.
        act: maps an element of the whole group and a tensor.
        source: `stated`, `given`, `kept` or `inferred`.
        binding: whether a failure under it is a loss of equivariance.
    """

    label: str
    act: Callable[[Tensor, Tensor], Tensor]
    source: str
    binding: bool = False

    def move(self, element: Tensor, tensor: Tensor) -> Tensor | None:
        """Return the moved tensor, or None where the action does not fit its shape."""
        try:
            return self.act(element, tensor)
        except (RepresentationError, RuntimeError, IndexError):
            return None


INVARIANT = Known("invariant", lambda element, tensor: tensor, "inferred")


@dataclass(frozen=True)
class Section:
    """Elements that move one factor of the group, and what of them each group sees.

    Attributes:
        name: of the factor.
        elements: (n, d, d) of the whole group.
        views: groups that the whole group contains as a part, and how to read their element from one of the whole.
    """

    name: str
    elements: Tensor
    views: tuple[tuple[Group, Element], ...]

    def moves(self, read: Element) -> bool:
        """Whether the elements of the section move a part of the group at all."""
        seen = read(self.elements)
        return not torch.equal(seen, torch.eye(seen.shape[-1], dtype=seen.dtype).expand_as(seen))

    def view(self, *names: str) -> tuple[Group, Element] | None:
        """Find a part by the name of its group."""
        return next((view for view in self.views if view[0].name in names), None)


class Stated(NamedTuple):
    """What a module says about its arguments and its output."""

    arguments: tuple[Known | None, ...]
    output: Known | None


def sections(group: Group, samples: int, generator: torch.Generator | None) -> list[Section]:
    """Split a group into its factors: discrete generators and random elements of one at a time."""

    def draw(factor: Group) -> Tensor:
        return torch.cat([factor.generators, factor.sample(samples, generator=generator)])

    if not group.factors:
        return [Section(group.name, draw(group), tuple(_views(group, lambda g: g)))]
    views: list[tuple[Group, Element]] = [(group, lambda g: g)]
    for index, factor in enumerate(group.factors):
        views += _views(factor, lambda g, i=index: factor_of(group, g, i))  # type: ignore[misc]
    result = []
    for index, factor in enumerate(group.factors):
        drawn = draw(factor)
        elements = group.identity.repeat(len(drawn), 1, 1)
        factor_of(group, elements, index).copy_(drawn)
        result.append(Section(factor.name, elements, tuple(views)))
    return result


def _views(group: Group, read: Element) -> Iterator[tuple[Group, Element]]:
    yield group, read
    if group.name == "E(3)":
        yield O3(), lambda g: read(g)[..., :3, :3]


def stated(module: nn.Module, section: Section) -> Stated:
    """Read what a module states: e3nn's irreps, or the representations of a relaxed layer's term."""
    space = getattr(getattr(module, "non_equivariant", None), "projection", None)
    first = getattr(module, "irreps_in", getattr(module, "irreps_in1", getattr(space, "inputs", None)))
    second = getattr(module, "irreps_in2", None)
    last = getattr(module, "irreps_out", getattr(space, "outputs", None))
    return Stated((_of_irreps(first, section), _of_irreps(second, section)), _of_irreps(last, section))


def _of_irreps(value: Any, section: Section) -> Known | None:
    if isinstance(value, Representation):
        view = section.view(value.group.name)
    else:
        view = section.view("O(3)", "SO(3)")
    if value is None or view is None:
        return None
    group, read = view
    try:
        representation = representations.as_representation(value, group=group)
    except RepresentationError:  # an attribute of that name with another meaning
        return None

    def act(element: Tensor, tensor: Tensor) -> Tensor:
        return representation.act(read(element), tensor)

    return Known(str(representation), act, "stated", section.moves(read))


def from_symmetry(symmetry: Symmetry, value: Any, which: str, section: Section) -> list[Known | None]:
    """Pair each floating-point tensor of a structure with the action that a `Symmetry` gives it."""
    view = next((view for view in section.views if view[0] == symmetry.group), None)
    if view is None:
        raise RepresentationError(
            f"a layer's symmetry is of {symmetry.group}: expected one of {[str(g) for g, _ in section.views]}"
        )
    action = symmetry.inputs if which == "inputs" else symmetry.outputs
    if which == "inputs" and not isinstance(action, tuple):
        action = (action,)
    return _paired(action, value, view[1], section.moves(view[1]))


def _paired(action: Any, value: Any, read: Element, binding: bool) -> list[Known | None]:
    count = len(atoms(value))
    if isinstance(action, dict) and isinstance(value, dict):
        return [k for key, part in value.items() for k in _paired(action.get(key), part, read, binding)]
    if isinstance(action, tuple | list) and isinstance(value, tuple | list):
        extra = [None] * sum(len(atoms(part)) for part in value[len(action) :])
        pairs = zip(action, value, strict=False)
        return [k for part, entry in pairs for k in _paired(part, entry, read, binding)] + extra
    if action is None:
        return [INVARIANT._replace(source="given", binding=binding)] * count
    if not isinstance(value, Tensor):
        return [None] * count
    move = action.act if isinstance(action, Representation) else action
    return [Known(_label(action), lambda g, t: move(read(g), t), "given", binding)] * count


def _label(action: Any) -> str:
    if isinstance(action, Representation):
        return str(action)
    return str(getattr(action, "__qualname__", type(action).__name__)).split(".")[0]


def guesses(tensor: Tensor, section: Section, symmetry: Symmetry) -> Iterator[Known]:
    """Actions worth trying on a tensor: those of the model's inputs and outputs, and the usual ones of the group."""
    for action in (*_flat(symmetry.inputs), *_flat(symmetry.outputs)):
        move = action.act if isinstance(action, Representation) else action
        yield Known(_label(action), move, "inferred")
    for group, read in section.views:
        if not section.moves(read):
            continue
        for label, move in _usual(tensor, group):
            yield Known(label, _reading(move, read), "inferred")


def _reading(move: Callable[[Tensor, Tensor], Tensor], read: Element) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda element, tensor: move(read(element), tensor)


def _flat(action: Any) -> Iterator[Any]:
    if isinstance(action, dict):
        for part in action.values():
            yield from _flat(part)
    elif isinstance(action, tuple | list):
        for part in action:
            yield from _flat(part)
    elif action is not None:
        yield action


def _usual(tensor: Tensor, group: Group) -> Iterator[tuple[str, Callable[[Tensor, Tensor], Tensor]]]:
    shape, axes = tensor.shape, range(-1, -tensor.ndim - 1, -1)
    fitting = [axis for axis in axes if shape[axis] == group.degree]
    if group == symmetric(group.degree):
        for axis in fitting:
            yield f"permuted along axis {axis}", actions.permute(axis)
        for axis in fitting[1:]:
            yield f"permuted along axes {axis} and {fitting[0]}", actions.permute(axis, fitting[0])
    elif group.name == "E(3)" or group.name.startswith("T("):
        if shape and shape[-1] == group.degree - 1:
            yield "points", actions.points
    elif not group.factors:
        defining = representations.defining(group)
        for axis in fitting:
            yield f"vectors along axis {axis}", actions.along(defining, axis)
        if shape and shape[-1] > group.degree and shape[-1] % group.degree == 0:
            channels = shape[-1] // group.degree
            for layout in ("mul_ir", "ir_mul"):
                vectors = representations.defining(group, channels=channels, layout=layout)
                yield f"{channels} vectors, {layout}", vectors.act
        if group.degree == 2 and group.order is not None and tensor.ndim >= 3:
            yield "pixels", actions.pixels
            if shape[-3] % group.order == 0:
                fields = representations.regular(group, channels=shape[-3] // group.order)
                yield "pixels and regular channels", actions.feature_maps(fields)


def permuted(known: Known, tensor: Tensor, section: Section) -> Iterator[Known]:
    """A stated action of the last axis together with a permutation of another one: layers do not speak of points."""
    for group, read in section.views:
        if group == symmetric(group.degree) and section.moves(read):
            for axis in range(-2, -tensor.ndim - 1, -1):
                if tensor.shape[axis] == group.degree:
                    permute = _reading(actions.permute(axis), read)
                    yield Known(f"{known.label}, permuted along {axis}", actions.chain(known.act, permute), "inferred")


def of_geometric(kind: Any, section: Section) -> Known | None:
    """Read the action on a geometric tensor of escnn from its field type, or None where it cannot be told."""
    if kind is None:
        return None
    group = kind.gspace.fibergroup
    standard = _space_of(kind, group)
    if standard is None or kind.gspace.dimensionality not in (0, 2):
        return None
    size = standard(group.identity).shape[0]
    for ours, read in section.views:
        if ours.degree == size and all(_escnn_element(group, standard, g) is not None for g in read(section.elements)):

            def act(element: Tensor, tensor: Tensor, read: Element = read) -> Tensor:
                small = read(element)
                fibre = torch.as_tensor(kind.representation(_escnn_element(group, standard, small))).to(tensor)
                moved = torch.einsum("ij,bj...->bi...", fibre, tensor)
                return actions.pixels(small, moved) if kind.gspace.dimensionality == 2 else moved

            return Known(f"{kind.size} channels of {kind.gspace.name}", act, "stated", section.moves(read))
    return None


def _space_of(kind: Any, group: Any) -> Any:
    """The matrices by which escnn's group moves space."""
    if kind.gspace.dimensionality:
        return kind.gspace.basespace_action
    try:
        return group.standard_representation()
    except (AttributeError, ValueError, NotImplementedError):  # a group without a matrix form
        return None


def _escnn_element(group: Any, standard: Any, matrix: Tensor) -> Any:
    """Find escnn's element by its matrix."""
    candidates: list[Any]
    if group.order() > 0:
        candidates = list(group.elements)
    else:
        flip = bool(torch.linalg.det(matrix) < 0)
        mirrored = flip and len(matrix) == 2
        proper = matrix @ torch.as_tensor(standard(group.reflection)).to(matrix) if mirrored else matrix
        angle = float(torch.atan2(proper[1, 0], proper[0, 0]))
        candidates = {
            "SO(2)": lambda: [group.element(angle, "radians")],
            "O(2)": lambda: [group.element((int(flip), angle), "radians")],
            "SO(3)": lambda: [group.element(matrix.numpy(), "MAT")],
            "O(3)": lambda: [group.element((int(flip), (-matrix if flip else matrix).numpy()), "MAT")],
        }.get(group.name, list)()
    for candidate in candidates:
        if torch.allclose(torch.as_tensor(standard(candidate)).to(matrix), matrix, atol=1e-5):
            return candidate
    return None


def symmetry_of(stated: Stated, arguments: tuple[Any, ...], group: Group) -> Symmetry | None:
    """Return the symmetry that a module states for itself, if it states its output and all its tensor arguments."""
    known = (*stated.arguments, *[None] * len(arguments))[: len(arguments)]
    if stated.output is None or not arguments:
        return None
    if any(k is None and atoms(argument) for k, argument in zip(known, arguments, strict=True)):
        return None
    return Symmetry(group, tuple(k.act if k else None for k in known), stated.output.act)


_MIXERS: dict[tuple[type[nn.Module], ...], str] = {
    (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm): "normalises each component by itself",
    (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.LocalResponseNorm): "normalises across the components of vectors",
    (
        nn.Linear,
        nn.Bilinear,
        nn.modules.conv._ConvNd,
    ): "its weights mix the components and do not commute with the group",
    (nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd): (
        "takes the largest of each component by itself; pool norms, or the vectors of largest norm"
    ),
}


def culprit(module: nn.Module, tensors: list[Tensor], entering: str) -> str:
    """Say in words why a layer probably breaks the symmetry.

    Args:
        module: the layer.
        tensors: what it took.
        entering: the action on that, empty where everything is invariant.
    """
    if (grid := _uneven(module, tensors)) is not None:
        size, stride, rest = grid
        return (
            f"stride {stride} on a grid of {size}: {rest} points are left over on one side; expected (n + 2 padding - "
            "dilation (kernel - 1) - 1) divisible by the stride"
        )
    if getattr(getattr(module, "non_equivariant", None), "active", False):
        return "its non-equivariant term is on; ce.disabled(model) and ce.finalize(model) take it away"
    statistics = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
    where = f" (acting on it: {entering})" if entering else ""
    for classes, words in _MIXERS.items():
        if isinstance(module, classes):
            return words + (", with the statistics of the batch" if statistics else "") + where
    if type(module).__module__ == "torch.nn.modules.activation":
        return "a nonlinearity of each component by itself" + where
    return "in its own code" + where


def _uneven(module: nn.Module, tensors: list[Tensor]) -> tuple[int, int, int] | None:
    """Return size, stride and remainder where the last window does not end at the border."""
    kernel, stride = getattr(module, "kernel_size", None), getattr(module, "stride", None)
    padding, dilation = getattr(module, "padding", 0), getattr(module, "dilation", 1)
    if kernel is None or isinstance(padding, str) or not tensors or "Transpose" in type(module).__name__:
        return None
    dimensions = len(kernel) if isinstance(kernel, tuple) else tensors[0].ndim - 2
    window = [_spread(value, dimensions) for value in (kernel, stride or kernel, padding, dilation)]
    for size, k, s, p, d in zip(tensors[0].shape[-dimensions:], *window, strict=True):
        if (rest := (size + 2 * p - d * (k - 1) - 1) % s) != 0:
            return size, s, rest
    return None


def _spread(value: Any, dimensions: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (int(value),) * dimensions
