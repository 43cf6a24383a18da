"""Constrained least squares on real equivariant layers agrees with a convex solver."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import constrained_equiv as ce
from constrained_equiv.intertwiners import Intertwiners

optimize = pytest.importorskip("scipy.optimize")


def e3nn_layer() -> tuple[nn.Module, Intertwiners, int]:
    """Irreps of O(3), whose weights the layer normalises in its own way."""
    o3 = pytest.importorskip("e3nn.o3")
    irreps = "2x0e + 1x1o"
    return ce.relax(o3.Linear(irreps, irreps)), ce.intertwiners.intertwiners(irreps, irreps), 60


def own_layer() -> tuple[nn.Module, Intertwiners, int]:
    """Four points of one channel: the layer itself has two weights, the term sixteen entries."""
    points = ce.representations.permutation(4)

    class Sets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.each, self.all = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(0.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.each * x + self.all * x.mean(-1, keepdim=True)

    adapter = ce.adapters.linear(points, points)
    model = ce.relax(Sets(), where=lambda name, layer: True, adapter=adapter)
    return model, ce.intertwiners.intertwiners(points, points), 60


@pytest.mark.filterwarnings("ignore:.*lbfgs.*")
@pytest.mark.parametrize("level", [0.1, 10.0])
@pytest.mark.parametrize("build", [e3nn_layer, own_layer])
def test_least_squares_on_a_layer(build: Any, level: float, float64_default: None) -> None:
    """min || x M^T - y ||^2 / n over the layer and its term, || W || / sqrt(out) <= level: solved over all matrices M.

    M splits orthogonally into P M, which the layer holds, and W = M - P M. The last level is inactive.
    """
    model, space, samples = build()
    (relaxed,) = ce.relaxations(model)
    size = relaxed.term.weight.shape[0]
    x, y = torch.randn(samples, size), torch.randn(samples, size)
    constraint = ce.constraints.weight(model, level=level)
    optimizer = ce.ConstrainedOptimizer(torch.optim.SGD(model.parameters(), lr=0.2), constraint)
    for _ in range(1_000):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    loss = (model(x) - y).square().mean().item()

    def split(flat: np.ndarray) -> torch.Tensor:
        return space.complement(torch.from_numpy(flat.copy()).view(size, size))

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        matrix = torch.from_numpy(flat.copy()).view(size, size).requires_grad_()
        value = (x @ matrix.T - y).square().mean()
        (slope,) = torch.autograd.grad(value, matrix)
        return value.item(), slope.numpy().ravel()

    ball = {
        "type": "ineq",
        "fun": lambda m: size * level**2 - float(split(m).square().sum()),
        "jac": lambda m: -2 * split(m).numpy().ravel(),
    }
    options = {"maxiter": 500, "ftol": 1e-14}
    best = optimize.minimize(
        objective, np.zeros(size**2), jac=True, constraints=[ball], method="SLSQP", options=options
    )
    assert best.success
    assert loss == pytest.approx(best.fun, abs=1e-6)
    assert torch.allclose(relaxed.term.weight, split(best.x), atol=1e-3)
    # the gradient of the loss at the solution is the multiplier times that of the norm
    slope = objective(best.x)[1].reshape(size, size)
    multiplier = np.linalg.norm(space.complement(torch.from_numpy(slope)).numpy()) * size**0.5
    assert optimizer.readings().multipliers[0].item() == pytest.approx(multiplier, abs=1e-3)
    assert (multiplier < 1e-6) == (level == 10.0)
