"""The type that per-sample gradients are held in, whatever the type of a model's weights.

Rows of 16-bit weights are formed and handed over in float32. Products of two 16-bit numbers are
exact there, so that a row has the rounding of the model's own activations and gradients and nothing
more. In float16 most of them would vanish once the loss scale is undone (it holds nothing below
6e-8), and bfloat16, which has the range, would round every entry to eight bits once more.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_dtype(parameter: Tensor) -> torch.dtype:
    """Return the type of a parameter's rows: float32, or float64 for float64 weights."""
    return torch.promote_types(parameter.dtype, torch.float32)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return a 16-bit tensor as float32; any other as it is."""
    return tensor.to(row_dtype(tensor))
