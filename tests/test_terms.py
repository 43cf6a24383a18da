"""The non-equivariant term: its matrix, its norm as a distance, its statistics and its checkpoint."""

import copy
import math

import pytest
import torch
from torch import nn

import constrained_equiv as ce
from constrained_equiv.intertwiners import intertwiners
from tests.cases import CASES, Case, case_named

table = pytest.mark.parametrize("case", CASES)
layers = pytest.mark.parametrize("case", [case for case in CASES if case.values[0].linear])


def dense(model: nn.Module, case: Case) -> torch.Tensor:
    """The matrix of an affine model, from its values at the unit vectors."""
    shape = case.data()[0].shape[1:]
    units = torch.eye(shape.numel(), dtype=case.dtype).view(-1, *shape)
    with torch.no_grad():
        return (model(units) - model(torch.zeros_like(units))).flatten(1).T


def only_term(model):
    (relaxation,) = ce.relaxations(model)
    return relaxation.term


@layers
def test_the_norm_of_the_term_is_the_layers_distance_from_equivariance(case):
    relaxed = case.relaxed(seed=3)
    total = dense(relaxed, case)
    distance = only_term(relaxed).projection.complement(total).norm()
    torch.testing.assert_close(distance, only_term(relaxed).weight.detach().norm(), rtol=1e-13, atol=0)


@layers
def test_dropping_the_term_is_the_orthogonal_projection_of_the_layer(case):
    relaxed = case.relaxed(seed=3)
    total, projection = dense(relaxed, case), only_term(relaxed).projection
    nearest = total - projection.complement(total)
    ce.finalize(relaxed, on_violation="drop")
    torch.testing.assert_close(dense(relaxed, case), nearest, rtol=0, atol=1e-13)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):  # no other equivariant map is nearer
        other = torch.randn(total.shape, dtype=total.dtype, generator=generator)
        other = nearest + 0.1 * (other - projection.complement(other))
        assert (total - other).norm() > (total - nearest).norm()


@layers
def test_the_free_form_adds_equivariant_maps_too(case):
    relaxed = case.relaxed(complement=False)
    term, plain = only_term(relaxed), dense(case.model(), case)
    torch.testing.assert_close(dense(relaxed, case) - plain, term.weight.detach(), rtol=0, atol=1e-13)
    assert (term.weight - term.projection.complement(term.weight.detach())).norm() > 0.1


@layers
def test_weight_over_root_rows_is_the_rms_output_of_the_term(case):
    relaxed = case.relaxed()
    term = only_term(relaxed)
    x = torch.randn(40_000, term.weight.shape[1], dtype=case.dtype)
    weight = term.weight.detach()
    measured = nn.functional.linear(x, weight).square().mean().sqrt()
    assert term.rows == weight.shape[0]
    assert measured.item() == pytest.approx(weight.norm().item() / math.sqrt(term.rows), rel=0.02)


@table
def test_matrix_is_scale_times_gate_times_weight(case):
    for relaxation in ce.relaxations(case.relaxed(gate=True)):
        term = relaxation.term
        with torch.no_grad():
            term.scale.fill_(0.5)
            term.gate.fill_(-4.0)
        assert torch.equal(term.matrix(), -2.0 * term.weight)
        term.matrix().sum().backward()
        torch.testing.assert_close(term.weight.grad, torch.full_like(term.weight, -2.0))
        torch.testing.assert_close(term.gate.grad, 0.5 * term.weight.detach().sum())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("evaluate_with_terms", [True, False])
@pytest.mark.parametrize("enabled", [True, False])
def test_when_a_term_is_active(training, evaluate_with_terms, enabled):
    model = case_named("finite group, own layer").relaxed(evaluate_with_terms=evaluate_with_terms).train(training)
    term = only_term(model)
    term.enabled = enabled
    assert term.active is (enabled and (training or evaluate_with_terms))


@table
def test_terms_are_added_to_the_state_alone(case):
    for relaxation in ce.relaxations(case.relaxed()):
        assert set(relaxation.term.state_dict()) == {"weight", "scale", "_extra_state"}
    for relaxation in ce.relaxations(case.relaxed(gate=True)):
        assert set(relaxation.term.state_dict()) == {"weight", "gate", "scale", "_extra_state"}


# --- statistics -------------------------------------------------------------------------------------------------------


@layers
def test_recorded_response_and_moment(case):
    relaxed, (x,) = case.relaxed(), case.data()
    term = only_term(relaxed)
    for what in ("response", "moment", "response"):
        term.record(what)
    assert float(term.response) == 1.0 and not term.moment.any()  # before the first forward
    output = relaxed(x)
    assert float(term.response) == pytest.approx(output.square().mean().sqrt().item(), rel=1e-6)
    rows = x.flatten(1)
    torch.testing.assert_close(term.moment.double(), rows.T @ rows / len(rows), rtol=1e-6, atol=1e-6)
    assert not term.response.requires_grad and not term.moment.requires_grad
    before = term.response.clone(), term.moment.clone()
    relaxed.eval()(2 * x)
    assert torch.equal(term.response, before[0]) and torch.equal(term.moment, before[1])
    with ce.disabled(relaxed.train()):
        relaxed(2 * x)
    assert torch.equal(term.response, before[0])


@table
def test_recording_changes_no_output_and_no_checkpoint(case):
    relaxed, data = case.relaxed(), case.data()
    other = copy.deepcopy(relaxed)
    for relaxation in ce.relaxations(other):
        relaxation.term.record("response")
        if relaxation.term.weight.ndim == 2:
            relaxation.term.record("moment")
    other(*data)
    assert other.state_dict().keys() == relaxed.state_dict().keys()
    assert all(torch.isfinite(r.term.response) and r.term.response > 0 for r in ce.relaxations(other))
    other.load_state_dict(relaxed.state_dict())


# --- description and checkpoint ---------------------------------------------------------------------------------------


def test_a_printed_model_shows_the_term():
    text = repr(case_named("finite group, own layer").relaxed(gate=True))
    assert "RelaxedAveraged" in text and "(non_equivariant): NonEquivariantTerm(9 x 10, complement, gated)" in text


@pytest.mark.parametrize("saved, own", [({}, {"complement": False}), ({"gate": True}, {}), ({"complement": False}, {})])
def test_a_checkpoint_of_another_form_is_refused(saved, own):
    case = case_named("sets, nn.Linear")
    checkpoint, model = case.relaxed(**saved).state_dict(), case.relaxed(seed=5, **own)
    before = [r.term.weight.clone() for r in ce.relaxations(model)]
    with pytest.raises(
        ce.errors.CheckpointError, match=r"0\.non_equivariant .* was relaxed as .* expected .*ce\.relax"
    ):
        model.load_state_dict(checkpoint)
    assert all(torch.equal(r.term.weight, w) for r, w in zip(ce.relaxations(model), before, strict=True))


def test_a_checkpoint_of_another_size_is_refused():
    case = case_named("finite group, own layer")
    model = case.relaxed()
    checkpoint = model.state_dict() | {"non_equivariant.weight": torch.zeros(2, 2)}
    checkpoint["non_equivariant._extra_state"][2:] = 2
    before = only_term(model).weight.clone()
    with pytest.raises(ce.errors.CheckpointError, match=r"\[2, 2\].*expected.*\[9, 10\]"):
        model.load_state_dict(checkpoint)
    assert torch.equal(only_term(model).weight, before)


def test_a_relaxed_checkpoint_does_not_load_into_a_plain_model_unnoticed():
    case = case_named("finite group, own layer")
    with pytest.raises(RuntimeError, match=r"non_equivariant\.weight"):
        case.model().load_state_dict(case.relaxed().state_dict())


def test_empty_layers_are_no_special_case():
    layer = nn.Linear(3, 3)
    empty = intertwiners("0x0e", "0x0e")
    assert empty.rank == 0 and empty.shape == (0, 0)
    with pytest.raises(ce.errors.RelaxationError, match="nothing to relax"):
        ce.relax(layer, where=lambda n, m: True, adapter=ce.adapters.linear("0x0e", "0x0e"))
