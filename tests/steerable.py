"""escnn layers for the table of cases, on plain tensors, sharp enough for laws in float64; with how a group moves them.

escnn is imported inside the functions. Its layers are built in float32, as they must be, then an own copy is moved to
float64 and its float32 bases are averaged over what acts exactly on the grid. The actions use escnn's representations
on the channels and `ce.actions.pixels` on the grid, and nothing of the library's projections.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import constrained_equiv as ce
from constrained_equiv import groups

_CLOSE = 1e-6


class Steerable(nn.Module):
    """An escnn layer or network on plain tensors, whose kernels are expanded anew in evaluation mode too.

    In evaluation escnn caches kernels under keys of their own, which tests/adapters/test_escnn.py is about.
    """

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(self.layers.in_type(features)).tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> "Steerable":
        """Copy the modules, but not the spaces and analytic bases that they share: escnn cannot copy all of them."""
        for own in map(vars, self.layers.modules()):
            spaces = (own[name].gspace for name in ("in_type", "out_type") if name in own)
            shared = (*spaces, *(own[name] for name in ("space", "basis") if name in own))
            memo |= {id(one): one for one in shared}
        make, arguments, state = self.__reduce_ex__(4)[:3]
        replica = make(*arguments)
        memo[id(self)] = replica
        replica.__setstate__(copy.deepcopy(state, memo))
        return replica

    def train(self, mode: bool = True) -> "Steerable":
        super().train(mode)
        for layer in self.layers.modules():
            if hasattr(layer, "expand_parameters"):
                layer.train()
                for child in layer.children():
                    child.train(mode)
        return self


def sharp(make: Callable[[], nn.Module]) -> nn.Module:
    """Build an escnn module in float32 and return it on plain tensors, in torch's default dtype."""
    wanted = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        model = copy.deepcopy(Steerable(make())).double()  # escnn shares bases between layers: cast a copy alone
    finally:
        torch.set_default_dtype(wanted)
    for layer in model.modules():
        for name, buffer in layer.named_buffers(recurse=False):
            setattr(layer, name, buffer.contiguous())  # indices that overlap in memory cannot be loaded
        if hasattr(layer, "basisexpansion"):
            _sharpen(layer)
    return model.train().to(wanted)


def _sharpen(layer: Any) -> None:
    expansion = layer.basisexpansion
    points = torch.from_numpy(expansion.points)
    elements = lattice_elements(layer.space)
    for into in set(expansion._in_reprs):
        for out in set(expansion._out_reprs):
            name = f"block_expansion_{expansion._escape_pair((into.name, out.name))}"
            if (block := expansion._modules.get(name)) is None or not elements:
                continue
            moved = []
            for g, matrix in elements:
                order = torch.cdist(points @ matrix.T, points).argmin(1)
                left, right = torch.from_numpy(out(g)).double(), torch.from_numpy(into(g)).double()
                moved.append(torch.einsum("oi,nojs,jk->niks", left, block.sampled_basis[..., order], right))
            block.sampled_basis = torch.stack(moved).mean(0)


def lattice_elements(space: Any) -> list[tuple[Any, Tensor]]:
    """The elements of a space's group, and their matrices, that permute the points of a grid."""
    group = space.fibergroup
    if space.dimensionality == 0:
        return [] if group.continuous else [(g, torch.eye(1, dtype=torch.float64)) for g in group.elements]
    if group.name == "SO(2)":
        elements = [group.element(k * torch.pi / 2, "radians") for k in range(4)]
    elif group.name == "O(2)":
        elements = [group.element((flip, k * torch.pi / 2), "radians") for flip in range(2) for k in range(4)]
    elif group.name == "SO(3)":
        elements = [group.element(g.numpy(), "MAT") for g in cube().elements()]
    elif group.name == "O(3)":
        elements = [group.element((flip, g.numpy()), "MAT") for flip in range(2) for g in cube().elements()]
    else:
        elements = group.elements
    pairs = [(g, torch.from_numpy(space.basespace_action(g)).double()) for g in elements]
    return [(g, matrix) for g, matrix in pairs if (matrix - matrix.round()).abs().max() < _CLOSE]


def cube(*, inversion: bool = False) -> ce.groups.Group:
    """The rotations of the cube, and its reflections if the inversion is one of the generators."""
    about_z = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])
    about_x = torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    name, more = ("cube and inversion", [-torch.eye(3)]) if inversion else ("cube", [])
    return groups.matrix_group(name, generators=torch.stack([about_z, about_x, *more]))


def mirror() -> ce.groups.Group:
    """The reflection of the plane from left to right."""
    return groups.matrix_group("mirror", generators=torch.tensor([[[-1.0, 0.0], [0.0, 1.0]]]))


def on_fields(make: Callable[[], Any], group: ce.groups.Group) -> ce.Symmetry:
    """How lattice motions move fields: channels by escnn's representations, the grid by itself."""
    model = make()
    pairs = lattice_elements(model.in_type.gspace)

    def action(field: Any) -> Callable[[Tensor, Tensor], Tensor]:
        def act(element: Tensor, features: Tensor) -> Tensor:
            g = next(g for g, matrix in pairs if (matrix - element).abs().max() < _CLOSE)
            moved = torch.einsum("oc,nc...->no...", torch.as_tensor(field.representation(g)).to(features), features)
            return voxels(element, moved) if features.ndim == 5 else ce.actions.pixels(element, moved)

        return act

    return ce.Symmetry(group, action(model.in_type), action(model.out_type))


def voxels(element: Tensor, volumes: Tensor) -> Tensor:
    """Move volumes (..., size, size, size) by a rotation of the cube; the axes are -z, -y and x."""
    size = volumes.shape[-1]
    steps = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    z, y, x = torch.meshgrid(-steps, -steps, steps, indexing="ij")
    sources = (torch.stack([x, y, z], -1) @ element) * torch.tensor([1.0, -1.0, -1.0], dtype=torch.float64)
    column, row, layer = (sources + (size - 1) / 2).round().long().unbind(-1)
    return volumes[..., layer, row, column]


def on_fibres(make: Callable[[], Any], group: ce.groups.Group) -> ce.Symmetry:
    """How a group moves the features of a linear layer."""
    layer = make()
    acting = layer.in_type.fibergroup

    def find(element: Tensor) -> Any:
        reflects = int(torch.linalg.det(element) < 0)
        if element.shape[-1] == 3:
            rotation = (element * (1 - 2 * reflects)).numpy()
            return acting.element((reflects, rotation) if group.name == "O(3)" else rotation, "MAT")
        angle, flips = float(torch.atan2(element[1, 0], element[0, 0])), group.name in ("D_3", "O(2)")
        if group.order is not None:
            turns = acting.rotation_order if flips else group.order
            angle = round(angle * turns / (2 * torch.pi)) % turns
        return acting.element((reflects, angle) if flips else angle, "int" if group.order else "radians")

    def action(field: Any) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda element, x: x @ torch.as_tensor(field.representation(find(element))).to(x).T

    return ce.Symmetry(group, action(layer.in_type), action(layer.out_type))


def linear(name: str) -> nn.Module:
    """A linear layer between unsorted and repeated irreps, and the regular representation of a finite group."""
    from escnn import group, gspaces
    from escnn import nn as enn

    acting, (a, b, c) = {
        "C_8": (group.cyclic_group(8), [(1,), (0,), (3,)]),
        "D_3": (group.dihedral_group(3), [(1, 1), (0, 0), (1, 0)]),
        "cube": (group.octa_group(), [(1,), (3,), (2,)]),
        "SO(2)": (group.so2_group(4), [(1,), (0,), (2,)]),
        "O(2)": (group.o2_group(4), [(1, 1), (0, 0), (1, 0)]),
        "SO(3)": (group.so3_group(4), [(1,), (0,), (2,)]),
        "O(3)": (group.o3_group(4), [(1, 1), (0, 0), (1, 0)]),
    }[name]
    space = gspaces.no_base_space(acting)
    a, b, c = (acting.irrep(*irrep) for irrep in (a, b, c))
    regular = [] if acting.continuous or name == "cube" else [acting.regular_representation]
    return enn.Linear(space.type(a, b, a, *regular), space.type(*regular, c, a, b))


def planar(name: str, *, transposed: bool = False, **options: Any) -> nn.Module:
    """A convolution of the plane between mixed field types; of several like fields where it has groups."""
    from escnn import gspaces
    from escnn import nn as enn

    if name == "D_4":
        space = gspaces.flipRot2dOnR2(4)
        regular, quotient, vector = space.regular_repr, space.quotient_repr((None, 2)), space.irrep(1, 1)
        inputs, outputs = [vector, regular, vector], [quotient, vector, regular]
    elif name == "D_8":
        space = gspaces.flipRot2dOnR2(8)
        quotient, vector = space.quotient_repr((0, 1)), space.irrep(1, 1)
        inputs, outputs = [vector, quotient], [quotient, space.irrep(1, 3), space.irrep(1, 0)]
    elif name == "SO(2)":
        space = gspaces.rot2dOnR2(-1, 3)
        inputs = outputs = [space.irrep(1), space.irrep(0), space.irrep(1)]
    elif name == "O(2)":
        space = gspaces.flipRot2dOnR2(-1, 3)
        inputs, outputs = ([space.irrep(1, 1), space.irrep(parity, 0), space.irrep(1, 1)] for parity in range(2))
    elif name == "flips":
        space = gspaces.flip2dOnR2()
        inputs, outputs = [space.regular_repr, space.irrep(1)], [space.irrep(1), space.regular_repr]
    else:
        space = gspaces.rot2dOnR2(int(name.removeprefix("C_")))
        inputs, outputs = [space.irrep(1), space.regular_repr], [space.regular_repr, space.trivial_repr]
    repeat = options.get("groups", 1)
    layer = enn.R2ConvTransposed if transposed else enn.R2Conv
    return layer(space.type(*inputs * repeat), space.type(*outputs * repeat), kernel_size=3, **options)


def volume(name: str, *, transposed: bool = False, **options: Any) -> nn.Module:
    """A convolution of volumes between scalars and vectors; of several like fields where it has groups."""
    from escnn import gspaces
    from escnn import nn as enn

    space, scalar, vector = {
        "cube": lambda: (gspaces.octaOnR3(), (0,), (1,)),
        "cube and inversion": lambda: (gspaces.fullOctaOnR3(), ((0,), (0,)), ((1,), (1,))),
        "SO(3)": lambda: (gspaces.rot3dOnR3(maximum_frequency=2), (0,), (1,)),
        "O(3)": lambda: (gspaces.flipRot3dOnR3(maximum_frequency=2), (0, 0), (1, 1)),
    }[name]()
    fields = [space.fibergroup.irrep(*irrep) for irrep in (scalar, vector)]
    repeat = options.get("groups", 1)
    layer = enn.R3ConvTransposed if transposed else enn.R3Conv
    return layer(space.type(*fields * repeat), space.type(*fields[::-1] * repeat), kernel_size=3, **options)


def network() -> nn.Module:
    """Vector fields to vector fields, through regular fields with batch normalisation."""
    from escnn import gspaces
    from escnn import nn as enn

    space = gspaces.rot2dOnR2(4)
    vector, regular = space.type(space.irrep(1)), space.type(*[space.regular_repr] * 2)
    return enn.SequentialModule(
        enn.R2Conv(vector, regular, 3, padding=1, bias=False),
        enn.InnerBatchNorm(regular),
        enn.ReLU(regular),
        enn.R2Conv(regular, vector, 3, padding=1),
    )
