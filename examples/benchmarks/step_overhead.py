"""What relaxation costs: a training step of a relaxed network over one of the plain network, side by side.

    python -m examples.benchmarks.step_overhead [--networks SEGNN ...] [--threads 1] [--steps 40] [--device cpu]

A step is forward, backward and optimizer step (Adam; for relaxed networks a `ConstrainedOptimizer` around it, with the
complement projection). The variants take turns, so that a slow moment of the machine hits all of them; ratios of
medians are printed, and of the memory that autograd keeps for the backward pass.
"""

import argparse
import copy
import time
from collections.abc import Callable
from statistics import median
from typing import TypeAlias

import torch
from torch import Tensor, nn

import constrained_equiv as ce
from examples.models.segnn import SEGNN
from examples.models.vector_neurons import VNDGCNN, VNLinear, VNPointNet

Step = Callable[[], None]
Choice: TypeAlias = tuple[Callable[[str, nn.Module], bool] | None, ce.adapters.Adapter | None]
Network: TypeAlias = tuple[nn.Module, list[Tensor], dict[str, Choice]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=40, help="timed steps of each variant")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name in options.networks:
        torch.manual_seed(0)
        plain, inputs, choices = NETWORKS[name]()
        variants = {"plain": plain.to(options.device).train()}
        for title, (where, adapter) in choices.items():
            variants[title] = ce.relax(copy.deepcopy(plain), where=where, adapter=adapter)
        report(name, variants, [tensor.to(options.device) for tensor in inputs], options.steps)


def segnn() -> Network:
    """Full size, the published batch; its eight update products as published, and everything."""
    charges = torch.randn(100, 5).sign()
    inputs = [torch.randn(100, 5, 3), torch.randn(100, 5, 3), charges]
    updates = (lambda name, layer: name.endswith((".update.0", ".update.1")), None)
    return SEGNN(), inputs, {"8 updates": updates, "all": (None, None)}


def steerable_cnn() -> Network:
    """C8 on 28 x 28 pixels; needs escnn."""
    from examples.models.steerable_cnn import SteerableCNN

    return SteerableCNN(10, width=8), [torch.randn(64, 1, 28, 28)], {"all": (None, None)}


def vn_pointnet() -> Network:
    """Published size, all vector maps that have a gradient."""
    return VNPointNet(40, pool="mean"), [torch.randn(4, 512, 3)], {"all": _VECTOR_MAPS}


def vn_dgcnn() -> Network:
    """Published size."""
    return VNDGCNN(40, pool="mean"), [torch.randn(4, 512, 3)], {"all": _VECTOR_MAPS}


def nequip() -> Network:
    """Forces by autograd; the maps on atoms."""
    from examples.models.nequip_style import NequIP

    atoms = (lambda name, layer: name.endswith((".before", ".after", ".own")), None)
    positions = torch.randn(5, 21, 3) * 3
    return NequIP([1, 6, 8]), [positions, torch.tensor([1, 6, 8] * 7).expand(5, 21)], {"atom maps": atoms}


_VECTOR_MAPS = (
    lambda name, layer: isinstance(layer, VNLinear) and not name.endswith("pool.direction"),
    ce.adapters.vector_neurons(),
)

NETWORKS: dict[str, Callable[[], Network]] = {
    "SEGNN": segnn,
    "escnn-C8": steerable_cnn,
    "VN-PointNet": vn_pointnet,
    "VN-DGCNN": vn_dgcnn,
    "NequIP-style": nequip,
}


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
        loss(model(*inputs)).backward()
        optimizer.step()

    return step


def loss(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """Return a scalar that depends on all outputs."""
    parts = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.stack([part.square().mean() for part in parts]).sum()


def interleaved(
    runs: dict[str, Step], steps: int, device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Time the variants in turn; return the median seconds of each."""

    def timed(run: Step) -> float:
        start = clock()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return clock() - start

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
