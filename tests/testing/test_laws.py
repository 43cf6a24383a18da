"""Each law holds for what is right, and fails for a wrong variant of it: a law that cannot fail is none."""

from dataclasses import replace

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

import constrained_equiv as ce
from constrained_equiv import Symmetry, actions, groups, schedules, testing
from constrained_equiv import representations as reps
from constrained_equiv.representations import Atom, Block, Representation
from tests.cases import CASES, VectorMap

O3, S4, C4 = groups.O3(), groups.symmetric(4), groups.cyclic(4)


hypothesis.settings.register_profile(
    "laws of laws",
    parent=hypothesis.settings.get_profile("equivariance-quick"),
    max_examples=8,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
)


@pytest.fixture(autouse=True)
def few_examples():
    """Laws take the profile that is loaded when they are made; a few examples, not shrunk, tell right from wrong."""
    before = hypothesis.settings.get_current_profile_name()
    hypothesis.settings.load_profile("laws of laws")
    yield
    hypothesis.settings.load_profile(before)


EYE = torch.eye(3, dtype=torch.float64)


def renamed(group, **changes):
    return replace(group, name=f"wrong {group.name}", **changes)


GROUPS = [
    groups.SO2(),
    groups.O2(),
    groups.SO3(),
    O3,
    groups.E3(),
    groups.SO13(),
    groups.O13(),
    groups.cyclic(1),
    groups.cyclic(6),
    groups.dihedral(4),
    groups.symmetric(5),
    groups.translations(3),
    groups.product(O3, S4),
]
WRONG_GROUPS = {
    "an algebra that is not closed": lambda: renamed(O3, algebra=O3.algebra[:2]),
    "a direction that is no rotation": lambda: renamed(O3, algebra=torch.cat([O3.algebra, EYE.flip(0)[None]])),
    "too small an order": lambda: renamed(C4, order=2),
    "samples that are no elements": lambda: renamed(C4, draw=groups.SO2().draw),
    "samples that are no rotations": lambda: renamed(
        groups.SO3(), draw=lambda n, g: torch.randn(n, 3, 3, dtype=torch.float64, generator=g)
    ),
    "samples that do not repeat": lambda: renamed(O3, draw=lambda n, g: groups.O3().draw(n, None)),
    "elements of another size": lambda: renamed(C4, draw=groups.SO3().draw),
}


@pytest.mark.parametrize("group", GROUPS, ids=str)
def test_groups_obey_their_laws(group):
    testing.group_laws(group)()


@pytest.mark.parametrize("name", WRONG_GROUPS)
def test_wrong_groups_are_caught(name):
    with pytest.raises((AssertionError, ce.errors.RepresentationError)):
        testing.group_laws(WRONG_GROUPS[name]())()


def atom(group, dim, matrix):
    return Representation(group, (Block(2, Atom("wrong", dim, matrix)),))


REPRESENTATIONS = [
    reps.irreps("2x0e + 1x1o + 1x2e + 1x3o"),
    reps.irreps("1x1 + 1x2", group=groups.SO3(), layout="ir_mul"),
    reps.frequency(3, group=groups.O2(), channels=2),
    reps.permutation(4, channels=2, order=2),
    reps.regular(groups.dihedral(3)) + reps.trivial(2, group=groups.dihedral(3)),
    reps.defining(groups.SO13()),
    reps.lift(reps.irreps("1x1o"), groups.product(O3, S4), 0),
]
WRONG_REPRESENTATIONS = {
    "a map that turns the order round": lambda: atom(S4, 4, lambda g: g.mT),
    "not the identity at the identity": lambda: atom(O3, 3, lambda g: 2 * g),
    "a derivative that is lost": lambda: atom(groups.SO2(), 2, lambda g: g.detach()),
}


@pytest.mark.parametrize("representation", REPRESENTATIONS, ids=str)
def test_representations_obey_their_laws(representation):
    testing.representation_laws(representation)()


@pytest.mark.parametrize("name", WRONG_REPRESENTATIONS)
def test_wrong_representations_are_caught(name):
    with pytest.raises(AssertionError):
        testing.representation_laws(WRONG_REPRESENTATIONS[name]())()


BOTH = groups.product(O3, groups.symmetric(5))
CLOUD = actions.chain(
    actions.through(BOTH, 0, actions.along(reps.vectors(1), -1)), actions.through(BOTH, 1, actions.permute(-2))
)
IMAGES = testing.tensors((2, 5, 5))
EDGES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1).map(lambda e: torch.tensor(e).mT)
ACTIONS = {
    "representation": (reps.irreps("1x0e + 1x1o"), testing.tensors((3, 4)), O3),
    "points": (actions.points, testing.point_clouds(), groups.E3()),
    "velocities": (actions.vectors, testing.point_clouds(), groups.E3()),
    "nodes": (actions.permute(-2), testing.tensors((2, 4, 3)), S4),
    "adjacency": (actions.permute(-2, -1), testing.tensors((2, 4, 4)), S4),
    "edge index": (lambda g, e: actions.relabel(g, e.long()).double(), EDGES.map(torch.Tensor.double), S4),
    "cloud of named points": (CLOUD, testing.tensors((5, 3)), BOTH),
    "pixels under quarter turns": (actions.pixels, IMAGES, C4),
    "pixels under quarter turns and flips": (actions.pixels, IMAGES, groups.dihedral(4)),
    "wide pixels": (actions.pixels, testing.tensors((2, 3, 4)), groups.dihedral(4)),
    "regular feature maps": (actions.feature_maps(reps.regular(C4)), testing.tensors((4, 3, 3)), C4),
    "four-vectors": (reps.defining(groups.O13()), testing.tensors((5, 4)), groups.O13()),
}
WRONG_ACTIONS = {
    "permuted the other way": (lambda g, x: actions.permute(-2)(g, actions.permute(-2)(g, x)), *ACTIONS["nodes"][1:]),
    "relabelled the other way": (lambda g, e: g.argmax(-1)[e.long()].double(), *ACTIONS["edge index"][1:]),
    "multiplied from the wrong side": (lambda g, x: x @ g, testing.tensors((4, 3)), O3),
    "shift forgotten": (lambda g, x: x @ g[:3, :3].mT + 1, testing.point_clouds(min_points=1), groups.E3()),
    "pixels turned the other way": (lambda g, x: actions.pixels(g.mT, x), IMAGES, groups.dihedral(4)),
}


@pytest.mark.parametrize("name", ACTIONS)
def test_actions_obey_their_laws(name):
    action, values, group = ACTIONS[name]
    testing.action_laws(action, values, group=group)()


@pytest.mark.parametrize("name", WRONG_ACTIONS)
def test_wrong_actions_are_caught(name):
    action, values, group = WRONG_ACTIONS[name]
    with pytest.raises(AssertionError):
        testing.action_laws(action, values, group=group)()


SCHEDULES = [
    (schedules.cosine(1.0, 0.0, 100), 100, 0.0),
    (schedules.exponential(2.0, 0.1, 30), 30, 0.1),
    (schedules.triangle(7), 7, 0.0),
    (schedules.join([schedules.constant(1.0), schedules.linear(1.0, 0.0, 5)], [3]), 8, 0.0),
]


@pytest.mark.parametrize(("schedule", "steps", "end"), SCHEDULES)
def test_schedules_obey_their_laws(schedule, steps, end):
    testing.schedule_laws(schedule, steps=steps, end=end)()


@pytest.mark.parametrize(
    "schedule",
    [
        lambda step: 2 / 10 if step >= 9 else 2 * (10 - step) / 10,  # trap 8: one step short of the end
        lambda step: 0.9**step,
        lambda step: float("nan") if step == 3 else 0.0,
        lambda step: max(0.0, 1 - step / 11),
    ],
    ids=["stops at 2 / steps", "never ends", "not a number", "one step late"],
)
def test_wrong_schedules_are_caught(schedule):
    with pytest.raises((AssertionError, ce.errors.ScheduleError)):
        testing.schedule_laws(schedule, steps=10, end=0.0)()


def stretch(x):
    return x * torch.tensor([1.0, 1.0, 1.1], dtype=x.dtype)


VECTORS = Symmetry(O3, "1x1o", "1x1o")


def test_equivariance_laws_pass_and_fail():
    testing.equivariance_laws(lambda x: 2 * x, testing.point_clouds(), symmetry=VECTORS)()
    testing.equivariance_laws(lambda x: 2 * x, torch.ones(2, 3), symmetry=VECTORS)()
    with pytest.raises(ce.errors.EquivarianceError):
        testing.equivariance_laws(stretch, testing.point_clouds(), symmetry=VECTORS)()


# the laws of relaxation themselves are tested over the whole table in tests/test_relax.py and tests/test_finalize.py
CHOSEN = (
    "e3nn linear",
    "e3nn gate network",
    "vectors, own layer",
    "sets, own layer",
    "finite group, own layer",
    "escnn linear, C_8",
    "vector neurons, rank 3",
)
MODELS = [case for case in CASES if case.id in CHOSEN]
LAYERS = [case for case in MODELS if case.values[0].linear]


def arguments(case):
    data = case.data()
    return data if len(data) > 1 else data[0]


@pytest.mark.parametrize("case", LAYERS)
def test_adapters_obey_their_laws(case):
    adapter = case.adapter() if case.adapter else None
    testing.adapter_laws(case.model, arguments(case), symmetry=case.symmetry(), adapter=adapter)()


@pytest.mark.parametrize("case", MODELS)
def test_relaxation_obeys_its_laws(case):
    adapter = case.adapter() if case.adapter else None
    law = testing.relaxation_laws(
        case.model, arguments(case), symmetry=case.symmetry(), where=case.where, adapter=adapter
    )
    law()


def vector_map():
    torch.manual_seed(0)
    return VectorMap(3, 3).double()


ROWS = actions.along(reps.vectors(1), -1)
MAPS = Symmetry(O3, ROWS, ROWS)
RIGHT = ce.adapters.linear(reps.vectors(3), reps.vectors(3), axes=(1, 2))
X = torch.randn(4, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def with_methods(change):
    """The right adapter with another forward pass."""

    def methods(base):
        return {"forward": change(base)}

    return replace(RIGHT, methods=methods)


def added(term, features, factor=1.0):
    return factor * (features.flatten(1) @ term.matrix().mT).view(features.shape)


WRONG_ADAPTERS = {
    "wrong axes": ce.adapters.linear(reps.vectors(3), reps.vectors(3), axes=(2, 1)),
    "wrong layout": ce.adapters.linear(reps.vectors(3, layout="ir_mul"), reps.vectors(3, layout="ir_mul"), axes=(1, 2)),
    "wrong representation": ce.adapters.linear(reps.trivial(9, group=O3), reps.trivial(9, group=O3), axes=(1, 2)),
    "term forgotten": with_methods(lambda base: base.forward),
    "term always on": with_methods(
        lambda base: lambda self, x: base.forward(self, x) + added(self.non_equivariant, x) + 0 * x
    ),
    "term squared": with_methods(
        lambda base: (
            lambda self, x: (
                base.forward(self, x) + added(self.non_equivariant, x).square()
                if self.non_equivariant.active
                else base.forward(self, x)
            )
        )
    ),
    "scaled by the layer's output": with_methods(
        lambda base: (
            lambda self, x: (
                base.forward(self, x) * 1.001 + added(self.non_equivariant, x)
                if self.non_equivariant.active
                else base.forward(self, x)
            )
        )
    ),
}


def test_the_right_adapter_passes():
    testing.adapter_laws(vector_map, X, symmetry=MAPS, adapter=RIGHT)()


@pytest.mark.parametrize("name", WRONG_ADAPTERS)
def test_wrong_adapters_are_caught(name):
    with pytest.raises(AssertionError):
        testing.adapter_laws(vector_map, X, symmetry=MAPS, adapter=WRONG_ADAPTERS[name])()


class Rounding(nn.Module):
    """Keeps a buffer that every call changes: finalize cannot give the same output back."""

    def __init__(self):
        super().__init__()
        self.inner = vector_map()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.calls += 1
        return self.inner(x) * self.calls


@pytest.mark.parametrize(
    ("build", "adapter"),
    [(Rounding, RIGHT), (vector_map, WRONG_ADAPTERS["term forgotten"]), (vector_map, WRONG_ADAPTERS["term always on"])],
    ids=["a model with state", "term forgotten", "term always on"],
)
def test_broken_relaxations_are_caught(build, adapter):
    with pytest.raises(AssertionError):
        testing.relaxation_laws(
            build, X, symmetry=MAPS, where=lambda name, layer: isinstance(layer, VectorMap), adapter=adapter
        )()
