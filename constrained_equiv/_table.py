"""Tables: how records print.

What enters: a header and rows of words. What leaves: lines of aligned columns.
Law: every column is as wide as its widest cell, and no line ends in blanks.
"""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Align the cells of a header and of rows, each as long as the header."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
