"""Gathering of the rows of several micro-batches, which are added to the sums at once.

An addition reads and writes `4 (B + 1)` bytes a weight, whatever the number of rows; with blocks of
64 and micro-batches of 8 that is eight times the size of the rows.

Of a layer with few positions and many weights, such as the last ones of a ResNet, the inputs and
output gradients of a sample are much smaller than its row. They are kept in its place, and the rows
are computed when they are added, in memory that all such layers share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastsal.fisher.model_sums import ModelSums
from fastsal.gradients.precision import row_dtype
from fastsal.gradients.workspace import empty_pages

Fill = Callable[[Tensor], None]

# Gathering more rows saves little: the kernel adds 64 at a time.
_MOST_ROWS = 32
_MOST_BYTES = 5 * 2**29
# Calls are kept instead of rows where they are at most this fraction of their size.
_SMALL_CALL = 0.5
# Largest size of gathered rows, as a fraction of the size of the statistics.
_SHARE = 0.75
# The number of samples expected where more come than one step. If it is not known how many, sums
# would keep a copy of the rows of the first step, and soon add them to blocks all the same.
MANY = 2**62


def step_rows(
    parameters: Mapping[str, nn.Parameter],
    statistics: int,
    micro_batch: int,
    expected: int | None = None,
) -> int:
    """Choose the number of samples that are added to the sums at once, a multiple of `micro_batch`.

    The rounding of sums depends on it. It is chosen from the model alone, not from the available
    memory, so that sums within a memory budget equal those without one.

    Args:
        parameters: Name to parameter, of the whole model.
        statistics: Memory of their packed blocks and sums, in bytes.
        micro_batch: Samples of one pass without a memory budget.
        expected: Total number of samples, if known.
    """
    row = sum(p.numel() * row_dtype(p).itemsize for p in parameters.values())
    most = min(_MOST_BYTES, int(_SHARE * statistics))
    rows = min(_MOST_ROWS, most // max(1, row), expected or _MOST_ROWS)
    return max(1, rows // micro_batch) * micro_batch


class RowGatherer:
    """Gathers rows in buffers that the gradient engine writes to.

    Args:
        sums: The sums that rows are added to.
        dtypes: Name to the type of its rows.
        step: Rows that are added at a time; no micro-batch may span two steps.
        expected: Total number of samples, if known.
    """

    def __init__(
        self,
        sums: ModelSums,
        dtypes: Mapping[str, torch.dtype],
        step: int,
        *,
        expected: int | None = None,
    ) -> None:
        self._sums = sums
        self._dtypes = dtypes
        self._step = step
        self._expected = expected
        self._is_total = expected is not None
        self._held = 0
        self._buffers: dict[str, Tensor] = {}
        # Name to rows, shape of the parameter and function, of the calls that are kept.
        self._calls: dict[str, list[tuple[slice, tuple[int, ...], Fill]]] = {}
        # Its buffer serves all parameters whose calls are kept, one after the other.
        self._largest = max(sums.parameters, key=self._row_bytes, default="")

    def expect(self, samples: int) -> None:
        """Announce that at least `samples` samples come in total."""
        self._expected = max(samples, self._expected or 0)

    def room(self, name: str, shape: Sequence[int]) -> Tensor | None:
        """Return a buffer `[n, *shape]` for the next rows of a parameter; None for a whole step."""
        if self._is_whole_step(shape[0]):
            return None  # added at once
        buffer = self._buffers.get(name)
        if buffer is None:
            whole = (self._step, *shape[1:])
            buffer = empty_pages(math.prod(whole), self._dtypes[name]).view(whole)
            self._buffers[name] = buffer
        return buffer[self._held : self._held + shape[0]]

    def defers(self, name: str, shape: Sequence[int], nbytes: int) -> bool:
        """Return whether to keep a call of `nbytes` instead of the rows `[n, *shape]`."""
        dtype = self._dtypes[name]
        is_small = nbytes <= _SMALL_CALL * math.prod(shape) * dtype.itemsize
        has_room = name != self._largest and dtype == self._dtypes[self._largest]
        return is_small and has_room and not self._is_whole_step(shape[0])

    def defer(self, name: str, shape: Sequence[int], fill: Fill) -> None:
        """Receive the function that writes the next rows `[n, *shape]` of a parameter."""
        rows = slice(self._held, self._held + shape[0])
        self._calls.setdefault(name, []).append((rows, tuple(shape[1:]), fill))

    def _is_whole_step(self, n: int) -> bool:
        """Return whether the next `n` rows are a step; add those of a step that is full before."""
        if self._held >= self._step:
            self._add(MANY)
        return self._held == 0 and n >= self._step

    def _row_bytes(self, name: str) -> int:
        return self._sums.parameters[name].d * self._dtypes[name].itemsize

    def __call__(self, name: str, rows: Tensor) -> None:
        """Receive the rows `[n, *shape]` of a parameter, once a micro-batch."""
        slot = self.room(name, rows.shape)
        if slot is None:
            self._sums.add(name, rows, self._expected)
        elif slot.data_ptr() != rows.data_ptr():
            slot.copy_(rows)

    def end_micro_batch(self, n: int) -> None:
        """Count `n` samples, of which every parameter has received its rows."""
        if self._held == 0 and n >= self._step:
            self._sums.count(n)
            return
        self._held += n
        # If the total is unknown, a whole step waits until more rows come.
        if self._held >= self._step and self._is_total:
            self.flush()

    def flush(self) -> None:
        """Add the gathered rows to the sums."""
        self._add(self._expected)

    def _add(self, expected: int | None) -> None:
        if self._held == 0:
            return
        for name, buffer in self._buffers.items():
            self._sums.add(name, self._filled(name, buffer), expected)
        for name, calls in list(self._calls.items()):
            whole = (self._step, *calls[0][1])
            shared = self._buffers[self._largest].view(-1)[: math.prod(whole)].view(whole)
            self._sums.add(name, self._filled(name, shared), expected)
        self._sums.count(self._held)
        self._held = 0

    def _filled(self, name: str, buffer: Tensor) -> Tensor:
        """Return the gathered rows, after computing those of which the calls were kept."""
        for rows, _, fill in self._calls.pop(name, ()):
            fill(buffer[rows])
        return buffer[: self._held]
