"""Monitor: the history of values, levels and multipliers, what it means, and which model to keep.

What enters: a `ConstrainedOptimizer`. What leaves: arrays, a diagnosis in words, a line for a progress bar, CSV files,
TensorBoard scalars, a plot; the best model as a true copy, and advice when to stop.
Law: recording copies device tensors and reads nothing; the host reads when it is asked for numbers. No model is kept
and no training stopped before every level is at its end, and models are compared with their terms off.
"""

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from constrained_equiv._optim import Attached, ConstrainedOptimizer, Readings
from constrained_equiv._relax import disabled
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


Verdict = Literal["zero", "inactive", "active", "behind", "resisting", "cycling", "not finite"]
_ADVICE: dict[Verdict, str] = {
    "zero": "at exactly 0",
    "inactive": "inactive: below the level without a multiplier",
    "active": "active: held at the level by a steady multiplier",
    "behind": "behind the falling level: let the schedule take more steps, or raise penalty=",
    "resisting": "above a steady level while the multiplier grows: the data resist the symmetry here; give way with "
    "ce.constraints.resilient, end at a level > 0, or take at_zero='clear'",
    "cycling": "the multiplier cycles without decay: use formulation='augmented_lagrangian', or lower dual_lr",
    "not finite": "not finite: lower the learning rate, clip gradients, or pass on_nonfinite='skip'",
}
_FEWEST = 16  # records that a verdict on growth or cycles needs


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

    def verdicts(self) -> dict[str, Verdict]:
        """Judge every constraint by the later half of its records; reads the device.

        A limit cycle crosses its own mean again and again without decaying; data that resist the symmetry make the
        multiplier grow without turning back, or hold it steady at what the asymmetry is worth.
        """
        h = self.history()
        return {
            name: _judge(h.values[:, i], h.levels[:, i], h.multipliers[:, i])
            for i, name in enumerate(h.names)
            if len(h.steps)
        }

    def diagnose(self) -> str:
        """Say in words which constraints are active, resist or cycle, and what to change; reads the device."""
        found = self.verdicts()
        if not found:
            return "nothing recorded yet: take optimizer steps after building the monitor"
        lines = []
        for verdict, advice in _ADVICE.items():
            names = [name for name, value in found.items() if value == verdict]
            if names:
                shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
                lines.append(f"{len(names)} of {len(found)} {advice} ({shown})")
        return "\n".join(lines)

    def write_tensorboard(self, writer: Any) -> None:
        """Write all records as scalars.

        Args:
            writer: a `torch.utils.tensorboard.SummaryWriter`, or anything with its `add_scalar(tag, value, step)`.
        """
        history = self.history()
        for t, step in enumerate(history.steps):
            for i, name in enumerate(history.names):
                for kind in ("values", "levels", "multipliers"):
                    writer.add_scalar(f"{kind}/{name}", float(getattr(history, kind)[t, i]), int(step))

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


class BestModel:
    """Keep a true copy of the best model so far, judged as it will be used: terms off, levels at their end.

    Args:
        model: the relaxed model.
        optimizer: tells whether the levels have ended.
        higher_is_better: of the score.
        device: where the copy lives; the CPU by default.

    Example:
        >>> best = BestModel(model, optimizer)  # doctest: +SKIP
        >>> best.consider(lambda model: validation_loss(model))  # doctest: +SKIP
        >>> best.restore()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: ConstrainedOptimizer | Attached,
        *,
        higher_is_better: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.score: float | None = None
        self.step: int | None = None
        self._model, self._optimizer = model, optimizer
        self._sign = -1.0 if higher_is_better else 1.0
        self._device = torch.device(device)
        self._copy: dict[str, Any] | None = None

    def consider(self, score: Callable[[nn.Module], float]) -> float:
        """Score the model with its terms off, and copy it if it is the best since the levels ended.

        Args:
            score: validates the model; on validation data, never on test data.

        Returns:
            The score, also where the model cannot be kept yet.
        """
        with disabled(self._model):
            found = float(score(self._model))
        better = self.score is None or self._sign * found < self._sign * self.score
        if self._optimizer.settled and math.isfinite(found) and better:
            self.score, self.step = found, self._optimizer.finished_steps
            self._copy = {key: self._copied(value) for key, value in self._model.state_dict().items()}
        return found

    def restore(self) -> None:
        """Load the best model's parameters and buffers, before `ce.finalize`.

        Raises:
            ConstraintError: if no model was kept.
        """
        if self._copy is None:
            raise ConstraintError(
                "no model was kept: expected consider(...) after every level reached its end; let the schedules end "
                "earlier"
            )
        self._model.load_state_dict(self._copy)

    def state_dict(self) -> dict[str, Any]:
        """Return score, step and copy, loadable with `weights_only=True`."""
        return {"score": self.score, "step": self.step, "copy": self._copy}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the state was saved."""
        self.score, self.step, self._copy = state_dict["score"], state_dict["step"], state_dict["copy"]

    def _copied(self, value: Any) -> Any:
        return value.detach().to(self._device, copy=True) if isinstance(value, Tensor) else value


class EarlyStopping:
    """Advise to stop when the score has not improved for a while; never before every level is at its end.

    Args:
        optimizer: tells whether the levels have ended.
        patience: scores without improvement that are endured.
        higher_is_better: of the score.

    Raises:
        ConstraintError: if `patience` is not positive.
    """

    def __init__(
        self, optimizer: ConstrainedOptimizer | Attached, *, patience: int, higher_is_better: bool = False
    ) -> None:
        if patience < 1:
            raise ConstraintError(f"patience={patience!r}: expected an integer >= 1")
        self.patience = patience
        self._optimizer = optimizer
        self._sign = -1.0 if higher_is_better else 1.0
        self._best = math.inf
        self._waited = 0

    def should_stop(self, score: float) -> bool:
        """Take note of a score of the model with its terms off."""
        if not self._optimizer.settled:  # scores of easier problems say nothing about this one
            return False
        improved = self._sign * score < self._best
        self._best = min(self._best, self._sign * score)
        self._waited = 0 if improved else self._waited + 1
        return self._waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers."""
        return {"best": self._best, "waited": self._waited}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the state was saved."""
        self._best, self._waited = state_dict["best"], state_dict["waited"]


def _judge(values: Any, levels: Any, multipliers: Any) -> Verdict:
    """Judge one constraint by the later half of its records."""
    if not np.isfinite(values).all():
        return "not finite"
    half = len(values) // 2
    values, levels, multipliers = values[half:], levels[half:], multipliers[half:]
    size = float(np.abs(multipliers).max())
    tolerance = 1e-3 + 0.02 * abs(float(levels[-1]))
    excess = values - levels
    if values[-1] == levels[-1] == 0:
        return "zero"
    if len(values) >= _FEWEST and _cycles(multipliers) and np.abs(excess).max() > tolerance:
        return "cycling"
    if abs(excess[-1]) > tolerance and excess[-1] > 0:
        return "behind" if levels[0] > levels[-1] else "resisting"
    growing = (np.diff(multipliers) >= 0).all() and multipliers[-1] - multipliers[0] > 0.05 * size
    if size > 0 and len(values) >= _FEWEST and growing and levels[0] == levels[-1]:
        return "resisting"
    return "active" if abs(multipliers[-1]) > 1e-12 else "inactive"


def _cycles(series: Any) -> bool:
    """Whether a series goes round its mean at least twice, with an amplitude that does not decay."""
    centred = series - series.mean()
    crossings = int((np.diff(np.sign(centred)) != 0).sum())
    early, late = np.array_split(centred, 2)
    swing = np.ptp(late)
    return crossings >= 3 and swing > 0.5 * np.ptp(early) and swing > 0.05 * float(np.abs(series).max())
