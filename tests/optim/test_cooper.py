"""Our step is Cooper's: for every formulation, type, dual and order, and a stock Cooper user can take our problem."""

import copy
import itertools
from typing import Any

import cooper
import pytest
import torch
from cooper.formulations import AugmentedLagrangian, Lagrangian, QuadraticPenalty
from torch import Tensor, nn

import constrained_equiv as ce
from tests.optim.toys import layers, minimise

FORMULATIONS = {
    "lagrangian": Lagrangian,
    "augmented_lagrangian": AugmentedLagrangian,
    "quadratic_penalty": QuadraticPenalty,
}
DUALS: dict[str, Any] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.3, maximize=True),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.5, maximize=True),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.05, maximize=True),
    "nupi": lambda ps: cooper.optim.nuPI(
        ps, lr=0.3, Kp=torch.tensor(2.0), init_type=cooper.optim.nuPIInitType.ZEROS, maximize=True
    ),
}
ORDERS = {
    "dual-primal": cooper.optim.AlternatingDualPrimalOptimizer,
    "simultaneous": cooper.optim.SimultaneousOptimizer,
    "primal-dual": cooper.optim.AlternatingPrimalDualOptimizer,
}
LEVEL, PENALTY, ROWS = 0.2, 0.7, 4


class Reference(cooper.ConstrainedMinimizationProblem):
    """The same problem as a Cooper user writes it, differentiated by autograd."""

    def __init__(
        self, weights: list[nn.Parameter], targets: list[Tensor], kind: str, formulation: Any, multiplier: Any = None
    ) -> None:
        super().__init__()
        self.weights, self.targets = weights, targets
        size, dtype = len(weights), torch.float64
        coefficient = None
        if formulation.expects_multiplier and multiplier is None:
            multiplier = cooper.multipliers.DenseMultiplier(init=torch.zeros(size, dtype=dtype), dtype=dtype)
        if formulation.expects_penalty_coefficient:
            coefficient = cooper.penalty_coefficients.DensePenaltyCoefficient(torch.full((size,), PENALTY, dtype=dtype))
        types = {"inequality": cooper.ConstraintType.INEQUALITY, "equality": cooper.ConstraintType.EQUALITY}
        self.constraint = cooper.Constraint(types[kind], formulation, multiplier, coefficient)

    def compute_cmp_state(self) -> cooper.CMPState:
        values = torch.stack([w.norm() for w in self.weights]) / ROWS**0.5
        loss = task(self.weights, self.targets)
        state = cooper.ConstraintState(
            values - LEVEL, contributes_to_dual_update=self.constraint.multiplier is not None
        )
        return cooper.CMPState(loss, {self.constraint: state})


def task(weights: list[nn.Parameter], targets: list[Tensor]) -> Tensor:
    return torch.stack([(w - t).square().sum() for w, t in zip(weights, targets, strict=True)]).sum()


def start(count: int = 3) -> tuple[nn.Module, list[nn.Parameter], list[Tensor], list[nn.Parameter]]:
    torch.manual_seed(0)
    model, terms = layers(*[(ROWS, 3)] * count)
    for term in terms:
        nn.init.normal_(term.weight)
    targets = [torch.randn(ROWS, 3, dtype=torch.float64) for _ in terms]
    copies = [nn.Parameter(term.weight.detach().clone()) for term in terms]
    return model, [term.weight for term in terms], targets, copies


def ours(model: nn.Module, kind: Any, penalty: float = PENALTY, **options: Any) -> ce.ConstrainedOptimizer:
    constraint = ce.constraints.weight(model, level=LEVEL, type=kind)
    base = torch.optim.Adam(model.parameters(), lr=0.05)
    return ce.ConstrainedOptimizer(base, constraint, penalty=penalty, **options)


CASES = [
    (formulation, kind, dual, order)
    for formulation, kind, dual, order in itertools.product(FORMULATIONS, ("inequality", "equality"), DUALS, ORDERS)
    if formulation != "quadratic_penalty" or (dual, order) == ("sgd", "dual-primal")
]


@pytest.mark.parametrize(("formulation", "kind", "dual", "order"), CASES)
def test_steps_equal_those_of_cooper(formulation: Any, kind: Any, dual: str, order: Any) -> None:
    model, weights, targets, copies = start()
    optimizer = ours(model, kind, formulation=formulation, dual=DUALS[dual], order=order)
    minimise(optimizer, lambda: task(weights, targets), 30)

    problem = Reference(copies, targets, kind, FORMULATIONS[formulation])
    primal = torch.optim.Adam(copies, lr=0.05)
    if formulation == "quadratic_penalty":
        roll = cooper.optim.UnconstrainedOptimizer(problem, primal)
    else:
        roll = ORDERS[order](problem, primal, DUALS[dual](list(problem.dual_parameters())))
    for _ in range(30):
        roll.roll()
    for own, other in zip(weights, copies, strict=True):
        assert torch.allclose(own, other, rtol=0, atol=1e-12)
    if formulation != "quadratic_penalty":
        theirs = problem.constraint.multiplier.weight
        assert torch.allclose(optimizer.readings().multipliers, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["inequality", "equality"])
@pytest.mark.parametrize("formulation", FORMULATIONS)
def test_the_closed_form_equals_the_path_through_cooper_bit_for_bit(formulation: str, kind: Any) -> None:
    """With a penalty that is a power of two, for Cooper divides by it and multiplies again."""
    found = []
    for how in (formulation, type("Custom", (FORMULATIONS[formulation],), {})):  # a subclass has no closed form here
        model, weights, targets, _ = start()
        optimizer = ours(model, kind, 0.5, formulation=how, dual_lr=0.3)
        minimise(optimizer, lambda w=weights, t=targets: task(w, t), 30)
        found.append([*weights, optimizer.readings().multipliers])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("order", ORDERS)
def test_stock_cooper_rolls_our_problem(order: Any) -> None:
    """The problem object of our optimizer, driven by Cooper's own loop, walks the same way."""
    model, weights, targets, copies = start()
    optimizer = ours(model, "inequality", order=order)
    minimise(optimizer, lambda: task(weights, targets), 20)

    other, _, _, _ = start()
    problem = ours(other, "inequality").multipliers.problem
    dual = torch.optim.SGD(list(problem.dual_parameters()), lr=PENALTY, maximize=True)
    roll = ORDERS[order](problem, torch.optim.Adam(copies, lr=0.05), dual)
    state = {
        "loss": lambda: task(copies, targets),
        "violations": lambda: {"inequality": torch.stack([w.norm() for w in copies]) / ROWS**0.5 - LEVEL},
    }
    for _ in range(20):
        roll.roll(compute_cmp_state_kwargs=state)
    for own, theirs in zip(weights, copies, strict=True):
        assert torch.allclose(own, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("formulation", ["augmented_lagrangian", "quadratic_penalty"])
def test_a_growing_penalty_grows_as_in_cooper(formulation: Any) -> None:
    model, weights, targets, copies = start()
    optimizer = ours(model, "inequality", formulation=formulation, dual_lr=0.3, penalty_growth=1.1)
    problem = Reference(copies, targets, "inequality", FORMULATIONS[formulation])
    updater = cooper.penalty_coefficients.MultiplicativePenaltyCoefficientUpdater(1.1, 1e-4, has_restart=False)
    for _ in range(20):
        minimise(optimizer, lambda: task(weights, targets), 1)
        # ours grows before the dual step that sees the same violation
        violations = torch.stack([w.norm() for w in copies]) / ROWS**0.5 - LEVEL
        updater.step({problem.constraint: cooper.ConstraintState(violations.detach())})
        primal = problem.compute_cmp_state()
        with torch.no_grad():
            for copy, own in zip(copies, weights, strict=True):
                copy.copy_(own)
        del primal
    expected = problem.constraint.penalty_coefficient.value
    assert float(expected.max()) > PENALTY
    assert torch.allclose(optimizer.multipliers.penalties, expected, rtol=1e-12)


def test_inequalities_and_equalities_share_one_problem() -> None:
    """Two types are two vector constraints; each walks as it does alone."""
    model, weights, targets, _ = start(4)
    names = [str(i) for i in range(4)]
    stated = [
        ce.constraints.weight(model, level=LEVEL, type="equality", where=lambda name: name in names[:2]),
        ce.constraints.weight(model, level=LEVEL, where=lambda name: name in names[2:]),
    ]
    base = torch.optim.Adam(model.parameters(), lr=0.05)
    both = ce.ConstrainedOptimizer(base, *stated, penalty=PENALTY)
    assert [record.type for record in both.constraints] == ["inequality", "equality"]
    assert len(list(both.multipliers.problem.constraints())) == 2
    minimise(both, lambda: task(weights, targets), 20)
    for kind, part in (("equality", slice(0, 2)), ("inequality", slice(2, 4))):
        alone, mine, targets, _ = start(4)
        record = ce.constraints.weight(alone, level=LEVEL, type=kind, where=lambda n, p=part: n in names[p])
        optimizer = ce.ConstrainedOptimizer(torch.optim.Adam(alone.parameters(), lr=0.05), record, penalty=PENALTY)
        minimise(optimizer, lambda w=mine, t=targets: task(w, t), 20)
        assert all(torch.equal(a, b) for a, b in zip(weights[part], mine[part], strict=True))


def test_a_problem_iterates_in_order_and_can_be_copied() -> None:
    import pickle

    model, *_ = start()
    problem = ours(model, "inequality").multipliers.problem
    for replica in (copy.deepcopy(problem), pickle.loads(pickle.dumps(problem))):
        assert [n for n, _ in replica.named_constraints()] == [n for n, _ in problem.named_constraints()]
        assert all(torch.equal(a, b) for a, b in zip(replica.dual_parameters(), problem.dual_parameters(), strict=True))


class Softplus(cooper.multipliers.Multiplier):
    """Multipliers that are positive by their parametrisation, so that no step has to be clipped."""

    expects_constraint_features = False

    def __init__(self, init: Tensor) -> None:
        super().__init__()
        self.raw = nn.Parameter(init - 2.0)

    def forward(self) -> Tensor:
        return nn.functional.softplus(self.raw)

    def post_step_(self) -> None:
        pass


class Damped(Lagrangian):
    """A formulation of one's own: half the pull."""

    def compute_contribution_to_primal_lagrangian(self, *args: Any, **kwargs: Any) -> Any:
        store = super().compute_contribution_to_primal_lagrangian(*args, **kwargs)
        return store._replace(lagrangian_contribution=0.5 * store.lagrangian_contribution)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("formulation", [Damped, Lagrangian, AugmentedLagrangian])
def test_formulations_and_multipliers_of_ones_own_plug_in(formulation: Any, order: Any) -> None:
    model, weights, targets, copies = start()
    optimizer = ours(model, "inequality", formulation=formulation, multiplier=Softplus, dual_lr=0.3, order=order)
    minimise(optimizer, lambda: task(weights, targets), 20)

    own = Softplus(torch.zeros(len(copies), dtype=torch.float64))
    problem = Reference(copies, targets, "inequality", formulation, own)
    dual = torch.optim.SGD(own.parameters(), lr=0.3, maximize=True)
    roll = ORDERS[order](problem, torch.optim.Adam(copies, lr=0.05), dual)
    for _ in range(20):
        roll.roll()
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(weights, copies, strict=True))
    found = optimizer.readings().multipliers
    assert torch.allclose(found, own().detach(), rtol=0, atol=1e-12) and (found > 0).all()

    again, other, _, _ = start()
    resumed = ours(again, "inequality", formulation=formulation, multiplier=Softplus, dual_lr=0.3, order=order)
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    minimise(optimizer, lambda: task(weights, targets), 3)
    minimise(resumed, lambda: task(other, targets), 3)
    assert all(torch.equal(a, b) for a, b in zip(weights, other, strict=True))
    assert torch.equal(optimizer.readings().multipliers, resumed.readings().multipliers)


@pytest.mark.parametrize(
    ("multiplier", "message"),
    [
        (lambda init: nn.Linear(1, 1), "expected a cooper.multipliers.Multiplier of 3 values"),
        (lambda init: cooper.multipliers.IndexedMultiplier(init=init), "without constraint features"),
        (lambda init: Softplus(init[:1]), r"shape \(1,\): expected \(3,\)"),
    ],
)
def test_multipliers_that_do_not_fit_are_refused(multiplier: Any, message: str) -> None:
    model, *_ = start()
    with pytest.raises(ce.errors.ConstraintError, match=message):
        ours(model, "inequality", multiplier=multiplier)


def test_a_price_bounds_coopers_own_multipliers_only() -> None:
    model, *_ = start()
    record = ce.constraints.resilient(ce.constraints.weight(model, level=0.0), price=0.1)
    with pytest.raises(ce.errors.ConstraintError, match="leave multiplier= out"):
        ce.ConstrainedOptimizer(torch.optim.Adam(model.parameters()), record, multiplier=Softplus)


def test_stock_cooper_rolls_a_resilient_problem() -> None:
    """Slacks are solved for before Cooper sees the violations; a caller of `roll` does the same."""
    model, weights, targets, copies = start()
    record = ce.constraints.resilient(ce.constraints.weight(model, level=LEVEL), cost="quadratic", price=0.5)
    optimizer = ce.ConstrainedOptimizer(
        torch.optim.Adam(model.parameters(), lr=0.05), record, penalty=PENALTY, order="simultaneous"
    )
    minimise(optimizer, lambda: task(weights, targets), 20)

    other, _, _, _ = start()
    multipliers = ours(other, "inequality").multipliers

    def violations() -> dict[str, Tensor]:
        excess = torch.stack([w.norm() for w in copies]) / ROWS**0.5 - LEVEL
        slack = record.slack.solve(multipliers.values, excess.detach(), multipliers.penalties, False)
        return {"inequality": excess - slack}

    dual = torch.optim.SGD(list(multipliers.problem.dual_parameters()), lr=PENALTY, maximize=True)
    roll = ORDERS["simultaneous"](multipliers.problem, torch.optim.Adam(copies, lr=0.05), dual)
    for _ in range(20):
        roll.roll(compute_cmp_state_kwargs={"loss": lambda: task(copies, targets), "violations": violations})
    assert (optimizer.readings().slacks > 0).all()
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(weights, copies, strict=True))
    assert torch.allclose(optimizer.readings().multipliers, multipliers.values, rtol=0, atol=1e-12)
