"""Trap 13: the input pipeline breaks the symmetry, and a test of the network alone cannot see it.

Published pipelines centred positions per node over x, y, z instead of over the particles, centred over the whole batch,
and fed the height of a point as an invariant scalar.
"""

import pytest
import torch

from constrained_equiv import Symmetry, actions, assert_equivariant, equivariance_error, groups
from constrained_equiv.errors import EquivarianceError

E3, O3 = groups.E3(), groups.O3()
MIX = torch.tensor([[0.8, -0.3], [0.5, 1.1]], dtype=torch.float64)


def network(centred, velocities, scalars):
    """One layer of vector messages, equivariant to O(3): (batch, n, 3), (batch, n, 3), (batch, n) -> (batch, n, 3)."""
    features = torch.stack([centred, velocities], -1) @ MIX
    gates = torch.sigmoid(scalars + torch.linalg.vector_norm(features, dim=(-2, -1)))
    messages = features.sum(-1) * gates.unsqueeze(-1)
    return messages + messages.roll(1, -2)


def speed(positions, velocities):
    return torch.linalg.vector_norm(velocities, dim=-1)


def over_particles(positions):
    return positions - positions.mean(-2, keepdim=True)


def over_coordinates(positions):
    return positions - positions.mean(-1, keepdim=True)


def over_the_batch(positions):
    return positions - positions.mean((0, 1), keepdim=True)


def height(positions, velocities):
    return over_particles(positions)[..., 2]


def pipeline(centre, scalars):
    def predict(positions, velocities):
        return positions + network(centre(positions), velocities, scalars(positions, velocities))

    return predict


CORRECT = pipeline(over_particles, speed)
WRONG = {
    "centred over x, y, z": pipeline(over_coordinates, speed),
    "height as a scalar": pipeline(over_particles, height),
    "not centred": pipeline(lambda positions: positions, speed),
}


def one_of_the_batch(action):
    """Move the first system alone: the systems of a batch have nothing to do with each other."""
    return lambda element, tensor: torch.cat([action(element, tensor[:1]), tensor[1:]])


TOGETHER = Symmetry(E3, (actions.points, actions.vectors), actions.points)
APART = Symmetry(
    E3,
    (one_of_the_batch(actions.points), one_of_the_batch(actions.vectors)),
    one_of_the_batch(actions.points),
)


@pytest.fixture
def batch():
    return torch.randn(4, 5, 3, dtype=torch.float64) + 3, torch.randn(4, 5, 3, dtype=torch.float64)


@pytest.mark.parametrize("name", WRONG)
def test_broken_pipelines_fail_as_a_whole_though_their_network_is_equivariant(name, batch):
    positions, velocities = batch
    symmetry = Symmetry(O3, ("1x1o", "1x1o", None), "1x1o")
    assert_equivariant(network, (over_particles(positions), velocities, speed(*batch)), symmetry=symmetry)
    with pytest.raises(EquivarianceError, match=r"under E\(3\)"):
        assert_equivariant(WRONG[name], batch, symmetry=TOGETHER)
    assert equivariance_error(WRONG[name], batch, symmetry=TOGETHER) > 0.01


def test_centring_over_the_batch_shows_when_one_system_moves(batch):
    wrong = pipeline(over_the_batch, speed)
    assert_equivariant(wrong, batch, symmetry=TOGETHER)  # one motion for the whole batch is blind to it
    with pytest.raises(EquivarianceError):
        assert_equivariant(wrong, batch, symmetry=APART)


@pytest.mark.parametrize("symmetry", [TOGETHER, APART], ids=["together", "apart"])
def test_the_correct_pipeline_passes_as_a_whole(symmetry, batch):
    assert_equivariant(CORRECT, batch, symmetry=symmetry)


@pytest.mark.usefixtures("float64_default")
@pytest.mark.parametrize("symmetry", [TOGETHER, APART], ids=["together", "apart"])
def test_the_pipeline_of_the_segnn_example_passes_as_a_whole(symmetry, batch):
    pytest.importorskip("e3nn")
    from examples.models.segnn import SEGNN

    model = SEGNN("4x0e + 4x1o", layers=1)
    charges = torch.ones(4, 5).double()
    charges[:, ::2] = -1.0
    assert_equivariant(lambda x, v: model(x, v, charges), batch, symmetry=symmetry)
