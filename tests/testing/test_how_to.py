"""The code of the how-to pages runs, prints what the pages say, and the property test of one is short."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

import constrained_equiv as ce
import constrained_equiv.testing

PAGES = Path(__file__).parents[2] / "docs" / "how-to"
BLOCK = re.compile(r"^```\{(testcode|testoutput)\}\n(?::hide:\n)?(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page):
    return BLOCK.findall((PAGES / page).read_text(encoding="utf-8"))


def run(page):
    """Run a page's code in order, compare what it prints, and return the names that it leaves."""
    names, printed = {"__name__": "page"}, ""
    for kind, text in blocks(page):
        if kind == "testoutput":
            assert printed == text
            continue
        with contextlib.redirect_stdout(io.StringIO()) as stream:
            exec(compile(text, page, "exec"), names)
        printed = stream.getvalue()
    return names


def test_how_to_test_equivariance():
    names = run("test-equivariance.md")
    assert {"test_my_model", "found", "record"} <= names.keys()
    text = (PAGES / "test-equivariance.md").read_text(encoding="utf-8")
    assert "0.3 %" in text and "no rounding" in names["report"].verdict
    with pytest.raises(AssertionError):  # the test of the page can fail
        names["my_model"] = lambda points: points + 1
        names["test_my_model"]()


def test_a_users_property_test_takes_under_fifteen_lines():
    first = blocks("test-equivariance.md")[0][1]
    assert "@given" in first and len([line for line in first.splitlines() if line.strip()]) < 15


def test_how_to_relax_your_own_layer():
    names = run("relax-your-own-layer.md")
    assert [r.adapter.name for r in ce.relaxations(names["vectors"])] == ["vector neurons"] * 2
    report = ce.finalize(names["layer"], fold=True)
    assert report.layers[0].unfolded == 0

    def methods(base):  # adds the term although it is switched off
        return {"matrix": lambda self: base.matrix(self) + self.non_equivariant.matrix()}

    circulant, symmetry = names["Circulant"], ce.Symmetry(ce.groups.cyclic(6), names["shifts"], names["shifts"])
    wrong = ce.adapters.Adapter("wrong", lambda m: isinstance(m, circulant), names["site"], methods)
    with pytest.raises(AssertionError, match="disabled is the layer's own forward"):
        ce.testing.adapter_laws(
            lambda: circulant(6).double(), torch.randn(3, 6).double(), symmetry=symmetry, adapter=wrong
        )()
