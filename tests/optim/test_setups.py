"""Whatever people train with: the wrapped optimizer behaves as its base does, and the constraint is met besides."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer as every

import constrained_equiv as ce
from tests.optim.toys import points

LEVEL = 0.05


class Net(nn.Module):
    """Two layers on sets of points with a nonlinearity."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.layers = points(2).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](torch.tanh(self.layers[0](x)))


def data(count: int = 32, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 3, 2, dtype=dtype)
    return x, x.roll(1, 1) * torch.tensor([1.0, 2.0, 3.0], dtype=dtype)[:, None]


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().mean()


def wrap(model: nn.Module, base: Any = torch.optim.Adam, level: Any = LEVEL, **options: Any) -> ce.ConstrainedOptimizer:
    return ce.ConstrainedOptimizer(
        base(model.parameters(), lr=0.02), ce.constraints.weight(model, level=level), **options
    )


def train(model: nn.Module, optimizer: Any, x: Tensor, y: Tensor, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, x, y).backward()
        optimizer.step()


def parameters(model: nn.Module) -> list[Tensor]:
    return [p.detach() for p in model.parameters()]


def same(left: nn.Module, right: nn.Module, atol: float = 0.0) -> bool:
    pairs = zip(parameters(left), parameters(right), strict=True)
    return all(torch.allclose(a, b, rtol=0, atol=atol) for a, b in pairs)


def twins() -> tuple[nn.Module, nn.Module]:
    model = Net()
    return model, copy.deepcopy(model)


def values(optimizer: Any) -> Tensor:
    return optimizer.readings().values


SCHEDULERS = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 5),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 40),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.02, total_steps=40),
    "warm up, then decay": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o,
        [torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=5), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)],
        [5],
    ),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_learning_rate_schedulers_drive_the_base(scheduler: str) -> None:
    """Warnings are errors: the scheduler must see our step as an optimizer's."""
    model, other = twins()
    found = []
    for net, wrapped in ((model, True), (other, False)):
        base = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
        record = ce.constraints.weight(net, level=LEVEL)
        optimizer = ce.ConstrainedOptimizer(base, record) if wrapped else base
        schedule, rates = SCHEDULERS[scheduler](optimizer), []
        for _ in range(10):
            train(net, optimizer, *data(), 1)
            schedule.step()
            rates.append(base.param_groups[0]["lr"])
        found.append(rates)
    assert found[0] == found[1]


def test_step_hooks_run_around_the_constrained_step() -> None:
    model, optimizer, seen = Net(), None, []
    optimizer = wrap(model)
    optimizer.register_step_pre_hook(lambda *_: seen.append(("before", optimizer.finished_steps)))
    optimizer.register_step_post_hook(lambda *_: seen.append(("after", optimizer.finished_steps)))
    train(model, optimizer, *data(), 1)
    assert seen == [("before", 0), ("after", 1)]


def test_step_hooks_may_be_global_and_replace_the_closure() -> None:
    """As torch has it: hooks of all optimizers run around those of one, and what a hook returns takes the place."""
    model, x, y = Net(), *data()
    optimizer, seen = wrap(model), []

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model, x, y)
        value.backward()
        return value

    handles = [
        every.register_optimizer_step_pre_hook(lambda o, *_: seen.append(f"before {type(o).__name__}")),
        every.register_optimizer_step_post_hook(lambda o, *_: seen.append(f"after {type(o).__name__}")),
        optimizer.register_step_pre_hook(lambda o, args, kwargs: ((args[0], closure), kwargs)),
    ]
    assert optimizer.step() is not None  # the loss of the closure that the hook gave
    for handle in handles:
        handle.remove()
    own, base = "ConstrainedOptimizer", "Adam"
    assert seen == [f"before {own}", f"before {base}", f"after {base}", f"after {own}"]


def test_accumulation_equals_the_big_batch() -> None:
    model, other = twins()
    x, y = data()
    one, two = wrap(model), wrap(other)
    train(model, one, x, y, 5)
    for _ in range(5):
        two.zero_grad()
        for half in (slice(0, 16), slice(16, 32)):
            (loss(other, x[half], y[half]) / 2).backward()
        two.step()
    assert same(model, other, 1e-12)
    assert torch.allclose(one.readings().multipliers, two.readings().multipliers, rtol=0, atol=1e-12)


def test_clipping_clips_the_task_alone() -> None:
    """With the task clipped to nothing, what moves the terms is the constraint."""
    model = Net()
    optimizer = wrap(model, torch.optim.SGD, level=0.0, at_zero="multipliers", formulation="lagrangian", dual_lr=1.0)
    before = [r.term.weight.detach().clone() for r in ce.relaxations(model)]
    for _ in range(2):
        optimizer.zero_grad()
        loss(model, *data()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-30)
        optimizer.step()
    for term, old in zip([r.term for r in ce.relaxations(model)], before, strict=True):
        assert term.weight.norm() < old.norm() * (1 - 1e-4)
        assert torch.allclose(term.weight / term.weight.norm(), old / old.norm(), atol=1e-12)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_a_closure_is_the_same_step(base: Any) -> None:
    model, other = twins()
    x, y = data()
    one, two = wrap(model, base), wrap(other, base)

    def closure() -> Tensor:
        two.zero_grad()
        value = loss(other, x, y)
        value.backward()
        return value

    for _ in range(5):
        expected = loss(model, x, y).detach()
        train(model, one, x, y, 1)
        assert torch.equal(two.step(closure), expected)
    assert same(model, other)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs_minimises_the_lagrangian(line_search: Any) -> None:
    model = Net()
    x, y = data()
    base = torch.optim.LBFGS(model.parameters(), lr=0.2 if line_search is None else 1.0, line_search_fn=line_search)
    optimizer = ce.ConstrainedOptimizer(base, ce.constraints.weight(model, level=LEVEL))

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model, x, y)
        value.backward()
        return value

    for _ in range(60):
        optimizer.step(closure)
    assert values(optimizer).max() <= LEVEL + 2e-3
    assert optimizer.finished_steps == 60
    for r in ce.relaxations(model):
        projected = r.term.projection.complement_(r.term.weight.detach().clone())
        assert torch.allclose(projected, r.term.weight, atol=1e-14)


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
@pytest.mark.parametrize("attached", [False, True])
def test_lbfgs_trains_the_equivariant_model_alone_in_the_tail(line_search: Any, attached: bool) -> None:
    """What it remembers from before leads back into the terms."""
    model, level = sets(), ce.schedules.linear(0.3, 0.0, 10)
    x = torch.randn(40, 4, 2)
    y = x.roll(1, 1) + x.mean(1, keepdim=True)
    base = torch.optim.LBFGS(model.parameters(), lr=0.2 if line_search is None else 1.0, line_search_fn=line_search)
    record = ce.constraints.weight(model, level=level)
    if attached:
        ce.attach(base, record)
    optimizer = base if attached else ce.ConstrainedOptimizer(base, record)
    sizes = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        sizes.append(max(float(r.term.weight.detach().norm()) for r in ce.relaxations(model)))
        value = (model(x) - y).square().mean()
        value.backward()
        return value

    for _ in range(10):
        optimizer.step(closure)
    assert max(sizes) > 0.1
    sizes.clear()
    losses = [float(optimizer.step(closure).detach()) for _ in range(30)]
    assert max(sizes) == 0
    assert losses[-1] < losses[0]
    optimizer = torch.optim.LBFGS([p for name, p in model.named_parameters() if "non_equivariant" not in name], lr=0.2)
    assert min(float(optimizer.step(closure).detach()) for _ in range(10)) > losses[-1] - 1e-3


def test_several_groups_keep_their_own_options() -> None:
    model = Net()
    groups = ce.parameter_groups(model, lr=0.02, term_lr=0.01)
    base = torch.optim.AdamW(groups, weight_decay=0.1)
    optimizer = ce.ConstrainedOptimizer(base, ce.constraints.weight(model, level=LEVEL))
    train(model, optimizer, *data(), 3)
    assert [g["lr"] for g in optimizer.param_groups] == [0.02, 0.01]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize(
    "flags", [{"foreach": True}, {"foreach": False}, {"fused": True}, {"amsgrad": True}], ids=lambda f: next(iter(f))
)
def test_implementations_of_adam_agree(flags: dict[str, Any]) -> None:
    model, other = twins()
    x, y = data()
    train(model, wrap(model, lambda ps, lr: torch.optim.Adam(ps, lr=lr, **flags)), x, y, 10)
    plain = {"amsgrad": True} if "amsgrad" in flags else {}
    train(other, wrap(other, lambda ps, lr: torch.optim.Adam(ps, lr=lr, **plain)), x, y, 10)
    assert same(model, other, 1e-12)


def test_a_tensor_learning_rate_is_not_read() -> None:
    model, other = twins()
    x, y = data()
    base = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.02, dtype=torch.float64), foreach=False)
    train(model, ce.ConstrainedOptimizer(base, ce.constraints.weight(model, level=LEVEL)), x, y, 5)
    train(other, wrap(other), x, y, 5)
    assert same(model, other, 1e-9)


def test_frozen_terms_are_left_alone() -> None:
    model = Net()
    frozen = ce.relaxations(model)[0].term
    frozen.requires_grad_(False)
    before = frozen.weight.clone()
    optimizer = wrap(model, torch.optim.SGD, level=0.01)
    train(model, optimizer, *data(), 5)
    assert torch.equal(frozen.weight, before) and frozen.weight.grad is None


MEASURES: dict[str, Callable[[nn.Module], Any]] = {
    "weight": lambda m: ce.constraints.weight(m, level=0.01),
    "per block": lambda m: ce.constraints.weight(m, level=0.01, per="block"),
    "per model": lambda m: ce.constraints.weight(m, level=0.01, per="model"),
    "non-equivariant": lambda m: ce.constraints.weight(m, level=0.01, part="non_equivariant"),
    "relative": lambda m: ce.constraints.relative(m, level=0.01),
    "activation": lambda m: ce.constraints.activation(m, level=0.01),
    "lie": lambda m: ce.constraints.lie(m, level=0.01),
    "gate": lambda m: ce.constraints.gate(m, level=0.01, type="inequality"),
    "custom": lambda m: ce.constraints.custom(m, lambda t: t.weight.square().sum(), name="square", level=0.01),
}


@pytest.mark.parametrize("enforce", ["multipliers", "projection", "proximal"])
@pytest.mark.parametrize("measure", MEASURES)
def test_no_measure_and_no_route_moves_a_frozen_term(measure: str, enforce: Any) -> None:
    if enforce == "proximal" and measure in ("per model", "activation", "lie", "custom"):
        pytest.skip("no proximal step")
    if enforce == "projection" and measure == "custom":
        pytest.skip("no projection")
    model = sets(gate=True)
    frozen, trained = (relaxation.term for relaxation in ce.relaxations(model))
    frozen.requires_grad_(False)
    base = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    optimizer = ce.ConstrainedOptimizer(base, MEASURES[measure](model), enforce=enforce)
    before = [[p.clone() for p in term.parameters()] for term in (frozen, trained)]
    x = torch.randn(16, 4, 2)
    for _ in range(5):
        optimizer.zero_grad()
        (model(x) - x.roll(1, 1)).square().mean().backward()
        optimizer.step()
    assert all(map(torch.equal, frozen.parameters(), before[0]))
    assert not any(map(torch.equal, trained.parameters(), before[1]))


def test_terms_are_frozen_and_released_in_the_middle() -> None:
    """Frozen, layer and term stay where they are; released, both train on and meet the level."""
    model = Net()
    optimizer = wrap(model, level=ce.schedules.linear(0.2, 0.05, 20))
    layer = ce.relaxations(model)[0].layer
    x, y = data()
    train(model, optimizer, x, y, 5)
    layer.requires_grad_(False)
    before = [p.clone() for p in layer.parameters()]
    train(model, optimizer, x, y, 5)
    assert all(map(torch.equal, layer.parameters(), before))
    layer.requires_grad_(True)
    for rate in (5e-3, 1e-3):
        for group in optimizer.param_groups:
            group["lr"] = rate
        train(model, optimizer, x, y, 150)
    assert not any(map(torch.equal, layer.parameters(), before))
    assert (values(optimizer) <= 0.05 + 2e-2).all()


def test_a_learning_rate_of_zero_moves_nothing() -> None:
    model = Net()
    optimizer = wrap(model, torch.optim.SGD)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = parameters(copy.deepcopy(model))
    train(model, optimizer, *data(), 3)
    assert all(torch.allclose(a, b, atol=1e-15) for a, b in zip(parameters(model), before, strict=True))
    assert torch.equal(optimizer.readings().multipliers, torch.zeros(2).double())


def test_levels_after_the_learning_rate_ended_warn() -> None:
    model = Net()
    optimizer = wrap(model, torch.optim.SGD)
    train(model, optimizer, *data(), 1)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, *data(), 2)  # what a checkpoint helper may do
    with pytest.warns(UserWarning, match="end the level schedule before"):
        train(model, optimizer, *data(), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, *data(), 1)


# --- mixed precision ---


@pytest.mark.parametrize("fused", [False, True])
def test_a_gradient_scaler_changes_nothing_and_skips_the_dual(fused: bool) -> None:
    found = []
    for scaled in (True, False):
        torch.manual_seed(0)
        model = Net(torch.float32)
        x, y = data(dtype=torch.float32)
        optimizer = wrap(model, lambda ps, lr: torch.optim.Adam(ps, lr=lr, fused=fused))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for step in range(6):
            optimizer.zero_grad()
            value = loss(model, x, y)
            if scaled and step == 3:  # an overflow: this step must change nothing at all
                (scaler.scale(value) * torch.inf).backward()
                before = parameters(copy.deepcopy(model)), optimizer.readings().multipliers, optimizer.finished_steps
                scaler.step(optimizer)
                assert all(torch.equal(a, b) for a, b in zip(before[0], parameters(model), strict=True))
                assert torch.equal(before[1], optimizer.readings().multipliers)
                assert before[2] == optimizer.finished_steps
            elif scaled or step != 3:
                scaler.scale(value).backward()
                scaler.step(optimizer)
            scaler.update()
        found.append((model, optimizer.readings().multipliers))
    assert same(found[0][0], found[1][0], 1e-6)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6)


def test_autocast_leaves_multipliers_in_float32() -> None:
    model = Net(torch.float32)
    x, y = data(dtype=torch.float32)
    optimizer = wrap(model, formulation=type("Own", (ce._dual.AugmentedLagrangian,), {}))  # the path through Cooper
    with torch.autocast("cpu", dtype=torch.bfloat16):
        train(model, optimizer, x, y, 3)
    now = optimizer.readings()
    assert now.multipliers.dtype == torch.float32
    rounded = now.multipliers.bfloat16().float()
    assert not torch.equal(rounded, now.multipliers)


def test_bfloat16_terms_have_float32_multipliers() -> None:
    model = Net(torch.bfloat16)
    x, y = data(dtype=torch.bfloat16)
    optimizer = wrap(model, torch.optim.SGD, level=0.02)
    train(model, optimizer, x, y, 20)
    now = optimizer.readings()
    assert now.values.dtype == now.multipliers.dtype == torch.float32
    assert (now.multipliers > 0).all()


# --- gradients that are not finite ---


@pytest.mark.parametrize("policy", ["ignore", "skip", "raise"])
@pytest.mark.parametrize("closed", [False, True])
def test_gradients_that_are_not_finite(policy: Any, closed: bool) -> None:
    model = Net()
    optimizer = wrap(model, torch.optim.SGD, on_nonfinite=policy)
    x, y = data()
    train(model, optimizer, x, y, 2)
    before, step = copy.deepcopy(model), optimizer.finished_steps
    duals = optimizer.readings().multipliers

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model, x, y)
        value.backward()
        ce.relaxations(model)[0].term.weight.grad[0, 0] = torch.nan
        return value

    def step_once() -> None:
        optimizer.step(closure) if closed else (closure(), optimizer.step())

    if policy == "raise":
        with pytest.raises(ce.errors.NonFiniteError, match="nothing was updated"):
            step_once()
    else:
        step_once()
    if policy == "ignore":
        assert all(torch.isfinite(p).all() for p in parameters(model))
        assert torch.isfinite(optimizer.readings().multipliers).all()
        assert optimizer.finished_steps == step + 1
    else:
        assert same(model, before) and optimizer.finished_steps == step
        assert torch.equal(optimizer.readings().multipliers, duals)


# --- copies ---


def test_averaged_models_average_terms() -> None:
    model = Net()
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = wrap(model)
    for _ in range(3):
        train(model, optimizer, *data(), 1)
        average.update_parameters(model)
    assert len(ce.relaxations(average)) == 2
    for r in ce.relaxations(average):  # the complement is a linear space: averages stay in it
        projected = r.term.projection.complement_(r.term.weight.detach().clone())
        assert torch.allclose(projected, r.term.weight, atol=1e-14)


class Normalised(nn.Module):
    """A relaxed layer and batch statistics of what it puts out."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = points(1)
        self.norm = nn.BatchNorm1d(2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.layers[0](x).flatten(0, 1)).view(x.shape)


@pytest.mark.parametrize("ema", [False, True])
def test_an_average_is_finished_like_the_model(ema: bool) -> None:
    """Its statistics are gathered with its terms off, by `update_bn` as by `finalize`."""
    swa = torch.optim.swa_utils
    model = Normalised()
    average = swa.AveragedModel(model, multi_avg_fn=swa.get_ema_multi_avg_fn(0.9) if ema else None)
    optimizer = wrap(model, level=ce.schedules.linear(0.2, 0.0, 6))
    x, y = data()
    for _ in range(8):
        train(model, optimizer, x, y, 1)
        average.update_parameters(model)
    (relaxed,) = ce.relaxations(average)
    assert relaxed.term.weight.norm() > 1e-3 and not ce.relaxations(model)[0].term.weight.any()  # the past lingers
    other = copy.deepcopy(average)
    with ce.disabled(other):
        swa.update_bn([x[:16], x[16:]], other)
    with pytest.raises(ce.errors.ViolationError, match="above"):
        ce.finalize(average.module)
    ce.finalize(average.module, on_violation="drop", batches=[x[:16], x[16:]], forward=lambda m, b: m(b))
    ce.finalize(other.module, on_violation="drop")
    assert type(average.module.layers[0]) is nn.Linear
    for net in (average, other):
        net.eval()
    assert torch.allclose(average(x), other(x), atol=1e-10)
    mixed = x.roll(1, 1)
    assert torch.allclose(average(mixed), average(x).roll(1, 1), atol=1e-12)


def test_an_average_that_starts_in_the_tail_has_no_terms() -> None:
    model = Net()
    optimizer = wrap(model, level=ce.schedules.linear(0.2, 0.0, 3))
    average = None
    for _ in range(6):
        train(model, optimizer, *data(), 1)
        if optimizer.settled:
            average = average or torch.optim.swa_utils.AveragedModel(model)
            average.update_parameters(model)
    ce.finalize(average.module)


def test_model_and_optimizer_are_copied_together() -> None:
    model = Net()
    optimizer = wrap(model, level=ce.schedules.linear(0.1, 0.0, 8))
    x, y = data()
    train(model, optimizer, x, y, 4)
    other, replica = copy.deepcopy((model, optimizer))
    for _ in range(6):
        train(model, optimizer, x, y, 1)
    untouched = copy.deepcopy(other)
    assert same(other, untouched)
    train(other, replica, x, y, 6)
    assert same(model, other)
    assert torch.equal(optimizer.readings().multipliers, replica.readings().multipliers)


def test_pickling_is_refused_with_the_way_out() -> None:
    import pickle

    with pytest.raises(ce.errors.SerializationError, match="state_dict"):
        pickle.dumps(wrap(Net()))


def compilable(which: str) -> tuple[nn.Module, Tensor]:
    if which == "nn.Linear":
        return Net(), data()[0]
    if which == "vector neurons":
        model = nn.ModuleList(nn.Linear(4, 4, bias=False, dtype=torch.float64) for _ in range(2))
        net = nn.Sequential(*model)
        ce.relax(
            net, where=lambda n, m: isinstance(m, nn.Linear), adapter=ce.adapters.vector_neurons(axis=-1), init=0.1
        )
        return net, torch.randn(8, 3, 4, dtype=torch.float64)
    o3 = pytest.importorskip("e3nn.o3")
    torch.set_default_dtype(torch.float64)
    try:
        return ce.relax(o3.Linear("2x0e + 2x1o", "2x0e + 2x1o"), init=0.1), torch.randn(8, 8)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("which", ["nn.Linear", "vector neurons", "e3nn"])
def test_a_compiled_model_trains_the_same(which: str) -> None:
    model, x = compilable(which)
    other = copy.deepcopy(model)
    y = torch.randn_like(model(x))
    train(model, wrap(model), x, y, 3)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    train(compiled, wrap(other), x, y, 3)
    assert same(model, other, 1e-12)


@pytest.mark.parametrize("formulation", ["lagrangian", "augmented_lagrangian", "quadratic_penalty"])
def test_the_closed_form_compiles_as_one_graph(formulation: Any) -> None:
    one, two = (wrap(Net(), formulation=formulation).multipliers for _ in range(2))
    ascend = torch.compile(two.ascend, fullgraph=True, backend="aot_eager")
    coefficients = torch.compile(two.coefficients, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for violations in torch.randn(3, 2, dtype=torch.float64):
            one.ascend(violations)
            ascend(violations)
            assert torch.equal(one.values, two.values)
            assert torch.equal(one.coefficients(violations), coefficients(violations))


# --- attach ---


@pytest.mark.parametrize("closed", [False, True])
def test_attached_hooks_take_the_same_steps(closed: bool) -> None:
    model, other = twins()
    x, y = data()
    wrapped = wrap(model)
    plain = torch.optim.Adam(other.parameters(), lr=0.02)
    handle = ce.attach(plain, ce.constraints.weight(other, level=LEVEL))

    def closure() -> Tensor:
        plain.zero_grad()
        value = loss(other, x, y)
        value.backward()
        return value

    for _ in range(5):
        train(model, wrapped, x, y, 1)
        plain.step(closure) if closed else (closure(), plain.step())
    assert type(plain) is torch.optim.Adam
    assert same(model, other)
    assert torch.equal(wrapped.readings().multipliers, handle.readings().multipliers)


def test_attached_state_is_saved_with_the_optimizer() -> None:
    model, other = twins()
    x, y = data()
    plain = torch.optim.Adam(model.parameters(), lr=0.02)
    handle = ce.attach(plain, ce.constraints.weight(model, level=LEVEL))
    train(model, plain, x, y, 3)
    other.load_state_dict(model.state_dict())
    second = torch.optim.Adam(other.parameters(), lr=0.02)
    copied = ce.attach(second, ce.constraints.weight(other, level=LEVEL))
    second.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert copied.finished_steps == 3
    train(model, plain, x, y, 3)
    train(other, second, x, y, 3)
    assert same(model, other)
    assert torch.equal(handle.readings().multipliers, copied.readings().multipliers)


def test_an_attached_fused_optimizer_under_a_scaler_sees_unscaled_gradients() -> None:
    torch.manual_seed(0)
    model = Net(torch.float32)
    other = copy.deepcopy(model)
    x, y = data(dtype=torch.float32)
    plain = torch.optim.Adam(model.parameters(), lr=0.02, fused=True)
    ce.attach(plain, ce.constraints.weight(model, level=LEVEL))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(3):
        plain.zero_grad()
        scaler.scale(loss(model, x, y)).backward()
        scaler.step(plain)
        scaler.update()
    train(other, wrap(other), x, y, 3)
    assert same(model, other, 1e-6)


def test_attached_skipping_and_detaching() -> None:
    model, other = twins()
    x, y = data()
    plain = torch.optim.SGD(model.parameters(), lr=0.02)
    handle = ce.attach(plain, ce.constraints.weight(model, level=LEVEL), on_nonfinite="skip")
    loss(model, x, y).backward()
    next(iter(model.parameters())).grad.fill_(torch.nan)
    plain.step()
    assert same(model, other) and handle.finished_steps == 0
    handle.detach()
    train(model, plain, x, y, 2)
    train(other, torch.optim.SGD(other.parameters(), lr=0.02), x, y, 2)
    assert same(model, other)
    assert "constrained" not in plain.state_dict()


def test_attached_hooks_cannot_skip_a_closure() -> None:
    model, _ = twins()
    plain = torch.optim.SGD(model.parameters(), lr=0.02)
    ce.attach(plain, ce.constraints.weight(model, level=LEVEL), on_nonfinite="skip")
    with pytest.raises(ce.errors.ConstraintError, match=r"without one, or ce\.ConstrainedOptimizer"):
        plain.step(lambda: loss(model, *data()))


def test_a_monitor_watches_an_attached_optimizer() -> None:
    """What it records is what it records of the wrapped one; skipped steps leave no record."""
    found = []
    for attached in (False, True):
        torch.manual_seed(0)
        model = Net()
        x, y = data()
        base = torch.optim.Adam(model.parameters(), lr=0.02)
        wrap_it = ce.attach if attached else ce.ConstrainedOptimizer
        handle = wrap_it(base, ce.constraints.weight(model, level=LEVEL), on_nonfinite="skip")
        optimizer = base if attached else handle
        monitor = ce.monitor.Monitor(handle)
        train(model, optimizer, x, y, 3)
        train(model, optimizer, x * torch.nan, y, 2)
        train(model, optimizer, x, y, 2)
        found.append((monitor.history(), monitor.summary(), monitor.diagnose()))
    one, two = found
    assert list(one[0].steps) == list(two[0].steps) == [1, 2, 3, 4, 5]
    assert all((a == b).all() for a, b in zip(one[0][2:], two[0][2:], strict=True))
    assert one[1:] == two[1:]


def test_attaching_to_a_wrapped_optimizer_is_refused() -> None:
    model = Net()
    with pytest.raises(ce.errors.ConstraintError, match="already"):
        ce.attach(wrap(model), ce.constraints.weight(model, level=LEVEL))


# --- copies, nesting, and what cannot be ---


def sets(**options: Any) -> nn.Module:
    points = ce.representations.permutation(4, channels=2)
    adapter = ce.adapters.linear(points, points, axes=(-2, -1))
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    return ce.relax(model, where=lambda name, layer: isinstance(layer, nn.Linear), adapter=adapter, init=0.3, **options)


def test_a_copy_made_under_a_scheduler_steps_itself() -> None:
    model, x, y = Net(), *data()
    optimizer = wrap(model)
    torch.optim.lr_scheduler.StepLR(optimizer, 10)
    other, copied = copy.deepcopy((model, optimizer))
    before = copy.deepcopy(model)
    train(other, copied, x, y, 3)
    assert (optimizer.finished_steps, copied.finished_steps) == (0, 3)
    assert same(model, before) and not same(other, before)


@pytest.mark.parametrize("route", [ce.ConstrainedOptimizer, ce.attach])
@pytest.mark.parametrize("first", ["wrapped", "attached"])
def test_constraints_are_not_nested(first: str, route: Any) -> None:
    model = Net()
    record = ce.constraints.weight(model, level=LEVEL)
    base: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    if first == "wrapped":
        base = ce.ConstrainedOptimizer(base, record)
    else:
        ce.attach(base, record)
    with pytest.raises(ce.errors.ConstraintError, match="pass all records at once"):
        route(base, record)


def test_a_base_that_maximises_is_refused() -> None:
    model = Net()
    base = torch.optim.SGD(model.parameters(), lr=0.1, maximize=True)
    with pytest.raises(ce.errors.ConstraintError, match="maximize=True"):
        ce.ConstrainedOptimizer(base, ce.constraints.weight(model, level=LEVEL))


def test_an_equality_is_not_projected() -> None:
    model = Net()
    record = ce.constraints.weight(model, level=LEVEL, type="equality")
    with pytest.raises(ce.errors.ConstraintError, match="expected an inequality"):
        ce.ConstrainedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), record, enforce="projection")


def test_the_proximal_step_brings_a_negative_gate_to_zero() -> None:
    model = sets(complement=False, gate=True)
    for relaxation in ce.relaxations(model):
        nn.init.constant_(relaxation.term.gate, -0.2)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = ce.ConstrainedOptimizer(base, ce.constraints.gate(model), enforce="proximal")
    for _ in range(40):
        optimizer.zero_grad()
        optimizer.step()
    assert all(relaxation.term.gate == 0 for relaxation in ce.relaxations(model))


@pytest.mark.parametrize("silent", [torch.zeros(16, 4, 2), torch.zeros(0, 4, 2)], ids=["zero", "empty"])
def test_a_batch_without_output_moves_no_relative_term(silent: Tensor) -> None:
    points = ce.representations.permutation(4, channels=2)
    adapter = ce.adapters.linear(points, points, axes=(-2, -1))
    model = ce.relax(nn.Linear(2, 2, bias=False), where=lambda name, layer: True, adapter=adapter, init=0.1)
    optimizer = ce.ConstrainedOptimizer(torch.optim.Adam(model.parameters()), ce.constraints.relative(model, level=0.5))
    x = torch.randn(16, 4, 2)
    for features in (x, silent, x):
        optimizer.zero_grad()
        (model(features) - features.roll(1, 1)).square().sum().backward()
        optimizer.step()
    assert (optimizer.readings().multipliers < 1).all() and (optimizer.readings().values < 2).all()


CLOSED: dict[str, Any] = {
    "simultaneous": (None, {"order": "simultaneous"}),
    "linear slack": ("linear", {}),
    "quadratic slack": ("quadratic", {}),
}


@pytest.mark.parametrize("case", CLOSED)
def test_a_closure_returns_the_number_whose_gradient_it_writes(case: str) -> None:
    """Finite differences of the Lagrangian along one direction, in one step: what a line search relies on."""
    cost, options = CLOSED[case]
    model, x, y = Net(), *data()
    record = ce.constraints.weight(model, level=0.01)
    if cost is not None:
        record = ce.constraints.resilient(record, price=0.05, cost=cost)
    found = []

    class Probe(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            parameters = [p for group in self.param_groups for p in group["params"]]
            first = closure()
            directions = [p.grad.clone() for p in parameters]
            slope = sum(d.square().sum() for d in directions)
            values = []
            for h in (1e-6, -2e-6):
                with torch.no_grad():
                    torch._foreach_add_(parameters, directions, alpha=h)
                values.append(closure().detach())
            with torch.no_grad():
                torch._foreach_add_(parameters, directions, alpha=1e-6)
            found.append((float(slope), float(values[0] - values[1]) / 2e-6))
            return first

    base = Probe(model.parameters(), lr=0.1)
    optimizer = ce.ConstrainedOptimizer(base, record, **options)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(model, x, y)
        value.backward()
        return value

    for _ in range(3):
        optimizer.step(closure)
    for slope, difference in found:
        assert difference == pytest.approx(slope, rel=1e-4)


def test_a_step_under_autocast_projects_in_full_precision() -> None:
    model = sets()
    optimizer = ce.ConstrainedOptimizer(
        torch.optim.Adam(model.parameters(), lr=0.1), ce.constraints.weight(model, level=1)
    )
    x = torch.randn(16, 4, 2)
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (model(x) - x.roll(1, 1)).square().mean().backward()
            optimizer.step()
    for relaxation in ce.relaxations(model):
        weight = relaxation.term.weight.detach()
        assert relaxation.term.projection.project(weight[None]).norm() < 1e-6 * weight.norm()


def test_hooks_of_the_state_dict_run_on_the_wrapper() -> None:
    model = Net()
    optimizer, seen = wrap(model), []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append(("save", o)))
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "note": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, state: {k: v for k, v in state.items() if k != "note"})
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(("loaded", o)))
    state = optimizer.state_dict()
    assert state["note"] == 1 and "constrained" in state
    optimizer.load_state_dict(state)
    assert seen == [("save", optimizer), ("loaded", optimizer)]
