"""What a user prints reads as it was written, in a script, a REPL and a notebook."""

import pytest
import torch
from torch import nn

import constrained_equiv as ce
from tests.cases import case_named

VECTORS = ce.Symmetry(ce.groups.O3(), "1x1o", "1x1o")
X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))


def finished():
    case = case_named("sets, nn.Linear")
    return ce.finalize(case.relaxed(), batches=[case.data()[0]], symmetry=case.symmetry(), on_violation="drop")


RECORDS = {
    "relaxations": (lambda: ce.relaxations(case_named("sets, nn.Linear").relaxed()), "layer  class   term"),
    "report": (finished, "layer  measure"),
    "certificate": (lambda: finished().certificate, "layer  B"),
    "audit": (lambda: ce.audit(nn.LayerNorm(3), X, symmetry=VECTORS), "module   class"),
    "equivariance report": (lambda: ce.equivariance_report(torch.tanh, X, symmetry=VECTORS), "relative equivariance"),
    "lie derivative": (lambda: ce.lie_derivative(torch.tanh, X, symmetry=VECTORS), "Lie derivative of the model"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_records_print_the_same_everywhere(name):
    make, start = RECORDS[name]
    record = make()
    text = str(record)
    assert text.startswith(start) and repr(record) == text
    assert all(line == line.rstrip() for line in text.splitlines())
    # IPython shows a class's own __repr__, lines and all; of a tuple or dataclass without one it shows the parts
    assert "__repr__" in vars(type(record))


@pytest.mark.parametrize("name", RECORDS)
def test_ipython_shows_records_as_they_print(name):
    pretty = pytest.importorskip("IPython.lib.pretty").pretty
    record = RECORDS[name][0]()
    assert pretty(record) == repr(record)
