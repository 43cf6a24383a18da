"""Trap 5: a type test matched no module, so nothing was relaxed and the run compared a model with itself."""

import pytest
from torch import nn

import constrained_equiv as ce
from constrained_equiv.representations import vectors
from tests.cases import CASES


class VNLinear(nn.Linear):
    """A framework's own linear layer."""


def network():
    return nn.Sequential(VNLinear(4, 4), nn.Tanh(), VNLinear(4, 4))


ADAPTER = ce.adapters.linear(vectors(4, layout="ir_mul"), vectors(4, layout="ir_mul"), axes=(-2, -1))


def test_a_loop_with_a_type_test_may_relax_nothing_in_silence():
    model = network()
    relaxed = [m for m in model.modules() if type(m) is nn.Linear]  # the layers are of a subclass
    assert relaxed == []


def test_nothing_matched_is_an_error_that_lists_what_is_there():
    model = network()
    with pytest.raises(ce.errors.RelaxationError, match=r"no layer was matched; layers with weights here: VNLinear"):
        ce.relax(model, where=lambda name, layer: type(layer) is nn.Linear, adapter=ADAPTER)
    with pytest.raises(ce.errors.RelaxationError, match="no layer was matched"):
        ce.relax(model)
    assert [type(m) for m in model] == [VNLinear, nn.Tanh, VNLinear]


def test_matched_but_nothing_to_relax_is_an_error_too():
    with pytest.raises(
        ce.errors.RelaxationError, match=r"2 layers were matched, but every linear map .* is equivariant"
    ):
        scalars = ce.adapters.linear("4x0e", "4x0e")
        ce.relax(network(), where=lambda name, layer: isinstance(layer, VNLinear), adapter=scalars)


def test_a_constraint_on_nothing_is_an_error():
    model = ce.relax(network(), where=lambda name, layer: isinstance(layer, VNLinear), adapter=ADAPTER)
    with pytest.raises(ce.errors.ConstraintError, match=r"none of the relaxed layers \['0', '2'\]"):
        ce.constraints.weight(model, level=0.1, where=lambda name: name == "layers.0")


@pytest.mark.parametrize("case", CASES)
def test_relax_reports_what_it_matched(case):
    found = ce.relaxations(case.relaxed())
    assert len(found) > 0
    assert all(isinstance(r.layer, nn.Module) and r.name in str(found) for r in found)
