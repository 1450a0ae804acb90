"""Validation of numeric arguments: Python numbers, and NumPy and PyTorch scalars."""

from __future__ import annotations

import math
import operator
from typing import Any

from fastsal.errors import InvalidArgument

# Seeds that a generator of PyTorch accepts: least and most.
SEEDS = (-(2**63), 2**64 - 1)


def whole(name: str, value: Any, least: int | None = 0, most: int | None = None) -> int:
    """Return an integer argument as an `int`.

    Args:
        name: Name of the argument, for the message.
        value: An `int`, or an integer scalar of NumPy or PyTorch. `bool` is rejected.
        least: Smallest valid value; None for no lower bound.
        most: Largest valid value; None for no upper bound.

    Raises:
        InvalidArgument: `value` is not an integer, or is out of range.
    """
    number = as_integer(value)
    if number is None:
        raise InvalidArgument(f"{name} must be an integer, got {value!r:.80}")
    if (least is not None and number < least) or (most is not None and number > most):
        raise InvalidArgument(f"{name} must be {_range(least, None, most, None)}, got {number}")
    return number


def real(
    name: str,
    value: Any,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> float:
    """Return a finite real argument as a `float`.

    Args:
        name: Name of the argument, for the message.
        value: An `int` or `float`, or a real scalar of NumPy or PyTorch. `bool` is rejected.
        least: Smallest valid value.
        above: Exclusive lower bound, instead of `least`.
        most: Largest valid value.
        below: Exclusive upper bound, instead of `most`.

    Raises:
        InvalidArgument: `value` is not a number, is NaN or infinite, or is out of range.
    """
    number = _as_float(value)
    if number is None:
        raise InvalidArgument(f"{name} must be a number, got {value!r:.80}")
    is_valid = (
        math.isfinite(number)
        and (least is None or number >= least)
        and (above is None or number > above)
        and (most is None or number <= most)
        and (below is None or number < below)
    )
    if not is_valid:
        raise InvalidArgument(f"{name} must be {_range(least, above, most, below)}, got {value!r}")
    return number


def as_integer(value: Any) -> int | None:
    """Return an integer scalar of Python, NumPy or PyTorch as an `int`; None for anything else."""
    if not _is_scalar(value):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def as_real(value: Any) -> float | None:
    """Return a finite real scalar of Python, NumPy or PyTorch as a `float`; None otherwise."""
    number = _as_float(value)
    return number if number is not None and math.isfinite(number) else None


def _as_float(value: Any) -> float | None:
    if not _is_scalar(value) or isinstance(value, (str, bytes, bytearray)):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return None


def _is_scalar(value: Any) -> bool:
    """Whether a value may be one number, judged without importing NumPy or PyTorch."""
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return False
    return getattr(value, "ndim", 0) == 0


def _range(
    least: float | None, above: float | None, most: float | None, below: float | None
) -> str:
    low, high = least if above is None else above, most if below is None else below
    if low is None and high is None:
        return "finite"
    if low is None:
        return f"at most {high:.15g}" if below is None else f"less than {high:.15g}"
    if high is None:
        if above is None:
            return f"at least {low:.15g}"
        return "positive" if low == 0 else f"greater than {low:.15g}"
    return (
        f"in {'[' if above is None else '('}{low:.15g}, {high:.15g}{']' if below is None else ')'}"
    )
