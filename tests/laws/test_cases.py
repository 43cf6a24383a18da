"""Laws of relaxation, over drawn cases of the table: there and back, on and off, and what the terms do meanwhile."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

import constrained_equiv as ce
from constrained_equiv._certificate import certify
from constrained_equiv._verify import allowed_error
from tests.laws.drawn import (
    Relaxed,
    cases,
    data_of,
    distance,
    elements_of,
    equal,
    law,
    outputs,
    put_terms,
    relax,
    relaxed,
    seeds,
    sizes,
    spare,
    terms,
)


@law
@given(st.data(), cases, seeds, sizes, st.booleans(), st.booleans())
def test_law_finalize_undoes_relax(data, case, seed, size, complement, gate):
    with spare(case) as model:
        batch = data.draw(data_of(case))
        mode = data.draw(st.booleans())
        before = {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
        keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
        parameters = [id(parameter) for parameter in model.parameters()]
        expected = outputs(model.eval(), batch)
        modes = [module.training for module in model.train(mode).modules()]
        relax(case, model, complement=complement, gate=gate)
        put_terms(model, seed, size)
        ce.finalize(model, on_violation="drop")
        assert list(model.state_dict()) == keys and [type(module) for module in model.modules()] == classes
        assert [id(parameter) for parameter in model.parameters()] == parameters
        assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
        assert [module.training for module in model.modules()] == modes
        assert equal(outputs(model.eval(), batch), expected)


@law
@given(relaxed())
def test_law_disabled_is_the_base(drawn):
    expected = outputs(drawn.plain, drawn.data)
    with ce.disabled(drawn.model):
        assert equal(outputs(drawn.model, drawn.data), expected)


@law
@given(st.data(), cases, seeds, sizes, st.booleans(), st.booleans())
def test_law_disabled_equals_finalized(data, case, seed, size, complement, mode):
    with spare(case) as model:
        batch = data.draw(data_of(case))
        relax(case, model, complement=complement)
        put_terms(model, seed, size)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.25)  # as if it had been trained
        model.train(mode)
        with ce.disabled(model):
            expected = outputs(model, batch)
        ce.finalize(model, on_violation="drop")
        assert equal(outputs(model, batch), expected)


def rounding_of(drawn: Relaxed) -> float:
    return 1e-11 if drawn.case.dtype == torch.float64 else 1e-4


@law
@given(relaxed(), st.booleans())
def test_law_scale_zero_is_the_base_to_rounding(drawn, by_scale):
    expected = outputs(drawn.plain, drawn.data)
    drawn.model.train()
    for term in terms(drawn.model):
        if by_scale or term.gate is None:
            term.scale.fill_(0.0)
        else:
            term.gate.data.fill_(0.0)
    drawn.model.train(drawn.plain.training)
    assert distance(outputs(drawn.model, drawn.data), expected) <= rounding_of(drawn)


@law
@given(relaxed(gate=True, modes=(False,)), st.floats(0.1, 10), st.floats(-3, 3))
def test_law_only_the_product_of_scale_gate_and_weight_counts(drawn, scale, gate):
    found = []
    for product in (False, True):
        drawn.model.train()
        for term in terms(drawn.model):
            with torch.no_grad():
                if product:
                    term.weight.mul_(scale * gate)
                term.scale.fill_(1.0 if product else scale)
                term.gate.fill_(1.0 if product else gate)
        found.append(outputs(drawn.model.eval(), drawn.data))
    assert distance(*found) <= rounding_of(drawn)


@law
@given(relaxed(complement=False), seeds)
def test_law_the_projection_is_orthogonal(drawn, seed):
    generator = torch.Generator().manual_seed(seed)
    for term in terms(drawn.model):
        allowed = 1e-12 if term.weight.dtype == torch.float64 else 1e-5
        first, second = (torch.randn(term.weight.shape, generator=generator).to(term.weight) for _ in range(2))
        broken = term.projection.complement_(first.clone())
        again = term.projection.complement_(broken.clone())
        assert (again - broken).norm() <= allowed * first.norm()
        size = first.norm() * second.norm()
        other = term.projection.complement_(second.clone())
        assert abs((broken * second).sum() - (first * other).sum()) <= allowed * size
        assert abs(((first - broken) * other).sum()) <= allowed * size


@law
@given(st.data(), relaxed(complement=True, gate=False, modes=(False,)))
def test_law_equivariant_without_terms_at_every_element(data, drawn):
    element = data.draw(elements_of(drawn.case))
    with ce.disabled(drawn.model):
        ce.assert_equivariant_at(drawn.model, drawn.inputs, element, symmetry=drawn.case.symmetry())


@law
@given(cases, seeds, seeds, st.sampled_from([1e-3, 0.03, 0.1]))  # larger ones may close every gate: zero is equivariant
def test_law_the_checker_sees_terms(case, seed, data_seed, size):
    with spare(case) as model:
        relax(case, model)
        put_terms(model, seed, size)
        batch = case.data(data_seed)
        inputs, symmetry = batch if len(batch) > 1 else batch[0], case.symmetry()
        generator = torch.Generator().manual_seed(data_seed)
        error = ce.equivariance_error(model.eval(), inputs, symmetry=symmetry, samples=1, generator=generator)
        assert error > 10 * allowed_error(case.dtype)
        ce.finalize(model.train(), on_violation="drop")


@law
@given(st.data(), cases, seeds, sizes)
def test_law_folding_loses_nothing_or_says_so(data, case, seed, size):
    with spare(case) as model:
        batch = data.draw(data_of(case))
        relax(case, model, complement=False)
        put_terms(model, seed, size)
        with torch.no_grad():
            for term in terms(model):
                term.weight.sub_(term.projection.complement_(term.weight.clone()))
        expected = outputs(model.eval(), batch)
        report = ce.finalize(model, fold=True)
        allowed = 1e-9 if case.dtype == torch.float64 else 1e-3
        lost = any("does not fit" in note for note in report.notes)
        assert lost or distance(outputs(model, batch), expected) <= allowed
        assert all(layer.folded >= 0 and layer.removed <= 1e-6 * max(layer.folded, 1.0) for layer in report.layers)


@law
@given(relaxed(), st.data())
def test_law_a_checkpoint_carries_everything(drawn, data):
    state = {key: value.clone() if isinstance(value, torch.Tensor) else value
             for key, value in drawn.model.state_dict().items()}  # fmt: skip
    expected = outputs(drawn.model.eval(), drawn.data)
    drawn.model.train()
    put_terms(drawn.model, data.draw(seeds), 0.5)
    drawn.model.load_state_dict(state)
    assert equal(outputs(drawn.model.eval(), drawn.data), expected)
    drawn.model.train().load_state_dict(drawn.plain.state_dict())  # a plain checkpoint: no terms
    assert not any(term.weight.any() for term in terms(drawn.model))


@law
@given(relaxed(gate=False, modes=(False,)), seeds)
def test_law_bounds_are_never_below_what_is_measured(drawn, seed):
    stated = [(r.name, r.layer, r.term.matrix()) for r in ce.relaxations(drawn.model)]
    generator = torch.Generator().manual_seed(seed)
    found = certify(drawn.model, stated, drawn.inputs, symmetry=drawn.case.symmetry(), samples=1, generator=generator)
    assert found.measured is not None and math.isfinite(found.size)
    rounding = rounding_of(drawn) * found.size
    assert found.equivariance is None or found.measured <= found.equivariance + rounding
    assert found.equivariance is not None or any(bound.reason for bound in found.bounds)
