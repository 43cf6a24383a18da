"""Mutation check: does the suite notice deliberately wrong variants of the library?

    python -m tests.mutation.run            every mutant, after a run of the same tests without one
    python -m tests.mutation.run fibres_stay one_step_late

Each line says which test noticed. The exit status is 1 if a mutant survives. A few minutes on two cores.
"""

import importlib.util
import os
import subprocess
import sys

from tests.mutation.mutants import MUTANTS


def run(tests: tuple[str, ...], mutant: str = "") -> tuple[int, str]:
    """Run test files with a mutant until the first failure; return pytest's status and the test that failed."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "tests.mutation.mutants", "-p", "no:cacheprovider"]
    environment = os.environ | {"MUTANT": mutant, "HYPOTHESIS_PROFILE": "quick"}
    done = subprocess.run([*command, *tests], capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode, (lines or [""])[0].removeprefix("FAILED ").removeprefix("ERROR ").split(" - ")[0]


def main(names: list[str]) -> int:
    if unknown := set(names) - MUTANTS.keys():
        print(f"unknown mutants {sorted(unknown)}: expected some of {sorted(MUTANTS)}")
        return 2
    chosen = {name: MUTANTS[name] for name in names or MUTANTS}
    for tests in dict.fromkeys(mutant.tests for mutant in chosen.values()):
        status, failed = run(tests)
        if status != 0:
            print(f"without a mutant {' '.join(tests)} ends with status {status} {failed}: repair that first")
            return 2
    survivors, skipped = [], 0
    for name, mutant in chosen.items():
        if mutant.needs and importlib.util.find_spec(mutant.needs) is None:
            skipped += 1
            print(f"{mutant.topic:14} {name:28} skipped: needs {mutant.needs}")
            continue
        status, failed = run(mutant.tests, name)
        survivors += [name] * (status == 0)
        outcome = "SURVIVED" if status == 0 else "caught by " + (failed or f"status {status}")
        print(f"{mutant.topic:14} {name:28} {outcome}", flush=True)
    print(f"{len(survivors)} of {len(chosen) - skipped} mutants survived, {skipped} skipped")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
