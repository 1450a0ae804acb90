"""The dtype of per-sample gradients.

Rows of 16-bit weights are computed in float32. Products of two 16-bit numbers are exact there, so
that the only rounding is that of the model's own activations and gradients. In float16 most rows
would underflow after unscaling (below 6e-8), and bfloat16 would round every entry to eight bits
once more.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_dtype(parameter: Tensor) -> torch.dtype:
    """Return the dtype of the rows of a parameter: float32, or float64 for float64 weights."""
    return torch.promote_types(parameter.dtype, torch.float32)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Convert a 16-bit tensor to float32; return any other tensor as it is."""
    return tensor.to(row_dtype(tensor))
