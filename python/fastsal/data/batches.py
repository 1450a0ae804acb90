"""Validation of user-supplied `(images, labels)` batches."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, overload

import torch
from torch import Tensor

from fastsal.data.class_order import class_order_note, in_class_order, largest_size
from fastsal.data.stream_digest import StreamDigest
from fastsal.data.unpacking import LabelUse, unpack
from fastsal.errors import DataError
from fastsal.utils.numbers import whole
from fastsal.utils.warn import warn_user

Batches = Iterable[Any]  # of (images [n, ...], labels [n]), see `unpacking.unpack`
Pair = tuple[Tensor, Tensor | None]  # images [n, ...] and labels [n], or None


class Source:
    """Validated batches; every call iterates over them again, if the iterable allows it.

    The first complete pass warns of samples that are the first ones in the order of their classes.
    Later passes must yield the same images and labels.

    Args:
        batches: Iterable of `(images, labels)`, see `as_batches`.
        samples: Number of samples after which iteration stops; None for all.
        labels: Whether labels are required, optional or ignored.
        name: Name of the argument that `batches` came from, for messages.

    Attributes:
        repeats: Whether `batches` can be iterated more than once.
        seen: Digest of the first complete pass; None before it.
    """

    def __init__(
        self,
        batches: Batches,
        samples: int | None,
        labels: LabelUse = "required",
        name: str = "batches",
    ) -> None:
        self._batches = batches
        self._name = name
        self._samples = samples
        self._labels = labels
        self._first: Pair | None = None
        self._checked: Iterator[Pair] | None = None
        self.repeats = not isinstance(batches, Iterator)
        self.seen: StreamDigest | None = None

    def first(self) -> Pair:
        """Return the first batch; the next call yields it again."""
        if self._first is None:
            checked = as_batches(self._batches, self._samples, self._labels)
            self._first = next(checked)
            if not self.repeats:
                self._checked = itertools.chain([self._first], checked)
        return self._first

    def __call__(self) -> Iterator[Pair]:
        """Iterate over all batches.

        Raises:
            DataError: The pass is complete, and its images or labels are not those of the first.
        """
        if self._checked is not None:
            return self._watched(self._checked)
        return self._watched(as_batches(self._batches, self._samples, self._labels))

    def __iter__(self) -> Iterator[Pair]:
        """Iterate over all batches."""
        return self()

    def _watched(self, pairs: Iterator[Pair]) -> Iterator[Pair]:
        digest, labels = StreamDigest(), _Labels()
        for images, targets in pairs:
            digest.add(images, targets)
            if self.seen is None and self._samples is not None:
                labels.add(targets)
            yield images, targets
        if self.seen is None:
            self.seen = digest
            size = largest_size(self._batches)
            if self._samples is not None and size is not None and size > self._samples:
                labels.warn(size, is_real=self._labels != "ignored")
            return
        check_again(self.seen.samples, digest.samples, self._name)
        if digest.value() != self.seen.value():
            raise _others(self._name, "others on a later pass")


def check_again(samples: int, again: int, name: str = "batches") -> None:
    """Raise DataError unless a repeated pass yields as many samples as the first one."""
    if again != samples:
        raise _others(name, f"{samples} samples, then {again}")


def _others(name: str, got: str) -> DataError:
    return DataError(
        f"{name} must yield the same images on every pass over them, got {got}; set shuffle=False, "
        "or seed the shuffle again for each pass, and turn random augmentation off; or choose "
        "samples and memory_budget such that one pass is enough"
    )


class _Labels:
    """The labels of a pass, if all are class numbers `[n]`."""

    def __init__(self) -> None:
        self._found: list[Tensor] | None = []

    def add(self, labels: Tensor | None) -> None:
        """Add the labels of a batch."""
        if labels is None or labels.dim() != 1 or labels.is_floating_point():
            self._found = None
        elif self._found is not None:
            self._found.append(labels.cpu())

    def warn(self, size: int, *, is_real: bool) -> None:
        """Warn if they are the first ones of `size` samples in the order of their classes.

        Args:
            size: Number of samples of the source.
            is_real: Whether the labels are used. Others may be placeholders, all equal.
        """
        labels = torch.cat(self._found).numpy() if self._found else None
        if labels is None or not in_class_order(labels):
            return
        classes = len(set(labels.tolist()))
        if classes > 1 or is_real:
            first = f"samples: the first {len(labels):,} of {size:,} samples of batches"
            warn_user(class_order_note(first, classes))


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


@overload
def first_images(batches: Batches, samples: int | None = None) -> tuple[Tensor, Batches]: ...


@overload
def first_images(batches: None, samples: int | None = None) -> tuple[None, None]: ...


def first_images(
    batches: Batches | None, samples: int | None = None
) -> tuple[Tensor | None, Batches | None]:
    """Return the images of the first batch, and batches that still include them.

    Only the first image, if a number of samples is given.
    """
    if batches is None:
        return None, None
    own = getattr(batches, "first_batch", None)  # without the processes that read further ones
    with torch.random.fork_rng(devices=[]):  # a shuffling loader draws its order
        first = [own()] if callable(own) else list(itertools.islice(batches, 1))
    most = None if samples is None else 1
    images = next(as_batches(first, most, "ignored"))[0]
    again = itertools.chain(first, batches) if isinstance(batches, Iterator) else batches
    return images, again


def has_labels(batches: Batches) -> tuple[bool, Batches]:
    """Tell whether the first batch has labels; return batches that still include it.

    Batches of another form count as labeled: what is wrong with them is told where they are used.
    """
    with torch.random.fork_rng(devices=[]):  # a shuffling loader draws its order
        first = list(itertools.islice(batches, 1))
    again = itertools.chain(first, batches) if isinstance(batches, Iterator) else batches
    try:
        return all(unpack(batch, 0, "optional")[1] is not None for batch in first), again
    except DataError:
        return True, again


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
    total = held = 0
    rest: list[Pair] = []  # joined once, not at every batch: batches may be of single images
    for pair in pairs:
        if rest and not _can_join(rest[0], pair):
            yield _joined(rest)
            total, held, rest = total + held, 0, []
        rest.append(pair)
        held += len(pair[0])
        while held >= (wanted := min(size, step - total % step)):
            joined = _joined(rest)
            yield _slice(joined, 0, wanted)
            total, held = total + wanted, held - wanted
            rest = [_slice(joined, wanted, None)] if held else []
    if rest:
        yield _joined(rest)


def without_single_images(pairs: Iterable[Pair]) -> Iterator[Pair]:
    """Join a batch of one image to the batch before it, if that has more than one.

    Batch normalization in training mode has no variance of a single image to normalize by.
    """
    waiting: Pair | None = None
    for pair in pairs:
        joined: Pair | None = None
        if waiting is not None:
            is_single = len(pair[0]) == 1 < len(waiting[0])
            joined = _joined([waiting, pair]) if is_single and _can_join(waiting, pair) else None
            if joined is None:
                yield waiting
        waiting = pair if joined is None else joined
    if waiting is not None:
        yield waiting


def _slice(pair: Pair, start: int, stop: int | None) -> Pair:
    images, labels = pair
    return images[start:stop], None if labels is None else labels[start:stop]


def _can_join(first: Pair, second: Pair) -> bool:
    """Whether two batches have the same form."""
    return all(
        a is b if a is None or b is None else _form(a) == _form(b)
        for a, b in zip(first, second, strict=True)
    )


def _form(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape[1:], tensor.dtype, tensor.device


def _joined(pairs: list[Pair]) -> Pair:
    """Return the concatenation of batches of the same form."""
    if len(pairs) == 1:
        return pairs[0]
    labels = [labels for _, labels in pairs if labels is not None]
    return torch.cat([images for images, _ in pairs]), torch.cat(labels) if labels else None
