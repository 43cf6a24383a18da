"""Schedules are functions of the step: they start and end where they say, stay there, and never leave their bounds."""

import math
import operator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from constrained_equiv.errors import ScheduleError
from constrained_equiv.schedules import (
    Ramp,
    as_schedule,
    constant,
    cosine,
    exponential,
    final_value,
    join,
    linear,
    triangle,
    value_at,
)

RAMPS = {"linear": linear, "cosine": cosine, "exponential": exponential}
ramps = st.sampled_from(list(RAMPS.values()))
levels = st.floats(-1e6, 1e6)
counts = st.integers(0, 20_000)


@given(ramps, levels, levels, counts, st.integers(0, 10**9))
@example(linear, 1.0, 0.25, 0, 0)
def test_the_start_is_taken_exactly_and_the_end_is_taken_exactly_and_kept(ramp, start, end, steps, later):
    schedule = ramp(start, end, steps)
    assert schedule(steps) == schedule(steps + later) == end
    assert schedule(0) == (start if steps else end)
    assert schedule(-1) == schedule(0) or steps == 0


@given(ramps, levels, levels, st.integers(1, 20_000), counts, counts)
def test_ramps_are_monotone_and_within_their_bounds(ramp, start, end, steps, first, second):
    schedule, (first, second) = ramp(start, end, steps), sorted((first, second))
    early, late = schedule(first), schedule(second)
    ulp = 4 * math.ulp(max(abs(start), abs(end)))
    assert (late - early) * math.copysign(1.0, end - start) >= -ulp
    assert min(start, end) - ulp <= early <= max(start, end) + ulp


@given(ramps, st.floats(0.01, 100.0), st.integers(2, 20_000), st.data())
def test_a_ramp_to_zero_is_positive_until_its_end(ramp, start, steps, data):
    assert ramp(start, 0.0, steps)(data.draw(st.integers(0, steps - 1))) > 0


@given(ramps, counts, st.integers(1, 500), st.integers(0, 10**6))
def test_epochs_are_steps(ramp, epochs, steps_per_epoch, step):
    by_epoch = ramp(1.0, 0.1, epochs, steps_per_epoch=steps_per_epoch)
    assert by_epoch(step) == ramp(1.0, 0.1, epochs * steps_per_epoch)(step)


@given(st.floats(1e-12, 1e4), st.integers(1, 1_000))
def test_exponential_is_the_shifted_exponential_for_every_rate(rate, steps):
    step = steps // 2
    fraction = step / steps
    if rate < 1e-6:
        expected = 1.0 - fraction
    else:
        expected = (math.exp(-rate * fraction) - math.exp(-rate)) / -math.expm1(-rate)
    assert exponential(1.0, 0.0, steps, rate=rate)(step) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_cosine_is_half_a_wave():
    schedule = cosine(3.0, 1.0, 100)
    for step in range(101):
        assert schedule(step) == pytest.approx(2.0 + math.cos(math.pi * step / 100), abs=1e-14)


@given(st.integers(2, 10_000), st.floats(0.1, 10.0), st.integers(0, 20_000))
def test_the_triangle_rises_to_its_peak_and_ends_at_zero_exactly(steps, peak, step):
    schedule = triangle(steps, peak=peak)
    assert schedule(0) == 0.0 or steps < 2
    assert schedule(steps // 2) == peak
    assert schedule(steps) == schedule(steps + step) == 0.0
    assert 0.0 <= schedule(step) <= peak
    assert triangle(steps, peak=peak, steps_per_epoch=3)(step) == triangle(3 * steps, peak=peak)(step)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=4), st.integers(0, 300))
def test_joined_schedules_count_from_their_own_boundary(lengths, step):
    boundaries = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    parts = [lambda s, i=i: 1_000.0 * i + s for i in range(len(lengths) + 1)]
    active = max((i + 1 for i, boundary in enumerate(boundaries) if step >= boundary), default=0)
    assert join(parts, boundaries)(step) == 1_000.0 * active + step - (boundaries[active - 1] if active else 0)


def test_joins_nest_and_switch_at_the_boundary():
    schedule = join([constant(1.0), join([linear(1.0, 0.5, 2), constant(0.25)], [3])], [4])
    assert [schedule(step) for step in range(9)] == [1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.25]


def test_any_function_of_the_step_is_a_schedule():
    def halves(step):
        return 2.0**-step

    assert as_schedule(halves) is halves
    assert value_at(as_schedule(halves), 3) == 0.125
    assert value_at(lambda step: step, 3) == 3.0
    assert isinstance(value_at(lambda step: step, 3), float)
    assert as_schedule(2)(10**9) == 2.0


@given(levels, counts)
def test_a_constant_is_constant(value, step):
    assert constant(value)(step) == value


BAD = {
    "negative steps": (lambda: linear(1.0, 0.0, -1), "steps=-1"),
    "fractional steps": (lambda: cosine(1.0, 0.0, 2.5), "steps=2.5"),
    "boolean steps": (lambda: exponential(1.0, 0.0, True), "steps=True"),
    "negative steps times negative epochs": (lambda: linear(1.0, 0.0, -2, steps_per_epoch=-1), "steps=-2"),
    "no steps per epoch": (lambda: linear(1.0, 0.0, 4, steps_per_epoch=0), "steps_per_epoch=0"),
    "fractional steps per epoch": (lambda: triangle(4, steps_per_epoch=0.5), "steps_per_epoch=0.5"),
    "negative triangle": (lambda: triangle(-1), "steps=-1"),
    "nan level": (lambda: cosine(1.0, math.nan, 4), "end=nan"),
    "infinite level": (lambda: cosine(math.inf, 0.0, 4), "start=inf"),
    "level in words": (lambda: linear("high", 0.0, 4), "start='high'"),
    "rate of zero": (lambda: exponential(1.0, 0.0, 4, rate=0.0), "rate=0.0"),
    "unknown shape": (lambda: Ramp(1.0, 0.0, 4, "quadratic"), "quadratic"),
    "not callable": (lambda: as_schedule("cosine"), "level='cosine'"),
    "boolean level": (lambda: as_schedule(True), "level=True"),
    "no level": (lambda: as_schedule(None), "level=None"),
    "too few boundaries": (lambda: join([constant(1.0), constant(0.0)], []), "2 schedules and 0 boundaries"),
    "falling boundaries": (lambda: join([1.0, 0.5, 0.0], [5, 3]), r"\[5, 3\]"),
    "negative boundary": (lambda: join([1.0, 0.0], [-1]), "boundary=-1"),
    "part not callable": (lambda: join([1.0, "end"], [3]), "level='end'"),
    "returns nan": (lambda: value_at(lambda step: math.nan, 7), "at step 7=nan"),
    "returns infinity": (lambda: value_at(lambda step: math.inf, 7), "at step 7=inf"),
    "returns nothing": (lambda: value_at(lambda step: None, 7), "None at step 7"),
    "returns a truth value": (lambda: value_at(operator.not_, 0), "True at step 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    make, message = BAD[case]
    with pytest.raises(ScheduleError, match=message):
        make()


def test_a_function_behind_a_boundary_ends_where_it_is():
    """Its steps count from the boundary, when it is asked where it ends too."""
    for slope in (0.005, -0.005):
        schedule = join([0.3, lambda step, slope=slope: 0.25 + slope * step], [100])
        assert final_value(schedule, 150) == schedule(150)
