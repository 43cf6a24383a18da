"""Vector neurons: one dense product for every rank of input, and refusal of layers that do not act as stated."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import constrained_equiv as ce
from examples.models.vector_neurons import VNDGCNN, VNLinear, VNPointNet

TRAILING = [(), (7,), (7, 4)]
ADAPTERS = {1: ce.adapters.vector_neurons(), -1: ce.adapters.vector_neurons(axis=-1)}


def layer_for(axis: int, inputs: int = 4, outputs: int = 5) -> nn.Linear:
    make = VNLinear if axis == 1 else lambda a, b: nn.Linear(a, b, bias=False)
    return make(inputs, outputs).double()


def features(axis: int, trailing: tuple[int, ...], channels: int = 4) -> Tensor:
    shape = (2, channels, 3, *trailing) if axis == 1 else (*trailing, 2, 3, channels)
    return torch.randn(shape, dtype=torch.float64)


def relaxed(layer: nn.Module, axis: int, **options) -> nn.Module:
    options = {"init": 1.0, "generator": torch.Generator().manual_seed(0)} | options
    return ce.relax(layer, where=lambda name, m: isinstance(m, nn.Linear), adapter=ADAPTERS[axis], **options)


over_axes = pytest.mark.parametrize("axis", [1, -1])
over_ranks = pytest.mark.parametrize("trailing", TRAILING, ids=str)


@over_axes
@over_ranks
def test_the_term_acts_on_channels_and_components_together(axis, trailing):
    layer, x = layer_for(axis), features(axis, trailing)
    plain = layer(x)
    relaxed(layer, axis, complement=False, gate=True)
    with torch.no_grad():
        layer.non_equivariant.gate.fill_(0.5)
    weight = 0.5 * layer.non_equivariant.weight
    if axis == 1:
        added = torch.einsum("oicj,bcj...->boi...", weight.view(5, 3, 4, 3), x)
    else:
        added = torch.einsum("iojc,...jc->...io", weight.view(3, 5, 3, 4), x)
    torch.testing.assert_close(layer(x) - plain, added, rtol=0, atol=1e-13)
    with ce.disabled(layer):
        assert torch.equal(layer(x), plain)


PRODUCTS = {getattr(torch.ops.aten, name) for name in ("bmm", "mm", "addmm", "convolution")}


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in PRODUCTS
        return function(*args, **(kwargs or {}))


@over_axes
@over_ranks
def test_one_product_does_both(axis, trailing):
    layer = relaxed(layer_for(axis), axis)
    with Products() as counter:
        layer(features(axis, trailing))
    assert counter.count == 1


@over_ranks
def test_layers_between_transpositions_are_the_same_map(trailing):
    layer, x = relaxed(layer_for(1), 1), features(1, trailing)
    inner = nn.Linear(4, 5, bias=False).double()
    inner.load_state_dict({"weight": layer.weight.detach()})
    inner = ce.relax(
        inner,
        where=lambda name, m: True,
        adapter=ce.adapters.vector_neurons(axis="swapped"),
        init=1.0,
        generator=torch.Generator().manual_seed(0),
    )
    with Products() as counter:
        found = inner(x.transpose(1, -1)).transpose(1, -1)
    assert counter.count == 1 and found.is_contiguous()
    torch.testing.assert_close(found, layer(x), rtol=0, atol=1e-14)


class Sizes(TorchDispatchMode):
    """Finds the largest result of any operation."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().nbytes() == result.nbytes:
            self.largest = max(self.largest, result.numel())
        return result


def test_backward_makes_no_matrix_per_element_of_the_batch():
    layer, x = relaxed(layer_for(1), 1), features(1, (3,)).repeat(16, 1, 1, 1)
    output = layer(x)
    with Sizes() as sizes:
        output.sum().backward()
    assert layer.non_equivariant.weight.numel() <= sizes.largest <= output.numel()


@pytest.mark.parametrize("axis, shape", [(1, (2, 3, 4)), (1, (2, 5, 3)), (-1, (2, 4, 3)), ("swapped", (2, 4, 3, 7))])
def test_features_of_another_layout_are_refused(axis, shape):
    layer = layer_for(1 if axis == 1 else -1)
    ce.relax(layer, where=lambda name, m: True, adapter=ce.adapters.vector_neurons(axis))
    with pytest.raises(ce.errors.RepresentationError, match=r"expected 4 channels of 3 components; .*'swapped' for"):
        layer(torch.zeros(shape, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(0, 4, 3), (0, 4, 3, 7), (2, 4, 3, 0)], ids=str)
def test_nothing_in_nothing_out(shape):
    layer = relaxed(VNLinear(4, 50), 1)
    assert layer(torch.zeros(shape)).shape == (shape[0], 50, *shape[2:])


@over_axes
def test_non_contiguous_features(axis):
    layer = relaxed(layer_for(axis), axis)
    x = features(axis, (7, 4))
    turned = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    torch.testing.assert_close(layer(turned), layer(x), rtol=0, atol=1e-13)


@over_axes
def test_the_equivariant_maps_are_the_layers_own(axis):
    layer = relaxed(layer_for(axis), axis)
    assert layer.non_equivariant.projection.rank == layer.weight.numel()
    eye = torch.eye(3, dtype=torch.float64)
    own = torch.kron(layer.weight, eye) if axis == 1 else torch.kron(eye, layer.weight)
    assert layer.non_equivariant.projection.complement(own.detach()).norm() < 1e-14


@over_axes
def test_folding_takes_the_mean_of_the_diagonal(axis):
    layer = layer_for(axis)
    before = layer.weight.detach().clone()
    relaxed(layer, axis, complement=False)
    weight = layer.non_equivariant.weight.detach().clone()
    blocks = weight.view(5, 3, 4, 3).permute(0, 2, 1, 3) if axis == 1 else weight.view(3, 5, 3, 4).permute(1, 3, 0, 2)
    report = ce.finalize(layer, fold=True, on_violation="drop")
    torch.testing.assert_close(layer.weight - before, blocks.diagonal(dim1=2, dim2=3).mean(-1), rtol=0, atol=1e-14)
    assert report.layers[0].unfolded == 0


@over_axes
def test_parametrized_weights_are_relaxed_and_not_folded(axis):
    layer = nn.utils.parametrizations.weight_norm(layer_for(axis))
    x = features(axis, (7,))
    plain = layer(x)
    relaxed(layer, axis, complement=False)
    assert (layer(x) - plain).abs().max() > 0.1
    report = ce.finalize(layer, fold=True, on_violation="drop")
    assert torch.equal(layer(x), plain) and report.layers[0].folded == 0 and "does not fit" in str(report)


@pytest.mark.parametrize(
    "layer, axis, match",
    [
        (nn.Linear(4, 5), -1, "bias"),
        (VNLinear(4, 5), -1, "contracts axis -1"),
        (VNLinear(3, 3), -1, "contracts axis -1"),
        (nn.Linear(4, 5, bias=False), 1, "contracts axis 1"),
        (nn.Linear(3, 3, bias=False), 1, "contracts axis 1"),
        (nn.Conv1d(4, 5, 1), 1, "expected nn.Linear"),
    ],
)
def test_layers_that_act_otherwise_are_refused(layer, axis, match):
    before = type(layer)
    with pytest.raises(ce.errors.RelaxationError, match=match):
        ce.relax(layer, where=lambda name, m: True, adapter=ADAPTERS[axis])
    assert type(layer) is before


def test_other_axes_are_refused():
    with pytest.raises(ce.errors.RelaxationError, match=r"vector_neurons\(axis=2\).*'swapped' for"):
        ce.adapters.vector_neurons(axis=2)


def test_nothing_is_matched_by_itself():
    with pytest.raises(ce.errors.RelaxationError, match="no layer was matched"):
        ce.relax(VNLinear(4, 5))


def test_equal_layers_share_a_class_and_a_stack():
    model = relaxed(nn.Sequential(VNLinear(4, 4), VNLinear(4, 4)), 1)
    assert type(model[0]) is type(model[1])
    assert len(ce.constraints.weight(model, level=1.0).terms.stacks) == 1


class Scaled(nn.Linear):
    """Mixes channels, times a number that is learned or kept in a buffer."""

    def __init__(self, axis: int, *, learned: bool = True) -> None:
        super().__init__(4, 5, bias=False)
        self.axis = axis
        if learned:
            self.factor = nn.Parameter(torch.ones(()))
        else:
            self.register_buffer("factor", torch.ones(()))

    def forward(self, x: Tensor, sign: float = 1.0) -> Tensor:
        pattern = "oc,bci...->boi..." if self.axis == 1 else "oc,...c->...o"
        return sign * self.factor * torch.einsum(pattern, self.weight, x)


@over_axes
@over_ranks
@pytest.mark.parametrize("learned", [True, False])
def test_what_a_layer_makes_of_its_weight_is_its_own(axis, trailing, learned):
    plain, x = Scaled(axis, learned=learned).double(), features(axis, trailing)
    layer, reference = Scaled(axis, learned=learned).double(), relaxed(layer_for(axis), axis)
    layer.load_state_dict(plain.state_dict())
    relaxed(layer, axis, init=0.0)
    for value in (1.0, 0.3, -2.0):
        with torch.no_grad():
            plain.factor.fill_(value)
            layer.factor.fill_(value)
        torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=1e-14)
    if learned:
        layer(x).square().sum().backward()
        assert layer.factor.grad.abs() > 0.1
    with torch.no_grad():
        layer.non_equivariant.weight.copy_(reference.non_equivariant.weight)
    with ce.disabled(reference):
        added = -reference(x)
    torch.testing.assert_close(layer(x) - plain(x), reference(x) + added, rtol=0, atol=1e-13)


def test_a_swapped_layer_with_more_than_its_weight_keeps_its_forward_pass():
    plain, x = Scaled(-1).double(), features(1, (7,)).transpose(1, -1)
    layer = Scaled(-1).double()
    layer.load_state_dict(plain.state_dict())
    ce.relax(layer, where=lambda name, m: True, adapter=ce.adapters.vector_neurons("swapped"))
    with torch.no_grad():
        plain.factor.fill_(0.5)
        layer.factor.fill_(0.5)
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=1e-14)


@over_axes
def test_into_a_layer_with_more_than_its_weight_nothing_is_folded(axis):
    layer, x = Scaled(axis).double(), features(axis, (7,))
    with torch.no_grad():
        plain = layer(x)
    relaxed(layer, axis, complement=False)
    report = ce.finalize(layer, fold=True, on_violation="drop")
    assert torch.equal(layer(x), plain) and report.layers[0].folded == 0 and "does not fit" in str(report)


class Renamed(VNLinear):
    """Its features are called x, and a second argument changes the result."""

    def forward(self, x: Tensor, sign: float = 1.0) -> Tensor:
        return sign * super().forward(x)


@pytest.mark.parametrize("make", [lambda: Renamed(4, 5), lambda: Scaled(1)], ids=["weight alone", "more"])
def test_features_may_be_passed_by_the_layers_own_name(make):
    layer, x = make().double(), features(1, (7,))
    plain = layer(x)
    relaxed(layer, 1)
    assert torch.equal(layer(x=x), layer(x)) and (layer(x) - plain).abs().max() > 0.1
    torch.testing.assert_close(layer(x, sign=-1.0) - layer(x=x), -2 * plain, rtol=0, atol=1e-13)
    with ce.disabled(layer):
        assert torch.equal(layer(x=x), plain)


@pytest.mark.parametrize("network", [VNPointNet, VNDGCNN])
def test_networks_end_equivariant(network):
    model = network(4, width=6, k=5)
    points, labels = torch.randn(6, 24, 3), torch.randint(4, (6,))
    ce.relax(model, where=lambda name, m: isinstance(m, VNLinear), adapter=ce.adapters.vector_neurons())
    constraint = ce.constraints.weight(model, level=ce.schedules.linear(0.3, 0.0, 5))
    optimizer = ce.ConstrainedOptimizer(torch.optim.Adam(ce.parameter_groups(model, lr=1e-2)), constraint)
    for step in range(8):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(points), labels).backward()
        optimizer.step()
        if step == 1:
            assert all(r.term.weight.norm() > 0 for r in ce.relaxations(model) if "pool" not in r.name)
    symmetry = ce.Symmetry(ce.groups.SO3(), inputs="1x1", outputs=None)
    ce.finalize(model, optimizer=optimizer, batches=[points])
    untouched = network(4, width=6, k=5)
    untouched.load_state_dict(model.state_dict())
    ce.assert_equivariant(untouched.double().eval(), points.double(), symmetry=symmetry, tolerance=1e-10)
