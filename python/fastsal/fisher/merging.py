"""Weighted sums of statistics in files, which may be larger than memory."""

from __future__ import annotations

import os
from collections.abc import Sequence

from fastsal.errors import InvalidArgument
from fastsal.fisher.block_fisher import check_same_model, fisher_of
from fastsal.fisher.files import read, write
from fastsal.fisher.model_sums import ModelSums
from fastsal.fisher.sums import ParameterSums
from fastsal.utils.numbers import real


def merge_files(
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    weights: Sequence[float] | None = None,
    shard_bytes: int | str | None = None,
) -> None:
    """Add statistics in files, and write the sum to a file.

    The result equals that of `BlockFisher.load` and `BlockFisher.merge` in the same order.

    Args:
        paths: Files, or indexes of shards.
        out: The file to write, or the index.
        weights: Weight of one sample of each file, above zero; None is 1.
        shard_bytes: Most bytes of a shard, or text such as `"4GiB"`; None writes one file. The sums
            of one shard are in memory at a time.

    Raises:
        InvalidArgument: The files are of different models, or a weight is not above zero.
        GradientOverflow: The sums overflow.
        FileFormatError: A file is truncated, modified, or not a file of statistics.
    """
    if not paths or (weights is not None and len(weights) != len(paths)):
        raise InvalidArgument(
            "weights must be one for each file, and there must be at least one file, got "
            f"{len(weights or [])} for {len(paths)} files"
        )
    found = [read(path) for path in paths]
    first = found[0]
    total = ModelSums.empty(first.shapes, first.block_size, first.precision)
    terms = []
    for sums, given in zip(found, weights or [1.0] * len(found), strict=True):
        weight = real("weight", given, above=0)
        check_same_model(fisher_of(total), fisher_of(sums))
        total.count_merged(sums, weight)
        terms.append((sums, weight))

    def summed(name: str) -> ParameterSums:
        p = total.parameters[name]
        found = ParameterSums.empty(p.shape, p.block_size, p.dtype)
        for sums, weight in terms:
            ModelSums.check_fits(name, found, sums.parameters[name], weight)
            found.merge(sums.parameters[name], weight)
            sums.storage.release()
        return found

    write(total, out, shard_bytes=shard_bytes, summed=summed)
