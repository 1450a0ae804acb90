"""Computed traffic and memory of a distributed job; the counters of `Ranks` measure the same."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastsal.fisher.memory_plan import Share
from fastsal.fisher.parts import Part, packed_bytes, uncut
from fastsal.fisher.shares import shares


@dataclass(frozen=True)
class Costs:
    """Traffic and memory of each rank, in order, in bytes.

    Attributes:
        rows: Sent to the ranks that own the sums, in one collection.
        weights: Sent after one compensation: the rank's own weights, to all others.
        masks: Sent after one ranking: the bits of the rank's own masks, to all others.
        statistics: Held: packed blocks and sums of the rank's share.
        gathered: Held: rows of the share that wait to be added.
        in_flight: Held: rows of one part received from all ranks at once.
        partial_sums: Sent instead of rows if each rank sums the whole model first, which needs the
            memory of all statistics on each rank.
    """

    rows: list[int]
    weights: list[int]
    masks: list[int]
    statistics: list[int]
    gathered: list[int]
    in_flight: list[int]
    partial_sums: int


def costs(
    shapes: Mapping[str, Sequence[int]],
    samples: int,
    ranks: int,
    *,
    block_size: int | None = 64,
    micro_batch: int,
    step: int,
) -> Costs:
    """Compute traffic and memory of a job with float32 rows and sums.

    Args:
        shapes: Name to shape.
        samples: Samples of one collection.
        ranks: Number of ranks.
        block_size: Weights of a block.
        micro_batch: Samples of one pass on one rank.
        step: Samples that are added to the sums at a time (`step_rows`).
    """
    sharing = Share(ranks)
    most = sharing.longest(micro_batch, block_size, None)
    every = shares(uncut(shapes), block_size, ranks, most=most)
    total = sum(part.size for part in uncut(shapes))
    own = [sum(map(len, share)) for share in every]
    padded = sum(min(n, micro_batch) for n in _micro_batches(samples, micro_batch * ranks))

    def held(parts: Sequence[Part]) -> int:
        return sum(packed_bytes(part, block_size, 4) for part in parts)

    # Rows that remain when whole steps have been added.
    rests = itertools.accumulate(_micro_batches(samples, micro_batch * ranks))
    waits = max(n % step for n in rests)
    return Costs(
        rows=[4 * padded * (total - d) for d in own],
        weights=[4 * d * (ranks - 1) for d in own],
        masks=[-(-d // 8) * (ranks - 1) for d in own],
        statistics=[held(share) for share in every],
        gathered=[4 * waits * d for d in own],
        in_flight=[4 * sharing.rows(micro_batch) * max(map(len, share)) for share in every],
        partial_sums=held(uncut(shapes)) * (ranks - 1) // ranks,
    )


def _micro_batches(samples: int, size: int) -> list[int]:
    return [min(size, samples - start) for start in range(0, samples, size)]
