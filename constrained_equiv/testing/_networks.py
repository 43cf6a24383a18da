"""Networks: small equivariant models with inputs and symmetry, for tests of tools that take any model.

What enters: nothing. What leaves: a strategy of `Network` records.
Law: every network is equivariant to rounding in its dtype, by construction.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy
from torch import Tensor, nn

from constrained_equiv import actions, groups, representations
from constrained_equiv._symmetry import Symmetry


class Network(NamedTuple):
    """A small model, an input for it, and what it is equivariant to."""

    name: str
    model: nn.Module
    inputs: Any
    symmetry: Symmetry


class _Gated(nn.Module):
    """Mix vectors (batch, channels, 3) and scale each by a function of the lengths."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(channels, channels) / channels**0.5)
        self.gate = nn.Linear(channels, channels)

    def forward(self, vectors: Tensor) -> Tensor:
        mixed = torch.einsum("oc,ncd->nod", self.mix, vectors)
        return mixed * torch.sigmoid(self.gate(mixed.square().sum(-1))).unsqueeze(-1)


class _Energy(nn.Module):
    """Energy and forces of points (batch, n, 3) from their distances."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.pair = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, positions: Tensor) -> dict[str, Tensor]:
        with torch.enable_grad():
            start = positions.clone().requires_grad_()
            between = start.unsqueeze(-2) - start.unsqueeze(-3)
            energy = self.pair(torch.exp(-between.square().sum(-1, keepdim=True))).sum((-3, -2, -1))
            (slope,) = torch.autograd.grad(energy.sum(), start, create_graph=True)
        return {"energy": energy, "forces": -slope}


class _DeepSet(nn.Module):
    """Mix the channels of points (batch, n, channels) with those of their mean."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.own, self.mean = nn.Linear(channels, channels), nn.Linear(channels, channels)

    def forward(self, points: Tensor) -> Tensor:
        return torch.tanh(self.own(points) + self.mean(points.mean(-2, keepdim=True)))


class _Filter(nn.Module):
    """Convolve images (batch, channels, h, w) by kernels averaged over quarter turns and flips."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(channels, channels, 3, 3) / 3)

    def forward(self, images: Tensor) -> Tensor:
        turned = [torch.rot90(self.kernel, k, (-2, -1)) for k in range(4)]
        average = sum((k + k.flip(-1) for k in turned), torch.zeros_like(self.kernel)) / 8
        return torch.relu(nn.functional.conv2d(images, average, padding=1))


class _Minkowski(nn.Module):
    """A function of all inner products of four-vectors (batch, n, 4)."""

    def __init__(self, particles: int) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(particles**2, 4), nn.Tanh(), nn.Linear(4, 1))
        self.register_buffer("metric", torch.tensor([1.0, -1.0, -1.0, -1.0]))

    def forward(self, momenta: Tensor) -> Tensor:
        products: Tensor = torch.einsum("nia,a,nja->nij", momenta, self.metric, momenta)
        result: Tensor = self.head(products.flatten(1) / 10)
        return result


def _moved(action: actions.Action) -> Callable[[groups.Group], Symmetry]:
    return lambda group: Symmetry(group, action, action)


_VECTORS = actions.along(representations.vectors(1), -1)
_TABLE: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...], Callable[[], Symmetry]]] = {
    "deep set": (_DeepSet, (2, 5, 0), lambda: _moved(actions.permute(-2))(groups.symmetric(5))),
    "gated vectors": (_Gated, (4, 0, 3), lambda: _moved(_VECTORS)(groups.O3())),
    "energy and forces": (
        _Energy,
        (2, 4, 3),
        lambda: Symmetry(groups.E3(), actions.points, {"energy": None, "forces": actions.vectors}),
    ),
    "filter": (_Filter, (1, 0, 6, 6), lambda: _moved(actions.pixels)(groups.dihedral(4))),
    "four-vectors": (_Minkowski, (3, 0, 4), lambda: Symmetry(groups.O13(), _four_vectors(), None)),
}


def _four_vectors() -> actions.Action:
    return actions.along(representations.defining(groups.O13()), -1)


def networks(*, dtype: torch.dtype = torch.float64) -> SearchStrategy[Network]:
    """Draw small equivariant networks: sets, vectors, energies with forces, images, four-vectors.

    Args:
        dtype: of weights and inputs.

    Example:
        >>> from hypothesis import find
        >>> find(networks(), lambda network: True).name
        'deep set'
    """

    def build(name: str, channels: int, seed: int) -> Network:
        make, shape, symmetry = _TABLE[name]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = make(channels).to(dtype).eval()
            inputs = torch.randn([n or channels for n in shape], dtype=torch.float64).to(dtype)
        return Network(name, model, inputs, symmetry())

    return st.builds(build, st.sampled_from(sorted(_TABLE)), st.integers(1, 4), st.integers(0, 2**31 - 1))
