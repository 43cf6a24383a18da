"""escnn layers: what the relaxed layer computes, its cached kernels, its export, its projection, and its limits."""

import copy
import itertools
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("escnn")

from escnn import gspaces
from escnn import nn as enn

import constrained_equiv as ce
from constrained_equiv.kernels import Kernels
from tests import steerable

LAYERS = {
    "linear": lambda: steerable.linear("C_8"),
    "linear, SO(3)": lambda: steerable.linear("SO(3)"),
    "stride": lambda: steerable.planar("C_4", stride=2, padding=1),
    "circular": lambda: steerable.planar("D_4", padding=1, padding_mode="circular"),
    "reflect": lambda: steerable.planar("C_8", padding=1, padding_mode="reflect"),
    "dilation": lambda: steerable.planar("C_8", dilation=2, bias=False),
    "groups": lambda: steerable.planar("C_4", groups=2),
    "continuous": lambda: steerable.planar("SO(2)"),
    "continuous, flips": lambda: steerable.planar("O(2)"),
    "off the grid, flips": lambda: steerable.planar("D_8"),
    "flips": lambda: steerable.planar("flips"),
    "volume": lambda: steerable.volume("cube", stride=2, padding=1),
    "volume, continuous": lambda: steerable.volume("O(3)", dilation=2, bias=False),
    "volume, transposed": lambda: steerable.volume("SO(3)", transposed=True, stride=2, output_padding=1),
    "transposed": lambda: steerable.planar("C_4", transposed=True, stride=2, output_padding=1),
    "transposed, groups": lambda: steerable.planar("C_8", transposed=True, groups=2),
}
table = pytest.mark.parametrize("name", LAYERS)


def features(layer, size: int = 7, seed: int = 1) -> enn.GeometricTensor:
    generator = torch.Generator().manual_seed(seed)
    grid = (size,) * getattr(layer, "d", 0)
    return layer.in_type(torch.randn(2, layer.in_type.size, *grid, generator=generator))


def relaxed(layer, **options):
    return ce.relax(layer, **{"init": 0.3, "generator": torch.Generator().manual_seed(0)} | options)


def term_of(layer):
    (found,) = ce.relaxations(layer)
    return found.term


def with_kernel(layer, kernel: Tensor, x: Tensor) -> Tensor:
    """What torch's own operation of the layer makes of a kernel, without bias."""
    if isinstance(layer, enn.Linear):
        return nn.functional.linear(x, kernel)
    if hasattr(layer, "output_padding"):
        operation = getattr(nn.functional, f"conv_transpose{layer.d}d")
        return operation(x, kernel, None, layer.stride, layer.padding, layer.output_padding, layer.groups,
                         layer.dilation)  # fmt: skip
    if layer.padding_mode != "zeros":
        x = nn.functional.pad(x, (layer.padding,) * 4, mode=layer.padding_mode)
    padding = layer.padding if layer.padding_mode == "zeros" else 0
    operation = getattr(nn.functional, f"conv{layer.d}d")
    return operation(x, kernel, None, layer.stride, padding, layer.dilation, layer.groups)


def assert_near(first: Tensor, second: Tensor) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=3e-6 * max(1.0, second.detach().abs().max().item()))


# --- what it computes -------------------------------------------------------------------------------------------------


@table
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_the_term_is_a_kernel_of_the_same_operation(name, training):
    layer = LAYERS[name]()
    x = features(layer)
    plain = layer(x)
    relaxed(layer, complement=False, gate=True).train(training)
    term = term_of(layer)
    with torch.no_grad():
        term.gate.fill_(0.5)
        term.scale.fill_(0.7)
        layer.train().train(training)
    y = layer(x)
    assert isinstance(y, enn.GeometricTensor) and y.type == layer.out_type
    assert_near(y.tensor - plain.tensor, with_kernel(layer, 0.35 * term.weight, x.tensor))


class Convolutions(TorchDispatchMode):
    """Counts convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.convolution.default
        return function(*args, **(kwargs or {}))


def test_one_convolution_does_both():
    layer = LAYERS["circular"]()
    relaxed(layer)
    with Convolutions() as counter:
        layer(features(layer))
    assert counter.count == 1


@pytest.mark.parametrize("name", ["circular", "transposed", "groups"])
def test_weight_over_root_rows_is_the_rms_output_for_white_noise(name):
    layer = {
        "circular": lambda: steerable.planar("D_4", padding=1, padding_mode="circular"),
        "transposed": lambda: steerable.planar("C_4", transposed=True, stride=2),
        "groups": lambda: steerable.planar("C_4", groups=2),
    }[name]()
    relaxed(layer)
    constraint = ce.constraints.weight(layer, level=1.0)
    x = torch.randn(20, layer.in_type.size, 40, 40)
    measured = with_kernel(layer, term_of(layer).weight.detach(), x)[..., 4:-4, 4:-4].square().mean().sqrt()
    assert constraint.measure.values(constraint.terms).item() == pytest.approx(measured.item(), rel=0.02)


def test_relative_reads_the_response_of_the_layer():
    layer = LAYERS["stride"]()
    relaxed(layer)
    constraint = ce.constraints.relative(layer, level=1.0)
    response = layer(features(layer)).tensor.square().mean().sqrt().item()
    absolute = ce.constraints.weight(layer, level=1.0)
    expected = absolute.measure.values(absolute.terms).item() / response
    assert constraint.measure.values(constraint.terms).item() == pytest.approx(expected, rel=1e-5)


def test_activation_of_a_linear_layer_and_not_of_a_convolution():
    layer = LAYERS["linear"]()
    relaxed(layer)
    constraint = ce.constraints.activation(layer, level=1.0)
    x = features(layer)
    layer(x)
    added = nn.functional.linear(x.tensor, term_of(layer).weight).square().mean().sqrt().item()
    assert constraint.measure.values(constraint.terms).item() == pytest.approx(added, rel=1e-5)
    with pytest.raises(ce.errors.ConstraintError, match="convolution"):
        ce.constraints.activation(relaxed(LAYERS["stride"]()), level=1.0)


def test_lie_is_defined_where_the_grid_carries_the_group():
    layer = relaxed(LAYERS["circular"](), complement=False)
    constraint = ce.constraints.lie(layer, level=1.0)
    assert constraint.measure.values(constraint.terms).item() > 0.1
    for name in ("continuous", "dilation", "linear, SO(3)"):
        with pytest.raises(ce.errors.ConstraintError, match="undefined for kernels of continuous groups"):
            constraint = ce.constraints.lie(relaxed(LAYERS[name]()), level=1.0)
            constraint.measure.values(constraint.terms)


# --- cached kernels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "stride", "transposed"])
@pytest.mark.parametrize("evaluate_with_terms", [True, False])
def test_every_order_of_steps_leaves_the_right_kernel(name, evaluate_with_terms):
    """Modes, relaxing, disabling and finalizing in every order: evaluation equals what training mode would expand."""
    for order in itertools.permutations(["relax", "evaluate", "disable", "train"]):
        layer = LAYERS[name]()
        x = features(layer)
        plain = layer(x).tensor
        scope = None
        for step in order:
            if step == "relax":
                relaxed(layer, evaluate_with_terms=evaluate_with_terms)
            elif step == "disable":
                scope = ce.disabled(layer)
                scope.__enter__()
            else:
                layer.train(step == "train")
            check(layer, x, plain)
        scope.__exit__(None, None, None)
        check(layer, x, plain)
        layer.eval()
        check(layer, x, plain)
        ce.finalize(layer, on_violation="drop", batches=[x] if evaluate_with_terms else None)
        assert not layer.training and torch.equal(layer(x).tensor, plain)
        layer.train()
        assert torch.equal(layer(x).tensor, plain)


def check(layer, x, plain: Tensor) -> None:
    found = layer(x).tensor
    term = layer._modules.get("non_equivariant")
    if term is None or not term.active:
        assert torch.equal(found, plain)
    else:
        assert_near(found - plain, with_kernel(layer, term.weight, x.tensor))


@pytest.mark.parametrize("name", ["linear", "stride", "transposed"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_finalized_states_load_strictly_into_an_untouched_layer(name, training):
    layer = LAYERS[name]().train(training)
    keys = layer.state_dict().keys()
    untouched = LAYERS[name]().train(training)
    relaxed(layer)
    report = ce.finalize(layer, on_violation="drop", batches=[features(layer)])
    assert layer.training == training and report.output_change > 0
    assert layer.state_dict().keys() == keys
    untouched.load_state_dict({key: value.clone() for key, value in layer.state_dict().items()})
    assert torch.equal(untouched(features(layer)).tensor, layer(features(layer)).tensor)


def test_scales_and_levels_reach_the_cache_through_training_mode():
    layer = relaxed(LAYERS["stride"]())
    x = features(layer)
    layer.eval()
    before = layer(x).tensor
    with torch.no_grad():
        layer.train()
        term_of(layer).scale.zero_()
    plain = layer.eval()(x).tensor
    with ce.disabled(layer):
        assert_near(plain, layer(x).tensor)
    assert (before - plain).abs().max() > 0.1


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "stride", "transposed, groups"])
def test_an_export_contains_the_term_and_says_so(name):
    layer = LAYERS[name]()
    x = features(layer)
    expected = layer.eval()(x).tensor
    relaxed(layer.train())
    with pytest.warns(UserWarning, match=r"contains the non-equivariant term.*ce\.finalize"):
        exported = layer.export()
    assert_near(exported(x.tensor), layer(x).tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with ce.disabled(layer):
            assert_near(layer.export()(x.tensor), expected)
        ce.finalize(layer, on_violation="drop")
        exported = layer.export()
    assert type(exported) in (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    assert_near(exported(x.tensor), expected)


def test_a_network_exports_as_a_whole():
    network = steerable.network()
    x = network.in_type(torch.randn(2, 2, 6, 6))
    network(x)
    relaxed(network)
    with pytest.warns(UserWarning, match="contains the non-equivariant term"):
        exported = network.eval().export()
    assert_near(exported(x.tensor), network(x).tensor)


# --- the projection ---------------------------------------------------------------------------------------------------


def kernels_of(name: str) -> tuple[nn.Module, Kernels]:
    layer = LAYERS[name]()
    return layer, term_of(relaxed(layer)).projection


@table
def test_p_is_an_orthogonal_projection(name):
    _, kernels = kernels_of(name)
    first, second = torch.randn(2, 3, *kernels.shape, dtype=torch.float64)
    once = kernels.project(first)
    torch.testing.assert_close(kernels.project(once), once, rtol=0, atol=1e-13)
    products = (once * second).sum(), (first * kernels.project(second)).sum()
    torch.testing.assert_close(*products, rtol=0, atol=1e-11)


@table
def test_p_leaves_every_kernel_of_the_layer_alone(name):
    layer, kernels = kernels_of(name)
    for _ in range(3):
        layer.weights.data.normal_()
        with ce.disabled(layer):
            own = layer.expand_parameters()[0].detach()
        assert kernels.complement(own).norm() < 1e-6 * own.norm()


@table
def test_the_rank_is_that_of_the_layers_own_kernels_or_more(name):
    layer, kernels = kernels_of(name)
    if name in ("stride", "circular", "groups", "transposed", "flips", "volume"):  # escnn's band limit leaves some out
        assert kernels.rank > layer.weights.numel()
    else:
        assert kernels.rank == layer.weights.numel()


def test_the_band_limit_is_what_escnn_leaves_out():
    """Without a frequency cutoff escnn's own, redundant basis spans all kernels that the grid leaves alone."""
    space = gspaces.rot2dOnR2(4)
    regular = space.type(space.regular_repr)
    for size, rank in ((3, 36), (5, 100)):
        layer = enn.R2Conv(regular, regular, size, frequencies_cutoff=6.0)
        span = torch.linalg.matrix_rank(
            torch.stack([layer.basisexpansion(w).flatten() for w in torch.eye(layer.weights.numel())]), rtol=1e-4
        )
        assert span == rank == term_of(relaxed(layer)).projection.rank


def test_equal_layers_share_a_stack():
    space = gspaces.rot2dOnR2(8)
    regular = space.type(*[space.regular_repr] * 2)
    network = enn.SequentialModule(*(enn.R2Conv(regular, regular, 3, padding=1) for _ in range(3)))
    first, second, third = ce.relaxations(relaxed(network))
    assert first.term.projection == second.term.projection == third.term.projection
    assert len(ce.constraints.weight(network, level=1.0).terms.stacks) == 1


def test_layers_whose_basis_was_changed_are_refused():
    space = gspaces.rot2dOnR2(4)
    regular = space.type(space.regular_repr)
    layer = enn.R2Conv(regular, regular, 3, recompute=True)
    for block in layer.basisexpansion.children():
        block.sampled_basis = torch.randn_like(block.sampled_basis)
    with pytest.raises(ce.errors.RelaxationError, match="breaks the symmetry of its field types"):
        relaxed(layer)
    assert type(layer) is enn.R2Conv


def test_shared_bases_are_neither_cast_nor_moved():
    layer = LAYERS["dilation"]()
    before = {key: (id(b), b.dtype, b.clone()) for key, b in layer.basisexpansion.named_buffers()}
    relaxed(layer, complement=False)
    ce.finalize(layer, fold=True, on_violation="drop")
    for key, buffer in layer.basisexpansion.named_buffers():
        identity, dtype, value = before[key]
        assert id(buffer) == identity and buffer.dtype == dtype and torch.equal(buffer, value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_layers_whose_basis_is_rounded_are_refused(dtype):
    layer = copy.deepcopy(LAYERS["continuous"]()).to(dtype)  # a copy: bases are shared
    with pytest.raises(ce.errors.RelaxationError, match=r"R2Conv is in torch\..*float16.*then cast the result"):
        ce.relax(layer)
    assert type(layer) is enn.R2Conv


def test_a_layer_that_is_used_twice_has_one_term():
    field = steerable.planar("D_4").in_type
    layer = enn.R2Conv(field, field, 3, padding=1)
    network = nn.Sequential(layer, layer)
    x = features(layer)
    once = relaxed(network)[0](x)
    assert len(ce.relaxations(network)) == 1 and torch.equal(network(x).tensor, layer(once).tensor)
    ce.finalize(network, on_violation="drop")
    assert type(layer) is enn.R2Conv


def test_layers_without_freedom_are_skipped():
    space = gspaces.trivialOnR2()
    scalar = space.type(space.trivial_repr)
    with pytest.raises(ce.errors.RelaxationError, match="equivariant already"):
        ce.relax(enn.R2Conv(scalar, scalar, 3, frequencies_cutoff=6.0))


# --- volumes ----------------------------------------------------------------------------------------------------------


def turned(element: Tensor, x: enn.GeometricTensor, g) -> enn.GeometricTensor:
    matrix = torch.as_tensor(x.type.representation(g)).to(x.tensor)
    return x.type(steerable.voxels(element, torch.einsum("oc,nc...->no...", matrix, x.tensor)))


@pytest.mark.parametrize("name", ["cube", "SO(3), transposed"])
def test_volumes(name):
    if name == "cube":
        space = gspaces.octaOnR3()
        inputs, outputs = space.type(space.trivial_repr), space.type(space.regular_repr)
        layer = enn.R3Conv(inputs, outputs, 3, padding=1)
    else:
        space = gspaces.rot3dOnR3(maximum_frequency=2)
        inputs = outputs = space.type(space.irrep(1), space.irrep(0))
        layer = enn.R3ConvTransposed(inputs, outputs, 3, stride=2)
    x = features(layer, 4)
    plain = layer(x).tensor
    turns = [(g, m) for g, m in steerable.lattice_elements(space) if m.trace() < 2.5]

    def error() -> float:
        g, matrix = turns[4]
        gap = layer(turned(matrix, x, g)).tensor - turned(matrix, layer(x), g).tensor
        return (gap.norm() / layer(x).tensor.norm()).item()

    assert error() < 1e-5
    relaxed(layer, complement=False)
    term = term_of(layer)
    spread = 8 if name != "cube" else 1
    assert term.rows == outputs.size * spread
    added = torch.nn.functional.conv3d(x.tensor, term.weight, padding=1) if name == "cube" else (
        torch.nn.functional.conv_transpose3d(x.tensor, term.weight, stride=2))  # fmt: skip
    assert_near(layer(x).tensor - plain, added)
    assert error() > 0.1
    report = ce.finalize(layer, fold=True, on_violation="drop")
    assert report.layers[0].folded > 0 and error() < 1e-5
    assert (layer(x).tensor - plain).abs().max() > 1e-2  # the equivariant part stayed


def test_the_group_average_of_volumes_is_p():
    space = gspaces.octaOnR3()
    inputs, outputs = space.type(space.trivial_repr), space.type(space.regular_repr)
    kernels = term_of(relaxed(enn.R3Conv(inputs, outputs, 3))).projection
    drawn = torch.randn(1, *kernels.shape, dtype=torch.float64)
    moved = []
    for g, matrix in steerable.lattice_elements(space):  # K -> rho(g) K(g^-1 .), one row of channels per input
        channels = torch.as_tensor(outputs.representation(g))
        moved.append(torch.einsum("oc,nci...->noi...", channels, steerable.voxels(matrix, drawn)))
    torch.testing.assert_close(kernels.project(drawn), torch.stack(moved).mean(0), rtol=0, atol=1e-13)
    assert len(moved) == 24


# --- constraints of a part of a layer ---------------------------------------------------------------------------------


@table
def test_squares_of_blocks_add_up_to_the_layer(name):
    layer = relaxed(LAYERS[name]())
    blocks = ce.constraints.weight(layer, level=1.0, per="block")
    whole = ce.constraints.weight(layer, level=1.0)
    values = blocks.measure.values(blocks.terms)
    torch.testing.assert_close(values.square().sum().sqrt()[None], whole.measure.values(whole.terms))
    assert (values > 0).all() and all(" -> " in entry.name for entry in blocks.entries)


@table
def test_blocks_are_pulled_along_their_own_entries(name):
    """The derivative of each value, by autograd through the blocks cut out of the kernel."""
    layer = relaxed(LAYERS[name]())
    term = term_of(layer)
    record = ce.constraints.weight(layer, level=1.0, per="block")
    coefficients = torch.rand(len(record.entries))
    blocks = [block for block in term.projection.map_blocks if not block.equivariant]
    norms = [torch.stack([term.weight[place].square().sum() for place in b.places]).sum().sqrt() for b in blocks]
    values = torch.stack(norms) / term.rows**0.5
    torch.testing.assert_close(values.detach(), record.measure.values(record.terms))
    (expected,) = torch.autograd.grad((values * coefficients).sum(), term.weight)
    record.measure.pull(record.terms, coefficients)
    assert_near(term.weight.grad, expected)


@pytest.mark.parametrize("name", ["stride", "circular", "linear"])
def test_squares_of_generators_average_to_the_layer(name):
    layer = relaxed(LAYERS[name]())
    single, whole = (ce.constraints.lie(layer, level=1.0, per=per) for per in ("generator", "layer"))
    values = single.measure.values(single.terms)
    assert len(values) == {"stride": 1, "circular": 2, "linear": 1}[name]
    torch.testing.assert_close(values.square().mean().sqrt()[None], whole.measure.values(whole.terms))


def test_generators_of_continuous_groups_and_subgroups_of_kernels_are_refused():
    with pytest.raises(ce.errors.ConstraintError, match=r"per='generator' at layer ''.*no generator.*weight"):
        ce.constraints.lie(relaxed(LAYERS["continuous"]()), level=1.0, per="generator")
    with pytest.raises(ce.errors.ConstraintError, match=r"subgroup C_2 at layer '', whose term is a kernel.*lie\(per="):
        ce.constraints.subgroup(relaxed(LAYERS["stride"]()), ce.groups.cyclic(2), level=1.0)


# --- training ---------------------------------------------------------------------------------------------------------


def test_training_keeps_the_term_in_the_complement_and_the_end_is_equivariant():
    network = steerable.network()
    x = network.in_type(torch.randn(8, 2, 6, 6))
    target = torch.randn(8, 2, 6, 6)
    ce.relax(network)
    steps = 20
    constraint = ce.constraints.weight(network, level=ce.schedules.linear(0.5, 0.0, steps))
    optimizer = ce.ConstrainedOptimizer(torch.optim.Adam(ce.parameter_groups(network, lr=1e-2)), constraint)
    largest = 0.0
    for _ in range(steps + 5):
        optimizer.zero_grad()
        (network(x).tensor - target).square().mean().backward()
        optimizer.step()
        for relaxation in ce.relaxations(network):
            weight = relaxation.term.weight.detach()
            largest = max(largest, weight.norm().item())
            part = relaxation.term.projection.project(weight)
            assert part.norm() <= 1e-5 * max(weight.norm().item(), 1e-3)
    assert largest > 0.05
    ce.finalize(network, optimizer=optimizer)
    group = ce.groups.cyclic(4)
    wrapped = steerable.Steerable(network.eval())
    vector = ce.actions.feature_maps(ce.representations.frequency(1, group=group))
    ce.assert_equivariant(wrapped, x.tensor, symmetry=ce.Symmetry(group, vector, vector), tolerance=1e-5)


def test_deepcopies_of_relaxed_layers_are_independent():
    layer = relaxed(LAYERS["stride"]())
    twin = copy.deepcopy(layer)
    x = features(layer)
    expected = layer(x).tensor.clone()
    with torch.no_grad():
        twin.non_equivariant.weight.mul_(2)
    assert torch.equal(layer(x).tensor, expected) and not torch.equal(twin(x).tensor, expected)


def test_the_table_names_layers_by_their_fields():
    text = str(ce.relaxations(relaxed(LAYERS["circular"]())))
    assert "1xirrep_1,1 + 1xregular + 1xirrep_1,1 -> 1xquotient" in text and "R2Conv" in text


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_the_step_of_split_kernels_compiles_in_one_graph():
    """Of C_8, whose P falls into parts: finding them is no part of the step."""
    layer = ce.relax(steerable.planar("C_8"), init=0.1)
    optimizer = ce.ConstrainedOptimizer(torch.optim.Adam(layer.parameters()), ce.constraints.weight(layer, level=9.0))
    given = [0.1 * torch.randn_like(p) for p in layer.parameters()]

    def project(before):
        for parameter, gradient in zip(layer.parameters(), given, strict=True):
            parameter.grad = gradient.clone()
        before()
        return [p.grad for p in layer.parameters()]

    project(optimizer._engine.before)  # what is worked out once
    torch._dynamo.reset()
    compiled = torch.compile(optimizer._engine.before, fullgraph=True, backend="aot_eager")
    for found, expected in zip(project(compiled), project(optimizer._engine.before), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


# --- the finish -------------------------------------------------------------------------------------------------------


def vectors_of(space):
    return space.type(space.irrep(1), space.irrep(1))


def regular_fields(space):
    return space.type(space.regular_repr, space.regular_repr)


def induced_fields(space):
    rotations = space.fibergroup.subgroup((None, -1))[0]
    return space.type(*[space.induced_repr((None, -1), rotations.irrep(1))] * 2)


NORMS = {
    "iid": (enn.IIDBatchNorm2d, regular_fields, lambda: gspaces.rot2dOnR2(4)),
    "norm": (enn.NormBatchNorm, vectors_of, lambda: gspaces.rot2dOnR2(4)),
    "irreps": (enn.GNormBatchNorm, vectors_of, lambda: gspaces.rot2dOnR2(4)),
    "inner": (enn.InnerBatchNorm, regular_fields, lambda: gspaces.rot2dOnR2(4)),
    "induced": (enn.InducedNormBatchNorm, induced_fields, lambda: gspaces.flipRot2dOnR2(-1, maximum_frequency=3)),
}


def normalised(name: str):
    """A convolution and a normalisation of its output, on fields that the latter takes."""
    torch.manual_seed(0)
    kind, fields, space = NORMS[name]
    field = fields(space())
    return enn.SequentialModule(enn.R2Conv(field, field, 3, padding=1), kind(field))


def statistics_of(model):
    return {name: b.clone() for name, b in model.named_buffers() if "running_" in name and b.numel()}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NORMS)
def test_statistics_under_any_name_are_those_of_the_model_without_terms(name, training):
    plain, model = normalised(name), relaxed(normalised(name), init=1.0)
    batches = [features(plain[0], seed=seed) for seed in range(3)]
    for x in batches:
        model(x)
    spoilt = statistics_of(model)
    model.train(training)
    report = ce.finalize(model, batches=batches, on_violation="drop")
    assert report.recalibrated == 1 == ce.recalibrate(plain, batches)
    expected, found = statistics_of(plain), statistics_of(model)
    assert found and found.keys() == expected.keys()
    for key, value in found.items():
        assert_near(value, expected[key])
    assert any((spoilt[key] - found[key]).norm() > 0.1 * found[key].norm() for key in found)
    assert_near(model.eval()(batches[0]).tensor, plain.eval()(batches[0]).tensor)
    assert not any("momentum" in note for note in report.notes)


@pytest.mark.parametrize("training", [True, False])
def test_a_failure_leaves_kernels_as_they_were(training):
    model = relaxed(normalised("iid"), complement=False).train(training)
    x = features(model[0])
    before = model.eval()(x).tensor.detach()
    model.train(training)
    with pytest.raises(ArithmeticError):
        ce.finalize(model, batches=failing(x), fold=True, on_violation="drop")
    assert model.training is training and len(ce.relaxations(model)) == 1
    assert torch.equal(model.eval()(x).tensor, before)


def failing(x):
    yield x
    raise ArithmeticError


def test_a_geometric_tensor_that_is_overwritten_is_kept_as_it_came():
    class Doubled(nn.Module):
        def __init__(self, in_place: bool) -> None:
            super().__init__()
            self.layer, self.in_place = steerable.planar("C_8"), in_place

        def forward(self, x):
            result = self.layer(x)
            if self.in_place:
                x.tensor.mul_(3)
            return result

    reports = []
    for in_place in (False, True):
        torch.manual_seed(0)
        model = relaxed(Doubled(in_place))
        x = features(model.layer)
        entries = x.tensor.clone()
        reports.append(ce.finalize(model, batches=[x], on_violation="drop"))
        assert torch.equal(x.tensor, entries)
    assert reports[0].layers == reports[1].layers and reports[0].output_change == reports[1].output_change > 0
