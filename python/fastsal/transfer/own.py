"""The classifier of the model as the head of a task.

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
from fastsal.models.classifier_signs import check_classifier
from fastsal.models.inputs import InputSpec
from fastsal.models.wrappers import unwrapped
from fastsal.transfer.tasks import Task
from fastsal.utils.float64 import in_float64
from fastsal.utils.suggestions import listed

Columns = Mapping[str, int] | Sequence[str]


@dataclass(frozen=True, eq=False, repr=False)
class OwnHead:
    """A head that selects the logits of a task from those of the model; it has no tensors.

    Attributes:
        task: Name of the task.
        classes: Names of the classes; empty if unknown.
        spec: Preprocessing of the images.
        columns: Indices of the logits of the task's classes, in their order; the argmax is taken
            over these. None selects all logits.
        scale: Factor on the logits before a softmax.
    """

    task: str
    classes: tuple[str, ...]
    spec: InputSpec
    columns: tuple[int, ...] | None = None
    scale: float = 1.0

    def __repr__(self) -> str:
        columns = "all" if self.columns is None else f"{len(self.columns)}"
        return f"OwnHead({self.task!r}, {columns} logits of the model)"

    def __call__(self, logits: Tensor) -> Tensor:
        """Select the logits of the task from those of the model, `[n, outputs]`.

        Returns:
            Float64 `[n, k]`.

        Raises:
            InvalidArgument: The model lacks the logit of a class.
        """
        n = logits.shape[1]
        wanted = self.columns
        if wanted is not None and max(wanted) >= n:
            raise InvalidArgument(
                f"columns of task {self.task!r} must be in [0, {n - 1}] for a model with {n} "
                f"logits, got {max(wanted)}"
            )
        if wanted is None and self.classes and len(self.classes) != n:
            raise InvalidArgument(
                f"columns must be given: task {self.task!r} has {len(self.classes)} classes and "
                f"the model {n} logits"
            )
        return in_float64(logits if wanted is None else logits[:, list(wanted)])

    def to(self, _device: torch.device) -> OwnHead:
        """Return the head itself, which has no tensors."""
        return self


def own_head(
    model: nn.Module, task: Task, spec: InputSpec, columns: Columns | None = None
) -> OwnHead:
    """Map the classes of a task to logits of a model.

    Args:
        model: Model with a classifier.
        task: Task with the classes to map.
        spec: Preprocessing of the images.
        columns: Names of all classes of the model in the order of its logits, or
            `{class: index of its logit}`. With None, classes with numbers as names ("3", "5", "7")
            are indices of logits, and other classes are all logits in order.

    Raises:
        InvalidArgument: The model has no classifier, or a class has no logit.
    """
    model = unwrapped(model)
    first = None
    if isinstance(task.fit, ImageSet):
        first = task.fit.batches(spec, 1, samples=1).first_batch()[0]
    n = class_count(model, first)
    if getattr(model, "num_classes", None) == 0:
        raise InvalidArgument(
            f"model must have a classifier for kind 'own', got a {type(model).__name__} with "
            "num_classes = 0"
        )
    images = task.test if isinstance(task.test, ImageSet) else task.fit
    classes = images.classes if isinstance(images, ImageSet) else ()
    check_classifier(model, "accuracy")
    if columns is None:
        return OwnHead(task.name, classes, spec, _columns_by_default(task.name, classes, n))
    if isinstance(columns, str):
        raise InvalidArgument(f"columns must be class names or a mapping, got {columns!r}")
    if not classes:
        raise InvalidArgument(
            f"columns must be None for task {task.name!r}: its classes have no names, as its "
            "images are not an ImageSet"
        )
    names = (
        dict(columns)
        if isinstance(columns, Mapping)
        else {name: i for i, name in enumerate(columns)}
    )
    if not isinstance(columns, Mapping) and len(names) != len(columns):
        raise InvalidArgument("columns must have distinct class names")
    absent = [name for name in classes if name not in names]
    if absent:
        raise InvalidArgument(
            f"columns must have a logit for class {absent[0]!r} of task {task.name!r}, got "
            f"{listed(list(names), 10)}"
        )
    chosen = tuple(int(names[name]) for name in classes)
    if min(chosen) < 0 or len(set(chosen)) != len(chosen) or (n and max(chosen) >= n):
        raise InvalidArgument(
            f"columns of task {task.name!r} must be distinct"
            + (f" and in [0, {n - 1}]" if n else " and at least 0")
            + f", got {list(chosen)}"
        )
    return OwnHead(task.name, classes, spec, chosen)


def _columns_by_default(task: str, classes: Sequence[str], n: int | None) -> tuple[int, ...] | None:
    if not classes or n is None:
        return None
    if all(name.isdecimal() and name.isascii() and int(name) < n for name in classes):
        return tuple(int(name) for name in classes)
    if len(classes) != n:
        raise InvalidArgument(
            f"columns must be given: task {task!r} has {len(classes)} classes and the model {n} "
            "logits; pass the class names of the model in the order of its logits, or "
            "{class: index of its logit}"
        )
    return None
