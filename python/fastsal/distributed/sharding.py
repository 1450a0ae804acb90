"""Which rank owns which weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastsal.parts import Part, packed_bytes, whole


def shares(
    shapes: Mapping[str, Sequence[int]], block_size: int | None, ranks: int
) -> list[list[Part]]:
    """Cut a model into one share for each rank, equal but for a block, in order.

    Args:
        shapes: Name to shape.
        block_size: Weights of a block; None leaves parameters whole.
        ranks: Number of shares; some are empty where there are fewer blocks.
    """
    parts = whole(shapes)
    total = sum(packed_bytes(part, block_size, 4) for part in parts)
    found: list[list[Part]] = [[] for _ in range(ranks)]
    done = 0.0
    for part in parts:
        block = min(block_size or part.size, part.size)
        each = packed_bytes(part, block_size, 4) / part.size
        start = 0
        while start < part.size:
            rank = min(ranks - 1, int((done + each * block / 2) * ranks / total))
            end = (rank + 1) * total / ranks
            blocks = max(1, round((end - done) / (each * block)))
            stop = part.size if rank == ranks - 1 else min(part.size, start + blocks * block)
            if part.size - stop < block:
                stop = part.size  # a rest of less than a block goes with the part before it
            found[rank].append(Part(part.name, start, stop, part.size))
            done += each * (stop - start)
            start = stop
    return found
