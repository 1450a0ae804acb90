"""The protocol of a sink."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Sink(Protocol):
    """Takes the rows of every parameter, once a micro-batch, during the backward pass."""

    def expect(self, samples: int) -> None:
        """At least so many samples come in all."""

    def __call__(self, name: str, rows: Tensor) -> None:
        """Take rows `[n, *shape]` of a parameter; the memory is valid during the call only."""

    def end_micro_batch(self, n: int) -> None:
        """All parameters have had their rows of `n` samples."""

    def flush(self) -> None:
        """Bring everything into the statistics."""
