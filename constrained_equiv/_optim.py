"""ConstrainedOptimizer: any torch optimizer, with the non-equivariant terms held to their constraints.

What enters: a base optimizer and constraint records. What leaves: a `torch.optim.Optimizer` whose step is the base's
between the engine's `before` and `after`; or, from `attach`, the base itself with hooks that do the same.
Law: learning-rate schedulers, hooks, scalers, clipping, accumulation and closures work as on the base optimizer; the
host reads nothing from the device in a step (unless `on_nonfinite` asks for it).
"""

import copy
import io
from collections.abc import Callable
from functools import wraps
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as _torch_optimizer

from constrained_equiv._dual import DualFactory, DualName, FormulationName, MultiplierFactory, Multipliers
from constrained_equiv._engine import Engine, Readings
from constrained_equiv._options import AtZero, Enforce, OnNonFinite, Options, Order, Record
from constrained_equiv.constraints import Constraint
from constrained_equiv.errors import ConstraintError, SerializationError

__all__ = ["Attached", "ConstrainedOptimizer", "ConstraintState", "Readings", "attach"]

_KEY = "constrained"


def _with_hooks(step: Callable[..., Any]) -> Any:
    """Run an optimizer's step hooks around its step.

    torch wraps the step of every optimizer class so, and in a profiler record besides, which takes a twentieth of the
    time of a small Adam step: the base, whose step is inside, has one already.
    """

    @wraps(step)
    def hooked(self: torch.optim.Optimizer, closure: Callable[[], Any] | None = None) -> Any:
        given: tuple[Any, ...] = (self,) if closure is None else (self, closure)
        kwargs: dict[str, Any] = {}
        for hook in chain(
            _torch_optimizer._global_optimizer_pre_hooks.values(), self._optimizer_step_pre_hooks.values()
        ):
            if (changed := hook(self, given, kwargs)) is not None:
                given, kwargs = changed
        result = step(*given, **kwargs)
        for after in chain(
            self._optimizer_step_post_hooks.values(), _torch_optimizer._global_optimizer_post_hooks.values()
        ):
            after(self, given, kwargs)
        return result

    hooked.hooked = True  # type: ignore[attr-defined]  # torch then leaves it as it is
    return hooked


class ConstrainedOptimizer(torch.optim.Optimizer):
    """Wrap an optimizer so that it solves min loss subject to value_i <= level_i(step).

    Args:
        base: an optimizer over a relaxed model's parameters, terms included (see `ce.parameter_groups`).
        *constraints: records of `ce.constraints`; several are stacked into one vector. Terms that no record covers are
            the base optimizer's alone: neither held nor kept in the complement.
        formulation: `augmented_lagrangian` (default), `lagrangian`, `quadratic_penalty` (no multipliers; ridge where
            the level is 0), or a Cooper formulation class.
        penalty: c of the augmented Lagrangian, > 0, in units of loss per squared unit of the measure.
        penalty_growth: factor by which c grows per step where a violation exceeds 1e-4, up to 10,000 times its start; 1
            by default. The dual rate grows with it where the formulation is named, `dual` is `sgd`, and neither
            `dual_lr` nor `multiplier` is given.
        dual: `sgd` (default), `nupi`, or a function that makes a maximizing optimizer of the multipliers. An Adam here
            takes sign-like steps: its multipliers lose their meaning and may cycle.
        dual_lr: ascent rate of the multipliers; the penalty by default.
        multiplier: function of the zeros (n,) to start from that makes a `cooper.multipliers.Multiplier` of as many
            values, for multipliers with a parametrisation or a bound of their own; Cooper's `DenseMultiplier` by
            default.
        order: `dual-primal` (default: multipliers move first, on the same measurement), `simultaneous`, or
            `primal-dual` (the terms are measured again after the base step).
        enforce: `multipliers` (default) add the constraint's gradient to the task's; `proximal` leaves the task's
            gradient alone and shrinks each term after the step, past any preconditioning, so that its measure falls by
            learning rate * slope^2 * multiplier (slope^2 is 1 / out features for `weight`) and reaches exact zero in
            finite time (a multiplier then counts per unit of learning rate, not of the loss, where the base is Adam);
            `projection` scales each term back onto its level's ball after every step and needs no multipliers.
        at_zero: what happens while a level is exactly 0: `clear` (default) sets the term to exactly 0, and it starts
            with fresh base state should the level rise again, so that the tail of the schedule trains the equivariant
            model alone; `multipliers` leaves it to the multipliers.
        on_nonfinite: `ignore` (default) keeps multipliers finite, and terms in the complement too, at no cost; `skip`
            leaves everything as it was when a gradient is not finite; `raise` raises NonFiniteError then. The last two
            read the device once per step.

    Raises:
        ConstraintError: if no constraint is given, a term is missing in the base optimizer, a term is constrained twice
            by the same measure, or an option is unknown.

    Example:
        >>> import torch, constrained_equiv as ce
        >>> points = ce.representations.permutation(4, channels=2)
        >>> model = ce.relax(
        ...     torch.nn.Linear(2, 2),
        ...     where=lambda name, layer: True,
        ...     adapter=ce.adapters.linear(points, points, axes=(-2, -1)),
        ... )
        >>> constraint = ce.constraints.weight(model, level=ce.schedules.linear(1.0, 0.0, 100))
        >>> optimizer = ce.ConstrainedOptimizer(torch.optim.Adam(model.parameters(), lr=1e-3), constraint)
        >>> model(torch.randn(8, 4, 2)).square().mean().backward()
        >>> optimizer.step()

    Reference: Gallego-Posada et al. (2025), "Cooper: a library for constrained optimization in deep learning", for the
        formulations; Pertigkiozoglou et al. (2024) for relaxed training.
    """

    _step_supports_amp_scaling = False  # GradScaler then unscales first, so that the pull is added in unscaled units

    def __init__(
        self,
        base: torch.optim.Optimizer,
        *constraints: Record,
        formulation: FormulationName | type[Any] = "augmented_lagrangian",
        penalty: float = 1.0,
        penalty_growth: float = 1.0,
        dual: DualName | DualFactory = "sgd",
        dual_lr: float | None = None,
        multiplier: MultiplierFactory | None = None,
        order: Order = "dual-primal",
        enforce: Enforce = "multipliers",
        at_zero: AtZero = "clear",
        on_nonfinite: OnNonFinite = "ignore",
    ) -> None:
        if not isinstance(base, torch.optim.Optimizer):
            raise ConstraintError(f"base={base!r}: expected a torch optimizer, for example torch.optim.AdamW(...)")
        _refuse_constrained(base)
        options = Options(
            formulation=formulation,
            penalty=penalty,
            penalty_growth=penalty_growth,
            dual=dual,
            dual_lr=dual_lr,
            multiplier=multiplier,
            order=order,
            enforce=enforce,
            at_zero=at_zero,
            on_nonfinite=on_nonfinite,
        )
        self.base = base
        self._building = True  # torch's constructor fills param_groups, which here belong to the base
        super().__init__(base.param_groups, base.defaults)
        self._building = False
        self._engine = Engine(base, constraints, options)

    # --- the wrapped optimizer's own state, never a copy of it ---

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of the base optimizer."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        if not self._building:
            self.base.param_groups = value

    @property
    def state(self) -> Any:
        """State of the base optimizer."""
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        if not self._building:
            self.base.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """Default options of the base optimizer."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        if not self._building:
            self.base.defaults = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the base optimizer."""
        if not self._building:
            self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of all parameters."""
        self.base.zero_grad(set_to_none)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.base!r}, {len(self._engine.names)} constraints, step {self._engine.step})"

    # --- a step ---

    @_with_hooks
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one constrained step; the gradients of the task are in `.grad`, or a closure computes them.

        Args:
            closure: clears the gradients, computes the loss, calls backward and returns the loss; evaluated as often as
                the base optimizer wants.

        Returns:
            The loss of the closure's first evaluation, else None.

        Raises:
            NonFiniteError: with `on_nonfinite="raise"`, if a gradient is not finite; nothing was updated.
        """
        engine = self._engine
        if closure is None:
            if engine.finite():
                engine.before()
                self.base.step()
                engine.after()
            return None
        evaluation = _Evaluation(engine, closure)
        try:
            self.base.step(evaluation)
        except _Skipped:
            return None
        engine.after()
        return evaluation.loss

    # --- reading and saving ---

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """The constraint records, inequalities first; empty after `ce.finalize`."""
        return self._engine.records

    @property
    def multipliers(self) -> Multipliers | None:
        """Multipliers, Cooper problem and dual optimizer; None where only a scale schedule is driven."""
        return self._engine.multipliers

    @property
    def finished_steps(self) -> int:
        """Number of successful steps, the position in all schedules."""
        return self._engine.step

    @property
    def settled(self) -> bool:
        """Whether all levels and scales have reached their end, so that models may be selected and training stopped."""
        return self._engine.levels.settled(self._engine.step)

    @property
    def constraint_state(self) -> "ConstraintState":
        """What `state_dict` holds under `constrained`, as an entry of a distributed checkpoint.

        torch's `get_optimizer_state_dict` keeps parameter groups and their state, and leaves out everything else.
        """
        return ConstraintState(self._engine)

    def readings(self) -> Readings:
        """Return values, levels and multipliers of all constraints as copies on the device."""
        return self._engine.readings()

    def release(self) -> None:
        """Forget all constraints, so that the optimizer steps like its base; `ce.finalize` calls this."""
        self._engine.release()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __deepcopy__(self, memo: dict[int, Any]) -> "ConstrainedOptimizer":
        replica = object.__new__(type(self))
        memo[id(self)] = replica
        own = {key: value for key, value in self.__dict__.items() if key != "step"}  # patched in by a scheduler, bound
        replica.__dict__.update(copy.deepcopy(own, memo))
        return replica

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise SerializationError(
            f"{type(self).__name__} cannot be pickled, for it refers to the model's terms: save "
            "optimizer.state_dict(), or copy with copy.deepcopy((model, optimizer))"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the base optimizer's state and, under `constrained`, multipliers, dual state and schedule position.

        A plain optimizer of the base's class loads it too and ignores the extra key.
        """
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        state: dict[str, Any] = {**self.base.state_dict(), _KEY: self._engine.state_dict()}
        for changed in self._optimizer_state_dict_post_hooks.values():
            state = changed(self, state) or state
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this class, or a plain one of the base's class, which leaves constraints as they are.

        Raises:
            CheckpointError: if the constraints of the checkpoint are others than this optimizer's; nothing was loaded.
        """
        for changed in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = changed(self, state_dict) or state_dict
        own = state_dict.get(_KEY)
        if own is not None:
            self._engine.check_state_dict(own)
        self.base.load_state_dict({key: value for key, value in state_dict.items() if key != _KEY})
        if own is not None:
            self._engine.load_state_dict(own)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)


class ConstraintState:
    """Multipliers, dual state and schedule position, for `torch.distributed.checkpoint`, whose `Stateful` it is.

    They are the same on every process. One opaque entry holds them, because the checkpoint reads into a state of known
    structure, while a dual optimizer makes its state in its first step.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def state_dict(self) -> dict[str, Any]:
        """Return the state as bytes."""
        file = io.BytesIO()
        torch.save(self._engine.state_dict(), file)
        return {"bytes": file.getvalue()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where the state was saved.

        Raises:
            CheckpointError: if the constraints of the checkpoint are others than this optimizer's; nothing was loaded.
        """
        state = torch.load(io.BytesIO(state_dict["bytes"]), map_location="cpu", weights_only=True)
        self._engine.check_state_dict(state)
        self._engine.load_state_dict(state)


class _Skipped(Exception):
    """Leaves a base optimizer's step before it changed anything."""


class _Evaluation:
    """A closure whose gradients and loss are those of the Lagrangian."""

    def __init__(self, engine: Engine, closure: Callable[[], Any]) -> None:
        self.loss: Any = None
        self._engine, self._closure, self._first = engine, closure, True

    def __call__(self) -> Any:
        with torch.enable_grad():
            loss = self._closure()
        if self._first and not self._engine.finite():
            raise _Skipped
        self._engine.before(first=self._first)
        if self._first:
            self.loss = loss.detach() if isinstance(loss, Tensor) else loss
        self._first = False
        return loss if loss is None else loss + self._engine.lagrangian()


class Attached:
    """What `attach` returns: readings and a way out; the optimizer itself keeps its type.

    Attributes:
        optimizer: the optimizer that was given.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, engine: Engine) -> None:
        self.optimizer, self._engine = optimizer, engine
        self._stepping = True
        self._loading: dict[str, Any] | None = None
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._check),
            optimizer.register_load_state_dict_post_hook(self._load),
        ]

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """The constraint records, inequalities first."""
        return self._engine.records

    @property
    def multipliers(self) -> Multipliers | None:
        """Multipliers, Cooper problem and dual optimizer; None where there are none."""
        return self._engine.multipliers

    @property
    def finished_steps(self) -> int:
        """Number of successful steps, the position in all schedules."""
        return self._engine.step

    @property
    def settled(self) -> bool:
        """Whether all levels and scales have reached their end, so that models may be selected and training stopped."""
        return self._engine.levels.settled(self._engine.step)

    @property
    def constraint_state(self) -> ConstraintState:
        """What the optimizer's `state_dict` holds under `constrained`, as an entry of a distributed checkpoint."""
        return ConstraintState(self._engine)

    def readings(self) -> Readings:
        """Return values, levels and multipliers of all constraints as copies on the device."""
        return self._engine.readings()

    def register_step_post_hook(self, hook: Any) -> Any:
        """Register a hook of the optimizer; it runs after the constraints' own."""
        return self.optimizer.register_step_post_hook(hook)

    def detach(self) -> None:
        """Remove the hooks and forget all constraints, so that the optimizer steps as before."""
        for hook in self._hooks:
            hook.remove()
        self._engine.release()

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is not None:
            if self._engine.options.on_nonfinite == "skip":
                raise ConstraintError(
                    "attach(on_nonfinite='skip') met a step with a closure, which no hook can skip: "
                    "expected optimizer.step() without one, or ce.ConstrainedOptimizer around the optimizer"
                )
            return (args[0], _Evaluation(self._engine, closure)), {k: v for k, v in kwargs.items() if k != "closure"}
        self._stepping = self._engine.finite()
        if self._stepping:
            self._engine.before()
        else:
            optimizer.zero_grad(set_to_none=True)  # a step without gradients changes nothing
        return None

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._stepping:
            self._engine.after()
        self._stepping = True

    def _save(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {**state_dict, _KEY: self._engine.state_dict()}

    def _check(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        self._loading = state_dict.get(_KEY)
        if self._loading is not None:
            self._engine.check_state_dict(self._loading)
        return {key: value for key, value in state_dict.items() if key != _KEY}

    def _load(self, optimizer: torch.optim.Optimizer) -> None:
        if self._loading is not None:
            self._engine.load_state_dict(self._loading)
        self._loading = None


def attach(
    optimizer: torch.optim.Optimizer,
    *constraints: Record,
    formulation: FormulationName | type[Any] = "augmented_lagrangian",
    penalty: float = 1.0,
    penalty_growth: float = 1.0,
    dual: DualName | DualFactory = "sgd",
    dual_lr: float | None = None,
    multiplier: MultiplierFactory | None = None,
    order: Order = "dual-primal",
    enforce: Enforce = "multipliers",
    at_zero: AtZero = "clear",
    on_nonfinite: OnNonFinite = "ignore",
) -> Attached:
    """Do what `ConstrainedOptimizer` does by hooks on an optimizer, for frameworks that insist on its type.

    Args:
        optimizer: over a relaxed model's parameters; its steps, state_dict and load_state_dict are extended in place.
        *constraints: as for `ConstrainedOptimizer`, like all options.
        formulation: see there.
        penalty: see there.
        penalty_growth: see there.
        dual: see there.
        dual_lr: see there.
        multiplier: see there.
        order: see there.
        enforce: see there.
        at_zero: see there.
        on_nonfinite: see there; `skip` clears the gradients, and needs an optimizer that is stepped without a closure.

    Returns:
        A handle with `readings()`, `multipliers` and `detach()`; give it to `ce.finalize(optimizer=handle)`, which
        checks the terms against their levels and detaches it.

    Raises:
        ConstraintError: as `ConstrainedOptimizer`, and where the optimizer is one already.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConstraintError(
            f"optimizer={optimizer!r}: expected a torch optimizer, for example torch.optim.AdamW(...)"
        )
    _refuse_constrained(optimizer)
    options = Options(
        formulation=formulation,
        penalty=penalty,
        penalty_growth=penalty_growth,
        dual=dual,
        dual_lr=dual_lr,
        multiplier=multiplier,
        order=order,
        enforce=enforce,
        at_zero=at_zero,
        on_nonfinite=on_nonfinite,
    )
    attached = Attached(optimizer, Engine(optimizer, constraints, options))
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return attached


def _refuse_constrained(optimizer: torch.optim.Optimizer) -> None:
    """Two sets of constraints on one optimizer would be saved under one key."""
    hooks = [getattr(hook, "__self__", None) for hook in optimizer._optimizer_step_pre_hooks.values()]
    if isinstance(optimizer, ConstrainedOptimizer) or any(isinstance(owner, Attached) for owner in hooks):
        raise ConstraintError(
            f"{type(optimizer).__name__} has constraints already: pass all records at once, as in "
            "ce.ConstrainedOptimizer(base, first, second)"
        )
