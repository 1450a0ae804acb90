"""Every exception and warning that fastsal raises on purpose.

One tree: catch `FastsalError` for all of them, or the built-in type that fits
(`ValueError`, `KeyError`, ...). A message names the argument, what came and what is taken.
"""

from __future__ import annotations


class FastsalError(Exception):
    """Base of every error that fastsal raises on purpose."""


class InvalidArgument(FastsalError, ValueError):
    """An argument is outside what is taken."""


class UnknownParameter(InvalidArgument, KeyError):
    """A parameter name or pattern matches nothing."""

    def __str__(self) -> str:  # KeyError would print the message in quotes
        return str(self.args[0]) if self.args else ""


class DataError(InvalidArgument):
    """Images or labels cannot be used: unreadable, out of range, too few."""


class NonFiniteGradient(FastsalError, ArithmeticError, ValueError):
    """A per-sample gradient holds NaN or infinity; nothing was accumulated."""


class NonFiniteLoss(FastsalError, ArithmeticError, ValueError):
    """Training gave a loss or a weight that is NaN or infinite; the model is as it was."""


class UnsupportedLayer(FastsalError, TypeError):
    """The per-sample gradient of a weight cannot be formed; the message says which and why."""


class FactorizationError(FastsalError, ArithmeticError):
    """A damped Fisher block is not positive definite in float64."""


class MaskError(InvalidArgument):
    """A mask does not belong to the model, or a model breaks its mask."""


class FileFormatError(InvalidArgument):
    """A file is truncated, tampered with, or of another kind or version."""


class PrecisionWarning(UserWarning):
    """The stated error bound of a score may pass one per cent."""
