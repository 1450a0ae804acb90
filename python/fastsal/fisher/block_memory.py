"""Whether the blocks of a model fit in memory, checked before hours of passes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fastsal.errors import InvalidArgument
from fastsal.utils.machine import total_memory
from fastsal.utils.sizes import gib

_DOUBLE = 8


def check_block_memory(
    shapes: Mapping[str, Sequence[int]],
    block_size: int | None,
    itemsize: int,
    *,
    samples: int | None,
    budget: int | None,
    needs_blocks: bool,
) -> None:
    """Raise InvalidArgument if one block of a model exceeds the memory.

    Args:
        shapes: Name to shape.
        block_size: Weights of a block; None makes each parameter one block.
        itemsize: Bytes of one entry of the sums.
        samples: Number of samples, if known. While there are few, gradients are kept, which take
            less memory than blocks.
        budget: Most bytes that may be used; None for the memory of this machine.
        needs_blocks: Whether blocks are used, also where gradients are kept.
    """
    for name, shape in shapes.items():
        d = math.prod(shape)
        block = min(block_size or d, d)
        if needs_blocks or (samples is not None and samples > (block + 1) // 2):
            check_memory_of_block(name, block, itemsize, budget, inverts=needs_blocks)


def check_memory_of_block(
    name: str, block: int, itemsize: int, budget: int | None = None, *, inverts: bool = False
) -> None:
    """Raise InvalidArgument if a block exceeds the memory.

    Args:
        name: Name of the parameter.
        block: Weights of the block.
        itemsize: Bytes of one entry of the sums.
        budget: Most bytes that may be used; None for the memory of this machine.
        inverts: Whether the block is also inverted, as a float64 square.
    """
    needed = itemsize * block * (block + 1) // 2 + (_DOUBLE * block**2 if inverts else 0)
    machine = total_memory() or math.inf
    most = min(machine, budget or math.inf)
    if needed > most:
        where = "memory_budget is" if most == budget else "this machine has"
        raise InvalidArgument(
            f"block_size must be smaller: a block of {block:,} weights of {name!r} takes "
            f"{gib(needed)}, but {where} {gib(most)}; use block_size=64, or exclude {name!r} "
            "from parameters"
        )
