"""A prepared collection of statistics, and the passes over images that accumulate it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastsal.data.batches import Source
from fastsal.fisher.collection.passes import PassSettings
from fastsal.fisher.memory_plan import MemoryPlan
from fastsal.fisher.model_sums import ModelSums
from fastsal.fisher.parts import Parts
from fastsal.utils.progress import Report


@dataclass(frozen=True)
class Work:
    """A collection that is ready to run.

    Attributes:
        how: How gradients are formed and summed.
        plan: How memory is used.
        sums: The sums that samples are added to.
        source: The images.
    """

    how: PassSettings
    plan: MemoryPlan
    sums: ModelSums
    source: Source


@dataclass(frozen=True)
class Passes:
    """Passes over the images, each for one group of parts.

    Attributes:
        groups: Parts of each pass, by the keys of their sums.
        add: `add(work, sums, number, report)` runs pass `number`: it iterates over the images of
            `work` once, adds the gradients of the parts to `sums`, and reports samples.
    """

    groups: Sequence[Parts]
    add: Callable[[Work, ModelSums, int, Report], None]
