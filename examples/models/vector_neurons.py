"""Vector neurons: point-cloud networks whose hidden features are lists of 3-vectors.

Features enter and leave every layer as ``(batch, channels, 3, ...)`` with any number of trailing axes (none, points, or
points x neighbours). A rotation R acts on axis 2 alone, ``x[:, :, i] -> sum_j R[i, j] x[:, :, j]``, and the one law is:
every layer commutes with it, exactly. Nothing here knows a handedness, so the layers commute with reflections too (they
are O(3)-equivariant), with a single exception: ``edge_features(..., cross=True)`` adds a cross product, which a
reflection flips the other way, and leaves SO(3).

All channel mixing is done by `VNLinear`, an ordinary `torch.nn.Linear` without bias: replace or relax that class and
the whole network follows.

Reference:
    C. Deng, O. Litany, Y. Duan, A. Poulenard, A. Tagliasacchi, L. Guibas, "Vector Neurons: A General Framework for
    SO(3)-Equivariant Networks", ICCV 2021. The graph features are those of Y. Wang et al., "Dynamic Graph CNN for
    Learning on Point Clouds", ACM TOG 2019; the point backbone that of C. Qi et al., "PointNet", CVPR 2017.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = [
    "VNBatchNorm",
    "VNDGCNN",
    "VNInvariant",
    "VNLeakyReLU",
    "VNLinear",
    "VNLinearLeakyReLU",
    "VNMaxPool",
    "VNPointNet",
    "edge_features",
    "mean_pool",
    "nearest_neighbours",
]

EPS = 1e-6
"""Added to the squared lengths that divide: the zero vector is cut to zero, with a finite gradient."""

Pool = Literal["mean", "max"]


class VNLinear(nn.Linear):
    """Mix channels with one matrix, ``y[o] = sum_c weight[o, c] x[c]``: all linear maps that commute with rotations.

    A bias would be a preferred direction in space, so there is none. ``weight`` has shape (out, in), as in `nn.Linear`.

    Reference:
        Deng et al. 2021, linear layers.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        """Map (batch, in, 3, ...) to (batch, out, 3, ...)."""
        if input.ndim < 3 or input.shape[1:3] != (self.in_features, 3):
            raise ValueError(
                f"found features of shape {tuple(input.shape)}, expected (batch, {self.in_features}, 3, ...); "
                "for a point cloud (batch, points, 3) pass points.transpose(1, 2).unsqueeze(1)"
            )
        # One batched product on the channel axis: no transposes, and not a convolution, which CUDA rounds to TF32.
        weight = self.weight.expand(len(input), -1, -1)
        return torch.bmm(weight, input.flatten(2)).view(len(input), len(self.weight), *input.shape[2:])


class VNBatchNorm(nn.Module):
    """Normalise the lengths of the vectors over the batch and keep their directions: ``x BN(|x|) / |x|``.

    Args:
        channels: Vectors in and out.
        floor: Length, in units of the features, below which a vector counts as zero: lengths are
            ``sqrt(|x|^2 + floor^2)``. The bare formula gives the shortest vector a typical length, and with it the
            rounding error in its direction; the floor bounds that gain, and the gradient at zero, by about 1 / floor.

    Reference:
        Deng et al. 2021, normalisation layers; the floor is an addition.
    """

    def __init__(self, channels: int, *, floor: float = 1e-2) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)
        self.floor = floor

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels, 3, ...) to the same shape."""
        length = (x.square().sum(2) + self.floor**2).sqrt()
        normalised: Tensor = self.norm(length.reshape(*length.shape[:2], -1))
        return x * (normalised.view_as(length) / length).unsqueeze(2)


def _leaky(x: Tensor, direction: Tensor, slope: float) -> Tensor:
    """Shrink, by `slope`, the part of `x` that points against `direction`; the rest of `x` is kept.

    Both published branches (``<x, k> >= 0`` or not) in one continuous line, with k the direction:
    ``x - (1 - slope) min(<x, k>, 0) k / |k|^2``.
    """
    against = (x * direction).sum(2, keepdim=True).clamp(max=0)
    return x - (1 - slope) * against / (direction.square().sum(2, keepdim=True) + EPS) * direction


class VNLeakyReLU(nn.Module):
    """Cut every vector at a plane whose normal is learned from the features, one for each channel or one for all.

    Args:
        channels: Vectors in and out.
        slope: What is left of the part behind the plane; 0 gives the vector ReLU, 1 the identity.
        shared: Learn one direction for all channels.

    Reference:
        Deng et al. 2021, non-linear layers.
    """

    def __init__(self, channels: int, *, slope: float = 0.2, shared: bool = False) -> None:
        super().__init__()
        self.direction = VNLinear(channels, 1 if shared else channels)
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels, 3, ...) to the same shape."""
        return _leaky(x, self.direction(x), self.slope)


class VNLinearLeakyReLU(nn.Module):
    """Linear map, batch normalisation and cut; feature map and direction map both read the layer's input.

    Args:
        in_channels: Vectors in.
        out_channels: Vectors out.
        slope: As in `VNLeakyReLU`.
        shared: As in `VNLeakyReLU`.

    Reference:
        Deng et al. 2021, non-linear layers, with the normalisation between the map and the cut.
    """

    def __init__(self, in_channels: int, out_channels: int, *, slope: float = 0.2, shared: bool = False) -> None:
        super().__init__()
        self.feature = VNLinear(in_channels, out_channels)
        self.norm = VNBatchNorm(out_channels)
        self.direction = VNLinear(in_channels, 1 if shared else out_channels)
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in, 3, ...) to (batch, out, 3, ...)."""
        return _leaky(self.norm(self.feature(x)), self.direction(x), self.slope)


class VNMaxPool(nn.Module):
    """Keep, for each channel, the vector along `axis` that points furthest in its own direction.

    The direction is a linear map of the features. It only chooses, so its weight receives no gradient and keeps its
    initial value; distributed training has to be told (``find_unused_parameters=True``), or the mean used.

    Reference:
        Deng et al. 2021, pooling layers.
    """

    def __init__(self, channels: int, *, axis: int = -1) -> None:
        super().__init__()
        self.direction = VNLinear(channels, channels)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels, 3, ...) to the same shape without `axis`."""
        axis = self.axis % x.ndim
        if axis < 3:
            raise ValueError(f"found axis {self.axis} for features of shape {tuple(x.shape)}, expected an axis after 2")
        best = (x * self.direction(x)).sum(2, keepdim=True).argmax(axis, keepdim=True)
        return x.gather(axis, best.expand(-1, -1, 3, *best.shape[3:])).squeeze(axis)


def mean_pool(x: Tensor, axis: int = -1) -> Tensor:
    """Average (batch, channels, 3, ...) over `axis`: equivariant, since a rotation acts on every vector alike."""
    return x.mean(axis)


class VNInvariant(nn.Module):
    """Express every vector in a learned frame of three vectors: the coordinates are invariant.

    The frame T(x), shape (batch, 3, 3, ...), comes from vector-neuron layers and turns with the input, so ``x T^T``
    does not change. It is not orthonormalised; a reflection acts on it too, hence the result is O(3)-invariant.

    Reference:
        Deng et al. 2021, invariant layers.
    """

    def __init__(self, channels: int, *, slope: float = 0.2) -> None:
        super().__init__()
        half, quarter = max(channels // 2, 1), max(channels // 4, 1)
        self.frame = nn.Sequential(
            VNLinearLeakyReLU(channels, half, slope=slope),
            VNLinearLeakyReLU(half, quarter, slope=slope),
            VNLinear(quarter, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels, 3, ...) to invariants (batch, 3 channels, ...)."""
        return torch.einsum("bci...,bfi...->bcf...", x, self.frame(x)).flatten(1, 2)


@torch.no_grad()
def nearest_neighbours(x: Tensor, k: int) -> Tensor:
    """Return the indices (batch, points, k) of the k nearest points of features (batch, channels, 3, points).

    Distances are over channels and components together, so they are rotation-invariant; each point is its own first
    neighbour. Equal distances are broken by rounding: jitter points that lie on a grid.
    """
    points = x.shape[-1]
    if not 1 <= k <= points:
        raise ValueError(f"found k={k} neighbours in a cloud of {points} points, expected 1 <= k <= {points}")
    flat = x.flatten(1, 2).transpose(1, 2)
    # Differences, not a Gram matrix: its cancellation would let a rotation change the order of near-equal distances.
    distance = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.topk(k, largest=False).indices


def edge_features(x: Tensor, k: int, *, cross: bool = False) -> Tensor:
    """Describe every point by its k nearest neighbours: ``(x_j - x_i, x_i)``.

    Args:
        x: Features (batch, channels, 3, points).
        k: Neighbours, the point itself included.
        cross: Also append ``x_j cross x_i``. It gives a single input vector a third, independent direction, and reduces
            the symmetry from O(3) to SO(3).

    Returns:
        Features (batch, 2 channels or 3 channels, 3, points, k).

    Reference:
        Wang et al. 2019, equation 8; Deng et al. 2021, edge convolution on vectors.
    """
    index = nearest_neighbours(x, k).flatten(1).unsqueeze(1).expand(-1, x.shape[1] * 3, -1)
    neighbours = x.flatten(1, 2).gather(2, index).view(*x.shape, k)
    centre = x.unsqueeze(-1).expand_as(neighbours)
    offset = neighbours - centre
    features = [offset, centre]
    if cross:
        features.append(torch.linalg.cross(offset, centre, dim=2))  # = x_j cross x_i, and exactly zero for j = i
    return torch.cat(features, dim=1)


def _pooling(pool: Pool, channels: int) -> Callable[[Tensor], Tensor]:
    """Choose how the last axis is reduced."""
    if pool not in ("mean", "max"):
        raise ValueError(f"found pool={pool!r}, expected 'mean' or 'max'")
    return VNMaxPool(channels) if pool == "max" else mean_pool


def _vectors(width: int, multiple: int) -> int:
    """Count the 3-vectors that take the room of ``multiple * width`` scalars."""
    if width < 3:
        raise ValueError(f"found width={width}, expected at least 3, the scalars in one vector")
    return multiple * width // 3


def _centred(points: Tensor) -> Tensor:
    """Turn clouds (batch, points, 3) into one vector channel (batch, 1, 3, points) with mean zero."""
    if points.ndim != 3 or points.shape[-1] != 3:
        raise ValueError(f"found points of shape {tuple(points.shape)}, expected (batch, points, 3)")
    return (points - points.mean(1, keepdim=True)).transpose(1, 2).unsqueeze(1)


def _with_mean(x: Tensor) -> Tensor:
    """Append the mean over points to the features of every point: (batch, c, 3, n) to (batch, 2c, 3, n)."""
    return torch.cat([x, x.mean(-1, keepdim=True).expand_as(x)], dim=1)


def _classifier(features: int, classes: int, *, width: int, dropout: float, slope: float) -> nn.Sequential:
    """Build the perceptron on invariants: features -> 8 width -> 4 width -> classes."""
    layers: list[nn.Module] = []
    for size in (8 * width, 4 * width):
        layers += [nn.Linear(features, size), nn.BatchNorm1d(size), nn.LeakyReLU(slope), nn.Dropout(dropout)]
        features = size
    return nn.Sequential(*layers, nn.Linear(features, classes))


class _EdgeConv(nn.Module):
    """Edge features, one vector layer on every edge, pooling over the neighbours."""

    def __init__(self, in_channels: int, out_channels: int, *, k: int, pool: Pool, slope: float, cross: bool) -> None:
        super().__init__()
        self.k, self.cross = k, cross
        self.layer = VNLinearLeakyReLU((3 if cross else 2) * in_channels, out_channels, slope=slope)
        self.pool = _pooling(pool, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, in, 3, points) to (batch, out, 3, points)."""
        return self.pool(self.layer(edge_features(x, self.k, cross=self.cross)))


class _CloudFeature(nn.Module):
    """A small PointNet inside the PointNet: features of the whole cloud, in place of a learned change of basis."""

    def __init__(self, channels: int, *, width: int, pool: Pool, slope: float) -> None:
        super().__init__()
        sizes = [channels, *(_vectors(width, m) for m in (1, 2, 16, 8, 4))]
        layers = [VNLinearLeakyReLU(a, b, slope=slope) for a, b in pairwise(sizes)]
        self.points = nn.Sequential(*layers[:3])
        self.pool = _pooling(pool, sizes[3])
        self.cloud = nn.Sequential(*layers[3:], VNLinear(sizes[-1], channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels, 3, points) to (batch, channels, 3)."""
        out: Tensor = self.cloud(self.pool(self.points(x)))
        return out


class VNPointNet(nn.Module):
    """Classify point clouds with a PointNet of vector neurons; logits are invariant to rotation and translation.

    A single vector per point can only be scaled by a vector layer, so the first layer is an edge convolution. With the
    defaults and 40 classes the model has the published sizes (about 2.0 million parameters).

    Args:
        classes: Number of logits.
        width: Scalar channels of the corresponding PointNet's first layer; every size is proportional to it, and a
            third as many vectors are used. 64 is the published size, 6 to 12 suit a test.
        k: Neighbours in the first layer.
        pool: How neighbours and points are pooled while they are vectors; the published default is the mean.
        cross: Use the cross product in the first layer, as published: SO(3). Without it the model is O(3)-invariant.
        dropout: Probability in the classifier.

    Reference:
        Deng et al. 2021, VN-PointNet.
    """

    def __init__(
        self,
        classes: int,
        *,
        width: int = 64,
        k: int = 20,
        pool: Pool = "mean",
        cross: bool = True,
        dropout: float = 0.4,
    ) -> None:
        super().__init__()
        small, middle, large = (_vectors(width, m) for m in (1, 2, 16))
        slope = 0.0
        self.edges = _EdgeConv(1, small, k=k, pool=pool, slope=slope, cross=cross)
        self.conv1 = VNLinearLeakyReLU(small, small, slope=slope)
        self.cloud = _CloudFeature(small, width=width, pool=pool, slope=slope)
        self.conv2 = VNLinearLeakyReLU(2 * small, middle, slope=slope)
        self.conv3 = nn.Sequential(VNLinear(middle, large), VNBatchNorm(large))
        self.invariant = VNInvariant(2 * large, slope=slope)
        self.classifier = _classifier(6 * large, classes, width=width, dropout=dropout, slope=slope)

    def forward(self, points: Tensor) -> Tensor:
        """Map clouds (batch, points, 3), in any unit of length, to logits (batch, classes)."""
        x = self.conv1(self.edges(_centred(points)))
        x = torch.cat([x, self.cloud(x).unsqueeze(-1).expand_as(x)], dim=1)
        x = _with_mean(self.conv3(self.conv2(x)))
        logits: Tensor = self.classifier(self.invariant(x).amax(-1))
        return logits


class VNDGCNN(nn.Module):
    """Classify point clouds with a dynamic graph CNN of vector neurons; logits are invariant as in `VNPointNet`.

    Neighbours are found anew in the features before each of the four edge convolutions. There is no cross product: the
    model is O(3)-invariant. With the defaults and 40 classes it has the published sizes (about 2.9 million parameters).

    Args:
        classes: Number of logits.
        width: As in `VNPointNet`.
        k: Neighbours in every edge convolution.
        pool: How neighbours are pooled.
        dropout: Probability in the classifier.

    Reference:
        Deng et al. 2021, VN-DGCNN.
    """

    def __init__(
        self, classes: int, *, width: int = 64, k: int = 20, pool: Pool = "mean", dropout: float = 0.5
    ) -> None:
        super().__init__()
        slope = 0.2
        sizes = [1, *(_vectors(width, m) for m in (1, 1, 2, 4))]
        large = _vectors(width, 16)
        self.edges = nn.ModuleList(
            _EdgeConv(a, b, k=k, pool=pool, slope=slope, cross=False) for a, b in pairwise(sizes)
        )
        self.conv5 = VNLinearLeakyReLU(sum(sizes[1:]), large, slope=slope, shared=True)
        self.invariant = VNInvariant(2 * large, slope=slope)
        self.classifier = _classifier(12 * large, classes, width=width, dropout=dropout, slope=slope)

    def forward(self, points: Tensor) -> Tensor:
        """Map clouds (batch, points, 3), in any unit of length, to logits (batch, classes)."""
        x = _centred(points)
        scales = []
        for edge in self.edges:
            x = edge(x)
            scales.append(x)
        x = self.invariant(_with_mean(self.conv5(torch.cat(scales, dim=1))))
        logits: Tensor = self.classifier(torch.cat([x.amax(-1), x.mean(-1)], dim=1))
        return logits
