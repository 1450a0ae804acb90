"""Samples held out of the statistics, for choices such as that of the damping."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from fastsal.data.batches import Pair
from fastsal.errors import InvalidArgument

HELD_OUT_EVERY = 8  # one sample in so many is held out for the choice of the damping
HELD_OUT_MOST = 1024  # samples that the choice uses at most


def holding_out(
    batches: Iterable[Pair],
    held: list[Pair],
    every: int = HELD_OUT_EVERY,
) -> Iterator[Pair]:
    """Append one sample in `every` to `held` and yield the others."""
    start = 0
    for images, labels in batches:
        at = torch.arange(start, start + images.shape[0])
        start += images.shape[0]
        out = at % every == every - 1
        if out.any():
            held.append((images[out], None if labels is None else labels[out]))
        if not out.all():
            yield images[~out], None if labels is None else labels[~out]


class Repeated:
    """The batches of a function that is called again for every iteration."""

    def __init__(self, source: Callable[[], Iterable[Pair]]) -> None:
        self._source = source

    def __iter__(self) -> Iterator[Pair]:
        """Start a new iteration."""
        return iter(self._source())


class Holding:
    """Batches without the held-out samples, for any number of iterations.

    Args:
        source: Returns all batches, for every iteration anew.
        held: Replaced by the held-out samples at the end of every iteration.
        every: One sample in so many is held out.
    """

    def __init__(
        self, source: Callable[[], Iterable[Pair]], held: list[Pair], every: int = HELD_OUT_EVERY
    ) -> None:
        self._source = source
        self._held = held
        self._every = every

    def __iter__(self) -> Iterator[Pair]:
        """Start a new iteration."""
        held: list[Pair] = []
        yield from holding_out(self._source(), held, self._every)
        self._held[:] = held


def limited(held: list[Pair]) -> list[Pair]:
    """Return the first `HELD_OUT_MOST` held-out samples.

    Raises:
        InvalidArgument: There are none.
    """
    if not held:
        raise InvalidArgument(
            f"damping: 'auto' (and recalibrate) need at least {HELD_OUT_EVERY} samples, as one in "
            f"{HELD_OUT_EVERY} is held out; pass more samples, or a number"
        )
    some: list[Pair] = []
    left = HELD_OUT_MOST
    for images, labels in held:
        if left > 0:
            some.append((images[:left], None if labels is None else labels[:left]))
            left -= images.shape[0]
    return some
