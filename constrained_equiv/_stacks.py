"""Stacks: the terms of a model, ordered so that those of one kind are handled at once.

What enters: named terms. What leaves: `Terms`, which know their norms and parts, stack by stack, and how the entries
of a constraint on them are called. Used by constraints and the optimizer.
Law: the number of operations depends on the number of distinct shapes, never on the number of terms.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from constrained_equiv import _tensors
from constrained_equiv._terms import NonEquivariantTerm
from constrained_equiv.errors import ConstraintError
from constrained_equiv.groups import Group
from constrained_equiv.intertwiners import Intertwiners, MapBlock, Projection

Part: TypeAlias = Literal["whole", "non_equivariant"]
Share: TypeAlias = Part | Group
"""What of W is measured: all, what breaks the layer's symmetry, or what breaks a subgroup of it."""
Per: TypeAlias = Literal["layer", "block", "generator", "model"]


class Entry(NamedTuple):
    """One number that a constraint holds to its level.

    Attributes:
        name: of the layer, with the block or generator where there are several; of all layers where they share it.
        terms: positions of the terms that it measures.
    """

    name: str
    terms: range


@dataclass(frozen=True, eq=False)
class Terms:
    """Terms ordered so that those of equal shape, symmetry and form are neighbours and can be handled as one stack.

    Attributes:
        modules: the terms; their parameters are looked up anew at every step, for sharding replaces parameters.
        names: of their layers.
        stacks: ranges of neighbours.
    """

    modules: tuple[NonEquivariantTerm, ...] = field(repr=False)
    names: tuple[str, ...]
    stacks: tuple[slice, ...] = field(repr=False)

    @staticmethod
    def of(named: Sequence[tuple[str, NonEquivariantTerm]]) -> "Terms":
        """Order named terms into stacks."""
        groups = _tensors.grouped(
            (tuple(t.weight.shape), t.weight.dtype, t.projection, t.complement, t.rows) for _, t in named
        )
        ordered = [named[i] for group in groups for i in group]
        ends = list(accumulate(map(len, groups)))
        ranges = tuple(slice(end - len(group), end) for end, group in zip(ends, groups, strict=True))
        return Terms(tuple(term for _, term in ordered), tuple(name for name, _ in ordered), ranges)

    def __len__(self) -> int:
        return len(self.modules)

    def weights(self) -> list[nn.Parameter]:
        """The parameters W."""
        return [own["weight"] for own in self._own]  # type: ignore[misc]

    def gates(self) -> list[nn.Parameter]:
        """The gates; empty where the terms have none."""
        return [own["gate"] for own in self._gated]  # type: ignore[misc]

    def scales(self) -> list[Tensor]:
        """The 0-d buffers theta."""
        return [term._buffers["scale"] for term in self.modules]  # type: ignore[misc]

    @property
    def precision(self) -> torch.dtype:
        """Of values and multipliers: float32, or float64 where the terms are."""
        weights = [self.modules[stack.start].weight for stack in self.stacks]
        wide = any(weight.dtype == torch.float64 for weight in weights)
        return torch.float64 if wide else torch.float32

    def factors(self) -> Tensor:
        """scale * gate / sqrt(rows) of each term, (n,)."""
        factors = torch.stack(self.scales())
        if self._gated:
            one = torch.ones_like(factors[0])
            gates = [own.get("gate") for own in self._own]
            factors = factors * torch.stack([one if gate is None else gate.detach() for gate in gates])
        return factors * self._spread(factors.device, self.precision)

    def parts(self, part: Share) -> list[Tensor]:
        """W of each term, or W - P W where only what breaks the symmetry, or a subgroup of it, is meant."""
        weights: list[Tensor] = list(self.weights())
        if torch.is_grad_enabled():
            weights = [weight.detach() for weight in weights]
        if self.whole(part):
            return weights
        shares: list[Tensor] = []
        for stack, projection in zip(self.stacks, self.projections(part), strict=True):
            here = weights[stack]
            if _tensors.any_sharded(here):
                here = [weight.clone() for weight in here]
                _tensors.map_stacked_(here, projection.complement_)
                shares += here
            else:
                shares += projection.complement_(torch.stack(here)).unbind()
        return shares

    def whole(self, part: Share) -> bool:
        """Whether a part is all of W, so that nothing is left where it is 0."""
        return part == "whole" or (part == "non_equivariant" and self.complement)

    def projections(self, part: Share) -> tuple[Projection, ...]:
        """Onto the maps that `part` leaves out, one for each stack."""
        if not isinstance(part, Group):
            return tuple(self.modules[stack.start].projection for stack in self.stacks)
        if part not in self._restricted:
            self._restricted[part] = tuple(self._restrict(stack.start, part) for stack in self.stacks)
        return self._restricted[part]

    def _restrict(self, position: int, subgroup: Group) -> Projection:
        space = self.modules[position].projection
        if not isinstance(space, Intertwiners):
            raise ConstraintError(
                f"subgroup {subgroup} at layer {self.names[position]!r}, whose term is a kernel: expected dense terms "
                "with representations, e3nn's or those of ce.adapters.linear and vector_neurons; choose them in where= "
                "or take lie(per='generator') there"
            )
        return space.restricted(subgroup)

    @cached_property
    def _restricted(self) -> dict[Group, tuple[Projection, ...]]:
        return {}

    def pull_gates_(self, moments: Tensor) -> None:
        """Add moments / gate to the gradients of the gates; 0 where a gate is 0, at the kink of every measure.

        Args:
            moments: gate * d/d gate of what is added to the loss, (n,).
        """
        if not self._gated:
            return
        single = moments.unbind()
        own = torch.stack([one for one, own in zip(single, self._own, strict=True) if own.get("gate") is not None])
        gates = self.gates()
        slopes = own.to(gates[0].dtype).div_(torch.stack([*gates]).detach()).nan_to_num_(0.0, 0.0, 0.0)
        _tensors.add_(_tensors.gradients(gates), slopes.unbind())

    def products(self, others: Sequence[Tensor]) -> Tensor:
        """Frobenius products of W with other maps, one of each term, (n,)."""
        weights = self.weights()
        stacks = [(_tensors.stacked(weights[stack]), _tensors.stacked(others[stack])) for stack in self.stacks]
        return torch.cat([(a * b).flatten(1).sum(1, dtype=self.precision) for a, b in stacks])

    def entries(self, part: Share, per: Per) -> tuple[Entry, ...]:
        """What a measure of these terms yields, in order."""
        if per == "model":
            return (Entry(_joined(self.names), range(len(self))),)
        return tuple(
            Entry(f"{self.names[i]}[{label}]" if label else self.names[i], range(i, i + 1))
            for stack in self.stacks
            for i in range(stack.start, stack.stop)
            for label in self._labels(stack, part, per)
        )

    def _labels(self, stack: slice, part: Share, per: Per) -> tuple[str, ...]:
        """Of the entries of each term of a stack."""
        if per == "block":
            return tuple(block.name for block in self._blocks(stack, part))
        if per == "generator":
            projection: Projection = self.modules[stack.start].projection
            return projection.generator_names
        return ("",)

    def _blocks(self, stack: slice, part: Share) -> list[MapBlock]:
        """The blocks that are measured: not those which are 0 because all their maps are equivariant."""
        first = self.modules[stack.start]
        blocks = first.projection.map_blocks
        kept = [block for block in blocks if not block.equivariant or (part == "whole" and not first.complement)]
        return kept or list(blocks)

    def split(self, numbers: Tensor, part: Share, per: Per) -> list[Tensor]:
        """Cut numbers, one per entry, into (terms, entries of each) for each stack."""
        sizes = [(stack.stop - stack.start, len(self._labels(stack, part, per))) for stack in self.stacks]
        pieces = torch.split(numbers, [count * size for count, size in sizes])
        return [piece.view(size) for piece, size in zip(pieces, sizes, strict=True)]

    def spread(self, numbers: Tensor, part: Share, per: Per) -> Tensor:
        """Repeat numbers, one per term, for all entries of that term."""
        if per in ("layer", "model"):
            return numbers
        return torch.cat(
            [numbers[stack].repeat_interleave(len(self._labels(stack, part, per))) for stack in self.stacks]
        )

    def gathered(self, numbers: Tensor, part: Share, per: Per) -> Tensor:
        """Add up numbers, one per entry, for each term, (n,)."""
        if per in ("layer", "model"):
            return numbers
        return torch.cat([here.sum(1) for here in self.split(numbers, part, per)])

    def add_parts_(self, targets: Sequence[Tensor], part: Share, per: Per, factors: Tensor) -> None:
        """targets[i] += factor * part of W of the i-th term, block by block where there is a factor for each."""
        parts = self.parts(part)
        if per != "block":
            _tensors.add_scaled_(targets, parts, factors)
            return
        scaled = [
            _scale_blocks(_tensors.stacked(parts[stack]), self._blocks(stack, part), here)
            for stack, here in zip(self.stacks, self.split(factors, part, per), strict=True)
        ]
        _tensors.add_(targets, [one for stack in scaled for one in stack.unbind()])

    def rescale_(self, targets: Sequence[Tensor], part: Share, per: Per, factors: Tensor) -> None:
        """Multiply what each entry measures by its factor, in targets that equal W; by the smallest of several."""
        if per == "model":
            factors = factors.expand(len(self))
        elif per == "generator":
            factors = torch.cat([here.amin(1) for here in self.split(factors, part, per)])
        self.add_parts_(targets, part, per, factors - 1.0)

    def norms(self, part: Share, per: Per = "layer") -> Tensor:
        """Frobenius norms of `parts`, (n,), or of each of their blocks, one after the other."""
        parts = self.parts(part)
        if per == "block":
            stacks = [(_tensors.stacked(parts[stack]), self._blocks(stack, part)) for stack in self.stacks]
            return torch.cat([_block_norms(*stack, self.precision).flatten() for stack in stacks])
        if len(self.stacks) == 1 or _tensors.any_sharded(parts):  # one collective for all
            return _tensors.norms(parts, self.precision)
        return torch.cat([_tensors.norms(parts[stack], self.precision) for stack in self.stacks])

    @cached_property
    def complement(self) -> bool:
        """Whether all terms are kept orthogonal to the equivariant maps."""
        return all(term.complement for term in self.modules)

    @cached_property
    def _own(self) -> tuple[dict[str, nn.Parameter | None], ...]:
        """The modules' own tables of parameters, which outlive the parameters in them and are quick to look up."""
        return tuple(term._parameters for term in self.modules)

    @cached_property
    def _gated(self) -> tuple[dict[str, nn.Parameter | None], ...]:
        return tuple(own for own in self._own if own.get("gate") is not None)

    def _spread(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """1 / sqrt(rows), copied to a device once: a copy in every step would make the host wait."""
        spread = self._spreads.get((device, dtype))
        if spread is None:
            factors = [term.rows**-0.5 for term in self.modules]
            self._spreads[device, dtype] = spread = torch.tensor(factors, dtype=dtype, device=device)
        return spread

    @cached_property
    def _spreads(self) -> dict[tuple[torch.device, torch.dtype], Tensor]:
        return {}


def _joined(names: Sequence[str]) -> str:
    shown = names if len(names) <= 3 else (names[0], "...", names[-1])
    return " + ".join(shown) + (f", {len(names)} layers" if len(names) > 3 else "")


def _block_norms(stack: Tensor, blocks: Sequence[MapBlock], dtype: torch.dtype) -> Tensor:
    """Norms (n, blocks) of the blocks of maps (n, *shape)."""
    axes = tuple(range(1, stack.ndim))
    norms = []
    for block in blocks:
        pieces = [torch.linalg.vector_norm(stack[:, *place], dim=axes, dtype=dtype) for place in block.places]
        norms.append(pieces[0] if len(pieces) == 1 else torch.linalg.vector_norm(torch.stack(pieces), dim=0))
    return torch.stack(norms, 1)


def _scale_blocks(stack: Tensor, blocks: Sequence[MapBlock], factors: Tensor) -> Tensor:
    """Maps (n, *shape) with each block multiplied by its factor (n, blocks), and 0 in all others."""
    result = torch.zeros_like(stack)
    for block, factor in zip(blocks, factors.to(stack.dtype).unbind(1), strict=True):
        for place in block.places:
            result[:, *place].addcmul_(stack[:, *place], factor.view(-1, *[1] * (stack.ndim - 1)))
    return result
