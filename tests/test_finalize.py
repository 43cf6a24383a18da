"""The finish line: what is checked, removed, folded, recalibrated, measured and reported."""

import copy
import math
import pickle
import re

import pytest
import torch
from torch import nn

import constrained_equiv as ce
from constrained_equiv import groups
from constrained_equiv._terms import CHILD
from constrained_equiv.representations import permutation
from tests.cases import CASES, case_named, loss, tensors

table = pytest.mark.parametrize("case", CASES)


def spread(model, batch):
    return model(*batch)


def outputs(model, data):
    with torch.no_grad():
        return [part.clone() for part in tensors(model(*data))]


def assert_equal_outputs(first, second, data):
    for a, b in zip(outputs(first, data), outputs(second, data), strict=True):
        assert torch.equal(a, b)


def distance(first, second):
    """Relative Euclidean distance of two lists of tensors, as the report states it."""
    gap = math.hypot(*((a - b).double().norm().item() for a, b in zip(first, second, strict=True)))
    return gap / math.hypot(*(a.double().norm().item() for a in first))


def set_network(*, norm=False):
    """An equivariant network on sets (batch, 4, 3) with two relaxed layers, named 0 and 2."""
    torch.manual_seed(0)
    middle = PointNorm(3) if norm else nn.Tanh()
    return nn.Sequential(nn.Linear(3, 3), middle, nn.Linear(3, 3)).double()


class PointNorm(nn.BatchNorm1d):
    def forward(self, features):
        return super().forward(features.mT).mT


POINTS = permutation(4, channels=3)
SETS = ce.Symmetry(groups.symmetric(4), ce.actions.permute(-2), ce.actions.permute(-2))


def relax_sets(model, **options):
    options = {"init": 0.5, "generator": torch.Generator().manual_seed(1)} | options
    return ce.relax(
        model,
        where=lambda name, layer: isinstance(layer, nn.Linear),
        adapter=ce.adapters.linear(POINTS, POINTS, axes=(-2, -1)),
        **options,
    )


def batches(count=3, size=8):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(size, 4, 3, dtype=torch.float64, generator=generator) for _ in range(count)]


def train(model, optimizer, data, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(*data)).backward()
        optimizer.step()


# --- the way back -----------------------------------------------------------------------------------------------------


@table
@pytest.mark.parametrize("options", [{}, {"complement": False, "gate": True}], ids=["complement", "free, gated"])
def test_finalize_undoes_relax(case, options):
    plain, data = case.model(), case.data()
    model = case.model()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    classes = {name: type(m) for name, m in model.named_modules()}
    ce.finalize(case.relax(model, **options), on_violation="drop")
    assert {name: type(m) for name, m in model.named_modules()} == classes
    for name, module in plain.named_modules():
        assert vars(module).keys() == vars(model.get_submodule(name)).keys()
        assert module.training == model.get_submodule(name).training
        assert not model.get_submodule(name)._load_state_dict_pre_hooks
    assert all(dict(model.named_parameters())[name] is p for name, p in parameters.items())
    assert all(dict(model.named_buffers())[name] is b for name, b in buffers.items())
    assert list(model.state_dict()) == list(plain.state_dict())
    for key, value in plain.state_dict().items():
        assert value.dtype == model.state_dict()[key].dtype and torch.equal(value, model.state_dict()[key])
    assert_equal_outputs(plain, model, data)


@table
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_relax_constrain_step_finalize_verify(case, dtype):
    """The whole way, after which the model loads strictly into the untouched one and is equivariant to rounding."""
    if dtype == torch.float64 and case.dtype == torch.float32:
        pytest.skip("a case of float32 alone")
    data, model = case.data(dtype=dtype), case.relaxed(dtype, init=0.1)
    constraint = ce.constraints.weight(model, level=ce.schedules.linear(0.1, 0.0, 3))
    base = torch.optim.Adam(ce.parameter_groups(model, lr=1e-2))
    optimizer = ce.ConstrainedOptimizer(base, constraint)
    untouched, start = case.model(dtype), [p.clone() for p in case.model(dtype).parameters()]
    train(model, optimizer, data, 5)
    with ce.disabled(model.eval()):
        without = outputs(model, data)
    report = ce.finalize(model.train(), optimizer=optimizer, batches=None)
    assert all(layer.value == 0 == layer.removed for layer in report.layers)
    assert not any(torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True) if a.numel())
    untouched.load_state_dict(model.state_dict(), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(without, outputs(model.eval(), data), strict=True))
    assert_equal_outputs(untouched.eval(), model, data)
    assert case.error(model, data) < (case.tolerance if dtype == case.dtype else case.tolerance32)


@table
def test_disabled_equals_finalized(case):
    data, model = case.data(), case.relaxed()
    model.eval()
    with ce.disabled(model):
        expected = outputs(model, data)
    assert distance(expected, outputs(model, data)) > 1e-2
    ce.finalize(model, on_violation="drop")
    assert all(torch.equal(a, b) for a, b in zip(expected, outputs(model, data), strict=True))
    assert case.error(model, data) < case.tolerance


@table
def test_a_finalized_model_is_an_ordinary_one_again(case):
    model, data = case.relaxed(), case.data()
    ce.finalize(model, on_violation="drop")
    assert_equal_outputs(copy.deepcopy(model).eval(), model.eval(), data)
    again = case.relax(model)
    assert ce.relaxations(again)


def test_a_finalized_model_can_be_pickled():
    case = case_named("e3nn gate network")
    model = case.relaxed()
    ce.finalize(model, on_violation="drop")
    assert_equal_outputs(model, pickle.loads(pickle.dumps(model)), case.data())


# --- the optimizer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constrained", [False, True])
@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.AdamW])
def test_terms_leave_the_optimizer(constrained, make):
    model, (x, *_) = relax_sets(set_network(), gate=True), batches()
    base = make(ce.parameter_groups(model, lr=1e-2))
    optimizer = base
    if constrained:
        optimizer = ce.ConstrainedOptimizer(base, ce.constraints.weight(model, level=0.5))
    train(model, optimizer, (x,), 2)
    own = {name: p for name, p in model.named_parameters() if CHILD not in name}
    state = {name: copy.deepcopy(base.state[p]) for name, p in own.items()}
    ce.finalize(model, optimizer=optimizer, on_violation="drop")
    assert [id(p) for group in base.param_groups for p in group["params"]] == [id(p) for p in model.parameters()]
    assert len(base.param_groups) == 2 and base.param_groups[0]["lr"] == 1e-2  # schedulers count groups
    assert {id(p) for p in base.state} == {id(p) for p in model.parameters()}
    for name, parameter in model.named_parameters():
        assert all(torch.equal(base.state[parameter][key], value) for key, value in state[name].items())
    before = model[0].weight.clone()
    train(model, optimizer, (x,), 1)
    assert not torch.equal(model[0].weight, before)
    if constrained:
        assert optimizer.constraints == () and optimizer.readings().names == ()


def test_a_handle_states_its_levels_and_is_detached():
    model, (x, *_) = relax_sets(set_network()), batches()
    base = torch.optim.SGD(ce.parameter_groups(model, lr=1e-2))
    handle = ce.attach(base, ce.constraints.weight(model, level=2.0))  # far above the terms
    train(model, base, (x,), 1)
    with pytest.raises(ce.errors.ViolationError):
        ce.finalize(model, optimizer=base)
    report = ce.finalize(model, optimizer=handle)
    assert {layer.allowed for layer in report.layers} == {2.0 + 1e-3}
    assert [id(p) for group in base.param_groups for p in group["params"]] == [id(p) for p in model.parameters()]
    assert handle.constraints == () and "constrained" not in base.state_dict()


def test_finalizing_a_part_keeps_the_constraints_of_the_rest():
    model, (x, *_) = nn.Sequential(relax_sets(set_network()), relax_sets(set_network())), batches()
    base = torch.optim.SGD(ce.parameter_groups(model, lr=1e-2))
    optimizer = ce.ConstrainedOptimizer(base, ce.constraints.weight(model, level=0.1))
    train(model, optimizer, (x,), 1)
    ce.finalize(model[0], optimizer=optimizer, on_violation="drop")
    assert [r.name for r in ce.relaxations(model)] == ["1.0", "1.2"]
    readings = optimizer.readings()
    train(model, optimizer, (x,), 2)
    climbed = optimizer.readings().multipliers > readings.multipliers
    assert [name for name, up in zip(readings.names, climbed, strict=True) if up] == ["1.0 (weight)", "1.2 (weight)"]
    ce.finalize(model, optimizer=optimizer, on_violation="drop")
    assert optimizer.constraints == ()


# --- the check --------------------------------------------------------------------------------------------------------


def test_terms_above_their_level_stay_unless_told_otherwise():
    model = relax_sets(set_network())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ce.errors.ViolationError) as caught:
        ce.finalize(model)
    message = str(caught.value)
    assert "2 of 2 terms" in message and "nothing was removed" in message and "on_violation='drop'" in message
    value = model[0].non_equivariant.weight.norm().item() / 12**0.5
    assert f"0: {value:.3g} > 0.001" in message
    assert len(ce.relaxations(model)) == 2
    assert all(
        torch.equal(value, before[key]) for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)
    )


@pytest.mark.parametrize("factor, passes", [(0.999, True), (1.001, False)])
def test_atol_is_in_the_unit_of_the_measure(factor, passes):
    model = relax_sets(set_network())
    with torch.no_grad():
        for layer in (model[0], model[2]):
            term = layer.non_equivariant
            term.weight.mul_(0.2 * factor * math.sqrt(12) / term.weight.norm())
    if passes:
        assert all(layer.allowed == 0.2 for layer in ce.finalize(model, atol=0.2).layers)
    else:
        with pytest.raises(ce.errors.ViolationError):
            ce.finalize(model, atol=0.2)


def test_terms_are_checked_against_the_constraints_they_were_trained_with():
    model = relax_sets(set_network())
    values = [r.term.weight.norm().item() / math.sqrt(12) for r in ce.relaxations(model)]
    constraints = [
        ce.constraints.weight(model, level=values[0] + 1e-6, where=lambda name: name == "0"),
        ce.constraints.lie(model, level=100.0, where=lambda name: name == "2"),
    ]
    optimizer = ce.ConstrainedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), *constraints)
    report = ce.finalize(model, optimizer=optimizer)
    first, second = report.layers
    assert (first.measure, second.measure) == ("weight", "lie")
    assert first.value == pytest.approx(values[0]) and first.allowed == pytest.approx(values[0] + 1e-6 + 1e-3)
    assert second.allowed == pytest.approx(100.001) and second.value > 0


@pytest.mark.parametrize("order", [1, -1])
def test_of_two_constraints_on_a_term_the_violated_one_decides(order):
    model = relax_sets(set_network())
    constraints = [ce.constraints.weight(model, level=1e-2), ce.constraints.lie(model, level=100.0)][::order]
    optimizer = ce.ConstrainedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), *constraints)
    with pytest.raises(ce.errors.ViolationError, match=r"> 0\.011"):
        ce.finalize(model, optimizer=optimizer)


def test_equalities_are_checked_on_both_sides():
    model = relax_sets(set_network(), gate=True)
    optimizer = ce.ConstrainedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), ce.constraints.gate(model))
    with torch.no_grad():
        for relaxation in ce.relaxations(model):
            relaxation.term.gate.fill_(-0.5)
    with pytest.raises(ce.errors.ViolationError, match=r"0\.5 > 0\.001"):
        ce.finalize(model, optimizer=optimizer)


def test_a_term_that_is_not_a_number_is_above_every_level():
    model = relax_sets(set_network())
    with torch.no_grad():
        model[0].non_equivariant.weight.fill_(float("nan"))
    constraints = ce.constraints.weight(model, level=1e6), ce.constraints.lie(model, level=1e6)
    optimizer = ce.ConstrainedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), *constraints)
    with pytest.raises(ce.errors.ViolationError, match="1 of 2 terms"):
        ce.finalize(model, optimizer=optimizer)


def test_a_scale_that_ended_at_zero_passes():
    model = relax_sets(set_network())
    scale = ce.constraints.scale(model, schedule=ce.schedules.triangle(4))
    optimizer = ce.ConstrainedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), scale)
    train(model, optimizer, batches(1), 3)
    with pytest.raises(ce.errors.ViolationError):
        ce.finalize(model, optimizer=optimizer)
    train(model, optimizer, batches(1), 1)
    assert all(layer.value == 0 for layer in ce.finalize(model, optimizer=optimizer).layers)


def test_keep_leaves_the_terms_above_their_level():
    model, (x, *_) = relax_sets(set_network()), batches()
    with torch.no_grad():
        model[0].non_equivariant.weight.zero_()
    kept, norm = model[2].non_equivariant, model[2].non_equivariant.weight.norm().item()
    optimizer = ce.ConstrainedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), ce.constraints.weight(model, level=0.0)
    )
    report = ce.finalize(model, optimizer=optimizer, on_violation="keep")
    assert [r.name for r in ce.relaxations(model)] == ["2"] and model[2].non_equivariant is kept
    assert type(model[0]) is nn.Linear
    gone, stays = report.layers
    assert (gone.kept, stays.kept) == (False, True)
    assert stays.value == pytest.approx(norm / 12**0.5) and stays.removed == 0.0
    assert str(report).splitlines()[2].endswith("kept")
    assert any(p is kept.weight for group in optimizer.param_groups for p in group["params"])
    train(model, optimizer, (x,), 2)  # goes on, with what is left
    assert not kept.weight.any()


def irreps_network():
    """Two layers on 1x0e + 1x1o, to 1x0e + 1x1e, in the complement."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)).double()
    adapter = ce.adapters.linear("1x0e + 1x1o", "1x0e + 1x1e")
    return ce.relax(model, where=lambda name, layer: isinstance(layer, nn.Linear), adapter=adapter)


def held(model, *constraints):
    return ce.ConstrainedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), *constraints)


def test_keep_names_the_blocks_and_generators_in_which_the_symmetry_broke():
    """Vectors to pseudovectors along the diagonal: rotations are kept, the inversion is not."""
    model = irreps_network()
    with torch.no_grad():
        model[1].non_equivariant.weight[1:, 1:] = 0.5 * torch.eye(3).double()
    report = ce.finalize(model, on_violation="keep")
    gone, stays = report.layers
    assert (gone.blocks, gone.generators) == ((), ())
    value = math.sqrt(3 / 4) / 2
    assert stays.blocks == (("1o -> 1e", pytest.approx(value)),)
    assert stays.generators == (("generator 0", pytest.approx(2 * value)),)
    assert f"symmetry broken in 1: 1o -> 1e {value:.3g}, generator 0 {2 * value:.3g}" in str(report).splitlines()


def test_the_largest_comes_first_and_what_is_below_atol_is_left_out():
    model = irreps_network()
    with torch.no_grad():
        weight = model[0].non_equivariant.weight
        weight[0, 1:], weight[1:, 0], weight[1:, 1:] = 0.1, 0.5, 1e-4
    stays, _ = ce.finalize(model, on_violation="keep", atol=1e-2).layers
    assert [name for name, _ in stays.blocks] == ["0e -> 1e", "1o -> 0e"]
    assert [name for name, _ in stays.generators] == ["algebra 0", "algebra 1", "algebra 2", "generator 0"]
    assert [value for _, value in stays.generators] == sorted((v for _, v in stays.generators), reverse=True)


def test_the_worst_block_of_a_term_decides_and_is_named():
    model = irreps_network()
    with torch.no_grad():
        model[0].non_equivariant.weight[1:, 0] = 0.5
        model[0].non_equivariant.weight[0, 1:] = 0.1
    optimizer = held(model, ce.constraints.weight(model, level=0.2, per="block"))
    with pytest.raises(ce.errors.ViolationError, match=r"1 of 2 terms .*\n  0\[0e -> 1e\]: 0\.433 > 0\.201 \(weight\)"):
        ce.finalize(model, optimizer=optimizer)
    assert len(ce.relaxations(model)) == 2


def test_layers_that_share_a_constraint_pass_or_fail_together():
    model = irreps_network()
    with torch.no_grad():
        model[0].non_equivariant.weight[1:, 0] = 0.5
    value = math.sqrt(0.75 / 4 / 2)

    def finish(level):
        copied = copy.deepcopy(model)
        return ce.finalize(copied, optimizer=held(copied, ce.constraints.weight(copied, level=level, per="model")))

    assert all(layer.value == pytest.approx(value) for layer in finish(value + 1e-6).layers)
    with pytest.raises(ce.errors.ViolationError, match=r"2 of 2 terms.*\n  0 \+ 1: 0\.306 > 0\.305 \(weight\)\ntrain"):
        finish(value - 2e-3)


@pytest.mark.parametrize("bounded", [True, False])
def test_a_term_that_keeps_a_subgroup_is_not_equivariant(bounded):
    """It passes its own constraint, and is checked by the others, or by its norm where there are none."""
    model = irreps_network()
    with torch.no_grad():
        model[0].non_equivariant.weight[1:, 1:] = 0.5 * torch.eye(3).double()
    records = [ce.constraints.subgroup(model, groups.SO3(), level=0.0)]
    if bounded:
        records.append(ce.constraints.weight(model, level=0.5))
        report = ce.finalize(model, optimizer=held(model, *records))
        assert report.layers[0].removed == pytest.approx(0.5 * math.sqrt(3))  # below the level that was allowed
        return
    optimizer = held(model, *records)
    with pytest.raises(ce.errors.ViolationError, match=r"1 of 2 terms .*\n  0: 0\.433 > 0\.001 \(weight\)"):
        ce.finalize(model, optimizer=optimizer)
    (stays, _) = ce.finalize(model, optimizer=optimizer, on_violation="keep").layers
    assert stays.kept and [name for name, _ in stays.generators] == ["generator 0"]
    x, turned = torch.randn(5, 4).double(), ce.representations.irreps("1x0e + 1x1o")
    g, back = groups.SO3().sample(1)[0], ce.representations.irreps("1x0e + 1x1e")
    term = model[0].non_equivariant.matrix().detach()
    assert torch.allclose(turned.act(g, x) @ term.T, back.act(g, x @ term.T), atol=1e-12)


# --- the report -------------------------------------------------------------------------------------------------------


@table
def test_the_report_measures_what_happened(case):
    model, data = case.relaxed(gate=True), case.data()
    with torch.no_grad():
        for relaxation in ce.relaxations(model):
            relaxation.term.scale.fill_(0.5)
            relaxation.term.gate.fill_(0.5)
    norms = {r.name: 0.25 * r.term.weight.norm().item() for r in ce.relaxations(model)}
    values = {r.name: norms[r.name] / math.sqrt(r.term.rows) for r in ce.relaxations(model)}
    model.eval()
    before, error = outputs(model, data), case.error(model, data)
    report = ce.finalize(
        model, batches=[data], forward=spread, symmetry=case.symmetry(), on_violation="drop", fold=False
    )
    assert {layer.name: layer.removed for layer in report.layers} == pytest.approx(norms)
    assert {layer.name: layer.value for layer in report.layers} == pytest.approx(values)
    assert all(layer.folded == 0 and not layer.kept for layer in report.layers)
    if report.recalibrated == 0:
        assert report.output_change == pytest.approx(distance(before, outputs(model, data)), rel=1e-9)
    assert report.error_before == pytest.approx(error, rel=0.5) and report.error_before > 1e-2
    assert report.error_after < case.tolerance
    assert all(layer.output_change > 0 for layer in report.layers)


def test_the_change_of_each_layer_is_measured_on_its_own_input():
    model, (x, *_) = relax_sets(set_network()), batches()
    plain = set_network()
    hidden = [x, torch.tanh(model[0](x)).detach()]
    expected = [
        distance([relaxed(h).detach()], [base(h).detach()])
        for relaxed, base, h in zip((model[0], model[2]), (plain[0], plain[2]), hidden, strict=True)
    ]
    report = ce.finalize(model, batches=[x], on_violation="drop")
    assert [layer.output_change for layer in report.layers] == pytest.approx(expected, rel=1e-12)


def test_a_layer_whose_output_is_overwritten_is_measured_before_that():
    first, second = relax_sets(set_network()), relax_sets(set_network())
    first[1], second[1] = nn.ReLU(inplace=True), nn.ReLU()
    reports = [ce.finalize(m, batches=batches(1), on_violation="drop") for m in (first, second)]
    assert reports[0].layers == reports[1].layers and reports[0].output_change == reports[1].output_change


def test_without_batches_or_symmetry_the_report_says_so():
    report = ce.finalize(relax_sets(set_network()), on_violation="drop")
    assert report.output_change is report.error_before is report.error_after is None
    assert all(layer.output_change is None for layer in report.layers)
    assert any("pass symmetry=" in note for note in report.notes)
    report = ce.finalize(relax_sets(set_network()), symmetry=SETS, on_violation="drop")
    assert report.error_after is None and any("pass batches=" in note for note in report.notes)
    assert "not measured" in str(report)


def test_a_printed_report_is_a_table_and_a_summary():
    model = relax_sets(set_network(norm=True))
    report = ce.finalize(model, batches=batches(), symmetry=SETS, on_violation="drop", lipschitz={"1": 1.0})
    text = repr(report).splitlines()
    expected = "layer, measure, value, allowed, folded, unfolded, removed, output change, at most"
    assert re.sub("  +", ", ", text[0]) == expected
    for line, layer in zip(text[1:3], report.layers, strict=True):
        name, measure, value, allowed, folded, unfolded, removed, change, most = line.split()
        assert (name, measure, allowed, folded, unfolded) == (layer.name, "weight", "0.001", "0", "0")
        assert float(value) == pytest.approx(layer.value, rel=1e-2)
        assert float(removed) == pytest.approx(layer.removed, rel=1e-2)
        assert float(change) == pytest.approx(layer.output_change, rel=1e-2) and float(change) < float(most)
    assert text[3].startswith("output change of the model: ") and f"{report.output_change:.3g}" in text[3]
    assert f"{report.error_before:.3g} before, {report.error_after:.3g} after" in text[4]
    found = report.certificate
    assert f"at most {found.equivariance / found.size:.3g}" in text[5] and "loose" in text[5]
    assert text[6] == "normalisation layers recalibrated: 1" and len(text) == 7
    assert str(report) == repr(report) and max(map(len, text)) <= 120


# --- bounds -----------------------------------------------------------------------------------------------------------


@table
def test_every_change_is_within_its_bound_and_stands_beside_it(case):
    model, data = case.relaxed(init=0.3), case.data()
    report = ce.finalize(
        model, batches=[data], forward=spread, symmetry=case.symmetry(), on_violation="drop", fold=False
    )
    assert all(0 < layer.output_change <= layer.bound * (1 + 1e-5) for layer in report.layers)
    found = report.certificate
    assert found.measured > 1e-3 * found.size  # the terms were on while it was measured
    if found.equivariance is None:
        assert "no bound of the error before, for layer" in str(report)
    else:
        assert found.measured <= found.equivariance and "error before at most" in str(report)
    if report.error_before is not None and len(outputs(model, data)) == 1:
        assert found.measured / found.size == pytest.approx(report.error_before, rel=1e-6)  # the same elements


def test_folded_terms_are_bounded_by_what_is_dropped():
    case = case_named("e3nn linear")
    model, data = case.relaxed(complement=False), case.data()
    (term,) = [r.term for r in ce.relaxations(model)]
    term.scale.fill_(0.5)
    before = outputs(model, data)
    dropped = float(torch.linalg.matrix_norm(term.projection.complement_(term.matrix().detach().clone()), 2))
    report = ce.finalize(model, batches=[data], forward=spread, fold=True, on_violation="drop")
    (bound,) = report.certificate.bounds
    assert bound.strength == pytest.approx(dropped)
    assert bound.truncation == pytest.approx(dropped * data[0].norm().item())
    assert distance(before, outputs(model, data)) == pytest.approx(report.layers[0].output_change)
    assert 0.1 < report.layers[0].output_change <= report.layers[0].bound


def test_terms_that_are_zero_are_certified_whatever_follows():
    case = case_named("e3nn gate network")  # no Lipschitz constant holds for a gate
    report = ce.finalize(
        case.relaxed(init=0.0), batches=[case.data()], forward=spread, symmetry=case.symmetry(), on_violation="raise"
    )
    assert report.certificate.equivariance == 0 and not any(b.reason for b in report.certificate.bounds)
    assert report.certificate.measured < 1e-13 * report.certificate.size
    assert [layer.bound for layer in report.layers] == [0, 0]


def test_constants_that_are_not_known_can_be_stated():
    reports = [
        ce.finalize(
            relax_sets(set_network(norm=True)), batches=batches(), symmetry=SETS, on_violation="drop", lipschitz=stated
        )
        for stated in (None, {"1": 2.5})
    ]
    assert reports[0].certificate.equivariance is None and "state one by lipschitz=" in str(reports[0])
    assert reports[1].certificate.equivariance > reports[1].certificate.measured
    assert "L of '1' (PointNorm) is 2.5, as stated" in repr(reports[1].certificate)


def test_without_what_is_needed_nothing_is_bounded_and_it_is_said():
    report = ce.finalize(relax_sets(set_network()), on_violation="drop")
    assert report.certificate is None and all(layer.bound is None for layer in report.layers)
    forward = lambda m, batch: m(input=batch)  # noqa: E731
    report = ce.finalize(relax_sets(set_network()), batches=batches(), forward=forward, on_violation="drop")
    assert report.certificate is None and "nothing was bounded: pass a forward=" in str(report)
    assert "no bound" in str(report).splitlines()[1]
    report = ce.finalize(relax_sets(set_network()), batches=batches(), on_violation="drop")  # truncations need no group
    assert report.certificate.measured is None and all(layer.bound > 0 for layer in report.layers)


def test_the_first_element_of_a_lone_model_is_named():
    model = case_named("finite group, own layer").relaxed()
    assert "(model)" in str(ce.finalize(model, on_violation="drop"))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("evaluate_with_terms", [True, False])
def test_errors_are_measured_with_the_terms_on_and_modes_are_restored(training, evaluate_with_terms):
    model = relax_sets(set_network(), evaluate_with_terms=evaluate_with_terms).train(training)
    model[1].train(not training)
    with pytest.raises(ce.errors.ViolationError):
        ce.finalize(model, batches=batches(), symmetry=SETS)
    report = ce.finalize(model, batches=batches(), symmetry=SETS, on_violation="drop")
    assert report.error_before > 1e-2 and report.error_after < 1e-13 and report.output_change > 1e-2
    assert [m.training for m in model.modules()] == [training, training, not training, training]


def test_kept_terms_keep_their_options():
    model = relax_sets(set_network(), evaluate_with_terms=False)
    ce.finalize(model, batches=batches(), on_violation="keep")
    assert not any(r.term.evaluate_with_terms for r in ce.relaxations(model)) and len(ce.relaxations(model)) == 2


def test_a_generator_of_batches_is_consumed_once():
    drawn = []

    def stream():
        for batch in batches(5):
            drawn.append(batch)
            yield batch

    ce.finalize(relax_sets(set_network(norm=True)), batches=stream(), on_violation="drop")
    assert len(drawn) == 5
    drawn.clear()
    ce.finalize(relax_sets(set_network()), batches=stream(), on_violation="drop")
    assert len(drawn) == 1  # without statistics to gather, one batch is enough


def test_forward_may_unpack_a_batch():
    model = relax_sets(set_network())
    pairs = [(x, x.sum()) for x in batches()]
    report = ce.finalize(model, batches=pairs, forward=lambda m, batch: m(batch[0]), symmetry=SETS, on_violation="drop")
    assert report.error_after < 1e-13


def test_forces_as_gradients_can_be_measured():
    class Forces(nn.Module):
        def __init__(self):
            super().__init__()
            self.energy = set_network()

        def forward(self, x):
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.energy(x).square().sum(), x)[0]

    model = relax_sets(Forces())
    report = ce.finalize(model, batches=batches(), symmetry=SETS, on_violation="drop")
    assert report.error_before > 1e-2 and report.error_after < 1e-13


# --- models that work in place ----------------------------------------------------------------------------------------


class Residual(nn.Module):
    """An update x + f(x), or x with f(x) added to it in place."""

    def __init__(self, in_place):
        super().__init__()
        self.inner, self.in_place = set_network()[0], in_place

    def forward(self, x):
        update = self.inner(x)
        if not self.in_place:
            return x + update
        x += update
        return x


@pytest.mark.parametrize("computed", [False, True])
def test_inputs_that_are_overwritten_are_kept_as_they_came(computed):
    """Those of the user, and those of a layer, which were computed with gradients."""
    reports = []
    for in_place in (False, True):
        model = nn.Sequential(set_network()[0] if computed else nn.Identity(), relax_sets(Residual(in_place)))
        data = batches(1)
        reports.append(ce.finalize(model, batches=data, symmetry=SETS, on_violation="drop"))
        assert torch.equal(data[0], batches(1)[0])
    assert reports[0].layers == reports[1].layers and reports[0].output_change == reports[1].output_change
    assert reports[0].error_before == reports[1].error_before and reports[1].error_after < 1e-13


def test_a_layer_that_overwrites_its_own_input_is_run_again():
    class InPlace(nn.Linear):
        def forward(self, features):
            features *= 2
            return super().forward(features)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), InPlace(3, 3)).double()
    vectors = ce.representations.vectors(1)
    ce.relax(model, where=lambda name, _: name == "1", adapter=ce.adapters.linear(vectors, vectors), init=1.0)
    plain = copy.deepcopy(model)
    x = torch.randn(5, 3, dtype=torch.float64)
    (with_terms,) = outputs(plain, (x,))
    with ce.disabled(plain):
        (without,) = outputs(plain, (x,))
    report = ce.finalize(model, batches=[x], on_violation="drop")
    assert report.layers[0].output_change == pytest.approx(distance([with_terms], [without]), rel=1e-12)


# --- a failure changes nothing ----------------------------------------------------------------------------------------


def normalised_vectors():
    """A free layer on vectors, and statistics of its rows; not equivariant, which does not matter here."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.BatchNorm1d(3)).double()
    vectors = ce.representations.vectors(1)
    adapter = ce.adapters.linear(vectors, vectors)
    return ce.relax(model, where=lambda name, _: name == "0", adapter=adapter, complement=False, init=1.0)


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("failure", ["one row", "interrupted"])
def test_a_recalibration_that_fails_changes_nothing(fold, failure):
    model = normalised_vectors()
    model(torch.randn(6, 3, dtype=torch.float64))
    base = torch.optim.SGD(ce.parameter_groups(model, lr=0.1))
    optimizer = ce.ConstrainedOptimizer(base, ce.constraints.weight(model, level=0.5))
    before, held = copy.deepcopy(model.state_dict()), dict(model.named_buffers()) | dict(model.named_parameters())
    grouped = [id(p) for group in base.param_groups for p in group["params"]]

    def rows():
        yield torch.randn(4, 3, dtype=torch.float64)
        yield torch.randn(4, 3, dtype=torch.float64)
        if failure == "interrupted":
            raise KeyboardInterrupt
        yield torch.randn(1, 3, dtype=torch.float64)

    with pytest.raises(KeyboardInterrupt if failure == "interrupted" else ValueError):
        ce.finalize(model, optimizer=optimizer, batches=rows(), fold=fold, on_violation="drop")
    assert len(ce.relaxations(model)) == 1 and model[0].non_equivariant.enabled and optimizer.constraints
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(held[name] is t for name, t in (*model.named_buffers(), *model.named_parameters()))
    assert [id(p) for group in base.param_groups for p in group["params"]] == grouped
    assert model[1].momentum == 0.1 and all(m.training and not m._forward_pre_hooks for m in model.modules())
    ce.finalize(model, optimizer=optimizer, batches=[torch.randn(4, 3).double()], fold=fold, on_violation="drop")


def test_statistics_that_a_layer_replaces_are_given_back():
    class Replacing(nn.BatchNorm1d):
        def forward(self, features):
            self.running_mean = features.mean((0, 1))
            raise RuntimeError("out of memory") if self.training else ArithmeticError

    model = Replacing(3)
    before = model.running_mean
    with pytest.raises(RuntimeError, match="out of memory"):
        ce.recalibrate(model, batches())
    assert model.running_mean is before and not before.any()


def test_an_error_that_cannot_be_measured_afterwards_changes_nothing():
    """The model refuses inputs once the terms are off."""

    class Refusing(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            if torch.equal(y, plain(x)):
                raise ArithmeticError("refused")
            return y

    plain = set_network()
    model = relax_sets(Refusing(*set_network()))
    with pytest.raises(ArithmeticError, match="refused"):
        ce.finalize(model, batches=batches(), symmetry=SETS, on_violation="drop")
    assert len(ce.relaxations(model)) == 2 and all(r.term.enabled for r in ce.relaxations(model))


# --- normalisation statistics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_are_those_of_the_model_without_terms(momentum):
    model, plain = (set_network(norm=True) for _ in range(2))
    relax_sets(model)
    model[1].momentum = plain[1].momentum = momentum
    for x in batches():
        model(x)  # statistics gathered with the terms on
    spoilt = model[1].running_mean.clone()
    report = ce.finalize(model, batches=batches(), on_violation="drop")
    hidden = torch.stack([plain[0](x).flatten(0, 1) for x in batches()]).detach()
    torch.testing.assert_close(model[1].running_mean, hidden.mean((0, 1)), rtol=0, atol=1e-14)
    torch.testing.assert_close(model[1].running_var, hidden.var(1).mean(0), rtol=0, atol=1e-14)
    assert not torch.allclose(spoilt, model[1].running_mean, rtol=1e-2)
    assert report.recalibrated == 1 and model[1].momentum == momentum


def test_statistics_that_cannot_be_gathered_are_reported():
    model = relax_sets(set_network(norm=True))
    for x in batches():
        model(x)
    before = model[1].running_mean.clone()
    report = ce.finalize(model, on_violation="drop")
    assert torch.equal(model[1].running_mean, before) and report.recalibrated == 0
    assert any("1 normalisation layers keep statistics" in note and "batches=" in note for note in report.notes)


def test_recalibration_leaves_other_layers_in_evaluation():
    model = relax_sets(set_network(norm=True))
    model.insert(0, nn.Dropout(0.9))
    twin = copy.deepcopy(model)
    for m in (model, twin):
        ce.finalize(m, batches=batches(), on_violation="drop")
    assert torch.equal(model[2].running_var, twin[2].running_var) and model[0].training


def test_statistics_of_forces_as_gradients_can_be_gathered():
    class Forces(nn.Module):
        def __init__(self):
            super().__init__()
            self.energy = set_network(norm=True)

        def forward(self, x):
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.energy(x).square().sum(), x)[0]

    model, plain = Forces(), set_network(norm=True)
    relax_sets(model)
    report = ce.finalize(model, batches=batches(), on_violation="drop")
    assert report.recalibrated == 1
    assert ce.recalibrate(plain, batches()) == 1
    assert torch.equal(model.energy[1].running_mean, plain[1].running_mean)
    assert not model.energy[1].running_mean.requires_grad


class Twice(nn.Module):
    """One normalisation, called on the features and on their multiples."""

    def __init__(self, *, direct=False):
        super().__init__()
        self.inner, self.norm, self.direct = set_network()[0], PointNorm(3).double(), direct

    def forward(self, x):
        x = self.inner(x)
        return self.norm.forward(x) if self.direct else self.norm(x) + self.norm(3 * x + 1)


@pytest.mark.parametrize("direct", [False, True])
def test_statistics_are_the_mean_over_all_calls_of_a_layer(direct):
    """Where the forward pass is called directly, over its one call per batch."""
    model = relax_sets(Twice(direct=direct))
    report = ce.finalize(model, batches=batches(), on_violation="drop")
    hidden = torch.stack([model.inner(x).flatten(0, 1) for x in batches()]).detach()
    seen = hidden if direct else torch.cat([hidden, 3 * hidden + 1])
    torch.testing.assert_close(model.norm.running_mean, seen.mean((0, 1)), rtol=0, atol=1e-14)
    torch.testing.assert_close(model.norm.running_var, seen.var(1).mean(0), rtol=1e-14, atol=0)
    assert report.recalibrated == 1 and model.norm.momentum == 0.1


def test_frozen_statistics_are_gathered_too():
    model = relax_sets(set_network(norm=True))
    model[1].eval().requires_grad_(False)
    assert ce.finalize(model, batches=batches(), on_violation="drop").recalibrated == 1
    assert model[1].running_mean.any() and not model[1].training


@pytest.mark.parametrize("data", [None, batches()], ids=["without batches", "with batches"])
def test_statistics_of_an_unknown_kind_are_named(data):
    class Lengths(nn.Module):
        def __init__(self, momentum):
            super().__init__()
            self.momentum = momentum
            self.register_buffer("mean_length", torch.ones(()))
            self.register_buffer("count", torch.zeros((), dtype=torch.long))

        def forward(self, x):
            return x / self.mean_length

    model = relax_sets(nn.Sequential(set_network(norm=True), Lengths(0.1), Lengths("none")))
    report = ce.finalize(model, batches=data, on_violation="drop")
    (note,) = (note for note in report.notes if "momentum" in note)
    assert "layer '1' (Lengths)" in note and "['mean_length']" in note and "with the terms on" in note
    assert note in str(report) and report.recalibrated == (data is not None)


@pytest.mark.parametrize("training", [True, False])
def test_a_copy_in_training_is_recalibrated_without_its_terms(training):
    model, plain = relax_sets(set_network(norm=True)).train(training), set_network(norm=True)
    before = copy.deepcopy(model.state_dict())
    for on in (True, False):
        twin = copy.deepcopy(model)
        if on:
            assert ce.recalibrate(twin, [(x,) for x in batches()], forward=spread) == 1
        else:
            with ce.disabled(twin):
                assert ce.recalibrate(twin, iter(batches())) == 1
        hidden = torch.stack([(twin if on else plain)[0](x).flatten(0, 1) for x in batches()]).detach()
        torch.testing.assert_close(twin[1].running_mean, hidden.mean((0, 1)), rtol=0, atol=1e-14)
        assert all(m.training is training for m in twin.modules()) and twin[1].momentum == 0.1
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_recalibration_that_fails_restores_the_statistics():
    model = nn.BatchNorm1d(3)
    model(torch.randn(5, 3))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ce.recalibrate(model.eval(), [torch.randn(4, 3), torch.randn(1, 3)])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not model.training and model.momentum == 0.1 and not model._forward_pre_hooks


@pytest.mark.parametrize("norm", [True, False])
def test_recalibration_needs_batches_and_counts_layers(norm):
    model = set_network(norm=norm)
    with pytest.raises(ce.errors.ConstrainedEquivError, match=r"empty: expected at least one batch"):
        ce.recalibrate(model, [])
    assert ce.recalibrate(model, batches()) == norm


# --- folding ----------------------------------------------------------------------------------------------------------


def make_equivariant(model):
    """Leave the equivariant part of every term."""
    with torch.no_grad():
        for relaxation in ce.relaxations(model):
            relaxation.term.projection.complement_(rest := relaxation.term.weight.detach().clone())
            relaxation.term.weight.sub_(rest)


@table
def test_folding_an_equivariant_term_changes_nothing_or_is_reported(case):
    model, data = case.relaxed(complement=False), case.data()
    make_equivariant(model)
    norms = {r.name: r.term.weight.norm().item() for r in ce.relaxations(model)}
    model.eval()
    before = outputs(model, data)
    report = ce.finalize(model, fold=True)  # nothing is above a level: the terms are equivariant
    lost = [
        name for name in norms if any(f"layer {name!r}" in note and "does not fit" in note for note in report.notes)
    ]
    assert lost == [layer.name for layer in report.layers if layer.unfolded > 0]
    assert bool(lost) == (case.folds != "all")
    assert any(layer.folded > 0 for layer in report.layers) == (case.folds != "none")
    change = distance(before, outputs(model, data))
    assert (change > 1e-6) if lost else (change < 1e-14)
    for layer in report.layers:
        assert layer.removed < 1e-12
        assert math.hypot(layer.folded, layer.unfolded) == pytest.approx(norms[layer.name], rel=1e-12)
    assert case.error(model, data) < case.tolerance


@pytest.mark.parametrize("case", [case for case in CASES if case.values[0].folds == "part"])
def test_what_the_layers_can_hold_folds_to_rounding(case):
    """The term is what a first fold wrote, a map that the layer's own weights can make."""
    model, data = case.relaxed(complement=False), case.data()
    make_equivariant(model)
    with torch.no_grad():
        for relaxation in ce.relaxations(copy.deepcopy(model)):
            written = relaxation.adapter.fold(relaxation.layer, relaxation.term.weight.detach(), None)
            model.get_submodule(relaxation.name).non_equivariant.weight.copy_(written)
    model.eval()
    before = outputs(model, data)
    report = ce.finalize(model, fold=True)
    assert all(layer.unfolded == 0 for layer in report.layers) and any(layer.folded > 0.1 for layer in report.layers)
    assert distance(before, outputs(model, data)) < 1e-14


@pytest.mark.parametrize(
    "name", ["e3nn linear", "e3nn linear, repeated, unsorted and empty irreps", "e3nn gate network"]
)
def test_linear_layers_of_e3nn_fold_completely(name):
    case = case_named(name)
    report = ce.finalize(case.relaxed(complement=False), fold=True, on_violation="drop")
    assert not any("does not fit" in note for note in report.notes)
    assert all(layer.folded > 0 and layer.removed > 0 for layer in report.layers)


def test_tensor_products_say_that_they_do_not_fold():
    case = case_named("e3nn fully connected tensor product")
    report = ce.finalize(case.relaxed(complement=False), fold=True, on_violation="drop")
    assert "e3nn tensor product" in str(report) and "does not fit into its own weights" in str(report)
    assert report.layers[0].folded == 0


def test_terms_of_the_complement_have_nothing_to_fold():
    case = case_named("e3nn linear")
    plain, model = case.model(), case.relaxed()
    report = ce.finalize(model, fold=True, on_violation="drop")
    assert torch.equal(plain.weight, model.weight) and report.layers[0].folded == 0


def test_without_fold_a_free_term_is_held_to_its_whole_norm():
    model = relax_sets(set_network(), complement=False, init=nn.init.ones_)  # equivariant, and not small
    with pytest.raises(ce.errors.ViolationError):
        ce.finalize(model)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, match",
    [
        ({"on_violation": "ignore"}, "'ignore'.*expected 'raise', 'drop' or 'keep'"),
        ({"batches": []}, "empty.*expected at least one batch"),
        ({"batches": iter([])}, "empty.*expected at least one batch"),
        (
            {"batches": batches(1), "symmetry": SETS, "forward": lambda m, x: m(input=x)},
            r"keywords \['input'\].*expected positional",
        ),
    ],
)
def test_bad_options_change_nothing(options, match):
    model = relax_sets(set_network(), init=0.0)
    with pytest.raises(ce.errors.ConstrainedEquivError, match=match):
        ce.finalize(model, **options)
    assert len(ce.relaxations(model)) == 2 and all(m.training for m in model.modules())


def test_a_forward_that_fails_changes_nothing():
    model = relax_sets(set_network(), init=0.0)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        ce.finalize(model, batches=[torch.zeros(2, 4, 5, dtype=torch.float64)])
    assert len(ce.relaxations(model)) == 2 and not model._forward_hooks and model.training


def test_a_plain_model_has_nothing_to_finalize():
    with pytest.raises(ce.errors.RelaxationError, match=r"no relaxed layer: expected a model after ce\.relax"):
        ce.finalize(set_network())


def test_a_run_stopped_in_the_middle_of_its_schedule_is_refused() -> None:
    points = ce.representations.permutation(4, channels=2)
    adapter = ce.adapters.linear(points, points, axes=(-2, -1))
    model = ce.relax(torch.nn.Linear(2, 2), where=lambda name, layer: True, adapter=adapter, init=0.1)
    level = ce.schedules.join([ce.schedules.constant(1.0), ce.schedules.linear(1.0, 0.0, 10)], [5])
    optimizer = ce.ConstrainedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1e-3), ce.constraints.weight(model, level=level)
    )
    with pytest.raises(ce.errors.ViolationError, match="nothing was removed"):
        ce.finalize(model, optimizer=optimizer)  # below the level of step 0, far above the final one
    for _ in range(15):
        optimizer.zero_grad()
        model(torch.randn(3, 4, 2)).square().mean().backward()
        optimizer.step()
    ce.finalize(model, optimizer=optimizer)


# --- layers that others have a hand in --------------------------------------------------------------------------------


def test_tied_weights_are_not_folded_into():
    model = nn.ModuleList([nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)]).double()
    model[1].weight = model[0].weight
    vectors = ce.representations.vectors(1)
    ce.relax(
        model,
        where=lambda name, layer: name == "0",
        adapter=ce.adapters.linear(vectors, vectors),
        complement=False,
    )
    with torch.no_grad():
        model[0].non_equivariant.weight.copy_(torch.eye(3))
    before = model[0].weight.clone()
    report = ce.finalize(model, fold=True, on_violation="drop")
    assert torch.equal(model[1].weight, before)
    assert report.layers[0].folded == 0 and report.layers[0].unfolded == pytest.approx(3**0.5)
    assert any("which another layer shares" in note for note in report.notes)


@pytest.mark.parametrize("complement", [True, False])
def test_a_parametrization_put_on_a_relaxed_layer_survives(complement):
    """Nor is anything folded into a weight that is computed from others by then."""
    vectors = ce.representations.vectors(1)
    model = ce.relax(
        nn.Sequential(nn.Linear(3, 3, bias=False)),
        where=lambda name, layer: name == "0",
        adapter=ce.adapters.linear(vectors, vectors),
        complement=complement,
        init=1.0,
    )
    torch.nn.utils.parametrizations.weight_norm(model[0])
    x = torch.randn(4, 3)
    with ce.disabled(model):
        before = model(x)
    report = ce.finalize(model, fold=True, on_violation="drop")
    assert torch.equal(model(x), before) and report.layers[0].folded == 0
    assert isinstance(model[0], nn.Linear) and type(model[0]).__name__ == "ParametrizedLinear"
    torch.nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is nn.Linear


def test_expanded_buffers_are_left_where_they_are():
    model, data = relax_sets(set_network()), batches()
    model.register_buffer("mask", torch.ones(1).expand(8))
    ce.finalize(model, on_violation="drop", batches=data, symmetry=SETS)
    assert not ce.relaxations(model)
