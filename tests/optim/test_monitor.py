"""The monitor records without reading, judges rightly, keeps true copies and never stops early."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

import constrained_equiv as ce
from constrained_equiv.monitor import BestModel, EarlyStopping, Monitor
from tests.optim.test_cost import Operations
from tests.optim.test_setups import Net, data, train, wrap
from tests.optim.toys import layers, minimise


def flat_gate(curvature: float, target: float, steps: int, every: int = 10, **options: Any) -> Monitor:
    """A gate whose loss has little curvature: the toy on which plain simultaneous ascent turns in circles."""
    model, terms = layers((1, 1), gate=True)
    base = torch.optim.SGD([p for t in terms for p in t.parameters()], lr=0.05)
    optimizer = ce.ConstrainedOptimizer(base, ce.constraints.gate(model), **options)
    monitor = Monitor(optimizer, every=every)
    minimise(optimizer, lambda: 0.5 * curvature * (terms[0].gate - target).square(), steps)
    return monitor


def resisting_norm(**options: Any) -> Monitor:
    """A term that the data want at 1, pushed to 0 by a multiplier that is too slow to get there."""
    model, terms = layers((1, 1))
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    constraint = ce.constraints.weight(model, level=0.0)
    optimizer = ce.ConstrainedOptimizer(base, constraint, at_zero="multipliers", **options)
    monitor = Monitor(optimizer, every=10)
    minimise(optimizer, lambda: 5.0 * (terms[0].weight - 1.0).square().sum(), 600)
    return monitor


SLOW = {"formulation": "lagrangian", "dual_lr": 0.05}


def resisting_gate(**options: Any) -> Monitor:
    """A gate that the data want at 1, held at 0."""
    return flat_gate(1.0, 1.0, 600, **options)


def flat_norm(**options: Any) -> Monitor:
    """A norm on a loss of little curvature: it is never negative, so that it cannot turn in circles."""
    model, terms = layers((1, 1))
    torch.nn.init.ones_(terms[0].weight)
    base = torch.optim.SGD(model.parameters(), lr=0.05)
    constraint = ce.constraints.weight(model, level=0.0)
    optimizer = ce.ConstrainedOptimizer(base, constraint, at_zero="multipliers", **options)
    monitor = Monitor(optimizer, every=10)
    minimise(optimizer, lambda: 0.0005 * terms[0].weight.square().sum(), 1_500)
    return monitor


PLAIN = {**SLOW, "order": "simultaneous"}
TOYS = [
    ("flat gate, plain", lambda: flat_gate(0.001, 0.0, 1_500, **PLAIN), {"cycling"}),
    ("flat gate, augmented", lambda: flat_gate(0.001, 0.0, 1_500), {"active", "inactive", "zero"}),
    ("resisting gate, plain", lambda: resisting_gate(**PLAIN), {"active"}),
    ("resisting gate, augmented", lambda: resisting_gate(), {"active"}),
    ("resisting norm, plain", lambda: resisting_norm(**PLAIN), {"resisting"}),
    ("resisting norm, augmented", lambda: resisting_norm(), {"active", "resisting"}),
    ("flat norm, plain", lambda: flat_norm(**PLAIN), {"active", "resisting"}),
    ("flat norm, augmented", lambda: flat_norm(), {"active", "resisting"}),
]


@pytest.mark.parametrize(("toy", "verdicts"), [case[1:] for case in TOYS], ids=[case[0] for case in TOYS])
def test_the_detector_knows_both_failures_under_both_methods(toy: Any, verdicts: set[str]) -> None:
    """Only the signed gate under the plain simultaneous method goes round; only data that resist are said to."""
    assert set(toy().verdicts().values()) <= verdicts


def test_a_limit_cycle_is_told_from_data_that_resist() -> None:
    cycle = flat_gate(0.001, 0.0, 1_500, **SLOW, order="simultaneous")
    assert set(cycle.verdicts().values()) == {"cycling"}
    assert "augmented_lagrangian" in cycle.diagnose()
    resisting = resisting_norm(**SLOW)
    assert set(resisting.verdicts().values()) == {"resisting"}
    assert "resilient" in resisting.diagnose()
    cured = flat_gate(0.001, 0.0, 1_500)
    assert not {"cycling", "resisting"} & set(cured.verdicts().values())


def test_the_detector_survives_a_checkpoint(tmp_path: Path) -> None:
    cycle = flat_gate(0.001, 0.0, 1_500, **SLOW, order="simultaneous")
    torch.save(cycle.state_dict(), tmp_path / "monitor.pt")
    other = flat_gate(0.001, 0.0, 1, every=1)
    other.load_state_dict(torch.load(tmp_path / "monitor.pt", weights_only=True))
    assert other.verdicts() == cycle.verdicts()
    assert all((a == b).all() for a, b in zip(other.history()[2:], cycle.history()[2:], strict=True))


@pytest.mark.parametrize(
    ("level", "target", "verdict"), [(0.5, 2.0, "active"), (3.0, 2.0, "inactive"), (0.0, 2.0, "zero")]
)
def test_verdicts_on_settled_constraints(level: float, target: float, verdict: str) -> None:
    model, terms = layers((1, 1))
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = ce.ConstrainedOptimizer(base, ce.constraints.weight(model, level=level))
    monitor = Monitor(optimizer)
    minimise(optimizer, lambda: 0.5 * (terms[0].weight - target).square().sum(), 300)
    assert list(monitor.verdicts().values()) == [verdict]


def test_a_schedule_that_is_too_fast_is_named() -> None:
    model, terms = layers((1, 1))
    with torch.no_grad():
        terms[0].weight.fill_(2.0)
    optimizer = ce.ConstrainedOptimizer(
        torch.optim.SGD(model.parameters(), lr=1e-3),
        ce.constraints.weight(model, level=ce.schedules.linear(2.0, 0.1, 100)),
    )
    monitor = Monitor(optimizer)
    minimise(optimizer, lambda: 0.5 * (terms[0].weight - 2.0).square().sum(), 99)
    assert "more steps" in monitor.diagnose()


def judged(record: Any, model: Any, terms: Any, target: float, steps: int, **options: Any) -> Monitor:
    optimizer = ce.ConstrainedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), record, **options)
    monitor = Monitor(optimizer)
    minimise(optimizer, lambda: 0.5 * (terms[0].weight - target).square().sum(), steps)
    return monitor


def test_a_multiplier_that_follows_a_falling_level_is_no_resistance() -> None:
    model, terms = layers((1, 1))
    monitor = judged(ce.constraints.weight(model, level=ce.schedules.linear(2.0, 0.5, 400)), model, terms, 2.0, 300)
    assert set(monitor.verdicts().values()) == {"growing"}
    assert "still grows" in monitor.diagnose() and "nothing to change" in monitor.diagnose()


@pytest.mark.parametrize(("steps", "verdict"), [(400, "zero"), (4, "cut")])
def test_a_term_that_was_cleared_while_large_is_named(steps: int, verdict: str) -> None:
    model, terms = layers((1, 1))
    torch.nn.init.constant_(terms[0].weight, 2.0)
    level = ce.schedules.linear(2.0, 0.0, steps)
    monitor = judged(ce.constraints.weight(model, level=level), model, terms, 2.0, steps + 20)
    assert set(monitor.verdicts().values()) == {verdict}
    assert ("too fast" in monitor.diagnose()) == (verdict == "cut")


def test_a_part_that_ended_at_rounding_is_zero() -> None:
    """W - P_H W is taken away from W, which leaves rounding."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    adapter = ce.adapters.linear("2x0e + 2x1o", "2x0e + 2x1o")
    ce.relax(model, where=lambda name, layer: name == "0", adapter=adapter, init=0.5)
    x, y = torch.randn(32, 8), torch.randn(32, 8)
    record = ce.constraints.subgroup(model, ce.groups.SO3(), level=ce.schedules.linear(0.5, 0.0, 150))
    optimizer = ce.ConstrainedOptimizer(torch.optim.Adam(model.parameters(), lr=1e-2), record)
    monitor = Monitor(optimizer)
    minimise(optimizer, lambda: (model(x) - y).square().mean(), 250)
    assert 0 < record.measure.values(record.terms).item() < 1e-6
    assert set(monitor.verdicts().values()) == {"zero"}


def test_a_slack_is_no_violation() -> None:
    """min 1/2 (w - 2)^2 + 0.5 u, |w| <= u: w = u = 1.5. The monitor says what that is worth, and counts the slack."""
    model, terms = layers((1, 1))
    record = ce.constraints.resilient(ce.constraints.weight(model, level=0.0), price=0.5)
    monitor = judged(record, model, terms, 2.0, 300)
    assert set(monitor.verdicts().values()) == {"giving way"} and "price" in monitor.diagnose()
    assert monitor.history().slacks[-1] == pytest.approx(1.5, abs=1e-6)
    found = float(monitor.summary().split("worst violation ")[1].split()[0])
    assert found == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("side", [1.0, -1.0])
def test_an_equality_is_violated_on_both_sides(side: float) -> None:
    model, terms = layers((1, 1), gate=True)
    torch.nn.init.constant_(terms[0].gate, side)
    base = torch.optim.SGD([p for t in terms for p in t.parameters()], lr=1e-3)
    optimizer = ce.ConstrainedOptimizer(base, ce.constraints.gate(model), **{**SLOW, "dual_lr": 1e-3})
    monitor = Monitor(optimizer)
    minimise(optimizer, lambda: 0.5 * (terms[0].gate - 2.0 * side).square(), 60)
    assert set(monitor.verdicts().values()) == {"resisting"}
    assert "worst violation " + ("+" if side > 0 else "-") in monitor.summary()


def test_tensorboard_takes_the_scalars(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    model = Net()
    optimizer = wrap(model)
    monitor = Monitor(optimizer)
    train(model, optimizer, *data(), 2)
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        monitor.write_tensorboard(writer)
    assert any(path.stat().st_size > 0 for path in tmp_path.iterdir())


def test_recording_reads_nothing() -> None:
    model = Net()
    optimizer = wrap(model, torch.optim.SGD)
    monitor = Monitor(optimizer)
    train(model, optimizer, *data(), 1)
    with Operations(forbid=True):
        optimizer.step()
    assert list(monitor.history().steps) == [1, 2]


def test_writers_and_plot_agree_with_the_history(tmp_path: Path) -> None:
    model = Net()
    optimizer = wrap(model)
    monitor = Monitor(optimizer, every=2)
    assert "nothing recorded" in monitor.diagnose()
    train(model, optimizer, *data(), 6)
    history = monitor.history()
    assert list(history.steps) == [2, 4, 6]
    monitor.write_csv(tmp_path / "h.csv")
    rows = list(csv.DictReader((tmp_path / "h.csv").read_text().splitlines()))
    assert [float(r["value"]) for r in rows] == pytest.approx(history.values.flatten().tolist(), rel=1e-8)

    class Writer:
        def __init__(self) -> None:
            self.seen: list[tuple[str, float, int]] = []

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            self.seen.append((tag, value, step))

    writer = Writer()
    monitor.write_tensorboard(writer)
    assert (f"values/{history.names[0]}", history.values[0, 0], 2) in writer.seen
    assert len(writer.seen) == 4 * history.values.size
    assert "worst violation" in monitor.summary()
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    figure = monitor.plot()
    assert len(figure.axes) == 2
    matplotlib.pyplot.close(figure)


@pytest.mark.parametrize("every", [0, -1])
def test_distances_are_positive(every: int) -> None:
    with pytest.raises(ce.errors.ConstraintError, match="every"):
        Monitor(wrap(Net()), every=every)


# --- the best model, and when to stop ---


def test_the_best_model_is_a_copy_judged_with_terms_off_after_the_levels_ended() -> None:
    model = Net()
    optimizer = wrap(model, level=ce.schedules.linear(0.1, 0.0, 3))
    best = BestModel(model, optimizer)
    x, y = data()

    def active(net: Any) -> float:
        return float(any(r.term.active for r in ce.relaxations(net)))

    assert best.consider(active) == 0.0  # terms are off while a model is judged
    assert best.score is None  # and none is kept while a level is above 0
    with pytest.raises(ce.errors.ConstraintError, match="no model was kept"):
        best.restore()
    train(model, optimizer, x, y, 3)
    best.consider(lambda net: 1.0)
    kept = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, x, y, 3)
    best.consider(lambda net: 2.0)
    best.consider(lambda net: float("nan"))
    assert (best.score, best.step) == (1.0, 3)
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), kept, strict=True))
    resumed = BestModel(model, optimizer)
    resumed.load_state_dict(best.state_dict())
    resumed.restore()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), kept, strict=True))


def test_higher_may_be_better() -> None:
    model = Net()
    optimizer = wrap(model, level=0.0)
    best = BestModel(model, optimizer, higher_is_better=True)
    for score in (0.1, 0.9, 0.5):
        best.consider(lambda net, s=score: s)
    assert best.score == 0.9


def test_training_is_not_stopped_before_the_levels_end() -> None:
    model = Net()
    optimizer = wrap(model, level=ce.schedules.linear(0.1, 0.0, 5))
    guard = EarlyStopping(optimizer, patience=2)
    for _ in range(5):
        assert not guard.should_stop(1.0)
        train(model, optimizer, *data(), 1)
    resumed = EarlyStopping(optimizer, patience=2)
    assert not guard.should_stop(1.0)
    assert not guard.should_stop(1.0)
    resumed.load_state_dict(guard.state_dict())
    assert resumed.should_stop(1.0)
    assert not guard.should_stop(0.5)


def test_constant_and_ramped_levels_settle() -> None:
    model = Net()
    assert wrap(model, level=0.1).settled
    assert not wrap(model, level=ce.schedules.linear(0.2, 0.1, 3)).settled
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    triangle = ce.constraints.scale(model, schedule=ce.schedules.triangle(4))
    optimizer = ce.ConstrainedOptimizer(base, triangle)
    for _ in range(4):  # it starts at 0, too
        assert not optimizer.settled
        train(model, optimizer, *data(), 1)
    assert optimizer.settled
