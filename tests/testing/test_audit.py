"""The audit reads what layers state, looks at pipelines, takes products one factor at a time, and changes nothing."""

import pytest
import torch
from torch import nn

import constrained_equiv as ce
from constrained_equiv import Symmetry, actions, groups
from constrained_equiv import representations as reps
from constrained_equiv._audit import audit
from constrained_equiv._trace import atoms, trace, unchanged
from tests.cases import case_named
from tests.testing.zoo import ENERGY, NODES, O3, POINTS, VECTORS, Function, Mix, Neighbours, Pairs, lattice, network

ROWS = actions.along(reps.vectors(1), -1)


def steps(found):
    return [(f.name, f.status) for f in found.findings]


# --- frameworks ------------------------------------------------------------------------------------------------------


def e3nn_network(broken=None):
    o3 = pytest.importorskip("e3nn.o3")
    middle = nn.Identity() if broken is None else broken
    return nn.Sequential(o3.Linear("2x0e + 2x1o", "3x0e + 2x1o"), middle, o3.Linear("3x0e + 2x1o", "1x0e + 1x1o"))


@pytest.mark.usefixtures("float64_default")
def test_e3nn_layers_state_their_irreps():
    symmetry = Symmetry(O3, "2x0e + 2x1o", "1x0e + 1x1o")
    found = audit(e3nn_network(), torch.randn(5, 8), symmetry=symmetry)
    assert found.passed and [f.source for f in found.findings] == ["stated", "stated", "stated", "given"]
    found = audit(e3nn_network(nn.SiLU()), torch.randn(5, 8), symmetry=symmetry)
    assert found.culprit.name == "1" and "nonlinearity" in found.culprit.reason
    assert "3x0e + 2x1o" in found.culprit.reason  # what it acts on
    assert dict(steps(found))["2"] == "inherited"  # sound by itself


@pytest.mark.usefixtures("float64_default")
def test_irreps_are_read_inside_larger_groups():
    """Under E(3) and under a product with permutations, what e3nn states still binds where it speaks."""
    model, x = e3nn_network(Function(lambda x: x * x.new_tensor([1.0] * 8 + [1.1]))), torch.randn(5, 8)
    both = groups.product(O3, groups.symmetric(5))

    def act(irreps):
        rows = actions.through(both, 0, reps.irreps(irreps).act)
        return actions.chain(rows, actions.through(both, 1, actions.permute(-2)))

    found = audit(model, x, symmetry=Symmetry(both, act("2x0e + 2x1o"), act("1x0e + 1x1o")))
    assert found.culprit.name == "1" and found.culprit.group == "O(3)"
    assert {f.group for f in found.findings} == {"O(3)", "S_5"}
    assert all(f.status == "ok" for f in found.findings if f.group == "S_5"), found
    sums = nn.Sequential(e3nn_network(), Function(lambda x: x.cumsum(-2)))
    found = audit(sums, x, symmetry=Symmetry(both, act("2x0e + 2x1o"), act("1x0e + 1x1o")))
    assert found.culprit.name == "1" and found.culprit.group == "S_5"
    assert "under" in repr(found)


def test_a_whole_network_under_motions_passes_and_its_terms_are_named():
    case = case_named("SEGNN")
    model, data = case.model().eval(), case.data()
    found = audit(model, data, symmetry=case.symmetry())
    assert found.passed and found.error < 1e-12 and found.culprit is None
    assert not [f for f in found.findings if f.name.count(".gate.")]  # parts of sound modules are left out
    relaxed = case.relaxed().eval()
    found = audit(relaxed, data, symmetry=case.symmetry())
    first = ce.relaxations(relaxed)[0].name
    assert found.culprit.name == first and "non-equivariant term is on" in found.culprit.reason
    with ce.disabled(relaxed):
        assert audit(relaxed, data, symmetry=case.symmetry()).passed


def test_terms_of_plain_layers_state_their_representations():
    rows = reps.irreps("1x0e + 1x1o")
    layer = nn.Linear(4, 4, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([0.3, 2.0, 2.0, 2.0])))
    ce.relax(layer, where=lambda name, module: True, adapter=ce.adapters.linear(rows, rows), init=0.1)
    model = nn.Sequential(layer, Function(lambda x: x[..., :1]))
    found = audit(model, torch.randn(5, 4).double(), symmetry=Symmetry(O3, rows, None))
    assert found.culprit.name == "0" and found.findings[0].source == "stated"


@pytest.mark.parametrize("order", [4, 8])
def test_escnn_field_types_are_read(order):
    pytest.importorskip("escnn")
    from escnn import gspaces
    from escnn import nn as enn

    space = gspaces.rot2dOnR2(order)
    grey, deep = enn.FieldType(space, [space.trivial_repr]), enn.FieldType(space, [space.regular_repr] * 2)
    torch.manual_seed(0)
    body = [enn.R2Conv(grey, deep, 3, padding=1), enn.ReLU(deep), enn.R2Conv(deep, deep, 3, stride=2, padding=1)]

    class Model(nn.Module):
        def __init__(self, *parts):
            super().__init__()
            self.body = nn.ModuleList(parts)

        def forward(self, x):
            x = enn.GeometricTensor(x, grey)
            for part in self.body:
                x = part(x)
            return x.tensor.unflatten(1, (2, -1)).mean(2)

    symmetry = Symmetry(groups.cyclic(4), actions.pixels, actions.pixels)
    odd, even = torch.randn(1, 1, 7, 7), torch.randn(1, 1, 8, 8)
    found = audit(Model(*body).eval(), odd, symmetry=symmetry, tolerance=1e-4)
    assert found.passed and all(f.source == "stated" for f in found.findings[:-1]), found
    found = audit(Model(*body).eval(), even, symmetry=symmetry, tolerance=1e-4)
    assert found.culprit.name == "body.2" and "stride 2 on a grid of 8" in found.culprit.reason, found


# --- pipeline, ties, own code ----------------------------------------------------------------------------------------


def centred(x):
    return x - x.mean(-2, keepdim=True)


def centred_over_components(x):
    return x - x.mean(-1, keepdim=True)


def test_the_pipeline_is_blamed_before_the_network():
    torch.manual_seed(0)
    model, x = network(Pairs()).double(), torch.randn(2, 5, 3).double()
    turns = Symmetry(O3, ROWS, None)
    assert audit(model, x, symmetry=turns, pipeline=centred).passed
    found = audit(model, x, symmetry=turns, pipeline=[centred, centred_over_components])
    assert [f.status for f in found.findings[:2]] == ["ok", "lost"]
    assert found.culprit.name == "centred_over_components" and found.culprit.kind == "pipeline"
    assert found.culprit.own > 1e-2 and "data pipeline" in found.culprit.reason
    assert any("repair the pipeline" in note for note in found.notes)


def test_ties_among_nearest_neighbours_are_told_from_a_broken_layer():
    x = lattice(torch.float64)
    found = audit(network(Neighbours(3)), x, symmetry=POINTS)
    assert not found.passed and any("ties" in note for note in found.notes), found
    apart = x + 0.05 * torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))
    assert audit(network(Neighbours(3)), apart, symmetry=POINTS).passed
    found = audit(network(Function(torch.tanh)), x, symmetry=POINTS)
    assert not found.passed and not any("ties" in note for note in found.notes)


def test_loss_in_the_code_between_two_modules_is_located():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Mix(), Mix()

        def forward(self, x):
            return self.second(self.first(x).abs())

    torch.manual_seed(0)
    found = audit(Model(), torch.randn(6, 4, 3), symmetry=VECTORS)
    assert found.culprit.name == "input 0 of second" and "makes input 0 of 'second'" in found.culprit.reason


def test_what_leaves_the_symmetry_and_returns_is_excused():
    class Canonical(nn.Module):
        """Work in a frame of the features themselves: the linear layer inside sees invariants in disguise."""

        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x):
            first = nn.functional.normalize(x[:, 0], dim=-1)
            second = nn.functional.normalize(x[:, 1] - (x[:, 1] * first).sum(-1, keepdim=True) * first, dim=-1)
            frame = torch.stack([first, second, torch.linalg.cross(first, second)], 1)
            return self.inner(x @ frame.mT) @ frame

    torch.manual_seed(0)
    rotations = Symmetry(groups.SO3(), "1x1", "1x1")
    x = torch.randn(6, 4, 3, dtype=torch.float64)
    assert audit(nn.Sequential(Canonical()).double(), x, symmetry=rotations).passed
    found = audit(nn.Sequential(Canonical(), nn.Tanh()).double(), x, symmetry=rotations)
    assert found.culprit.name == "1"


def test_another_path_for_the_moved_input_is_reported():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = Mix(), Mix()

        def forward(self, x):
            return self.left(x) if x.sum() > 0 else self.right(x)

    found = audit(Branching(), torch.ones(2, 4, 3), symmetry=VECTORS)
    assert not found.passed and any("other modules for g x" in note for note in found.notes)
    assert found.culprit.name == "" and found.culprit.status == "lost"


# --- what the user states --------------------------------------------------------------------------------------------


class Packed(nn.Module):
    """Two scalars and two vectors in one tensor, which nobody could guess."""

    def forward(self, x):
        return torch.cat([x.square().sum(-1)[:, :2], x[:, 0], x[:, 1]], -1)


def test_stated_symmetries_of_inner_modules_bind():
    def second(factor):
        return Function(lambda h: factor * h[:, 2:5].unsqueeze(1) * h[:, :1, None])

    x = torch.randn(3, 4, 3, dtype=torch.float64)  # too few rows to find a linear action by fitting
    wobble = torch.tensor([1.0, 1.0, 1.1], dtype=torch.float64)
    good, bad = network(Packed(), second(1.0)), network(Packed(), second(wobble))
    assert audit(good, x, symmetry=VECTORS).passed
    found = audit(bad, x, symmetry=VECTORS)
    assert found.findings[0].status == "unknown"
    stated = {"0": Symmetry(O3, ROWS, "2x0e + 2x1o")}
    found = audit(bad, x, symmetry=VECTORS, layers=stated)
    assert (found.findings[0].status, found.findings[0].source) == ("ok", "given") and found.culprit.name == "1"
    wrong = {"0": Symmetry(O3, ROWS, "2x0e + 2x1e")}
    found = audit(good, x, symmetry=VECTORS, layers=wrong)
    assert found.passed and found.culprit is None  # the network as a whole decides
    assert found.findings[0].status == "lost" and found.findings[0].error == pytest.approx(0.5, abs=0.5)


def test_bad_arguments_are_named():
    with pytest.raises(ce.errors.RepresentationError, match=r"layers= names \['nowhere'\]"):
        audit(network(Mix()), torch.ones(2, 4, 3), symmetry=VECTORS, layers={"nowhere": VECTORS})
    with pytest.raises(ce.errors.RepresentationError, match="of a function"):
        audit(lambda x: x, torch.ones(2, 4, 3), symmetry=VECTORS, layers={"0": VECTORS})
    with pytest.raises(ce.errors.RepresentationError, match=r"layer's symmetry is of C_4"):
        turn = reps.defining(groups.cyclic(4))
        layers = {"0": Symmetry(groups.cyclic(4), turn, turn)}
        audit(network(Mix()), torch.ones(2, 4, 3), symmetry=VECTORS, layers=layers)
    with pytest.raises(ce.errors.RepresentationError, match="nothing was compared"):
        audit(lambda x: "text", torch.ones(2, 4, 3), symmetry=VECTORS)


# --- records and side effects ----------------------------------------------------------------------------------------


def test_functions_are_audited_as_one_piece():
    found = audit(torch.tanh, torch.randn(2, 4, 3), symmetry=VECTORS)
    assert found.culprit.kind == "tanh" and not found.passed
    assert audit(torch.neg, torch.randn(2, 4, 3), symmetry=VECTORS).passed


def test_random_functions_are_found():
    found = audit(lambda x: nn.functional.dropout(x, 0.5), torch.randn(2, 4, 3), symmetry=VECTORS)
    assert found.culprit.status == "random" and found.error > 0.1


def test_outputs_in_dictionaries_are_followed():
    def model(x):
        energy = torch.linalg.vector_norm(centred(x), dim=-1).sum(-1)
        return {"energy": energy, "positions": 2 * centred(x) + x.mean(-2, keepdim=True)}

    symmetry = Symmetry(groups.E3(), actions.points, {"energy": None, "positions": actions.points})
    found = audit(network(Function(model)), torch.randn(2, 5, 3, dtype=torch.float64), symmetry=symmetry)
    assert found.passed and found.findings[-1].action == "invariant, points"


def test_the_table_reads_well():
    torch.manual_seed(0)
    text = repr(audit(network(Mix(), nn.LayerNorm(3)), torch.randn(6, 4, 3), symmetry=VECTORS))
    lines = text.splitlines()
    assert lines[0].split() == ["module", "class", "action", "error", "own", "error"]
    assert lines[2].startswith("1 ") and "-> lost" in lines[2]
    assert "first lost at '1' (LayerNorm) under O(3): normalises" in text
    good = repr(audit(network(Mix()), torch.randn(6, 4, 3), symmetry=VECTORS))
    assert good.splitlines()[-1].startswith("equivariant: error")


def test_auditing_changes_nothing():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.ReLU(inplace=True)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(2, 5, 3)
    kept, state = x.clone(), torch.get_rng_state()
    audit(model, x, symmetry=NODES)
    assert torch.equal(x, kept) and torch.equal(state, torch.get_rng_state())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.training


def test_hooks_leave_when_the_model_raises():
    model = network(Mix())
    with pytest.raises(RuntimeError):
        audit(model, torch.randn(6, 5, 3), symmetry=VECTORS)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_shared_modules_and_nested_calls_are_traced_in_order():
    shared = Mix()
    model = network(shared, network(shared, nn.Identity()))
    recorded = trace(model, lambda: model(torch.ones(1, 4, 3)))
    assert [(e.stage, e.call.name) for e in recorded.events if e.stage == "leave"] == [
        ("leave", "0"), ("leave", "0"), ("leave", "1.1"), ("leave", "1"), ("leave", "")]  # fmt: skip
    with unchanged(lambda x: x):
        pass


def test_energies_with_forces_inside():
    case = case_named("energies and forces")
    (positions,) = case.data()
    found = audit(case.model().eval(), positions, symmetry=case.symmetry())
    assert found.passed and found.error < 1e-10, found


def test_a_nan_does_not_pass():
    found = audit(network(Mix(), Function(lambda x: x / 0)), torch.randn(6, 4, 3), symmetry=VECTORS)
    assert not found.passed and found.culprit is not None


def test_centring_in_front_of_a_translation_invariant_network():
    torch.manual_seed(0)
    assert audit(network(Pairs(centred)).double(), torch.randn(2, 5, 3).double(), symmetry=ENERGY).passed


class Trying(nn.Module):
    """Falls back on another layer where its first one raises, within or outside a part of that."""

    def __init__(self, first):
        super().__init__()
        self.first, self.second = first, nn.Linear(3, 3)

    def forward(self, x):
        try:
            return self.first(x)
        except RuntimeError:
            return self.second(x)


@pytest.mark.parametrize("first", [nn.Linear(4, 3), nn.Sequential(nn.Identity(), nn.Linear(4, 3))])
def test_calls_that_raised_are_left_out_of_the_trace(first):
    model, x = Trying(first), torch.randn(5, 3)
    found = trace(model, lambda: model(x))
    done = [(e.stage, e.call.name) for e in found.events if not e.call.name.startswith("first.0")]
    assert done == [("enter", ""), ("enter", "second"), ("leave", "second"), ("leave", "")]
    assert torch.equal(found.events[-1].call.output, found.output)


def test_what_is_changed_in_place_is_another_tensor():
    (before,) = atoms(tensor := torch.randn(5, 3))
    assert atoms(tensor.view(5, 3))[0].key == before.key
    tensor[0] = 1.0
    assert atoms(tensor)[0].key != before.key
    with torch.inference_mode():
        assert atoms(torch.ones(2))[0].key[-1] == 0
