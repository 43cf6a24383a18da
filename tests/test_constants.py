"""What is worked out once serves every later caller, whatever the first one had switched on."""

import contextlib

import pytest
import torch

import constrained_equiv as ce
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


GROUPS = {
    "SO(2)": groups.SO2,
    "O(2)": groups.O2,
    "SO(3)": groups.SO3,
    "O(3)": groups.O3,
    "C_5": lambda: groups.cyclic(5),
    "D_3": lambda: groups.dihedral(3),
    "S_4": lambda: groups.symmetric(4),
    "T(2)": lambda: groups.translations(2),
    "E(3)": groups.E3,
    "SO+(1,3)": groups.SO13,
    "O(1,3)": groups.O13,
    "O(3) x S_3": lambda: groups.product(groups.O3(), groups.symmetric(3)),
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_live_on_the_cpu_whatever_the_default_device(name):
    with torch.device("meta"):
        group = GROUPS[name]()
        found = [group.algebra, group.generators, group.identity, group.sample(2)]
        found.append(group.element(torch.zeros(len(group.algebra), device="cpu")))
        found.append(representations.defining(group).matrix(group.sample(2)))
        if group.order is not None:
            found.append(group.elements())
            found.append(representations.regular(group).matrix(group.sample(2)))
    assert {tensor.device.type for tensor in found} == {"cpu"}


@pytest.mark.parametrize("text", ["2x0e + 1x1o", "1x2e + 1x0o"])
def test_a_check_on_the_cpu_does_not_mind_the_default_device(text):
    representation = representations.irreps(text)
    x = torch.randn(4, representation.dim, dtype=torch.float64)
    with torch.device("meta"):
        symmetry = ce.Symmetry(groups.O3(), representation, representation)
        assert ce.equivariance_error(lambda x: 2 * x, x, symmetry=symmetry) < 1e-12
        assert ce.equivariance_error(lambda x: x.cumsum(1), x, symmetry=symmetry) > 1e-2
