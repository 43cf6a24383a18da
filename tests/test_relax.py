"""Relaxing, switching off, listing and copying: what a relaxed model keeps of the model it was."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import constrained_equiv as ce
from constrained_equiv._terms import CHILD
from tests.cases import CASES, VectorMap, case_named, loss, tensors

table = pytest.mark.parametrize("case", CASES)


def run(model, data):
    """Outputs, gradients (of arguments and base parameters; in training) and buffers after one forward and backward."""
    model.zero_grad()
    data = [argument.clone().requires_grad_(argument.is_floating_point()) for argument in data]
    output = model(*data)
    if model.training:  # in evaluation some models give outputs that cannot be differentiated
        loss(output).backward()
    bare = getattr(model, "_orig_mod", model)  # of a compiled model
    gradients = {name: p.grad for name, p in bare.named_parameters() if CHILD not in name}
    gradients |= {i: argument.grad for i, argument in enumerate(data)}
    buffers = {name: b.clone() for name, b in bare.named_buffers() if CHILD not in name}
    return [part.detach() for part in tensors(output)], gradients, buffers


def assert_identical(first, second):
    for a, b in zip(first[0], second[0], strict=True):
        assert torch.equal(a, b)
    for old, new in zip(first[1:], second[1:], strict=True):
        assert old.keys() == new.keys()
        for name in old:
            assert (old[name] is None and new[name] is None) or torch.equal(old[name], new[name]), name


def assert_close(first, second, ulps=64):
    """Outputs and gradients agree to some units in the last place of each tensor's largest entry."""
    assert first[1].keys() == second[1].keys()
    pairs = [*zip(first[0], second[0], strict=True), *((first[1][name], second[1][name]) for name in first[1])]
    for a, b in pairs:
        if a is not None or b is not None:
            assert (a - b).abs().max() <= ulps * torch.finfo(a.dtype).eps * max(1.0, a.abs().max().item())


def terms_of(model):
    return [r.term for r in ce.relaxations(model)]


def differs(first, second):
    return any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(tensors(first), tensors(second), strict=True))


# --- what is added ----------------------------------------------------------------------------------------------------


@table
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_disabled_is_the_base_bit_for_bit(case, training):
    data = case.data()
    plain, relaxed = case.model().train(training), case.relaxed().train(training)
    expected = run(plain, data)
    with ce.disabled(relaxed):
        found = run(relaxed, data)
    assert_identical(expected, found)
    assert differs(relaxed(*data), plain(*data))


@table
def test_zero_terms_change_nothing(case):
    data = case.data()
    expected = run(case.model(), data)
    assert_close(expected, run(case.relaxed(init=0.0), data))
    scaled = case.relaxed()
    for term in terms_of(scaled):
        term.scale.fill_(0.0)
    assert_close(expected, run(scaled, data))


@table
def test_weight_scale_and_gate_change_the_output(case):
    data, relaxed = case.data(), case.relaxed(gate=True)
    before = copy.deepcopy(relaxed).eval()(*data)
    for change in (
        lambda term: term.scale.fill_(0.5),
        lambda term: term.gate.mul_(-0.5),
        lambda term: term.weight.mul_(2),
    ):
        changed = copy.deepcopy(relaxed)
        with torch.no_grad():
            for term in terms_of(changed):
                change(term)
        assert differs(before, changed.eval()(*data))


@table
def test_scale_gate_and_weight_enter_as_a_product(case):
    data, relaxed = case.data(), case.relaxed(gate=True)
    other = copy.deepcopy(relaxed)
    with torch.no_grad():
        for term in terms_of(relaxed):
            term.scale.fill_(0.5)
            term.gate.fill_(-3.0)
        for term in terms_of(other):
            term.weight.mul_(-1.5)
    for a, b in zip(tensors(relaxed.eval()(*data)), tensors(other.eval()(*data)), strict=True):
        torch.testing.assert_close(a, b)


@table
def test_terms_break_the_symmetry_and_disabling_restores_it(case):
    data = case.data()
    relaxed = case.relaxed().eval()
    assert case.error(relaxed, data) > 1e-2
    with ce.disabled(relaxed):
        assert case.error(relaxed, data) < case.tolerance


@table
def test_every_term_gets_a_gradient(case):
    relaxed = case.relaxed(init=0.0, gate=True)
    loss(relaxed(*case.data())).backward()
    for relaxation in ce.relaxations(relaxed):
        gradient = relaxation.term.weight.grad
        assert gradient is not None and torch.isfinite(gradient).all() and gradient.any(), relaxation.name
        assert relaxation.term.gate.grad is not None


@table
@pytest.mark.parametrize("init", [0.3, nn.init.xavier_uniform_])
def test_the_complement_is_orthogonal_to_equivariant_maps(case, init):
    for relaxation in ce.relaxations(case.relaxed(init=init)):
        weight = relaxation.term.weight.detach()
        assert weight.norm() > 0
        again = relaxation.site.projection.complement_(weight.clone())
        torch.testing.assert_close(again, weight, rtol=0, atol=1e-14 if weight.dtype == torch.float64 else 1e-6)


@table
def test_the_free_form_keeps_what_init_gave(case):
    for term in terms_of(case.relaxed(init=nn.init.ones_, complement=False)):
        assert not term.complement and torch.equal(term.weight, torch.ones_like(term.weight))


def test_init_draws_from_its_generator_alone():
    case = case_named("sets, nn.Linear")
    first, second, third = (case.relaxed(init=0.1, seed=seed) for seed in (0, 0, 1))
    for a, b, c in zip(terms_of(first), terms_of(second), terms_of(third), strict=True):
        assert torch.equal(a.weight, b.weight) and not torch.equal(a.weight, c.weight)
    state = torch.get_rng_state()
    case.relaxed(init=0.1)
    assert torch.equal(state, torch.get_rng_state())


def test_init_has_the_stated_standard_deviation():
    wide = nn.Linear(40, 40)
    where = ce.adapters.linear("40x0e", "10x0e + 10x1o")
    ce.relax(wide, where=lambda n, m: True, adapter=where, complement=False, init=0.2)
    assert abs(wide.non_equivariant.weight.std().item() - 0.2) < 0.02


# --- what is kept -----------------------------------------------------------------------------------------------------


@table
def test_classes_keys_and_parameters_stay(case):
    model = case.model()
    classes = {name: type(m) for name, m in model.named_modules()}
    parameters = dict(model.named_parameters())
    keys = list(model.state_dict())
    names = {name for name, m in model.named_modules()}
    case.relax(model)
    for name, module in model.named_modules():
        if name in names:
            assert isinstance(module, classes[name])
    assert all(dict(model.named_parameters())[name] is parameter for name, parameter in parameters.items())
    assert [key for key in model.state_dict() if CHILD not in key] == keys
    added = {name for name, _ in model.named_modules()} - names
    assert added == {f"{r.name}.{CHILD}".lstrip(".") for r in ce.relaxations(model)}


def test_relax_returns_the_model_itself():
    model = case_named("sets, nn.Linear").model()
    assert case_named("sets, nn.Linear").relax(model) is model


@table
def test_relaxations_say_what_was_done(case):
    found = ce.relaxations(case.relaxed())
    text = str(found)
    assert len(text.splitlines()) == len(found) + 1
    for line, relaxation in zip(text.splitlines()[1:], found, strict=True):
        assert (relaxation.name or "(model)") in line
        assert " x ".join(map(str, relaxation.term.weight.shape)) in line
        assert relaxation.site.inputs in line and relaxation.site.outputs in line and "complement" in line
        assert f"{relaxation.site.projection.rank:,}" in line
    assert "Relaxed" not in text
    assert "free, gated" in str(ce.relaxations(case.relaxed(complement=False, gate=True)))
    assert ce.relaxations(case.model()) == ()


def test_plain_models_are_left_alone_by_disabled():
    model = nn.Linear(2, 2)
    with ce.disabled(model):
        assert type(model) is nn.Linear


def test_disabled_nests_survives_errors_and_finalize():
    case = case_named("sets, own layer")
    model = case.relaxed()
    with ce.disabled(model):
        with ce.disabled(model):
            pass
        assert not any(term.active for term in terms_of(model))
    assert all(term.active for term in terms_of(model))
    with pytest.raises(ZeroDivisionError), ce.disabled(model):
        raise ZeroDivisionError
    assert all(term.active for term in terms_of(model))
    with ce.disabled(model):
        ce.finalize(model, on_violation="drop")
    assert ce.relaxations(model) == ()


# --- where and adapter ------------------------------------------------------------------------------------------------


def test_where_chooses_by_name_and_layer():
    case = case_named("SEGNN")
    model = ce.relax(case.model(), where=lambda name, layer: "update" in name and hasattr(layer, "irreps_in1"))
    assert [r.name for r in ce.relaxations(model)] == ["layers.0.update.0", "layers.0.update.1"]


def test_one_model_may_mix_built_in_and_stated_adapters():
    case = case_named("e3nn gate network")
    model = nn.Sequential(case.model(), nn.Linear(10, 3, dtype=torch.float64))
    ce.relax(model, where=lambda name, layer: name in ("0.0", "0.2"))
    ce.relax(
        model,
        where=lambda name, layer: name == "1",
        adapter=ce.adapters.linear("2x0e + 1x1o + 1x2e", "3x0e"),
    )
    assert [r.adapter.name for r in ce.relaxations(model)] == ["e3nn linear", "e3nn linear", "linear"]


def test_layers_without_non_equivariant_maps_are_passed_over():
    pytest.importorskip("e3nn")
    from e3nn import o3

    model = nn.Sequential(o3.Linear("4x0e", "3x0e"), o3.Linear("3x0e", "2x0e + 1x1o"))
    assert [r.name for r in ce.relaxations(ce.relax(copy.deepcopy(model)))] == ["1"]
    assert [r.name for r in ce.relaxations(ce.relax(copy.deepcopy(model), complement=False))] == ["0", "1"]


def test_a_shared_layer_is_relaxed_once_and_stays_shared():
    shared = VectorMap(4, 4)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    case = case_named("vectors, own layer")
    case.relax(model)
    assert [r.name for r in ce.relaxations(model)] == ["0"] and model[0] is model[2]
    clone = copy.deepcopy(model)
    assert clone[0] is clone[2] and clone[0] is not model[0]
    ce.finalize(model, on_violation="drop")
    assert type(model[0]) is VectorMap and model[0] is model[2]


def test_a_wrapped_container_is_relaxed_and_runs():
    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(3, 3), nn.Tanh())

        def forward(self, x):
            return self.inner(x)

    model, x = Wrapped(), torch.randn(5, 3)
    plain = model(x)
    ce.relax(model, where=lambda n, m: n == "", adapter=ce.adapters.linear("1x1o", "1x1o"), init=0.1)
    assert differs(model(x), plain)
    with ce.disabled(model):
        assert torch.equal(model(x), plain)


def test_layers_without_values_are_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    adapter = ce.adapters.linear("1x1o", "1x1o")
    with pytest.raises(ce.errors.RelaxationError, match=r"layer '0' is on the meta device.*to_empty"):
        ce.relax(model, where=lambda name, layer: name == "0", adapter=adapter)
    model.to_empty(device="cpu")[0].reset_parameters()
    assert ce.relaxations(ce.relax(model, where=lambda name, layer: name == "0", adapter=adapter))


def test_inside_data_parallel():
    """Relaxing the wrapper relaxes what it wraps, and the replicas that it makes of a layer compute the same."""
    case = case_named("vectors, own layer")
    model, (x,) = nn.DataParallel(case.model()), case.data()
    case.relax(model)
    assert [r.name for r in ce.relaxations(model)] == ["module.0", "module.2"]
    layer = model.module[0]
    replica = layer._replicate_for_data_parallel()
    for child, original in zip(replica.modules(), layer.modules(), strict=True):
        for name, parameter in original._parameters.items():
            setattr(child, name, parameter)
    assert torch.equal(replica(x), layer(x)) and torch.equal(model(x), model.module(x))
    ce.finalize(model, on_violation="drop")
    assert_identical(run(model.module, [x]), run(case.model(), [x]))


def test_terms_of_frozen_layers_are_frozen():
    case = case_named("vectors, own layer")
    model = case.model()
    model[0].requires_grad_(False)
    case.relax(model, gate=True)
    frozen, trained = terms_of(model)
    assert not any(p.requires_grad for p in frozen.parameters()) and all(p.requires_grad for p in trained.parameters())


@table
def test_terms_learn_unless_their_layer_is_frozen(case):
    """Layers whose weights come from outside have no parameter that could be frozen."""
    assert all(p.requires_grad for term in terms_of(case.relaxed(gate=True)) for p in term.parameters())


# --- modes, dtypes, devices -------------------------------------------------------------------------------------------


@table
def test_terms_can_be_left_out_of_evaluation(case):
    data, plain = case.data(), case.model()
    relaxed = case.relaxed(evaluate_with_terms=False)
    assert_identical(run(plain.eval(), data), run(relaxed.eval(), data))
    assert differs(relaxed.train()(*data), plain.train()(*data))


def test_relaxing_keeps_the_mode():
    case = case_named("sets, own layer")
    for training in (True, False):
        model = case.relax(case.model().train(training))
        assert all(m.training is training for m in model.modules())


@table
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_terms_take_and_follow_the_layers_dtype(case, dtype):
    moved = case.relaxed(torch.float32, init=0.1).to(dtype)
    models = [moved]
    if case.needs != "escnn" or torch.finfo(dtype).eps < 1e-6:  # else refused, as tests/adapters/test_escnn.py has it
        models.append(case.relax(case.model(torch.float32).to(dtype), init=0.1))
    for model in models:
        for term in terms_of(model):
            assert {t.dtype for t in (*term.parameters(), *term.buffers())} == {dtype}
        data = [part.to(dtype) if part.is_floating_point() else part for part in case.data(dtype=torch.float32)]
        for output in tensors(model(*data)):
            assert output.dtype == dtype and torch.isfinite(output).all()


@pytest.mark.parametrize("name", ["sets, nn.Linear", "vectors, own layer", "e3nn linear", "e3nn gate network"])
def test_autocast_leaves_terms_in_place(name):
    case = case_named(name)
    data = case.data(dtype=torch.float32)
    relaxed = case.relaxed(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lower = relaxed(*data)
        with ce.disabled(relaxed):
            base = relaxed(*data)
    full = relaxed(*data)
    assert (lower.float() - full).norm() < 0.05 * full.norm()
    assert (base.float() - full).norm() > 0.1 * full.norm()


@pytest.mark.parametrize(
    "name",
    [
        "sets, nn.Linear",
        "vectors, own layer",
        "vector neurons, rank 4",
        "vector neurons, rank 5",
        "vector neurons, between transpositions",
        "e3nn linear",
        "e3nn fully connected tensor product",
        pytest.param("SEGNN", marks=pytest.mark.slow),
    ],
)
def test_compiled_in_one_graph(name):
    case = case_named(name)
    data, relaxed = case.data(), case.relaxed()
    if any(isinstance(m, torch.jit.ScriptModule) for m in relaxed.modules()):
        pytest.skip("this e3nn compiled its layers to TorchScript, which torch.compile cannot trace")
    torch._dynamo.reset()
    compiled = torch.compile(relaxed, fullgraph=True, backend="aot_eager")
    assert_close(run(relaxed, data), run(compiled, data))
    with ce.disabled(relaxed):
        torch.testing.assert_close(tensors(compiled(*data)), tensors(case.model()(*data)))


# --- saving and copying -----------------------------------------------------------------------------------------------


@table
def test_checkpoints_of_relaxed_models(case):
    relaxed, data = case.relaxed(gate=True), case.data()
    file = io.BytesIO()
    torch.save(relaxed.state_dict(), file)
    file.seek(0)
    other = case.relaxed(gate=True, init=0.0)
    other.load_state_dict(torch.load(file, weights_only=True))
    relaxed, other = relaxed.eval(), other.eval()
    assert all(torch.equal(a, b) for a, b in zip(tensors(other(*data)), tensors(relaxed(*data)), strict=True))


@table
def test_plain_checkpoints_load_strictly_and_clear_the_terms(case):
    relaxed, plain = case.relaxed(), case.model()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.1)
    relaxed.load_state_dict(plain.state_dict(), strict=True)
    assert not any(term.weight.any() for term in terms_of(relaxed))
    assert_close(run(plain, case.data()), run(relaxed, case.data()))


@table
def test_deepcopies_are_equal_and_independent(case):
    relaxed, data = case.relaxed(gate=True), case.data()
    clone = copy.deepcopy(relaxed)
    assert {r.name: type(r.layer) for r in ce.relaxations(clone)} == {
        r.name: type(r.layer) for r in ce.relaxations(relaxed)
    }
    assert_identical(run(relaxed, data), run(clone, data))
    before = {key: value.clone() for key, value in relaxed.state_dict().items() if isinstance(value, torch.Tensor)}
    with torch.no_grad():
        for tensor in (*clone.parameters(), *clone.buffers()):
            if tensor.is_floating_point():
                tensor.add_(1.0)
    assert all(torch.equal(relaxed.state_dict()[key], value) for key, value in before.items())
    with ce.disabled(clone):
        assert all(term.active for term in terms_of(relaxed))
    ce.finalize(clone, on_violation="drop")
    assert ce.relaxations(relaxed)


@table
def test_pickling_is_refused_with_the_remedy(case):
    relaxed = case.relaxed()
    for write in (lambda: pickle.dumps(relaxed), lambda: torch.save(relaxed, io.BytesIO())):
        with pytest.raises(ce.errors.SerializationError, match=r"state_dict\(\).*ce\.finalize"):
            write()


def test_a_parametrized_layer_can_be_relaxed_and_copied():
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    plain = copy.deepcopy(layer)
    adapter = ce.adapters.linear("1x1o", "1x1o")
    ce.relax(layer, where=lambda name, m: name == "", adapter=adapter, init=0.5, complement=False)
    x = torch.randn(2, 3)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    report = ce.finalize(layer, fold=True, on_violation="drop")
    assert torch.equal(layer(x), plain(x)) and type(layer) is not nn.Linear
    assert "does not fit into its own weights" in str(report)


# --- parameter groups -------------------------------------------------------------------------------------------------


@table
def test_parameter_groups_split_without_loss(case):
    relaxed = case.relaxed(gate=True)
    own, terms = ce.parameter_groups(relaxed, lr=1e-2, term_lr=1e-3)
    assert {id(p) for p in terms["params"]} == {id(p) for term in terms_of(relaxed) for p in term.parameters()}
    assert len(own["params"]) + len(terms["params"]) == len(list(relaxed.parameters()))
    assert not {id(p) for p in own["params"]} & {id(p) for p in terms["params"]}
    assert (own["lr"], terms["lr"], terms["weight_decay"]) == (1e-2, 1e-3, 0.0)
    assert ce.parameter_groups(relaxed, lr=1e-2)[1]["lr"] == 1e-3


def test_weight_decay_spares_the_terms():
    case = case_named("sets, nn.Linear")
    relaxed = case.relaxed()
    optimizer = torch.optim.AdamW(ce.parameter_groups(relaxed, lr=0.1), weight_decay=0.5)
    before = [term.weight.clone() for term in terms_of(relaxed)]
    own = relaxed[0].weight.clone()
    for parameter in relaxed.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(torch.equal(term.weight, w) for term, w in zip(terms_of(relaxed), before, strict=True))
    assert torch.allclose(relaxed[0].weight, own * 0.95)
