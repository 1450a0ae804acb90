"""Accuracy: of a model's own classifier, and of a backbone with the frozen heads of tasks.

Axes: n images, k classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsal.errors import DataError, InvalidArgument
from fastsal.transfer.features import evaluating, features
from fastsal.transfer.heads import Head
from fastsal.transfer.tasks import Task, as_tasks, batches_of

Report = Callable[[int, int | None], None]


class Measurement(NamedTuple):
    """Top-1 accuracy (0 to 1), mean cross-entropy in nats, and the number of images."""

    accuracy: float
    loss: float
    samples: int


def evaluate(
    model: nn.Module,
    tasks: Task | Iterable[Task],
    heads: Mapping[str, Head],
    *,
    batch_size: int = 64,
) -> dict[str, float]:
    """Measure a backbone on the test images of tasks, through heads that stay as they are.

    Args:
        model: the backbone, dense or pruned; left as found.
        tasks: one or more tasks.
        heads: `{task name: head}` from `fit_heads`.
        batch_size: images a forward pass.

    Returns:
        `{task name: top-1 accuracy, 0 to 1}`. Outputs that are not finite count as wrong.

    Raises:
        InvalidArgument: a task without a head, or a head of another number of features.
        DataError: no test images, or labels outside the head's classes.
    """
    found = as_tasks(tasks)
    absent = [task.name for task in found if task.name not in heads]
    if absent:
        raise InvalidArgument(f"heads: none for {absent}; there are heads for {sorted(heads)}")
    accuracies = {}
    with evaluating(model) as device:
        for task in found:
            head = heads[task.name]
            right = count = 0
            for images, labels in batches_of(task.test, head.spec, batch_size):
                x = features(model, images.to(device))
                if x.shape[1] != head.weight.shape[1]:
                    raise InvalidArgument(
                        f"heads: the head of {task.name!r} takes {head.weight.shape[1]} features; "
                        f"the model gives {x.shape[1]}"
                    )
                right += _right(head(x).cpu(), _checked(labels, len(head.bias)))
                count += len(labels)
            if not count:
                raise DataError(f"tasks: {task.name!r} has no test images")
            accuracies[task.name] = right / count
    return accuracies


def measure(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    report: Report | None = None,
) -> Measurement:
    """Measure `model` with its own classifier.

    Args:
        model: maps images `[n, c, h, w]` to logits `[n, k]`; left as found.
        batches: `(images, labels [n])`.
        report: called with the number of images done and the number in all, where known.

    Returns:
        Accuracy, loss and number of images. Logits that are not finite count as wrong.

    Raises:
        DataError: no images, logits of another shape, or labels outside `0 .. k - 1`.
    """
    right = count = 0
    loss = 0.0
    total = getattr(batches, "samples", None)
    with evaluating(model) as device, torch.no_grad():
        for images, labels in batches:
            logits = model(images.to(device))
            if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(labels):
                came = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                raise DataError(
                    f"model: gave {came} for {len(labels)} labels; takes logits [n, classes]"
                )
            scores, y = logits.double().cpu(), _checked(labels, logits.shape[1])
            right += _right(scores, y)
            loss += float(F.cross_entropy(scores, y, reduction="sum"))
            count += len(y)
            if report:
                report(count, total)
    if not count:
        raise DataError("batches: no images")
    return Measurement(right / count, loss / count, count)


def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the top-1 accuracy, 0 to 1, of `model` with its own classifier; see `measure`."""
    return measure(model, batches).accuracy


def _right(logits: Tensor, labels: Tensor) -> int:
    finite = torch.isfinite(logits).all(dim=1)
    return int(((logits.argmax(dim=1) == labels) & finite).sum())


def _checked(labels: Tensor, classes: int) -> Tensor:
    labels = labels.long().cpu()
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(
            f"labels: {low if low < 0 else high} is out of range; the model has {classes} "
            f"classes, 0 to {classes - 1}"
        )
    return labels
