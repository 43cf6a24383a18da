"""Monitor: the history of values, levels and multipliers while training.

What enters: a `ConstrainedOptimizer`. What leaves: arrays, a line for a progress bar, a CSV file, a plot.
Law: recording copies device tensors and reads nothing; the host reads when it is asked for numbers.
"""

import csv
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from constrained_equiv._optim import ConstrainedOptimizer, Readings
from constrained_equiv.errors import ConstraintError


class History(NamedTuple):
    """Recorded numbers.

    Attributes:
        steps: (t,) finished steps at each record.
        names: of the constraints.
        values: (t, n) what was measured.
        levels: (t, n) the bounds.
        multipliers: (t, n).
    """

    steps: np.ndarray[Any, np.dtype[np.int64]]
    names: tuple[str, ...]
    values: np.ndarray[Any, np.dtype[np.float64]]
    levels: np.ndarray[Any, np.dtype[np.float64]]
    multipliers: np.ndarray[Any, np.dtype[np.float64]]


class Monitor:
    """Record the state of all constraints after every `every`-th step of an optimizer.

    Args:
        optimizer: whose steps are recorded, through a step hook.
        every: distance between records, in optimizer steps.

    Raises:
        ConstraintError: if `every` is not positive.
    """

    def __init__(self, optimizer: ConstrainedOptimizer, *, every: int = 1) -> None:
        if every < 1:
            raise ConstraintError(f"every={every!r}: expected an integer >= 1, the distance between records in steps")
        self.every = every
        self._optimizer = optimizer
        self._records: list[Readings] = []
        optimizer.register_step_post_hook(lambda *_: self._record())

    def _record(self) -> None:
        if self._optimizer.constraints and self._optimizer.finished_steps % self.every == 0:
            self._records.append(self._optimizer.readings())

    def summary(self) -> str:
        """Return one line with the worst violation and the largest multiplier; reads the device."""
        now = self._optimizer.readings()
        if not now.names:
            return f"step {now.step}"
        violations = now.values - now.levels
        worst, largest = int(violations.argmax()), int(now.multipliers.argmax())
        return (
            f"step {now.step}: worst violation {float(violations[worst]):+.2e} in {now.names[worst]}, "
            f"largest multiplier {float(now.multipliers[largest]):.2e} in {now.names[largest]}"
        )

    def history(self) -> History:
        """Return everything recorded so far as arrays; reads the device."""
        if not self._records:
            empty = np.zeros((0, 0))
            return History(np.zeros(0, dtype=np.int64), (), empty, empty, empty)

        def stack(which: str) -> np.ndarray[Any, np.dtype[np.float64]]:
            return torch.stack([getattr(r, which) for r in self._records]).double().cpu().numpy()

        steps = np.array([r.step for r in self._records], dtype=np.int64)
        return History(steps, self._records[0].names, stack("values"), stack("levels"), stack("multipliers"))

    def write_csv(self, path: str | Path) -> None:
        """Write one row per record and constraint: step, constraint, value, level, multiplier."""
        history = self.history()
        with Path(path).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "constraint", "value", "level", "multiplier"])
            for t, step in enumerate(history.steps):
                for i, name in enumerate(history.names):
                    numbers = (history.values[t, i], history.levels[t, i], history.multipliers[t, i])
                    writer.writerow([int(step), name, *(f"{float(x):.9g}" for x in numbers)])

    def plot(self, figure: Any = None) -> Any:
        """Draw values with levels, and multipliers, over steps; needs matplotlib.

        Args:
            figure: a matplotlib figure to draw into; a new one by default.

        Returns:
            The figure.
        """
        from matplotlib import pyplot

        history = self.history()
        figure = figure or pyplot.figure(figsize=(8, 6), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True)
        for i, name in enumerate(history.names):
            top.plot(history.steps, history.values[:, i], linewidth=1, label=name)
            bottom.plot(history.steps, history.multipliers[:, i], linewidth=1)
        for level in np.unique(history.levels, axis=1).T if history.names else ():
            top.plot(history.steps, level, color="black", linestyle="--", linewidth=1)
        top.plot([], [], color="black", linestyle="--", linewidth=1, label="level")
        top.set_ylabel("value")
        bottom.set_ylabel("multiplier")
        bottom.set_xlabel("optimizer step")
        top.legend(fontsize="x-small", ncols=2)
        return figure

    def state_dict(self) -> dict[str, Any]:
        """Return the records as plain tensors, loadable with `weights_only=True`."""
        return {
            "steps": [r.step for r in self._records],
            "names": list(self._records[0].names) if self._records else [],
            "tensors": [[r.values, r.levels, r.multipliers, r.slacks] for r in self._records],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Replace the records by saved ones."""
        names = tuple(state_dict["names"])
        self._records = [
            Readings(step, names, *tensors)
            for step, tensors in zip(state_dict["steps"], state_dict["tensors"], strict=True)
        ]
