"""A zoo of networks, each with one layer that subtly breaks the symmetry, beside its correct twin.

A `Pair` states where the loss is and which words of the audit's reason point at it. Builders draw weights from torch's
global generator, in torch's default dtype, which the test sets.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from constrained_equiv import Symmetry, actions, groups
from constrained_equiv import representations as reps

norm = torch.linalg.vector_norm
O3, E3, S5, D4 = groups.O3(), groups.E3(), groups.symmetric(5), groups.dihedral(4)
CHANNELS = 4

ROWS = actions.along(reps.vectors(1), -1)
VECTORS = Symmetry(O3, ROWS, ROWS)  # (batch, channels, 3)
INVARIANT = Symmetry(O3, ROWS, None)
NODES = Symmetry(S5, actions.permute(-2), actions.permute(-2))
SET = Symmetry(S5, actions.permute(-2), None)
IMAGES = Symmetry(D4, actions.pixels, actions.pixels)
POINTS = Symmetry(E3, actions.points, actions.points)
ENERGY = Symmetry(E3, actions.points, None)


class Function(nn.Module):
    """A function as a module, with the name that a reader of the audit sees."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *arguments: Any) -> Any:
        return self.function(*arguments)


class Mix(nn.Module):
    """Mix the channels of vectors (batch, channels, 3)."""

    def __init__(self, inputs: int = CHANNELS, outputs: int = CHANNELS, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.full((3,), 0.1)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        mixed = torch.einsum("oc,ncd->nod", self.weight, x)
        return mixed if self.bias is None else mixed + self.bias


class Norms(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return norm(x, dim=-1)


class Gate(nn.Module):
    """Scale vectors by a function of their length."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(norm(x, dim=-1, keepdim=True))


class NormPool(nn.Module):
    """The longest vector of each window of channels."""

    def forward(self, x: Tensor) -> Tensor:
        windows = x.unflatten(1, (-1, 2))
        best = norm(windows, dim=-1).argmax(2)
        return windows.gather(2, best[..., None, None].expand(-1, -1, 1, 3)).squeeze(2)


class VectorNorm(nn.Module):
    """Divide vectors by the root mean square of their lengths over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().sum(-1).mean(0)[None, :, None] + 1e-5).sqrt()


class Transposed(nn.Module):
    """Apply a module with the last two axes exchanged."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.mT).mT


class Symmetric(nn.Conv2d):
    """A convolution whose kernel is averaged over quarter turns and flips."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        turned = [torch.rot90(weight, k, (-2, -1)) for k in range(4)]
        return super()._conv_forward(x, sum(k + k.flip(-1) for k in turned) / 8, bias)


class Residual(nn.Module):
    """x + 0.1 * (something of x), in the module's own code."""

    def __init__(self, inner: nn.Module, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.change = inner, change

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 0.1 * self.change(x)


class Neighbours(nn.Module):
    """Mean offset to the k nearest points (batch, n, 3)."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
        chosen = distance.topk(self.k, largest=False).indices
        near = x.unsqueeze(1).expand(-1, x.shape[1], -1, -1).gather(2, chosen[..., None].expand(-1, -1, -1, 3))
        return x + (near - x.unsqueeze(2)).mean(2)


class Weighted(nn.Module):
    """Mean offset to all points (batch, n, 3), weighted by distance: no choice to be made among equals."""

    def forward(self, x: Tensor) -> Tensor:
        offsets = x.unsqueeze(1) - x.unsqueeze(2)
        return x + (offsets * torch.exp(-offsets.square().sum(-1, keepdim=True))).mean(2)


class Pairs(nn.Module):
    """A function of the points (batch, n, 3) from their distances."""

    def __init__(self, center: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.center = center
        self.head = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.center(x)
        between = x.unsqueeze(-2) - x.unsqueeze(-3)
        return self.head(torch.exp(-between.square().sum(-1, keepdim=True))).mean((-3, -2))


def train(module: nn.Module) -> nn.Module:
    return module.train()


class Pair(NamedTuple):
    """One broken network and its twin.

    Attributes:
        name: what is wrong.
        broken: builds it, in the mode in which it is to be run.
        twin: builds the correct one.
        inputs: shape of a Gaussian input, or makes it in a dtype.
        symmetry: of both.
        where: name of the culprit in the broken network.
        words: a pattern in the audit's reason or notes.
    """

    name: str
    broken: Callable[[], nn.Module]
    twin: Callable[[], nn.Module]
    inputs: tuple[int, ...] | Callable[[torch.dtype], Tensor]
    symmetry: Symmetry
    where: str
    words: str


X = (6, CHANNELS, 3)


def network(*parts: nn.Module) -> nn.Module:
    return nn.Sequential(*parts).eval()


def lattice(dtype: torch.dtype) -> Tensor:
    """Points with equal distances."""
    corners = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]], dtype=dtype)
    return torch.stack([corners, 2 * corners])


ZOO = (
    Pair("layer norm over x, y, z", lambda: network(Mix(), nn.LayerNorm(3), Mix()),
         lambda: network(Mix(), VectorNorm(), Mix()), X, VECTORS, "1", "normalises across the components"),
    Pair("root mean square norm with weights per component", lambda: network(Mix(), weighted(nn.RMSNorm(3))),
         lambda: network(Mix(), nn.RMSNorm(3)), X, VECTORS, "1", "normalises across the components"),
    Pair("linear layer on components", lambda: network(Mix(), nn.Linear(3, 3, bias=False)),
         lambda: network(Mix(), Transposed(nn.Linear(CHANNELS, 3, bias=False))), X, VECTORS, "1", "weights mix"),
    Pair("linear layer to scalars", lambda: network(Mix(), nn.Linear(3, 1)), lambda: network(Mix(), Norms()),
         X, INVARIANT, "1", "weights mix"),
    Pair("pointwise nonlinearity", lambda: network(Mix(), nn.ReLU(), Mix()), lambda: network(Mix(), Gate(), Mix()),
         X, VECTORS, "1", "nonlinearity of each component"),
    Pair("odd pointwise nonlinearity", lambda: network(Mix(), nn.Tanh()), lambda: network(Mix(), Gate()),
         X, VECTORS, "1", "nonlinearity of each component"),
    Pair("bias on vectors", lambda: network(Mix(), Mix(bias=True)), lambda: network(Mix(), Mix()),
         X, VECTORS, "1", "bias is added"),
    Pair("bias of a linear layer over channels", lambda: network(Mix(), Transposed(nn.Linear(CHANNELS, CHANNELS))),
         lambda: network(Mix(), Transposed(nn.Linear(CHANNELS, CHANNELS, bias=False))), X, VECTORS, "1.inner", "bias"),
    Pair("batch statistics per component", lambda: train(nn.Sequential(Mix(), Flat(nn.BatchNorm1d(3 * CHANNELS)))),
         lambda: train(nn.Sequential(Mix(), VectorNorm())), X, VECTORS, "1.inner", "statistics of the batch"),
    Pair("running statistics per component", lambda: network(Mix(), used(Flat(nn.BatchNorm1d(3 * CHANNELS)))),
         lambda: network(Mix(), VectorNorm()), X, VECTORS, "1.inner", "each component by itself"),
    Pair("dropout on", lambda: nn.Sequential(Mix(), Norms(), nn.Dropout(0.5)).train(),
         lambda: network(Mix(), Norms(), nn.Dropout(0.5)), X, INVARIANT, "2", "dropout is on"),
    Pair("dropout of components", lambda: nn.Sequential(Mix(), nn.Dropout(0.1)).train(),
         lambda: network(Mix(), nn.Dropout(0.1)), X, VECTORS, "1", "dropout is on"),
    Pair("largest component before the length", lambda: network(Mix(), Transposed(nn.MaxPool1d(2)), Norms()),
         lambda: network(Mix(), NormPool(), Norms()), X, INVARIANT, "1.inner", "largest of each component"),
    Pair("pooled over x, y, z", lambda: network(Mix(), nn.AvgPool1d(3)), lambda: network(Mix(), Norms()),
         X, INVARIANT, "1", ""),
    Pair("parity: a cross product called polar", lambda: network(Mix(), Function(turned)),
         lambda: network(Mix(), Function(twice_turned)), X, VECTORS, "1", ""),
    Pair("in the module's own code", lambda: network(Mix(), Residual(Mix(), torch.abs)),
         lambda: network(Mix(), Residual(Mix(), torch.neg)), X, VECTORS, "1", ""),
    Pair("strided convolution on an even grid", lambda: network(Symmetric(2, 2, 3, stride=2, padding=1)),
         lambda: network(Symmetric(2, 2, 4, stride=2, padding=1)), (1, 2, 6, 6), IMAGES, "0",
         "stride 2 on a grid of 6"),
    Pair("pooling that leaves a row over", lambda: network(nn.MaxPool2d(2), Symmetric(2, 2, 3, padding=1)),
         lambda: network(nn.MaxPool2d(3), Symmetric(2, 2, 3, padding=1)), (1, 2, 9, 9), IMAGES, "0", "stride 2"),
    Pair("an unconstrained kernel", lambda: network(Symmetric(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)),
         lambda: network(Symmetric(2, 2, 3, padding=1), Symmetric(2, 2, 3, padding=1)), (1, 2, 5, 5), IMAGES, "1",
         "weights mix"),
    Pair("position encoding on the grid", lambda: network(Function(with_row), Symmetric(2, 2, 3, padding=1)),
         lambda: network(Function(torch.neg), Symmetric(2, 2, 3, padding=1)), (1, 2, 5, 5), IMAGES, "0", ""),
    Pair("order of the points", lambda: network(nn.Linear(3, 3), Function(lambda x: x.cumsum(-2))),
         lambda: network(nn.Linear(3, 3), Function(lambda x: x + x.sum(-2, keepdim=True))), (2, 5, 3), NODES, "1", ""),
    Pair("convolution along the list", lambda: network(nn.Linear(3, 3), Transposed(nn.Conv1d(3, 3, 3, padding=1))),
         lambda: network(nn.Linear(3, 3), Transposed(nn.Conv1d(3, 3, 1))), (2, 5, 3), NODES, "1.inner", "weights mix"),
    Pair("recurrent readout of a set", lambda: network(nn.Linear(3, 3), Function(lambda x: x[..., -1, :])),
         lambda: network(nn.Linear(3, 3), Function(lambda x: x.mean(-2))), (2, 5, 3), SET, "1", ""),
    Pair("absolute positions", lambda: network(Pairs(lambda x: x + 0.1 * x.square())), lambda: network(Pairs()),
         (2, 5, 3), ENERGY, "input 0 of 0.head", "in the code that makes"),
    Pair("centred per point over x, y, z", lambda: network(Pairs(lambda x: x - x.mean(-1, keepdim=True))),
         lambda: network(Pairs(lambda x: x - x.mean(-2, keepdim=True))), (2, 5, 3), ENERGY, "input 0 of 0.head", ""),
    Pair("ties among nearest neighbours", lambda: network(Neighbours(3)), lambda: network(Weighted()),
         lattice, POINTS, "0", "equal distances among nearest neighbours"),
)  # fmt: skip


class Flat(nn.Module):
    """Apply a module to the flattened features."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(1)).view(x.shape)


def used(module: nn.Module) -> nn.Module:
    """A module whose running statistics saw data."""
    module.train()(torch.randn(50, CHANNELS, 3) + torch.tensor([0.5, 0.0, -0.5]))
    return module.eval()


def weighted(layer: nn.RMSNorm) -> nn.RMSNorm:
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 1.0, 1.2]))
    return layer


def turned(x: Tensor) -> Tensor:
    return torch.linalg.cross(x, x.roll(1, 1))


def twice_turned(x: Tensor) -> Tensor:
    return torch.linalg.cross(x, turned(x))


def with_row(x: Tensor) -> Tensor:
    return x + torch.linspace(-1, 1, x.shape[-2], dtype=x.dtype)[:, None]
