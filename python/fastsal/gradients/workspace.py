"""Scratch memory reused between layers and batches, as new pages cost more than the sums."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

_ALIGNMENT = 64


def empty_pages(size: int, dtype: torch.dtype) -> Tensor:
    """Return uninitialized CPU memory of `size` elements, in huge pages if available.

    NumPy requests huge pages, PyTorch does not; the first access is three times faster with them.
    """
    nbytes = size * dtype.itemsize
    raw = np.empty(nbytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return torch.from_numpy(raw[start : start + nbytes]).view(dtype)


class Workspace:
    """One growing buffer per purpose, device and dtype; a request overwrites the previous one."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def take(
        self,
        purpose: str,
        shape: Sequence[int],
        like: Tensor,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Return an uninitialized contiguous tensor.

        Args:
            purpose: Name of the buffer; a later request for it overwrites this one.
            shape: Shape of the tensor.
            like: Tensor whose device is used.
            dtype: Type of the tensor; None for that of `like`.
        """
        size = math.prod(shape)
        dtype = dtype or like.dtype
        key = (purpose, like.device, dtype)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            # Free the old buffer before a larger one is allocated.
            self._buffers.pop(key, None)
            buffer = None
            # A buffer made under inference_mode could not be written to outside of it.
            with torch.inference_mode(False):
                if like.device.type == "cpu":
                    buffer = empty_pages(size, dtype)
                else:
                    buffer = torch.empty(size, device=like.device, dtype=dtype)
            self._buffers[key] = buffer
        return buffer[:size].view(tuple(shape))

    @property
    def nbytes(self) -> int:
        """Size of all buffers in bytes."""
        return sum(b.numel() * b.element_size() for b in self._buffers.values())

    def clear(self) -> None:
        """Free all buffers."""
        self._buffers.clear()
