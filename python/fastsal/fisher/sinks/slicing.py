"""Rows of whole parameters, cut into the parts that statistics are kept of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from fastsal.fisher.parts import Part, Parts
from fastsal.fisher.sums import flat_rows
from fastsal.gradients.backward import Lender

if TYPE_CHECKING:
    from fastsal.fisher.sinks.base import Sink


class PartSink:
    """A sink that hands the rows of each part on, by its key.

    Args:
        sink: Takes the rows of parts.
        parts: Key to part; weights that are in none are dropped.
    """

    def __init__(self, sink: Sink, parts: Parts) -> None:
        self._sink = sink
        self._parts: dict[str, list[Part]] = {}
        for part in parts.values():
            self._parts.setdefault(part.name, []).append(part)
        self._lender = sink if isinstance(sink, Lender) else None

    def expect(self, samples: int) -> None:
        """At least so many samples come in all."""
        self._sink.expect(samples)

    def room(self, name: str, shape: Sequence[int]) -> Tensor | None:
        """Return memory for the next rows of a parameter that is not cut, if there is some."""
        if self._lender is None or not self._parts[name][0].is_whole:
            return None
        return self._lender.room(name, shape)

    def __call__(self, name: str, rows: Tensor) -> None:
        """Take rows `[n, *shape]` of a parameter."""
        for part in self._parts[name]:
            if part.is_whole:
                self._sink(name, rows)
            else:
                piece = flat_rows(rows)[:, part.start : part.stop]
                self._sink(part.key, piece.contiguous())

    def end_micro_batch(self, n: int) -> None:
        """All parameters have had their rows of `n` samples."""
        self._sink.end_micro_batch(n)

    def flush(self) -> None:
        """Bring everything into the statistics."""
        self._sink.flush()
