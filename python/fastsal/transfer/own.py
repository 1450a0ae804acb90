"""The head of a task that is the classifier which the model came with.

Axes: n images, k classes of the task.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastsal.data.image_set import ImageSet
from fastsal.errors import InvalidArgument
from fastsal.models.classifier import class_count
from fastsal.models.inputs import InputSpec
from fastsal.transfer.tasks import Task

Columns = Mapping[str, int] | Sequence[str]


@dataclass(frozen=True, eq=False)
class OwnHead:
    """A marker: the task is measured with the logits of the model itself.

    Attributes:
        task: the task's name.
        classes: the names of the classes; empty where they cannot be known.
        spec: how the images are prepared.
        columns: which logits are those of the task's classes, in their order; the argmax is among
            these. None takes all.
        scale: what logits are multiplied by where a softmax follows.
    """

    task: str
    classes: tuple[str, ...]
    spec: InputSpec
    columns: tuple[int, ...] | None = None
    scale: float = 1.0

    def __call__(self, logits: Tensor) -> Tensor:
        """Choose the task's columns of the model's logits `[n, outputs]`: float64 `[n, k]`.

        Raises:
            InvalidArgument: the model does not put out the logits of all classes.
        """
        n = logits.shape[1]
        wanted = self.columns
        if wanted is not None and max(wanted) >= n:
            raise InvalidArgument(
                f"columns: the own head of {self.task!r} takes logit {max(wanted)}; the model puts "
                f"out {n}, 0 to {n - 1}"
            )
        if wanted is None and self.classes and len(self.classes) != n:
            raise InvalidArgument(
                f"columns: task {self.task!r} has {len(self.classes)} classes and the model puts "
                f"out {n}; say which are whose"
            )
        return (logits if wanted is None else logits[:, list(wanted)]).double()

    def to(self, _device: torch.device) -> OwnHead:
        """Return itself: it holds no tensors."""
        return self


def own_head(
    model: nn.Module, task: Task, spec: InputSpec, columns: Columns | None = None
) -> OwnHead:
    """Say which logits of a model are those of a task's classes.

    Args:
        model: with a classifier.
        task: whose classes are looked up.
        spec: how images are prepared.
        columns: the names of all the model's classes, in the order of its logits, or
            `{class: logit}`. With None, classes whose names are numbers of logits ("3", "5", "7")
            are these; others are the logits in order, if there are as many.

    Raises:
        InvalidArgument: the model has no classifier, or a class has no logit.
    """
    n = class_count(model)
    if getattr(model, "num_classes", None) == 0:
        raise InvalidArgument(
            f"kind: 'own' takes a model with a classifier; this {type(model).__name__} has none "
            "(num_classes is 0)"
        )
    images = task.test if isinstance(task.test, ImageSet) else task.fit
    classes = images.classes if isinstance(images, ImageSet) else ()
    if columns is None:
        return OwnHead(task.name, classes, spec, _columns_by_default(task.name, classes, n))
    if isinstance(columns, str):
        raise InvalidArgument(f"columns: got {columns!r}; takes names of classes, or a mapping")
    if not classes:
        raise InvalidArgument(
            f"columns: the classes of task {task.name!r} have no names to look up; takes an "
            "ImageSet, or None"
        )
    names = (
        dict(columns)
        if isinstance(columns, Mapping)
        else {name: i for i, name in enumerate(columns)}
    )
    if not isinstance(columns, Mapping) and len(names) != len(columns):
        raise InvalidArgument("columns: a class is named twice")
    absent = [name for name in classes if name not in names]
    if absent:
        raise InvalidArgument(
            f"columns: has no logit of class {absent[0]!r} of task {task.name!r}; it has "
            f"{', '.join(list(names)[:10])}{', ...' if len(names) > 10 else ''}"
        )
    chosen = tuple(int(names[name]) for name in classes)
    if min(chosen) < 0 or len(set(chosen)) != len(chosen) or (n and max(chosen) >= n):
        raise InvalidArgument(
            f"columns: task {task.name!r} gets logits {list(chosen)}; takes different ones"
            + (f", 0 to {n - 1}" if n else "")
        )
    return OwnHead(task.name, classes, spec, chosen)


def _columns_by_default(task: str, classes: Sequence[str], n: int | None) -> tuple[int, ...] | None:
    if not classes or n is None:
        return None
    if all(name.isdecimal() and name.isascii() and int(name) < n for name in classes):
        return tuple(int(name) for name in classes)
    if len(classes) != n:
        raise InvalidArgument(
            f"columns: task {task!r} has {len(classes)} classes and the model puts out {n}; give "
            "the names of the model's classes in the order of its logits, or {class: logit}"
        )
    return None
