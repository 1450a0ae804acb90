"""Rows: the gradients of samples, flattened for the compiled core.

Axes: n samples, d weights of a parameter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]

_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


def is_supported(dtype: torch.dtype) -> bool:
    """Tell whether gradients of this type can be summed."""
    return dtype in _DTYPES


def as_rows(gradients: Tensor) -> tuple[Array, str]:
    """Return gradients `[n, ...]` as an array `[n, d]` on the CPU, with the name of its type.

    A contiguous CPU tensor is not copied. NumPy has no bfloat16: 16-bit types are passed as uint16.
    """
    rows = flat_rows(gradients.detach().cpu())
    if rows.shape[1] > 1 and rows.stride(1) != 1:
        rows = rows.contiguous()
    name = _DTYPES[rows.dtype]
    if rows.element_size() == 2:
        rows = rows.view(torch.uint16)
    return rows.numpy(), name


def flat_rows(gradients: Tensor) -> Tensor:
    """Flatten gradients `[n, ...]` to `[n, d]`; a parameter without axes has one weight."""
    return gradients.flatten(1) if gradients.dim() > 1 else gradients[:, None]


def converted_rows(rows: Array, dtype: str, to: np.dtype[Any]) -> Array:
    """Return a copy of rows `[n, d]`, as `as_rows` returns them, in float32 or float64."""
    # In row order: the core rejects the strides of an expanded tensor, which would be kept.
    if dtype == "bfloat16":
        return (rows.astype(np.uint32, order="C") << 16).view(np.float32).astype(to)
    if dtype == "float16":
        return rows.view(np.float16).astype(to, order="C")
    return rows.astype(to, order="C")


def widened(values: Array) -> Array:
    """Return bfloat16 numbers, stored as uint16, in float32; return other arrays unchanged."""
    if values.dtype != np.uint16:
        return values
    wide: Array = (values.astype(np.uint32) << 16).view(np.float32)
    return wide
