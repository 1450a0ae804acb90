"""Validation of user-supplied `(images, labels)` batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from fastsal.errors import DataError
from fastsal.utils.numbers import whole

Batches = Iterable[Any]  # of (images [n, ...], labels [n]), see `as_batches`
Pair = tuple[Tensor, Tensor | None]  # images [n, ...] and labels [n], or None
LabelUse = Literal["required", "optional", "ignored"]


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
        batches: Iterable of `(images, labels)`; of images alone, unless labels are required.
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
        images, targets = _unpack(batch, number, labels)
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


def first_images(batches: Batches) -> tuple[Tensor, Batches]:
    """Return the images of the first batch, and batches that still include them."""
    with torch.random.fork_rng(devices=[]):  # a shuffling loader draws its order
        first = list(itertools.islice(batches, 1))
    images = next(as_batches(first, None, "ignored"))[0]
    again = itertools.chain(first, batches) if isinstance(batches, Iterator) else batches
    return images, again


def check_samples(samples: int | None) -> int | None:
    """Return `samples` as an `int` of at least 1, or None for all samples."""
    return None if samples is None else whole("samples", samples, 1)


def _unpack(batch: Any, number: int, labels: LabelUse) -> tuple[Tensor, Tensor | None]:
    if labels != "required":
        if isinstance(batch, Tensor):
            batch = (batch, None)
        elif isinstance(batch, (tuple, list)) and len(batch) == 1:  # as of a TensorDataset
            batch = (batch[0], None)
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        raise DataError(
            f"batches: batch {number} must be a pair (images, labels), got {_shown(batch)}"
        )
    images, targets = batch
    if not isinstance(images, Tensor) or images.dim() < 1 or images.shape[0] == 0:
        raise DataError(
            f"batches: batch {number} must have a tensor of images [n, C, H, W], or of token ids "
            f"[n, L], with n >= 1, got {_shown(images)}"
        )
    if labels == "ignored" and not isinstance(targets, Tensor):
        targets = None  # unused, so that any object is accepted
    if targets is not None:
        try:
            targets = torch.as_tensor(targets)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"labels: batch {number} must have a tensor of labels, got {_shown(targets)} "
                f"({error})"
            ) from error
        if targets.dim() == 0 or targets.shape[0] != images.shape[0]:
            raise DataError(
                f"labels: batch {number} must have one label per image, got labels "
                f"{list(targets.shape)} for {images.shape[0]} images"
            )
    return images, targets


def _shown(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return f"{type(value).__name__} of length {len(value)}"
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    return type(value).__name__


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


def without_single_images(pairs: Iterable[Pair]) -> Iterator[Pair]:
    """Join a batch of one image to the batch before it, if that has more than one.

    Batch normalization in training mode has no variance of a single image to normalize by.
    """
    waiting: Pair | None = None
    for pair in pairs:
        joined: Pair | None = None
        if waiting is not None:
            is_single = len(pair[0]) == 1 < len(waiting[0])
            joined = _joined(waiting, pair) if is_single else None
            if joined is None:
                yield waiting
        waiting = pair if joined is None else joined
    if waiting is not None:
        yield waiting


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
