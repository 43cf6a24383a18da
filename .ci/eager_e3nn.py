"""Run pytest with e3nn in eager mode, the default of e3nn 0.6: python eager_e3nn.py ARGUMENTS OF PYTEST."""

import sys

import e3nn
import pytest

e3nn.set_optimization_defaults(jit_mode="eager")
sys.exit(pytest.main(sys.argv[1:]))
