"""What every test may rely on: Hypothesis profiles, seeds, one thread, and fixtures for dtype, device and data.

Law: a test leaves torch as it found it, and draws the same numbers whichever tests ran before it.
"""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch


class _TorchRandom:
    """Lets Hypothesis seed torch before every example, as it does `random` and numpy."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


_TORCH_RANDOM = _TorchRandom()  # Hypothesis keeps a weak reference only
hypothesis.register_random(_TORCH_RANDOM)

for _name, _examples in {"quick": 20, "ci": 50, "thorough": 500}.items():
    hypothesis.settings.register_profile(
        _name,
        max_examples=_examples,
        deadline=None,
        derandomize=_name != "thorough",
        print_blob=True,
        suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
    )
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_sessionstart() -> None:
    """Small tensors gain nothing from threads, and test processes side by side lose by them."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state."""
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def float64_default() -> Iterator[None]:
    """Build e3nn layers for float64 laws: their constants are made in torch's default dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Run the test once per device that is there."""
    return torch.device(request.param)


@pytest.fixture
def data_root() -> Path:
    """The folder of the recorded data sets."""
    folder = os.environ.get("CONSTRAINED_EQUIV_DATA")
    if not folder:
        pytest.skip("CONSTRAINED_EQUIV_DATA does not name the folder of the data sets")
    return Path(folder)
