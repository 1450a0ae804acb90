"""Scratch memory that is kept between layers and batches: fresh pages cost more than the sums."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64


def empty_pages(size: int, dtype: torch.dtype) -> Tensor:
    """Return uninitialised CPU memory of `size` elements, in huge pages where the system has them.

    NumPy asks for huge pages, PyTorch does not: fresh memory is then touched three times faster.
    """
    nbytes = size * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return torch.from_numpy(raw[start : start + nbytes]).view(dtype)


class Workspace:
    """One growing buffer per purpose, device and dtype; a new request overwrites the last one."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def take(
        self,
        purpose: str,
        shape: Sequence[int],
        like: Tensor,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Return an uninitialised contiguous tensor of this shape, on the device of `like`.

        Its type is `dtype`, or that of `like`.
        """
        size = math.prod(shape)
        dtype = dtype or like.dtype
        key = (purpose, like.device, dtype)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            # Free the old buffer before the larger one is made.
            self._buffers.pop(key, None)
            buffer = None
            if like.device.type == "cpu":
                buffer = empty_pages(size, dtype)
            else:
                buffer = torch.empty(size, device=like.device, dtype=dtype)
            self._buffers[key] = buffer
        return buffer[:size].view(tuple(shape))

    @property
    def nbytes(self) -> int:
        """Memory of all buffers."""
        return sum(b.numel() * b.element_size() for b in self._buffers.values())

    def clear(self) -> None:
        """Give the memory back."""
        self._buffers.clear()
