"""Images and labels in a batch of the user: a pair, a dict, or what a rule returns."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from fastsal.errors import DataError, InvalidArgument
from fastsal.models.outputs import described

LabelUse = Literal["required", "optional", "ignored"]
BatchRule = Callable[[Any], Any]  # from a batch to (images [n, ...], labels [n])

# Names in batches that are dicts or have named fields.
IMAGE_NAMES = ("pixel_values", "image", "images", "x", "img", "imgs")
LABEL_NAMES = ("labels", "label", "y", "target", "targets")

_RULE = "pass batch=, a function from a batch to (images, labels)"


def ruled(batches: Any, rule: BatchRule | None) -> Any:
    """Return batches to which a rule is applied, for as many iterations as the batches allow.

    Args:
        batches: Iterable of anything, or None.
        rule: From a batch to `(images, labels)`; None returns the batches unchanged.

    Raises:
        InvalidArgument: `rule` is not a function.
    """
    if rule is None:
        return batches
    if not callable(rule):
        raise InvalidArgument(
            f"batch must be a function from a batch to (images, labels), got {rule!r:.80}"
        )
    if batches is None:
        return None
    return map(rule, batches) if isinstance(batches, Iterator) else _Ruled(batches, rule)


class _Ruled:
    """Batches to which a rule is applied in every iteration."""

    def __init__(self, batches: Iterable[Any], rule: BatchRule) -> None:
        self._batches = batches
        self._rule = rule
        self.samples = getattr(batches, "samples", None)

    def __iter__(self) -> Iterator[Any]:
        return map(self._rule, self._batches)

    def __length_hint__(self) -> int:
        return operator.length_hint(self._batches)


def unpacked(batches: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the images and the labels of batches that must have both.

    Raises:
        DataError: A batch has another form.
    """
    for number, batch in enumerate(batches):
        images, labels = unpack(batch, number, "required")
        if labels is None:
            raise DataError(f"labels: batch {number} must have a tensor of labels, got None")
        yield images, labels


def unpack(batch: Any, number: int, labels: LabelUse) -> tuple[Tensor, Tensor | None]:
    """Return the images and the labels of a batch.

    A batch is a pair `(images, labels)`, or a dict or named tuple whose names tell them
    (`IMAGE_NAMES`, `LABEL_NAMES`); its other entries are not used. Images alone are enough unless
    labels are required. If labels are ignored, so are all parts of a tuple after the first.

    Args:
        batch: The batch.
        number: Its number, for messages.
        labels: Whether labels are required, optional or ignored.

    Returns:
        Images `[n, ...]`, n >= 1, and labels `[n, ...]` or None.

    Raises:
        DataError: The batch has another form.
    """
    images, targets = _parts(batch, number, labels)
    if not isinstance(images, Tensor) or images.dim() < 1 or images.shape[0] == 0:
        raise DataError(
            f"batches: batch {number} must have a tensor of images [n, C, H, W], or of token ids "
            f"[n, L], with n >= 1, got {described(images)}"
        )
    if labels == "ignored" and not isinstance(targets, Tensor):
        targets = None  # unused, so that any object is accepted
    if targets is not None:
        try:
            # A tensor remains where it is, whatever the default device is.
            if not isinstance(targets, Tensor):
                targets = torch.as_tensor(targets, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(
                f"labels: batch {number} must have a tensor of labels, got {described(targets)} "
                f"({error})"
            ) from error
        if targets.dim() == 0 or targets.shape[0] != images.shape[0]:
            raise DataError(
                f"labels: batch {number} must have one label per image, got labels "
                f"{list(targets.shape)} for {images.shape[0]} images"
            )
    return images, targets


def _parts(batch: Any, number: int, labels: LabelUse) -> tuple[Any, Any]:
    named = batch._asdict() if hasattr(batch, "_asdict") else batch
    if isinstance(named, Mapping) and (
        not isinstance(batch, tuple) or _present(named, IMAGE_NAMES)
    ):
        return _named_parts(named, number, labels)
    parts = (batch,) if isinstance(batch, Tensor) else batch
    if isinstance(parts, (tuple, list)) and parts:
        if len(parts) == 2:
            return parts[0], parts[1]
        # One part as of a TensorDataset.
        if labels == "ignored" or (labels == "optional" and len(parts) == 1):
            return parts[0], None
    kind = "be a pair (images, labels)" if labels == "required" else "be images or a pair"
    raise DataError(f"batches: batch {number} must {kind}, got {described(batch)}; {_RULE}")


def _named_parts(batch: Mapping[Any, Any], number: int, labels: LabelUse) -> tuple[Any, Any]:
    images = _present(batch, IMAGE_NAMES)
    targets = _present(batch, LABEL_NAMES) if labels != "ignored" else []
    for what, names, known in (
        ("images", images, IMAGE_NAMES),
        ("labels", targets, LABEL_NAMES),
    ):
        is_missing = not names and (what == "images" or labels == "required")
        if is_missing or len(names) > 1:
            count = "no" if is_missing else "several"
            raise DataError(
                f"batches: batch {number} must have one entry of {what} ({', '.join(known)}), got "
                f"{count} in {described(batch)}; {_RULE}"
            )
    return batch[images[0]], batch[targets[0]] if targets else None


def _present(batch: Mapping[Any, Any], names: tuple[str, ...]) -> list[str]:
    return [name for name in names if batch.get(name) is not None]
