"""The memory of held-out images within a memory budget."""

from __future__ import annotations

from collections.abc import Iterator

from fastsal.data.batches import Batches, first_images
from fastsal.errors import InvalidArgument
from fastsal.pruning.limits.limit import TESTED_EVERY, Limit
from fastsal.pruning.memory_use import sample_bytes, tuning_bytes
from fastsal.pruning.recipe import Recipe


def kept_images(
    batches: Batches | None,
    samples: int | None,
    recipe: Recipe,
    limit: Limit | None,
    held_out: Batches | None,
) -> tuple[int, Batches | None]:
    """Return the bytes of held-out images that are kept within a budget, and the batches again.

    Images are kept only if they come once; others are read again for each use.

    Raises:
        InvalidArgument: Images to test a limit on come once, and their number is unknown.
    """
    if isinstance(held_out, Iterator):
        raise InvalidArgument(
            "held_out must be a list, a DataLoader or another iterable that can be iterated "
            "several times with memory_budget, got an iterator"
        )
    if not isinstance(batches, Iterator):
        return 0, batches
    images, batches = first_images(batches, samples)
    assert images is not None
    nbytes = 0
    if limit is not None and held_out is None:
        if samples is None:
            raise InvalidArgument(
                "samples must be given for a limit with memory_budget if batches is an iterator: "
                "one in four is kept in memory"
            )
        tested = samples // TESTED_EVERY + 1
        nbytes += tested * sample_bytes(images)
        samples -= samples // TESTED_EVERY
    if recipe.needs_fisher and recipe.is_auto:
        nbytes += tuning_bytes(images, samples)
    return nbytes, batches
