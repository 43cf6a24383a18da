"""The checker fails on every broken network of the zoo and passes its twin; the audit names layer and reason."""

import pytest
import torch

import constrained_equiv as ce
from constrained_equiv.testing import assert_equivariant, audit
from tests.cases import default_dtype
from tests.testing.zoo import ZOO

pairs = pytest.mark.parametrize("pair", ZOO, ids=lambda pair: pair.name)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def build(make, pair, dtype):
    torch.manual_seed(1)
    with default_dtype(dtype):
        return make(), pair.inputs(dtype) if callable(pair.inputs) else torch.randn(pair.inputs)


def test_the_zoo_is_large_enough():
    assert len(ZOO) >= 20 and len({pair.name for pair in ZOO}) == len(ZOO)


@pairs
@dtypes
def test_the_broken_network_fails_and_the_audit_names_the_layer(pair, dtype):
    model, x = build(pair.broken, pair, dtype)
    with pytest.raises(ce.errors.EquivarianceError):
        assert_equivariant(model, x, symmetry=pair.symmetry)
    found = audit(model, x, symmetry=pair.symmetry)
    assert not found.passed and found.error > 1e-3
    assert found.culprit is not None and found.culprit.name == pair.where, found
    assert pair.words in found.culprit.reason + " ".join(found.notes), found


@pairs
@dtypes
def test_the_twin_passes_and_nothing_is_blamed(pair, dtype):
    model, x = build(pair.twin, pair, dtype)
    assert_equivariant(model, x, symmetry=pair.symmetry)
    found = audit(model, x, symmetry=pair.symmetry)
    assert found.passed and found.culprit is None, found
    assert not [f for f in found.findings if f.status in ("lost", "random")], found
