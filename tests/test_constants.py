"""What is worked out once serves every later caller, whatever the first one had switched on."""

import contextlib

import pytest
import torch

from constrained_equiv import groups, intertwiners, kernels, representations
from constrained_equiv.intertwiners import Intertwiners
from tests.test_kernels import space_of

IRREPS, POINTS = representations.irreps("2x0e + 1x1o + 1x2e"), representations.permutation(4, channels=2)
TURNS = representations.frequency(1, group=groups.SO2(), channels=2)

SPACES = {
    "irreps": lambda: Intertwiners(IRREPS, IRREPS),
    "permutations": lambda: Intertwiners(POINTS, POINTS),
    "null space": lambda: Intertwiners(TURNS, TURNS),
    "kernels": lambda: space_of("C_4", 3, "interleaved").kernels,
}
FIRST = {
    "inference mode": torch.inference_mode,
    "another default device": lambda: torch.device("meta"),
    "a graph": contextlib.nullcontext,
}
CONSTANTS = (
    intertwiners._local_basis,
    intertwiners._atom_generators,
    kernels._places,
    kernels._prepared,
    representations.rotation_generators,
)


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("name", SPACES)
def test_a_first_use_in_any_mode_leaves_the_next_one_as_it_was(name, first):
    space = SPACES[name]()
    maps = torch.randn(2, *space.shape, dtype=torch.float64, requires_grad=True)

    def result_and_slope():
        value = space.defect(maps).sum() + space.project(maps).square().sum()
        return value.detach(), *torch.autograd.grad(value, maps)

    for constant in CONSTANTS:
        constant.cache_clear()
    expected = result_and_slope()
    for constant in CONSTANTS:
        constant.cache_clear()
    with FIRST[first]():
        space.defect(maps)
        space.project(maps)
    torch.testing.assert_close(result_and_slope(), expected, rtol=0, atol=0)
