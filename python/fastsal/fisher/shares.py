"""Division of the parts of a model among the ranks of a distributed job."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from fastsal.fisher.parts import Cost, Part, Unit, block_unit, evenly, packed_bytes


def shares(
    parts: Sequence[Part],
    block_size: int | None,
    ranks: int,
    *,
    unit: Unit | None = None,
    most: int | None = None,
) -> list[list[Part]]:
    """Divide parts among ranks, in order, into shares that differ by at most one unit.

    Args:
        parts: The parts, in order.
        block_size: Weights of a block; None makes each parameter one block.
        ranks: Number of shares; some are empty if there are fewer units than ranks.
        unit: Weights that are never separated; None is a block.
        most: Most weights of one part of a share, plus at most one unit.
    """
    unit = unit or block_unit(block_size)
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
                stop = part.stop  # a remainder of less than a unit is added to this part
            share = Part(part.name, start, stop, part.size)
            found[rank] += evenly(share, 1 if most is None else -(-len(share) // most), size)
            done += each * (stop - start)
            start = stop
    return found


def regrouped(
    all_shares: Sequence[Sequence[Part]], cost: Cost, room: int
) -> list[list[list[Part]]]:
    """Cut all shares into groups, so that each rank's part of a group fits in a given memory.

    Args:
        all_shares: Parts of every rank.
        cost: Memory of a part in bytes.
        room: Memory of a group on one rank in bytes. A part that alone takes more is a group.

    Returns:
        Groups, each a list of the parts of every rank.
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
