"""Multipliers: the dual half of the saddle point, composed with Cooper.

What enters: the vector of violations h = value - level. What leaves: dL/dh, the coefficients that the optimizer pulls
the terms with, and updated multipliers. The only file that imports cooper.
Law: Cooper sees one vector constraint per type, never one per layer; the closed forms equal what Cooper computes.

    Lagrangian            dL/dh = lambda
    augmented Lagrangian  dL/dh = [lambda + c h]_+ (inequality), lambda + c h (equality)
    quadratic penalty     dL/dh = [c h]_+ (inequality), c h (equality); no multiplier
    dual step (SGD)       lambda <- [lambda + eta h]_+ (inequality), lambda + eta h (equality)
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias, cast

import cooper
import torch
from cooper.formulations import AugmentedLagrangian, Formulation, Lagrangian, QuadraticPenalty
from torch import Tensor, nn

from constrained_equiv.errors import CheckpointError, ConstraintError

FormulationName: TypeAlias = Literal["lagrangian", "augmented_lagrangian", "quadratic_penalty"]
DualName: TypeAlias = Literal["sgd", "nupi"]
DualFactory: TypeAlias = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]
MultiplierFactory: TypeAlias = Callable[[Tensor], Any]

_FORMULATIONS: dict[str, type[Formulation]] = {
    "lagrangian": Lagrangian,
    "augmented_lagrangian": AugmentedLagrangian,
    "quadratic_penalty": QuadraticPenalty,
}
_TOLERATED = 1e-4  # violations up to here let no penalty grow
_GREATEST = 1e4  # times its start, a growing penalty ends
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

    def compute_cmp_state(
        self,
        violations: dict[str, Tensor] | Callable[[], dict[str, Tensor]],
        loss: Tensor | Callable[[], Tensor] | None = None,
    ) -> cooper.CMPState:
        """Pair each constraint with its vector of violations, value - level.

        Cooper's own optimizers call this from `roll(compute_cmp_state_kwargs={"violations": ..., "loss": ...})`. They
        may evaluate it anew after the parameters moved, so functions are accepted beside tensors.
        """
        found = violations() if callable(violations) else violations
        observed = {
            constraint: cooper.ConstraintState(
                found[name], contributes_to_dual_update=constraint.multiplier is not None
            )
            for name, constraint in self._constraints.items()
        }
        return cooper.CMPState(loss() if callable(loss) else loss, observed)


class Multipliers:
    """Multipliers of `inequalities` + `equalities` constraints, in this order in every vector.

    Its methods are called without gradients (`torch.no_grad`), as the whole step is.

    Attributes:
        problem: the Cooper problem that holds them.
        dual_optimizer: what updates them; None for a formulation without multipliers.
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
        penalty_growth: float = 1.0,
        ceilings: Tensor | None = None,
        multiplier: MultiplierFactory | None = None,
    ) -> None:
        kind = _FORMULATIONS.get(formulation) if isinstance(formulation, str) else formulation
        if not (isinstance(kind, type) and issubclass(kind, Formulation)):
            raise ConstraintError(
                f"formulation={formulation!r}: expected {sorted(_FORMULATIONS)} or a subclass of "
                "cooper.formulations.Formulation"
            )
        if not (_finite(penalty) and penalty > 0):
            raise ConstraintError(f"penalty={penalty!r}: expected a finite number > 0")
        if not (_finite(penalty_growth) and penalty_growth >= 1):
            raise ConstraintError(f"penalty_growth={penalty_growth!r}: expected a finite factor per step, >= 1")
        rate = penalty if dual_lr is None else dual_lr
        if not (_finite(rate) and rate > 0):
            raise ConstraintError(f"dual_lr={dual_lr!r}: expected a finite number > 0, or None to take the penalty")
        sizes = {name: size for name, size in (("inequality", inequalities), ("equality", equalities)) if size}
        self.problem = Problem(
            {name: _constraint(kind, name, size, penalty, dtype, device, multiplier) for name, size in sizes.items()}
        )
        if multiplier is not None and ceilings is not None:
            raise ConstraintError(
                "multiplier= with a slack of linear cost, which holds multipliers below its price: expected Cooper's "
                "own DenseMultiplier there; leave multiplier= out"
            )
        if penalty_growth > 1 and not kind.expects_penalty_coefficient:
            raise ConstraintError(
                f"penalty_growth={penalty_growth} with formulation {kind.__name__}, which has no penalty: expected "
                "formulation='augmented_lagrangian' or 'quadratic_penalty'"
            )
        self._sizes = sizes
        self._start, self._growth = penalty, penalty_growth
        self._follow = dual_lr is None and penalty_growth > 1  # the dual rate is the penalty, also where that grows
        self._closed_form = kind in _FORMULATIONS.values() and dual == "sgd" and multiplier is None
        self._kind = kind
        named = ((name, constraint.multiplier) for name, constraint in self.problem.named_constraints())
        self._modules: dict[str, Any] = {name: module for name, module in named if module is not None}
        priced = ((name, constraint.penalty_coefficient) for name, constraint in self.problem.named_constraints())
        self._coefficients: dict[str, Any] = {name: held for name, held in priced if held is not None}
        self._weights: dict[str, nn.Parameter] = (
            {} if multiplier else {name: module.weight for name, module in self._modules.items()}
        )
        self._ceilings = {} if ceilings is None else dict(zip(sizes, self._split(ceilings), strict=True))
        self._none = torch.zeros(inequalities + equalities, dtype=dtype, device=device)
        weights = list(self.problem.dual_parameters())
        self.dual_optimizer = _dual_optimizer(dual, weights, rate, penalty) if weights else None

    @property
    def values(self) -> Tensor:
        """The multipliers (n,); zeros for a formulation without multipliers."""
        if not self._modules:
            return self._none
        values: list[Tensor] = [weight.detach() for weight in self._weights.values()]
        values = values or [module().detach() for module in self._modules.values()]
        return values[0] if len(values) == 1 else torch.cat(values)

    @property
    def penalties(self) -> Tensor:
        """The penalty coefficients c (n,); zeros for a formulation without."""
        coefficients = list(self._penalties.values())
        return torch.cat(coefficients) if coefficients else self._none

    def ascend(self, violations: Tensor) -> None:
        """Take one dual step, and let penalties of what is violated grow."""
        if self._growth > 1:
            self._grow(violations)
        if self.dual_optimizer is None:
            return
        if self._closed_form:
            rate = self.dual_optimizer.param_groups[0]["lr"]
            for name, weight, part in self._parts(violations):
                if self._follow:
                    weight.addcmul_(part, self._penalties[name])
                else:
                    weight.add_(part, alpha=rate)
                if name == "inequality":
                    weight.clamp_min_(0)
        else:
            with torch.enable_grad(), torch.autocast(violations.device.type, enabled=False):
                self.dual_optimizer.zero_grad()
                self._state(violations).compute_dual_lagrangian().backward()
                self.dual_optimizer.step()
            for multiplier in self.problem.multipliers():
                multiplier.post_step_()
        for name, ceiling in self._ceilings.items():
            self._weights[name].data.clamp_(-ceiling, ceiling)

    def coefficients(self, violations: Tensor) -> Tensor:
        """Return dL/dh (n,) at the current multipliers."""
        if not self._closed_form:
            with torch.enable_grad(), torch.autocast(violations.device.type, enabled=False):
                leaf = violations.detach().requires_grad_()
                lagrangian = self._state(leaf).compute_primal_lagrangian().lagrangian
                return torch.autograd.grad(cast(Tensor, lagrangian), leaf)[0]
        parts = [self._slope(name, part) for name, part in zip(self._sizes, self._split(violations), strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _slope(self, name: str, violations: Tensor) -> Tensor:
        """dL/dh of the constraints of one type, in closed form."""
        if self._kind is Lagrangian:
            return torch.clone(self._weights[name])
        penalty = self._coefficients[name].value  # of the checkpoint, where one was loaded
        slope = torch.addcmul(self._weights[name], violations, penalty) if self._weights else violations * penalty
        return torch.clamp_min_(slope, 0) if name == "inequality" else slope

    def _grow(self, violations: Tensor) -> None:
        for (name, penalty), part in zip(self._penalties.items(), self._split(violations), strict=True):
            violated = (part if name == "inequality" else part.abs()) > _TOLERATED
            penalty.copy_(torch.where(violated, penalty * self._growth, penalty).clamp_max_(self._start * _GREATEST))

    def lagrangian(self, violations: Tensor) -> Tensor:
        """Return what the constraints add to the loss, a 0-d tensor; for line searches."""
        with torch.autocast(violations.device.type, enabled=False):
            return cast(Tensor, self._state(violations.detach()).compute_primal_lagrangian().lagrangian).detach()

    def state_dict(self) -> dict[str, Any]:
        """Return plain tensors and numbers, loadable with `weights_only=True`."""
        return {
            "multipliers": {name: tensor.clone() for name, tensor in self._held.items()},
            "penalties": {name: penalty.clone() for name, penalty in self._penalties.items()},
            "dual": type(self.dual_optimizer).__name__,
            "rates": [] if self.dual_optimizer is None else [group["lr"] for group in self.dual_optimizer.param_groups],
            "dual_state": {} if self.dual_optimizer is None else self.dual_optimizer.state_dict()["state"],
        }

    def check_state_dict(self, state: dict[str, Any]) -> None:
        """Refuse a state of other constraints or another formulation."""
        for what, own in (("multipliers", self._held), ("penalties", self._penalties)):
            found = {name: tuple(value.shape) for name, value in state[what].items()}
            expected = {name: tuple(value.shape) for name, value in own.items()}
            if found != expected:
                raise CheckpointError(
                    f"the checkpoint holds {what} {found}: expected {expected}; build the optimizer with the "
                    "constraints and the formulation of the saved run"
                )
        kind = type(self.dual_optimizer).__name__
        if state.get("dual", kind) != kind:
            raise CheckpointError(
                f"the checkpoint's multipliers were moved by {state['dual']}: expected {kind}; pass the dual= of the "
                "saved run"
            )
        groups = 0 if self.dual_optimizer is None else len(self.dual_optimizer.param_groups)
        if len(state["rates"]) != groups:
            raise CheckpointError(
                f"the checkpoint's dual optimizer has {len(state['rates'])} parameter groups: expected {groups}"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore multipliers, penalties and the dual optimizer's state in place."""
        self.check_state_dict(state)
        for name, tensor in self._held.items():
            tensor.copy_(state["multipliers"][name])
        for name, penalty in self._penalties.items():
            penalty.copy_(state["penalties"][name])
        if self.dual_optimizer is not None:
            current = self.dual_optimizer.state_dict()
            for group, rate in zip(current["param_groups"], state["rates"], strict=True):
                group["lr"] = rate
            self.dual_optimizer.load_state_dict({"state": state["dual_state"], "param_groups": current["param_groups"]})

    def to_(self, device: torch.device) -> None:
        """Move everything to where the terms have moved."""
        before = list(self.problem.dual_parameters())
        for module in self._modules.values():
            module.to(device)
        now = dict(zip(map(id, before), self.problem.dual_parameters(), strict=True))  # others, where types differ
        self._weights = {name: now[id(weight)] for name, weight in self._weights.items()}
        for coefficient in self._coefficients.values():
            coefficient.to(device)
        self._ceilings = {name: ceiling.to(device) for name, ceiling in self._ceilings.items()}
        self._none = self._none.to(device)
        if self.dual_optimizer is None:
            return
        for group in self.dual_optimizer.param_groups:
            group["params"] = [now[id(parameter)] for parameter in group["params"]]
        for parameter, state in list(self.dual_optimizer.state.items()):
            del self.dual_optimizer.state[parameter]
            self.dual_optimizer.state[now[id(parameter)]] = {
                key: value.to(device) if isinstance(value, Tensor) else value for key, value in state.items()
            }

    @property
    def _held(self) -> dict[str, Tensor]:
        """What the multipliers consist of, sharing memory with them."""
        return {
            f"{name}.{key}": tensor
            for name, module in self._modules.items()
            for key, tensor in module.state_dict().items()
        }

    @property
    def _penalties(self) -> dict[str, Tensor]:
        return {name: coefficient.value for name, coefficient in self._coefficients.items()}

    def _split(self, vector: Tensor) -> Sequence[Tensor]:
        return [vector] if len(self._sizes) == 1 else torch.split(vector, list(self._sizes.values()))

    def _parts(self, violations: Tensor) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        return zip(self._weights, self._weights.values(), self._split(violations), strict=True)

    def _state(self, violations: Tensor) -> cooper.CMPState:
        return self.problem.compute_cmp_state(dict(zip(self._sizes, self._split(violations), strict=True)))


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _constraint(
    kind: type[Formulation],
    name: str,
    size: int,
    penalty: float,
    dtype: torch.dtype,
    device: torch.device,
    make: MultiplierFactory | None,
) -> cooper.Constraint:
    multiplier = coefficient = None
    if kind.expects_multiplier:
        start = torch.zeros(size, dtype=dtype, device=device)
        multiplier = cooper.multipliers.DenseMultiplier(init=start, dtype=dtype) if make is None else make(start)
        if not isinstance(multiplier, cooper.multipliers.Multiplier) or multiplier.expects_constraint_features:
            raise ConstraintError(
                f"multiplier={make!r} made {multiplier!r}: expected a cooper.multipliers.Multiplier of {size} values "
                "without constraint features"
            )
        if tuple(multiplier().shape) != (size,):
            raise ConstraintError(
                f"multiplier={make!r} made values of shape {tuple(multiplier().shape)}: expected ({size},)"
            )
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
