"""A step costs a number of operations that does not grow with the number of terms, and the host reads nothing."""

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import constrained_equiv as ce
from tests.optim.toys import irreps, points

READS = {
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::is_nonzero",
    "aten::unique2",
}


class Operations(TorchDispatchMode):
    """Counts the operations dispatched while it is on; fails on those that make the host wait for the device."""

    def __init__(self, *, forbid: bool = False) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.forbid = forbid

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if self.forbid and name in READS:
            raise AssertionError(f"{name} reads the device")
        self.counts[name] += 1
        return func(*args, **(kwargs or {}))


RECORDS = {
    "weight": lambda m: [ce.constraints.weight(m, level=0.1)],
    "weight at zero": lambda m: [ce.constraints.weight(m, level=0.0)],
    "weight, falling level": lambda m: [ce.constraints.weight(m, level=ce.schedules.linear(0.2, 0.0, 2))],
    "free": lambda m: [ce.constraints.weight(m, level=0.1, part="non_equivariant")],
    "relative": lambda m: [ce.constraints.relative(m, level=0.1)],
    "activation": lambda m: [ce.constraints.activation(m, level=0.1)],
    "lie": lambda m: [ce.constraints.lie(m, level=0.1)],
    "blocks": lambda m: [ce.constraints.weight(m, level=0.1, per="block")],
    "blocks at zero": lambda m: [ce.constraints.weight(m, level=0.0, per="block")],
    "shared": lambda m: [ce.constraints.weight(m, level=0.1, per="model")],
    "generators": lambda m: [ce.constraints.lie(m, level=0.1, per="generator")],
    "subgroup": lambda m: [ce.constraints.subgroup(m, ce.groups.SO3(), level=0.1)],
    "subgroup at zero": lambda m: [ce.constraints.subgroup(m, ce.groups.SO3(), level=0.0)],
    "two records": lambda m: [ce.constraints.weight(m, level=0.1), ce.constraints.relative(m, level=0.1)],
    "penalty": lambda m: [ce.constraints.penalty(ce.constraints.lie(m, level=0.0), coefficient=0.1)],
    "linear slack": lambda m: [ce.constraints.resilient(ce.constraints.weight(m, level=0.0), price=0.1)],
    "budget": lambda m: [ce.constraints.resilient(ce.constraints.weight(m, level=0.0), price=0.1, cost="budget")],
    "scale": lambda m: [ce.constraints.scale(m, schedule=ce.schedules.triangle(10))],
}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "simultaneous": {"order": "simultaneous"},
    "primal-dual": {"order": "primal-dual"},
    "lagrangian": {"formulation": "lagrangian"},
    "quadratic penalty": {"formulation": "quadratic_penalty"},
    "growing": {"penalty_growth": 1.1},
    "projection": {"enforce": "projection"},
    "proximal": {"enforce": "proximal"},
}
REFUSED = {
    *((record, option) for record in ("linear slack", "budget") for option in ("lagrangian", "quadratic penalty")),
    *((record, "projection") for record in ("linear slack", "budget")),
    *((record, "proximal") for record in ("activation", "lie", "shared", "generators")),
}
CASES = [case for case in itertools.product(RECORDS, OPTIONS) if case not in REFUSED]


class Idle(torch.optim.Adam):
    """A base whose own step is no part of the count."""

    def step(self, closure: Any = None) -> None:
        pass


class IdleSGD(torch.optim.SGD):
    """The same of a base whose steps the pull may have to shorten."""

    def step(self, closure: Any = None) -> None:
        pass


def stepper(record: str, option: str, count: int, base: Any = Idle) -> ce.ConstrainedOptimizer:
    model, x = model_of(record, count)
    optimizer = ce.ConstrainedOptimizer(base(model.parameters(), lr=0.1), *RECORDS[record](model), **OPTIONS[option])
    model.train()
    for layer in model:
        layer(x).square().sum().backward()
    return optimizer


def model_of(record: str, count: int) -> tuple[nn.Module, Tensor]:
    """Layers and their input; irreps where the record tells blocks or subgroups apart."""
    if record.startswith(("block", "subgroup")):
        return irreps(count), torch.randn(4, 9, dtype=torch.float64)
    return points(count, complement=record != "free"), torch.randn(4, 3, 2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("record", "option", "base"), [*((*case, Idle) for case in CASES), ("weight", "default", IdleSGD)]
)
def test_the_number_of_operations_is_constant_in_the_number_of_terms(record: str, option: str, base: Any) -> None:
    found = []
    for count in (2, 20):
        optimizer = stepper(record, option, count, base)
        optimizer.step()
        with Operations() as mode:
            optimizer.step()
        # gradients that are absent are cleared or allocated one by one, which is no operation of the step itself
        found.append(mode.counts - Counter({"aten::zeros_like": mode.counts["aten::zeros_like"]}))
    assert found[0] == found[1]
    assert sum(found[0].values()) < 400  # most of them views


@pytest.mark.parametrize(("complement", "most"), [(False, 20), (True, 41)])
def test_the_usual_step_is_short(complement: bool, most: int) -> None:
    """Each operation counts where terms are few and small; two are the profiler marks of the base."""
    model = nn.ModuleList(nn.Linear(8, 8) for _ in range(10))
    adapter = ce.adapters.linear("2x0e + 2x1o", "2x0e + 2x1o")
    ce.relax(model, where=lambda n, m: isinstance(m, nn.Linear), adapter=adapter, complement=complement, init=0.1)
    optimizer = ce.ConstrainedOptimizer(Idle(model.parameters(), lr=0.1), ce.constraints.weight(model, level=0.1))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    with Operations() as mode:
        optimizer.step()
        first = mode.counts.total()
        optimizer.step()
    assert mode.counts.total() - first <= most


@pytest.mark.parametrize(("record", "option"), CASES)
def test_the_host_reads_nothing(record: str, option: str) -> None:
    optimizer = stepper(record, option, 3, torch.optim.SGD)
    with Operations(forbid=True):
        optimizer.step()
        optimizer.step()
        optimizer.readings()


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_checking_gradients_reads_once(policy: Any) -> None:
    model = points(3)
    constraint = ce.constraints.weight(model, level=0.1)
    optimizer = ce.ConstrainedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), constraint, on_nonfinite=policy)
    model[0](torch.randn(4, 3, 2, dtype=torch.float64)).sum().backward()
    with Operations() as mode:
        optimizer.step()
    assert sum(mode.counts[name] for name in READS) == 1


@pytest.mark.parametrize("shapes", [1, 3])
def test_the_number_of_operations_grows_with_distinct_shapes(shapes: int) -> None:
    """The check can fail: another shape is another stack."""
    model = nn.ModuleList(points(2, size=size) for size in range(3, 3 + shapes))
    base = Idle(model.parameters(), lr=0.1)
    optimizer = ce.ConstrainedOptimizer(base, ce.constraints.weight(model, level=0.1))
    with Operations() as mode:
        optimizer.step()
    assert mode.counts["aten::linalg_vector_norm"] == shapes


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("record", "option"), CASES)
def test_no_synchronisation_on_a_gpu(record: str, option: str) -> None:
    model, x = (part.to("cuda", torch.float32) for part in model_of(record, 3))
    base = torch.optim.Adam(model.parameters(), lr=0.1)
    optimizer = ce.ConstrainedOptimizer(base, *RECORDS[record](model), **OPTIONS[option])
    for _ in range(3):
        for layer in model:
            layer(x).square().sum().backward()
        torch.cuda.set_sync_debug_mode("error" if optimizer.finished_steps else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
