"""What a job of several ranks moves and holds, on paper; the counters of `Ranks` say the same."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastsal.fisher.memory_plan import Share
from fastsal.fisher.parts import Part, packed_bytes, whole
from fastsal.fisher.shares import shares


@dataclass(frozen=True)
class Costs:
    """Of each rank, in order; bytes.

    Attributes:
        rows: Sent to the owners of sums, in one collection.
        weights: Sent after one compensation: a rank's own, to all others.
        masks: Sent after one ranking: the bits of a rank's own, to all others.
        statistics: Held: packed blocks and sums of a rank's share.
        gathered: Held: rows of its share that wait to be added.
        in_flight: Held: rows of one part, from all ranks, on their way to its sums.
        partial_sums: What would be sent instead of rows if each rank summed the whole model first,
            which takes the statistics of the whole model on each.
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
    """Bytes of a job with float32 rows and sums.

    Args:
        shapes: Name to shape.
        samples: Of one collection.
        ranks: Number of them.
        block_size: Weights of a block.
        micro_batch: Samples a rank runs at a time.
        step: Samples that are added to the sums at a time (`step_rows`).
    """
    sharing = Share(ranks)
    most = sharing.longest(micro_batch, block_size, None)
    every = shares(whole(shapes), block_size, ranks, most=most)
    total = sum(part.size for part in whole(shapes))
    own = [sum(map(len, share)) for share in every]
    padded = sum(min(n, micro_batch) for n in _micro_batches(samples, micro_batch * ranks))

    def held(parts: Sequence[Part]) -> int:
        return sum(packed_bytes(part, block_size, 4) for part in parts)

    # What is left of a micro-batch when whole steps have been added.
    rests = itertools.accumulate(_micro_batches(samples, micro_batch * ranks))
    waits = max(n % step for n in rests)
    return Costs(
        rows=[4 * padded * (total - d) for d in own],
        weights=[4 * d * (ranks - 1) for d in own],
        masks=[-(-d // 8) * (ranks - 1) for d in own],
        statistics=[held(share) for share in every],
        gathered=[4 * waits * d for d in own],
        in_flight=[4 * sharing.rows(micro_batch) * max(map(len, share)) for share in every],
        partial_sums=held(whole(shapes)) * (ranks - 1) // ranks,
    )


def _micro_batches(samples: int, size: int) -> list[int]:
    return [min(size, samples - start) for start in range(0, samples, size)]
