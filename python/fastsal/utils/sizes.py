"""Sizes in bytes: parsing and formatting."""

from __future__ import annotations

import math

from fastsal.errors import InvalidArgument
from fastsal.utils.numbers import as_real


def parse_bytes(value: int | str, name: str = "memory_budget") -> int:
    """Return a number of bytes.

    Args:
        value: A positive number, or a text such as "8GiB" or "500 MB".
        name: Name of the argument, for the message.

    Raises:
        InvalidArgument: The value is neither.
    """
    units = {"": 1, "K": 10, "M": 20, "G": 30, "T": 40}
    number = as_real(value)
    if number is not None and number > 0:
        return int(number)
    if isinstance(value, str):
        text = value.strip().upper().replace(" ", "")
        is_decimal = text.endswith("B") and not text.endswith("IB")
        digits = text.removesuffix("B").removesuffix("I")
        unit = digits[-1:] if digits[-1:] in units and digits[-1:] else ""
        try:
            amount = float(digits.removesuffix(unit))
        except ValueError:
            amount = math.nan
        if amount > 0:
            size = 10 ** (3 * units[unit] // 10) if is_decimal and unit else 2 ** units[unit]
            return int(amount * (size if unit else 1))
    raise InvalidArgument(
        f"{name} must be a positive number of bytes, or a text such as '8GiB', got {value!r:.80}"
    )


def gib(nbytes: float) -> str:
    """Format a number of bytes in KiB, MiB, GiB or TiB."""
    if nbytes < 2**20:
        return f"{nbytes / 2**10:.0f} KiB"
    if nbytes < 2**30:
        return f"{nbytes / 2**20:.0f} MiB"
    if nbytes < 2**40:
        return f"{nbytes / 2**30:.1f} GiB"
    return f"{nbytes / 2**40:.1f} TiB"
