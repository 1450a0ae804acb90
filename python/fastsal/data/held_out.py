"""Samples held out of the statistics, for choices such as that of the damping and for tests.

Of every so many consecutive samples one is held out, at a random place: so held-out samples are
spread over the whole source, whose classes may be in order or in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsal.data.batches import Pair
from fastsal.data.stream_digest import sample_digests
from fastsal.errors import InvalidArgument

HELD_OUT_EVERY = 8  # one sample in so many is held out for the choice of the damping
HELD_OUT_MOST = 1024  # samples that the choice uses at most

_Places = NDArray[np.int64]


class Repeated:
    """The batches of a function that is called again for every iteration."""

    def __init__(self, source: Callable[[], Iterable[Pair]]) -> None:
        self._source = source

    def __iter__(self) -> Iterator[Pair]:
        """Start a new iteration."""
        return iter(self._source())


class HeldOutSamples:
    """Held-out samples of a source, in its order, for any number of iterations.

    They are kept in memory, or each iteration reads the source again and picks them.

    Args:
        source: Returns all batches, for every iteration anew.
        every: One sample in so many is held out.
        seed: Seed of the places of held-out samples.
        most: Samples to hold out at most. A larger source holds out one of twice as many, or of
            four times as many, and so on. None for no limit.
        total: Number of samples of the source; None if unknown: then more are held out at first,
            and half of them released to the others whenever they are too many. With `most` it is
            required if `room` is not None.
        room: Bytes of images to keep in memory at most: if there are more, none are kept. None for
            no limit.
        pick: With `total`: returns the samples at some places of the source, so that the others are
            not read again; None reads the whole source.

    Attributes:
        others: The batches without the held-out samples, for any number of iterations.
    """

    def __init__(
        self,
        source: Callable[[], Iterable[Pair]],
        every: int = HELD_OUT_EVERY,
        *,
        seed: int = 0,
        most: int | None = None,
        total: int | None = None,
        room: int | None = None,
        pick: Callable[[NDArray[np.int64]], Iterable[Pair]] | None = None,
    ) -> None:
        self.others = Repeated(self._others)
        self._source = source
        self._seed = seed
        self._every = every
        self._most = most
        self._room = room
        self._total = total
        self._pick = pick
        self._level = 0  # of every `every << level` samples one is held out
        if most is not None and total is not None:
            while len(self._places(0, total, self._level)) > most:
                self._level += 1
        self._kept: list[Pair] | None = None
        self._samples: int | None = None
        self._end = 0  # of the samples that the present iteration has read

    @property
    def samples(self) -> int:
        """Number of held-out samples."""
        if self._samples is None:
            for _ in self._others():
                pass
        assert self._samples is not None
        return self._samples

    def __iter__(self) -> Iterator[Pair]:
        """Iterate over the held-out samples."""
        if self._samples is None and self._room != 0:
            for _ in self._others():  # the first pass decides what is kept
                pass
        if self._kept is not None:
            yield from self._kept
            return
        if self._pick is not None and self._total is not None:
            places = self._places(0, self._total, self._level)
            yield from self._pick(places) if len(places) else ()
            return
        for held, _ in self._divided([self._level]):
            if held is not None:
                yield held

    def count_of(self, total: int) -> int:
        """Return how many of so many samples are held out."""
        return len(self._places(0, total, self._level))

    def without(self, pairs: Iterable[Pair]) -> Iterator[Pair]:
        """Yield the samples of another pass over the source that are not held out.

        The pass may be in another order: samples are recognized by their places and by what they
        are.
        """
        known = {digest for images, _ in self for digest in sample_digests(images)}
        start = 0
        for images, labels in pairs:
            found = [digest in known for digest in sample_digests(images)]
            out = torch.tensor(found, device="cpu")
            out[self._places(start, start + len(images), self._level) - start] = True
            start += len(images)
            if (other := _some((images, labels), ~out)) is not None:
                yield other

    def _others(self) -> Iterator[Pair]:
        """Yield the other samples; the first complete pass keeps the held-out ones."""
        levels, count, nbytes = [self._level], 0, 0
        kept: list[Pair] | None = [] if self._room != 0 else None
        for held, other in self._divided(levels):
            if other is not None:
                yield other
            if held is None:
                continue
            count += len(held[0])
            nbytes += held[0].nbytes
            if kept is not None:
                kept.append(held)
                if self._room is not None and nbytes > self._room:
                    kept = None
            while kept is not None and self._most is not None and count > self._most:
                places = self._places(0, self._end, levels[-1])
                levels.append(levels[-1] + 1)
                stays = np.isin(places, self._places(0, self._end, levels[-1]))
                count = int(stays.sum())
                kept, released = _parted(kept, torch.from_numpy(stays))
                yield from released
        if self._samples is None:
            self._samples, self._level, self._kept = count, levels[-1], kept

    def _divided(self, levels: list[int]) -> Iterator[tuple[Pair | None, Pair | None]]:
        """Yield the held-out and the other samples of each batch, by the last of the levels.

        A pair without samples is None.
        """
        start = 0
        for pair in self._source():
            stop = start + len(pair[0])
            out = torch.zeros(stop - start, dtype=torch.bool, device="cpu")
            out[self._places(start, stop, levels[-1]) - start] = True
            start = self._end = stop
            yield _some(pair, out), _some(pair, ~out)

    def _places(self, start: int, stop: int, level: int) -> _Places:
        """Return the places from `start` to `stop` that are held out, in order."""
        size = self._every << level
        blocks = np.arange(start // size, -(-stop // size), dtype=np.uint64)
        for upper in range(level, 0, -1):  # one half of each block holds its sample out
            blocks = 2 * blocks + (self._random(upper, blocks) & np.uint64(1))
        offsets = self._random(0, blocks) % np.uint64(self._every)
        offsets[blocks == 0] = self._every - 1  # of at least `every` samples, one is held out
        places: _Places = (blocks * np.uint64(self._every) + offsets).astype(np.int64)
        within: _Places = places[(places >= start) & (places < stop)]
        return within

    def _random(self, level: int, numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """Return a random number for each number, by the finalizer of SplitMix64."""
        seed = np.uint64((self._seed * 0x9E3779B97F4A7C15 + level) % 2**64)
        z = (numbers + seed) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: NDArray[np.uint64] = z ^ (z >> np.uint64(31))
        return mixed


def require_some(held: HeldOutSamples) -> None:
    """Raise InvalidArgument if no sample is held out."""
    if not held.samples:
        raise InvalidArgument(
            f"batches must have at least {HELD_OUT_EVERY} samples, as one in {HELD_OUT_EVERY} is "
            "held out to decide (damping='auto', recalibrate, reconstruct, refit), got fewer"
        )


def _some(pair: Pair, chosen: Tensor) -> Pair | None:
    """Return some samples of a batch; None for no sample."""
    if chosen.all():
        return pair
    if not chosen.any():
        return None
    images, labels = pair
    return images[chosen], None if labels is None else labels[chosen]


def _parted(pairs: list[Pair], stays: Tensor) -> tuple[list[Pair], list[Pair]]:
    """Divide the samples of batches into those that stay and the others."""
    parts: tuple[list[Pair], list[Pair]] = ([], [])
    start = 0
    for pair in pairs:
        some = stays[start : start + len(pair[0])]
        start += len(pair[0])
        for part, chosen in zip(parts, (some, ~some), strict=True):
            if (found := _some(pair, chosen)) is not None:
                part.append(found)
    return parts
