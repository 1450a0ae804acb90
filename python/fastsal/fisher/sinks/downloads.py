"""Copies from a GPU to main memory.

A plain copy goes through a buffer of the driver and touches new memory page by page, on one thread:
1.3 GB/s of sums on a GPU whose link has 51. Here two pinned buffers take turns: while the link
fills one, all threads of PyTorch empty the other into the new memory.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CHUNK = 2**24  # float32 numbers of a buffer


class Downloads:
    """Copies float32 vectors of one device into arrays.

    Args:
        device: Any device; other than on CUDA, copies are plain.
        chunk: Largest number of elements of a piece.
    """

    def __init__(self, device: torch.device, chunk: int = CHUNK) -> None:
        self._is_pinned = device.type == "cuda"
        self.chunk = chunk
        self._buffers: list[Tensor] = []

    def array(self, pieces: Iterable[Tensor], length: int) -> NDArray[np.float32]:
        """Return one array of all pieces.

        Args:
            pieces: Vectors of at most `chunk` elements on the device, in order; each is made when
                its turn comes.
            length: Number of their elements.
        """
        out = np.empty(length, np.float32)  # NumPy asks for huge pages, PyTorch does not
        target = torch.from_numpy(out)
        start = 0
        waiting: list[tuple[Tensor, Tensor, torch.cuda.Event]] = []
        for turn, piece in enumerate(pieces):
            place = target[start : start + len(piece)]
            start += len(piece)
            if not self._is_pinned:
                place.copy_(piece)
                continue
            buffer = self._buffer(turn % 2)[: len(piece)]
            buffer.copy_(piece, non_blocking=True)
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record(torch.cuda.current_stream(piece.device))
            _empty(waiting)
            waiting.append((place, buffer, copied))
        _empty(waiting)
        return out

    def _buffer(self, number: int) -> Tensor:
        if number == len(self._buffers):
            try:
                buffer = torch.empty(self.chunk, dtype=torch.float32, device="cpu", pin_memory=True)
            except RuntimeError:  # the system allows no more locked memory: slower, not wrong
                buffer = torch.empty(self.chunk, dtype=torch.float32, device="cpu")
            self._buffers.append(buffer)
        return self._buffers[number]


def _empty(waiting: list[tuple[Tensor, Tensor, torch.cuda.Event]]) -> None:
    """Move buffers that the device has filled to their places."""
    for place, buffer, copied in waiting:
        copied.synchronize()
        place.copy_(buffer)
    waiting.clear()
