"""Streaming of rows from a device to sums in main memory, in parallel with the backward pass.

There are two buffers, pinned with CUDA: the device copies into one while a thread adds the other to
the sums. The core releases the interpreter's lock, so that the backward pass does not wait.
"""

from __future__ import annotations

import math
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from fastsal.fisher.model_sums import ModelSums

_BUFFERS = 2


class RowStream:
    """A sink that copies rows to main memory and adds them there.

    Args:
        sums: The sums that rows are added to.
        device: The device that rows are on.
        expected: Total number of samples, if known.
        dtype: Type that rows are copied in; None keeps theirs. bfloat16 halves the traffic and
            rounds each gradient to eight bits, which changes sums of many samples little.
    """

    def __init__(
        self,
        sums: ModelSums,
        device: torch.device,
        *,
        expected: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._sums = sums
        self._expected = expected
        self._dtype = dtype
        self._device, self._is_cuda = device, device.type == "cuda"
        self._buffers: list[Tensor | None] = [None] * _BUFFERS
        self._pending: list[Future[None] | None] = [None] * _BUFFERS
        self._turn = 0
        # One thread: parameters are added in the order in which they arrive.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="fastsal-rows")

    def expect(self, samples: int) -> None:
        """Announce that at least `samples` samples come in total."""
        self._expected = max(samples, self._expected or 0)

    def __call__(self, name: str, rows: Tensor) -> None:
        """Copy rows `[n, *shape]`; they are added in the background."""
        turn = self._turn
        self._turn = (turn + 1) % _BUFFERS
        self._wait(turn)
        target = self._buffer(turn, rows)
        target.copy_(rows, non_blocking=self._is_cuda)
        arrived = None
        if self._is_cuda:
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            # That of the rows' device, which need not be the current one.
            arrived.record(torch.cuda.current_stream(self._device))
        self._pending[turn] = self._worker.submit(self._add, name, target, arrived)

    def _add(self, name: str, rows: Tensor, arrived: torch.cuda.Event | None) -> None:
        if arrived is not None:
            arrived.synchronize()
        self._sums.add(name, rows, self._expected)

    def _buffer(self, turn: int, rows: Tensor) -> Tensor:
        dtype = self._dtype or rows.dtype
        size = math.prod(rows.shape) * dtype.itemsize
        buffer = self._buffers[turn]
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=self._is_cuda)
            self._buffers[turn] = buffer
        return buffer[:size].view(dtype).view(rows.shape)

    def end_micro_batch(self, n: int) -> None:
        """Wait for pending rows, then count `n` samples.

        Raises:
            NonFiniteGradient: NaN or infinity; names parameter and sample.
        """
        self._drain()
        self._sums.count(n)

    def flush(self) -> None:
        """Wait for pending rows and end the thread."""
        self._drain()
        self._worker.shutdown()

    def _drain(self) -> None:
        for turn in range(_BUFFERS):
            self._wait(turn)

    def _wait(self, turn: int) -> None:
        pending, self._pending[turn] = self._pending[turn], None
        if pending is not None:
            pending.result()
