"""Choice of the number of samples of one forward and backward pass."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from fastsal.gradients.precision import row_dtype

# Limit for the rows of the largest parameter of one micro-batch.
_ROW_BYTES = 128 * 2**20
# The same on a GPU, as a fraction of its memory: an addition there reads and writes squares of
# `4 B` bytes a weight, however few the rows are.
_GPU_SHARE = 1 / 128
_LARGEST = 64


def choose_micro_batch(parameters: Mapping[str, nn.Parameter]) -> int:
    """Return the largest power of two for which the rows of every parameter fit in memory."""
    largest = max(p.numel() * row_dtype(p).itemsize for p in parameters.values())
    room = _row_bytes(next(iter(parameters.values())).device)
    most = max(1, min(_LARGEST, room // max(1, largest)))
    return int(2 ** math.floor(math.log2(most)))


def _row_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return _ROW_BYTES
    memory: int = torch.cuda.get_device_properties(device).total_memory
    return max(_ROW_BYTES, int(_GPU_SHARE * memory))
