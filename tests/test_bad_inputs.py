"""What a user gets wrong: every error names what was found, what was expected and the remedy, and loses nothing."""

import copy
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import constrained_equiv as ce
from constrained_equiv import errors
from constrained_equiv.representations import permutation

POINTS = permutation(4, channels=3)
POINTWISE = ce.adapters.linear(POINTS, POINTS, axes=(-2, -1))


def is_linear(name, layer):
    return isinstance(layer, nn.Linear)


@dataclass
class Scene:
    """A plain model, a relaxed one and its optimizer in the middle of training, with all that may not be lost."""

    plain: nn.Module = field(default_factory=lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)))
    optimizer: ce.ConstrainedOptimizer = field(init=False)

    def __post_init__(self) -> None:
        self.relaxed = copy.deepcopy(self.plain)
        ce.relax(self.relaxed, where=is_linear, adapter=POINTWISE, init=0.3)
        self.optimizer = self.optimize(self.relaxed)
        self.x = torch.randn(2, 4, 3)
        for _ in range(2):
            self.step()

    def optimize(self, model: nn.Module, **options: Any) -> ce.ConstrainedOptimizer:
        base = torch.optim.Adam(ce.parameter_groups(model, lr=1e-2))
        return ce.ConstrainedOptimizer(base, ce.constraints.weight(model, level=0.1), **options)

    def step(self, factor: float = 1.0) -> None:
        self.optimizer.zero_grad()
        (factor * self.relaxed(self.x).square().mean()).backward()
        self.optimizer.step()

    def everything(self) -> dict[str, Any]:
        """All state, flat, as copies."""
        readings = self.optimizer.readings()
        found: dict[str, Any] = {"step": self.optimizer.finished_steps, "multipliers": readings.multipliers.clone()}
        for part, model in (("plain", self.plain), ("relaxed", self.relaxed)):
            found |= {f"{part}.{name}.class": type(m) for name, m in model.named_modules()}
            found |= {f"{part}.{name}.mode": m.training for name, m in model.named_modules()}
            found |= {f"{part}.{key}": copy.deepcopy(value) for key, value in model.state_dict().items()}
        flat, _ = torch.utils._pytree.tree_flatten(copy.deepcopy(self.optimizer.state_dict()))
        return found | {f"optimizer.{i}": leaf for i, leaf in enumerate(flat)}


def assert_unchanged(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for key, value in before.items():
        same = torch.equal(value, after[key]) if isinstance(value, torch.Tensor) else value == after[key]
        assert same, f"{key} changed from {value} to {after[key]}"


class Named(nn.Linear):
    non_equivariant = None


def raise_at_the_second_layer() -> ce.adapters.Adapter:
    calls: list[nn.Module] = []

    def site(layer):
        calls.append(layer)
        if len(calls) == 2:
            raise errors.RelaxationError("the second layer: expected another; write where=...")
        return POINTWISE.site(layer)

    return ce.adapters.Adapter("touchy", lambda layer: True, site, POINTWISE.methods)


def fail_at_the_second_layer(filled: list) -> Callable[[torch.Tensor], None]:
    def fill(weight):
        filled.append(weight)
        if len(filled) == 2:
            raise RuntimeError("no value found: expected one; use init=0.0")

    return fill


def wrapped(model: nn.Module) -> nn.Module:
    """What DistributedDataParallel looks like, without a process group."""
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = model
    return wrapper


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(3))


def patched(model: nn.Sequential) -> nn.Module:
    other = copy.deepcopy(model)
    first = other[0]
    first.forward = lambda x: nn.functional.linear(x, first.weight)
    return other


def pointwise(model, **options):
    return ce.relax(model, where=is_linear, adapter=POINTWISE, **options)


def mismatched(scene: Scene) -> None:
    other = pointwise(nn.Sequential(nn.Linear(3, 3)))
    scene.optimizer.load_state_dict(scene.optimize(other).state_dict())


def other_groups(scene: Scene) -> None:
    base = torch.optim.Adam(scene.relaxed.parameters(), lr=1e-2)
    saved = ce.ConstrainedOptimizer(base, ce.constraints.weight(scene.relaxed, level=0.1)).state_dict()
    scene.optimizer.load_state_dict(saved)


def built_before_relax(scene: Scene) -> None:
    model = copy.deepcopy(scene.plain)
    base = torch.optim.Adam(model.parameters(), lr=1e-2)
    pointwise(model)
    ce.ConstrainedOptimizer(base, ce.constraints.weight(model, level=0.1))


def constrained(scene: Scene, *records: Callable[[nn.Module], Any], **options: Any) -> None:
    made = [record(scene.relaxed) for record in records or [lambda m: ce.constraints.weight(m, level=0.1)]]
    ce.ConstrainedOptimizer(torch.optim.SGD(scene.relaxed.parameters(), lr=0.1), *made, **options)


def weight(**options: Any) -> Callable[[nn.Module], Any]:
    return lambda model: ce.constraints.weight(model, **{"level": 0.1} | options)


R, C, S = errors.RelaxationError, errors.ConstraintError, errors.ScheduleError

# name: (what the user does, class of the error, pieces of its message: found, expected, remedy)
BAD: dict[str, tuple[Callable[[Scene], Any], type[Exception], tuple[str, ...]]] = {
    # relax
    "nothing matched": (lambda s: ce.relax(s.plain), R, ("no layer was matched", "Linear", "expected", "adapter=")),
    "where matched nothing": (
        lambda s: ce.relax(s.plain, where=lambda n, m: n == "3"),
        R,
        ("no layer was matched", "Linear", "expected", "where="),
    ),
    "adapter without where": (
        lambda s: ce.relax(s.plain, adapter=POINTWISE),
        R,
        ("adapter= without where=", "expected where=lambda"),
    ),
    "a layer without adapter": (
        lambda s: ce.relax(s.plain, where=is_linear),
        R,
        ("'0' of class Linear", "no built-in adapter", "adapter=ce.adapters.linear("),
    ),
    "relaxed twice": (lambda s: pointwise(s.relaxed), R, ("'0' is relaxed already", "ce.finalize(model)", "where=")),
    "the second layer cannot be relaxed": (
        lambda s: ce.relax(s.plain, where=is_linear, adapter=raise_at_the_second_layer()),
        R,
        ("the second layer",),
    ),
    "init fails at the second layer": (
        lambda s: pointwise(s.plain, init=fail_at_the_second_layer([])),
        RuntimeError,
        ("no value found",),
    ),
    "init is no number": (
        lambda s: pointwise(s.plain, init="kaiming"),
        R,
        ("init='kaiming'", "expected a standard deviation", "torch.nn.init"),
    ),
    "init is negative": (
        lambda s: pointwise(s.plain, init=-1.0),
        R,
        ("init=-1.0", "expected a standard deviation >= 0"),
    ),
    "the name is taken": (
        lambda s: ce.relax(Named(3, 3), where=is_linear, adapter=POINTWISE),
        R,
        ("'non_equivariant' of its own", "expected none", "rename it"),
    ),
    "a container": (
        lambda s: ce.relax(s.plain, where=lambda n, m: n == "", adapter=POINTWISE),
        R,
        ("layer '' is a Sequential", "expected a layer", "relax its layers, or wrap it in a module of its own"),
    ),
    "a list of layers": (
        lambda s: ce.relax(nn.ModuleList([nn.Linear(3, 3)]), where=lambda n, m: n == "", adapter=POINTWISE),
        R,
        ("is a ModuleList", "expected a layer", "relax its layers"),
    ),
    "a dict of layers": (
        lambda s: ce.relax(nn.ModuleDict({"a": nn.Linear(3, 3)}), where=lambda n, m: n == "", adapter=POINTWISE),
        R,
        ("is a ModuleDict", "expected a layer", "relax its layers"),
    ),
    "forward set on the layer": (
        lambda s: pointwise(patched(s.plain)),
        R,
        ("layer '0' has a forward", "expected the forward of its class", "ce.relax(model) first"),
    ),
    "lazily built": (lambda s: pointwise(lazy()), R, ("'0' is lazily built", "run one batch", "ce.relax(model)")),
    "TorchScript": (
        lambda s: ce.relax(torch.jit.script(nn.Linear(3, 3)), where=lambda n, m: True, adapter=POINTWISE),
        R,
        ("TorchScript", "expected a Python module", "before scripting"),
    ),
    "wrapped before": (
        lambda s: ce.relax(wrapped(s.plain)),
        R,
        ("DistributedDataParallel", "expected the bare module", "ce.relax(model) first"),
    ),
    "parameter groups of a plain model": (
        lambda s: ce.parameter_groups(s.plain, lr=0.1),
        R,
        ("no relaxed layer", "ce.relax(model)"),
    ),
    # representations and shapes
    "an unknown representation": (
        lambda s: ce.adapters.linear("2x1y", "1x1o"),
        errors.RepresentationError,
        ("'2x1y'", "expected", "'4x0e + 2x1o'"),
    ),
    "features of another shape": (
        lambda s: s.relaxed(torch.zeros(2, 5, 3)),
        errors.RepresentationError,
        ("(2, 5, 3)", "15 entries", "expected 12", "axes="),
    ),
    "a map of another shape": (
        lambda s: ce.intertwiners.intertwiners(POINTS, POINTS).project(torch.zeros(3, 3)),
        errors.RepresentationError,
        ("(3, 3)", "expected", "12"),
    ),
    "outputs of another structure": (
        lambda s: ce.equivariance_error(
            s.plain, s.x, symmetry=ce.Symmetry(POINTS.group, ce.actions.permute(-2), (None,))
        ),
        errors.RepresentationError,
        ("outputs", "expected 1 parts", "Tensor"),
    ),
    # schedules
    "negative steps": (lambda s: ce.schedules.linear(1.0, 0.0, -5), S, ("steps=-5", "expected an integer >= 0")),
    "steps that are no integer": (
        lambda s: ce.schedules.cosine(1.0, 0.0, 2.5),
        S,
        ("steps=2.5", "expected an integer"),
    ),
    "a level that is not finite": (
        lambda s: ce.schedules.constant(float("inf")),
        S,
        ("inf", "expected a finite number"),
    ),
    "one boundary too many": (
        lambda s: ce.schedules.join([ce.schedules.constant(1.0)], [5]),
        S,
        ("1 schedules and 1 boundaries", "expected one boundary fewer"),
    ),
    "a level that is no schedule": (
        lambda s: ce.constraints.weight(s.relaxed, level="cosine"),
        S,
        ("level='cosine'", "expected a number or a function", "ce.schedules.cosine("),
    ),
    "a schedule that returns no number": (
        lambda s: constrained(s, weight(level=lambda step: "1.0")),
        S,
        ("'1.0'", "at step 0", "expected a float"),
    ),
    # constraints
    "constraint of a plain model": (
        lambda s: ce.constraints.weight(s.plain, level=0.1),
        C,
        ("no relaxed layer", "ce.relax(model)"),
    ),
    "constraint that chooses nothing": (
        lambda s: ce.constraints.weight(s.relaxed, level=0.1, where=lambda name: name == "1"),
        C,
        ("none of the relaxed layers ['0', '2']", "where="),
    ),
    "a negative level": (
        lambda s: ce.constraints.weight(s.relaxed, level=-0.5),
        C,
        ("-0.5", "expected a bound >= 0"),
    ),
    "an unknown type": (
        lambda s: ce.constraints.weight(s.relaxed, level=0.1, type="less"),
        C,
        ("type='less'", "expected 'inequality' or 'equality'"),
    ),
    "an unknown part": (
        lambda s: ce.constraints.weight(s.relaxed, level=0.1, part="half"),
        C,
        ("part='half'", "expected 'whole' or 'non_equivariant'"),
    ),
    **{
        f"an unknown per= of {measure}": (
            lambda s, measure=measure: getattr(ce.constraints, measure)(s.relaxed, level=0.1, per="network"),
            C,
            ("per='network'", "expected one of ('layer', "),
        )
        for measure in ("weight", "relative", "lie")
    },
    "a subgroup of another group": (
        lambda s: ce.constraints.subgroup(s.relaxed, ce.groups.SO3(), level=0.1),
        errors.RepresentationError,
        ("SO(3)", "size 3", "expected a subgroup of S_4", "matrix_group("),
    ),
    "a proximal step of a shared constraint": (
        lambda s: constrained(s, weight(per="model"), enforce="proximal"),
        C,
        ("enforce='proximal' with measure 'weight'", "expected a norm", "not shared by layers"),
    ),
    "blocks constrained twice": (
        lambda s: constrained(s, weight(per="block"), weight(per="block")),
        C,
        ("'0[points -> points] (weight)' is constrained twice", "where="),
    ),
    "a gate that is not there": (
        lambda s: ce.constraints.gate(s.relaxed),
        C,
        ("no gate", "ce.relax(model, gate=True)"),
    ),
    # the optimizer
    "an optimizer built before relax": (
        built_before_relax,
        C,
        ("does not hold the terms of ['0', '2']", "build it after ce.relax(model)", "parameter_groups"),
    ),
    "a layer constrained twice": (
        lambda s: constrained(s, weight(), weight()),
        C,
        ("'0 (weight)' is constrained twice", "expected each layer once per measure", "where="),
    ),
    "no constraint": (lambda s: ce.ConstrainedOptimizer(s.optimizer.base), C, ("no constraint", "expected", "weight(")),
    "no optimizer": (
        lambda s: ce.ConstrainedOptimizer("adam", ce.constraints.weight(s.relaxed, level=0.1)),
        C,
        ("'adam'", "expected a torch optimizer", "torch.optim.AdamW"),
    ),
    "no record": (lambda s: constrained(s, lambda m: 0.1), C, ("0.1", "expected a record of ce.constraints")),
    "an unknown formulation": (
        lambda s: constrained(s, formulation="lagrange"),
        C,
        ("formulation='lagrange'", "expected", "augmented_lagrangian"),
    ),
    "an unknown dual": (lambda s: constrained(s, dual="adam"), C, ("dual='adam'", "expected 'sgd', 'nupi'")),
    "a dual that does not ascend": (
        lambda s: constrained(s, dual=lambda p: torch.optim.SGD(p, lr=0.1)),
        C,
        ("SGD", "expected a torch optimizer built with maximize=True"),
    ),
    "a penalty of zero": (lambda s: constrained(s, penalty=0.0), C, ("penalty=0.0", "expected a finite number > 0")),
    "a penalty in words": (lambda s: constrained(s, penalty="1"), C, ("penalty='1'", "expected a finite number > 0")),
    "an infinite growth": (lambda s: constrained(s, penalty_growth=float("inf")), C, ("penalty_growth=inf", "finite")),
    "a dual rate of zero": (lambda s: constrained(s, dual_lr=0.0), C, ("dual_lr=0.0", "expected a finite number > 0")),
    **{
        f"an unknown {name}": (
            lambda s, name=name: constrained(s, **{name: "sometimes"}),
            C,
            (f"{name}='sometimes'", "expected one of"),
        )
        for name in ("order", "enforce", "at_zero", "on_nonfinite")
    },
    "a checkpoint of other constraints": (
        mismatched,
        errors.CheckpointError,
        ("['0 (weight)']", "expected ['0 (weight)', '2 (weight)']", "relax and constrain as in the saved run"),
    ),
    "a checkpoint of other parameter groups": (other_groups, ValueError, ("parameter group",)),
    "a checkpoint of another relaxation": (
        lambda s: s.relaxed.load_state_dict(pointwise(copy.deepcopy(s.plain), gate=True).state_dict()),
        errors.CheckpointError,
        ("0.non_equivariant", "'gated': True", "expected", "ce.relax with the same"),
    ),
    # the end
    "finalize above tolerance": (
        lambda s: ce.finalize(s.relaxed, optimizer=s.optimizer),
        errors.ViolationError,
        ("2 of 2 terms", "> 0.101", "nothing was removed", "on_violation='drop'"),
    ),
    "finalize with an unknown choice": (
        lambda s: ce.finalize(s.relaxed, on_violation="ignore"),
        R,
        ("'ignore'", "expected 'raise', 'drop' or 'keep'"),
    ),
    "finalize with a constant of a module that is not there": (
        lambda s: ce.finalize(s.relaxed, lipschitz={"head": 1.0}),
        R,
        ("['head']", "expected names of its modules"),
    ),
    "relax what attention reads without calling": (
        lambda s: ce.relax(
            nn.MultiheadAttention(4, 1),
            where=lambda name, m: name == "out_proj",
            adapter=ce.adapters.linear("4x0e", "4x0e"),
        ),
        R,
        ("'out_proj'", "never calls it", "where="),
    ),
    "relax what a fast path goes around": (
        lambda s: ce.relax(
            nn.TransformerEncoderLayer(4, 1, 4),
            where=lambda name, m: name == "linear1",
            adapter=ce.adapters.linear("4x0e", "1x1o+1x0e"),
        ),
        R,
        ("'linear1'", "set_fastpath_enabled(False)"),
    ),
    "finalize a plain model": (lambda s: ce.finalize(s.plain), R, ("no relaxed layer", "expected", "ce.relax(model)")),
    "assert on a broken model": (
        lambda s: ce.assert_equivariant(
            s.relaxed, s.x, symmetry=ce.Symmetry(POINTS.group, ce.actions.permute(-2), ce.actions.permute(-2))
        ),
        errors.EquivarianceError,
        ("relative equivariance error", "S_4", "at most"),
    ),
}


@pytest.mark.parametrize("action, error, pieces", BAD.values(), ids=BAD)
def test_the_message_says_what_to_do_and_nothing_is_lost(action, error, pieces):
    scene = Scene()
    before = scene.everything()
    with pytest.raises(error) as caught:
        action(scene)
    message = str(caught.value)
    for piece in pieces:
        assert piece in message, f"{piece!r} is not in {message!r}"
    assert_unchanged(before, scene.everything())
    scene.step()  # training goes on
    assert scene.optimizer.finished_steps == before["step"] + 1


@pytest.mark.parametrize("closure", [False, True])
@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_loss_that_is_not_a_number_changes_nothing(policy, closure):
    scene = Scene()
    scene.optimizer = scene.optimize(scene.relaxed, on_nonfinite=policy)
    scene.step()
    before = scene.everything()

    def loss() -> torch.Tensor:
        scene.optimizer.zero_grad()
        value = float("nan") * scene.relaxed(scene.x).sum()
        value.backward()
        return value

    def step() -> None:
        if closure:
            scene.optimizer.step(loss)
        else:
            loss()
            scene.optimizer.step()

    if policy == "raise":
        with pytest.raises(errors.NonFiniteError, match=r"not finite.*nothing was updated.*on_nonfinite='skip'"):
            step()
    else:
        step()
    assert_unchanged(before, scene.everything())
    scene.step()
    assert scene.optimizer.finished_steps == before["step"] + 1


# --- unknown keywords -------------------------------------------------------------------------------------------------


def public_callables() -> dict[str, Callable[..., Any]]:
    """Every public function and class of the front door and its modules, with the public methods of the classes."""
    modules = [ce, *(value for name in ce.__all__ if isinstance(value := getattr(ce, name), types.ModuleType))]
    found: dict[str, Callable[..., Any]] = {}
    for module in modules:
        for name in getattr(module, "__all__", vars(module)):
            value = getattr(module, name)
            ours = getattr(value, "__module__", "").startswith("constrained_equiv")
            if name.startswith("_") or not ours or not callable(value) or getattr(value, "_is_protocol", False):
                continue
            if inspect.isclass(value) and issubclass(value, BaseException):
                continue
            found[f"{module.__name__}.{name}"] = value
            if inspect.isclass(value):
                methods = inspect.getmembers_static(value, lambda m: isinstance(m, types.FunctionType))
                found |= {
                    f"{module.__name__}.{name}.{key}": method
                    for key, method in methods
                    if not key.startswith("_") and method.__module__.startswith("constrained_equiv")
                }
    return found


@pytest.mark.parametrize("function", public_callables().values(), ids=public_callables())
def test_an_unknown_keyword_is_refused(function):
    """A misspelt keyword must not vanish: it raises before anything is looked at."""
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'misspelt'"):
        function(misspelt=1)


def test_the_front_door_has_functions():
    assert {"constrained_equiv.relax", "constrained_equiv.constraints.weight"} <= public_callables().keys()
