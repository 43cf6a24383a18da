"""One training loop for all examples: the methods differ in how the model is prepared and in nothing else.

Enter a `Task` (model, data, loss, symmetry) and a `Method` (how to relax and constrain); leave a record of one run:
what was selected on validation with the terms off, its test metric, equivariance errors, parameters, step time, curves.
The one law: every method sees the same splits, batches, initial weights, steps and selection window, and a run that
was interrupted goes on exactly where its last finished epoch left it.
"""

import copy
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import constrained_equiv as ce

Batch = tuple[Tensor, ...]

LEVEL_ENDS = 0.8  # fraction of training after which every schedule is zero; the tail trains the equivariant model alone


@dataclass(frozen=True)
class Task:
    """What is learned.

    Attributes:
        name: for files and titles.
        build: makes the plain equivariant model; called under the run's seed.
        train: tensors of the training split, first axis samples.
        val: of the validation split.
        test: of the test split.
        loss: `loss(model, batch)`, a mean over the batch.
        metric: `metric(model, batch)`, a mean over the batch; smaller is better.
        inputs: `inputs(batch)`, what the model is called with (a tuple where it takes several arguments).
        symmetry: of the whole pipeline from inputs to outputs.
        where: chooses the layers to relax; None for all that have an adapter.
        adapter: how to relax them; None for the built-in ways.
        augment: `augment(batch, generator)`, random group elements for the batches; None for none.
        metric_name: for tables and plots.
    """

    name: str
    build: Callable[[], nn.Module]
    train: Batch
    val: Batch
    test: Batch
    loss: Callable[[nn.Module, Batch], Tensor]
    metric: Callable[[nn.Module, Batch], Tensor]
    inputs: Callable[[Batch], Any]
    symmetry: ce.Symmetry
    where: Callable[[str, nn.Module], bool] | None = None
    adapter: ce.adapters.Adapter | None = None
    augment: Callable[[Batch, torch.Generator], Batch] | None = None
    metric_name: str = "MSE"


@dataclass(frozen=True)
class Settings:
    """How long and how fast; the same for every method.

    Attributes:
        epochs: passes over the training split.
        batch_size: samples in a step.
        lr: initial rate of Adam, annealed to 1 % of it along a cosine.
        device: where tensors live.
    """

    epochs: int
    batch_size: int
    lr: float
    device: str = "cpu"

    def steps_per_epoch(self, samples: int) -> int:
        """Return the optimizer steps of an epoch; the last, smaller batch counts."""
        return math.ceil(samples / self.batch_size)


@dataclass(frozen=True)
class Method:
    """How a model is trained.

    Attributes:
        name: for tables.
        prepare: `prepare(model, task, steps, lr)` relaxes the model in place and returns its optimizer.
        finish: keyword arguments of `ce.finalize`, for methods that leave terms above their level or fold them.
        folds: whether the equivariant part of the terms stays, so that validation leaves the terms on.
        augment: whether the task's augmentation is used.
    """

    name: str
    prepare: Callable[[nn.Module, Task, int, float], torch.optim.Optimizer]
    finish: dict[str, Any] = field(default_factory=dict)
    folds: bool = False
    augment: bool = True


@dataclass
class Progress:
    """What a run has reached; saved after every epoch."""

    epoch: int = 0
    best: float = math.inf
    best_epoch: int = -1
    train_loss: list[float] = field(default_factory=list)
    val: list[float] = field(default_factory=list)
    relaxed_error: float = 0.0
    step_seconds: list[float] = field(default_factory=list)
    wall_seconds: float = 0.0


def run(
    task: Task, method: Method, seed: int, settings: Settings, folder: Path, *, resume: bool = False
) -> dict[str, Any]:
    """Train, select, finalize and test one model.

    Args:
        task: what is learned.
        method: how.
        seed: of initial weights, batches and augmentation.
        settings: how long.
        folder: receives `<method>-<seed>.pt` (checkpoint), `.json` (the record returned) and `.csv` (history).
        resume: go on from the checkpoint if there is one; without it the run starts anew.

    Returns:
        The record: configuration, versions, curves, `test`, errors, parameters, `step_ms`.

    Raises:
        ValueError: if the checkpoint belongs to other settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{method.name}-{seed}"
    checkpoint = folder / f"{stem}.pt"
    configuration = {
        "task": task.name,
        "method": method.name,
        "seed": seed,
        "samples": len(task.train[0]),
        **asdict(settings),
    }
    torch.manual_seed(seed)
    model = task.build().to(settings.device).train()  # escnn: a layer never told so holds an empty cached filter
    parameters = sum(p.numel() for p in model.parameters())
    untouched = copy.deepcopy(model)
    steps = settings.epochs * settings.steps_per_epoch(len(task.train[0]))
    optimizer = method.prepare(model, task, steps, settings.lr)
    anneal = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=0.01 * settings.lr)
    constrained = isinstance(optimizer, ce.ConstrainedOptimizer)
    monitor = ce.monitor.Monitor(optimizer, every=max(1, steps // 400)) if constrained else None
    progress, best_state = Progress(), copy.deepcopy(model.state_dict())
    if resume and checkpoint.exists():
        progress, best_state = _load(checkpoint, configuration, model, optimizer, anneal, monitor)

    tail = int(LEVEL_ENDS * settings.epochs) + 1  # selection starts when every method's terms are gone
    bar = tqdm(range(progress.epoch, settings.epochs), stem, settings.epochs, initial=progress.epoch, disable=None)
    for epoch in bar:
        started = time.perf_counter()
        augment = task.augment if method.augment else None
        loss = _epoch(task, augment, model, optimizer, anneal, seed, epoch, settings, progress)
        progress.train_loss.append(loss)
        with nullcontext() if method.folds else ce.disabled(model):
            progress.val.append(evaluate(task, model, task.val, settings))
        if epoch % max(1, settings.epochs // 10) == 0:
            progress.relaxed_error = max(progress.relaxed_error, _error(task, model, settings))
        if epoch >= min(tail, settings.epochs - 1) and progress.val[-1] < progress.best:
            progress.best, progress.best_epoch = progress.val[-1], epoch
            best_state = copy.deepcopy(model.state_dict())
        progress.epoch = epoch + 1
        progress.wall_seconds += time.perf_counter() - started
        bar.set_postfix_str(f"loss {loss:.3g}, val {progress.val[-1]:.3g}{_watch(optimizer)}")
        _save(checkpoint, configuration, model, optimizer, anneal, monitor, progress, best_state)

    model.load_state_dict(best_state)
    trained = sum(p.numel() for p in model.parameters())
    before = after = _error(task, model, settings)
    if ce.relaxations(model):
        report = ce.finalize(
            model,
            optimizer=optimizer,
            batches=list(batches(task.train, settings, None)),
            forward=lambda m, batch: _call(m, task.inputs(batch)),
            symmetry=task.symmetry,
            **method.finish,
        )
        before, after = report.error_before or 0.0, report.error_after or 0.0
    untouched.load_state_dict(model.state_dict())  # the same class and keys as before, or this raises
    record = {
        **configuration,
        "val": progress.best,
        "best_epoch": progress.best_epoch,
        "test": evaluate(task, untouched, task.test, settings),
        "error_relaxed": progress.relaxed_error,
        "error_before": before,
        "error_after": after,
        "parameters": parameters,
        "parameters_trained": trained,
        "step_ms": 1e3 * median(progress.step_seconds),
        "wall_seconds": progress.wall_seconds,
        "curves": {"train": progress.train_loss, "val": progress.val},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "constrained_equiv": ce.__version__,
        },
    }
    (folder / f"{stem}.json").write_text(json.dumps(record))
    if monitor is not None:
        monitor.write_csv(folder / f"{stem}.csv")
    return record


def batches(split: Batch, settings: Settings, generator: torch.Generator | None) -> Iterator[Batch]:
    """Cut a split into batches on the device, in random order if a generator is given."""
    count = len(split[0])
    order = torch.arange(count) if generator is None else torch.randperm(count, generator=generator)
    for rows in order.split(settings.batch_size):
        yield tuple(tensor[rows].to(settings.device) for tensor in split)


def evaluate(task: Task, model: nn.Module, split: Batch, settings: Settings) -> float:
    """Return the mean metric over a split, in evaluation mode."""
    was_training = model.training
    model.eval()
    total = sum(float(task.metric(model, batch)) * len(batch[0]) for batch in batches(split, settings, None))
    model.train(was_training)
    return total / len(split[0])


def _epoch(
    task: Task,
    augment: Callable[[Batch, torch.Generator], Batch] | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    anneal: torch.optim.lr_scheduler.LRScheduler,
    seed: int,
    epoch: int,
    settings: Settings,
    progress: Progress,
) -> float:
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)  # resumed runs see the same batches
    torch.manual_seed(1_000_003 * seed + epoch)  # dropout
    model.train()
    total = torch.zeros((), device=settings.device)
    for batch in batches(task.train, settings, generator):
        if augment is not None:
            batch = augment(batch, generator)
        started = time.perf_counter()
        optimizer.zero_grad()
        loss = task.loss(model, batch)
        loss.backward()
        optimizer.step()
        anneal.step()
        progress.step_seconds.append(time.perf_counter() - started)
        total += loss.detach() * len(batch[0])
    return float(total) / len(task.train[0])


def _call(model: nn.Module, inputs: Any) -> Any:
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _error(task: Task, model: nn.Module, settings: Settings) -> float:
    """The pipeline's relative equivariance error on 16 validation samples, with whatever terms are on."""
    was_training = model.training
    model.eval()
    batch = tuple(tensor[:16].to(settings.device) for tensor in task.val)
    error = ce.equivariance_error(model, task.inputs(batch), symmetry=task.symmetry, samples=4)
    model.train(was_training)
    return error


def _watch(optimizer: torch.optim.Optimizer) -> str:
    now = optimizer.readings() if isinstance(optimizer, ce.ConstrainedOptimizer) else None
    if now is None or not now.names:
        return ""
    return f", violation {float((now.values - now.levels).max()):+.1e}, multiplier {float(now.multipliers.max()):.1e}"


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
    content = torch.load(path, map_location=configuration["device"], weights_only=True)
    if content["configuration"] != configuration:
        raise ValueError(
            f"{path} was written with {content['configuration']}: expected {configuration}; run without --resume, or "
            "into another folder with --out"
        )
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    anneal.load_state_dict(content["anneal"])
    if monitor:
        monitor.load_state_dict(content["monitor"])
    return Progress(**content["progress"]), content["best"]
