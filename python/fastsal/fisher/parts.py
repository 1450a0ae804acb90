"""Consecutive weights of a parameter: what a model is cut into where the whole is too much.

A cut lies between blocks, so that statistics, scores and compensation of a part are those of the
whole, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

import fastsal._core as _core


@dataclass(frozen=True)
class Part:
    """Weights `start` to `stop` of a parameter, flattened row-major.

    Attributes:
        name: The parameter's.
        start: First weight, a multiple of the block size.
        stop: One past the last.
        size: Weights of the whole parameter.
    """

    name: str
    start: int
    stop: int
    size: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        """Whether it is the parameter."""
        return len(self) == self.size

    @property
    def key(self) -> str:
        """A name of its own: the parameter's, or that with the range."""
        return self.name if self.is_whole else f"{self.name}[{self.start}:{self.stop}]"

    def of(self, tensor: Tensor) -> Tensor:
        """The part `[stop - start]` of a tensor of the parameter's shape."""
        return tensor.reshape(-1)[self.start : self.stop]


def flat(tensor: Tensor) -> Tensor:
    """A tensor `[d]` on the CPU, contiguous, as the core takes it."""
    return tensor.detach().cpu().reshape(-1).contiguous()


# Key to part.
Parts = dict[str, Part]


def by_key(parts: Sequence[Part]) -> Parts:
    """Parts by their keys, in order."""
    return {part.key: part for part in parts}


def shapes_of(parts: Parts, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Key to shape, from those of parameters; what is not whole is flat."""
    return {
        key: shapes[part.name] if part.is_whole else (len(part),) for key, part in parts.items()
    }


def slices(tensors: Mapping[str, Tensor], parts: Parts) -> dict[str, Tensor]:
    """Key to its slice `[stop - start]`, of tensors by their parameters' names.

    Those of whole parameters keep their shape; parts of a parameter that is not there are left out.
    """
    return {
        key: tensors[part.name] if part.is_whole else part.of(tensors[part.name])
        for key, part in parts.items()
        if part.name in tensors
    }


# cost(part): memory of a part, in bytes.
Cost = Callable[[Part], int]

# unit(part): weights of its parameter that stay together, a multiple of the block.
Unit = Callable[[Part], int]


def blocks(block_size: int | None) -> Unit:
    """Parameters may be cut between any two blocks."""
    return lambda part: min(block_size or part.size, part.size)


def rows(shapes: Mapping[str, Sequence[int]], block_size: int | None) -> Unit:
    """Parameters may be cut between blocks where a row of axis 0 ends: groups of patterns stay."""

    def unit(part: Part) -> int:
        shape = shapes[part.name]
        row = math.prod(shape[1:]) if len(shape) > 1 else part.size
        return min(part.size, math.lcm(row, min(block_size or part.size, part.size)))

    return unit


def whole(shapes: Mapping[str, Sequence[int]]) -> list[Part]:
    """One part for each parameter."""
    return [Part(name, 0, math.prod(s), math.prod(s)) for name, s in shapes.items()]


def packed_bytes(part: Part, block_size: int | None, itemsize: int) -> int:
    """Memory of packed blocks and sums of a part."""
    block = max(1, min(block_size or part.size, part.size))
    return itemsize * (_core.packed_len(len(part), block) + len(part))


def cut(
    shapes: Mapping[str, Sequence[int]],
    block_size: int | None,
    cost: Cost,
    room: int,
    *,
    unit: Unit | None = None,
) -> list[list[Part]] | None:
    """Cut a model into as few groups as fit a memory each, and even ones.

    A parameter stays whole unless it alone takes more than the room.

    Args:
        shapes: Name to shape, in order.
        block_size: Weights of a block; None does not cut parameters.
        cost: Memory of a part, which grows with its length.
        room: Memory of a group.
        unit: What stays together; None is a block.

    Returns:
        Groups of parts in the order of the parameters; None where not even a unit fits.
    """
    unit = unit or blocks(block_size)
    groups = _fill(shapes, unit, cost, room)
    if groups is None:
        return None
    # The least room with which there are as many groups makes them even.
    low, high, best = 0, room, groups
    while high - low > max(1, room // 64):
        middle = (low + high) // 2
        found = _fill(shapes, unit, cost, middle)
        if found is None or len(found) > len(groups):
            low = middle
        else:
            high, best = middle, found
    return best


def _fill(
    shapes: Mapping[str, Sequence[int]], unit: Unit, cost: Cost, room: int
) -> list[list[Part]] | None:
    groups: list[list[Part]] = [[]]
    left = room
    for whole_part in whole(shapes):
        pieces = _pieces(whole_part, unit(whole_part), cost, room)
        if pieces is None:
            return None
        for part in pieces:
            needed = cost(part)
            if needed > left and groups[-1]:
                groups.append([])
                left = room
            groups[-1].append(part)
            left -= needed
    return groups


def _pieces(part: Part, unit: int, cost: Cost, room: int) -> list[Part] | None:
    """Cut a parameter into even parts that fit; None if a unit does not."""
    if cost(part) <= room:
        return [part]
    if cost(Part(part.name, 0, unit, part.size)) > room:
        return None
    count = -(-cost(part) // room)
    # But for a rest of less than a unit, which the last one has too.
    while cost(Part(part.name, 0, _length(part, count, unit), part.size)) > room:
        count += 1
    return evenly(part, count, unit)


def evenly(part: Part, count: int, unit: int) -> list[Part]:
    """Cut a part into so many or fewer of equal length, between units.

    A rest of less than a unit, which may have sums of its own kind, goes with the part before it.
    """
    each = _length(part, count, unit)
    starts = range(part.start, max(part.stop - unit + 1, part.start + 1), each)
    stops = [*starts[1:], part.stop]
    return [Part(part.name, a, b, part.size) for a, b in zip(starts, stops, strict=True)]


def _length(part: Part, count: int, unit: int) -> int:
    """Of each of so many pieces of a part, in whole units."""
    return -(-len(part) // (count * unit)) * unit
