"""Laws of the steerable convolutional networks: exact under what the grid carries, for images and for fields."""

from itertools import pairwise

import pytest
import torch

pytest.importorskip("escnn")

import constrained_equiv as ce
from examples.data.smoke import quarter_turn
from examples.models.steerable_cnn import FlowCNN, SteerableCNN

GROUPS = {"C_4": (4, False), "C_8": (8, False), "D_4": (4, True), "D_8": (8, True)}


def trained(model: SteerableCNN) -> SteerableCNN:
    """Give the normalisations statistics of data."""
    model(torch.randn(8, 1, 28, 28))
    return model.eval()


@pytest.mark.parametrize("name", GROUPS)
def test_scores_are_invariant_under_what_the_grid_carries(name):
    rotations, reflections = GROUPS[name]
    model = trained(SteerableCNN(10, width=1, rotations=rotations, reflections=reflections))
    images = torch.randn(4, 1, 28, 28)
    group = ce.groups.dihedral(4) if reflections else ce.groups.cyclic(4)
    symmetry = ce.Symmetry(group, inputs=ce.actions.pixels, outputs=None)
    ce.assert_equivariant(model, images, symmetry=symmetry, tolerance=1e-5)


def test_rotations_alone_see_handedness():
    model = trained(SteerableCNN(10, width=1, rotations=4))
    images = torch.randn(4, 1, 28, 28)
    symmetry = ce.Symmetry(ce.groups.dihedral(4), inputs=ce.actions.pixels, outputs=None)
    assert ce.equivariance_error(model, images, symmetry=symmetry) > 1e-2


def test_eighth_turns_hold_as_well_as_pixels_allow():
    """Smooth images, which a turn by 45 degrees changes little by interpolation."""
    model = trained(SteerableCNN(10, width=2, rotations=8))
    axis = torch.linspace(-3, 3, 28)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    blobs = [torch.exp(-3 * ((x - 0.9 * c) ** 2 + (y - 0.7 * d) ** 2)) for c in (-1, 0, 1) for d in (0, 1)]
    images = ce.actions.disc(torch.stack([a - b for a, b in pairwise(blobs)]).unsqueeze(1))
    eighth = ce.groups.cyclic(8).generators[0]
    turned, plain = model(ce.actions.pixels(eighth, images)), model(images)
    spread = (plain - plain.mean(0)).norm()
    assert (turned - plain).norm() < 0.5 * spread


@pytest.mark.parametrize("history", [1, 2])
def test_flows_turn_with_their_past(history):
    model = FlowCNN(history=history, width=2, layers=3)
    fields = torch.randn(2, 2 * history, 12, 12)
    predicted = model(fields)
    assert predicted.shape == (2, 2, 12, 12)
    gap = model(quarter_turn(fields)) - quarter_turn(predicted)
    assert gap.norm() < 1e-6 * predicted.norm()
    # the rest beside the last frame is not zero, and turning the arrows alone is not the symmetry
    assert (predicted - fields[:, -2:]).norm() > 1e-2 * predicted.norm()
    assert (model(fields.rot90(1, (-2, -1))) - quarter_turn(predicted)).norm() > 0.1 * predicted.norm()


@pytest.mark.parametrize("build", [lambda: SteerableCNN(4, width=1, rotations=4), lambda: FlowCNN(width=1, layers=2)])
def test_every_convolution_is_relaxed_and_taken_back(build):
    model = build()
    inputs = torch.randn(4, model.input_type.size, 28, 28)
    with torch.no_grad():
        model(inputs)
        before = model.eval()(inputs)
    ce.relax(model.train(), init=0.1)
    assert len(ce.relaxations(model)) == sum(type(m).__mro__[1].__name__ == "R2Conv" for m in model.modules()) > 0
    assert (model.eval()(inputs) - before).abs().max() > 1e-3
    ce.finalize(model, on_violation="drop")
    torch.testing.assert_close(model(inputs), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: SteerableCNN(10, width=0), "width=0"),
        (lambda: FlowCNN(kernel=4), "kernel=4"),
        (lambda: FlowCNN(layers=1), "layers=1"),
        (lambda: SteerableCNN(2, width=1, rotations=4)(torch.zeros(1, 1, 27, 27)), "28, 28"),
        (lambda: FlowCNN(width=1)(torch.zeros(1, 3, 8, 8)), "batch, 2, size, size"),
    ],
)
def test_bad_arguments_are_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()
