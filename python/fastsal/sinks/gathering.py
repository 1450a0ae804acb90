"""Rows of several micro-batches, gathered before the statistics are read and written once.

A pass over the statistics moves `4 (B + 1)` bytes a weight, whatever the number of rows that it
adds; with blocks of 64 and micro-batches of 8 that is eight times the rows themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from fastsal.fisher import BlockFisher
from fastsal.gradients.precision import row_dtype
from fastsal.gradients.workspace import empty_pages

# More rows a pass save little: the kernel adds 64 at a time.
_MOST_ROWS = 32
_MOST_BYTES = 5 * 2**29
# Of the statistics' own size.
_SHARE = 0.75


class RowGatherer:
    """Where the gradient engine puts its rows: a sink that lends the memory they are written to.

    Args:
        fisher: What the rows are added to.
        parameters: Name to parameter.
        micro_batch: The most rows that come at a time.
        expected: Samples to come in all, if known.
        spare: Bytes that the buffers may take besides the rules above; None for no limit.

    Attributes:
        capacity: Rows a parameter that are gathered; 0 where they go on at once.
    """

    def __init__(
        self,
        fisher: BlockFisher,
        parameters: Mapping[str, nn.Parameter],
        micro_batch: int,
        *,
        expected: int | None = None,
        spare: int | None = None,
    ) -> None:
        self._fisher = fisher
        self._parameters = parameters
        self._expected = expected
        self._held = 0
        self.capacity = _capacity(fisher, parameters, micro_batch, expected, spare)
        self._buffers: dict[str, Tensor] = {}
        self._micro_batch = micro_batch

    def expect(self, samples: int) -> None:
        """At least so many samples come in all."""
        self._expected = max(samples, self._expected or 0)

    def room(self, name: str, shape: Sequence[int]) -> Tensor | None:
        """Return memory `[n, *shape]` for the next rows of a parameter, or None for "your own"."""
        if self.capacity == 0:
            return None
        buffer = self._buffers.get(name)
        if buffer is None:
            whole = (self.capacity, *shape[1:])
            buffer = empty_pages(math.prod(whole), row_dtype(self._parameters[name])).view(whole)
            self._buffers[name] = buffer
        return buffer[self._held : self._held + shape[0]]

    def __call__(self, name: str, rows: Tensor) -> None:
        """Take the rows `[n, *shape]` of a parameter, once a micro-batch."""
        slot = self.room(name, rows.shape)
        if slot is None:
            self._fisher._add(name, rows, self._expected)
        elif slot.data_ptr() != rows.data_ptr():
            slot.copy_(rows)

    def end_micro_batch(self, n: int) -> None:
        """All parameters have had their rows of `n` samples."""
        if self.capacity == 0:
            self._fisher._count(n)
            return
        self._held += n
        if self._held + self._micro_batch > self.capacity:
            self.flush()

    def flush(self) -> None:
        """Add what is held to the statistics."""
        if self._held == 0:
            return
        for name, buffer in self._buffers.items():
            self._fisher._add(name, buffer[: self._held], self._expected)
        self._fisher._count(self._held)
        self._held = 0


def _capacity(
    fisher: BlockFisher,
    parameters: Mapping[str, nn.Parameter],
    micro_batch: int,
    expected: int | None,
    spare: int | None,
) -> int:
    row = sum(p.numel() * row_dtype(p).itemsize for p in parameters.values())
    most = min(_MOST_BYTES, int(_SHARE * fisher.final_nbytes))
    if spare is not None:
        most = min(most, spare)
    rows = min(_MOST_ROWS, most // max(1, row), expected or _MOST_ROWS)
    rows -= rows % micro_batch
    return rows if rows >= 2 * micro_batch else 0
