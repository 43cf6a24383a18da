"""Trap 18: a branch for equalities ignored the resilient option, and the slack was subtracted twice.

The toy is J = 1/2 (gamma - 0.6)^2 with the cost u^2 / 2 of the slack |gamma| <= u: then gamma = u = lambda = 0.3, which
is ridge of weight 1.
"""

import pytest
import torch

import constrained_equiv as ce
from tests.optim.toys import layers, minimise


def wrong(target, *, branch, steps=4_000, rate=0.02):
    """Simultaneous descent in gamma and u, ascent in lambda >= 0, as the published codes took them."""
    gamma, slack, multiplier = 1.0, 0.0, 0.0
    for _ in range(steps):
        sign = 1.0 if gamma > 0 else -1.0
        if branch == "level 0 first":  # the violation is the signed gamma, whatever the resilient option says
            violation, pull = gamma, multiplier
        elif branch == "slack twice":
            violation, pull = abs(gamma) - 2 * slack, multiplier * sign
        else:
            violation, pull = abs(gamma) - slack, multiplier * sign
        gamma -= rate * (gamma - target + pull)
        slack -= rate * (slack - multiplier)
        multiplier = max(0.0, multiplier + rate * violation)
    return gamma


def test_the_published_branches_miss_the_solution():
    assert wrong(0.6, branch="as published in the text") == pytest.approx(0.3, abs=1e-3)
    assert wrong(0.6, branch="level 0 first") == pytest.approx(0.0, abs=1e-2)  # no resilience at all
    assert wrong(-0.6, branch="level 0 first") == pytest.approx(-0.6, abs=1e-3)  # and no constraint below zero
    assert wrong(0.6, branch="slack twice") == pytest.approx(0.4, abs=1e-3)  # ridge of half the weight


def solve(target, *, kind, level=0.0):
    model, terms = layers((1, 1), gate=True)
    stated = ce.constraints.gate(model, type=kind, level=level)
    resilient = ce.constraints.resilient(stated, cost="quadratic", price=1.0)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = ce.ConstrainedOptimizer(base, resilient, dual_lr=0.1)
    minimise(optimizer, lambda: 0.5 * (terms[0].gate - target).square(), 1_500)
    return float(terms[0].gate.detach()), optimizer.readings()


@pytest.mark.parametrize("target", [0.6, -0.6])
@pytest.mark.parametrize("kind", ["equality", "inequality"])
def test_equalities_and_inequalities_give_way_alike_on_both_sides(kind, target):
    gamma, now = solve(target, kind=kind)
    assert gamma == pytest.approx(target / 2, abs=1e-5)
    assert abs(float(now.slacks)) == pytest.approx(0.3, abs=1e-5)
    assert abs(float(now.multipliers)) == pytest.approx(0.3, abs=1e-5)


@pytest.mark.parametrize("level", [0.0, 0.1, 0.4])
def test_the_slack_is_subtracted_once_whatever_the_level(level):
    """min 1/2 (gamma - 0.6)^2 + 1/2 u^2, |gamma| <= level + u: gamma = (0.6 + level) / 2."""
    gamma, now = solve(0.6, kind="inequality", level=level)
    assert gamma == pytest.approx((0.6 + level) / 2, abs=1e-5)
    assert float(now.values - now.levels) == pytest.approx(float(now.slacks), abs=1e-5)
