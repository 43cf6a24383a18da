"""The non-equivariant term: the child module that holds W beside an equivariant layer.

What enters: the projection onto equivariant maps and the shape of W. What leaves: `matrix()`, the map that the relaxed
layer adds. Made by `relax`, used by adapters in the forward pass, measured by constraints.
Law: an inactive term costs nothing and changes nothing; the map added is scale * gate * W, nothing else.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from constrained_equiv.errors import CheckpointError
from constrained_equiv.intertwiners import Projection

Init: TypeAlias = float | Callable[[Tensor], Any]
"""A standard deviation, or a function that fills a tensor in place, such as those of `torch.nn.init`."""

CHILD = "non_equivariant"
"""Name of the child module under which a relaxed layer holds its term."""


class NonEquivariantTerm(nn.Module):
    """An unconstrained linear map W, added to an equivariant layer as scale * gate * W.

    Attributes:
        weight: W, in the shape that the layer's adapter states.
        scale: 0-d buffer theta; 1 unless a scale schedule drives it.
        gate: 0-d parameter gamma of the gated form, else None.
        projection: onto equivariant maps.
        complement: whether W is kept orthogonal to the equivariant maps.
        rows: output features that a norm of W is spread over, so that ||W|| / sqrt(rows) is the RMS output for
            isotropic unit-variance input.
        enabled: False inside `disabled(model)`.
        plan: constants of the layer's adapter.
    """

    weight: nn.Parameter
    scale: Tensor
    gate: nn.Parameter | None
    response: Tensor
    moment: Tensor

    def __init__(
        self,
        projection: Projection,
        shape: tuple[int, ...],
        *,
        rows: float,
        complement: bool,
        gated: bool,
        evaluate_with_terms: bool,
        like: Tensor,
        plan: Any = None,
    ) -> None:
        super().__init__()
        self.plan = plan
        self.projection = projection
        self.rows = rows
        self.complement = complement
        self.enabled = True
        self.evaluate_with_terms = evaluate_with_terms
        self.weight = nn.Parameter(torch.zeros(shape, dtype=like.dtype, device=like.device))
        self.gate = nn.Parameter(torch.ones((), dtype=like.dtype, device=like.device)) if gated else None
        self.register_buffer("scale", torch.ones((), dtype=like.dtype, device=like.device))
        self._recorded: frozenset[str] = frozenset()

    @property
    def active(self) -> bool:
        """Whether the layer adds the term in its next forward pass."""
        return self.enabled and (self.training or self.evaluate_with_terms)

    def matrix(self) -> Tensor:
        """Return the map that is added, scale * gate * W."""
        return self.factor() * self.weight

    def factor(self) -> Tensor:
        """Return scale * gate."""
        return self.scale if self.gate is None else self.scale * self.gate

    def added_to(self, result: Tensor, rows: Tensor) -> Tensor:
        """Return result + scale * gate * W rows, for rows (..., in); nothing of it is stored unless it is gated."""
        return torch.addcmul(result, self.factor(), nn.functional.linear(rows, self.weight))

    @torch.no_grad()
    def initialise(self, init: Init, generator: torch.Generator | None) -> None:
        """Fill W; in the complement, drop its equivariant part again."""
        if callable(init):
            init(self.weight)
        elif init:
            noise = torch.randn(self.weight.shape, dtype=torch.float64, generator=generator)
            self.weight.copy_(noise * init)
        if self.complement:
            self.projection.complement_(self.weight)

    def record(self, what: Literal["response", "moment"]) -> None:
        """Keep a statistic of every training forward for a constraint.

        Args:
            what: `response`, the RMS of the layer's output, or `moment`, the second moment (in, in) of its inputs.
        """
        if what in self._recorded:
            return
        size = () if what == "response" else (self.weight.shape[1],) * 2
        start = torch.ones if what == "response" else torch.zeros
        self.register_buffer(what, start(size, dtype=torch.float32, device=self.weight.device), persistent=False)
        self._recorded |= {what}

    def observe(self, inputs: Tensor, outputs: Tensor) -> None:
        """Update the recorded statistics.

        Args:
            inputs: features (..., in) that W is applied to.
            outputs: what the relaxed layer returned.
        """
        if not self._recorded or not self.training:
            return
        with torch.no_grad():
            if "response" in self._recorded:
                response = outputs.detach().float().square().mean().sqrt()
                self.response.copy_(torch.where(response > 0, response, self.response))  # empty, or says nothing
            if "moment" in self._recorded:
                rows = inputs.detach().float().reshape(-1, inputs.shape[-1])
                self.moment.copy_(rows.T @ rows / max(len(rows), 1))

    def extra_repr(self) -> str:
        """Describe the term in a printed model."""
        form = "complement" if self.complement else "free"
        return f"{' x '.join(map(str, self.weight.shape))}, {form}{', gated' if self.gate is not None else ''}"

    def get_extra_state(self) -> Tensor:
        """Say in a checkpoint how the layer was relaxed, in numbers: some formats hold nothing but tensors."""
        return torch.tensor([self.complement, self.gate is not None, *self.weight.shape], device=self.weight.device)

    def set_extra_state(self, state: Tensor) -> None:
        """Do nothing: the description was compared before anything was loaded."""

    def check_state_dict(self, state_dict: dict[str, Any], prefix: str) -> bool:
        """Return whether a checkpoint has this term, under a prefix; refuse one of a differently relaxed layer."""
        if not any(key.startswith(prefix) for key in state_dict):
            return False
        found = state_dict.get(f"{prefix}_extra_state")
        saved = {} if found is None else _described(found.tolist())
        own = _described([self.complement, self.gate is not None, *self.weight.shape])
        if saved != own:
            raise CheckpointError(
                f"{prefix[:-1]} of the checkpoint was relaxed as {saved}: expected {own}; nothing was loaded. "
                "Call ce.relax with the same layers, complement= and gate= before loading"
            )
        return True

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Save W as a tensor of its own: where terms lie in one block, some formats would take them for one tensor."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        key = f"{prefix}weight"
        if not keep_vars and _is_part(destination[key]):
            destination[key] = destination[key].clone()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a plain checkpoint, one without terms, as W = 0."""
        if self.check_state_dict(state_dict, prefix):
            super()._load_from_state_dict(state_dict, prefix, *args)
        else:
            with torch.no_grad():
                self.weight.zero_()


def _described(numbers: list[int]) -> dict[str, Any]:
    complement, gated, *shape = numbers
    return {"shape": shape, "complement": bool(complement), "gated": bool(gated)}


def _is_part(tensor: Tensor) -> bool:
    """Whether a plain tensor lies in a block of memory larger than itself."""
    return type(tensor) is Tensor and tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size()
