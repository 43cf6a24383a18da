"""The step under `torch.compile`, and captured in a CUDA graph, is the step."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import constrained_equiv as ce

FORMS = {"free": False, "complement": True}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "lagrangian": {"formulation": "lagrangian"},
    "growing": {"penalty_growth": 1.1},
    "simultaneous": {"order": "simultaneous"},
    "primal-dual": {"order": "primal-dual"},
    "projection": {"enforce": "projection"},
    "proximal": {"enforce": "proximal"},
}
STEPS, WARM = 8, 3


def network(complement: bool, **kind: Any) -> nn.Module:
    """Two stacks of layers on scalars and vectors, with terms beyond their level of 0.1."""
    model = nn.ModuleList()
    for irreps in ("2x0e + 2x1o", "2x0e + 2x1o", "3x1o"):
        dim = ce.representations.as_representation(irreps, group=ce.groups.O3()).dim
        layer = nn.Linear(dim, dim, **kind)
        adapter = ce.adapters.linear(irreps, irreps)
        model.append(ce.relax(layer, where=lambda n, m: True, adapter=adapter, complement=complement, init=0.3))
    return model


def wrap(model: nn.Module, level: Any = 0.1, **options: Any) -> ce.ConstrainedOptimizer:
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    return ce.ConstrainedOptimizer(base, ce.constraints.weight(model, level=level), **options)


def gradients(model: nn.Module, steps: int = STEPS) -> list[list[Tensor]]:
    """The same for every copy of a model."""
    return [[0.1 * torch.randn_like(p) for p in model.parameters()] for _ in range(steps)]


def feed(model: nn.Module, step: list[Tensor]) -> None:
    """Write gradients into memory that stays where it is."""
    for parameter, gradient in zip(model.parameters(), step, strict=True):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        parameter.grad.copy_(gradient)


def agree(
    found: tuple[nn.Module, ce.ConstrainedOptimizer], expected: tuple[nn.Module, ce.ConstrainedOptimizer], rtol: float
) -> None:
    pairs = [*zip(found[0].parameters(), expected[0].parameters(), strict=True)]
    pairs += [(a.grad, b.grad) for a, b in pairs if a.grad is not None or b.grad is not None]  # of the Lagrangian
    ours, theirs = found[1].readings(), expected[1].readings()
    pairs += [(ours.values, theirs.values), (ours.multipliers, theirs.multipliers)]
    for a, b in pairs:
        assert torch.allclose(a, b, rtol=rtol, atol=rtol)


def compiled(function: Callable[..., Any], *, fullgraph: bool) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(function, fullgraph=fullgraph, backend="aot_eager")


@pytest.mark.parametrize(
    ("form", "option"),
    [("free", "default"), *[("complement", option) for option in ("default", "growing", "primal-dual")]],
)
def test_what_surrounds_the_base_step_compiles_as_one_graph(form: str, option: str) -> None:
    """All of the step but the base's own, which breaks the graph by itself; a level that moves is written outside."""
    moving = option == "default"
    level = ce.schedules.linear(0.2, 0.1, STEPS - 2) if moving else 0.1
    model = network(FORMS[form], dtype=torch.float64)
    other = copy.deepcopy(model)
    eager, optimizer = wrap(model, level, **OPTIONS[option]), wrap(other, level, **OPTIONS[option])
    steps = gradients(model)
    for parameters, plain in ((model, eager), (other, optimizer)):
        feed(parameters, steps[0])  # one ordinary step fills what is kept from step to step
        plain.step()
    engine = optimizer._engine
    before = compiled(engine.before, fullgraph=True)
    after = engine.after if moving else torch.compile(engine.after, fullgraph=True, backend="aot_eager")
    for step in steps[1:]:
        feed(model, step)
        eager.step()
        feed(other, step)
        before()
        optimizer.base.step()
        after()
    assert float(optimizer.readings().values.max()) > 0
    assert optimizer.finished_steps == eager.finished_steps == STEPS
    agree((other, optimizer), (model, eager), 1e-13)


@pytest.mark.parametrize("form", FORMS)
def test_a_compiled_step_equals_the_step(form: str) -> None:
    """Without the demand for one graph, from the first step on, while the level falls to 0 and the terms end."""
    model = network(FORMS[form], dtype=torch.float64)
    other = copy.deepcopy(model)
    level = ce.schedules.linear(0.2, 0.0, 3)
    eager, optimizer = wrap(model, level), wrap(other, level)
    step = compiled(optimizer.step, fullgraph=False)
    for number, given in enumerate(gradients(model, 5)):
        feed(model, given)
        eager.step()
        feed(other, given)
        step()
        agree((other, optimizer), (model, eager), 1e-13)
        ended = all(not r.term.weight.any() for r in ce.relaxations(other))
        assert ended == (number >= 2)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True:UserWarning")
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_a_captured_step_replays_as_the_step(form: str, option: str) -> None:
    """The whole step, multipliers and base included; gradients are written into the same memory before each replay.

    Capturing runs nothing on the device. Levels are written by the host, so a graph holds the one of its capture.
    """
    model = network(FORMS[form], dtype=torch.float32, device="cuda")
    other = copy.deepcopy(model)
    optimizers = []
    for each in (model, other):
        base = torch.optim.Adam(each.parameters(), lr=0.05, capturable=True)
        optimizers.append(ce.ConstrainedOptimizer(base, ce.constraints.weight(each, level=0.1), **OPTIONS[option]))
    eager, optimizer = optimizers
    steps = gradients(model)
    for step in steps:
        feed(model, step)
        eager.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in steps[:WARM]:
            feed(other, step)
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    warm = copy.deepcopy(other.state_dict())
    for step in steps[WARM:]:
        feed(other, step)
        graph.replay()
    torch.cuda.synchronize()
    assert any(not torch.equal(warm[name], value) for name, value in other.state_dict().items() if "weight" in name)
    agree((other, optimizer), (model, eager), 1e-5)
