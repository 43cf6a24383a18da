"""What relaxation costs: a training step of a relaxed network over one of the plain network, side by side.

    python -m examples.benchmarks.step_overhead [--threads 1] [--steps 40] [--device cpu]

A step is forward, backward and optimizer step (Adam; for relaxed networks a `ConstrainedOptimizer` around it, with the
complement projection). The variants take turns, so that a slow moment of the machine hits all of them; ratios of
medians are printed, and of the memory that autograd keeps for the backward pass.
"""

import argparse
import copy
import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor, nn

import constrained_equiv as ce
from examples.models.segnn import SEGNN

Step = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40, help="timed steps of each variant")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    plain = SEGNN().to(options.device)
    inputs = [torch.randn(options.batch, 5, size, device=options.device) for size in (3, 3)]
    inputs.append(torch.randn(options.batch, 5, device=options.device).sign())
    updates = ce.relax(copy.deepcopy(plain), where=lambda name, layer: ".update." in name and name[-1].isdigit())
    everything = ce.relax(copy.deepcopy(plain))
    variants = {"plain": plain, "8 updates": updates, "all": everything}
    report("SEGNN 32x0e+32x1o, 4 layers", variants, inputs, options.steps)


def report(title: str, variants: dict[str, nn.Module], inputs: list[Tensor], steps: int) -> None:
    """Print the step time and the stored activations of each variant over those of the first."""
    runs = {name: training_step(model, inputs) for name, model in variants.items()}
    times = interleaved(runs, steps, inputs[0].device)
    stored = {name: saved_bytes(model, inputs) for name, model in variants.items()}
    base, base_stored = next(iter(times.values())), next(iter(stored.values()))
    print(f"\n{title}\n{'variant':<12}{'terms':>7}{'parameters':>12}{'ms':>9}{'time ratio':>12}{'saved ratio':>13}")
    for name, model in variants.items():
        count = sum(p.numel() for p in model.parameters())
        print(
            f"{name:<12}{len(ce.relaxations(model)):>7}{count:>12,}{1e3 * times[name]:>9.1f}"
            f"{times[name] / base:>12.3f}{stored[name] / base_stored:>13.3f}"
        )


def training_step(model: nn.Module, inputs: list[Tensor]) -> Step:
    """Build one training step on a fixed batch."""
    if ce.relaxations(model):
        constraint = ce.constraints.weight(model, level=0.1)
        base = torch.optim.Adam(ce.parameter_groups(model, lr=1e-4))
        optimizer: torch.optim.Optimizer = ce.ConstrainedOptimizer(base, constraint)
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        model(*inputs).square().mean().backward()
        optimizer.step()

    return step


def interleaved(runs: dict[str, Step], steps: int, device: torch.device) -> dict[str, float]:
    """Time the variants in turn; return the median seconds of each."""

    def timed(run: Step) -> float:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    for run in runs.values():
        for _ in range(3):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(steps):
        for name, run in runs.items():
            times[name].append(timed(run))
    return {name: median(values) for name, values in times.items()}


def saved_bytes(model: nn.Module, inputs: list[Tensor]) -> int:
    """Count the bytes of distinct storages that one forward pass keeps for the backward pass, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(*inputs)
    total = sum(kept.values())
    del output
    return total


if __name__ == "__main__":
    main()
