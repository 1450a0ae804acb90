"""Images to fit a model on, and images apart from them to judge it by."""

from __future__ import annotations

from collections.abc import Iterator

from fastsal.data.batches import Batches, Pair, as_batches
from fastsal.data.held_out import HELD_OUT_MOST, HeldOutSamples, Repeated, require_some
from fastsal.errors import InvalidArgument


def images_apart(
    batches: Batches, samples: int | None, held_out: Batches | None, seed: int
) -> tuple[Repeated, list[Pair]]:
    """Return training images, iterable again, and held-out images.

    Raises:
        InvalidArgument: `batches` or `held_out` is an iterator.
        DataError: There are too few images.
    """
    for name, given in (("batches", batches), ("held_out", held_out)):
        if isinstance(given, Iterator):
            raise InvalidArgument(
                f"{name} must be iterable several times, such as a list or a DataLoader, got an "
                "iterator"
            )
    source = Repeated(lambda: as_batches(batches, samples, "ignored"))
    if held_out is not None:
        return source, list(as_batches(held_out, None, "ignored"))
    held = HeldOutSamples(source.__iter__, seed=seed, most=HELD_OUT_MOST)
    require_some(held)
    return held.others, list(held)
