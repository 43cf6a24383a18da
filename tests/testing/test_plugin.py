"""The pytest face: one line in a user's repository gives fixtures and a profile option; nothing heavy is imported."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PLUGIN = ["-p", "constrained_equiv_pytest"]

SUITE = """
import hypothesis
import pytest
import torch

import constrained_equiv as ce

VECTORS = ce.Symmetry(ce.groups.O3(), "1x1o", "1x1o")


def test_profile():
    assert hypothesis.settings.get_current_profile_name() == "equivariance-quick"
    assert hypothesis.settings.default.max_examples == 10


def test_fixtures(assert_equivariant, equivariance_audit):
    assert_equivariant(lambda x: 2 * x, torch.ones(2, 3), symmetry=VECTORS)
    assert equivariance_audit(lambda x: 2 * x, torch.ones(2, 3), symmetry=VECTORS).passed


def test_broken(equivariance_audit):
    equivariance_audit(torch.nn.LayerNorm(3), torch.randn(2, 3), symmetry=VECTORS)
"""


def run_pytest(folder, *arguments):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *PLUGIN, *arguments]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment, timeout=300)


def test_fixtures_and_profile_in_a_users_repository(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\nequivariance_profile = thorough\n")
    (tmp_path / "test_user.py").write_text(SUITE)
    done = run_pytest(tmp_path, "--equivariance-profile", "quick")
    assert "2 passed" in done.stdout and "1 failed" in done.stdout, done.stdout + done.stderr
    assert "first lost at the model (LayerNorm)" in done.stdout


def test_the_ini_setting_is_the_default(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\nequivariance_profile = thorough\n")
    (tmp_path / "test_user.py").write_text(
        "import hypothesis\n\n\ndef test_it():\n    assert hypothesis.settings.default.max_examples == 1_000\n"
    )
    assert run_pytest(tmp_path).returncode == 0


def test_loading_the_plugin_imports_nothing_heavy(tmp_path):
    (tmp_path / "test_user.py").write_text(
        "import sys\n\n\ndef test_it():\n"
        "    assert not {'torch', 'numpy', 'hypothesis', 'constrained_equiv'} & set(sys.modules)\n"
    )
    done = run_pytest(tmp_path, "-p", "no:hypothesispytest")
    assert done.returncode == 0, done.stdout + done.stderr
    assert run_pytest(tmp_path, "--equivariance-profile", "enormous").returncode == 4  # a usage error
