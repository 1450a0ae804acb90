"""Sums of statistics that lie in files, which may be larger than memory."""

from __future__ import annotations

import os
from collections.abc import Sequence

from fastsal.errors import InvalidArgument
from fastsal.fisher.block_fisher import BlockFisher
from fastsal.fisher.files import read, write
from fastsal.fisher.sums import ParameterStatistics


def merge_files(
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    shard_bytes: int | str | None = None,
) -> None:
    """Add statistics in files, which may be larger than memory, and write the sum.

    The same as `load` and `merge` in this order, one parameter at a time.

    Args:
        paths: Files, or indexes of shards.
        out: The file to write, or the index.
        weights: What one sample of each file counts; None is 1.
        shard_bytes: As for `BlockFisher.save`.

    Raises:
        InvalidArgument: The files do not fit together, or a weight is not above zero.
        FileFormatError: A file is damaged.
    """
    if not paths or (weights is not None and len(weights) != len(paths)):
        raise InvalidArgument(
            f"weights: got {len(weights or [])} for {len(paths)} files; takes one for each of "
            "one file or more"
        )
    found = [read(path) for path in paths]
    total = _Sum(found, list(weights or [1.0] * len(found)))
    write(total, out, shard_bytes=shard_bytes)


class _Sum(BlockFisher):
    """The weighted sum of statistics, of which a parameter is there while it is written."""

    def __init__(self, parts: Sequence[BlockFisher], weights: Sequence[float]) -> None:
        first = parts[0]
        super().__init__(first.shapes, block_size=first.block_size, precision=first.precision)
        self._terms = list(zip(parts, weights, strict=True))
        for fisher, weight in self._terms:
            self._check_fits(fisher, weight)
            self._count_merged(fisher, weight)

    def _sums_of(self, name: str) -> ParameterStatistics:
        p = self._parameters[name]
        total = ParameterStatistics.empty(p.shape, p.block_size, p.dtype)
        for fisher, weight in self._terms:
            total.merge(fisher._parameters[name], weight)
            fisher._release()
        return total
