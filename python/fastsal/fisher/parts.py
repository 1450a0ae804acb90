"""Parts: ranges of consecutive weights, into which a model is cut to limit memory.

Parameters are cut between blocks, so that statistics, scores and compensation of a part equal those
of the whole, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

import fastsal._core as _core
from fastsal.models.input_axis import Axes, input_axes
from fastsal.utils.booleans import boolean


@dataclass(frozen=True)
class Part:
    """Weights `start` to `stop` of a parameter, flattened row-major.

    Attributes:
        name: Name of the parameter.
        start: First weight, a multiple of the block size.
        stop: One past the last weight.
        size: Number of weights of the whole parameter.
    """

    name: str
    start: int
    stop: int
    size: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        """Whether the part is the whole parameter."""
        return len(self) == self.size

    @property
    def key(self) -> str:
        """Unique name: that of the parameter, followed by the range unless the part is whole."""
        return self.name if self.is_whole else f"{self.name}[{self.start}:{self.stop}]"

    def of(self, tensor: Tensor) -> Tensor:
        """Return this part `[stop - start]` of a tensor of the parameter's shape."""
        return tensor.reshape(-1)[self.start : self.stop]


def flat(tensor: Tensor) -> Tensor:
    """Flatten a tensor to `[d]`, contiguous and on the CPU, as the compiled core requires."""
    return tensor.detach().cpu().reshape(-1).contiguous()


def flat_mask(masks: Mapping[str, Tensor] | None, name: str) -> NDArray[np.bool_] | None:
    """Return the mask of a parameter as an array `[d]`, or None if it has none."""
    if masks is None or name not in masks:
        return None
    return flat(boolean(masks[name])).numpy()


# Parts by their keys.
Parts = dict[str, Part]


def by_key(parts: Sequence[Part]) -> Parts:
    """Return parts by their keys, in order."""
    return {part.key: part for part in parts}


def shapes_of(parts: Parts, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each part by its key; parts that are not whole are flat."""
    return {
        key: shapes[part.name] if part.is_whole else (len(part),) for key, part in parts.items()
    }


def slices(tensors: Mapping[str, Tensor], parts: Parts) -> dict[str, Tensor]:
    """Return the slice `[stop - start]` of each part by its key, from tensors by parameter name.

    Whole parameters keep their shape. Parts of parameters missing from `tensors` are left out.
    """
    return {
        key: tensors[part.name] if part.is_whole else part.of(tensors[part.name])
        for key, part in parts.items()
        if part.name in tensors
    }


# cost(part): memory of a part, in bytes.
Cost = Callable[[Part], int]

# unit(part): number of weights that are never separated, a multiple of the block size.
Unit = Callable[[Part], int]


def block_unit(block_size: int | None) -> Unit:
    """Return the unit that allows cuts between any two blocks."""
    return lambda part: min(block_size or part.size, part.size)


def row_unit(
    shapes: Mapping[str, Sequence[int]],
    block_size: int | None,
    axes: Mapping[str, Axes] | None = None,
) -> Unit:
    """Return the unit that allows cuts only between blocks that end with a row of the outer axis.

    That is axis 0, unless `axes` are given. Groups of an N:M or 1xM pattern are then never
    separated.
    """

    def unit(part: Part) -> int:
        _, width, inner = (axes or {}).get(part.name) or input_axes(shapes[part.name])
        row = width * inner
        return min(part.size, math.lcm(row, min(block_size or part.size, part.size)))

    return unit


def uncut(shapes: Mapping[str, Sequence[int]]) -> list[Part]:
    """Return one part for each parameter."""
    return [Part(name, 0, math.prod(s), math.prod(s)) for name, s in shapes.items()]


def packed_bytes(part: Part, block_size: int | None, itemsize: int) -> int:
    """Return the memory of the packed blocks and sums of a part, in bytes."""
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
    """Cut a model into the fewest groups that each fit in a given memory, evenly filled.

    A parameter is cut only if it does not fit in one group.

    Args:
        shapes: Name to shape, in order.
        block_size: Weights of a block; None never cuts a parameter.
        cost: Memory of a part in bytes; must grow with its length.
        room: Memory of a group in bytes.
        unit: Weights that are never separated; None is a block.

    Returns:
        Groups of parts in the order of the parameters; None if even one unit does not fit.
    """
    unit = unit or block_unit(block_size)
    groups = _fill(shapes, unit, cost, room)
    if groups is None:
        return None
    # The smallest room that gives the same number of groups fills them evenly.
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
    for whole_part in uncut(shapes):
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
    """Cut a parameter into even parts that fit; return None if even one unit does not."""
    if cost(part) <= room:
        return [part]
    if cost(Part(part.name, 0, unit, part.size)) > room:
        return None
    count = -(-cost(part) // room)
    # The last piece also includes a remainder of less than a unit.
    while cost(Part(part.name, 0, _length(part, count, unit), part.size)) > room:
        count += 1
    return evenly(part, count, unit)


def evenly(part: Part, count: int, unit: int) -> list[Part]:
    """Cut a part between units into at most `count` parts of equal length.

    A remainder of less than a unit, which may have sums of another kind, is added to the last part.
    """
    each = _length(part, count, unit)
    starts = range(part.start, max(part.stop - unit + 1, part.start + 1), each)
    stops = [*starts[1:], part.stop]
    return [Part(part.name, a, b, part.size) for a, b in zip(starts, stops, strict=True)]


def _length(part: Part, count: int, unit: int) -> int:
    """Return the length of each of `count` pieces of a part, in whole units."""
    return -(-len(part) // (count * unit)) * unit
