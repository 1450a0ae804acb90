"""Bytes as people write and read them."""

from __future__ import annotations

import math

from fastsal.errors import InvalidArgument
from fastsal.utils.numbers import as_real


def parse_bytes(value: int | str, name: str = "memory_budget") -> int:
    """Bytes of a number, or of text as `"8GiB"` and `"500 MB"`.

    Raises:
        InvalidArgument: It is neither.
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
    raise InvalidArgument(f"{name}: got {value!r}; takes bytes, or text as '8GiB' and '500MB'")


def gib(nbytes: float) -> str:
    """Bytes for a reader."""
    if nbytes < 2**20:
        return f"{nbytes / 2**10:.0f} KiB"
    if nbytes < 2**30:
        return f"{nbytes / 2**20:.0f} MiB"
    return f"{nbytes / 2**30:.1f} GiB"
