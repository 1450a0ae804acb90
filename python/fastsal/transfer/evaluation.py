"""Accuracy: of a model's own classifier, and of a backbone with the frozen heads of tasks.

Axes: n images, k classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsal.data.image_set import ImageSet
from fastsal.errors import DataError, InvalidArgument
from fastsal.models.evaluating import evaluating
from fastsal.models.features import features
from fastsal.transfer.heads import AnyHead
from fastsal.transfer.own import OwnHead
from fastsal.transfer.tasks import Part, Task, as_tasks, batches_of

Report = Callable[[int, int | None], None]


class Measurement(NamedTuple):
    """Top-1 accuracy (0 to 1), mean cross-entropy in nats, and the number of images.

    An image whose logits are not finite is wrong, and makes the loss infinite.
    """

    accuracy: float
    loss: float
    samples: int


def evaluate(
    model: nn.Module,
    tasks: Task | Iterable[Task],
    heads: Mapping[str, AnyHead],
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
    found = measure_tasks(model, tasks, heads, batch_size=batch_size)
    return {name: measurement.accuracy for name, measurement in found.items()}


def measure_tasks(
    model: nn.Module,
    tasks: Task | Iterable[Task],
    heads: Mapping[str, AnyHead],
    *,
    batch_size: int = 64,
    report: Report | None = None,
) -> dict[str, Measurement]:
    """Measure accuracy and loss of a backbone on tasks, in one pass over the images.

    Tasks with the same test images, prepared the same way, share the forward passes.

    Args:
        model: the backbone, dense or pruned; left as found.
        tasks: one or more tasks.
        heads: `{task name: head}` from `fit_heads`.
        batch_size: images a forward pass.
        report: called with the number of images done and the number in all, where known.

    Returns:
        `{task name: accuracy, loss and number of images}`. The loss is the cross-entropy of
        `head.scale` times the head's outputs.

    Raises:
        InvalidArgument: a task without a head, or a head of another number of features.
        DataError: no test images, or labels outside the head's classes.
    """
    found = as_tasks(tasks)
    absent = [task.name for task in found if task.name not in heads]
    if absent:
        raise InvalidArgument(f"heads: none for {absent}; there are heads for {sorted(heads)}")
    tallies = {task.name: _Tally() for task in found}
    groups = _groups(found, heads)
    total = _total(groups)
    done = 0
    with evaluating(model) as device, torch.no_grad():
        placed = {task.name: heads[task.name].to(device) for task in found}
        for group in groups:
            begin = 0
            first = group[0]
            for images, given in batches_of(first.test, heads[first.name].spec, batch_size):
                x = images.to(device)
                seen: dict[bool, Tensor] = {}
                for task in group:
                    head = placed[task.name]
                    is_own = isinstance(head, OwnHead)
                    if is_own not in seen:
                        seen[is_own] = _logits(model, x) if is_own else features(model, x)
                    labels = given
                    if isinstance(task.test, ImageSet):
                        labels = torch.from_numpy(task.test.y[begin : begin + len(given)])
                    outputs = _outputs(head, seen[is_own])
                    tallies[task.name].add(outputs, labels, head.scale)
                begin += len(given)
                done += len(given)
                if report:
                    report(done, total)
    for name, tally in tallies.items():
        if not tally.count:
            raise DataError(f"tasks: {name!r} has no test images")
    return {name: tally.measurement() for name, tally in tallies.items()}


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
    tally = _Tally()
    total = getattr(batches, "samples", None)
    with evaluating(model) as device, torch.no_grad():
        for images, labels in batches:
            logits = _logits(model, images.to(device))
            if len(logits) != len(labels):
                raise DataError(
                    f"model: gave {list(logits.shape)} for {len(labels)} labels; takes logits "
                    "[n, classes]"
                )
            tally.add(logits, labels)
            if report:
                report(tally.count, total)
    if not tally.count:
        raise DataError("batches: no images")
    return tally.measurement()


def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Return the top-1 accuracy, 0 to 1, of `model` with its own classifier; see `measure`."""
    return measure(model, batches).accuracy


@dataclass
class _Tally:
    """Sums over batches."""

    right: int = 0
    count: int = 0
    loss: float = 0.0

    def add(self, logits: Tensor, labels: Tensor, scale: float = 1.0) -> None:
        scores = logits.double().cpu()
        y = _checked(labels, scores.shape[1])
        finite = torch.isfinite(scores).all(dim=1)
        self.right += int(((scores.argmax(dim=1) == y) & finite).sum())
        losses = F.cross_entropy(scale * scores, y, reduction="none")
        self.loss += float(losses.masked_fill(~finite, torch.inf).sum())
        self.count += len(y)

    def measurement(self) -> Measurement:
        return Measurement(self.right / self.count, self.loss / self.count, self.count)


def _groups(tasks: list[Task], heads: Mapping[str, AnyHead]) -> list[list[Task]]:
    """Group tasks whose test images, prepared the same way, are the same in the same order."""
    groups: list[list[Task]] = []
    for task in tasks:
        spec = heads[task.name].spec
        for group in groups:
            if heads[group[0].name].spec == spec and _is_same(group[0].test, task.test):
                group.append(task)
                break
        else:
            groups.append([task])
    return groups


def _is_same(a: Part, b: Part) -> bool:
    if a is b:
        return True
    if not isinstance(a, ImageSet) or not isinstance(b, ImageSet) or a.source != b.source:
        return False
    # What was done to the pixels of one source may differ, so places alone do not tell.
    if not np.array_equal(a.index, b.index):
        return False
    if isinstance(a.x, tuple) or isinstance(b.x, tuple):
        return a.x == b.x if isinstance(a.x, tuple) and isinstance(b.x, tuple) else False
    return np.array_equal(a.x, b.x)


def _total(groups: list[list[Task]]) -> int | None:
    tests = [group[0].test for group in groups]
    counts = [len(test) for test in tests if isinstance(test, ImageSet)]
    return sum(counts) if len(counts) == len(tests) else None


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    logits = model(images)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        came = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise DataError(f"model: gave {came} for {len(images)} labels; takes logits [n, classes]")
    return logits


def _outputs(head: AnyHead, x: Tensor) -> Tensor:
    if not isinstance(head, OwnHead) and x.shape[1] != head.features:
        raise InvalidArgument(
            f"heads: the head of {head.task!r} takes {head.features} features; "
            f"the model gives {x.shape[1]}"
        )
    return head(x)


def _checked(labels: Tensor, classes: int) -> Tensor:
    labels = labels.long().cpu()
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(
            f"labels: {low if low < 0 else high} is out of range; the model has {classes} "
            f"classes, 0 to {classes - 1}"
        )
    return labels
