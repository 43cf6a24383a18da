"""Install the wheel from a folder into a fresh environment elsewhere and use it there: python smoke_wheel.py DIST."""

import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

SMOKE = """
import sys
from importlib.metadata import version
from pathlib import Path

import constrained_equiv as ce

assert Path(ce.__file__).is_relative_to(sys.prefix), f"imported from {ce.__file__}, not from the wheel"
for name in ce.__all__:
    getattr(ce, name)
loaded = {"e3nn", "escnn", "hypothesis", "matplotlib"} & set(sys.modules)
assert not loaded, f"importing constrained_equiv loaded {loaded}"
print("constrained-equiv", version("constrained-equiv"), "with", len(ce.__all__), "public names")
"""


def main() -> None:
    (wheel,) = Path(sys.argv[1]).resolve().glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    foreign = {
        name.split("/")[0]
        for name in names
        if not name.startswith(("constrained_equiv/", "constrained_equiv-", "constrained_equiv_pytest.py"))
    }
    if foreign:
        sys.exit(f"the wheel holds more than the package and its pytest plugin: {sorted(foreign)}")
    if "constrained_equiv/py.typed" not in names:
        sys.exit("the wheel lacks constrained_equiv/py.typed")

    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if environ.get("PIP_CONSTRAINT"):
        environ["PIP_CONSTRAINT"] = Path(environ["PIP_CONSTRAINT"]).resolve().as_uri()
    with tempfile.TemporaryDirectory() as folder:
        venv.create(f"{folder}/venv", with_pip=True)
        python = f"{folder}/venv/{'Scripts' if os.name == 'nt' else 'bin'}/python"
        for command in (
            ["-m", "pip", "install", "--quiet", str(wheel)],
            ["-m", "pip", "check"],
            ["-W", "error", "-c", SMOKE],
        ):
            subprocess.run([python, *command], check=True, cwd=folder, env=environ)


if __name__ == "__main__":
    main()
