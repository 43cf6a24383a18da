"""Steerable convolutional networks for images and for vector fields in the plane, on escnn.

Enter plain tensors; leave class scores or fields. The training scripts call them. The one law: turning the input by a
quarter turn, or reflecting it where the group reflects, turns the output likewise (scores do not change), to rounding,
for all kernels and pools are centred on the grid. Turns by other angles hold as well as pixels allow.

No escnn layer is subclassed or hidden, so what works on `R2Conv` works here: the convolutions are
`features.<k>` of class `R2Conv`.

Reference:
    M. Weiler, G. Cesa, "General E(2)-equivariant steerable CNNs", NeurIPS 2019;
    R. Wang, R. Walters, R. Yu, "Incorporating symmetry into deep dynamics models", ICLR 2021, for fields.
"""

from __future__ import annotations

import torch
from escnn import gspaces
from escnn import nn as enn
from torch import Tensor, nn

__all__ = ["FlowCNN", "SteerableCNN"]


class SteerableCNN(nn.Module):
    """Classify images of 28 x 28 pixels whatever their orientation.

    Six blocks of convolution, batch normalisation and ReLU on regular fields; the average of 2 x 2 pixels after the
    second and the fourth; the last convolution covers the whole field of 7 x 7 pixels. The maximum over the group makes
    invariants, which a perceptron classifies. With the defaults: 8 rotations and 1.3 million parameters.

    Args:
        classes: Number of scores.
        width: Regular fields in the first block; the later ones have 2, 2, 4, 4 and 4 times as many. 24 is the size of
            the published experiments, 2 suits a test.
        rotations: Order of the group of rotations.
        reflections: Whether the group reflects as well: dihedral instead of cyclic.
        channels: Of the images; 1 for grey.

    Raises:
        ValueError: If `width` or `rotations` is too small.

    Example:
        >>> SteerableCNN(10, width=1, rotations=4)(torch.randn(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self, classes: int, *, width: int = 16, rotations: int = 8, reflections: bool = False, channels: int = 1
    ) -> None:
        super().__init__()
        if width < 1 or rotations < 1:
            raise ValueError(f"width={width}, rotations={rotations}, expected at least 1 each")
        space = gspaces.flipRot2dOnR2(rotations) if reflections else gspaces.rot2dOnR2(rotations)
        self.input_type = field = space.type(*[space.trivial_repr] * channels)
        layers: list[nn.Module] = []
        for block, (multiple, kernel, padding) in enumerate(
            [(1, 7, 3), (2, 5, 2), (2, 5, 2), (4, 5, 2), (4, 5, 2), (4, 7, 0)]
        ):
            out = space.type(*[space.regular_repr] * (multiple * width))
            layers += [
                _convolution(field, out, kernel, padding=padding, bias=False),
                enn.InnerBatchNorm(out),
                enn.ReLU(out, inplace=True),
            ]
            if block in (1, 3):
                layers.append(enn.PointwiseAvgPool2D(out, 2))
            field = out
        layers.append(enn.GroupPooling(field))
        self.features = enn.SequentialModule(*layers)
        invariants = 4 * width
        self.classifier = nn.Sequential(
            nn.Linear(invariants, 4 * width), nn.BatchNorm1d(4 * width), nn.ELU(), nn.Linear(4 * width, classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map images (batch, channels, 28, 28) to scores (batch, classes)."""
        if images.ndim != 4 or images.shape[1:] != (self.input_type.size, 28, 28):
            raise ValueError(
                f"found images of shape {tuple(images.shape)}, expected (batch, {self.input_type.size}, 28, 28)"
            )
        scores: Tensor = self.classifier(self.features(self.input_type(images)).tensor.flatten(1))
        return scores


class FlowCNN(nn.Module):
    """Predict the next frame of a velocity field from the last ones, equivariant to quarter turns.

    Regular fields of C4 between vector fields; the last input frame is added to the output.

    Args:
        history: Frames in the input.
        width: Regular fields in every hidden layer.
        layers: Number of convolutions, at least 2.
        kernel: Odd size of all kernels.

    Raises:
        ValueError: If `layers` is below 2 or `kernel` is even.

    Example:
        >>> FlowCNN(history=2, width=2, layers=2)(torch.randn(3, 4, 16, 16)).shape
        torch.Size([3, 2, 16, 16])
    """

    def __init__(self, *, history: int = 1, width: int = 16, layers: int = 5, kernel: int = 5) -> None:
        super().__init__()
        if layers < 2 or kernel % 2 == 0:
            raise ValueError(f"layers={layers}, kernel={kernel}, expected at least 2 layers and an odd kernel")
        space = gspaces.rot2dOnR2(4)
        self.input_type = field = space.type(*[space.irrep(1)] * history)
        hidden = space.type(*[space.regular_repr] * width)
        steps: list[nn.Module] = []
        for _ in range(layers - 1):
            steps += [_convolution(field, hidden, kernel, padding=kernel // 2), enn.ReLU(hidden, inplace=True)]
            field = hidden
        self.features = enn.SequentialModule(
            *steps, _convolution(field, space.type(space.irrep(1)), kernel, padding=kernel // 2)
        )
        # escnn counts rows downwards, the fields count them upwards: their y components change sign between the two
        self.register_buffer("signs", torch.tensor([1.0, -1.0]).repeat(history).view(-1, 1, 1), persistent=False)

    def forward(self, fields: Tensor) -> Tensor:
        """Map velocities (vx, vy) of the last frames (batch, 2 history, size, size) to the next (batch, 2, size, size).

        The first row is the lowest: y is counted upwards.
        """
        if fields.ndim != 4 or fields.shape[1] != self.input_type.size:
            raise ValueError(
                f"found fields of shape {tuple(fields.shape)}, expected (batch, {self.input_type.size}, size, size)"
            )
        change = self.features(self.input_type(fields * self.signs)).tensor
        return fields[:, -2:] + change * self.signs[:2]


def _convolution(
    inputs: enn.FieldType, outputs: enn.FieldType, kernel: int, *, padding: int, bias: bool = True
) -> enn.R2Conv:
    """Build a convolution whose kernel has He's norm; escnn's own draw visits the weights one by one, which takes long.

    Reference:
        K. He, X. Zhang, S. Ren, J. Sun, "Delving deep into rectifiers", ICCV 2015, equation 10.
    """
    layer = enn.R2Conv(inputs, outputs, kernel, padding=padding, bias=bias, initialize=False)
    with torch.no_grad():
        layer.weights.normal_()
        layer.weights.mul_((2 * outputs.size) ** 0.5 / torch.linalg.vector_norm(layer.expand_parameters()[0]))
    return layer
