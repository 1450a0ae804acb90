"""The interface between the gradient engine and the sums."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class RowSink(Protocol):
    """Receives the rows of every parameter, once a micro-batch, during the backward pass."""

    def expect(self, samples: int) -> None:
        """Announce that at least `samples` samples come in total."""

    def __call__(self, name: str, rows: Tensor) -> None:
        """Receive rows `[n, *shape]` of a parameter, in memory that is valid during the call."""

    def end_micro_batch(self, n: int) -> None:
        """Count `n` samples, of which every parameter has received its rows."""

    def flush(self) -> None:
        """Add all pending rows to the sums."""
