"""The code blocks of documentation pages, and a way to run them."""

import contextlib
import doctest
import io
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
HOW_TO = ROOT / "docs" / "how-to"
_BLOCK = re.compile(r"^```\{?(testcode|testoutput|python)\}?\n(?::hide:\n)?(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path, *kinds: str) -> list[tuple[str, str]]:
    """Return the blocks of some kinds, all that run as a test by default, with their kind."""
    kinds = kinds or ("testcode", "testoutput")
    return [(kind, text) for kind, text in _BLOCK.findall(page.read_text(encoding="utf-8")) if kind in kinds]


def execute(text: str, page: Path, names: dict[str, Any]) -> str:
    """Run one block among the names that earlier ones left, and return what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as stream:
        exec(compile(text, str(page), "exec"), names)
    return stream.getvalue()


def run(page: Path) -> dict[str, Any]:
    """Run a page's blocks in order, compare what they print, and return the names that they leave."""
    names: dict[str, Any] = {"__name__": "page"}
    printed, checker = "", doctest.OutputChecker()
    for kind, text in blocks(page):
        if kind == "testcode":
            printed = execute(text, page, names)
        else:
            assert checker.check_output(text, printed, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE), printed
    return names
