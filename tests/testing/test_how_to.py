"""The code of the how-to page runs, prints what the page says, and its property test is short."""

import contextlib
import io
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "test-equivariance.md"
BLOCK = re.compile(r"^```\{(testcode|testoutput)\}\n(?::hide:\n)?(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks():
    return BLOCK.findall(PAGE.read_text(encoding="utf-8"))


def test_the_page_runs_and_prints_what_it_says():
    names, printed = {"__name__": "page"}, ""
    for kind, text in blocks():
        if kind == "testoutput":
            assert printed == text
            continue
        with contextlib.redirect_stdout(io.StringIO()) as stream:
            exec(compile(text, str(PAGE), "exec"), names)
        printed = stream.getvalue()
    assert {"test_my_model", "found", "record"} <= names.keys()
    assert "0.3 %" in PAGE.read_text(encoding="utf-8") and "no rounding" in names["report"].verdict
    with pytest.raises(AssertionError):  # the test of the page can fail
        names["my_model"] = lambda points: points + 1
        names["test_my_model"]()


def test_a_users_property_test_takes_under_fifteen_lines():
    first = blocks()[0][1]
    assert "@given" in first and len([line for line in first.splitlines() if line.strip()]) < 15
