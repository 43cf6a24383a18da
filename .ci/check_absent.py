"""Fail if one of the named modules can be imported: an environment said to lack them must lack them."""

import importlib.util
import sys

present = [name for name in sys.argv[1:] if importlib.util.find_spec(name) is not None]
if present:
    sys.exit(f"expected to be absent from this environment, but installed: {', '.join(present)}")
