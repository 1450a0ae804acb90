"""Slicing of the rows of whole parameters into those of parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from fastsal.fisher.parts import Part, Parts
from fastsal.fisher.rows import flat_rows
from fastsal.gradients.backward import Deferrer, Lender

if TYPE_CHECKING:
    from fastsal.fisher.sinks.base import RowSink


class PartSink:
    """Passes the rows of each part to another sink, by the key of the part.

    Args:
        sink: Receives the rows of parts.
        parts: Parts by their keys; weights in none of them are dropped.
    """

    def __init__(self, sink: RowSink, parts: Parts) -> None:
        self._sink = sink
        self._parts: dict[str, list[Part]] = {}
        for part in parts.values():
            self._parts.setdefault(part.name, []).append(part)
        self._lender = sink if isinstance(sink, Lender) else None
        self._deferrer = sink if isinstance(sink, Deferrer) else None

    def expect(self, samples: int) -> None:
        """Announce that at least `samples` samples come in total."""
        self._sink.expect(samples)

    def room(self, name: str, shape: Sequence[int]) -> Tensor | None:
        """Return a buffer for the next rows of a parameter, or None; None for one that is cut."""
        if self._lender is None or not self._parts[name][0].is_whole:
            return None
        return self._lender.room(name, shape)

    def defers(self, name: str, shape: Sequence[int], nbytes: int) -> bool:
        """Return whether to keep a call of `nbytes` instead of rows; not of one that is cut."""
        if self._deferrer is None or not self._parts[name][0].is_whole:
            return False
        return self._deferrer.defers(name, shape, nbytes)

    def defer(self, name: str, shape: Sequence[int], fill: Callable[[Tensor], None]) -> None:
        """Receive the function that writes the rows of a parameter that is not cut."""
        if self._deferrer is not None:
            self._deferrer.defer(name, shape, fill)

    def __call__(self, name: str, rows: Tensor) -> None:
        """Receive rows `[n, *shape]` of a parameter."""
        for part in self._parts[name]:
            if part.is_whole:
                self._sink(name, rows)
            else:
                piece = flat_rows(rows)[:, part.start : part.stop]
                self._sink(part.key, piece.contiguous())

    def end_micro_batch(self, n: int) -> None:
        """Count `n` samples, of which every parameter has received its rows."""
        self._sink.end_micro_batch(n)

    def flush(self) -> None:
        """Add all pending rows to the sums."""
        self._sink.flush()
