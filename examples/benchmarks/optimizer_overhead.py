"""What a constrained step costs: `step()` over the base optimizer's step on the same parameters, side by side.

    python -m examples.benchmarks.optimizer_overhead [--counts 10 100 1000] [--steps 30] [--device cpu] [--irreps ...]

First real networks: the SEGNN of published width, deepened until it has N update products, all of them relaxed, beside
its messages, which are not. Then the hardest case, networks of N relaxed linear layers and nothing else. Gradients are
fixed, so that only optimizers are timed. Every variant owns its network. Variants take turns, and medians are compared:
of processor time on a CPU, where steps this short would otherwise measure who else is waiting for it. Of the SEGNN of
published size, what our step costs beyond Adam's is also compared with a whole training step on the published batch of
100.

Stock Cooper owns forward and backward, so its `roll` is timed on a loss of one product per parameter, and compared with
a plain step with that same loss.
"""

import argparse
import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import cooper
import e3nn
import torch
from e3nn import o3
from torch import Tensor, nn

import constrained_equiv as ce
from examples.benchmarks import step_overhead
from examples.benchmarks.step_overhead import is_update, segnn, training_step
from examples.models.segnn import SEGNN

Step: TypeAlias = Callable[[], object]
Build: TypeAlias = Callable[[bool], nn.Module]
"""Makes a relaxed network; the argument is relax's `complement`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[10, 100, 1_000])
    parser.add_argument("--irreps", nargs="+", default=["16x0e + 16x1o", "32x0e + 32x1o"], help="of linear layers")
    parser.add_argument("--steps", type=int, default=30, help="of each variant at N = 100; others take as long")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--without-cooper", action="store_true", help="leave stock Cooper out")
    parser.add_argument("--without-segnn", action="store_true", help="leave the SEGNN out")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    print(f"{device}, {options.threads} thread(s); ratios to plain Adam (ms)")
    kinds: dict[str, Callable[..., nn.Module]] = {}
    if not options.without_segnn:
        kinds["SEGNN of N update products"] = deep_segnn
    for irreps in options.irreps:
        dim = o3.Irreps(irreps).dim
        kinds[f"N linear layers, {irreps}: terms of {dim} x {dim}"] = partial(linear_layers, irreps)
    for title, kind in kinds.items():
        print(f"\n{title}")
        for count in options.counts:
            steps = max(options.steps * 100 // count, 5)
            build = partial(kind, count, device)
            report(count, build, device, steps)
            if kind is not deep_segnn and not options.without_cooper:
                report_cooper(build, device, max(steps // 3, 3))
    if not options.without_segnn:
        report_segnn(device, options.steps)


def report(count: int, build: Build, device: torch.device, steps: int) -> None:
    """Print the ratios of one size."""
    own = type("Own", (cooper.formulations.AugmentedLagrangian,), {})  # has no closed form here
    runs = {
        "Adam": plain(build(True)),
        "ours, free": constrained(build(False)),
        "ours, complement": constrained(build(True)),
        "ours through Cooper, free": constrained(build(False), formulation=own),
    }
    times = interleaved(runs, steps, device)
    cells = [f"{name} {times[name] / times['Adam']:.2f}" for name in list(runs)[1:]]
    print(f"N = {count:<5} Adam {1e3 * times['Adam']:.2f} ms | " + " | ".join(cells), flush=True)


def report_cooper(build: Build, device: torch.device, steps: int) -> None:
    """Print what stock Cooper costs on the same parameters."""
    model = build(False)
    rolls = {"loss": unconstrained(model), "vector": rolled(model, True), "objects": rolled(model, False)}
    times = interleaved(rolls, steps, device)
    cells = [
        f"stock Cooper, {label} {times[name] / times['loss']:.2f}"
        for name, label in (("vector", "1 constraint of N"), ("objects", "N constraints"))
    ]
    print(f"{'':>9} loss + Adam {1e3 * times['loss']:.2f} ms | " + " | ".join(cells), flush=True)


def report_segnn(device: torch.device, steps: int) -> None:
    """Print the ratios on the SEGNN, and which share of its training step our step adds to Adam's."""
    plain_network, inputs, choices = segnn()
    inputs = [tensor.to(device) for tensor in inputs]
    for title, (where, adapter) in choices.items():
        free, *complement = (
            ce.relax(copy.deepcopy(plain_network), where=where, adapter=adapter, complement=form).to(device)
            for form in (False, True, True, True)
        )
        runs = {"Adam": plain(complement[0]), "free": constrained(free), "complement": constrained(complement[1])}
        optimizers = interleaved(runs, 10 * steps, device)
        step = training_step(complement[2], inputs)
        whole = interleaved({"training step": step}, steps, device)["training step"]
        terms, tensors = len(ce.relaxations(free)), len(list(free.parameters()))
        print(
            f"\nSEGNN, {title}: {terms} terms, {tensors} parameter tensors; "
            f"Adam {1e3 * optimizers['Adam']:.2f} ms, training step {1e3 * whole:.0f} ms"
        )
        for name in ("free", "complement"):
            extra = optimizers[name] - optimizers["Adam"]
            print(f"ours, {name:<12}{optimizers[name] / optimizers['Adam']:.2f} of Adam, {extra / whole:.2%} of a step")


def interleaved(runs: dict[str, Step], steps: int, device: torch.device) -> dict[str, float]:
    """Time the variants in turn; return the median seconds of each."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    return step_overhead.interleaved(runs, steps, device, clock)


def deep_segnn(count: int, device: torch.device, complement: bool) -> nn.Module:
    """A SEGNN of published width with N update products, which are relaxed."""
    torch.manual_seed(0)
    defaults = e3nn.get_optimization_defaults()
    e3nn.set_optimization_defaults(jit_script_fx=False)  # nothing here is called, and compiling takes minutes
    model = SEGNN(layers=count // 2)
    e3nn.set_optimization_defaults(**defaults)
    return ce.relax(model, where=is_update, complement=complement, init=0.01).to(device)


def linear_layers(irreps: str, count: int, device: torch.device, complement: bool) -> nn.Module:
    """N relaxed layers."""
    torch.manual_seed(0)
    layers = nn.ModuleList(o3.Linear(irreps, irreps) for _ in range(count))
    return ce.relax(layers, complement=complement, init=0.01).to(device)


def with_gradients(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    """Give parameters gradients of realistic size."""
    for parameter in parameters:
        parameter.grad = 0.01 * torch.randn_like(parameter)
    return parameters


def plain(model: nn.Module) -> Step:
    return torch.optim.Adam(with_gradients(list(model.parameters())), lr=1e-4).step


def constrained(model: nn.Module, **options: Any) -> Step:
    base = torch.optim.Adam(with_gradients(list(model.parameters())), lr=1e-4)
    return ce.ConstrainedOptimizer(base, ce.constraints.weight(model, level=0.1), **options).step


def loss(parameters: list[nn.Parameter]) -> Tensor:
    return torch.stack([p.sum() for p in parameters]).sum()


def unconstrained(model: nn.Module) -> Step:
    parameters = [nn.Parameter(p.detach().clone()) for p in model.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss(parameters).backward()
        optimizer.step()

    return step


class Problem(cooper.ConstrainedMinimizationProblem):
    """The same constraints as a Cooper user states them."""

    def __init__(self, parameters: list[nn.Parameter], terms: list[nn.Parameter], rows: float, vector: bool) -> None:
        super().__init__()
        self.parameters, self.terms, self.rows, self.vector = parameters, terms, rows, vector
        sizes = [len(terms)] if vector else [1] * len(terms)
        for i, size in enumerate(sizes):
            setattr(self, f"constraint{i}", constraint(size, terms[0].device))

    def compute_cmp_state(self) -> cooper.CMPState:
        values = [w.norm() / self.rows**0.5 - 0.1 for w in self.terms]
        violations = [torch.stack(values)] if self.vector else [v.view(1) for v in values]
        states = [cooper.ConstraintState(v) for v in violations]
        return cooper.CMPState(loss(self.parameters), dict(zip(self.constraints(), states, strict=True)))


def constraint(size: int, device: torch.device) -> cooper.Constraint:
    return cooper.Constraint(
        cooper.ConstraintType.INEQUALITY,
        cooper.formulations.AugmentedLagrangian,
        cooper.multipliers.DenseMultiplier(init=torch.zeros(size, device=device)),
        cooper.penalty_coefficients.DensePenaltyCoefficient(torch.ones(size, device=device)),
    )


def rolled(model: nn.Module, vector: bool) -> Step:
    model = copy.deepcopy(model)
    terms = [r.term.weight for r in ce.relaxations(model)]
    problem = Problem(list(model.parameters()), terms, float(len(terms[0])), vector)
    dual = torch.optim.SGD([p for m in problem.multipliers() for p in m.parameters()], lr=1.0, maximize=True)
    primal = torch.optim.Adam(problem.parameters, lr=1e-4)
    return cooper.optim.AlternatingDualPrimalOptimizer(problem, primal, dual).roll


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"\n{time.perf_counter() - start:.0f} s")
