"""Errors of the library.

What enters: nothing. What leaves: one base class and its children, raised by every other file.
Law: each error is also a builtin, so code that catches `ValueError` or `AssertionError` keeps working, and every
message names what was found, what was expected and the line to write instead.
"""


class ConstrainedEquivError(Exception):
    """Base class of all errors raised on purpose by this library."""


class ScheduleError(ConstrainedEquivError, ValueError):
    """A schedule is ill-defined or returned a value that is not a finite number."""


class RepresentationError(ConstrainedEquivError, ValueError):
    """A group or representation is ill-defined, unknown, or does not fit a tensor."""


class RelaxationError(ConstrainedEquivError, ValueError):
    """A layer cannot be relaxed, is relaxed already, or no layer was matched."""


class SerializationError(ConstrainedEquivError, TypeError):
    """A relaxed module was pickled; `state_dict` and `copy.deepcopy` are the supported ways."""


class ConstraintError(ConstrainedEquivError, ValueError):
    """A constraint is ill-defined or does not fit the optimizer."""


class CheckpointError(ConstrainedEquivError, ValueError):
    """A checkpoint does not belong to this optimizer or model; nothing was loaded."""


class NonFiniteError(ConstrainedEquivError, FloatingPointError):
    """A gradient, a loss or a violation is not finite; nothing was updated."""


class ViolationError(ConstrainedEquivError, RuntimeError):
    """A term is larger than its final level allows; nothing was removed."""


class EquivarianceError(ConstrainedEquivError, AssertionError):
    """A model is not equivariant within the tolerance."""
