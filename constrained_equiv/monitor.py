"""Monitor: the history of values, levels and multipliers, what it means, and which model to keep.

What enters: a `ConstrainedOptimizer`, or the handle of `attach`. What leaves: arrays, a diagnosis in words, a line for
a progress bar, CSV files, TensorBoard scalars, a plot; the best model as a true copy, and advice when to stop.
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
from constrained_equiv.errors import CheckpointError, ConstraintError


class History(NamedTuple):
    """Recorded numbers.

    Attributes:
        steps: (t,) finished steps at each record.
        names: of the constraints.
        values: (t, n) what was measured.
        levels: (t, n) the bounds.
        multipliers: (t, n).
        slacks: (t, n) by how much each level was given way; zeros without `ce.constraints.resilient`.
    """

    steps: np.ndarray[Any, np.dtype[np.int64]]
    names: tuple[str, ...]
    values: np.ndarray[Any, np.dtype[np.float64]]
    levels: np.ndarray[Any, np.dtype[np.float64]]
    multipliers: np.ndarray[Any, np.dtype[np.float64]]
    slacks: np.ndarray[Any, np.dtype[np.float64]]


_SERIES = History._fields[2:]
Verdict = Literal[
    "zero", "cut", "inactive", "active", "growing", "behind", "resisting", "giving way", "cycling", "not finite"
]
_ADVICE: dict[Verdict, str] = {
    "zero": "at exactly 0",
    "cut": "at exactly 0, but cleared while far above the level: the schedule is too fast; let it take more steps, or "
    "raise penalty=",
    "inactive": "inactive: below the level without a multiplier",
    "active": "active: held at the level by a steady multiplier",
    "growing": "active, with a multiplier that still grows as its level falls: nothing to change",
    "behind": "behind the falling level: the schedule is too fast; let it take more steps, or raise penalty=",
    "resisting": "above a steady level while the multiplier grows: the data resist the symmetry here; give way with "
    "ce.constraints.resilient, end at a level > 0, or take at_zero='clear'",
    "giving way": "above the level by a slack that is worth its price: the data resist the symmetry here; raise the "
    "price for less of it",
    "cycling": "the multiplier cycles without decay: use formulation='augmented_lagrangian', or lower dual_lr",
    "not finite": "not finite: lower the learning rate, clip gradients, or pass on_nonfinite='skip'",
}
_FEWEST = 16  # records that a verdict on growth or cycles needs


class Monitor:
    """Record the state of all constraints after every `every`-th step of an optimizer.

    Args:
        optimizer: whose steps are recorded, through a step hook; skipped steps are not.
        every: distance between records, in optimizer steps.

    Save `state_dict()` beside the optimizer's, so that a resumed run is judged by its whole history.

    Raises:
        ConstraintError: if `every` is not positive.
    """

    def __init__(self, optimizer: ConstrainedOptimizer | Attached, *, every: int = 1) -> None:
        if every < 1:
            raise ConstraintError(f"every={every!r}: expected an integer >= 1, the distance between records in steps")
        self.every = every
        self._optimizer = optimizer
        self._records: list[Readings] = []
        self._signed = np.array([r.type == "equality" for r in optimizer.constraints for _ in r.entries], dtype=bool)
        optimizer.register_step_post_hook(lambda *_: self._record())

    def _record(self) -> None:
        step = self._optimizer.finished_steps
        repeated = bool(self._records) and self._records[-1].step == step
        if self._optimizer.constraints and step % self.every == 0 and not repeated:
            self._records.append(self._optimizer.readings())

    def summary(self) -> str:
        """Return one line with the worst violation and the largest multiplier; reads the device."""
        now = self._optimizer.readings()
        if not now.names:
            return f"step {now.step}"
        excess, multipliers = ((now.values - now.levels - now.slacks).cpu().numpy(), now.multipliers.cpu().numpy())
        worst = int(np.where(self._signed, abs(excess), excess).argmax())
        largest = int(abs(multipliers).argmax())
        return (
            f"step {now.step}: worst violation {excess[worst]:+.2e} in {now.names[worst]}, "
            f"largest multiplier {multipliers[largest]:.2e} in {now.names[largest]}"
        )

    def history(self) -> History:
        """Return everything recorded so far as arrays; reads the device."""
        if not self._records:
            empty = np.zeros((0, 0))
            return History(np.zeros(0, dtype=np.int64), (), empty, empty, empty, empty)

        def stack(which: str) -> np.ndarray[Any, np.dtype[np.float64]]:
            return torch.stack([getattr(r, which) for r in self._records]).double().cpu().numpy()

        steps = np.array([r.step for r in self._records], dtype=np.int64)
        return History(steps, self._records[0].names, *map(stack, _SERIES))

    def verdicts(self) -> dict[str, Verdict]:
        """Judge every constraint, by the later half of its records unless a word is about the whole; reads the device.

        A limit cycle crosses its own mean again and again without decaying; data that resist the symmetry make the
        multiplier grow without turning back, or hold it steady at what the asymmetry is worth.
        """
        h = self.history()
        return {
            name: _judge(*(getattr(h, which)[:, i] for which in _SERIES), signed=bool(self._signed[i]))
            for i, name in enumerate(h.names)
        }

    def diagnose(self) -> str:
        """Say in words which constraints are active, whose multipliers grow or cycle, and what to change.

        Reads the device.
        """
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
                for kind in _SERIES:
                    writer.add_scalar(f"{kind}/{name}", float(getattr(history, kind)[t, i]), int(step))

    def write_csv(self, path: str | Path) -> None:
        """Write one row per record and constraint: step, constraint, value, level, multiplier, slack."""
        history = self.history()
        with Path(path).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["step", "constraint", "value", "level", "multiplier", "slack"])
            for t, step in enumerate(history.steps):
                for i, name in enumerate(history.names):
                    numbers = (getattr(history, which)[t, i] for which in _SERIES)
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
            **{which: torch.stack([getattr(r, which) for r in self._records]) for which in _SERIES if self._records},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Replace the records by saved ones.

        Raises:
            CheckpointError: if they are of other constraints.
        """
        names, steps = tuple(state_dict["names"]), state_dict["steps"]
        if steps and names != (own := self._optimizer.readings().names):
            raise CheckpointError(f"the records are of constraints {list(names)}: expected {list(own)}")
        series = zip(*(state_dict[which].unbind() for which in _SERIES), strict=True) if steps else ()
        self._records = [Readings(step, names, *row) for step, row in zip(steps, series, strict=True)]


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


def _judge(values: Any, levels: Any, multipliers: Any, slacks: Any, *, signed: bool) -> Verdict:
    """Judge one constraint; a signed one is an equality, violated on both sides."""
    if not np.isfinite(values).all():
        return "not finite"
    excess = values - levels - slacks
    excess = np.abs(excess) if signed else excess
    if values[-1] == levels[-1] == 0:
        last = np.flatnonzero(values)[-1:]  # before it was cleared
        return "cut" if (excess[last] > 0.1 * np.abs(values).max()).any() else "zero"
    half = len(values) // 2
    levels, multipliers, excess = levels[half:], multipliers[half:], excess[half:]
    tolerance = 1e-3 + 0.02 * abs(float(levels[-1]))
    falling = levels[0] > levels[-1]
    enough = len(multipliers) >= _FEWEST
    if enough and _cycles(multipliers) and np.abs(excess).max() > tolerance:
        return "cycling"
    if excess[-1] > tolerance:
        return "behind" if falling else "resisting"
    if abs(slacks[-1]) > tolerance:
        return "giving way"
    size = np.abs(multipliers)
    if enough and (np.diff(size) >= 0).all() and size[-1] - size[0] > 0.05 * size.max():
        return "growing" if falling else "resisting"
    return "active" if abs(multipliers[-1]) > 1e-12 else "inactive"


def _cycles(series: Any) -> bool:
    """Whether a series goes round its mean at least twice, with an amplitude that does not decay."""
    centred = series - series.mean()
    crossings = int((np.diff(np.sign(centred)) != 0).sum())
    early, late = np.array_split(centred, 2)
    swing = np.ptp(late)
    return crossings >= 3 and swing > 0.5 * np.ptp(early) and swing > 0.05 * float(np.abs(series).max())
