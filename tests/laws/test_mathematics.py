"""Laws of groups, representations, projections, actions and schedules, all of them drawn."""

import math

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from constrained_equiv import schedules, testing
from constrained_equiv.intertwiners import intertwiners
from tests.laws.drawn import law, seeds
from tests.testing.test_laws import ACTIONS


def once(test, *arguments):
    """One example of a law that the library ships."""
    test.hypothesis.inner_test(*arguments)


@law
@given(testing.groups(), st.data(), seeds)
def test_law_groups(group, data, seed):
    elements = testing.elements(group)
    once(testing.group_laws(group), data.draw(elements), data.draw(elements), seed)


@law
@given(testing.groups(), st.data())
def test_law_representations(group, data):
    representation, elements = data.draw(testing.representations(group, max_blocks=2)), testing.elements(group)
    once(testing.representation_laws(representation), data.draw(elements), data.draw(elements))


@law
@given(st.sampled_from(sorted(ACTIONS)), st.data())
def test_law_actions(name, data):
    action, values, group = ACTIONS[name]
    elements = testing.elements(group)
    test = testing.action_laws(action, values, group=group)
    once(test, data.draw(elements), data.draw(elements), data.draw(values))


@law
@given(testing.groups(), st.data(), seeds)
def test_law_intertwiners(group, data, seed):
    inputs, outputs = (data.draw(testing.representations(group, max_blocks=2, max_multiplicity=2)) for _ in range(2))
    assume(inputs.dim * outputs.dim <= 2_000)
    space = intertwiners(inputs, outputs)
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, *space.shape, dtype=torch.float64, generator=generator)
    kept = space.project(first)
    size = 1 + float(first.norm() * second.norm())
    assert torch.allclose(space.project(kept), kept, rtol=0, atol=1e-11)
    assert abs(float((kept * second).sum() - (first * space.project(second)).sum())) <= 1e-11 * size
    element = data.draw(testing.elements(group))
    left, right = outputs.matrix(element), inputs.matrix(element)
    gap = (left @ kept - kept @ right).norm()
    assert gap <= 1e-9 * (1 + left.norm() * kept.norm() + kept.norm() * right.norm())
    if space.rank == kept.numel():
        assert torch.allclose(kept, first, rtol=0, atol=1e-11)
    elif len(group.algebra) or len(group.generators):
        assert float(space.defect((first - kept)[None]).sum()) > 1e-12 * float((first - kept).square().sum()) >= 0


levels = st.floats(0, 10, allow_subnormal=False)
counts = st.integers(0, 300)


@st.composite
def ramps(draw):
    make = draw(st.sampled_from([schedules.linear, schedules.cosine, schedules.exponential]))
    steps, per_epoch = draw(counts), draw(st.sampled_from([1, 1, 7]))
    start, end = draw(levels), draw(st.one_of(st.just(0.0), levels))
    return make(start, end, steps, steps_per_epoch=per_epoch), steps * per_epoch, end, (start, end)


@st.composite
def drawn_schedules(draw):
    """A schedule, the step from which it stays, its end, and the values that it stays between."""
    kind = draw(st.sampled_from(["ramp", "triangle", "joined"]))
    if kind == "ramp":
        return draw(ramps())
    if kind == "triangle":
        steps, peak = draw(counts), draw(levels)
        return schedules.triangle(steps, peak=peak), steps, 0.0, (0.0, peak)
    first, last, boundary = draw(ramps()), draw(ramps()), draw(counts)
    return schedules.join([first[0], last[0]], [boundary]), boundary + last[1], last[2], (*first[3], *last[3])


@law
@given(drawn_schedules(), st.integers(0, 10**9), st.data())
def test_law_schedules_end_exactly(drawn, later, data):
    schedule, steps, end, between = drawn
    assert schedules.value_at(schedule, steps) == schedules.value_at(schedule, steps + later) == end
    assert schedules.final_value(schedule, 0) == end
    value = schedules.value_at(schedule, data.draw(st.integers(0, steps)))
    slack = 1e-12 * max(between)
    assert math.isfinite(value) and min(between) - slack <= value <= max(between) + slack
