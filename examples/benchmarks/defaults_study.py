"""Which penalty, dual rate, order and schedule: a small study behind the defaults of `ConstrainedOptimizer`.

    python -m examples.benchmarks.defaults_study [--steps 600] [--seeds 3]

A permutation-equivariant network of three layers (6 points, 8 channels) learns from 256 noisy samples of a teacher of
its own kind, symmetric or with an asymmetric part; Adam at 0.01 with a cosine schedule. One option at a time leaves the
default. Printed: test loss of the equivariant model after `finalize` (mean and population standard deviation over
seeds), the largest violation along the way, and the largest multiplier.
"""

import argparse
from dataclasses import dataclass, field
from statistics import mean, pstdev
from typing import Any

import torch
from torch import Tensor, nn

import constrained_equiv as ce
from constrained_equiv.monitor import Monitor

POINTS, CHANNELS, SAMPLES = 6, 8, 256
RATE = 0.01


@dataclass(frozen=True)
class Setting:
    """One row: the schedule's shape, the optimizer's options, and the rate of the terms where it is not the default."""

    name: str
    schedule: str = "cosine"
    options: dict[str, Any] = field(default_factory=dict)
    term_lr: float | None = None


SETTINGS = [
    Setting("strict (no terms)", "none"),
    Setting("default"),
    Setting("terms at the model's rate", term_lr=RATE),
    *(Setting(f"penalty {c}", options={"penalty": c}) for c in (0.1, 10.0, 100.0)),
    *(Setting(f"dual_lr {r}", options={"dual_lr": r}) for r in (0.1, 10.0)),
    Setting("simultaneous", options={"order": "simultaneous"}),
    Setting("primal-dual", options={"order": "primal-dual"}),
    Setting("linear level", "linear"),
    Setting("exponential level", "exponential"),
    Setting("level 0, multipliers", "zero", {"at_zero": "multipliers"}),
    Setting("lagrangian", options={"formulation": "lagrangian"}),
    Setting("projection", options={"enforce": "projection"}),
    Setting("proximal", options={"enforce": "proximal"}),
]


class DeepSet(nn.Module):
    """Each layer mixes a point with the mean over points; relaxed layers may tell points apart."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(CHANNELS, CHANNELS) for _ in range(3))
        self.means = nn.ModuleList(nn.Linear(CHANNELS, CHANNELS, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for i, (layer, pooled) in enumerate(zip(self.layers, self.means, strict=True)):
            x = layer(x) + pooled(x.mean(1, keepdim=True))
            x = torch.tanh(x) if i < 2 else x
        return x


def teacher(asymmetry: float) -> nn.Module:
    model = DeepSet()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    if asymmetry:
        relax(model)
        for r in ce.relaxations(model):
            nn.init.normal_(r.term.weight, std=asymmetry / (POINTS * CHANNELS) ** 0.5)
    return model.requires_grad_(False)


def relax(model: nn.Module) -> nn.Module:
    points = ce.representations.permutation(POINTS, channels=CHANNELS)
    adapter = ce.adapters.linear(points, points, axes=(-2, -1))
    return ce.relax(model, where=lambda name, m: name.startswith("layers."), adapter=adapter)


def level(shape: str, steps: int) -> Any:
    if shape == "zero":
        return 0.0
    return getattr(ce.schedules, shape)(0.5, 0.0, round(0.8 * steps))


def train(setting: Setting, asymmetry: float, seed: int, steps: int) -> tuple[float, float, float]:
    """Return test loss after finalize, largest violation and largest multiplier."""
    torch.manual_seed(seed)
    source = teacher(asymmetry)
    x, test = torch.randn(SAMPLES, POINTS, CHANNELS), torch.randn(2_048, POINTS, CHANNELS)
    y = source(x) + 0.1 * torch.randn_like(x)
    model = DeepSet()
    optimizer: torch.optim.Optimizer
    monitor = None
    if setting.schedule == "none":
        optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    else:
        constraint = ce.constraints.weight(relax(model), level=level(setting.schedule, steps))
        base = torch.optim.Adam(ce.parameter_groups(model, lr=RATE, term_lr=setting.term_lr))
        optimizer = ce.ConstrainedOptimizer(base, constraint, **setting.options)
        monitor = Monitor(optimizer)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = torch.randint(SAMPLES, (64,))
        optimizer.zero_grad()
        (model(x[batch]) - y[batch]).square().mean().backward()
        optimizer.step()
        scheduler.step()
    worst = largest = 0.0
    if monitor is not None:
        history = monitor.history()
        worst, largest = float((history.values - history.levels).max()), float(history.multipliers.max())
        ce.finalize(model, optimizer=optimizer, on_violation="drop")
    with torch.no_grad():
        return float((model(test) - source(test)).square().mean()), worst, largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "| setting | symmetric: test loss | violation | multiplier | asymmetric: test loss | violation | multiplier |"
    )
    print("|---|---|---|---|---|---|---|")
    for setting in SETTINGS:
        cells = []
        for asymmetry in (0.0, 0.5):
            runs = [train(setting, asymmetry, seed, options.steps) for seed in range(options.seeds)]
            losses = [run[0] for run in runs]
            cells += [f"{mean(losses):.4f} ± {pstdev(losses):.4f}", *(f"{max(r[i] for r in runs):.2g}" for i in (1, 2))]
        print(f"| {setting.name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
