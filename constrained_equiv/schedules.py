"""Constraint schedules: step -> level.

What enters: numbers. What leaves: plain functions of the step, called by `ConstrainedOptimizer` after each step.
Law: a schedule is defined for every step >= 0 and takes its end value exactly from step `steps` on.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from constrained_equiv.errors import ScheduleError

_Shape: TypeAlias = Literal["linear", "cosine", "exponential"]
Schedule: TypeAlias = Callable[[int], float]
"""A function from the number of finished optimizer steps to a level (or a scale)."""


@dataclass(frozen=True)
class Ramp:
    """Move from `start` to `end` within `steps` steps, then stay; made by `linear`, `cosine` and their like."""

    start: float
    end: float
    steps: int
    shape: _Shape = "linear"
    rate: float = 1.0

    def __post_init__(self) -> None:
        for name in ("start", "end", "rate"):
            _require_finite(name, getattr(self, name))
        _require_count("steps", self.steps, 0)
        if self.rate <= 0:
            raise ScheduleError(f"rate={self.rate!r}: expected a number > 0")
        if self.shape not in get_args(_Shape):
            raise ScheduleError(f"shape={self.shape!r}: expected one of {', '.join(map(repr, get_args(_Shape)))}")

    def __call__(self, step: int) -> float:
        """Return the level at a step."""
        if step >= self.steps:
            return self.end
        if step <= 0:
            return self.start
        fraction = step / self.steps
        if self.shape == "cosine":
            remaining = 0.5 * (1.0 + math.cos(math.pi * fraction))
        elif self.shape == "exponential":
            tail = math.expm1(-self.rate * (1.0 - fraction)) / math.expm1(-self.rate)
            remaining = math.exp(-self.rate * fraction) * tail
        else:
            remaining = 1.0 - fraction
        return self.end + (self.start - self.end) * remaining


@dataclass(frozen=True)
class Joined:
    """Schedules one after another; each sees steps counted from its own boundary."""

    schedules: tuple[Schedule, ...]
    boundaries: tuple[int, ...]

    def __call__(self, step: int) -> float:
        """Return the level at a step."""
        index = sum(step >= boundary for boundary in self.boundaries)
        return self.schedules[index](step - (0 if index == 0 else self.boundaries[index - 1]))


def constant(value: float) -> Ramp:
    """Return the same level at every step.

    Args:
        value: the level, in the unit of the measure it is used with.

    Example:
        >>> constant(0.1)(1_000)
        0.1
    """
    return Ramp(value, value, 0)


def linear(start: float, end: float, steps: int, *, steps_per_epoch: int = 1) -> Ramp:
    """Move on a straight line from `start` to `end`.

    Args:
        start: level at step 0.
        end: level from the last step on, taken exactly.
        steps: number of optimizer steps (of epochs, where `steps_per_epoch` is given).
        steps_per_epoch: optimizer steps per unit of `steps`.

    Raises:
        ScheduleError: if `steps` is negative, `steps_per_epoch` is not a positive integer, or a level is not finite.

    Example:
        >>> [linear(1.0, 0.0, 4)(step) for step in range(6)]
        [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """
    return Ramp(start, end, _total(steps, steps_per_epoch))


def cosine(start: float, end: float, steps: int, *, steps_per_epoch: int = 1) -> Ramp:
    """Move from `start` to `end` along half a cosine wave, slow at both ends; arguments as for `linear`.

    Example:
        >>> [round(cosine(1.0, 0.0, 4)(step), 3) for step in range(6)]
        [1.0, 0.854, 0.5, 0.146, 0.0, 0.0]
    """
    return Ramp(start, end, _total(steps, steps_per_epoch), "cosine")


def exponential(start: float, end: float, steps: int, *, rate: float = 5.0, steps_per_epoch: int = 1) -> Ramp:
    """Decay from `start` to `end` like exp(-rate * step / steps), shifted so that `end` is reached exactly.

    Args:
        start: level at step 0.
        end: level from the last step on; unlike for a plain exponential it may be 0.
        steps: as for `linear`.
        rate: number of e-foldings within `steps`; larger falls faster at first.
        steps_per_epoch: as for `linear`.

    Example:
        >>> [round(exponential(1.0, 0.0, 4)(step), 3) for step in range(6)]
        [1.0, 0.282, 0.076, 0.017, 0.0, 0.0]
    """
    return Ramp(start, end, _total(steps, steps_per_epoch), "exponential", rate)


def triangle(steps: int, *, peak: float = 1.0, steps_per_epoch: int = 1) -> Joined:
    """Rise from 0 to `peak` at half of `steps` and fall back to 0 at the end, the published schedule of the scale.

    Example:
        >>> [triangle(4)(step) for step in range(6)]
        [0.0, 0.5, 1.0, 0.5, 0.0, 0.0]

    Reference: Pertigkiozoglou et al. (2024), "Improving Equivariant Model Training via Constraint Relaxation". The
        published code stopped one step short of 0; this one ends there.
    """
    total = _total(steps, steps_per_epoch)
    half = total // 2
    return join([linear(0.0, peak, half), linear(peak, 0.0, total - half)], [half])


def join(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Joined:
    """Use `schedules[i]` from step `boundaries[i - 1]` on.

    Args:
        schedules: one more than `boundaries`; each counts its steps from its own boundary.
        boundaries: increasing steps.

    Raises:
        ScheduleError: if the counts do not fit or the boundaries do not increase.

    Example:
        >>> warm = join([constant(1.0), linear(1.0, 0.0, 2)], [3])
        >>> [warm(step) for step in range(6)]
        [1.0, 1.0, 1.0, 1.0, 0.5, 0.0]
    """
    if len(schedules) != len(boundaries) + 1:
        raise ScheduleError(
            f"join got {len(schedules)} schedules and {len(boundaries)} boundaries: expected one boundary fewer than "
            "schedules"
        )
    for boundary in boundaries:
        _require_count("boundary", boundary, 0)
    if list(boundaries) != sorted(boundaries):
        raise ScheduleError(f"boundaries={list(boundaries)}: expected steps in increasing order")
    return Joined(tuple(as_schedule(schedule) for schedule in schedules), tuple(boundaries))


def as_schedule(level: float | Schedule) -> Schedule:
    """Read a number as a constant schedule and leave a function of the step as it is.

    Raises:
        ScheduleError: if `level` is neither a finite number nor callable.
    """
    if callable(level):
        return level
    if isinstance(level, int | float) and not isinstance(level, bool):
        return constant(float(level))
    raise ScheduleError(
        f"level={level!r}: expected a number or a function of the step, such as ce.schedules.cosine(1.0, 0.0, 8_000)"
    )


def final_value(schedule: Schedule, step: int) -> float:
    """Return where a schedule ends: exactly for those of this module, and the value at `step` for other functions."""
    if isinstance(schedule, Joined):
        start = schedule.boundaries[-1] if schedule.boundaries else 0
        return final_value(schedule.schedules[-1], step - start)
    return float(schedule.end) if isinstance(schedule, Ramp) else value_at(schedule, step)


def value_at(schedule: Schedule, step: int) -> float:
    """Evaluate a schedule at a step and check what it returned.

    Raises:
        ScheduleError: if the value is not a finite number.
    """
    value = schedule(step)
    if type(value) is float and math.isfinite(value):  # before messages are composed, for this runs in every step
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ScheduleError(f"schedule {schedule!r} returned {value!r} at step {step}: expected a float")
    _require_finite(f"schedule {schedule!r} at step {step}", value)
    return float(value)


def _total(steps: int, steps_per_epoch: int) -> int:
    _require_count("steps", steps, 0)
    _require_count("steps_per_epoch", steps_per_epoch, 1)
    return steps * steps_per_epoch


def _require_count(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ScheduleError(f"{name}={value!r}: expected an integer >= {least}, a number of optimizer steps")


def _require_finite(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ScheduleError(f"{name}={value!r}: expected a finite number")
