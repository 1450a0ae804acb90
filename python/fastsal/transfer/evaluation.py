"""Accuracy of a model with its own classifier, and of a backbone with the frozen heads of tasks.

Axes: n images, k classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsal.data.image_set import ImageSet
from fastsal.data.numbering import LossSign, check_labels_of
from fastsal.data.unpacking import BatchRule, ruled, unpacked
from fastsal.errors import DataError, InvalidArgument
from fastsal.models.classifier import using_head
from fastsal.models.classifier_signs import check_classifier
from fastsal.models.evaluating import evaluating
from fastsal.models.features import features
from fastsal.models.outputs import output_tensor
from fastsal.models.placing import autocasting, on_device
from fastsal.transfer.heads import AnyHead
from fastsal.transfer.own import OwnHead
from fastsal.transfer.tasks import Split, Task, as_tasks, batches_of
from fastsal.utils.float64 import in_float64
from fastsal.utils.progress import Report


class Measurement(NamedTuple):
    """Top-1 accuracy, loss and number of images of a model.

    An image with non-finite logits counts as wrong and makes the loss infinite.

    Attributes:
        accuracy: Top-1 accuracy, 0 to 1.
        loss: Mean cross-entropy, in nats.
        samples: Number of images.
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
    head: str | Sequence[str] | None = None,
    device: str | torch.device | None = None,
    autocast: torch.dtype | None = None,
) -> dict[str, float]:
    """Measure the accuracy of a backbone on the test images of tasks, through frozen heads.

    Args:
        model: Backbone, dense or pruned; it is not changed.
        tasks: One or more tasks.
        heads: `{task name: head}` from `fit_heads`.
        batch_size: Images per forward pass.
        head: As for `fit_heads`.
        device: Device of the forward passes, such as `"cuda"` or `"auto"`; afterwards the model is
            where it was. None: where the model is.
        autocast: dtype of the forward passes under `torch.autocast`; None disables it.

    Returns:
        `{task name: top-1 accuracy, 0 to 1}`. Images with non-finite outputs count as wrong.

    Raises:
        InvalidArgument: A task has no head, a head expects another number of features, or this
            machine has no such device.
        DataError: A task has no test images, or labels outside the classes of its head.
    """
    with using_head(model, head), on_device(model, device):
        found = measure_tasks(model, tasks, heads, batch_size=batch_size, autocast=autocast)
    return {name: measurement.accuracy for name, measurement in found.items()}


def measure_tasks(
    model: nn.Module,
    tasks: Task | Iterable[Task],
    heads: Mapping[str, AnyHead],
    *,
    batch_size: int = 64,
    report: Report | None = None,
    autocast: torch.dtype | None = None,
) -> dict[str, Measurement]:
    """Measure accuracy and loss of a backbone on tasks, in one pass over the images.

    Tasks with the same test images and the same preprocessing share the forward passes.

    Args:
        model: Backbone, dense or pruned; it is not changed.
        tasks: One or more tasks.
        heads: `{task name: head}` from `fit_heads`.
        batch_size: Images per forward pass.
        report: Callback with the number of images done and the total, None if unknown.
        autocast: dtype of the forward passes under `torch.autocast`; None disables it.

    Returns:
        `{task name: accuracy, loss and number of images}`. The loss is the cross-entropy of
        `head.scale` times the outputs of the head.

    Raises:
        InvalidArgument: A task has no head, or a head expects another number of features.
        DataError: A task has no test images, or labels outside the classes of its head.
    """
    found = as_tasks(tasks)
    absent = [task.name for task in found if task.name not in heads]
    if absent:
        raise InvalidArgument(
            f"heads must have one head per task, got none for {absent} (heads: {sorted(heads)})"
        )
    tallies = {task.name: _Tally() for task in found}
    groups = _groups(found, heads)
    total = _total(groups)
    done = 0
    with evaluating(model) as device, torch.no_grad():
        placed = {task.name: heads[task.name].to(device) for task in found}
        for group in groups:
            begin = 0
            first = group[0]
            spec = heads[first.name].spec
            for images, given in batches_of(first.test, spec, batch_size, first.batch):
                x = images.to(device)
                seen: dict[bool, Tensor] = {}
                for task in group:
                    head = placed[task.name]
                    is_own = isinstance(head, OwnHead)
                    if is_own not in seen:
                        with autocasting(device, autocast):
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
            raise DataError(f"task {name!r} has no test images")
    return {name: tally.measurement() for name, tally in tallies.items()}


def measure(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    report: Report | None = None,
    checks_labels: bool = False,
    batch: BatchRule | None = None,
    autocast: torch.dtype | None = None,
) -> Measurement:
    """Measure accuracy and loss of `model` with its own classifier.

    A warning is given for labels that are not numbered as the outputs of the model, and for a model
    without a classifier or with a random one.

    Args:
        model: Maps images `[n, c, h, w]` to logits `[n, k]`, or to a dict or tuple that contains
            them; it is not changed.
        batches: Iterable of `(images [n, c, h, w], labels [n])`, or of dicts of them as for
            `fastsal.collect`.
        report: Callback with the number of images done and the total, None if unknown.
        checks_labels: Whether a loss worse than guessing gives a warning too, as it should if the
            model is not pruned.
        batch: Function from a batch to `(images, labels)`, for batches of another form.
        autocast: dtype of the forward passes under `torch.autocast`; None disables it.

    Returns:
        Accuracy, loss and number of images. Images with non-finite logits count as wrong.

    Raises:
        DataError: There are no images, the logits have another shape, or a label is outside
            `0 .. k - 1`.
    """
    tally = _Tally(LossSign() if checks_labels else None)
    total = getattr(batches, "samples", None)
    check_labels_of(batches, model)
    with evaluating(model) as device, torch.no_grad():
        for images, labels in unpacked(ruled(batches, batch)):
            if not tally.count and check_classifier(model, "accuracy", images):
                tally.sign = None  # the loss of features means nothing
            with autocasting(device, autocast):
                logits = _logits(model, images.to(device))
            tally.add(logits, labels)
            if report:
                report(tally.count, total)
    if not tally.count:
        raise DataError("batches must hold at least one image")
    if tally.sign is not None:
        tally.sign.warn()
    return tally.measurement()


def accuracy(model: nn.Module, batches: Iterable[Any], *, batch: BatchRule | None = None) -> float:
    """Return the top-1 accuracy, 0 to 1, of `model` with its own classifier.

    See `measure` for arguments and errors.
    """
    return measure(model, batches, batch=batch).accuracy


@dataclass
class _Tally:
    """Running sums over batches; `sign` compares the loss with that of guessing."""

    sign: LossSign | None = None
    right: int = 0
    count: int = 0
    loss: float = 0.0

    def add(self, logits: Tensor, labels: Tensor, scale: float = 1.0) -> None:
        scores = in_float64(logits).cpu()
        y = _checked(labels, scores.shape[1])
        finite = torch.isfinite(scores).all(dim=1)
        self.right += int(((scores.argmax(dim=1) == y) & finite).sum())
        losses = F.cross_entropy(scale * scores, y, reduction="none")
        if self.sign is not None:
            self.sign.add(losses[finite].tolist(), scores.shape[1])
        self.loss += float(losses.masked_fill(~finite, torch.inf).sum())
        self.count += len(y)

    def measurement(self) -> Measurement:
        return Measurement(self.right / self.count, self.loss / self.count, self.count)


def _groups(tasks: list[Task], heads: Mapping[str, AnyHead]) -> list[list[Task]]:
    """Group tasks that have the same test images in the same order, and the same preprocessing."""
    groups: list[list[Task]] = []
    for task in tasks:
        spec = heads[task.name].spec
        for group in groups:
            first = group[0]
            is_alike = heads[first.name].spec == spec and first.batch is task.batch
            if is_alike and _is_same(first.test, task.test):
                group.append(task)
                break
        else:
            groups.append([task])
    return groups


def _is_same(a: Split, b: Split) -> bool:
    if a is b:
        return True
    if not isinstance(a, ImageSet) or not isinstance(b, ImageSet) or a.source != b.source:
        return False
    # Images with equal indices may have been processed differently, so pixels are compared too.
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
    logits = output_tensor(model(images), what="logits [n, classes]")
    if logits.ndim != 2 or len(logits) != len(images):
        raise DataError(
            f"outputs of the model must be logits [n, classes], got {list(logits.shape)} for "
            f"{len(images)} labels"
        )
    return logits


def _outputs(head: AnyHead, x: Tensor) -> Tensor:
    if not isinstance(head, OwnHead) and x.shape[1] != head.features:
        raise InvalidArgument(
            f"the model must have {head.features} features for the head of task {head.task!r}, "
            f"got {x.shape[1]}"
        )
    return head(x)


def _checked(labels: Tensor, classes: int) -> Tensor:
    labels = labels.long().cpu()
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(
            f"labels must be in 0 .. {classes - 1} for outputs of {classes} classes, got "
            f"{low if low < 0 else high}"
        )
    return labels
