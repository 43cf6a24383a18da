"""The bound is never below what is measured, and is refused, with a reason, where none holds."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import constrained_equiv as ce
from constrained_equiv import Symmetry, actions, groups
from constrained_equiv import representations as reps
from constrained_equiv._certificate import certify
from tests.cases import CASES, case_named, tensors

S4 = groups.symmetric(4)
SETS = Symmetry(S4, actions.permute(-2), actions.permute(-2))


def terms_of(model):
    return [(r.name, r.layer, r.term.matrix()) for r in ce.relaxations(model)]


def set_network(seed=0, scale=1.0, activation=None, depth=3):
    torch.manual_seed(seed)
    parts = []
    for _ in range(depth):
        parts += [nn.Linear(3, 3), activation or nn.Tanh()]
    model = nn.Sequential(*parts[:-1]).double().eval()
    points = reps.permutation(4, channels=3)
    adapter = ce.adapters.linear(points, points, axes=(-2, -1))
    generator = torch.Generator().manual_seed(seed)
    ce.relax(model, where=lambda n, m: isinstance(m, nn.Linear), adapter=adapter, init=scale, generator=generator)
    return model, torch.randn(5, 4, 3, dtype=torch.float64, generator=generator)


def norm(value):
    return math.hypot(*(float(torch.linalg.vector_norm(part.detach())) for part in tensors(value)))


@settings(max_examples=30)
@given(
    st.integers(0, 2**31 - 1),
    st.sampled_from([1e-4, 1e-2, 1.0]),
    st.sampled_from([nn.Tanh(), nn.ReLU(), nn.LeakyReLU(2.0), nn.ELU(1.5), nn.SiLU(), nn.GELU(), nn.Sigmoid()]),
)
def test_the_bound_holds_on_chains(seed, scale, activation):
    model, x = set_network(seed, scale, activation)
    found = certify(model, terms_of(model), x, symmetry=SETS)
    assert found.equivariance is not None and found.measured <= found.equivariance
    assert found.size == pytest.approx(norm(model(x)))
    assert found.equivariance == pytest.approx(sum(bound.equivariance for bound in found.bounds))
    # the same chain of arguments bounds the change of the output when all terms go
    with ce.disabled(model):
        plain = model(x)
    assert norm(model(x) - plain) <= sum(b.truncation * b.lipschitz for b in found.bounds) * (1 + 1e-12)


def test_the_bound_is_the_formula():
    model, x = set_network(depth=2)
    found = certify(model, terms_of(model), x, symmetry=SETS, samples=3)
    first, second = (r.term.matrix().detach() for r in ce.relaxations(model))
    base = torch.linalg.matrix_norm(model[2].weight.detach(), 2)
    hidden = model[1](model[0](x))
    expected = [(first, x, float(base)), (second, hidden, 1.0)]
    for bound, (matrix, h, constant) in zip(found.bounds, expected, strict=True):
        strength = float(torch.linalg.matrix_norm(matrix, 2))
        assert bound.strength == pytest.approx(strength) and bound.entering == pytest.approx(norm(h))
        assert bound.truncation == pytest.approx(strength * norm(h)) and bound.lipschitz == pytest.approx(constant)
    # permutations keep the norm of x, so the first share needs no maximum
    assert found.bounds[0].equivariance == pytest.approx(found.bounds[0].truncation * 2 * float(base))


@pytest.mark.parametrize("case", [case for case in CASES if case.id != "energies and forces"])
def test_truncations_hold_for_every_kind_of_layer(case):
    data, model = case.data(), case.relaxed(init=0.3).eval()
    arguments = data if len(data) > 1 else data[0]
    found = certify(model, terms_of(model), arguments, symmetry=case.symmetry(), samples=2)
    calls = {}
    handles = [
        r.layer.register_forward_hook(lambda m, args, out, n=r.name: calls.setdefault(n, []).append((args, out)))
        for r in ce.relaxations(model)
    ]
    model(*data)
    for handle in handles:
        handle.remove()
    plain = copy.deepcopy(model)
    ce.finalize(plain, on_violation="drop")
    layers = dict(plain.named_modules())
    seen = dict.fromkeys(calls, 0)
    for bound in found.bounds:
        args, with_term = calls[bound.name][seen[bound.name]]
        seen[bound.name] += 1
        change = norm_difference(with_term, layers[bound.name](*args))
        assert change <= bound.truncation * (1 + 1e-5), bound
        assert change > 0
    if found.equivariance is not None:
        assert found.measured <= found.equivariance
    else:
        assert any(bound.reason for bound in found.bounds)


def norm_difference(first, second):
    return math.hypot(
        *(
            float(torch.linalg.vector_norm((a - b).detach().double()))
            for a, b in zip(tensors(first), tensors(second), strict=True)
        )
    )


@pytest.mark.usefixtures("float64_default")
def test_e3nn_chains_have_a_bound_and_gates_have_none():
    o3 = pytest.importorskip("e3nn.o3")
    symmetry = Symmetry(groups.O3(), "2x0e + 2x1o", "1x0e + 1x1o")
    chain = nn.Sequential(o3.Linear("2x0e + 2x1o", "3x0e + 2x1o", biases=True), o3.Linear("3x0e + 2x1o", "1x0e + 1x1o"))
    ce.relax(chain, init=0.1)
    found = certify(chain, terms_of(chain), torch.randn(5, 8), symmetry=symmetry)
    assert found.measured <= found.equivariance and not any(bound.reason for bound in found.bounds)
    with ce.disabled(chain):
        rows = chain[1](torch.eye(9)).detach()
    assert found.bounds[0].lipschitz == pytest.approx(float(torch.linalg.matrix_norm(rows, 2)))
    case = case_named("e3nn gate network")
    model = case.relaxed(init=0.1).eval()
    found = certify(model, terms_of(model), case.data()[0], symmetry=case.symmetry())
    assert found.equivariance is None and "Gate" in found.bounds[0].reason
    assert found.bounds[-1].equivariance is not None  # nothing follows the last layer
    assert all(bound.truncation is not None for bound in found.bounds)
    assert "no bound" in repr(found) and "Gate" in repr(found)


def relaxed_linear(model, layer):
    points = reps.permutation(4, channels=3)
    adapter = ce.adapters.linear(points, points, axes=(-2, -1))
    return ce.relax(model, where=lambda n, m: m is layer, adapter=adapter, init=0.1)


class Doubling(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.Linear(3, 3), nn.Tanh()

    def forward(self, x):
        return self.last(2 * self.inner(x))


def test_no_bound_is_given_where_none_holds():
    torch.manual_seed(0)
    x = torch.randn(5, 4, 3)
    code = Doubling()
    relaxed_linear(code, code.inner)
    found = certify(code, terms_of(code), x, symmetry=SETS)
    assert found.equivariance is None and "code between 'inner' and 'last'" in found.bounds[0].reason
    assert found.bounds[0].truncation is not None

    for following, words in (
        (nn.BatchNorm1d(4).train(), "statistics of the batch"),
        (nn.LayerNorm(3), "LayerNorm"),
        (nn.Softmax(-1), "Softmax"),
    ):
        model = nn.Sequential(nn.Linear(3, 3), following)
        relaxed_linear(model, model[0])
        found = certify(model, terms_of(model), x, symmetry=SETS)
        assert found.equivariance is None and words in found.bounds[0].reason
        stated = certify(model, terms_of(model), x, symmetry=SETS, lipschitz={"1": 7.0})
        assert stated.bounds[0].lipschitz == 7.0 and stated.equivariance is not None

    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(4).eval())
    relaxed_linear(model, model[0])
    found = certify(model, terms_of(model), x, symmetry=SETS)
    assert found.measured <= found.equivariance  # fixed statistics are a linear map

    stretched = Symmetry(S4, actions.permute(-2), lambda g, x: actions.permute(-2)(g, x) * (1 + g[0, 0].item()))
    assert "keep the length" in certify(model, terms_of(model), x, symmetry=stretched).bounds[0].reason
    outer = certify(model, terms_of(model), x, symmetry=SETS, lipschitz={"0": 3.0})
    assert outer.bounds[0].lipschitz is not None  # a relaxed layer's own constant does not enter its own bound


class Keyword(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(features=x)


class Branching(nn.Module):
    """Runs its layer once more for half of the inputs."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x):
        x = self.inner(x)
        return self.inner(x) if x[0, 0, 0] > x[0, 1, 0] else x


def test_inputs_passed_by_keyword_are_not_seen():
    o3 = pytest.importorskip("e3nn.o3")
    model = ce.relax(Keyword(o3.Linear("2x1o", "1x1o")), init=0.1)
    (bound,) = certify(model, terms_of(model), torch.randn(5, 6), symmetry=Symmetry(groups.O3(), "2x1o", "1x1o")).bounds
    assert bound.truncation is bound.equivariance is None and "by keyword" in bound.reason


def test_another_path_for_the_moved_input_has_no_bound():
    torch.manual_seed(0)
    x = torch.randn(5, 4, 3)
    model = Branching()
    found = certify(relaxed_linear(model, model.inner), terms_of(model), x, symmetry=SETS)
    assert found.equivariance is None and "other layers for g x" in found.bounds[0].reason


def test_subclasses_may_compute_something_else():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(nn.Linear(3, 3), Doubled(3, 3))
    relaxed_linear(model, model[0])
    found = certify(model, terms_of(model), torch.randn(5, 4, 3), symmetry=SETS)
    assert found.equivariance is None and "'1' (Doubled)" in found.bounds[0].reason


def test_without_a_symmetry_there_are_truncations_alone():
    model, x = set_network()
    found = certify(model, terms_of(model), x)
    assert found.equivariance is None and found.measured is None
    assert all(b.truncation > 0 and not b.reason for b in found.bounds)


def test_convolutions_are_bounded_by_the_sum_over_kernel_points():
    pytest.importorskip("escnn")
    case = case_named("escnn convolution, C_4, groups")
    model, (x,) = case.relaxed(init=0.3).eval(), case.data()
    (bound,) = certify(model, terms_of(model), x).bounds
    kernel = ce.relaxations(model)[0].term.matrix().detach()
    size = min(x.shape[-1], 5)
    probe = torch.zeros(1, kernel.shape[1], size, size, dtype=kernel.dtype)
    rows = [
        nn.functional.conv2d(p, kernel, padding=2).flatten()
        for p in torch.eye(probe.numel(), dtype=kernel.dtype).view(-1, *probe.shape)
    ]
    exact = float(torch.linalg.matrix_norm(torch.stack(rows), 2))  # of one dense convolution with these channels
    assert exact <= bound.strength


# --- code that a trace of modules does not see -----------------------------------------------------------------------

TURNS = Symmetry(groups.O3(), "2x1o", "2x1o")


class Between(nn.Module):
    """Two identities, and code in between and behind."""

    def __init__(self, between=lambda h: h, behind=lambda o, h: o, middle=None):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.middle = middle or nn.Identity()
        self.between, self.behind = between, behind
        with torch.no_grad():
            self.a.weight.copy_(torch.eye(6))
            self.b.weight.copy_(torch.eye(6))

    def forward(self, x):
        h = self.between(self.a(x))
        return self.behind(self.b(self.middle(h)), h)


def leaning(model):
    """One entry of the term is not zero, and the input is what it acts on."""
    ce.relax(model, where=lambda n, m: n == "a", adapter=ce.adapters.linear("2x1o", "2x1o"))
    model.a.non_equivariant.weight.data[0, 1] = 0.5
    x = torch.zeros(1, 6)
    x[0, 1] = 1.0
    return x


UNSEEN = {
    "in place between": (Between(lambda h: h.mul_(10)), "code between"),
    "out of place between": (Between(lambda h: h * 10), "code between"),
    "in place behind": (Between(behind=lambda o, h: o.mul_(10)), "code after 'b'"),
    "added in place": (Between(behind=lambda o, h: o.add_(h)), "code after 'b'"),
    "out of place behind": (Between(behind=lambda o, h: o * 10), "code after 'b'"),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_no_bound_is_given_past_code_that_changes_tensors(name):
    model, words = UNSEEN[name]
    model = copy.deepcopy(model)
    x = leaning(model)
    report = ce.finalize(model, batches=[x], symmetry=TURNS, on_violation="drop")
    assert report.certificate.equivariance is None and words in report.certificate.bounds[0].reason


def hooked(model, name):
    target = model.get_submodule(name.split()[-1])
    if name.startswith("before"):
        target.register_forward_pre_hook(lambda m, args: (args[0].mul_(10),))
    else:
        target.register_forward_hook(lambda m, args, out: out * 10)
    return model


@pytest.mark.parametrize("name", ["after middle", "after b", "before b", "after a"])
def test_hooks_have_no_constant_unless_one_is_stated(name):
    model = hooked(Between(), name)
    x = leaning(model)
    found = certify(model, terms_of(model), x, symmetry=TURNS)
    assert found.equivariance is None and found.bounds[0].reason
    stated = certify(model, terms_of(model), x, symmetry=TURNS, lipschitz={name.split()[-1]: 10.0})
    if name in ("after middle", "after b"):
        assert "hooks on" in found.bounds[0].reason
        assert stated.measured <= stated.equivariance
    else:  # the term's own layer, and a tensor changed before the layer is seen to take it
        assert stated.equivariance is None


def test_the_hook_of_a_models_only_layer_has_no_constant():
    model = nn.Linear(6, 6, bias=False)
    model.register_forward_hook(lambda m, args, out: out * 10)
    ce.relax(model, where=lambda n, m: True, adapter=ce.adapters.linear("2x1o", "2x1o"), init=0.1)
    found = certify(model, terms_of(model), torch.randn(5, 6), symmetry=TURNS)
    assert found.equivariance is None and "hooks on '(model)'" in found.bounds[0].reason


def test_activations_in_place_keep_their_bound():
    model, x = set_network(activation=nn.ReLU(inplace=True))
    found = certify(model, terms_of(model), x, symmetry=SETS)
    assert found.equivariance is not None and found.measured <= found.equivariance


def test_inference_mode_hides_what_is_changed_in_place():
    model = Between(lambda h: h.mul_(10))
    x = leaning(model)
    with torch.inference_mode():
        found = certify(model, terms_of(model), x, symmetry=TURNS)
    assert found.equivariance is None and "inference mode" in found.bounds[0].reason


@pytest.mark.usefixtures("float64_default")
def test_rows_that_a_tensor_product_repeats_count_each_time():
    o3 = pytest.importorskip("e3nn.o3")

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.product = o3.FullyConnectedTensorProduct("2x1o", "1x0e", "2x1o")

        def forward(self, x, y):
            return self.product(x, y)

    model = ce.relax(Product(), init=0.3)
    x, y = torch.randn(1, 6), torch.ones(50, 1)
    with ce.disabled(model):
        plain = model(x, y)
    change = norm(model(x, y) - plain)
    found = certify(model, terms_of(model), (x, y), symmetry=Symmetry(groups.O3(), ("2x1o", "1x0e"), "2x1o"))
    (bound,) = found.bounds
    assert bound.entering == pytest.approx(norm(x) * math.sqrt(50))
    assert norm(x) * bound.strength < change <= bound.truncation
    assert found.measured <= found.equivariance


def test_a_network_that_catches_an_exception_of_a_layer_is_finalized():
    class Trying(Between):
        def forward(self, x):
            try:
                return self.b(torch.cat([x, x], -1))
            except RuntimeError:
                return self.b(self.a(x))

    model = Trying()
    report = ce.finalize(model, batches=[leaning(model)], symmetry=TURNS, on_violation="drop")
    assert report.certificate.measured <= report.certificate.equivariance
