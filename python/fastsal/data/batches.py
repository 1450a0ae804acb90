"""What users iterate: pairs of images and labels, checked."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from fastsal.errors import DataError, InvalidArgument

Batches = Iterable[Any]
LabelUse = Literal["required", "optional", "ignored"]


class Source:
    """Images that were given, checked; as often as they can be iterated.

    Args:
        batches: As for `collect`.
        samples: Stop after so many.
        labels: Whether batches must have labels, may have them, or have them ignored.
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
        """The first batch; it is given again."""
        if self._first is None:
            checked = as_batches(self._batches, self._samples, self._labels)
            self._first = next(checked)
            if not self.repeats:
                self._checked = itertools.chain([self._first], checked)
        return self._first

    def __call__(self) -> Iterator[Pair]:
        """All batches."""
        if self._checked is not None:
            return self._checked
        return as_batches(self._batches, self._samples, self._labels)


def check_again(samples: int, again: int) -> None:
    """Raise DataError unless images that are gone over again are as many as before."""
    if again != samples:
        raise DataError(
            f"batches: gave {samples} samples, and {again} when they were iterated again; within "
            "memory_budget takes what gives the same images every time"
        )


def as_batches(
    batches: Batches, samples: int | None, labels: LabelUse = "required"
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Check what users iterate and stop after `samples`.

    Yields:
        Images `[n, ...]`, n >= 1, and labels `[n]` or None.

    Raises:
        DataError: No batch, something else than pairs, fewer samples than asked for.
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
        raise DataError("batches: is empty; takes at least one batch of (images, labels)")
    if samples is not None:
        raise DataError(f"samples: asked for {samples}, but batches gave {total}")


def check_samples(samples: int | None) -> None:
    """Raise InvalidArgument unless `samples` is 1 or more, or None."""
    if samples is not None and samples < 1:
        raise InvalidArgument(f"samples: got {samples}; takes 1 or more, or None for all")


def _unpack(batch: Any, number: int, labels: LabelUse) -> tuple[Tensor, Tensor | None]:
    if labels != "required":
        if isinstance(batch, Tensor):
            batch = (batch, None)
        elif isinstance(batch, (tuple, list)) and len(batch) == 1:  # as a TensorDataset gives
            batch = (batch[0], None)
    if not (isinstance(batch, (tuple, list)) and len(batch) == 2):
        raise DataError(
            f"batches: batch {number} is {type(batch).__name__}; takes pairs (images, labels)"
        )
    images, targets = batch
    if not isinstance(images, Tensor) or images.dim() < 1 or images.shape[0] == 0:
        raise DataError(
            f"batches: batch {number} has no images; takes tensors [n, C, H, W], or tokens "
            "[n, L], n >= 1"
        )
    if labels == "ignored" and not isinstance(targets, Tensor):
        targets = None  # whatever it is, it is not used
    if targets is not None:
        try:
            targets = torch.as_tensor(targets)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"labels: batch {number} has no tensor of labels: {error}") from error
        if targets.dim() == 0 or targets.shape[0] != images.shape[0]:
            raise DataError(
                f"labels: batch {number} has {list(targets.shape)} for {images.shape[0]} images; "
                "takes one an image"
            )
    return images, targets


def in_micro_batches(pairs: Iterable[Pair], size: int, step: int) -> Iterator[Pair]:
    """Cut and join batches to micro-batches of one size, none of which lies across two steps.

    So a sample is in the same step, and as a rule in a full micro-batch, whatever batches it came
    in. Images of another shape than those before them are not joined with them.
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
    """One batch of both; None where they do not fit together."""
    (a, x), (b, y) = first, second
    if a.shape[1:] != b.shape[1:] or a.dtype != b.dtype or a.device != b.device:
        return None
    if x is None or y is None:
        return None if x is not y else (torch.cat([a, b]), None)
    if x.shape[1:] != y.shape[1:] or x.dtype != y.dtype or x.device != y.device:
        return None
    return torch.cat([a, b]), torch.cat([x, y])


Pair = tuple[Tensor, Tensor | None]
