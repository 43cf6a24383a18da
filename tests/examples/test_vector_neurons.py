"""Laws of the vector-neuron reference layers, crossed with a table of layers, models and input ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from examples.models.vector_neurons import (
    VNDGCNN,
    VNBatchNorm,
    VNInvariant,
    VNLeakyReLU,
    VNLinear,
    VNLinearLeakyReLU,
    VNMaxPool,
    VNPointNet,
    edge_features,
    mean_pool,
    nearest_neighbours,
)

Map = Callable[[Tensor], Tensor]
BATCH, CHANNELS, POINTS, NEIGHBOURS = 4, 5, 24, 6
TRAILING = {3: (), 4: (POINTS,), 5: (POINTS, NEIGHBOURS)}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
MODEL_TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4}  # a dozen normalisations in a row, each dividing


def orthogonal(*, reflect: bool, dtype: torch.dtype) -> Tensor:
    """Sample a rotation, or a rotation times a reflection, from the QR decomposition of a Gaussian matrix."""
    q: Tensor
    q, r = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    q = q * r.diagonal().sign()
    q = q * q.det().sign() * (-1 if reflect else 1)
    return q.to(dtype=dtype)


def turn(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate features (batch, channels, 3, ...)."""
    return torch.einsum("ij,bcj...->bci...", rotation, x)


def error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest entry."""
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def shake(module: nn.Module) -> nn.Module:
    """Give normalisations statistics and weights as after training: with the initial ones they do nothing in eval."""
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm1d):
            assert layer.running_mean is not None and layer.running_var is not None
            layer.running_mean.uniform_(-0.5, 0.5)
            layer.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.uniform_(layer.bias, -0.5, 0.5)
    return module


@dataclass(frozen=True)
class Case:
    """A map of features: how it is built, which ranks it takes, whether its output turns with its input."""

    build: Callable[[], Map]
    ranks: tuple[int, ...] = (3, 4, 5)
    invariant: bool = False
    chiral: bool = False


LAYERS = {
    "linear": Case(partial(VNLinear, CHANNELS, 7)),
    "norm": Case(partial(VNBatchNorm, CHANNELS)),
    "leaky": Case(partial(VNLeakyReLU, CHANNELS)),
    "leaky-shared": Case(partial(VNLeakyReLU, CHANNELS, slope=0.0, shared=True)),
    "linear-leaky": Case(partial(VNLinearLeakyReLU, CHANNELS, 7)),
    "linear-leaky-shared": Case(partial(VNLinearLeakyReLU, CHANNELS, 7, slope=0.0, shared=True)),
    "max-pool": Case(partial(VNMaxPool, CHANNELS), ranks=(4, 5)),
    "max-pool-points": Case(partial(VNMaxPool, CHANNELS, axis=3), ranks=(4, 5)),
    "mean-pool": Case(lambda: mean_pool, ranks=(4, 5)),
    "invariant": Case(partial(VNInvariant, CHANNELS), invariant=True),
    "edges": Case(lambda: partial(edge_features, k=NEIGHBOURS), ranks=(4,)),
    "edges-cross": Case(lambda: partial(edge_features, k=NEIGHBOURS, cross=True), ranks=(4,), chiral=True),
}
MODELS = {
    "pointnet": Case(partial(VNPointNet, 10, width=6, k=NEIGHBOURS, dropout=0.0), chiral=True),
    "pointnet-max": Case(partial(VNPointNet, 10, width=6, k=NEIGHBOURS, dropout=0.0, pool="max"), chiral=True),
    "pointnet-o3": Case(partial(VNPointNet, 10, width=6, k=NEIGHBOURS, dropout=0.0, cross=False)),
    "dgcnn": Case(partial(VNDGCNN, 10, width=6, k=NEIGHBOURS, dropout=0.0)),
    "dgcnn-max": Case(partial(VNDGCNN, 10, width=6, k=NEIGHBOURS, dropout=0.0, pool="max")),
}
LAYER_RANKS = [pytest.param(case, rank, id=f"{name}-{rank}") for name, case in LAYERS.items() for rank in case.ranks]

each_layer = pytest.mark.parametrize(("case", "rank"), LAYER_RANKS)
each_model = pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in MODELS.items()])
both_modes = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
both_dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])


@pytest.fixture(autouse=True)
def seed() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def build(case: Case, *, dtype: torch.dtype = torch.float64, training: bool = False) -> Map:
    made = case.build()
    return shake(made).to(dtype).train(training) if isinstance(made, nn.Module) else made


def features(rank: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(BATCH, CHANNELS, 3, *TRAILING[rank], dtype=dtype)


def clouds(dtype: torch.dtype = torch.float64) -> Tensor:
    """Ellipsoids of different proportions: a batch of alike clouds leaves its normalisation nothing but rounding."""
    return (torch.randn(BATCH, POINTS, 3) * torch.rand(BATCH, 1, 3).add(0.2)).to(dtype)


@each_layer
@both_modes
@both_dtypes
@pytest.mark.parametrize("reflect", [False, True], ids=["rotation", "reflection"])
def test_layers_are_equivariant(case: Case, rank: int, training: bool, dtype: torch.dtype, reflect: bool) -> None:
    if reflect and case.chiral:
        pytest.skip("a cross product has a handedness")
    layer, x, rotation = (
        build(case, dtype=dtype, training=training),
        features(rank, dtype),
        orthogonal(reflect=reflect, dtype=dtype),
    )
    expected = layer(x) if case.invariant else turn(layer(x), rotation)
    assert error(layer(turn(x, rotation)), expected) < TOLERANCE[dtype]


@each_model
@both_modes
@both_dtypes
@pytest.mark.parametrize("reflect", [False, True], ids=["rotation", "reflection"])
def test_models_are_invariant(case: Case, training: bool, dtype: torch.dtype, reflect: bool) -> None:
    if reflect and case.chiral:
        pytest.skip("a cross product has a handedness")
    if training and dtype == torch.float32:
        pytest.skip("statistics over four clouds multiply rounding by thousands; float64 shows the law")
    model, x = build(case, dtype=dtype, training=training), clouds(dtype)
    assert error(model(x @ orthogonal(reflect=reflect, dtype=dtype).mT), model(x)) < MODEL_TOLERANCE[dtype]


@pytest.mark.parametrize("name", [name for name, case in (LAYERS | MODELS).items() if case.chiral])
def test_a_cross_product_breaks_reflections(name: str) -> None:
    reflection = orthogonal(reflect=True, dtype=torch.float64)
    if name in MODELS:
        model, points = build(MODELS[name]), clouds()
        found, expected = model(points @ reflection.mT), model(points)
    else:
        layer, x = build(LAYERS[name]), features(4)
        found, expected = layer(turn(x, reflection)), turn(layer(x), reflection)
    assert error(found, expected) > 1e-3


@each_model
def test_models_ignore_translations(case: Case) -> None:
    model, x = build(case), clouds()
    assert error(model(x + torch.randn(BATCH, 1, 3, dtype=x.dtype)), model(x)) < MODEL_TOLERANCE[x.dtype]


@each_model
@both_modes
def test_models_ignore_the_order_of_points(case: Case, training: bool) -> None:
    model, x = build(case, training=training), clouds()
    assert error(model(x[:, torch.randperm(POINTS)]), model(x)) < MODEL_TOLERANCE[x.dtype]


@each_layer
def test_layers_commute_with_permutations_of_points(case: Case, rank: int) -> None:
    if rank == 3:
        pytest.skip("no points")
    layer, x, order = build(case), features(rank), torch.randperm(POINTS)
    before, after = layer(x), layer(x[:, :, :, order])
    pooled = before.ndim < rank and POINTS not in before.shape
    axis = 2 if case.invariant else 3
    assert error(after, before if pooled else before.index_select(axis, order)) < TOLERANCE[x.dtype]


@each_layer
def test_layers_treat_samples_apart_in_eval(case: Case, rank: int) -> None:
    layer, x = build(case), features(rank)
    assert error(torch.cat([layer(sample) for sample in x.unsqueeze(1)]), layer(x)) < TOLERANCE[x.dtype]


@each_model
def test_models_treat_samples_apart_in_eval(case: Case) -> None:
    model, x = build(case), clouds()
    assert error(torch.cat([model(sample) for sample in x.unsqueeze(1)]), model(x)) < MODEL_TOLERANCE[x.dtype]


@each_layer
@both_modes
@both_dtypes
def test_layers_have_finite_gradients_at_zero(case: Case, rank: int, training: bool, dtype: torch.dtype) -> None:
    layer, x = build(case, dtype=dtype, training=training), features(rank, dtype)
    x[:2] = 0
    if rank > 3:
        x[2:, :, :, : POINTS // 2] = x[2:, :, :, :1]  # coincident points
    (gradient,) = torch.autograd.grad(layer(x.requires_grad_()).square().sum(), x)
    assert gradient.isfinite().all()


@each_model
@both_modes
@both_dtypes
def test_models_have_finite_gradients_at_coincident_points(case: Case, training: bool, dtype: torch.dtype) -> None:
    model, x = build(case, dtype=dtype, training=training), clouds(dtype)
    x[0], x[1] = 0, x[1, :1]  # all at the origin, all in one place
    x[2, : POINTS // 2] = x[2, :1]
    assert isinstance(model, nn.Module)
    trained = [value for name, value in model.named_parameters() if not name.endswith("pool.direction.weight")]
    gradients = torch.autograd.grad(model(x.requires_grad_()).square().sum(), [x, *trained])
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("rank", TRAILING)
def test_linear_is_a_linear_on_the_channel_axis(rank: int) -> None:
    layer, x = VNLinear(CHANNELS, 7).double(), features(rank)
    assert isinstance(layer, nn.Linear)
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {"weight": (7, CHANNELS)}
    assert error(layer(x), torch.einsum("oc,bc...->bo...", layer.weight, x)) < TOLERANCE[x.dtype]


@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
def test_leaky_relu_is_the_published_two_branches(slope: float) -> None:
    layer, x = VNLeakyReLU(CHANNELS, slope=slope).double(), features(4)
    k = nn.functional.normalize(layer.direction(x), dim=2)
    along = (x * k).sum(2, keepdim=True)
    expected = slope * x + (1 - slope) * torch.where(along >= 0, x, x - along * k)
    assert error(layer(x), expected) < 1e-4  # EPS in the denominator


def test_neighbours_are_the_nearest_and_begin_with_the_point_itself() -> None:
    x = features(4)
    index = nearest_neighbours(x, NEIGHBOURS)
    flat = x.flatten(1, 2).mT
    distance = (flat.unsqueeze(2) - flat.unsqueeze(1)).square().sum(-1)
    assert torch.equal(index[..., 0], torch.arange(POINTS).expand(BATCH, -1))
    assert torch.equal(index, distance.argsort(-1)[..., :NEIGHBOURS])


@pytest.mark.parametrize(("model", "parameters"), [(VNPointNet, 2.0e6), (VNDGCNN, 2.9e6)])
def test_the_default_sizes_are_the_published_ones(model: type[nn.Module], parameters: float) -> None:
    assert sum(p.numel() for p in model(40).parameters()) == pytest.approx(parameters, rel=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: VNLinear(4, 2)(torch.zeros(1, 3, 4)), r"found features of shape \(1, 3, 4\), expected \(batch, 4, 3"),
        (lambda: VNMaxPool(4, axis=2)(torch.zeros(1, 4, 3, 5)), "found axis 2 .* expected an axis after 2"),
        (lambda: edge_features(torch.zeros(1, 1, 3, 5), 6), "found k=6 neighbours in a cloud of 5 points"),
        (lambda: VNPointNet(4, width=2), "found width=2, expected at least 3"),
        (lambda: VNPointNet(4, pool="sum"), "found pool='sum', expected 'mean' or 'max'"),  # type: ignore[arg-type]
        (lambda: VNDGCNN(4, width=6)(torch.zeros(2, 3, 30)), r"found points of shape \(2, 3, 30\), expected \(batch"),
    ],
)
def test_errors_say_what_was_found_and_what_was_expected(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
