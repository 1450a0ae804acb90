"""Rows of several micro-batches, gathered before the statistics are read and written once.

A pass over the statistics moves `4 (B + 1)` bytes a weight, whatever the number of rows that it
adds; with blocks of 64 and micro-batches of 8 that is eight times the rows themselves.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastsal.fisher.block_fisher import BlockFisher
from fastsal.gradients.precision import row_dtype
from fastsal.gradients.workspace import empty_pages

# More rows a pass save little: the kernel adds 64 at a time.
_MOST_ROWS = 32
_MOST_BYTES = 5 * 2**29
# Of the statistics' own size.
_SHARE = 0.75


def step_rows(
    parameters: Mapping[str, nn.Parameter],
    statistics: int,
    micro_batch: int,
    expected: int | None = None,
) -> int:
    """Samples that are gathered for one addition to the statistics; a multiple of `micro_batch`.

    The sums depend on it by their rounding. So it goes by the whole model alone, and never by the
    memory that there is: sums within a memory budget are the same as without.

    Args:
        parameters: Name to parameter, of the whole model.
        statistics: Memory of their packed blocks and sums.
        micro_batch: Samples of one pass where memory does not matter.
        expected: Samples to come in all, if known.
    """
    row = sum(p.numel() * row_dtype(p).itemsize for p in parameters.values())
    most = min(_MOST_BYTES, int(_SHARE * statistics))
    rows = min(_MOST_ROWS, most // max(1, row), expected or _MOST_ROWS)
    return max(1, rows // micro_batch) * micro_batch


class RowGatherer:
    """Where the gradient engine puts its rows: a sink that lends the memory they are written to.

    Args:
        fisher: What the rows are added to.
        dtypes: Name to the type of its rows.
        step: Rows that are added at a time; no micro-batch may lie across two steps.
        expected: Samples to come in all, if known.
    """

    def __init__(
        self,
        fisher: BlockFisher,
        dtypes: Mapping[str, torch.dtype],
        step: int,
        *,
        expected: int | None = None,
    ) -> None:
        self._fisher = fisher
        self._dtypes = dtypes
        self._step = step
        self._expected = expected
        self._held = 0
        self._buffers: dict[str, Tensor] = {}

    def expect(self, samples: int) -> None:
        """At least so many samples come in all."""
        self._expected = max(samples, self._expected or 0)

    def room(self, name: str, shape: Sequence[int]) -> Tensor | None:
        """Return memory `[n, *shape]` for the next rows of a parameter, or None for "your own"."""
        if self._held == 0 and shape[0] >= self._step:
            return None  # a whole step goes on at once
        buffer = self._buffers.get(name)
        if buffer is None:
            whole = (self._step, *shape[1:])
            buffer = empty_pages(math.prod(whole), self._dtypes[name]).view(whole)
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
        if self._held == 0 and n >= self._step:
            self._fisher._count(n)
            return
        self._held += n
        if self._held >= self._step:
            self.flush()

    def flush(self) -> None:
        """Add what is held to the statistics."""
        if self._held == 0:
            return
        for name, buffer in self._buffers.items():
            self._fisher._add(name, buffer[: self._held], self._expected)
        self._fisher._count(self._held)
        self._held = 0
