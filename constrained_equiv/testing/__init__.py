"""Testing: property tests of equivariance for your own models; needs the extra `testing` (Hypothesis).

What enters: groups, representations, models. What leaves: Hypothesis strategies (plural nouns), laws (functions that
return tests) and the assertions of the front door.
Law: a strategy shrinks to the simplest case, the identity for group elements, and replays from a seed.
"""

from constrained_equiv._audit import audit
from constrained_equiv._verify import (
    assert_equivariant,
    assert_equivariant_at,
    equivariance_error,
    equivariance_report,
)
from constrained_equiv.testing._laws import (
    action_laws,
    adapter_laws,
    equivariance_laws,
    group_laws,
    relaxation_laws,
    representation_laws,
    schedule_laws,
)
from constrained_equiv.testing._networks import Network, networks
from constrained_equiv.testing._profiles import load_profile, register_profiles
from constrained_equiv.testing._strategies import (
    elements,
    features,
    field_types,
    groups,
    irreps,
    point_clouds,
    representations,
    tensors,
)

__all__ = [
    "Network",
    "action_laws",
    "adapter_laws",
    "assert_equivariant",
    "assert_equivariant_at",
    "audit",
    "elements",
    "equivariance_error",
    "equivariance_laws",
    "equivariance_report",
    "features",
    "field_types",
    "group_laws",
    "groups",
    "irreps",
    "load_profile",
    "networks",
    "point_clouds",
    "register_profiles",
    "relaxation_laws",
    "representation_laws",
    "representations",
    "schedule_laws",
    "tensors",
]

register_profiles()
