"""Levels: where every constraint's bound is, and every scale, at the current step.

What enters: records and a step. What leaves: one vector of bounds on the device, and the same as plain numbers, from
which the host decides without reading the device. Driven by the engine.
Law: a bound is written only where it changed, so that a constant level costs nothing.
"""

from collections.abc import Sequence

from torch import Tensor

from constrained_equiv import _tensors
from constrained_equiv.constraints import Constraint, ScaleSchedule
from constrained_equiv.errors import ConstraintError
from constrained_equiv.schedules import Joined, Ramp, Schedule, value_at


class Levels:
    """The bounds of all constraints, one number per record, spread over its entries.

    Attributes:
        bounds: (n,) on the device.
        now: the number of each record.
        compared: the numbers that values were last compared with.
    """

    def __init__(
        self, records: Sequence[Constraint], slices: Sequence[slice], scales: Sequence[ScaleSchedule], bounds: Tensor
    ) -> None:
        self._records, self._slices, self._scales = records, slices, scales
        self.bounds = bounds
        self.now = [0.0] * len(records)
        self.compared = list(self.now)

    def move_to(self, step: int) -> None:
        """Write the bounds and the scales of a step.

        Raises:
            ConstraintError: if the level of an inequality is negative.
        """
        for i, (record, part) in enumerate(zip(self._records, self._slices, strict=True)):
            level = value_at(record.level, step)
            if level < 0 and record.type == "inequality":
                raise ConstraintError(
                    f"level {level} at step {step}: expected a bound >= 0, for {record.measure.name} is never negative"
                )
            if level != self.now[i]:
                self.bounds[part].fill_(level)
                self.now[i] = level
        for scale in self._scales:
            _tensors.fill_(scale.terms.scales(), value_at(scale.schedule, step))

    def compare(self) -> None:
        """Keep the current numbers as those that values were compared with."""
        self.compared = list(self.now)

    def last_compared(self) -> Tensor:
        """Return a copy of the bounds that values were last compared with."""
        bounds = self.bounds.clone()
        for part, now, compared in zip(self._slices, self.now, self.compared, strict=True):
            if now != compared:
                bounds[part].fill_(compared)
        return bounds

    def settled(self, step: int) -> bool:
        """Whether all levels and scales have reached their end; a schedule of the user's own ends where it is 0."""
        schedules = [record.level for record in self._records] + [record.schedule for record in self._scales]
        return all(_ended(schedule, step) for schedule in schedules)


def _ended(schedule: Schedule, step: int) -> bool:
    if isinstance(schedule, Ramp):
        return step >= schedule.steps
    if isinstance(schedule, Joined):
        last = schedule.boundaries[-1] if schedule.boundaries else 0
        return step >= last and _ended(schedule.schedules[-1], step - last)
    return value_at(schedule, step) == 0
