"""Constrained least squares on a real equivariant layer agrees with a convex solver."""

import numpy as np
import pytest
import torch

import constrained_equiv as ce

o3 = pytest.importorskip("e3nn.o3")
optimize = pytest.importorskip("scipy.optimize")


@pytest.mark.filterwarnings("ignore:.*lbfgs.*")
def test_least_squares_on_an_e3nn_layer(float64_default: None) -> None:
    """min || x M^T - y ||^2 / n over the layer and its term, || W || / sqrt(out) <= level: solved over all matrices M.

    M splits orthogonally into P M, which the layer holds, and W = M - P M.
    """
    irreps, level = "2x0e + 1x1o", 0.15
    model = ce.relax(o3.Linear(irreps, irreps))
    (relaxed,) = ce.relaxations(model)
    x, y = torch.randn(60, 5), torch.randn(60, 5)
    constraint = ce.constraints.weight(model, level=level)
    optimizer = ce.ConstrainedOptimizer(torch.optim.SGD(model.parameters(), lr=0.2), constraint)
    for _ in range(1_500):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    loss = (model(x) - y).square().mean().item()

    space = ce.intertwiners.intertwiners(irreps, irreps)

    def split(flat: np.ndarray) -> torch.Tensor:
        return space.complement(torch.from_numpy(flat.copy()).view(5, 5))

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        matrix = torch.from_numpy(flat.copy()).view(5, 5).requires_grad_()
        value = (x @ matrix.T - y).square().mean()
        (slope,) = torch.autograd.grad(value, matrix)
        return value.item(), slope.numpy().ravel()

    ball = {
        "type": "ineq",
        "fun": lambda m: 5 * level**2 - float(split(m).square().sum()),
        "jac": lambda m: -2 * split(m).numpy().ravel(),
    }
    best = optimize.minimize(
        objective, np.zeros(25), jac=True, constraints=[ball], method="SLSQP", options={"maxiter": 500, "ftol": 1e-14}
    )
    assert best.success
    assert loss == pytest.approx(best.fun, abs=1e-6)
    assert torch.allclose(relaxed.term.weight, split(best.x), atol=1e-3)
    # the gradient of the loss at the solution is the multiplier times that of the norm
    slope = objective(best.x)[1].reshape(5, 5)
    multiplier = np.linalg.norm(space.complement(torch.from_numpy(slope)).numpy()) * 5**0.5
    assert optimizer.readings().multipliers[0].item() == pytest.approx(multiplier, abs=1e-3)
