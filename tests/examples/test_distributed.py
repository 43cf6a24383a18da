"""The distributed example runs under torchrun, and two processes find what one finds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("e3nn")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed"),
]

ROOT = Path(__file__).parents[2]


def last_line(processes: int, *options: str) -> str:
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes))
    found = subprocess.run(
        [sys.executable, *launch, "-m", "examples.distributed", "--steps", "30", *options],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        timeout=240,
    )
    return found.stdout.splitlines()[-1]


def test_a_batch_that_the_processes_cannot_share_is_refused() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "examples.distributed", "--batch", "63"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "WORLD_SIZE": "2"},
        timeout=120,
    )
    assert found.returncode == 2
    assert "found --batch 63: expected a multiple of 2, the number of processes" in found.stderr


def test_two_processes_find_what_one_finds() -> None:
    alone = last_line(1)
    assert alone.endswith("same multipliers: True") and "largest term 0.0e+00" in alone
    assert last_line(2, "--strategy", "ddp") == alone
    assert last_line(2, "--strategy", "fsdp") == alone
