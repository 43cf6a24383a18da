"""The code of the README and of every page with {testcode} blocks runs and prints what the page says."""

import contextlib
import doctest
import io
import re
from pathlib import Path

import pytest
import torch

import constrained_equiv as ce
from constrained_equiv.errors import EquivarianceError
from tests.cases import VectorMap

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
HOW_TO, TUTORIAL = DOCS / "how-to" / "test-equivariance.md", DOCS / "tutorial" / "first-steps.md"
BLOCK = re.compile(r"^```\{(testcode|testoutput)\}\n(?::hide:\n)?(.*?)^```$", re.DOTALL | re.MULTILINE)
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PAGES = [path for path in sorted(DOCS.rglob("*.md")) if BLOCK.search(path.read_text(encoding="utf-8"))]


def blocks(page):
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def run(page):
    """Run all blocks of a page, compare what they print, and return the names that they define."""
    names, printed, checker = {"__name__": "page"}, "", doctest.OutputChecker()
    for kind, text in blocks(page):
        if kind == "testoutput":
            assert checker.check_output(text, printed, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE), printed
            continue
        with contextlib.redirect_stdout(io.StringIO()) as stream:
            exec(compile(text, str(page), "exec"), names)
        printed = stream.getvalue()
    return names


def lines(text):
    return [line for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_run_and_print_what_they_say(page):
    if any("e3nn" in text for _, text in blocks(page)):
        pytest.importorskip("e3nn")
    pytest.importorskip("hypothesis")
    names = run(page)
    for name in [name for name in names if name.startswith("test_")]:
        names[name]()


def test_the_pages_with_code_are_found():
    assert {HOW_TO, TUTORIAL} <= set(PAGES)


def test_the_property_test_of_the_how_to_page_can_fail():
    names = run(HOW_TO)
    assert "0.3 %" in HOW_TO.read_text(encoding="utf-8") and "no rounding" in names["report"].verdict
    names["my_model"] = lambda points: points + 1
    with pytest.raises(EquivarianceError):
        names["test_my_model"]()


def test_the_property_test_of_the_tutorial_can_fail():
    pytest.importorskip("e3nn")
    names = run(TUTORIAL)
    names["plain"] = lambda x: x[..., 4:7].abs()
    with pytest.raises(EquivarianceError):
        names["test_network"]()


def readme_blocks():
    loop, test = PYTHON.findall(README)
    return loop, test


def vectors():
    """An equivariant model of vectors (batch, 2, 3), whose adapter is stated."""
    model = torch.nn.Sequential(VectorMap(2, 2), VectorMap(2, 2))
    stated = ce.adapters.linear(ce.representations.vectors(2), ce.representations.vectors(2), axes=(-2, -1))
    return model, {"where": lambda name, layer: isinstance(layer, VectorMap), "adapter": stated}


def test_the_loop_of_the_readme_runs(monkeypatch, capsys):
    model, options = vectors()
    relax, validated = ce.relax, []
    monkeypatch.setattr(ce, "relax", lambda m: relax(m, **options))
    x = torch.randn(4, 2, 3)
    names = {
        "torch": torch,
        "model": model,
        "criterion": torch.nn.functional.mse_loss,
        "loader": [(x, x.abs())] * 6,
        "validate": lambda m: validated.append([r.term.active for r in ce.relaxations(m)]),
    }
    loop, _ = readme_blocks()
    exec(compile(loop.replace("8_000", "4"), "README.md", "exec"), names)  # 6 steps stand for 10,000
    assert validated == [[False, False]] and not ce.relaxations(model)
    assert all(layer.value == 0 for layer in names["report"].layers)


def test_the_property_test_of_the_readme_runs_and_can_fail():
    pytest.importorskip("hypothesis")
    _, test = readme_blocks()
    names = {"ce": ce, "model": lambda points: points.square().sum(-1, keepdim=True)}
    exec(compile(test, "README.md", "exec"), names)
    names["test_my_model"]()
    names["model"] = lambda points: points[:, 2:]
    with pytest.raises(EquivarianceError):
        names["test_my_model"]()


@pytest.mark.parametrize(
    "text",
    [readme_blocks()[1], blocks(HOW_TO)[0][1], next(text for _, text in blocks(TUTORIAL) if "@given" in text)],
    ids=["README", "how-to", "tutorial"],
)
def test_a_users_property_test_takes_under_fifteen_lines(text):
    assert "@given" in text and len(lines(text)) < 15
