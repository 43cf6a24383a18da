"""The mutation check itself: it catches a wrong variant, and tells a survivor and a broken suite."""

import pytest

from tests.mutation import run
from tests.mutation.mutants import MUTANTS, Mutant


def test_the_required_topics_are_covered():
    assert {"projection", "parity", "kernel fibres", "schedule end"} <= {mutant.topic for mutant in MUTANTS.values()}
    assert all(mutant.apply.__doc__ for mutant in MUTANTS.values())


@pytest.mark.slow
def test_a_mutant_is_caught(capsys):
    assert run.main(["one_step_short"]) == 0
    assert "caught by tests/test_schedules.py" in capsys.readouterr().out


def test_survivors_and_broken_suites_are_reported(capsys, monkeypatch):
    monkeypatch.setitem(MUTANTS, "harmless", Mutant("none", lambda: None, ("tests",)))
    monkeypatch.setattr(run, "run", lambda tests, mutant="": (0, ""))
    assert run.main(["harmless"]) == 1 and "SURVIVED" in capsys.readouterr().out
    monkeypatch.setattr(run, "run", lambda tests, mutant="": (1, "tests/test_x.py::test_y"))
    assert run.main(["harmless"]) == 2 and "repair that first" in capsys.readouterr().out
    assert run.main(["unheard_of"]) == 2
