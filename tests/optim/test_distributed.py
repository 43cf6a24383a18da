"""Several processes walk as one: same parameters, and identical multipliers on every rank."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import constrained_equiv as ce
from tests.optim import worker

ROOT = Path(__file__).parents[2]
CASES = [
    ("ddp", "weight", 2),
    ("ddp", "relative", 2),
    ("ddp", "activation", 2),
    ("fsdp", "weight", 2),
    ("fsdp", "two", 2),
    ("fsdp", "parts", 2),
    ("fsdp", "weight", 4),
]


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize(("strategy", "measure", "processes"), CASES)
def test_processes_equal_a_single_one(strategy: str, measure: str, processes: int, tmp_path: Path) -> None:
    path = tmp_path / "found.pt"
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)),
            *("-m", "tests.optim.worker", str(path), strategy, measure),
        ],
        check=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=240,
    )
    found = torch.load(path, weights_only=True)
    model = worker.Net()
    base = torch.optim.Adam(model.parameters(), lr=0.02)
    optimizer = ce.ConstrainedOptimizer(base, *worker.records(model, measure))
    parameters = worker.run(model, model, optimizer, slice(None))
    now = optimizer.readings()
    assert (now.multipliers > 0).any()
    for mine, theirs in zip(parameters, found["parameters"], strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-6 if measure in ("relative", "activation") else 1e-12)
    for theirs in found["multipliers"]:
        assert torch.equal(theirs, found["multipliers"][0])
        assert torch.allclose(theirs, now.multipliers, rtol=0, atol=1e-6)
    if strategy == "fsdp":
        assert found["state"] == ["param_groups", "state"]
