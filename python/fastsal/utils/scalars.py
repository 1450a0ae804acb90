"""Numbers that users pass: of Python, NumPy or PyTorch, but no booleans."""

from __future__ import annotations

import math
import numbers
import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_integer(value: Any) -> int | None:
    """Return an integer of Python, NumPy or PyTorch as an `int`; None if it is not one."""
    if _is_boolean(value):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def as_real(value: Any) -> float | None:
    """Return a finite real number of Python, NumPy or PyTorch as a `float`; None if it is not one.

    Tensors and arrays must have no axes.
    """
    if _is_boolean(value):
        return None
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, numbers.Real):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def _is_boolean(value: Any) -> bool:
    kinds = (np.bool_, torch.bool)
    return isinstance(value, (bool, np.bool_)) or getattr(value, "dtype", None) in kinds
