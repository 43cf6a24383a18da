"""A symmetry moves every part of a structure by its own action, and actions are actions of the group."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from constrained_equiv import Symmetry, actions, groups
from constrained_equiv import representations as reps
from constrained_equiv.errors import RepresentationError

O3, S4, E3, D4 = groups.O3(), groups.symmetric(4), groups.E3(), groups.dihedral(4)
O3_SET = groups.product(O3, S4)

# name -> (group, action, shape of a tensor that it moves)
ACTIONS = {
    "vectors along the middle": (O3, actions.along(reps.vectors(1), -2), (5, 3, 4)),
    "irreps along the first axis": (O3, actions.along(reps.irreps("1x0e + 2x2e"), 0), (11, 2)),
    "nodes": (S4, actions.permute(0), (4, 3)),
    "nodes of a batch": (S4, actions.permute(-2), (2, 4, 3)),
    "both ends of edges": (S4, actions.permute(0, 1), (4, 4, 2)),
    "positions": (E3, actions.points, (5, 7, 3)),
    "one position": (E3, actions.points, (3,)),
    "velocities": (E3, actions.vectors, (5, 7, 3)),
    "points of a cloud": (
        O3_SET,
        actions.chain(
            actions.through(O3_SET, 0, actions.along(reps.vectors(1), -1)),
            actions.through(O3_SET, 1, actions.permute(-2)),
        ),
        (2, 4, 3),
    ),
    "images": (D4, actions.pixels, (2, 5, 5)),
    "even images": (D4, actions.pixels, (6, 6)),
    "feature maps": (D4, actions.feature_maps(reps.regular(D4)), (2, 8, 3, 3)),
}
seeds = st.integers(0, 2**32)


def drawn(group, seed, count=1):
    return group.sample(count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ACTIONS)
@given(seeds)
def test_acting_twice_is_acting_by_the_product(name, seed):
    group, act, shape = ACTIONS[name]
    g, h = drawn(group, seed, 2)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(act(g, act(h, x)), act(g @ h, x), rtol=1e-12, atol=1e-12)
    assert torch.equal(act(group.identity, x), x)
    assert act(g, x).shape == x.shape


@pytest.mark.parametrize("name", ACTIONS)
def test_actions_keep_dtype_and_device(name, device):
    group, act, shape = ACTIONS[name]
    for dtype in (torch.float32, torch.float64):
        moved = act(drawn(group, 0)[0], torch.ones(shape, dtype=dtype, device=device))
        assert moved.dtype == dtype and moved.device.type == device.type


def test_permutations_as_actions_agree_with_permutations_as_matrices():
    g = drawn(S4, 1)[0]
    nodes = torch.randn(4, 3, dtype=torch.float64)
    assert torch.equal(actions.permute(0)(g, nodes), g @ nodes)
    assert torch.equal(actions.permute(0)(g, nodes).flatten(), reps.permutation(4, channels=3).act(g, nodes.flatten()))


def test_motions_carry_differences_as_vectors():
    g = drawn(E3, 2)[0]
    a, b = torch.randn(2, 5, 3, dtype=torch.float64)
    assert torch.allclose(actions.points(g, a) - actions.points(g, b), actions.vectors(g, a - b), atol=1e-13)
    assert not torch.allclose(actions.points(g, a), actions.vectors(g, a))


def test_relabelled_edges_follow_the_permuted_nodes():
    g, h = drawn(S4, 4, 2)
    edges, nodes = torch.tensor([[0, 1, 3, 3], [1, 2, 0, 2]]), torch.randn(4, 2)
    assert torch.equal(actions.permute(0)(g, nodes)[actions.relabel(g, edges)], nodes[edges])
    assert torch.equal(actions.relabel(g, actions.relabel(h, edges)), actions.relabel(g @ h, edges))
    assert torch.equal(actions.relabel(S4.identity, edges), edges)


@pytest.mark.parametrize("size", [(4, 4), (5, 5), (2, 7), (1, 4)])
def test_quarter_turns_and_flips_of_images_move_pixels_exactly(size):
    image = torch.randn(3, *size)
    turn, flip = D4.generators
    assert torch.equal(actions.pixels(turn, image), torch.rot90(image, 1, (-2, -1)))  # counter-clockwise, y up
    assert torch.equal(actions.pixels(flip, image), image.flip(-2))
    assert torch.equal(actions.pixels(turn, actions.pixels(flip, image)), actions.pixels(turn @ flip, image))


@pytest.mark.parametrize(("angle", "atol"), [(0.3, 0.02), (2.0, 0.02)])
def test_other_turns_of_a_smooth_image_are_right_up_to_interpolation(angle, atol):
    y, x = torch.meshgrid(torch.linspace(4, -4, 65), torch.linspace(-4, 4, 65), indexing="ij")
    rotation = groups.SO2().element(torch.tensor([angle]))

    def bump(at):
        return torch.exp(-((x - at[0]) ** 2) - (y - at[1]) ** 2).double()

    at = torch.tensor([1.5, 0.5]).double()
    assert torch.allclose(actions.pixels(rotation, bump(at)), bump(rotation @ at), rtol=0, atol=atol)


class Prediction(NamedTuple):
    energy: torch.Tensor
    forces: torch.Tensor


def test_structures_are_moved_part_by_part():
    g = drawn(O3, 3)[0]
    scalar, vector = torch.randn(4, 1).double(), torch.randn(4, 3).double()
    turned = vector @ g.T
    symmetry = Symmetry(
        O3,
        inputs=("1x0e", {"x": "1x1o", "species": None}, ["1x1o", lambda g, x: -x]),
        outputs=(None, "1x1o"),
    )
    moved = symmetry.move_inputs(g, (scalar, {"x": vector, "species": 7}, [vector, scalar]))
    assert isinstance(moved, tuple) and isinstance(moved[1], dict) and isinstance(moved[2], list)
    for found, expected in ((moved[0], scalar), (moved[1]["x"], turned), (moved[2][0], turned), (moved[2][1], -scalar)):
        assert torch.allclose(found, expected, atol=1e-14)
    assert moved[1]["species"] == 7
    prediction = symmetry.move_outputs(g, Prediction(scalar, vector))
    assert isinstance(prediction, Prediction) and prediction.energy is scalar
    assert torch.allclose(prediction.forces, turned, atol=1e-14)


def test_actions_are_read_once():
    symmetry = Symmetry(O3, inputs="2x1o", outputs=["1x0e", None])
    assert symmetry.inputs == reps.vectors(2)
    assert symmetry.outputs == [reps.irreps("1x0e"), None]
    assert symmetry == Symmetry(groups.O3(), inputs=reps.vectors(2), outputs=["1x0e", None])


def test_irreps_of_e3nn_are_one_action_not_a_tuple_of_actions():
    o3 = pytest.importorskip("e3nn.o3")
    assert Symmetry(O3, o3.Irreps("2x0e + 1x1o"), None).inputs == reps.irreps("2x0e + 1x1o")


IDENTITY = O3.identity
BAD = {
    "no such factor": (lambda: actions.through(O3_SET, 2, actions.points), "expected one of"),
    "unreadable": (lambda: Symmetry(O3, "vectors", None), "cannot read 'vectors'"),
    "a number": (lambda: Symmetry(O3, 3, None), "cannot read '3'"),
    "irreps of another group": (lambda: Symmetry(S4, "1x0e", None), "of S_4"),
    "another group's representation": (lambda: Symmetry(S4, reps.vectors(1), None), r"belongs to O\(3\)"),
    "deep inside": (lambda: Symmetry(O3, None, {"forces": ["1x1o", "x"]}), "cannot read 'x'"),
    "too few parts": (
        lambda: Symmetry(O3, ("1x1o", None), None).move_inputs(IDENTITY, (torch.ones(3),)),
        "inputs: expected 2 parts, one per action, found 1 parts",
    ),
    "a tensor for a tuple": (
        lambda: Symmetry(O3, ("1x1o", None), None).move_inputs(IDENTITY, torch.ones(2, 3)),
        "inputs: expected 2 parts, one per action, found Tensor",
    ),
    "a tuple for a tensor": (
        lambda: Symmetry(O3, None, "1x1o").move_outputs(IDENTITY, (torch.ones(3),)),
        "outputs: 1x1o acts on a tensor, found tuple",
    ),
    "a missing key": (
        lambda: Symmetry(O3, None, {"e": None, "f": "1x1o"}).move_outputs(IDENTITY, {"f": torch.ones(3)}),
        r"keys \['e', 'f'\], found \['f'\]",
    ),
    "no dict": (
        lambda: Symmetry(O3, None, {"f": "1x1o"}).move_outputs(IDENTITY, torch.ones(3)),
        r"keys \['f'\], found Tensor",
    ),
    "the wrong size, deep inside": (
        lambda: Symmetry(O3, None, {"f": "2x1o"}).move_outputs(IDENTITY, {"f": torch.ones(4, 3)}),
        "expected 6",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    make, message = BAD[case]
    with pytest.raises(RepresentationError, match=message):
        make()
