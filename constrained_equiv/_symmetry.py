"""Symmetry: a group together with its action on what a model takes and gives.

What enters: a group and one action per input and output. What leaves: `Symmetry`, used by every check.
Law: a model f is equivariant when f(inputs moved by g) = f(inputs) moved by g for every g.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from constrained_equiv.errors import RepresentationError
from constrained_equiv.groups import Group
from constrained_equiv.representations import Representation, as_representation


@dataclass(frozen=True)
class Symmetry:
    """A group and how it acts on inputs and outputs.

    An action is a Representation or irreps string (acts on the last axis), a function `(element, tensor) -> tensor`
    (see `ce.actions`), or None (invariant). Several inputs or outputs are described by a tuple, list or dict of actions
    of the same structure.

    Attributes:
        group: the group.
        inputs: the action on the model's input; a tuple where the model takes several arguments.
        outputs: the action on what the model returns.

    Raises:
        RepresentationError: if an action cannot be read.

    Example:
        >>> from constrained_equiv import groups
        >>> energy = Symmetry(groups.O3(), inputs="1x1o", outputs="1x0e")
    """

    group: Group
    inputs: Any
    outputs: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", _read(self.inputs, self.group))
        object.__setattr__(self, "outputs", _read(self.outputs, self.group))

    def move_inputs(self, element: Tensor, inputs: Any) -> Any:
        """Return the inputs moved by one group element (d, d)."""
        return _move(self.inputs, element, inputs, "inputs")

    def move_outputs(self, element: Tensor, outputs: Any) -> Any:
        """Return the outputs moved by one group element (d, d)."""
        return _move(self.outputs, element, outputs, "outputs")


def _read(action: Any, group: Group) -> Any:
    if isinstance(action, dict):
        return {key: _read(part, group) for key, part in action.items()}
    if isinstance(action, list) or type(action) is tuple:  # e3nn's Irreps is a subclass of tuple
        return type(action)(_read(part, group) for part in action)
    if action is None or (callable(action) and not isinstance(action, Representation)):
        return action
    return as_representation(action, group=group)


def _move(action: Any, element: Tensor, value: Any, where: str) -> Any:
    if action is None:
        return value
    if isinstance(action, Representation):
        if not isinstance(value, Tensor):
            raise RepresentationError(
                f"{where}: {action} acts on a tensor, found {type(value).__name__}; describe a structure by a tuple, "
                "list or dict of actions"
            )
        return action.act(element, value)
    if callable(action):
        return action(element, value)
    if isinstance(action, dict):
        if not isinstance(value, dict) or value.keys() != action.keys():
            raise RepresentationError(
                f"{where}: expected a dict with keys {sorted(map(str, action))}, found "
                f"{sorted(map(str, value)) if isinstance(value, dict) else type(value).__name__}"
            )
        return {key: _move(action[key], element, value[key], f"{where}[{key!r}]") for key in value}
    if not isinstance(value, tuple | list) or len(value) != len(action):
        found = f"{len(value)} parts" if isinstance(value, tuple | list) else type(value).__name__
        raise RepresentationError(f"{where}: expected {len(action)} parts, one per action, found {found}")
    parts = [_move(a, element, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(action, value, strict=True))]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)  # a named tuple takes its parts
