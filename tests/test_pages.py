"""The code of the README and of every page with {testcode} blocks runs and prints what the page says."""

import pytest
import torch

import constrained_equiv as ce
from constrained_equiv.errors import EquivarianceError
from tests.cases import VectorMap
from tests.pages import HOW_TO, ROOT, blocks, execute, run

README = ROOT / "README.md"
TESTING, TUTORIAL = HOW_TO / "test-equivariance.md", ROOT / "docs" / "tutorial" / "first-steps.md"
PAGES = [page for page in sorted((ROOT / "docs").rglob("*.md")) if blocks(page)]


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
    assert {TESTING, TUTORIAL, HOW_TO / "training-setups.md"} <= set(PAGES)


class Lengths(torch.nn.Module):
    """An ordinary float32 network of the lengths of vectors: invariant."""

    def __init__(self):
        super().__init__()
        self.network = torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.SiLU(), torch.nn.Linear(8, 1))

    def forward(self, points):
        return self.network(points.norm(dim=-1, keepdim=True))


def test_the_property_test_of_the_how_to_page_takes_a_float32_network():
    names, lengths = run(TESTING), Lengths()
    names["my_model"] = lambda points: points * lengths(points)
    names["test_my_model"]()


def test_the_property_test_of_the_how_to_page_can_fail():
    names = run(TESTING)
    assert "0.3 %" in TESTING.read_text(encoding="utf-8") and "no rounding" in names["report"].verdict
    names["my_model"] = lambda points: points + 1
    with pytest.raises(EquivarianceError):
        names["test_my_model"]()


def test_the_property_test_of_the_tutorial_can_fail():
    pytest.importorskip("e3nn")
    names = run(TUTORIAL)
    names["plain"] = lambda x: x[..., 4:7].abs()
    with pytest.raises(EquivarianceError):
        names["test_network"]()


def test_a_wrong_adapter_of_ones_own_fails_the_laws():
    pytest.importorskip("hypothesis")
    import constrained_equiv.testing

    names = run(HOW_TO / "relax-your-own-layer.md")
    assert [r.adapter.name for r in ce.relaxations(names["vectors"])] == ["vector neurons"] * 2
    report = ce.finalize(names["layer"], fold=True)
    assert report.layers[0].unfolded == 0

    def methods(base):  # adds the term although it is switched off
        return {"matrix": lambda self: base.matrix(self) + self.non_equivariant.matrix()}

    circulant, symmetry = names["Circulant"], ce.Symmetry(ce.groups.cyclic(6), names["shifts"], names["shifts"])
    wrong = ce.adapters.Adapter("wrong", lambda m: isinstance(m, circulant), names["site"], methods)
    law = constrained_equiv.testing.adapter_laws(
        lambda: circulant(6).double(), torch.randn(3, 6).double(), symmetry=symmetry, adapter=wrong
    )
    with pytest.raises(AssertionError, match="disabled is the layer's own forward"):
        law()


def readme_blocks():
    (_, loop), (_, test) = blocks(README, "python")
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
    execute(loop.replace("8_000", "4"), README, names)  # 6 steps stand for 10,000
    assert validated == [[False, False]] and not ce.relaxations(model)
    assert all(layer.value == 0 for layer in names["report"].layers)


def test_the_property_test_of_the_readme_runs_and_can_fail():
    pytest.importorskip("hypothesis")
    _, test = readme_blocks()
    names = {"ce": ce, "model": Lengths()}
    execute(test, README, names)
    names["test_my_model"]()
    names["model"] = torch.nn.Linear(3, 1)
    with pytest.raises(EquivarianceError):
        names["test_my_model"]()


@pytest.mark.parametrize(
    "text",
    [readme_blocks()[1], blocks(TESTING)[0][1], next(text for _, text in blocks(TUTORIAL) if "@given" in text)],
    ids=["README", "how-to", "tutorial"],
)
def test_a_users_property_test_takes_under_fifteen_lines(text):
    assert "@given" in text and len(lines(text)) < 15
