"""Profiles: how many examples a property test tries.

What enters: nothing. What leaves: three Hypothesis profiles, registered under names of their own, so that a project's
profiles stay as they are.
Law: nothing is loaded unless asked for; `quick` and `ci` try the same examples at every run.
"""

import hypothesis

from constrained_equiv.errors import ConstrainedEquivError

PREFIX = "equivariance-"
EXAMPLES = {"quick": 10, "ci": 50, "thorough": 1_000}


def register_profiles() -> None:
    """Register `equivariance-quick`, `equivariance-ci` and `equivariance-thorough`; importing `testing` does it.

    They try 10, 50 and 1,000 examples per test; the first two the same ones at every run. There is no deadline, for the
    first example may build bases.
    """
    for name, examples in EXAMPLES.items():
        hypothesis.settings.register_profile(
            PREFIX + name,
            max_examples=examples,
            deadline=None,
            derandomize=name != "thorough",
            print_blob=True,
            suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
        )


def load_profile(name: str) -> None:
    """Make a profile the default of all property tests that are defined afterwards.

    Args:
        name: `quick`, `ci` or `thorough`. With pytest: `--equivariance-profile quick`.

    Raises:
        ConstrainedEquivError: if there is no such profile.
    """
    if name not in EXAMPLES:
        raise ConstrainedEquivError(f"profile {name!r}: expected one of {sorted(EXAMPLES)}")
    hypothesis.settings.load_profile(PREFIX + name)
