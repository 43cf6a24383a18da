"""The arms of the comparison: one table of settings, and one function that carries a setting out.

Enter a plain model and its task; `prepare` relaxes it in place and leaves the optimizer of the run. The one law: what
an arm does not name (base optimizer, rate, batches, initial weights, length) is the same for all.

An arm is called by its name in `METHODS`. Any arm may be followed by a factor on the learning rate and by `, no turns`,
which leaves out the random group elements of the batches: `primal-dual x2, no turns`.
"""

import copy
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

import constrained_equiv as ce
from examples import optimizers
from examples.task import Task, Where

LEVEL_ENDS = 0.8  # fraction of training after which levels and scales are zero; the tail trains the equivariant model

_NAME = re.compile(r"^(?P<arm>.*?)( x(?P<rate>[0-9]+([.][0-9]+)?))?(?P<still>, no turns)?$")

Recipe = Literal["strict", "level", "triangle", "gate", "ridge", "free"]


@dataclass(frozen=True)
class Method:
    """How a model is trained; the defaults are those of ours.

    Attributes:
        name: for tables and files.
        recipe: `strict`, no terms; `level`, the terms' norms under a falling level (ours); the published `triangle`,
            `gate` and `ridge`; `free`, terms that nothing constrains.
        ends: what becomes of the terms: `drop`; `fold`, their equivariant part stays; `keep`, what is above the final
            level stays and the model is tested as it is. Validation sees what the test will see.
        complement: whether terms are kept orthogonal to the equivariant maps (`level` only).
        start: first level, or for `level` with `start=0` the only one.
        shape: of the level's way to zero.
        until: fraction of the steps at which level or scale has reached zero.
        measure: what the level bounds.
        penalties: of the triangle, beside the term's size: the Lie derivative or the distance from equivariance.
        price: of exceeding the level, in units of loss per unit of the measure; None where that is forbidden.
        init: standard deviation of the terms' entries at the start, or `linear`, as for torch's linear layers.
        layers: which of the task's layers have a term: all, those of the published methods, or half of them.
        options: of `ce.ConstrainedOptimizer`.
        optimizer: what is wrapped.
        rate: factor on the learning rate.
        term_rate: a further factor on that of the terms.
        decay: decoupled weight decay of the model's own parameters, with `adam`.
        anneal: when the rate falls to 1 % along a cosine: all the time, or only after `until`.
        noise: whether the terms see random numbers in place of their gradients: asymmetry that learns nothing.
        restart: whether the base optimizer forgets its moments when the level reaches zero.
        widen: whether the strict model is made as large as the relaxed one is in training.
        augment: whether batches are turned by random elements of the group.
    """

    name: str
    recipe: Recipe = "level"
    ends: Literal["drop", "fold", "keep"] = "drop"
    complement: bool = True
    start: float = 0.5
    shape: Literal["cosine", "linear", "exponential"] = "cosine"
    until: float = LEVEL_ENDS
    measure: Literal["weight", "relative", "lie"] = "weight"
    penalties: Literal["lie", "distance"] = "lie"
    price: float | None = None
    init: float | Literal["linear"] = 0.0
    layers: Literal["all", "published", "first half", "second half"] = "all"
    options: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Literal["adam", "block adam", "muon"] = "adam"
    rate: float = 1.0
    term_rate: float = 1.0
    decay: float = 0.0
    anneal: Literal["always", "tail"] = "always"
    noise: bool = False
    restart: bool = False
    widen: bool = False
    augment: bool = True

    @property
    def family(self) -> str:
        """The name without the factor on the learning rate, over which a family is tuned."""
        return _NAME.sub(lambda parts: parts["arm"] + (parts["still"] or ""), self.name)

    @property
    def base(self) -> str:
        """The name in `METHODS`."""
        return _NAME.sub(lambda parts: parts["arm"], self.name)


METHODS = {
    method.name: method
    for method in (
        # strict, and what it may be given before relaxation gets the credit
        Method("strict", "strict"),
        Method("strict, block adam", "strict", optimizer="block adam"),
        Method("strict, muon", "strict", optimizer="muon"),
        Method("strict, wide", "strict", widen=True),
        Method("strict, tail annealing", "strict", anneal="tail"),
        *(Method(f"strict, decay {decay:g}", "strict", decay=decay) for decay in (0.1, 1.0)),
        # the same network without the constraint: never equivariant again
        Method("unconstrained", "free", ends="keep"),
        # published
        Method("triangle", "triangle", init=1e-2),
        Method("triangle, distance", "triangle", init=1e-2, penalties="distance"),
        Method("triangle, published layers", "triangle", init=1e-2, layers="published"),
        Method("gate", "gate", init="linear"),
        Method("gate, published layers", "gate", init="linear", layers="published"),
        Method("gate, augmented", "gate", init="linear", options={"formulation": "augmented_lagrangian"}),
        Method("ridge", "ridge"),
        Method("ridge, kept", "ridge", ends="keep"),
        # the control for everything below: a second equivariant path and no broken symmetry
        Method("equivariant path", complement=False, start=0.0, ends="fold"),
        # ours
        Method("primal-dual"),
        Method("projection", options={"enforce": "projection"}),
        # the control for that: terms of the same size, moved about at random
        Method("projection, noise", options={"enforce": "projection"}, noise=True),
        Method("proximal", options={"enforce": "proximal"}),
        Method("folded", complement=False, ends="fold"),
        Method("folded, projection", complement=False, ends="fold", options={"enforce": "projection"}),
        Method("free, dropped", complement=False),
        # ours for data that may break the symmetry: what earns its price stays
        *(
            Method(f"resilient{'' if price == 0.01 else f', price {price:g}'}", price=price, ends="keep")
            for price in (0.01, 0.001, 0.1, 1.0)
        ),
        # ablations of ours
        *(Method(f"primal-dual, {shape}", shape=shape) for shape in ("linear", "exponential")),
        *(Method(f"primal-dual, start {start:g}", start=start) for start in (0.1, 0.25, 1.0, 2.0)),
        *(Method(f"primal-dual, until {until:g}", until=until) for until in (0.2, 0.4, 0.6)),
        *(Method(f"primal-dual, init {init:g}", init=init) for init in (1e-2, 5e-2)),
        *(Method(f"primal-dual, term rate {rate:g}", term_rate=rate) for rate in (0.3, 0.1, 0.03)),
        *(Method(f"primal-dual, {measure}", measure=measure) for measure in ("relative", "lie")),
        *(Method(f"primal-dual, {layers}", layers=layers) for layers in ("first half", "second half")),
        Method("primal-dual, published layers", layers="published"),
        Method("primal-dual, decay 0.1", decay=0.1),
        Method("primal-dual, restart", restart=True),
        Method("primal-dual, tail annealing", anneal="tail"),
        Method("primal-dual, block adam", optimizer="block adam"),
        Method("primal-dual, muon", optimizer="muon"),
    )
}


def find(name: str) -> Method:
    """Return the arm of a name, with a factor on the rate and `, no turns` where they are added.

    Raises:
        ValueError: if there is no such arm.
    """
    parts = _NAME.match(name)
    if parts is None or parts["arm"] not in METHODS or (parts["rate"] and not float(parts["rate"])):
        raise ValueError(
            f"found arm {name!r}: expected one of {', '.join(METHODS)}; after it, where wanted, a factor on the "
            "learning rate above 0 such as ' x2', and ', no turns'"
        )
    return replace(METHODS[parts["arm"]], name=name, rate=float(parts["rate"] or 1), augment=parts["still"] is None)


def build(method: Method, task: Task) -> nn.Module:
    """Make the plain model of an arm; with `widen` as large as the task's relaxed model is in training."""
    if not method.widen:
        return task.build(1.0)
    relaxed = ce.relax(task.build(1.0), where=task.where, adapter=task.adapter)
    wanted, width = _count(relaxed), 1.0
    for _ in range(3):
        width *= math.sqrt(wanted / _count(task.build(width)))
    return task.build(width)


def prepare(method: Method, model: nn.Module, task: Task, *, steps: int, lr: float) -> torch.optim.Optimizer:
    """Relax a model as an arm asks and return its optimizer.

    Args:
        method: the arm.
        model: plain, relaxed in place.
        task: which layers, and how.
        steps: optimizer steps of the whole training.
        lr: rate before the arm's own factor.
    """
    end = round(method.until * steps)
    rate = method.rate * lr
    preset = _relax(method, model, task, end, rate)
    if ce.relaxations(model):
        groups = ce.parameter_groups(model, lr=rate, term_lr=method.term_rate * rate)
    else:
        groups = [{"params": list(model.parameters()), "lr": rate}]
    base: torch.optim.Optimizer
    if method.optimizer == "block adam":
        base = optimizers.block_adam(model, groups)
    elif method.optimizer == "muon":
        base = optimizers.muon(model, groups)
    else:
        base = torch.optim.AdamW(groups, weight_decay=method.decay)  # Adam where that is 0, as it is for terms
    if preset is None:
        return base
    optimizer = preset.optimizer(base)
    if method.noise:
        terms = [relaxation.term.weight for relaxation in ce.relaxations(model)]

        def scatter(*_: Any) -> None:
            for weight in terms:
                if weight.grad is not None:
                    weight.grad.normal_()

        optimizer.register_step_pre_hook(scatter)
    if method.restart:

        def forget(*_: Any) -> None:
            if optimizer.finished_steps == end:
                optimizer.state.clear()

        optimizer.register_step_post_hook(forget)
    return optimizer


def annealing(method: Method, steps: int) -> Callable[[int], float]:
    """The factor on the learning rate at a step: from 1 to 1 % along a cosine."""
    begin = round(method.until * steps) if method.anneal == "tail" else 0

    def factor(step: int) -> float:
        fraction = min(max(step - begin, 0) / max(steps - begin, 1), 1.0)
        return 0.01 + 0.99 * (1 + math.cos(math.pi * fraction)) / 2

    return factor


def _relax(method: Method, model: nn.Module, task: Task, end: int, lr: float) -> ce.presets.Preset | None:
    """Attach the terms of an arm and state its constraints; None where there are none."""
    init = _like_linear if method.init == "linear" else method.init
    chosen: dict[str, Any] = {"where": _where(method, model, task), "adapter": task.adapter}
    match method.recipe:
        case "strict":
            return None
        case "free":
            ce.relax(model, complement=False, init=init, **chosen)
            return None
        case "ridge":
            return ce.presets.ridge(model, **chosen)
        case "gate":
            preset = ce.presets.gate(model, init=init, **chosen)
            # in the published code Adam ascends, about as fast as it descends; the text, and the preset, ascend plainly
            published = {**preset.options, "dual": lambda m: torch.optim.Adam(m, lr=lr, maximize=True)}
            return replace(preset, options=dict(method.options) or published)
        case "triangle":
            ce.relax(model, complement=False, init=init, **chosen)
            return ce.presets.Preset(_triangle(method, model, end))
        case "level":
            ce.relax(model, complement=method.complement, init=init, **chosen)
            return ce.presets.Preset((_level(method, model, end),), dict(method.options))


def _level(method: Method, model: nn.Module, end: int) -> ce.constraints.Constraint:
    """The terms' size, or what is left of it after folding, under a falling level."""
    level = getattr(ce.schedules, method.shape)(method.start, 0.0, end)
    if method.measure == "lie":
        record = ce.constraints.lie(model, level=level)
    else:
        part: Literal["whole", "non_equivariant"] = "non_equivariant" if method.ends == "fold" else "whole"
        record = getattr(ce.constraints, method.measure)(model, level=level, part=part)
    return record if method.price is None else ce.constraints.resilient(record, price=method.price)


def _triangle(method: Method, model: nn.Module, end: int) -> tuple[Any, ...]:
    """The published schedule and its two penalties, the activation's where terms are dense."""
    dense = all(relaxation.term.weight.ndim == 2 for relaxation in ce.relaxations(model))
    size = ce.constraints.activation if dense else ce.constraints.weight
    if method.penalties == "lie":
        broken = ce.constraints.lie(model, level=0.0)
    else:
        broken = ce.constraints.weight(model, level=0.0, part="non_equivariant")
    penalties = (ce.constraints.penalty(record, coefficient=0.01) for record in (broken, size(model, level=0.0)))
    return ce.constraints.scale(model, schedule=ce.schedules.triangle(end)), *penalties


def _where(method: Method, model: nn.Module, task: Task) -> Where | None:
    """Which layers have a term; None for all that have an adapter."""
    if method.layers == "all":
        return task.where
    if method.layers == "published":
        if task.published is None:
            raise ValueError(f"{method.name!r}: expected a task that names the published layers, found {task.name!r}")
        return task.published
    names = [r.name for r in ce.relaxations(ce.relax(copy.deepcopy(model), where=task.where, adapter=task.adapter))]
    half = len(names) // 2
    kept = set(names[:half] if method.layers == "first half" else names[half:])
    return lambda name, layer: name in kept


def _like_linear(weight: Tensor) -> Tensor:
    return nn.init.kaiming_uniform_(weight.flatten(1), a=math.sqrt(5))


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
