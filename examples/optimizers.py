"""Two optimizers that a strict equivariant model should be given before relaxation gets the credit.

Enter parameter groups and a model; leaves a torch optimizer. `methods` calls them. The one law: on a model of one
parameter that is one block, each is the textbook optimizer.

Adam divides every weight by its own gradient's size, so that a weight which turns a whole irrep block counts as much as
one that scales a single number, and steps of the blocks do not match. Either remedy treats a block as one thing:

    BlockAdam   one second moment per block: all weights between two irreps, or a whole parameter
    muon        the orthogonal factor of a matrix' momentum; Adam for everything that is no matrix

The weights of e3nn and escnn layers are flat vectors of coefficients, whose matrix is not theirs: there BlockAdam fits,
and Muon does not. Vector neurons keep matrices.

Reference:
    Y. Zhang et al., "Adam-mini: use fewer learning rates to gain more", ICLR 2025, for one second moment per block;
    K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Groups = list[dict[str, Any]]


class _Blocks(NamedTuple):
    """Block of each entry of a flat parameter (entries,), and the size of each block (blocks,)."""

    index: Tensor
    sizes: Tensor

    @staticmethod
    def of(sizes: list[int], device: torch.device) -> "_Blocks":
        counts = torch.tensor(sizes, device=device)
        return _Blocks(torch.arange(len(sizes), device=device).repeat_interleave(counts), counts.float())


class BlockAdam(torch.optim.Optimizer):
    """Adam whose second moment is the mean over a block of weights instead of one number per weight.

    Args:
        params: parameters or groups.
        sizes: how many neighbouring entries of a flat parameter make each block; parameters that are not listed are one
            block.
        lr: rate; the update of every block has this root mean square when gradients are steady.
        betas: decay of the first and of the second moment.
        eps: added to the root of the second moment.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        sizes: dict[nn.Parameter, list[int]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})
        self._blocks = {parameter: _Blocks.of(split, parameter.device) for parameter, split in sizes.items()}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (first, second), lr, eps = group["betas"], group["lr"], group["eps"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                square = self._mean_square(parameter)
                if not state:
                    state["step"] = torch.zeros(())
                    state["mean"] = torch.zeros_like(parameter)
                    state["square"] = torch.zeros_like(square)
                state["step"] += 1
                state["mean"].lerp_(parameter.grad, 1 - first)
                state["square"].lerp_(square, 1 - second)
                count = float(state["step"])
                root = (state["square"] / (1 - second**count)).sqrt_().add_(eps)
                size = self._spread(parameter, root)
                parameter.sub_(state["mean"] / size, alpha=lr / (1 - first**count))
        return loss

    def _mean_square(self, parameter: nn.Parameter) -> Tensor:
        """Mean of the squared gradient over each block, (blocks,)."""
        square = parameter.grad.square().flatten()  # type: ignore[union-attr]
        if (blocks := self._blocks.get(parameter)) is None:
            return square.mean().view(1)
        return torch.zeros_like(blocks.sizes).index_add_(0, blocks.index, square).div_(blocks.sizes)

    def _spread(self, parameter: nn.Parameter, values: Tensor) -> Tensor:
        """One value per block, written out for each weight."""
        blocks = self._blocks.get(parameter)
        return values if blocks is None else values[blocks.index].view_as(parameter)


class Together(torch.optim.Optimizer):
    """Several optimizers over different parameters of one model, used as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        super().__init__([{"params": group["params"]} for part in parts for group in part.param_groups], {})

    @property
    def param_groups(self) -> Groups:
        """The groups of the parts themselves: what a scheduler writes into them counts."""
        return [group for part in self.parts for group in part.param_groups]

    @param_groups.setter
    def param_groups(self, value: Groups) -> None:
        """Torch's constructor and `finalize` assign groups; the parts keep their own."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters."""
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step(self, closure: None = None) -> None:
        """Let every part take a step; closures are not supported."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the states of all parts."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the states of all parts."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Torch's constructor adds groups; the parts have them already."""


def block_adam(model: nn.Module, groups: Groups) -> BlockAdam:
    """Adam with one second moment per pair of irreps of e3nn layers, and per parameter elsewhere."""
    return BlockAdam(groups, sizes=irrep_blocks(model))


def muon(model: nn.Module, groups: Groups) -> Together:
    """Muon for matrices, at a rate that gives updates of Adam's size, and Adam for everything else.

    Raises:
        ValueError: if no layer of the model has a matrix.
    """
    matrices = {parameter for parameter in model.parameters() if parameter.ndim == 2}
    if not matrices:
        raise ValueError(
            f"no parameter of {type(model).__name__} is a matrix: expected one, or take block Adam instead"
        )
    hidden: Groups = []
    others: Groups = []
    for group in groups:
        for chosen, target in ((True, hidden), (False, others)):
            if params := [p for p in group["params"] if (p in matrices) == chosen]:
                target.append({**group, "params": params})
    parts: list[torch.optim.Optimizer] = [
        torch.optim.Muon(hidden, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
    ]
    return Together(*parts, *([torch.optim.Adam(others)] if others else []))


def irrep_blocks(model: nn.Module) -> dict[nn.Parameter, list[int]]:
    """Sizes of the blocks of every flat e3nn weight: one for each path between two irreps."""
    sizes = {}
    for layer in model.modules():
        weight, paths = getattr(layer, "weight", None), getattr(layer, "instructions", None)
        if paths is None or not isinstance(weight, nn.Parameter) or weight.ndim != 1:
            continue
        # a linear map lists its biases as paths without an input
        split = [math.prod(p.path_shape) for p in paths if (p.has_weight if hasattr(p, "has_weight") else p.i_in >= 0)]
        sizes[weight] = split
    return sizes
