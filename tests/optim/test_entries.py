"""What has a constraint of its own: layers, blocks, generators, or all layers together; and what breaks a subgroup."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import constrained_equiv as ce
from constrained_equiv import groups
from constrained_equiv import representations as reps
from constrained_equiv.intertwiners import intertwiners
from tests.optim.toys import SCATTERED, irreps, layers, minimise, points

ABOUT_Z = groups.matrix_group("turns about z", algebra=groups.SO3().algebra[2:])
SCREW = groups.matrix_group(
    "rotary reflections about z", generators=torch.tensor([[[0, -1, 0], [1, 0, 0], [0, 0, -1]]]).double()
)
NOTHING = groups.matrix_group("identity", generators=torch.eye(3)[None])


def values(record: Any) -> Tensor:
    return record.measure.values(record.terms)


def network(complement: bool = True) -> nn.Module:
    return nn.ModuleList([*irreps(2, complement=complement), *points(2, complement=complement)])


# --- blocks, generators, all layers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["whole", "non_equivariant"])
@pytest.mark.parametrize("complement", [True, False], ids=["complement", "free"])
@pytest.mark.parametrize("measure", [ce.constraints.weight, ce.constraints.relative])
def test_squares_of_blocks_add_up_to_their_layers(measure: Any, complement: bool, part: Any) -> None:
    model = network(complement)
    blocks = measure(model, level=1.0, per="block", part=part)
    whole = measure(model, level=1.0, part=part)
    sums = torch.zeros(4).double()
    for entry, value in zip(blocks.entries, values(blocks), strict=True):
        assert value > 0
        sums[list(entry.terms)] += value.square()
    assert torch.allclose(sums.sqrt(), values(whole), rtol=1e-12)


def test_a_block_is_the_map_between_all_copies_of_two_irreps() -> None:
    model = irreps(1)
    record = ce.constraints.weight(model, level=1.0, per="block")
    rows, columns = (reps.irreps(text) for text in reversed(SCATTERED))
    weight = record.terms.modules[0].weight.detach()
    labels = [[block.atom.name for block in r.blocks for _ in range(block.dim)] for r in (rows, columns)]
    found = {entry.name: float(value) for entry, value in zip(record.entries, values(record), strict=True)}
    assert list(found) == ["0[0e -> 1o]", "0[1o -> 1o]", "0[1e -> 1o]", "0[1o -> 0e]", "0[1e -> 0e]"]
    for name, value in found.items():
        source, target = name[2:-1].split(" -> ")
        block = weight[[a == target for a in labels[0]]][:, [a == source for a in labels[1]]]
        assert value == pytest.approx(float(block.norm()) / math.sqrt(11))


def test_blocks_of_equivariant_maps_alone_are_constrained_in_the_free_form_only() -> None:
    for complement, part, expected in ((True, "whole", 5), (False, "whole", 6), (False, "non_equivariant", 5)):
        record = ce.constraints.weight(irreps(1, complement=complement), level=1.0, per="block", part=part)
        assert len(record.entries) == expected


@pytest.mark.parametrize("complement", [True, False], ids=["complement", "free"])
def test_squares_of_generators_average_to_their_layers(complement: bool) -> None:
    model = network(complement)
    single = ce.constraints.lie(model, level=1.0, per="generator")
    whole = ce.constraints.lie(model, level=1.0)
    names = [entry.name for entry in single.entries]
    assert names[:4] == ["0[algebra 0]", "0[algebra 1]", "0[algebra 2]", "0[generator 0]"]
    assert names[8:] == ["2[generator 0]", "2[generator 1]", "3[generator 0]", "3[generator 1]"]
    means = [part.square().mean().sqrt() for part in torch.split(values(single), [4, 4, 2, 2])]
    assert torch.allclose(torch.stack(means), values(whole), rtol=1e-12)


def test_a_generator_is_blamed_for_what_it_alone_breaks() -> None:
    """Scalars to pseudoscalars commute with all rotations, but not with the inversion."""
    model, terms = layers((1, 1))
    with torch.no_grad():
        terms[0].weight.fill_(1.0)
    found = values(ce.constraints.lie(model, level=1.0, per="generator"))
    assert torch.allclose(found, torch.tensor([0.0, 0.0, 0.0, 2.0]).double())


@pytest.mark.parametrize("measure", [ce.constraints.weight, ce.constraints.relative])
def test_a_shared_value_is_the_root_mean_square_over_layers(measure: Any) -> None:
    model = network()
    shared, single = measure(model, level=1.0, per="model"), measure(model, level=1.0)
    assert torch.allclose(values(shared), values(single).square().mean().sqrt()[None], rtol=1e-12)
    assert [(entry.name, len(entry.terms)) for entry in shared.entries] == [("0 + ... + 3, 4 layers", 4)]
    some = measure(model, level=1.0, per="model", where=lambda name: name < "2")
    assert some.entries[0].name == "0 + 1"


def test_one_layer_carries_several_constraints() -> None:
    model = network()
    records = [
        ce.constraints.weight(model, level=0.05, per="block", where=lambda name: name < "2"),
        ce.constraints.weight(model, level=0.04, where=lambda name: name < "2"),
        ce.constraints.weight(model, level=0.1, per="model"),
        ce.constraints.lie(model, level=ce.schedules.linear(0.2, 0.1, 10), per="generator"),
        ce.constraints.subgroup(model, groups.SO3(), level=0.02, where=lambda name: name < "2"),
    ]
    optimizer = ce.ConstrainedOptimizer(torch.optim.Adam(model.parameters(), lr=0.01), *records)
    monitor = ce.monitor.Monitor(optimizer)
    minimise(optimizer, lambda: sum((r.term.weight - 1).square().sum() for r in ce.relaxations(model)), 20)
    now = optimizer.readings()
    assert tuple(monitor.verdicts()) == now.names
    assert len(set(now.names)) == len(now.names) == 10 + 2 + 1 + 12 + 2
    assert {"0[1o -> 1o] (weight)", "0 (weight)", "2[generator 1] (lie)", "1 (subgroup SO(3))"} < set(now.names)
    assert (now.multipliers >= 0).all() and (now.multipliers > 0).sum() > 10


# --- holding them -----------------------------------------------------------------------------------------------------


def at_level(record: Any, enforce: Any = "multipliers", steps: int = 1) -> ce.ConstrainedOptimizer:
    """Take steps without a task."""
    parameters = [p for term in record.terms.modules for p in term.parameters()]
    optimizer = ce.ConstrainedOptimizer(torch.optim.SGD(parameters, lr=0.1), record, enforce=enforce)
    minimise(optimizer, lambda: sum((0.0 * p).sum() for p in parameters), steps)
    return optimizer


RECORDS: dict[str, Any] = {
    "block": lambda m, level: ce.constraints.weight(m, level=level, per="block"),
    "block, non-equivariant part": lambda m, level: ce.constraints.weight(
        m, level=level, per="block", part="non_equivariant"
    ),
    "generator": lambda m, level: ce.constraints.lie(m, level=level, per="generator"),
    "model": lambda m, level: ce.constraints.weight(m, level=level, per="model"),
    "subgroup": lambda m, level: ce.constraints.subgroup(m, groups.SO3(), level=level),
}


@pytest.mark.parametrize("complement", [True, False], ids=["complement", "free"])
@pytest.mark.parametrize("name", RECORDS)
def test_projection_scales_what_is_above_its_level_and_nothing_else(name: str, complement: bool) -> None:
    model = irreps(2, complement=complement)
    level = float(values(RECORDS[name](model, 1.0)).quantile(0.5)) if name != "model" else 0.05
    record = RECORDS[name](model, level)
    before = values(record)
    at_level(record, "projection")
    after = values(record)
    assert (after <= level + 1e-12).all()
    if name != "generator":  # where a term is scaled as a whole
        assert torch.allclose(after, before.clamp_max(level), rtol=1e-12)
    weights = [r.term.weight.clone() for r in ce.relaxations(model)]
    at_level(record, "projection")
    assert all(
        torch.allclose(w, r.term.weight, atol=1e-14) for w, r in zip(weights, ce.relaxations(model), strict=True)
    )


@pytest.mark.parametrize("complement", [True, False], ids=["complement", "free"])
@pytest.mark.parametrize("name", RECORDS)
def test_level_zero_leaves_what_is_not_constrained(name: str, complement: bool) -> None:
    """Blocks and shared norms end the term; generators what breaks the group; a subgroup what breaks that."""
    model = irreps(2, complement=complement)
    record = RECORDS[name](model, 0.0)
    before = [r.term.weight.detach().clone() for r in ce.relaxations(model)]
    optimizer = at_level(record, steps=2)
    assert values(record).abs().max() < 1e-15
    for weight, r in zip(before, ce.relaxations(model), strict=True):
        space = r.term.projection
        if name == "subgroup":
            expected = space.restricted(groups.SO3()).project(weight)
        elif complement or name in ("block", "model"):
            expected = torch.zeros_like(weight)
            assert torch.equal(r.term.weight, expected)
        else:
            expected = space.project(weight)
        assert torch.allclose(r.term.weight, expected, atol=1e-14)
    moved = sum((r.term.weight - 1.0).square().sum() for r in ce.relaxations(model))
    moved.backward()
    optimizer.step()  # what is not constrained goes on learning, the rest does not
    assert values(record).abs().max() < 1e-15
    for r in ce.relaxations(model):
        ended = name != "subgroup" and (complement or name in ("block", "model"))
        assert torch.equal(r.term.weight, torch.zeros_like(r.term.weight)) == ended
        if not ended:  # nor does it reach the moments of the base
            space = r.term.projection.restricted(groups.SO3()) if name == "subgroup" else r.term.projection
            assert space.complement(r.term.weight.grad).abs().max() < 1e-14


@pytest.mark.parametrize("name", ["block", "subgroup"])
def test_proximal_steps_end_in_zero(name: str) -> None:
    model = irreps(2)
    record = RECORDS[name](model, 0.0)
    optimizer = ce.ConstrainedOptimizer(
        torch.optim.SGD(ce.parameter_groups(model, lr=0.1)), record, enforce="proximal", at_zero="multipliers"
    )
    minimise(optimizer, lambda: sum(0.01 * (r.term.weight).sum() for r in ce.relaxations(model)), 100)
    assert values(record).abs().max() < 1e-15


def test_learning_rates_differ_from_block_to_block_of_different_layers() -> None:
    """A proximal step is rate * slope^2 * multiplier / value, in each block the rate of its layer."""
    model = irreps(2)
    record = RECORDS["block"](model, 0.01)
    rates = [0.1, 0.2]
    groups_ = [{"params": list(layer.parameters()), "lr": lr} for layer, lr in zip(model, rates, strict=True)]
    optimizer = ce.ConstrainedOptimizer(torch.optim.SGD(groups_), record, enforce="proximal")
    before = values(record)
    minimise(optimizer, lambda: sum(0.0 * r.term.weight.sum() for r in ce.relaxations(model)), 1)
    pull = torch.tensor(rates).double().repeat_interleave(5) / 11 * 2 * (before - 0.01).clamp_min(0)  # lambda + c h
    assert torch.allclose(values(record), before - pull, rtol=1e-10)


# --- subgroups --------------------------------------------------------------------------------------------------------


C1, C2, C4, D4 = groups.cyclic(1), groups.cyclic(2), groups.cyclic(4), groups.dihedral(4)
O2, O3 = groups.O2(), groups.O3()
IRREPS = intertwiners("3x0e + 2x1o + 1x1e + 1x2e + 1x3o", "2x0e + 2x1o + 1x1e + 1x0o + 1x2e")
PLANE = intertwiners(
    reps.frequency(1, group=O2, channels=2) + reps.frequency(3, group=O2),
    reps.frequency(1, group=O2) + reps.frequency(2, group=O2) + reps.trivial(1, group=O2),
)
SETS = intertwiners(reps.permutation(4, channels=2), reps.permutation(4) + reps.permutation(4, order=2))
REGULAR = intertwiners(reps.regular(D4), reps.frequency(1, group=D4, channels=3))


def swaps(name: str, *orders: list[int]) -> groups.Group:
    return groups.matrix_group(name, generators=torch.eye(4)[torch.tensor(orders)])


# maps, and subgroups each of which holds the one before; the first holds the identity alone, the last is the group
CHAINS = {
    "irreps, rotations": (IRREPS, (NOTHING, ABOUT_Z, groups.SO3(), O3)),
    "irreps, a finite subgroup": (IRREPS, (NOTHING, SCREW, O3)),
    "plane, rotations": (PLANE, (C1, C2, C4, groups.SO2(), O2)),
    "plane, reflections": (PLANE, (C1, C2, groups.dihedral(2), D4, O2)),
    "sets": (
        SETS,
        (
            swaps("none", [0, 1, 2, 3]),
            swaps("one swap", [1, 0, 2, 3]),
            swaps("two swaps", [1, 0, 2, 3], [0, 1, 3, 2]),
            groups.symmetric(4),
        ),
    ),
    "regular": (REGULAR, (C1, C2, C4, D4)),
}
chains = pytest.mark.parametrize(("space", "chain"), CHAINS.values(), ids=CHAINS)


@chains
def test_the_larger_the_subgroup_the_more_breaks_it(space: Any, chain: Any) -> None:
    maps = torch.randn(*space.shape, dtype=torch.float64)
    inside = space.complement(maps)
    norms = [float(space.restricted(group).complement(inside).norm()) for group in chain]
    assert norms[0] == pytest.approx(0, abs=1e-12) and norms[-1] == pytest.approx(float(inside.norm()))
    assert all(less < more + 1e-12 for less, more in pairwise(norms))
    assert norms[1] > 0.1


@chains
def test_p_of_a_subgroup_is_the_average_over_it(space: Any, chain: Any) -> None:
    """Rank and value against a numerical average (finite) or the null space of the commutators (infinite)."""
    for group in chain:
        restricted = space.restricted(group)
        maps = torch.randn(*space.shape, dtype=torch.float64)
        kept = restricted.project(maps)
        elements = group.elements() if group.order else group.sample(4)
        left, right = space.outputs.matrix(elements), space.inputs.matrix(elements)
        assert torch.allclose(left @ kept, kept @ right, atol=1e-10)
        if group.order:
            assert torch.allclose(kept, (left.mT @ maps @ right).mean(0), atol=1e-10)
            characters = left.diagonal(dim1=1, dim2=2).sum(1) * right.diagonal(dim1=1, dim2=2).sum(1)
            assert restricted.rank == round(float(characters.mean()))
        assert torch.allclose(restricted.project(space.project(maps)), space.project(maps), atol=1e-10)


@pytest.mark.parametrize("group", [groups.SO3(), groups.O3()], ids=str)
def test_irreps_without_parity_have_the_rank_of_the_restriction(group: Any) -> None:
    texts = "3x0e + 2x1o + 2x1e + 1x2e", "2x0e + 4x1o + 1x2e"
    assert intertwiners(*texts).restricted(group).rank == intertwiners(*texts, group=group).rank


def test_the_whole_group_is_the_weight_and_no_group_is_nothing() -> None:
    model = irreps(2)
    weight = values(ce.constraints.weight(model, level=1.0))
    assert torch.allclose(values(ce.constraints.subgroup(model, groups.O3(), level=1.0)), weight)
    assert torch.allclose(values(ce.constraints.subgroup(model, NOTHING, level=1.0)), 0 * weight, atol=1e-15)
    free = irreps(2, complement=False)
    rest = values(ce.constraints.weight(free, level=1.0, part="non_equivariant"))
    assert torch.allclose(values(ce.constraints.subgroup(free, groups.O3(), level=1.0)), rest)


OUTSIDE = {
    "other matrices": (groups.SO2(), "size 2"),
    "a boost": (groups.matrix_group("boost", algebra=torch.diag(torch.tensor([1.0, 0, 0]))[None]), "direction 0"),
    "a shear": (
        groups.matrix_group("shear", generators=torch.tensor([[[1.0, 1, 0], [0, -1, 0], [0, 0, 1]]])),
        "generator 0",
    ),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_what_is_no_subgroup_is_refused(name: str) -> None:
    group, message = OUTSIDE[name]
    with pytest.raises(ce.errors.RepresentationError, match=message):
        ce.constraints.subgroup(irreps(1), group, level=0.1)


def test_reflections_are_no_rotations_and_turns_no_permutations() -> None:
    rotations = intertwiners("1x1", "1x1", group=groups.SO3())
    with pytest.raises(ce.errors.RepresentationError, match=r"generator 0.*no subgroup of SO\(3\)"):
        rotations.restricted(SCREW)
    with pytest.raises(ce.errors.RepresentationError, match="no subgroup of S_3"):
        intertwiners(*2 * (reps.permutation(3),)).restricted(ABOUT_Z)
    with pytest.raises(ce.errors.RepresentationError, match="no subgroup of S_3"):
        intertwiners(*2 * (reps.permutation(3),)).restricted(SCREW)


@pytest.mark.parametrize("per", ["layer", "generator", None])
def test_the_lie_derivative_of_an_empty_map_is_zero(per: Any) -> None:
    o3 = pytest.importorskip("e3nn.o3")
    model = ce.relax(nn.ModuleList([o3.Linear("", "1x1o"), o3.Linear("1x1o", "1x1o")]), complement=False, init=0.1)
    for layers_of in (model, nn.ModuleList([model[0]])):
        record = ce.constraints.lie(layers_of, level=0.1, **({} if per is None else {"per": per}))
        ce.ConstrainedOptimizer(torch.optim.SGD(layers_of.parameters(), lr=0.1), record).step()
        assert not values(record)[: 1 if per != "generator" else 4].any()
