"""Problems whose solutions are known: primal, multiplier and slack, within tolerance."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import constrained_equiv as ce
from tests.optim.toys import irreps, layers, minimise, multipliers

SGD = {"lr": 0.1}


def pulled_to(terms: list[Any], targets: list[Tensor], curvature: float = 1.0) -> Any:
    """sum of curvature / 2 || W - target ||^2."""
    return lambda: sum(
        0.5 * curvature * (term.weight - target).square().sum() for term, target in zip(terms, targets, strict=True)
    )


ROUTES = {
    "augmented": {},
    "augmented, simultaneous": {"order": "simultaneous"},
    "augmented, primal-dual": {"order": "primal-dual"},
    "augmented, own dual rate": {"dual_lr": 0.2},
    "growing penalty": {"penalty": 0.1, "penalty_growth": 1.01},
    "lagrangian": {"formulation": "lagrangian", "dual_lr": 0.1},
    "lagrangian with nuPI": {"formulation": "lagrangian", "dual": "nupi", "dual_lr": 0.1},
    "proximal": {"enforce": "proximal"},
}


@pytest.mark.parametrize("options", ROUTES.values(), ids=ROUTES.keys())
def test_a_quadratic_over_balls_has_its_closed_form_solution(options: dict[str, Any]) -> None:
    """One ball is active, one is not: W = A min(1, radius / ||A||), lambda = sqrt(rows) (||A|| - radius)_+."""
    model, terms = layers((4, 3), (4, 3))
    targets = [torch.randn(4, 3, dtype=torch.float64) for _ in terms]
    targets = [target * (size / target.norm()) for target, size in zip(targets, (3.0, 0.5), strict=True)]
    level = 0.5  # radius 0.5 * sqrt(4) = 1
    constraint = ce.constraints.weight(model, level=level)
    optimizer = ce.ConstrainedOptimizer(torch.optim.SGD(model.parameters(), **SGD), constraint, **options)
    minimise(optimizer, pulled_to(terms, targets), 800)
    assert torch.allclose(terms[0].weight, targets[0] / 3.0, atol=1e-6)
    assert torch.allclose(terms[1].weight, targets[1], atol=1e-6)
    assert torch.allclose(multipliers(optimizer), torch.tensor([2.0 * (3.0 - 1.0), 0.0]).double(), atol=1e-5)


def test_projection_finds_the_same_primal_solution() -> None:
    model, terms = layers((4, 3))
    target = torch.randn(4, 3, dtype=torch.float64)
    constraint = ce.constraints.weight(model, level=0.1)
    base = torch.optim.SGD(model.parameters(), **SGD)
    optimizer = ce.ConstrainedOptimizer(base, constraint, enforce="projection")
    for _ in range(200):
        optimizer.zero_grad()
        pulled_to(terms, [target])().backward()
        optimizer.step()
        assert terms[0].weight.norm() <= 0.2 * (1 + 1e-12)  # feasible at all times
    assert torch.allclose(terms[0].weight, target * 0.2 / target.norm(), atol=1e-12)


@pytest.mark.parametrize("enforce", ["projection", "proximal", "multipliers"])
def test_nothing_moves_at_the_origin(enforce: Any) -> None:
    """W = 0 without a task: every route has the sub-gradient 0 there, and none divides by zero."""
    model, terms = layers((4, 3))
    constraint = ce.constraints.weight(model, level=0.0)
    base = torch.optim.Adam(model.parameters())
    optimizer = ce.ConstrainedOptimizer(base, constraint, enforce=enforce, at_zero="multipliers")
    minimise(optimizer, lambda: (0.0 * terms[0].weight).sum(), 3)
    assert torch.equal(terms[0].weight, torch.zeros(4, 3, dtype=torch.float64))


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.Adam])
def test_proximal_steps_reach_exact_zero_in_finite_time(base: Any) -> None:
    model, terms = layers((4, 3))
    target = torch.full((4, 3), 0.3, dtype=torch.float64)
    optimizer = ce.ConstrainedOptimizer(
        base(model.parameters(), lr=0.05),
        ce.constraints.weight(model, level=0.0),
        enforce="proximal",
        at_zero="multipliers",
    )
    minimise(optimizer, pulled_to(terms, [target]), 800)
    assert torch.equal(terms[0].weight, torch.zeros_like(target))


def test_a_level_that_falls_to_zero_ends_in_exact_zero_without_wind_up() -> None:
    model, terms = layers((4, 3))
    target = torch.full((4, 3), 0.3, dtype=torch.float64)
    constraint = ce.constraints.weight(model, level=ce.schedules.cosine(0.5, 0.0, 400))
    optimizer = ce.ConstrainedOptimizer(torch.optim.Adam(model.parameters(), lr=0.02), constraint)
    minimise(optimizer, pulled_to(terms, [target]), 450, decay=True)
    assert torch.equal(terms[0].weight, torch.zeros_like(target))
    true = math.sqrt(4) * float(target.norm())
    assert 0 < float(multipliers(optimizer)[0]) < 1.5 * true


@pytest.mark.parametrize("signed", [1.0, -1.0])
def test_equality_of_a_gate_has_a_signed_multiplier(signed: float) -> None:
    """min 1/2 (gamma - a)^2 subject to gamma = 0.2: lambda = a - 0.2, of either sign."""
    model, terms = layers((2, 2), gate=True)
    constraint = ce.constraints.gate(model, level=0.2)
    optimizer = ce.ConstrainedOptimizer(torch.optim.SGD(model.parameters(), **SGD), constraint)
    minimise(optimizer, lambda: 0.5 * (terms[0].gate - signed).square(), 500)
    assert torch.allclose(terms[0].gate, torch.tensor(0.2).double(), atol=1e-8)
    assert torch.allclose(multipliers(optimizer), torch.tensor([signed - 0.2]).double(), atol=1e-8)


@pytest.mark.parametrize("size", [3.0, 0.1])
def test_equality_of_a_norm_holds_from_both_sides(size: float) -> None:
    """min 1/2 || W - A ||^2 subject to || W || = 1: W = A / || A ||, lambda = sqrt(rows) (|| A || - 1)."""
    model, terms = layers((4, 3))
    target = torch.randn(4, 3, dtype=torch.float64)
    target *= size / target.norm()
    with torch.no_grad():
        terms[0].weight.copy_(target)
    constraint = ce.constraints.weight(model, level=0.5, type="equality")
    optimizer = ce.ConstrainedOptimizer(torch.optim.SGD(model.parameters(), **SGD), constraint)
    minimise(optimizer, pulled_to(terms, [target]), 800)
    assert torch.allclose(terms[0].weight, target / size, atol=1e-6)
    assert torch.allclose(multipliers(optimizer), torch.tensor([2.0 * (size - 1.0)]).double(), atol=1e-6)


ENFORCED = {"multipliers": {}, "projection": {"enforce": "projection"}, "proximal": {"enforce": "proximal"}}


@pytest.mark.parametrize("options", ENFORCED.values(), ids=ENFORCED.keys())
def test_a_quadratic_over_blocks_has_one_active_and_one_inactive(options: dict[str, Any]) -> None:
    """Two blocks of one term: each is A min(1, radius / || A ||) with lambda = sqrt(rows) (|| A || - radius)_+."""
    model = nn.Linear(4, 5, dtype=torch.float64)
    ce.relax(model, where=lambda name, m: True, adapter=ce.adapters.linear("1x0e + 1x1o", "2x0o + 1x1e"))
    term = model.non_equivariant
    record = ce.constraints.weight(model, level=0.5, per="block")  # radius 0.5 sqrt(5)
    assert len(record.entries) == 4
    target = torch.randn(5, 4, dtype=torch.float64)
    sizes = [3.0, 0.5, 2.0, 1.0]
    places = [(rows, columns) for rows in (slice(0, 2), slice(2, 5)) for columns in (slice(0, 1), slice(1, 4))]
    for place, size in zip(places, sizes, strict=True):
        target[place] *= size / target[place].norm()
    optimizer = ce.ConstrainedOptimizer(torch.optim.SGD(model.parameters(), **SGD), record, **options)
    minimise(optimizer, pulled_to([term], [target]), 800)
    radius = 0.5 * math.sqrt(5)
    for place, size in zip(places, sizes, strict=True):
        assert torch.allclose(term.weight[place], target[place] * min(1.0, radius / size), atol=1e-6)
    if options.get("enforce") != "projection":
        expected = torch.tensor([math.sqrt(5) * max(size - radius, 0.0) for size in sizes]).double()
        assert torch.allclose(multipliers(optimizer), expected, atol=1e-5)


@pytest.mark.parametrize("enforce", ["multipliers", "projection"])
def test_a_shared_ball_shrinks_all_layers_alike(enforce: Any) -> None:
    """N layers of equal size in one ball of radius level sqrt(N rows): W = A radius / || A || over all of them."""
    model, terms = layers((4, 3), (4, 3), (4, 3))
    targets = [torch.randn(4, 3, dtype=torch.float64) for _ in terms]
    size, radius = float(torch.cat(targets).norm()), 0.2 * math.sqrt(3 * 4)
    constraint = ce.constraints.weight(model, level=0.2, per="model")
    base = torch.optim.SGD(model.parameters(), **SGD)
    optimizer = ce.ConstrainedOptimizer(base, constraint, enforce=enforce)
    minimise(optimizer, pulled_to(terms, targets), 2_000)
    for term, target in zip(terms, targets, strict=True):
        assert torch.allclose(term.weight, target * radius / size, atol=1e-6)
    if enforce == "multipliers":
        assert float(multipliers(optimizer)) == pytest.approx(math.sqrt(12) * (size - radius), abs=1e-4)


def test_layers_of_different_size_share_an_ellipsoid() -> None:
    """W_i = A_i / (1 + lambda / (N rows_i level)), with lambda such that the shared value is the level."""
    model, terms = layers((4, 3), (9, 2))
    targets = [torch.randn(term.weight.shape, dtype=torch.float64) for term in terms]
    optimizer = ce.ConstrainedOptimizer(
        torch.optim.SGD(model.parameters(), **SGD), ce.constraints.weight(model, level=0.2, per="model")
    )
    minimise(optimizer, pulled_to(terms, targets), 4_000)
    (multiplier,) = multipliers(optimizer).tolist()
    assert float(optimizer.readings().values) == pytest.approx(0.2, abs=1e-6) and multiplier > 1
    for term, target in zip(terms, targets, strict=True):
        assert torch.allclose(term.weight, target / (1 + multiplier / (2 * term.rows * 0.2)), atol=1e-5)


@pytest.mark.parametrize("options", ENFORCED.values(), ids=ENFORCED.keys())
def test_what_breaks_a_subgroup_is_held_and_the_rest_is_free(options: dict[str, Any]) -> None:
    """W = P_H A + (A - P_H A) min(1, radius / || A - P_H A ||), in the complement."""
    model = irreps(1)
    term = model[0].non_equivariant
    target = term.projection.complement(torch.randn(11, 9, dtype=torch.float64))
    broken = term.projection.restricted(ce.groups.SO3()).complement(target)
    constraint = ce.constraints.subgroup(model, ce.groups.SO3(), level=0.5)
    optimizer = ce.ConstrainedOptimizer(torch.optim.SGD(model.parameters(), **SGD), constraint, **options)
    minimise(optimizer, pulled_to([term], [target]), 1_000)
    radius, size = 0.5 * math.sqrt(11), float(broken.norm())
    assert torch.allclose(term.weight, target - broken * (1 - radius / size), atol=1e-6)
    if options.get("enforce") != "projection":
        assert float(multipliers(optimizer)) == pytest.approx(math.sqrt(11) * (size - radius), abs=1e-4)


def test_generators_are_held_one_by_one() -> None:
    """Scalars to pseudoscalars: only the inversion is broken, by 2 W; the rotations have no multiplier."""
    model, terms = layers((1, 1))
    constraint = ce.constraints.lie(model, level=0.5, per="generator")
    optimizer = ce.ConstrainedOptimizer(torch.optim.SGD(model.parameters(), **SGD), constraint)
    minimise(optimizer, pulled_to(terms, [torch.ones(1, 1).double()]), 800)
    assert float(terms[0].weight.detach()) == pytest.approx(0.25, abs=1e-6)
    assert torch.allclose(multipliers(optimizer), torch.tensor([0.0, 0.0, 0.0, 0.375]).double(), atol=1e-6)


# --- ridge and resilience ---


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_the_quadratic_penalty_is_ridge(weight: float) -> None:
    """1/2 || W - A ||^2 + (c / 2) || W ||^2 / rows has the solution A / (1 + c / rows)."""
    model, terms = layers((4, 3))
    target = torch.randn(4, 3, dtype=torch.float64)
    optimizer = ce.ConstrainedOptimizer(
        torch.optim.SGD(model.parameters(), **SGD),
        ce.constraints.weight(model, level=0.0),
        formulation="quadratic_penalty",
        penalty=weight,
        at_zero="multipliers",
    )
    minimise(optimizer, pulled_to(terms, [target]), 500)
    assert torch.allclose(terms[0].weight, target / (1 + weight / 4), atol=1e-10)


@pytest.mark.parametrize("formulation", ["lagrangian", "augmented_lagrangian"])
@pytest.mark.parametrize("kind", ["inequality", "equality"])
def test_resilience_with_quadratic_cost_is_ridge(formulation: Any, kind: Any) -> None:
    """J = 1/2 (gamma - 0.6)^2 with price 1: gamma = u = lambda = 0.3, for inequalities and equalities alike."""
    model, terms = layers((1, 1), gate=True)
    constraint = ce.constraints.resilient(ce.constraints.gate(model, type=kind), cost="quadratic", price=1.0)
    base = torch.optim.SGD(model.parameters(), **SGD)
    optimizer = ce.ConstrainedOptimizer(base, constraint, formulation=formulation, dual_lr=0.1)
    minimise(optimizer, lambda: 0.5 * (terms[0].gate - 0.6).square(), 800)
    now = optimizer.readings()
    for found in (terms[0].gate.detach(), now.slacks[0], now.multipliers[0]):
        assert float(found) == pytest.approx(0.3, abs=1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(("target", "gate", "multiplier"), [(0.6, 0.4, 0.2), (0.15, 0.0, 0.15)])
def test_linear_cost_saturates_at_the_price(target: float, gate: float, multiplier: float, sign: float) -> None:
    """min 1/2 (gamma - a)^2 + 0.2 u, |gamma| <= u: asymmetry that is worth less than its price ends at 0."""
    model, terms = layers((1, 1), gate=True)
    constraint = ce.constraints.resilient(ce.constraints.gate(model), cost="linear", price=0.2)
    optimizer = ce.ConstrainedOptimizer(torch.optim.SGD(model.parameters(), **SGD), constraint)
    for _ in range(500):
        minimise(optimizer, lambda: 0.5 * (terms[0].gate - sign * target).square(), 1)
        assert float(multipliers(optimizer).abs()) <= 0.2 + 1e-12
    assert float(terms[0].gate.detach()) == pytest.approx(sign * gate, abs=1e-6)
    assert float(multipliers(optimizer)[0]) == pytest.approx(sign * multiplier, abs=1e-6)


def test_a_shared_budget_goes_to_the_layers_that_need_it_most() -> None:
    """min sum 1/2 (v_i - a_i)^2 with sum v_i <= 1, v >= 0: the projection of a onto the simplex."""
    model, terms = layers((1, 1), (1, 1), (1, 1))
    wanted = [0.9, 0.7, 0.1]
    constraint = ce.constraints.resilient(ce.constraints.weight(model, level=0.0), cost="budget", price=1.0)
    optimizer = ce.ConstrainedOptimizer(torch.optim.SGD(model.parameters(), **SGD), constraint)
    minimise(optimizer, pulled_to(terms, [torch.full((1, 1), a).double() for a in wanted]), 1_500, decay=True)
    now = optimizer.readings()
    expected = torch.tensor([0.6, 0.4, 0.0]).double()
    assert torch.allclose(torch.cat([t.weight.detach().flatten() for t in terms]), expected, atol=1e-3)
    assert torch.allclose(now.slacks, expected, atol=1e-3)
    assert torch.allclose(now.multipliers[:2], torch.tensor([0.3, 0.3]).double(), atol=5e-3)


def test_an_ample_budget_changes_nothing() -> None:
    model, terms = layers((1, 1), (1, 1))
    constraint = ce.constraints.resilient(ce.constraints.weight(model, level=0.0), cost="budget", price=5.0)
    optimizer = ce.ConstrainedOptimizer(torch.optim.SGD(model.parameters(), **SGD), constraint)
    minimise(optimizer, pulled_to(terms, [torch.full((1, 1), a).double() for a in (0.9, 0.7)]), 500)
    assert torch.allclose(torch.cat([t.weight.detach().flatten() for t in terms]), torch.tensor([0.9, 0.7]).double())
    assert torch.equal(multipliers(optimizer), torch.zeros(2).double())


# --- where METHOD predicts failure ---


def _gate_after(steps: int, **options: Any) -> float:
    """The largest |gamma| in the last tenth, of min 0.01 / 2 gamma^2 from gamma = 1, at equal rates 0.01."""
    model, terms = layers((1, 1), gate=True)
    (term,) = terms
    base = torch.optim.SGD([p for t in terms for p in t.parameters()], lr=0.01)
    optimizer = ce.ConstrainedOptimizer(base, ce.constraints.gate(model), dual_lr=0.01, **options)
    largest = 0.0
    for step in range(steps):
        term.gate.grad = 0.01 * term.gate.detach()
        optimizer.step()
        if step >= 0.9 * steps:
            largest = max(largest, abs(float(term.gate.detach())))
    return largest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "steps", "amplitude"),
    [
        ({"formulation": "lagrangian", "order": "simultaneous"}, 20_000, 1.0),
        ({"formulation": "lagrangian", "order": "dual-primal"}, 20_000, 0.40),
        ({"penalty": 1.0, "order": "simultaneous"}, 6_000, 0.0),
        ({"penalty": 1.0}, 6_000, 0.0),
    ],
    ids=["simultaneous", "alternating", "augmented, simultaneous", "augmented, alternating"],
)
def test_the_flat_gate_of_the_plain_method_and_its_cure(options: dict[str, Any], steps: int, amplitude: float) -> None:
    """Simultaneous steps turn in circles for ever, alternating ones contract slowly, an augmented term ends it."""
    assert _gate_after(steps, **options) == pytest.approx(amplitude, abs=0.015 if amplitude else 1e-11)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("penalty", [1.0, 10.0])
def test_a_norm_far_above_its_level_is_not_thrown_across_zero(penalty: float, momentum: float) -> None:
    """The multiplier that brings W down is too large when it arrives: each leap over zero would feed it further."""
    model, terms = layers((1, 1))
    torch.nn.init.ones_(terms[0].weight)
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=momentum)
    optimizer = ce.ConstrainedOptimizer(base, ce.constraints.weight(model, level=0.05), penalty=penalty)
    for _ in range(1_200):
        minimise(optimizer, lambda: 5e-4 * terms[0].weight.square().sum(), 1)
        assert terms[0].weight.abs() < 1.5
    assert terms[0].weight.abs() <= 0.05 and torch.equal(multipliers(optimizer), torch.zeros(1).double())


EVERY_MEASURE: dict[str, Any] = {
    "weight": ce.constraints.weight,
    "blocks": lambda m, level: ce.constraints.weight(m, level=level, per="block"),
    "shared": lambda m, level: ce.constraints.weight(m, level=level, per="model"),
    "non-equivariant part": lambda m, level: ce.constraints.weight(m, level=level, part="non_equivariant"),
    "lie": ce.constraints.lie,
    "generators": lambda m, level: ce.constraints.lie(m, level=level, per="generator"),
    "subgroup": lambda m, level: ce.constraints.subgroup(m, ce.groups.SO3(), level=level),
    "custom": lambda m, level: ce.constraints.custom(m, lambda t: t.weight.norm(), name="norm", level=level),
}


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.ASGD])
@pytest.mark.parametrize("penalty", [1.0, 10.0])
@pytest.mark.parametrize("measure", EVERY_MEASURE)
def test_no_measure_is_thrown_across_zero(measure: str, penalty: float, base: Any) -> None:
    model = irreps(2, complement=measure != "non-equivariant part")
    for r in ce.relaxations(model):
        with torch.no_grad():
            r.term.weight.mul_(1.0 / r.term.weight.norm())
    record = EVERY_MEASURE[measure](model, level=0.05)
    optimizer = ce.ConstrainedOptimizer(base(model.parameters(), lr=0.05), record, penalty=penalty)
    start = float(record.measure.values(record.terms).max())
    for _ in range(20):
        minimise(optimizer, lambda: 5e-3 * sum(r.term.weight.square().sum() for r in ce.relaxations(model)), 50)
        assert float(optimizer.readings().values.max()) < 1.2 * start
    assert float(optimizer.readings().values.max()) <= 0.05 + 1e-2


def test_terms_above_zero_of_two_subgroups_reach_what_both_leave() -> None:
    """Two projections that do not commute: one after the other ends in neither space."""
    model = irreps(1)
    turns = ce.groups.SO3().algebra
    records = [
        ce.constraints.subgroup(model, ce.groups.matrix_group(f"about {axis}", algebra=turns[[axis]]), level=0.0)
        for axis in (0, 2)
    ]
    optimizer = ce.ConstrainedOptimizer(torch.optim.Adam(model.parameters(), lr=0.05), *records)
    (term,) = (r.term for r in ce.relaxations(model))
    minimise(optimizer, pulled_to([term], [torch.randn_like(term.weight).detach()]), 100)
    for record in records:
        assert float(record.measure.values(record.terms)) < 1e-6


def test_proximal_steps_of_gates_take_the_rate_of_gates() -> None:
    """The multiplier is 1 after the first step, and so is the penalty's part."""
    model, (term,) = layers((2, 2), free=True, gate=True)
    groups = [{"params": [term.weight], "lr": 0.1}, {"params": [term.gate], "lr": 1e-3}]
    record = ce.constraints.gate(model, level=0.0)
    optimizer = ce.ConstrainedOptimizer(torch.optim.SGD(groups), record, enforce="proximal", penalty=1.0)
    for parameter in (term.weight, term.gate):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert float(term.gate.detach()) == pytest.approx(1 - 1e-3 * 2, abs=1e-12)


def test_a_step_that_is_shortened_ends_where_the_gradient_vanishes() -> None:
    """Rate times slope exceeds the level: the steps are too coarse for the ball, its solution stands all the same."""
    model, terms = layers((1, 1))
    constraint = ce.constraints.weight(model, level=0.1)
    optimizer = ce.ConstrainedOptimizer(torch.optim.SGD(model.parameters(), **SGD), constraint)
    minimise(optimizer, pulled_to(terms, [torch.full((1, 1), 3.0).double()]), 1_000)
    assert float(terms[0].weight.detach()) == pytest.approx(0.1, abs=1e-6)
    assert float(multipliers(optimizer)) == pytest.approx(2.9, abs=1e-4)
