"""A task: a labelled image set with one part to fit a head on and one to test on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fastsal.data import ImageSet
from fastsal.errors import DataError, InvalidArgument
from fastsal.models import InputSpec

Part = ImageSet | Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Task:
    """A labelled image set, cut in two parts that share no image.

    A part is an `ImageSet`, or any iterable, run over more than once, of
    `(images [n, c, h, w], labels [n])`. That two sets of one source are disjoint is checked; that
    two iterables are is up to the caller.

    Attributes:
        name: the task's name.
        fit: images that the head is fitted on.
        test: images that accuracy is measured on.
    """

    name: str
    fit: Part
    test: Part

    def __post_init__(self) -> None:
        for what, part in (("fit", self.fit), ("test", self.test)):
            if iter_once(part):
                raise InvalidArgument(
                    f"{what}: got a {type(part).__name__}, which runs once; takes an ImageSet, "
                    "or an iterable that can be run over again"
                )
        if not (isinstance(self.fit, ImageSet) and isinstance(self.test, ImageSet)):
            return
        if self.fit.classes != self.test.classes:
            raise DataError(
                f"test: task {self.name!r} has classes {list(self.test.classes)} to test and "
                f"{list(self.fit.classes)} to fit"
            )
        if self.fit.source == self.test.source:
            shared = np.intersect1d(self.fit.index, self.test.index)
            if len(shared):
                raise DataError(
                    f"test: task {self.name!r} tests on {len(shared)} images that its head is "
                    f"fitted on (image {int(shared[0])} of {self.fit.source})"
                )

    @classmethod
    def split(cls, name: str, images: ImageSet, *, fit: float = 0.5, seed: int = 0) -> Task:
        """Cut one image set in two, class by class.

        Args:
            name: the task's name.
            images: all its images.
            fit: the share of every class that the head is fitted on; the rest tests.
            seed: of the cut.

        Raises:
            InvalidArgument: `fit` is outside (0, 1).
            DataError: a class is too small for two parts.
        """
        if not 0 < fit < 1:
            raise InvalidArgument(f"fit: got {fit}; takes a share between 0 and 1")
        return cls(name, *images.split(fit, 1 - fit, seed=seed))


def as_tasks(tasks: Task | Iterable[Task]) -> list[Task]:
    """Return a list of tasks of different names.

    Raises:
        InvalidArgument: no task, something else than tasks, or two of one name.
    """
    found = [tasks] if isinstance(tasks, Task) else list(tasks)
    if not found or not all(isinstance(task, Task) for task in found):
        raise InvalidArgument("tasks: takes one or more fastsal.Task")
    names = [task.name for task in found]
    if len(set(names)) != len(names):
        raise InvalidArgument(f"tasks: a name stands twice in {names}")
    return found


def batches_of(part: Part, spec: InputSpec, batch_size: int) -> Iterable[tuple[Tensor, Tensor]]:
    """Return the batches of a part, prepared by `spec` if it is an `ImageSet`."""
    return part.batches(spec, batch_size) if isinstance(part, ImageSet) else part


def iter_once(part: object) -> bool:
    """Say whether `part` is an iterator, spent by its first pass."""
    return not isinstance(part, ImageSet) and hasattr(part, "__next__")
