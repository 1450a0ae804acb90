"""Samples that statistics do not see, so that choices can be tested on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from fastsal.errors import InvalidArgument

# One sample in so many is held out for the choice of damping, at most so many in all.
HELD_OUT_EVERY = 8
HELD_OUT_MOST = 1024

Pair = tuple[Tensor, Tensor | None]


class Measured(Protocol):
    """Images to measure a model on; `fastsal.damping.HeldOut` is one."""

    @property
    def samples(self) -> int:
        """Number of images."""

    def mean_loss(self, model: nn.Module) -> float:
        """Mean loss of a model on them."""


class InMicroBatches(Measured, Protocol):
    """Images that are measured a micro-batch at a time."""

    def losses(self, model: nn.Module) -> list[float]:
        """Loss of a model on each micro-batch, summed over its images."""


def mean_of(losses: Iterable[float], samples: int) -> float:
    """The mean from the losses of micro-batches, added in their order wherever they are from."""
    total = 0.0
    for loss in losses:  # not `sum`, which rounds otherwise from Python 3.12 on
        total += loss
    return total / samples


def holding_out(
    batches: Iterable[Pair],
    held: list[Pair],
    every: int = HELD_OUT_EVERY,
) -> Iterator[Pair]:
    """Keep one sample in `every` in `held` and pass the others on."""
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
    """What a function gives, as often as it is iterated."""

    def __init__(self, source: Callable[[], Iterable[Pair]]) -> None:
        self._source = source

    def __iter__(self) -> Iterator[Pair]:
        """Begin again."""
        return iter(self._source())


class Holding:
    """The images that `holding_out` passes on, as often as their source can be iterated.

    Args:
        source: Gives all images.
        held: Is filled with those held out whenever all have been passed on.
        every: One sample in so many is held out.
    """

    def __init__(
        self, source: Callable[[], Iterable[Pair]], held: list[Pair], every: int = HELD_OUT_EVERY
    ) -> None:
        self._source = source
        self._held = held
        self._every = every

    def __iter__(self) -> Iterator[Pair]:
        """Pass images on."""
        held: list[Pair] = []
        yield from holding_out(self._source(), held, self._every)
        self._held[:] = held


def limited(held: list[Pair]) -> list[Pair]:
    """Return the first of them, enough for a choice.

    Raises:
        InvalidArgument: There are none.
    """
    if not held:
        raise InvalidArgument(
            f"damping: 'auto' (and recalibrate) hold one sample in {HELD_OUT_EVERY} out; takes "
            f"{HELD_OUT_EVERY} samples or more, or a number"
        )
    some: list[Pair] = []
    left = HELD_OUT_MOST
    for images, labels in held:
        if left > 0:
            some.append((images[:left], None if labels is None else labels[:left]))
            left -= images.shape[0]
    return some
