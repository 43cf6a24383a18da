"""The steerable network keeps its one law, and has the size that was published."""

import copy
import functools

import pytest
import torch

pytest.importorskip("e3nn")

from e3nn import o3

from examples.models.segnn import SEGNN

SIZES = [("32x0e + 32x1o", 4, 1), ("6x0e + 4x1o", 2, 1), ("6x0e + 4x1o + 2x1e + 3x2e", 2, 2)]


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request):
    """Default dtype while models are built: e3nn draws its constants in it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(before)


@pytest.fixture
def atol(dtype):
    return {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]


@functools.cache
def built(hidden, layers, lmax, dtype):
    """One model per case for all tests: e3nn generates the code of every product, which takes longer than a test."""
    torch.manual_seed(0)
    return SEGNN(hidden, layers=layers, lmax=lmax)


@pytest.fixture(params=SIZES, ids=[hidden for hidden, _, _ in SIZES])
def model(request, dtype):
    model = built(*request.param, dtype)
    model.zero_grad()
    return model


def systems(batch=4, particles=5):
    generator = torch.Generator().manual_seed(1)
    positions, velocities = torch.randn(2, batch, particles, 3, generator=generator, dtype=torch.float64).to(
        torch.get_default_dtype()
    )
    charges = torch.randint(2, (batch, particles), generator=generator).mul(2).sub(1).to(positions)
    return positions, velocities, charges


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["rotation", "rotation and inversion"])
def test_rotations_and_reflections(model, atol, sign):
    positions, velocities, charges = systems()
    turn = sign * o3.rand_matrix()
    turned = model(positions @ turn.T, velocities @ turn.T, charges)
    assert relative_error(turned, model(positions, velocities, charges) @ turn.T) < atol


def test_plane_reflection(model, atol):
    positions, velocities, charges = systems()
    mirror = positions.new_tensor([-1.0, 1.0, 1.0])
    mirrored = model(positions * mirror, velocities * mirror, charges)
    assert relative_error(mirrored, model(positions, velocities, charges) * mirror) < atol


def test_translations(model, atol):
    positions, velocities, charges = systems()
    shift = torch.tensor([3.0, -2.0, 1.0]) * torch.arange(1.0, 5.0)[:, None, None]
    assert (
        relative_error(model(positions + shift, velocities, charges), model(positions, velocities, charges) + shift)
        < atol
    )


def test_permutations_of_particles(model, atol):
    positions, velocities, charges = systems()
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted = model(positions[:, order], velocities[:, order], charges[:, order])
    assert relative_error(permuted, model(positions, velocities, charges)[:, order]) < atol


def test_systems_of_a_batch_do_not_see_each_other(model, atol):
    inputs = systems()
    together = model(*inputs)
    alone = torch.cat([model(*(tensor[i : i + 1] for tensor in inputs)) for i in range(len(together))])
    assert relative_error(alone, together) < atol


@pytest.mark.parametrize("dtype", [torch.float64], indirect=True)
def test_displacement_depends_on_every_input(model):
    """The laws above are not vacuous: the network is neither constant nor blind to an input."""
    positions, velocities, charges = systems()
    output = model(positions, velocities, charges)
    for other in (
        (positions, velocities + 1.0, charges),
        (positions, velocities, charges.abs() * torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0])),
        (positions * torch.tensor([2.0, 1.0, 1.0]), velocities, charges),
    ):
        assert relative_error(model(*other) - other[0], output - positions) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64], indirect=True)
@pytest.mark.parametrize("particles", [2, 3, 7])
def test_any_number_of_particles(model, particles):
    positions, velocities, charges = systems(2, particles)
    assert model(positions, velocities, charges).shape == positions.shape


@pytest.mark.parametrize("dtype", [torch.float64], indirect=True)
def test_gradient_reaches_every_parameter(model):
    model(*systems()).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_full_size_is_the_published_one():
    assert sum(p.numel() for p in SEGNN().parameters()) == 146_368


def test_update_products_are_found_by_name():
    products = [
        name
        for name, module in SEGNN().named_modules()
        if ".update." in name and isinstance(module, o3.FullyConnectedTensorProduct)
    ]
    assert products == [f"layers.{layer}.update.{product}" for layer in range(4) for product in range(2)]


def test_copies_and_loads():
    model, other = SEGNN("4x0e + 4x1o", layers=1), SEGNN("4x0e + 4x1o", layers=1)
    other.load_state_dict(model.state_dict(), strict=True)
    inputs = systems()
    assert torch.equal(other(*inputs), model(*inputs))
    assert torch.equal(copy.deepcopy(model)(*inputs), model(*inputs))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": "4x1o"}, "hidden='4x1o', expected even scalars"),
        ({"hidden": "4x1o + 4x0e"}, "expected even scalars once, in front"),
        ({"hidden": "4x0e + 2x0o"}, "no odd ones"),
        ({"layers": 0}, "layers=0"),
        ({"lmax": 0}, "lmax=0"),
    ],
)
def test_constructor_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        SEGNN(**arguments)


def test_forward_refuses_flat_particles():
    positions, velocities, charges = systems()
    with pytest.raises(ValueError, match=r"positions \(20, 3\)"):
        SEGNN("4x0e + 4x1o", layers=1)(positions.flatten(0, 1), velocities.flatten(0, 1), charges)
