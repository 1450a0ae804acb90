"""Rows from a device to the core in main memory, while the device goes on.

Two buffers a size, pinned where there is CUDA: the device copies into one while the core adds the
other on a thread of its own. The core releases the interpreter's lock, so that the backward pass is
not held up.
"""

from __future__ import annotations

import math
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from fastsal.fisher.block_fisher import BlockFisher

_BUFFERS = 2


class RowStream:
    """A sink that copies rows to main memory and adds them there.

    Args:
        fisher: What the rows are added to.
        device: Where rows come from.
        expected: Samples to come in all, if known.
        dtype: What rows travel as; None keeps theirs. bfloat16 halves the traffic and rounds each
            gradient to eight bits, which moves sums of many samples little.
    """

    def __init__(
        self,
        fisher: BlockFisher,
        device: torch.device,
        *,
        expected: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._fisher = fisher
        self._expected = expected
        self._dtype = dtype
        self._is_cuda = device.type == "cuda"
        self._buffers: list[Tensor | None] = [None] * _BUFFERS
        self._pending: list[Future[None] | None] = [None] * _BUFFERS
        self._turn = 0
        # One thread: parameters are added in the order they came.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="fastsal-rows")

    def expect(self, samples: int) -> None:
        """At least so many samples come in all."""
        self._expected = max(samples, self._expected or 0)

    def __call__(self, name: str, rows: Tensor) -> None:
        """Copy rows `[n, *shape]`; they are added while the caller goes on."""
        turn = self._turn
        self._turn = (turn + 1) % _BUFFERS
        self._wait(turn)
        target = self._buffer(turn, rows)
        target.copy_(rows, non_blocking=self._is_cuda)
        arrived = None
        if self._is_cuda:
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record()
        self._pending[turn] = self._worker.submit(self._add, name, target, arrived)

    def _add(self, name: str, rows: Tensor, arrived: torch.cuda.Event | None) -> None:
        if arrived is not None:
            arrived.synchronize()
        self._fisher._add(name, rows, self._expected)

    def _buffer(self, turn: int, rows: Tensor) -> Tensor:
        dtype = self._dtype or rows.dtype
        size = math.prod(rows.shape) * dtype.itemsize
        buffer = self._buffers[turn]
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=torch.uint8, pin_memory=self._is_cuda)
            self._buffers[turn] = buffer
        return buffer[:size].view(dtype).view(rows.shape)

    def end_micro_batch(self, n: int) -> None:
        """Wait for the core, then count samples.

        Raises:
            NonFiniteGradient: NaN or infinity; names parameter and sample.
        """
        self._drain()
        self._fisher._count(n)

    def flush(self) -> None:
        """Wait for the core and end its thread."""
        self._drain()
        self._worker.shutdown()

    def _drain(self) -> None:
        for turn in range(_BUFFERS):
            self._wait(turn)

    def _wait(self, turn: int) -> None:
        pending, self._pending[turn] = self._pending[turn], None
        if pending is not None:
            pending.result()
