"""Validation of user-supplied `(images, labels)` batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastsal.data.unpacking import LabelUse, unpack
from fastsal.errors import DataError
from fastsal.utils.numbers import whole

Batches = Iterable[Any]  # of (images [n, ...], labels [n]), see `unpacking.unpack`
Pair = tuple[Tensor, Tensor | None]  # images [n, ...] and labels [n], or None


class Source:
    """Validated batches; every call iterates over them again, if the iterable allows it.

    Args:
        batches: Iterable of `(images, labels)`, see `as_batches`.
        samples: Number of samples after which iteration stops; None for all.
        labels: Whether labels are required, optional or ignored.

    Attributes:
        repeats: Whether `batches` can be iterated more than once.
    """

    def __init__(
        self, batches: Batches, samples: int | None, labels: LabelUse = "required"
    ) -> None:
        self._batches = batches
        self._samples = samples
        self._labels = labels
        self._first: Pair | None = None
        self._checked: Iterator[Pair] | None = None
        self.repeats = not isinstance(batches, Iterator)

    def first(self) -> Pair:
        """Return the first batch; the next call yields it again."""
        if self._first is None:
            checked = as_batches(self._batches, self._samples, self._labels)
            self._first = next(checked)
            if not self.repeats:
                self._checked = itertools.chain([self._first], checked)
        return self._first

    def __call__(self) -> Iterator[Pair]:
        """Iterate over all batches."""
        if self._checked is not None:
            return self._checked
        return as_batches(self._batches, self._samples, self._labels)


def check_again(samples: int, again: int) -> None:
    """Raise DataError unless a repeated pass yields as many samples as the first one."""
    if again != samples:
        raise DataError(
            f"batches must yield the same images on every pass with memory_budget, got {samples} "
            f"samples, then {again}"
        )


def as_batches(
    batches: Batches, samples: int | None, labels: LabelUse = "required"
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Validate batches and stop after `samples`.

    Args:
        batches: Iterable of `(images, labels)`; of images alone, unless labels are required; or of
            dicts, see `unpacking.unpack`.
        samples: Number of samples to yield; the last batch is cut. None for all.
        labels: Whether labels are required, optional or ignored.

    Yields:
        Images `[n, ...]`, n >= 1, and labels `[n]` or None.

    Raises:
        DataError: There is no batch, a batch has another form, or there are fewer samples than
            requested.
    """
    total = 0
    for number, batch in enumerate(batches):
        images, targets = unpack(batch, number, labels)
        if samples is not None and total + images.shape[0] > samples:
            images = images[: samples - total]
            targets = None if targets is None else targets[: samples - total]
        total += images.shape[0]
        yield images, targets
        if total == samples:
            return
    if total == 0:
        raise DataError("batches must contain at least one batch of (images, labels), got none")
    if samples is not None:
        raise DataError(
            f"samples must be at most {total}, the number of samples in batches, got {samples}"
        )


def check_samples(samples: int | None) -> int | None:
    """Return `samples` as an `int` of at least 1, or None for all samples."""
    return None if samples is None else whole("samples", samples, 1)


def in_micro_batches(pairs: Iterable[Pair], size: int, step: int) -> Iterator[Pair]:
    """Regroup batches into micro-batches of one size that do not cross a multiple of `step`.

    The micro-batch of a sample then depends on its position only, not on the batches of the user.
    Images of different shapes are never joined, so that a micro-batch may be smaller.

    Args:
        pairs: Validated batches.
        size: Samples of a micro-batch.
        step: Samples of a step of accumulation.
    """
    total = 0
    rest: Pair | None = None
    for pair in pairs:
        joined = pair if rest is None else _joined(rest, pair)
        if joined is None and rest is not None:
            yield rest
            total += len(rest[0])
            joined = pair
        rest = joined
        while rest is not None and len(rest[0]) >= (wanted := min(size, step - total % step)):
            yield _slice(rest, 0, wanted)
            total += wanted
            rest = _slice(rest, wanted, None) if len(rest[0]) > wanted else None
    if rest is not None:
        yield rest


def _slice(pair: Pair, start: int, stop: int | None) -> Pair:
    images, labels = pair
    return images[start:stop], None if labels is None else labels[start:stop]


def _joined(first: Pair, second: Pair) -> Pair | None:
    """Return the concatenation of two batches, or None if they cannot be joined."""
    (a, x), (b, y) = first, second
    if a.shape[1:] != b.shape[1:] or a.dtype != b.dtype or a.device != b.device:
        return None
    if x is None or y is None:
        return None if x is not y else (torch.cat([a, b]), None)
    if x.shape[1:] != y.shape[1:] or x.dtype != y.dtype or x.device != y.device:
        return None
    return torch.cat([a, b]), torch.cat([x, y])
