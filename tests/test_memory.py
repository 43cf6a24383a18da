"""What relaxation keeps in memory, by counting bytes: no activation that the plain model does not keep."""

import pytest

import constrained_equiv as ce
from examples.benchmarks.step_overhead import saved_bytes, state_bytes, training_step
from tests.cases import CASES

table = pytest.mark.parametrize("case", CASES)
layers = pytest.mark.parametrize("case", [case for case in CASES if case.values[0].linear])


def term_bytes(model):
    """Of the merged matrices, one per term, and of the scales."""
    return sum(r.term.weight.nbytes + r.term.scale.nbytes for r in ce.relaxations(model))


@table
def test_the_backward_pass_keeps_at_most_one_matrix_per_term_more(case):
    plain, relaxed, data = case.model(), case.relaxed(), case.data()
    assert saved_bytes(relaxed, data) <= saved_bytes(plain, data) + term_bytes(relaxed)


@layers
def test_what_a_fused_layer_keeps_more_does_not_grow_with_the_batch(case):
    plain, relaxed, (x,) = case.model(), case.relaxed(), case.data()
    many = x.repeat(64, *[1] * (x.ndim - 1))
    assert many.nbytes > 4 * term_bytes(relaxed)
    assert saved_bytes(relaxed, (many,)) <= saved_bytes(plain, (many,)) + term_bytes(relaxed)


@table
def test_the_state_of_training_grows_by_the_terms_alone(case):
    plain, relaxed = case.model(), training_step(case.relaxed(), case.data())
    relaxed()
    before = 0
    if any(p.numel() for p in plain.parameters()):
        strict = training_step(plain, case.data())
        strict()
        before = state_bytes(strict)
    terms = [r.term.weight for r in ce.relaxations(relaxed.model)]
    value_gradient_moments, steps = sum(4 * weight.nbytes for weight in terms), 4 * len(terms)
    assert state_bytes(relaxed) == before + value_gradient_moments + steps
