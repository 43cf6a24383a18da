"""pytest plugin of constrained_equiv: fixtures and the option --equivariance-profile.

A module of its own beside the package, because pytest loads plugins in every session: this one imports torch only where
a fixture or the option is used.
"""

from collections.abc import Callable
from typing import Any

import pytest

PROFILES = ("quick", "ci", "thorough")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option, and the ini setting of the same name."""
    group = parser.getgroup("constrained_equiv", "equivariance tests")
    group.addoption(
        "--equivariance-profile",
        choices=PROFILES,
        default=None,
        help="how many examples property tests try: quick 10, ci 50, thorough 1,000 (default: your own profile)",
    )
    parser.addini("equivariance_profile", "default of --equivariance-profile", default="")


def pytest_configure(config: pytest.Config) -> None:
    """Load the profile that was asked for, before tests are defined."""
    name = config.getoption("--equivariance-profile") or config.getini("equivariance_profile")
    if name:
        from constrained_equiv.testing import load_profile

        load_profile(name)


@pytest.fixture
def assert_equivariant() -> Callable[..., None]:
    """Give `constrained_equiv.assert_equivariant`."""
    import constrained_equiv

    return constrained_equiv.assert_equivariant


@pytest.fixture
def equivariance_audit(record_property: Callable[[str, object], None]) -> Callable[..., Any]:
    """Give a function that audits a model, prints the table, and fails the test where equivariance is lost.

    It takes the arguments of `constrained_equiv.audit` and returns the `Audit`; the error goes into the JUnit report.
    """
    from constrained_equiv.errors import EquivarianceError
    from constrained_equiv.testing import audit

    def check(*arguments: Any, **options: Any) -> Any:
        found = audit(*arguments, **options)
        record_property("equivariance_error", found.error)
        if not found.passed:
            raise EquivarianceError(repr(found))
        return found

    return check
