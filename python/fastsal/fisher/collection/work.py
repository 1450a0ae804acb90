"""A collection of Fisher statistics: what to do, and the step that does it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fastsal.data.batches import Source
from fastsal.fisher.block_fisher import BlockFisher
from fastsal.fisher.collection.passes import Gradients
from fastsal.fisher.memory_plan import MemoryPlan
from fastsal.utils.progress import Report


@dataclass(frozen=True)
class Work:
    """Statistics that are to be collected.

    Attributes:
        how: How gradients are formed and summed.
        plan: How memory is used.
        fisher: Empty statistics, in their place.
        source: The images.
    """

    how: Gradients
    plan: MemoryPlan
    fisher: BlockFisher
    source: Source


# add(work, fisher, number, report): go over the images of a work once and add the statistics of a
# group of parts.
GroupPass = Callable[[Work, BlockFisher, int, Report], None]
