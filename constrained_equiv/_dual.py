"""Multipliers: the dual half of the saddle point, composed with Cooper.

What enters: the vector of violations h = value - level. What leaves: dL/dh, the coefficients that the optimizer pulls
the terms with, and updated multipliers. The only file that imports cooper.
Law: Cooper sees one vector constraint per type, never one per layer; the closed forms equal what Cooper computes.

    Lagrangian            dL/dh = lambda
    augmented Lagrangian  dL/dh = [lambda + c h]_+ (inequality), lambda + c h (equality)
    dual step (SGD)       lambda <- [lambda + eta h]_+ (inequality), lambda + eta h (equality)
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias, cast

import cooper
import torch
from cooper.formulations import AugmentedLagrangian, Formulation, Lagrangian
from torch import Tensor, nn

from constrained_equiv.errors import CheckpointError, ConstraintError

FormulationName: TypeAlias = Literal["lagrangian", "augmented_lagrangian"]
DualName: TypeAlias = Literal["sgd", "nupi"]
DualFactory: TypeAlias = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]

_FORMULATIONS: dict[str, type[Formulation]] = {"lagrangian": Lagrangian, "augmented_lagrangian": AugmentedLagrangian}
_TYPES = {"inequality": cooper.ConstraintType.INEQUALITY, "equality": cooper.ConstraintType.EQUALITY}


class Problem(cooper.ConstrainedMinimizationProblem):
    """What Cooper sees: one vector constraint for all inequalities and one for all equalities.

    Unlike Cooper's base class it iterates over its multipliers in a fixed order, and can be copied and pickled.
    """

    def __init__(self, constraints: dict[str, cooper.Constraint]) -> None:
        super().__init__()
        for name, constraint in constraints.items():
            setattr(self, name, constraint)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_constraints":  # asked by copy and pickle before __init__ ran
            raise AttributeError(name)
        return super().__getattr__(name)

    def dual_parameters(self) -> Any:
        """Yield the multipliers' parameters in the order of the constraints."""
        for multiplier in self.multipliers():
            yield from multiplier.parameters()

    def compute_cmp_state(self, violations: dict[str, Tensor], loss: Tensor | None = None) -> cooper.CMPState:
        """Pair each constraint with its vector of violations."""
        observed = {self._constraints[name]: cooper.ConstraintState(violations[name]) for name in self._constraints}
        return cooper.CMPState(loss, observed)


class Multipliers:
    """Multipliers of `inequalities` + `equalities` constraints, in this order in every vector.

    Attributes:
        problem: the Cooper problem that holds them.
        dual_optimizer: what updates them.
    """

    def __init__(
        self,
        inequalities: int,
        equalities: int,
        *,
        formulation: FormulationName | type[Formulation],
        penalty: float,
        dual: DualName | DualFactory,
        dual_lr: float | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        kind = _FORMULATIONS.get(formulation) if isinstance(formulation, str) else formulation
        if not (isinstance(kind, type) and issubclass(kind, Formulation)):
            raise ConstraintError(
                f"formulation={formulation!r}: expected {sorted(_FORMULATIONS)} or a subclass of "
                "cooper.formulations.Formulation"
            )
        if not penalty > 0:
            raise ConstraintError(f"penalty={penalty!r}: expected a number > 0")
        rate = penalty if dual_lr is None else dual_lr
        if not rate > 0:
            raise ConstraintError(f"dual_lr={dual_lr!r}: expected a number > 0, or None to take the penalty")
        sizes = {name: size for name, size in (("inequality", inequalities), ("equality", equalities)) if size}
        self.problem = Problem(
            {name: _constraint(kind, name, size, penalty, dtype, device) for name, size in sizes.items()}
        )
        self._sizes = list(sizes.values())
        self._penalty = penalty
        self._rate = rate
        self._closed_form = kind in (Lagrangian, AugmentedLagrangian) and dual == "sgd"
        self._augmented = kind is AugmentedLagrangian
        self._weights = list(self.problem.dual_parameters())
        self.dual_optimizer = _dual_optimizer(dual, self._weights, rate, penalty) if self._weights else None

    @property
    def values(self) -> Tensor:
        """The multipliers (n,); zeros for a formulation without multipliers."""
        if not self._weights:
            return torch.zeros(sum(self._sizes))
        return torch.cat([weight.detach() for weight in self._weights])

    def ascend(self, violations: Tensor) -> None:
        """Take one dual step."""
        if self.dual_optimizer is None:
            return
        if self._closed_form:
            for name, weight, part in self._parts(violations):
                weight.data.add_(part, alpha=self._rate)
                if name == "inequality":
                    weight.data.clamp_min_(0)
            return
        with torch.enable_grad(), torch.autocast(violations.device.type, enabled=False):
            self.dual_optimizer.zero_grad()
            self._state(violations).compute_dual_lagrangian().backward()
            self.dual_optimizer.step()
        for multiplier in self.problem.multipliers():
            multiplier.post_step_()

    def coefficients(self, violations: Tensor) -> Tensor:
        """Return dL/dh (n,) at the current multipliers."""
        if self._closed_form:
            parts = []
            for name, weight, part in self._parts(violations):
                slope = (
                    torch.add(weight.detach(), part, alpha=self._penalty)
                    if self._augmented
                    else weight.detach().clone()
                )
                parts.append(slope.clamp_min_(0) if name == "inequality" else slope)
            return torch.cat(parts)
        with torch.enable_grad(), torch.autocast(violations.device.type, enabled=False):
            leaf = violations.detach().requires_grad_()
            lagrangian = self._state(leaf).compute_primal_lagrangian().lagrangian
            return torch.autograd.grad(cast(Tensor, lagrangian), leaf)[0]

    def lagrangian(self, violations: Tensor) -> Tensor:
        """Return what the constraints add to the loss, a 0-d tensor; for line searches."""
        with torch.autocast(violations.device.type, enabled=False):
            return cast(Tensor, self._state(violations.detach()).compute_primal_lagrangian().lagrangian).detach()

    def state_dict(self) -> dict[str, Any]:
        """Return plain tensors and numbers, loadable with `weights_only=True`."""
        return {
            "multipliers": {
                name: weight.detach().clone() for name, weight in zip(self._names, self._weights, strict=True)
            },
            "penalty": self._penalty,
            "rates": [] if self.dual_optimizer is None else [group["lr"] for group in self.dual_optimizer.param_groups],
            "dual_state": {} if self.dual_optimizer is None else self.dual_optimizer.state_dict()["state"],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore multipliers and the dual optimizer's state in place."""
        saved = state["multipliers"]
        found = {name: tuple(value.shape) for name, value in saved.items()}
        expected = {name: tuple(weight.shape) for name, weight in zip(self._names, self._weights, strict=True)}
        if found != expected:
            raise CheckpointError(f"the checkpoint holds multipliers {found}: expected {expected}")
        for name, weight in zip(self._names, self._weights, strict=True):
            weight.data.copy_(saved[name])
        if self.dual_optimizer is not None:
            current = self.dual_optimizer.state_dict()
            for group, rate in zip(current["param_groups"], state["rates"], strict=True):
                group["lr"] = rate
            self.dual_optimizer.load_state_dict({"state": state["dual_state"], "param_groups": current["param_groups"]})

    @property
    def _names(self) -> list[str]:
        return [name for name, constraint in self.problem.named_constraints() if constraint.multiplier is not None]

    def _parts(self, violations: Tensor) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        return zip(self._names, self._weights, torch.split(violations, self._sizes), strict=True)

    def _state(self, violations: Tensor) -> cooper.CMPState:
        names = [name for name, _ in self.problem.named_constraints()]
        return self.problem.compute_cmp_state(dict(zip(names, torch.split(violations, self._sizes), strict=True)))


def _constraint(
    kind: type[Formulation], name: str, size: int, penalty: float, dtype: torch.dtype, device: torch.device
) -> cooper.Constraint:
    multiplier = coefficient = None
    if kind.expects_multiplier:
        multiplier = cooper.multipliers.DenseMultiplier(init=torch.zeros(size, dtype=dtype, device=device), dtype=dtype)
    if kind.expects_penalty_coefficient:
        start = torch.full((size,), penalty, dtype=dtype, device=device)
        coefficient = cooper.penalty_coefficients.DensePenaltyCoefficient(init=start)
    return cooper.Constraint(_TYPES[name], kind, multiplier, coefficient)


def _dual_optimizer(
    dual: DualName | DualFactory, weights: list[nn.Parameter], rate: float, penalty: float
) -> torch.optim.Optimizer:
    if callable(dual):
        optimizer = dual(weights)
        if not isinstance(optimizer, torch.optim.Optimizer) or not all(
            g.get("maximize") for g in optimizer.param_groups
        ):
            raise ConstraintError(
                f"dual={dual!r} made {optimizer!r}: expected a torch optimizer built with maximize=True"
            )
        return optimizer
    if dual == "sgd":
        return torch.optim.SGD(weights, lr=rate, maximize=True)
    if dual == "nupi":
        # from zero error, nuPI with proportional gain c / rate walks like the augmented Lagrangian of penalty c
        zeros = cooper.optim.nuPIInitType.ZEROS
        return cooper.optim.nuPI(weights, lr=rate, Kp=torch.tensor(penalty / rate), init_type=zeros, maximize=True)
    raise ConstraintError(
        f"dual={dual!r}: expected 'sgd', 'nupi' or a function of the multipliers that returns an optimizer"
    )
