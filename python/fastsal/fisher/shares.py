"""Divide the parts of a model among processes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from fastsal.fisher.parts import Cost, Part, Unit, blocks, evenly, packed_bytes


def shares(
    parts: Sequence[Part],
    block_size: int | None,
    ranks: int,
    *,
    unit: Unit | None = None,
    most: int | None = None,
) -> list[list[Part]]:
    """Give each rank a share of some parts, equal but for a unit, in order.

    Args:
        parts: In order.
        block_size: Weights of a block; None leaves parameters whole.
        ranks: Number of shares; some are empty where there are fewer units.
        unit: What stays together; None is a block.
        most: Weights of one part of a share, but for a unit.
    """
    unit = unit or blocks(block_size)
    total = sum(packed_bytes(part, block_size, 4) for part in parts)
    found: list[list[Part]] = [[] for _ in range(ranks)]
    done = 0.0
    for part in parts:
        size = unit(part)
        each = packed_bytes(part, block_size, 4) / len(part)
        start = part.start
        while start < part.stop:
            rank = min(ranks - 1, int((done + each * size / 2) * ranks / total))
            end = (rank + 1) * total / ranks
            units = max(1, round((end - done) / (each * size)))
            stop = part.stop if rank == ranks - 1 else min(part.stop, start + units * size)
            if part.stop - stop < size:
                stop = part.stop  # a rest of less than a unit goes with the part before it
            share = Part(part.name, start, stop, part.size)
            found[rank] += evenly(share, 1 if most is None else -(-len(share) // most), size)
            done += each * (stop - start)
            start = stop
    return found


def regrouped(
    all_shares: Sequence[Sequence[Part]], cost: Cost, room: int
) -> list[list[list[Part]]]:
    """Cut all shares into groups, so that no rank's part of a group takes more than a room.

    A part that alone takes more is a group. Returns groups of shares, by rank.
    """
    found = []
    for share in all_shares:
        groups: list[list[Part]] = []
        left = 0
        for part in share:
            needed = cost(part)
            if needed > left or not groups:
                groups.append([])
                left = room
            groups[-1].append(part)
            left -= needed
        found.append(groups)
    return [list(group) for group in zip_longest(*found, fillvalue=[])]
