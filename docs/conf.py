"""Configuration of the documentation; built by `python -m tox run -e docs`."""

from importlib.metadata import version as installed_version

project = "constrained_equiv"
author = "The constrained_equiv authors"
copyright = "2026, The constrained_equiv authors"
release = version = installed_version("constrained-equiv")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Reference"]
# Docstrings are tested by pytest; here the {doctest} and {testcode} blocks of the pages are.
doctest_test_doctest_blocks = ""

html_theme = "furo"
html_title = "constrained_equiv"
