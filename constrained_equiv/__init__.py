"""Train equivariant networks through constrained relaxation: relax -> constrain -> step -> finalize -> verify.

What enters: nothing. What leaves: the public names of the rooms behind.
Law: it only re-exports, and importing it loads no optional framework.
"""

from constrained_equiv import (
    actions,
    adapters,
    constraints,
    errors,
    groups,
    intertwiners,
    monitor,
    presets,
    representations,
    schedules,
)
from constrained_equiv._audit import audit, lie_derivatives
from constrained_equiv._finalize import Report, finalize, recalibrate
from constrained_equiv._lie import lie_derivative
from constrained_equiv._optim import ConstrainedOptimizer, attach
from constrained_equiv._relax import disabled, parameter_groups, relax, relaxations
from constrained_equiv._symmetry import Symmetry
from constrained_equiv._verify import (
    assert_equivariant,
    assert_equivariant_at,
    equivariance_error,
    equivariance_report,
)

__version__ = "0.1.0"

__all__ = [
    "ConstrainedOptimizer",
    "Report",
    "Symmetry",
    "actions",
    "adapters",
    "assert_equivariant",
    "assert_equivariant_at",
    "attach",
    "audit",
    "constraints",
    "disabled",
    "equivariance_error",
    "equivariance_report",
    "errors",
    "finalize",
    "groups",
    "intertwiners",
    "lie_derivative",
    "lie_derivatives",
    "monitor",
    "parameter_groups",
    "presets",
    "recalibrate",
    "relax",
    "relaxations",
    "representations",
    "schedules",
]
