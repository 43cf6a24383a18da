"""What is learned: a model, data, a loss and a symmetry, and nothing about how it is trained.

Enter the choices of one example; leaves a frozen record that `methods` and `harness` read. The one law: everything that
could favour a method (data, splits, batch order, metric, group elements for the batches) is here, where no method is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import constrained_equiv as ce

Batch = tuple[Tensor, ...]
Where = Callable[[str, nn.Module], bool]


class Extra(NamedTuple):
    """One more number on the finished model, besides the metric on the test split.

    Attributes:
        split: tensors, first axis samples.
        metric: `metric(model, batch)`, a mean over the batch; smaller is better.
    """

    split: Batch
    metric: Callable[[nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Task:
    """What is learned.

    Attributes:
        name: for files and titles.
        build: makes the plain equivariant model, `width` times as wide; called with 1 under the run's seed.
        train: tensors of the training split, first axis samples.
        val: of the validation split.
        test: of the test split.
        loss: `loss(model, batch)`, a mean over the batch.
        metric: `metric(model, batch)`, a mean over the batch; smaller is better.
        inputs: `inputs(batch)`, what the model is called with (a tuple where it takes several arguments).
        symmetry: of the whole pipeline from inputs to outputs.
        where: chooses the layers to relax; None for all that have an adapter.
        published: chooses those that the published methods relax, where they differ; None where they do not.
        adapter: how to relax them; None for the built-in ways.
        augment: `augment(batch, generator)`, random group elements for the batches; None for none.
        metric_name: for tables and plots.
        extra: further tests by name, for example out of the training distribution.
    """

    name: str
    build: Callable[[float], nn.Module]
    train: Batch
    val: Batch
    test: Batch
    loss: Callable[[nn.Module, Batch], Tensor]
    metric: Callable[[nn.Module, Batch], Tensor]
    inputs: Callable[[Batch], Any]
    symmetry: ce.Symmetry
    where: Where | None = None
    published: Where | None = None
    adapter: ce.adapters.Adapter | None = None
    augment: Callable[[Batch, torch.Generator], Batch] | None = None
    metric_name: str = "MSE"
    extra: Mapping[str, Extra] = field(default_factory=dict)

    def to(self, device: str) -> "Task":
        """Return the same task with its data on a device."""

        def moved(split: Batch) -> Batch:
            return tuple(tensor.to(device) for tensor in split)

        extra = {name: Extra(moved(split), metric) for name, (split, metric) in self.extra.items()}
        return replace(self, train=moved(self.train), val=moved(self.val), test=moved(self.test), extra=extra)
