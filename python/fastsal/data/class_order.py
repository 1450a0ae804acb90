"""Notice samples in the order of their classes, of which the first ones are a few classes only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

# Fewer labels may be in order by chance.
_FEWEST = 16


def in_class_order(labels: npt.NDArray[Any]) -> bool:
    """Return whether every class of labels `[n]` is one run, of two samples or more on average.

    False for fewer than 16 labels, which may be in order by chance.
    """
    if labels.ndim != 1 or len(labels) < _FEWEST:
        return False
    runs = 1 + int((labels[1:] != labels[:-1]).sum())
    return runs == len(np.unique(labels)) and 2 * runs <= len(labels)


def class_order_note(what: str, classes: int) -> str:
    """Return the text of the warning that some samples cover a few classes only.

    Args:
        what: The samples, such as "the first 64 of 1,000 images".
        classes: Number of classes among them.
    """
    of = "one class" if classes == 1 else f"{classes} classes"
    return (
        f"{what} are in class order, of {of} only; shuffle the source first (shuffle_seed=0 of "
        "ImageSet.batches, or a DataLoader over a fixed permutation), or use all of its samples"
    )


def size_of(batches: Any) -> int | None:
    """Return the number of samples of batches without iterating over them; None if unknown.

    It is that of a list or tuple of `(images, labels)`, or the attribute `samples`.
    """
    samples = getattr(batches, "samples", None)
    if isinstance(samples, int) and not isinstance(samples, bool):
        return samples
    if not isinstance(batches, (list, tuple)):
        return None
    total = 0
    for batch in batches:
        images = batch[0] if isinstance(batch, Sequence) and len(batch) else batch
        if not isinstance(images, Tensor) or images.dim() == 0:
            return None
        total += images.shape[0]
    return total


def largest_size(batches: Any) -> int | None:
    """Return `size_of`, or else the number of items of the data set of a `DataLoader`."""
    size = size_of(batches)
    if size is not None:
        return size
    try:
        return len(batches.dataset)
    except (AttributeError, TypeError):
        return None
