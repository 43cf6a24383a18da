"""Several processes walk as one: same parameters, and identical multipliers on every rank."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("torch without distributed", allow_module_level=True)

from tests.optim.worker import CASES, CHECKPOINTS, SAVED, STEPS, Run, main

LIMIT = 240  # seconds, for processes that wait for each other


def start(function: Callable[..., Any], processes: int, *args: Any) -> None:
    """Run a function on several processes, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.optim.worker"])
    running = [context.Process(target=function, args=(rank, processes, *args)) for rank in range(processes)]
    for process in running:
        process.start()
    for process in running:
        process.join(LIMIT)
    stuck = [process for process in running if process.exitcode is None]
    for process in stuck:
        process.kill()
    assert not stuck and all(process.exitcode == 0 for process in running), "see the standard error of the processes"


def single(name: str) -> dict[str, Any]:
    run = Run({**CASES, **CHECKPOINTS}[name])
    run.train(0, STEPS)
    return run.result()


def resumed(name: str, path: Path) -> dict[str, Any]:
    run = Run(CHECKPOINTS[name])
    run.load(path)
    run.train(SAVED, STEPS)
    return run.result()


def assert_same(found: dict[str, Any], expected: dict[str, Any], name: str) -> None:
    atol = 1e-6 if "relative" in name or "activation" in name else 1e-12  # these record statistics in float32
    (alone,) = expected["processes"]
    for mine, theirs in zip(found["parameters"], expected["parameters"], strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=atol), name
    for process in found["processes"]:
        assert torch.equal(process["multipliers"], found["processes"][0]["multipliers"]), name
        assert torch.allclose(process["multipliers"], alone["multipliers"], rtol=0, atol=max(atol, 1e-10)), name
        assert process["step"] == alone["step"] == STEPS - ("nan" in name), name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")  # said by a checkpoint that one reads
def test_processes_equal_a_single_one_and_take_up_each_others_checkpoints(tmp_path: Path) -> None:
    """Two processes train and save; four train as well, and go on from what two have saved; so does one."""
    expected = {name: single(name) for name in (*CASES, *CHECKPOINTS)}
    assert all((e["processes"][0]["multipliers"] > 0).any() for n, e in expected.items() if "projection" not in n)
    for processes in (2, 4):
        start(main, processes, tmp_path)
        found = torch.load(tmp_path / f"found-{processes}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for name in expected:
            assert_same(found[name], expected[name], name)
    for name in CHECKPOINTS:
        assert_same(resumed(name, tmp_path / name), expected[name], name)
