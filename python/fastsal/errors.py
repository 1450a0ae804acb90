"""The exceptions and warnings of fastsal.

All exceptions derive from `FastsalError` and, where one fits, from a built-in exception such as
`ValueError` or `KeyError`. A message names the argument, its valid values and the value it got.
"""

from __future__ import annotations


class FastsalError(Exception):
    """Base class of the exceptions of fastsal."""


class InvalidArgument(FastsalError, ValueError):
    """The value of an argument is invalid."""


class UnknownParameter(InvalidArgument, KeyError):
    """A parameter name or pattern matches no parameter."""

    def __str__(self) -> str:  # KeyError quotes the message
        return str(self.args[0]) if self.args else ""


class DataError(InvalidArgument):
    """Images or labels are unreadable, out of range or too few."""


class NonFiniteGradient(FastsalError, ArithmeticError, ValueError):
    """A per-sample loss or gradient is NaN or infinite; statistics are unchanged."""


class GradientOverflow(NonFiniteGradient, DataError):
    """Gradients are finite, but the sums of their squares overflow; statistics are unchanged."""


class NonFiniteLoss(FastsalError, ArithmeticError, ValueError):
    """A loss or a weight became NaN or infinite during training; the model is restored."""


class UnsupportedLayer(FastsalError, TypeError):
    """The per-sample gradient of a weight cannot be computed."""


class FactorizationError(FastsalError, ArithmeticError):
    """A damped Fisher block is not positive definite in float64."""


class MaskError(InvalidArgument):
    """A mask does not fit the model, or a pruned weight is not zero."""


class FileFormatError(InvalidArgument):
    """A file is truncated, modified, or of another format or version."""


class PrecisionWarning(UserWarning):
    """The bound on the rounding error of a score exceeds one percent."""
