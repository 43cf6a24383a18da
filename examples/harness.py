"""One training loop for all examples: the arms differ in how the model is prepared and in nothing else.

Enter a `Task` (model, data, loss, symmetry) and a `Method` (how to relax and constrain); leave a record of one run:
what was selected on validation as it will be tested, its test metric, errors, parameters, step time, curves.
The one law: every arm sees the same splits, batches, initial weights, steps and selection window, and a run that
was interrupted goes on exactly where its last finished epoch left it.
"""

import copy
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

import constrained_equiv as ce
from examples import methods
from examples.methods import LEVEL_ENDS, Method
from examples.task import Batch, Task

EVALUATION_BATCH = 100  # samples, or the batch of training where that is larger
CURVE_POINTS = 12  # of curves before the selection window, inside which validation is evaluated at every epoch


@dataclass(frozen=True)
class Settings:
    """How long and how fast; the same for every method.

    Attributes:
        epochs: passes over the training split.
        batch_size: samples in a step.
        lr: initial rate of Adam, annealed to 1 % of it.
        device: where tensors live.
    """

    epochs: int
    batch_size: int
    lr: float
    device: str = "cpu"

    def steps_per_epoch(self, samples: int) -> int:
        """Return the optimizer steps of an epoch; the last, smaller batch counts."""
        return math.ceil(samples / self.batch_size)

    @property
    def selection_starts(self) -> int:
        """First epoch that may be selected, for every arm: the second one without terms, or the last one."""
        return min(int(LEVEL_ENDS * self.epochs) + 1, self.epochs - 1)

    @property
    def spacing(self) -> int:
        """Epochs between the points of curves that are not drawn at every epoch."""
        return max(1, self.epochs // CURVE_POINTS)


@dataclass
class Progress:
    """What a run has reached; saved after every epoch.

    Lists have an entry for each epoch, `val`, `agreement` and `term_agreement` pairs of epoch and value. `gradient` and
    `term_gradient` are norms of the task's gradient in the epoch's last step, of the model's own parameters and of the
    terms; `value`, `level` and `multiplier` are means over the constraints after it. The agreement of an epoch's
    gradients is the mean inner product of two of them over their mean square: 1 where all batches ask for the same, 0
    where they are noise.
    """

    epoch: int = 0
    best: float = math.inf
    best_epoch: int = -1
    train: list[float] = field(default_factory=list)
    val: list[tuple[int, float]] = field(default_factory=list)
    gradient: list[float] = field(default_factory=list)
    term_gradient: list[float] = field(default_factory=list)
    agreement: list[tuple[int, float]] = field(default_factory=list)
    term_agreement: list[tuple[int, float]] = field(default_factory=list)
    value: list[float] = field(default_factory=list)
    level: list[float] = field(default_factory=list)
    multiplier: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    relaxed_error: float = 0.0
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0


def check(
    task: Task,
    runs: Iterable[tuple[Method, int]],
    settings: Settings,
    folder: Path,
    *,
    options: Mapping[str, Any],
    resume: bool,
) -> None:
    """Raise before the first run what would end a later one: every arm takes a step on a model of its own.

    Args:
        task: as for `run`, like the others.
        runs: arms and seeds.
        settings: how long.
        folder: where checkpoints lie.
        options: what determines the task.
        resume: whether checkpoints are gone on from.

    Raises:
        ValueError: if an arm does not fit the task, or a checkpoint belongs to another run.
    """
    built = set()
    for method, seed in runs:
        if method.name not in built:
            try:
                _try(task, method, settings)
            except ValueError as error:
                raise ValueError(f"arm {method.name!r} does not fit the task {task.name!r}: {error}") from error
            built.add(method.name)
        checkpoint = folder / f"{method.name}-{seed}.pt"
        if resume and checkpoint.exists():
            _read(checkpoint, _configuration(task, method, seed, settings, options))


def run(
    task: Task,
    method: Method,
    seed: int,
    settings: Settings,
    folder: Path,
    *,
    options: Mapping[str, Any] | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train, select, finalize and test one model.

    Args:
        task: what is learned.
        method: how.
        seed: of initial weights, batches and augmentation.
        settings: how long.
        folder: receives `<method>-<seed>.pt` (checkpoint), `.json` (the record returned) and `.csv` (history).
        options: what determines the task, by name: strings, numbers and None. A run is resumed with the same only.
        resume: go on from the checkpoint if there is one; without it the run starts anew.

    Returns:
        The record: configuration, versions, curves, `test`, `extra`, errors, parameters, `step_ms`.

    Raises:
        ValueError: if the checkpoint belongs to another run, or the arm's terms outlive the start of selection.
    """
    if method.until > LEVEL_ENDS:
        raise ValueError(
            f"{method.name!r} has terms until {method.until}: expected at most {LEVEL_ENDS}, for selection"
        )
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{method.name}-{seed}"
    checkpoint = folder / f"{stem}.pt"
    configuration = _configuration(task, method, seed, settings, options or {})
    task = task.to(settings.device)
    torch.manual_seed(seed)
    # escnn: a layer never told that it is in training holds an empty cached filter
    model = methods.build(method, task).to(settings.device).train()
    parameters = _count(model)
    untouched = copy.deepcopy(model)
    steps = settings.epochs * settings.steps_per_epoch(len(task.train[0]))
    optimizer = methods.prepare(method, model, task, steps=steps, lr=settings.lr)
    anneal = torch.optim.lr_scheduler.LambdaLR(optimizer, methods.annealing(method, steps))
    constrained = isinstance(optimizer, ce.ConstrainedOptimizer)
    monitor = ce.monitor.Monitor(optimizer, every=max(1, steps // 400)) if constrained else None
    progress, best_state = Progress(), copy.deepcopy(model.state_dict())
    if resume and checkpoint.exists():
        progress, best_state = _load(checkpoint, configuration, model, optimizer, anneal, monitor)

    window = settings.selection_starts
    bar = tqdm(range(progress.epoch, settings.epochs), stem, settings.epochs, initial=progress.epoch, disable=None)
    for epoch in bar:
        started, spent = time.perf_counter(), time.process_time()
        _epoch(task, method, model, optimizer, anneal, seed, epoch, settings, progress)
        if epoch >= window or epoch % settings.spacing == 0:
            progress.val.append((epoch, validate(task, method, model, settings)))
        if epoch % max(1, settings.epochs // 10) == 0 and ce.relaxations(model):
            progress.relaxed_error = max(progress.relaxed_error, _error(task, model))
        if epoch >= window and not progress.val[-1][1] >= progress.best:  # a run that diverged is selected, and shows
            progress.best, progress.best_epoch = progress.val[-1][1], epoch
            best_state = copy.deepcopy(model.state_dict())
        progress.epoch = epoch + 1
        progress.wall_seconds += time.perf_counter() - started
        progress.cpu_seconds += time.process_time() - spent
        bar.set_postfix_str(_watch(progress))
        _save(checkpoint, configuration, model, optimizer, anneal, monitor, progress, best_state)

    model.load_state_dict(best_state)
    trained = _count(model)
    if not constrained:
        _gather(task, model, settings)  # as `finalize` does for all others
    before = after = _error(task, model)
    notes: tuple[str, ...] = ()
    if isinstance(optimizer, ce.ConstrainedOptimizer):
        report = ce.finalize(
            model,
            optimizer=optimizer,
            batches=list(batches(task.train, settings, None)),
            forward=lambda m, batch: _call(m, task.inputs(batch)),
            symmetry=task.symmetry,
            fold=method.ends == "fold",
            on_violation=_on_violation(method),
        )
        before, after, notes = report.error_before or 0.0, report.error_after or 0.0, report.notes
    kept = {relaxation.name: _size(relaxation) for relaxation in ce.relaxations(model)}
    if not kept:
        untouched.load_state_dict(model.state_dict())  # the same class and keys as before, or this raises
        model = untouched
    curves = (
        "train",
        "val",
        "gradient",
        "term_gradient",
        "agreement",
        "term_agreement",
        "value",
        "level",
        "multiplier",
    )
    record = {
        **configuration,
        "val": progress.best,
        "best_epoch": progress.best_epoch,
        "test": evaluate(task, model, settings, split=task.test),
        "extra": {name: _mean(extra.metric, model, extra.split, settings) for name, extra in task.extra.items()},
        "error_relaxed": max(progress.relaxed_error, before),
        "error_before": before,
        "error_after": after,
        "parameters": parameters,
        "parameters_trained": trained,
        "kept": kept,
        "notes": list(notes),
        "step_ms": 1e3 * median(progress.step_seconds),
        "wall_seconds": progress.wall_seconds,
        "cpu_seconds": progress.cpu_seconds,
        "curves": {name: getattr(progress, name) for name in curves},
        "versions": _versions(),
    }
    (folder / f"{stem}.json").write_text(json.dumps(record))
    if monitor is not None:
        monitor.write_csv(folder / f"{stem}.csv")
    return record


def batches(split: Batch, settings: Settings, generator: torch.Generator | None) -> Iterator[Batch]:
    """Cut a split into batches, in random order if a generator is given."""
    count = len(split[0])
    order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
    for rows in order.to(split[0].device).split(settings.batch_size):
        yield tuple(tensor[rows] for tensor in split)


def validate(task: Task, method: Method, model: nn.Module, settings: Settings) -> float:
    """Evaluate the model as it will be tested: without terms that will be dropped, and with statistics of that."""
    twin = copy.deepcopy(model) if _keeps_statistics(model) else model
    with ce.disabled(twin) if method.ends == "drop" else nullcontext():
        if twin is not model:
            _gather(task, twin, settings)
        return evaluate(task, twin, settings)


def _keeps_statistics(model: nn.Module) -> bool:
    return any(hasattr(module, "momentum") for module in model.modules())


def _gather(task: Task, model: nn.Module, settings: Settings) -> None:
    """Gather the statistics of normalisation layers on the training split, without the turns of augmentation."""
    ce.recalibrate(model, batches(task.train, settings, None), forward=lambda m, batch: _call(m, task.inputs(batch)))


def evaluate(task: Task, model: nn.Module, settings: Settings, *, split: Batch | None = None) -> float:
    """Return the mean metric over a split, the validation split by default, in evaluation mode."""
    return _mean(task.metric, model, task.val if split is None else split, settings)


def _mean(metric: Callable[[nn.Module, Batch], Tensor], model: nn.Module, split: Batch, settings: Settings) -> float:
    was_training = model.training
    model.eval()
    # without gradients, batches may be larger than those of training
    wide = replace(settings, batch_size=max(settings.batch_size, EVALUATION_BATCH))
    total = sum(float(metric(model, batch)) * len(batch[0]) for batch in batches(split, wide, None))
    model.train(was_training)
    return total / len(split[0])


def _epoch(
    task: Task,
    method: Method,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    anneal: torch.optim.lr_scheduler.LRScheduler,
    seed: int,
    epoch: int,
    settings: Settings,
    progress: Progress,
) -> None:
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)  # resumed runs see the same batches
    torch.manual_seed(1_000_003 * seed + epoch)  # dropout
    model.train()
    total, seconds = torch.zeros((), device=settings.device), []
    count = settings.steps_per_epoch(len(task.train[0]))
    watched = [_Agreement(_split(model)[0]), _TermAgreement(model)] if epoch % settings.spacing == 0 else []
    for step, batch in enumerate(batches(task.train, settings, generator), start=1):
        if task.augment is not None and method.augment:
            batch = task.augment(batch, generator)
        started = _now(settings)
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        for agreement in watched:  # before the constraints add theirs
            agreement.add()
        if step == count:
            _gradients(model, progress)
        optimizer.step()
        anneal.step()
        seconds.append(_now(settings) - started)
        total += loss.detach() * len(batch[0])
    progress.train.append(float(total) / len(task.train[0]))
    progress.step_seconds.append(median(seconds))
    for curve, agreement in zip((progress.agreement, progress.term_agreement), watched, strict=False):
        curve.append((epoch, agreement.value()))
    if isinstance(optimizer, ce.ConstrainedOptimizer) and optimizer.constraints:
        now = optimizer.readings()
        progress.value.append(float(now.values.abs().mean()))
        progress.level.append(float(now.levels.mean()))
        progress.multiplier.append(float(now.multipliers.mean()))


def _gradients(model: nn.Module, progress: Progress) -> None:
    for curve, parameters in zip((progress.gradient, progress.term_gradient), _split(model), strict=True):
        gradients = [p.grad for p in parameters if p.grad is not None]
        curve.append(float(nn.utils.get_total_norm(gradients)) if gradients else 0.0)


def _split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The model's own parameters, and those of the terms."""
    terms = [parameter for relaxation in ce.relaxations(model) for parameter in relaxation.term.parameters()]
    theirs = {id(parameter) for parameter in terms}
    return [parameter for parameter in model.parameters() if id(parameter) not in theirs], terms


class _Agreement:
    """Sums from which the agreement of successive gradients follows without storing them."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self._sums = [torch.zeros_like(parameter) for parameter in parameters]
        self._squares, self._count = 0.0, 0

    def gradients(self) -> list[Tensor | None]:
        return [parameter.grad for parameter in self.parameters]

    def add(self) -> None:
        """Take up the gradients as they are now."""
        for gradient, total in zip(self.gradients(), self._sums, strict=True):
            if gradient is not None:
                total += gradient
                self._squares += float(gradient.square().sum())
        self._count += 1

    def value(self) -> float:
        """Return the mean inner product of two gradients over their mean square; 0 where there is none."""
        pairs = self._count - 1
        if pairs < 1 or not self._squares:
            return 0.0
        square_of_sum = sum(float(total.square().sum()) for total in self._sums)
        return (square_of_sum - self._squares) / (pairs * self._squares)


class _TermAgreement(_Agreement):
    """The same for what the optimizer lets through of the terms' gradients."""

    def __init__(self, model: nn.Module) -> None:
        self._terms = [relaxation.term for relaxation in ce.relaxations(model)]
        super().__init__([term.weight for term in self._terms])

    def gradients(self) -> list[Tensor | None]:
        return [
            term.projection.complement(gradient) if term.complement and gradient is not None else gradient
            for term, gradient in zip(self._terms, super().gradients(), strict=True)
        ]


def _now(settings: Settings) -> float:
    if settings.device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def _on_violation(method: Method) -> Literal["raise", "drop", "keep"]:
    """What `finalize` does with terms above their level; only gates and ridge are known to leave some and drop them."""
    if method.ends == "keep":
        return "keep"
    return "drop" if method.recipe in ("gate", "ridge") else "raise"


def _size(relaxation: Any) -> float:
    """RMS output of a term for isotropic unit-variance input."""
    return float(torch.linalg.vector_norm(relaxation.term.matrix().detach()) / relaxation.term.rows**0.5)


def _call(model: nn.Module, inputs: Any) -> Any:
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _error(task: Task, model: nn.Module) -> float:
    """The pipeline's relative equivariance error on 16 validation samples, with whatever terms are on."""
    was_training = model.training
    model.eval()
    batch = tuple(tensor[:16] for tensor in task.val)
    error = ce.equivariance_error(model, task.inputs(batch), symmetry=task.symmetry, samples=4)
    model.train(was_training)
    return error


def _watch(progress: Progress) -> str:
    shown = f"loss {progress.train[-1]:.3g}, val {progress.val[-1][1]:.3g}"
    if progress.level:
        shown += (
            f", terms {progress.value[-1]:.1e} of {progress.level[-1]:.1e}, multiplier {progress.multiplier[-1]:.1e}"
        )
    return shown


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _versions() -> dict[str, str]:
    loaded = [name for name in ("torch", "numpy", "cooper", "e3nn", "escnn") if name in sys.modules]
    found = {name: str(getattr(sys.modules[name], "__version__", "unknown")) for name in loaded}
    return {"python": platform.python_version(), "constrained_equiv": ce.__version__, **found}


def _try(task: Task, method: Method, settings: Settings) -> None:
    """Take one step with a model that is thrown away."""
    model = methods.build(method, task).to(settings.device).train()
    steps = settings.epochs * settings.steps_per_epoch(len(task.train[0]))
    optimizer = methods.prepare(method, model, task, steps=steps, lr=settings.lr)
    task.loss(model, tuple(tensor[: settings.batch_size].to(settings.device) for tensor in task.train)).backward()
    optimizer.step()


def _configuration(
    task: Task, method: Method, seed: int, settings: Settings, options: Mapping[str, Any]
) -> dict[str, Any]:
    """All that a run depends on; its record begins with it, and its checkpoint holds it."""
    return {
        "task": task.name,
        "options": dict(options),
        "method": method.name,
        "family": method.family,
        "arm": asdict(method),
        "seed": seed,
        "samples": len(task.train[0]),
        **asdict(settings),
    }


def _save(path: Path, configuration: dict[str, Any], *parts: Any) -> None:
    model, optimizer, anneal, monitor, progress, best_state = parts
    content = {
        "configuration": configuration,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "anneal": anneal.state_dict(),
        "monitor": monitor.state_dict() if monitor else None,
        "progress": asdict(progress),
        "best": best_state,
    }
    partial = path.with_suffix(".partial")
    torch.save(content, partial)
    os.replace(partial, path)  # a kill leaves the old checkpoint or the new one, never half of one


def _load(path: Path, configuration: dict[str, Any], *parts: Any) -> tuple[Progress, dict[str, Any]]:
    model, optimizer, anneal, monitor = parts
    content = _read(path, configuration)
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    anneal.load_state_dict(content["anneal"])
    if monitor:
        monitor.load_state_dict(content["monitor"])
    return Progress(**content["progress"]), content["best"]


def _read(path: Path, configuration: dict[str, Any]) -> dict[str, Any]:
    """Load a checkpoint of the same run, or say in what it differs."""
    content = torch.load(path, map_location=configuration["device"], weights_only=True)
    found, expected = _flat(content["configuration"]), _flat(configuration)
    if differ := [key for key in found | expected if found.get(key) != expected.get(key)]:
        there, here = (", ".join(f"{key}={side.get(key)!r}" for key in differ) for side in (found, expected))
        raise ValueError(
            f"{path} was written with {there}: expected {here}; repeat the options of that run, or run without "
            "--resume, or into another folder with --out"
        )
    return content


def _flat(configuration: dict[str, Any]) -> dict[str, Any]:
    """Bring the entries of inner records up, under names with a dot."""
    flat: dict[str, Any] = {}
    for key, value in configuration.items():
        flat |= {f"{key}.{name}": each for name, each in value.items()} if isinstance(value, dict) else {key: value}
    return flat
