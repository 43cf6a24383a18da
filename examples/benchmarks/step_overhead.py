"""What relaxation costs: a training step of a relaxed network over one of the plain network, side by side.

    python -m examples.benchmarks.step_overhead [--networks SEGNN ...] [--threads 1] [--steps 10] [--device cpu]

A step is forward, backward and optimizer step (Adam; for relaxed networks a `ConstrainedOptimizer` around it, with the
complement projection). The variants take turns, so that a slow moment of the machine hits all of them. With one thread
on the CPU, time is processor time: other programs do not count. Columns, the last four over those of the plain network:

    time         median of the steps
    products     floating-point operations in matrix products and convolutions: no implementation does with fewer
    kept         bytes that autograd keeps for the backward pass, parameters left out
    state        bytes of parameters, their gradients and the optimizer's state
    memory       kept and state together
"""

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import constrained_equiv as ce
from examples.models.vector_neurons import VNDGCNN, VNLinear, VNPointNet

Choice: TypeAlias = tuple[Callable[[str, nn.Module], bool] | None, ce.adapters.Adapter | None]
Network: TypeAlias = tuple[nn.Module, list[Tensor], dict[str, Choice]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each variant")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.device == "cpu" and options.threads == 1 else time.perf_counter
    for name in options.networks:
        torch.manual_seed(0)
        plain, inputs, choices = NETWORKS[name]()
        variants = {"plain": plain.to(options.device).train()}
        for title, (where, adapter) in choices.items():
            variants[title] = ce.relax(copy.deepcopy(plain), where=where, adapter=adapter)
        report(name, variants, [tensor.to(options.device) for tensor in inputs], options.steps, clock)


# --- networks ---------------------------------------------------------------------------------------------------------


def segnn() -> Network:
    """Full size, the published batch; its eight update products as published, and everything."""
    from examples.models.segnn import SEGNN

    charges = torch.randn(100, 5).sign()
    inputs = [torch.randn(100, 5, 3), torch.randn(100, 5, 3), charges]
    return SEGNN(), inputs, {"8 updates": (is_update, None), "all": (None, None)}


def is_update(name: str, layer: nn.Module) -> bool:
    """Whether a layer is one of the SEGNN's update products."""
    return name.endswith((".update.0", ".update.1"))


def steerable_cnn(rotations: int, reflections: bool) -> Network:
    """On 28 x 28 pixels; needs escnn."""
    from examples.models.steerable_cnn import SteerableCNN

    network = SteerableCNN(10, width=8, rotations=rotations, reflections=reflections)
    return network, [torch.randn(64, 1, 28, 28)], {"all": (None, None)}


def vector_neurons(make: Callable[..., nn.Module], published: bool) -> Network:
    """Published size and number of points; all vector maps that have a gradient.

    Args:
        make: the network.
        published: with linear layers as in the published code, a `nn.Linear` between two transpositions.
    """
    network = make(40, pool="mean")
    if published:
        for parent in list(network.modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, VNLinear):
                    setattr(parent, name, Transposing(layer))

    def where(name: str, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Linear) and layer.bias is None and "pool.direction" not in name

    adapter = ce.adapters.vector_neurons(axis="swapped" if published else 1)
    return network, [torch.randn(8, 300, 3)], {"all": (where, adapter)}


class Transposing(nn.Module):
    """A vector linear layer in the published form."""

    def __init__(self, layer: VNLinear) -> None:
        super().__init__()
        self.linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
        self.linear.weight = layer.weight

    def forward(self, features: Tensor) -> Tensor:
        mixed: Tensor = self.linear(features.transpose(1, -1))
        return mixed.transpose(1, -1)


def nequip(numbers: list[int]) -> Network:
    """Forces by autograd, five molecules; the maps on atoms."""
    from examples.models.nequip_style import NequIP

    atoms = (lambda name, layer: name.endswith((".before", ".after", ".own")), None)
    positions = torch.randn(5, len(numbers), 3) * 3
    return NequIP([1, 6, 8]), [positions, torch.tensor(numbers)], {"atom maps": atoms}


NETWORKS: dict[str, Callable[[], Network]] = {
    "SEGNN": segnn,
    "escnn-C8": partial(steerable_cnn, 8, False),
    "escnn-D8": partial(steerable_cnn, 8, True),
    "escnn-D4": partial(steerable_cnn, 4, True),
    "VN-PointNet": partial(vector_neurons, VNPointNet, False),
    "VN-PointNet-published-layers": partial(vector_neurons, VNPointNet, True),
    "VN-DGCNN": partial(vector_neurons, VNDGCNN, False),
    "VN-DGCNN-published-layers": partial(vector_neurons, VNDGCNN, True),
    "NequIP-aspirin": partial(nequip, [6] * 9 + [1] * 8 + [8] * 4),
    "NequIP-ethanol": partial(nequip, [6] * 2 + [1] * 6 + [8]),
}

# --- measuring --------------------------------------------------------------------------------------------------------


class TrainingStep(NamedTuple):
    """One training step on a fixed batch."""

    model: nn.Module
    inputs: Sequence[Tensor]
    optimizer: torch.optim.Optimizer

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        loss(self.model(*self.inputs)).backward()
        self.optimizer.step()


def report(
    title: str, variants: dict[str, nn.Module], inputs: list[Tensor], steps: int, clock: Callable[[], float]
) -> None:
    """Print what a step of each variant costs over one of the first."""
    runs = {name: training_step(model, inputs) for name, model in variants.items()}
    times = interleaved(runs, steps, inputs[0].device, clock)
    costs = {}
    for name, step in runs.items():
        kept, state = saved_bytes(step.model, inputs), state_bytes(step)
        costs[name] = (times[name], products(step), kept, state, kept + state)
    base = next(iter(costs.values()))
    print(f"\n{title}\n{'':<12}{'terms':>7}{'parameters':>12}{'ms':>9}", end="")
    print("".join(f"{column:>10}" for column in ("time", "products", "kept", "state", "memory")))
    for name, model in variants.items():
        count = sum(p.numel() for p in model.parameters())
        print(f"{name:<12}{len(ce.relaxations(model)):>7}{count:>12,}{1e3 * times[name]:>9.1f}", end="")
        print("".join(f"{cost / unit:>10.2f}" for cost, unit in zip(costs[name], base, strict=True)), flush=True)


def training_step(model: nn.Module, inputs: Sequence[Tensor]) -> TrainingStep:
    """Build one training step, constrained where the model is relaxed."""
    if not ce.relaxations(model):
        return TrainingStep(model, inputs, torch.optim.Adam(model.parameters(), lr=1e-4))
    constraint = ce.constraints.weight(model, level=0.1)
    base = torch.optim.Adam(ce.parameter_groups(model, lr=1e-4))
    return TrainingStep(model, inputs, ce.ConstrainedOptimizer(base, constraint))


def loss(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return a scalar that depends on all outputs."""
    parts = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.stack([part.square().mean() for part in parts]).sum()


def interleaved(
    runs: dict[str, Callable[[], None]],
    steps: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Time the variants in turn; return the median seconds of each."""

    def timed(run: Callable[[], None]) -> float:
        start = clock()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - start

    for run in runs.values():
        for _ in range(2):
            run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(steps):
        for name, run in runs.items():
            times[name].append(timed(run))
    return {name: median(values) for name, values in times.items()}


def products(step: TrainingStep) -> int:
    """Count the floating-point operations that a step spends in matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        step()
    return int(counter.get_total_flops())


def saved_bytes(model: nn.Module, inputs: Sequence[Tensor]) -> int:
    """Count the bytes of distinct storages that one forward pass keeps for the backward pass, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(storage)  # or its place in memory might be taken by another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(*inputs)
    total = sum(kept.values())
    del output
    return total


def state_bytes(step: TrainingStep) -> int:
    """Count the bytes of parameters, their gradients and the optimizer's state."""
    parameters = [(1 + p.requires_grad) * p.nbytes for p in step.model.parameters()]
    state = [v.nbytes for entries in step.optimizer.state.values() for v in entries.values() if isinstance(v, Tensor)]
    return sum(parameters) + sum(state)


if __name__ == "__main__":
    main()
