"""Laws of the constrained optimizer, over drawn cases, base optimizers, options and moments to stop."""

import copy

import torch
from hypothesis import given
from hypothesis import strategies as st

import constrained_equiv as ce
from tests.cases import loss
from tests.laws.drawn import cases, elements_of, law, put_terms, relax, relaxed, seeds, spare, terms
from tests.optim.test_cooper import FORMULATIONS, start, task
from tests.optim.toys import minimise

BASES = {
    "SGD": lambda groups: torch.optim.SGD(groups, momentum=0.9),
    "Adam": lambda groups: torch.optim.Adam(groups),
    "AdamW": lambda groups: torch.optim.AdamW(groups, weight_decay=0.1),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups),
}
bases = st.sampled_from(sorted(BASES))
rates = st.sampled_from([1e-3, 1e-2])
falls = st.integers(0, 4)
small = st.sampled_from([0.1, 1e-3])  # deep networks with terms of size 30 diverge within two steps of SGD
OPTIONS = (
    {},
    {"penalty": 0.1, "penalty_growth": 1.1},
    {"formulation": "lagrangian", "dual": "nupi", "dual_lr": 0.1},
    {"formulation": "quadratic_penalty"},
    {"order": "primal-dual"},
    {"order": "simultaneous", "dual": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, maximize=True)},
    {"enforce": "projection"},
    {"enforce": "proximal"},
    {"at_zero": "multipliers"},
)


def constrained(model, base, rate, fall, level=0.1, **options):
    record = ce.constraints.weight(model, level=ce.schedules.linear(level, 0.0, fall))
    return ce.ConstrainedOptimizer(BASES[base](ce.parameter_groups(model, lr=rate)), record, **options)


def train(case, model, optimizer, steps, seed=0):
    for step in steps:
        optimizer.zero_grad()
        loss(model(*case.data(seed + step))).backward()
        optimizer.step()


@law
@given(
    relaxed(complement=True, modes=(True,), sizes=small),
    bases,
    rates,
    st.sampled_from(OPTIONS),
    st.integers(1, 3),
    seeds,
)
def test_law_terms_stay_in_the_complement(drawn, base, rate, options, steps, seed):
    optimizer = constrained(drawn.model, base, rate, 100, **options)
    train(drawn.case, drawn.model, optimizer, range(steps), seed % 1000)
    for term in terms(drawn.model):
        kept = term.weight - term.projection.complement_(term.weight.detach().clone())
        allowed = 1e-12 if term.weight.dtype == torch.float64 else 1e-5
        assert torch.isfinite(term.weight).all()
        assert kept.norm() <= allowed * (term.weight.norm() + rate)


@law
@given(relaxed(complement=True, modes=(True,), sizes=small), bases, rates, st.integers(1, 2), st.floats(0.01, 1.0))
def test_law_projection_holds_the_level_at_every_step(drawn, base, rate, steps, level):
    optimizer = constrained(drawn.model, base, rate, 5, level=level, enforce="projection")
    (record,) = optimizer.constraints
    for step in range(steps):
        train(drawn.case, drawn.model, optimizer, [step])
        values = record.measure.values(record.terms)
        assert (values <= record.level(step) * (1 + 1e-5)).all()


@law
@given(st.data(), cases, seeds, bases, rates, st.sampled_from(OPTIONS[:-1]), st.integers(0, 3))
def test_law_trained_and_finalized_is_equivariant(data, case, seed, base, rate, options, fall):
    with spare(case) as model:
        relax(case, model)
        put_terms(model, seed, 0.1)
        optimizer = constrained(model, base, rate, fall, **options)
        train(case, model, optimizer, range(fall + 1), seed % 1000)
        report = ce.finalize(model, optimizer=optimizer)
        assert all(layer.value == layer.removed == 0 for layer in report.layers)  # the tail trains at exactly zero
        assert not terms(model)
        batch, element = case.data(seed % 1000), data.draw(elements_of(case))
        inputs = batch if len(batch) > 1 else batch[0]
        ce.assert_equivariant_at(model.eval(), inputs, element, symmetry=case.symmetry())


@law
@given(cases, seeds, bases, rates, st.sampled_from(OPTIONS), falls, st.integers(0, 2), st.integers(1, 2), st.booleans())
def test_law_resumed_equals_uninterrupted(case, seed, base, rate, options, fall, stop, more, complement):
    with spare(case) as model:
        relax(case, model, complement=complement)

        def begin():
            put_terms(model, seed, 0.1)
            return constrained(model, base, rate, fall, **options)

        first = copy.deepcopy(model.state_dict())
        whole = begin()
        train(case, model, whole, range(stop))
        saved = copy.deepcopy((model.state_dict(), whole.state_dict()))
        train(case, model, whole, range(stop, stop + more))
        expected = {key: value.clone() for key, value in model.named_parameters()}
        model.load_state_dict(first)
        resumed = begin()
        model.load_state_dict(saved[0])
        resumed.load_state_dict(saved[1])
        train(case, model, resumed, range(stop, stop + more))
        assert all(torch.equal(value, expected[key]) for key, value in model.named_parameters())
        one, two = whole.readings(), resumed.readings()
        assert one.step == two.step == stop + more and torch.equal(one.multipliers, two.multipliers)
        ce.finalize(model, on_violation="drop")


@law
@given(
    st.sampled_from(sorted(FORMULATIONS)),
    st.sampled_from(["inequality", "equality"]),
    st.sampled_from([2.0**k for k in range(-6, 4)]),
    st.floats(0, 2),
    st.sampled_from([0.01, 0.3]),
    st.integers(1, 5),
    st.integers(1, 8),
)
def test_law_the_closed_form_is_coopers(formulation, kind, penalty, level, dual_lr, count, steps):
    found = []
    for how in (formulation, type("Custom", (FORMULATIONS[formulation],), {})):  # a subclass has no closed form here
        model, weights, targets, _ = start(count)
        record = ce.constraints.weight(model, level=level, type=kind)
        base = torch.optim.Adam(model.parameters(), lr=0.05)
        optimizer = ce.ConstrainedOptimizer(base, record, penalty=penalty, formulation=how, dual_lr=dual_lr)
        minimise(optimizer, lambda w=weights, t=targets: task(w, t), steps)
        found.append([*weights, optimizer.readings().multipliers])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
