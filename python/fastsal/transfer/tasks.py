"""A task: a labelled image set, in parts to prune with, to fit a head, to fine-tune and to test."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from fastsal.data.image_set import ImageSet
from fastsal.errors import DataError, InvalidArgument
from fastsal.models.inputs import InputSpec
from fastsal.transfer.splits import PARTS, Shares, check_classes, check_parts, cut, pick

Part = ImageSet | Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Task:
    """A labelled image set, cut in parts that share no image.

    A part is an `ImageSet`, or any iterable, run over more than once, of
    `(images [n, c, h, w], labels [n])`. That sets of one source are disjoint is checked; that
    iterables are is up to the caller.

    Attributes:
        name: the task's name.
        fit: images that the head is fitted on.
        test: images that accuracy is measured on.
        prune: images for the statistics of pruning; None where nothing is pruned with this task.
        tune: images for fine-tuning; None where nothing is fine-tuned with it.

    Raises:
        DataError: two parts share an image, or have different classes.
        InvalidArgument: a part runs once only.
    """

    name: str
    fit: Part
    test: Part
    prune: Part | None = None
    tune: Part | None = None

    def __post_init__(self) -> None:
        for what, part in self.parts().items():
            if iter_once(part):
                raise InvalidArgument(
                    f"{what}: got a {type(part).__name__}, which runs once; takes an ImageSet, "
                    "or an iterable that can be run over again"
                )
        check_parts(self.name, self.parts())

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

    @classmethod
    def cut(
        cls,
        name: str,
        images: ImageSet,
        *,
        test: ImageSet | None = None,
        shares: Shares | None = None,
        seed: int = 0,
    ) -> Task:
        """Cut an image set in all the parts of a task, class by class.

        In which part an image falls depends on `seed`, its place in its source and its class, not
        on the other classes: tasks over overlapping classes of one file never prune with an image
        that another tests on, so long as their shares and seeds are the same.

        Args:
            name: the task's name.
            images: all its images.
            test: images of their own to test on; nothing is cut off `images` then.
            shares: of the parts; None takes the defaults of `Shares`. A share of 0 makes no part.
            seed: of the cut.

        Raises:
            DataError: a class is too small for the parts, or has no image in `test`.
            InvalidArgument: `shares` without a test part, and no `test`.
        """
        shares = shares or Shares()
        if test is not None:
            check_classes("test", f"part 'test' of task {name!r}", test)
            shares = Shares(shares.prune, shares.fit, shares.tune, 0.0)
        elif not shares.test > 0:
            raise InvalidArgument(
                f"shares: test is 0 for task {name!r}; takes a share above 0, or images as `test`"
            )
        try:
            parts = cut(images, shares, seed)
        except DataError as error:
            raise DataError(f"{error} (task {name!r})") from None
        return cls(
            name,
            parts["fit"],
            parts["test"] if test is None else test,
            parts.get("prune"),
            parts.get("tune"),
        )

    def parts(self) -> dict[str, Part]:
        """Return `{"prune" | "fit" | "tune" | "test": images}`, without those that are None."""
        found = {name: getattr(self, name) for name in PARTS}
        return {name: part for name, part in found.items() if part is not None}

    def indices(self) -> dict[str, list[int]]:
        """Return `{part: places of its images in their source}`, plain numbers for JSON.

        Raises:
            DataError: a part is not an `ImageSet`, so its images have no places.
        """
        found = {}
        for name, part in self.parts().items():
            if not isinstance(part, ImageSet):
                raise DataError(
                    f"{name}: task {self.name!r} has a {type(part).__name__} there, whose images "
                    "have no indices; takes an ImageSet"
                )
            found[name] = [int(i) for i in part.index]
        return found

    @classmethod
    def from_indices(
        cls,
        name: str,
        images: ImageSet,
        indices: Mapping[str, Sequence[int]],
        test: ImageSet | None = None,
    ) -> Task:
        """Build the task that `indices` was called on.

        Args:
            name: the task's name.
            images: all its images, as `cut` was given them.
            indices: as `Task.indices` gives them.
            test: images of their own to test on, as `cut` was given them.

        Raises:
            DataError: the indices do not fit the images: unknown or missing parts, places that are
                not there, a class without images.
        """
        if not isinstance(indices, Mapping):
            raise DataError(f"indices: task {name!r} has {type(indices).__name__}; takes a mapping")
        unknown = [part for part in indices if part not in PARTS]
        missing = [part for part in ("fit", "test") if part not in indices]
        if unknown or missing:
            raise DataError(
                f"indices: task {name!r} has parts {list(indices)}; takes 'fit' and 'test', and "
                "'prune' and 'tune' where there are any"
            )
        parts = {
            part: pick(
                f"part {part!r} of task {name!r}",
                test if part == "test" and test is not None else images,
                places,
            )
            for part, places in indices.items()
        }
        return cls(name, parts["fit"], parts["test"], parts.get("prune"), parts.get("tune"))


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
