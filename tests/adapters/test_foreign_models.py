"""Models that nobody here wrote: relaxed as they are, trained, finalized, reloaded, and equivariant as before."""

import copy

import pytest
import torch
from torch import Tensor, nn

import constrained_equiv as ce
from constrained_equiv import groups

STEPS, LEVELS = 12, 8
ROUNDING = 1e-5
"""Of float32, through a few normalisations."""


def train(model: nn.Module, loss, *, rate: float = 1e-2) -> ce.ConstrainedOptimizer:
    """Relax and train: the level falls to 0 after `LEVELS` steps."""
    ce.relax(model)
    constraint = ce.constraints.weight(model, level=ce.schedules.linear(0.3, 0.0, LEVELS))
    optimizer = ce.ConstrainedOptimizer(torch.optim.Adam(ce.parameter_groups(model, lr=rate)), constraint)
    first = largest = None
    for step in range(STEPS):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.step()
        first = value.item() if first is None else first
        if step == 3:
            largest = max(r.term.weight.norm().item() for r in ce.relaxations(model))
    assert value.item() < first and largest > 1e-2
    return optimizer


def assert_reloads(model: nn.Module, untouched: nn.Module, data, error) -> None:
    """A finalized model is of the class, keys and dtypes it had, and as equivariant as its untouched twin."""
    assert [type(m).__name__ for m in model.modules()] == [type(m).__name__ for m in untouched.modules()]
    assert error(untouched) < ROUNDING
    untouched.load_state_dict(model.state_dict(), strict=True)
    assert all(a.dtype == b.dtype for a, b in zip(model.parameters(), untouched.parameters(), strict=True))
    assert error(untouched) < ROUNDING


def test_the_simple_network_of_e3nn():
    networks = pytest.importorskip("e3nn.nn.models.v2106.gate_points_networks")

    def build() -> nn.Module:
        return networks.SimpleNetwork(
            irreps_in="1x0e + 1x1o", irreps_out="2x0e + 1x1o", max_radius=2.0, num_neighbors=3.0, num_nodes=5.0,
            mul=4, layers=2, lmax=1,
        )  # fmt: skip

    generator = torch.Generator().manual_seed(0)
    data = {
        "pos": torch.randn(10, 3, generator=generator),
        "x": torch.randn(10, 4, generator=generator),
        "batch": torch.arange(10) // 5,
    }
    target = torch.randn(2, 5, generator=generator)
    symmetry = ce.Symmetry(groups.O3(), {"pos": "1x1o", "x": "1x0e + 1x1o", "batch": None}, "2x0e + 1x1o")
    model = build()

    def error(network: nn.Module) -> float:
        return ce.equivariance_error(network, data, symmetry=symmetry)

    optimizer = train(model, lambda network: (network(data) - target).square().mean())
    relaxed_layers = {r.name.rsplit(".", 1)[-1] for r in ce.relaxations(model)}
    assert {"sc", "lin1", "lin2", "tp"} <= relaxed_layers
    report = ce.finalize(model, optimizer=optimizer, batches=[data], symmetry=symmetry)
    assert report.error_after < 1e-5
    assert_reloads(model, build(), data, error)


class SteerableDigits(nn.Module):
    """A classifier of images as escnn's documentation builds one, smaller: mask, convolutions, antialiased pooling."""

    def __init__(self) -> None:
        super().__init__()
        from escnn import gspaces
        from escnn import nn as enn

        space = gspaces.rot2dOnR2(N=8)
        self.input_type = field = enn.FieldType(space, [space.trivial_repr])
        mask = enn.MaskModule(field, 29, margin=1)
        blocks = []
        for width, kernel, padding in ((2, 7, 1), (3, 5, 2)):
            out = enn.FieldType(space, width * [space.regular_repr])
            blocks.append(
                enn.SequentialModule(
                    *([mask] if field is self.input_type else []),
                    enn.R2Conv(field, out, kernel_size=kernel, padding=padding, bias=False),
                    enn.InnerBatchNorm(out),
                    enn.ReLU(out, inplace=True),
                )
            )
            blocks.append(enn.PointwiseAvgPoolAntialiased(out, sigma=0.66, stride=2))
            field = out
        self.blocks = nn.ModuleList(blocks)
        self.invariant = enn.GroupPooling(field)
        self.head = nn.Sequential(nn.Linear(field.size // 8, 8), nn.BatchNorm1d(8), nn.ELU(), nn.Linear(8, 3))

    def forward(self, images: Tensor) -> Tensor:
        x = self.input_type(images)
        for block in self.blocks:
            x = block(x)
        return self.head(self.invariant(x).tensor.mean((2, 3)))


def test_a_network_as_in_the_documentation_of_escnn():
    pytest.importorskip("escnn")
    plain = SteerableDigits()
    model, untouched = copy.deepcopy(plain), copy.deepcopy(plain)
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(12, 1, 29, 29, generator=generator), torch.arange(12) % 3
    symmetry = ce.Symmetry(groups.cyclic(4), inputs=ce.actions.pixels, outputs=None)

    def error(network: nn.Module) -> float:
        return ce.equivariance_error(network.eval(), images, symmetry=symmetry)

    keys = model.train().state_dict().keys()
    optimizer = train(model, lambda network: nn.functional.cross_entropy(network(images), labels))
    assert len(ce.relaxations(model)) == 2
    report = ce.finalize(model, optimizer=optimizer, batches=[images, images], symmetry=symmetry)
    assert report.recalibrated > 0 and model.training and model.state_dict().keys() == keys
    assert_reloads(model.eval(), untouched.eval(), images, error)


def test_the_networks_of_escnn_export_after_training():
    pytest.importorskip("escnn")
    model = SteerableDigits()
    images, labels = torch.randn(6, 1, 29, 29), torch.arange(6) % 3
    optimizer = train(model, lambda network: nn.functional.cross_entropy(network(images), labels))
    ce.finalize(model, optimizer=optimizer, batches=[images])
    x = model.input_type(images)
    block = model.eval().blocks[2]
    first = model.blocks[1](model.blocks[0](x))
    exported = block.export()
    torch.testing.assert_close(exported(first.tensor), block(first).tensor, rtol=1e-5, atol=1e-5)
