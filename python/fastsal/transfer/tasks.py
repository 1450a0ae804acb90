"""A task: a labeled image set with disjoint splits to prune, fit a head, fine-tune and test."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fastsal.data.image_set import ImageSet
from fastsal.data.unpacking import BatchRule, ruled, unpacked
from fastsal.errors import DataError, InvalidArgument
from fastsal.models.inputs import InputSpec
from fastsal.transfer.splits import SPLITS, Shares, check_classes, check_disjoint, cut, pick
from fastsal.utils.numbers import real

Split = ImageSet | Iterable[Any]


@dataclass(frozen=True, eq=False, repr=False)
class Task:
    """A labeled image set, divided into disjoint splits.

    A split is an `ImageSet`, or an iterable of `(images [n, c, h, w], labels [n])`, or of dicts of
    them as for `fastsal.collect`, that can be iterated more than once. Image sets are checked to
    be disjoint; iterables are not.

    Attributes:
        name: Name of the task.
        fit: Images that the head is fitted on.
        test: Images that accuracy is measured on.
        prune: Images for the statistics of pruning; None if the task is never pruned on.
        tune: Images for fine-tuning; None if the task is never fine-tuned on.
        batch: Function from a batch of a split that is no `ImageSet` to `(images, labels)`, for
            batches of another form.

    Raises:
        DataError: Two splits share an image or have different classes.
        InvalidArgument: A split is an iterator, which can be iterated only once.
    """

    name: str
    fit: Split
    test: Split
    prune: Split | None = None
    tune: Split | None = None
    batch: BatchRule | None = None

    def __post_init__(self) -> None:
        for what, split in self.splits().items():
            if is_iterator(split):
                raise InvalidArgument(
                    f"{what} must be an ImageSet or a re-iterable, got a {type(split).__name__}, "
                    "which can be iterated only once"
                )
        check_disjoint(self.name, self.splits())

    def __repr__(self) -> str:
        sizes = [
            f"{name}={len(split) if isinstance(split, ImageSet) else type(split).__name__}"
            for name, split in self.splits().items()
        ]
        return f"Task({self.name!r}, {', '.join(sizes)})"

    @classmethod
    def split(cls, name: str, images: ImageSet, *, fit: float = 0.5, seed: int = 0) -> Task:
        """Divide an image set into a fit and a test split, class by class.

        Args:
            name: Name of the task.
            images: All images.
            fit: Share of every class that the head is fitted on, in (0, 1); the rest is the test
                split.
            seed: Seed of the draw.

        Raises:
            InvalidArgument: `fit` is outside (0, 1).
            DataError: A class is too small for two splits.
        """
        fit = real("fit", fit, above=0, below=1)
        fitted, test = images.split(fit, 1 - fit, seed=seed)
        return cls(name, fitted, test)

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
        """Divide an image set into all splits of a task, class by class.

        The split of an image depends on `seed`, its index in its source and its class, not on the
        other classes. Tasks on overlapping classes of one file, cut with the same shares and seed,
        therefore never prune with an image that another task tests on.

        Args:
            name: Name of the task.
            images: All images.
            test: Separate test images; then no test split is drawn from `images`.
            shares: Share of each split; None uses the defaults of `Shares`. A share of 0 makes no
                split.
            seed: Seed of the draw.

        Raises:
            DataError: A class is too small for the splits, or has no image in `test`.
            InvalidArgument: The test share is 0 and `test` is None.
        """
        shares = shares or Shares()
        if test is not None:
            check_classes("test", f"split 'test' of task {name!r}", test)
            shares = Shares(shares.prune, shares.fit, shares.tune, 0.0)
        elif not shares.test > 0:
            raise InvalidArgument(
                f"shares.test must be above 0 for task {name!r}, which has no separate test "
                "images, got 0"
            )
        try:
            splits = cut(images, shares, seed)
        except DataError as error:
            raise DataError(f"{error} (task {name!r})") from None
        return cls(
            name,
            splits["fit"],
            splits["test"] if test is None else test,
            splits.get("prune"),
            splits.get("tune"),
        )

    def splits(self) -> dict[str, Split]:
        """Return `{"prune" | "fit" | "tune" | "test": images}`, without those that are None."""
        found = {name: getattr(self, name) for name in SPLITS}
        return {name: split for name, split in found.items() if split is not None}

    def indices(self) -> dict[str, list[int]]:
        """Return `{split: indices of its images in their source}`, as plain integers for JSON.

        Raises:
            DataError: A split is not an `ImageSet`, so its images have no indices.
        """
        found = {}
        for name, split in self.splits().items():
            if not isinstance(split, ImageSet):
                raise DataError(
                    f"{name} of task {self.name!r} must be an ImageSet to have indices, got a "
                    f"{type(split).__name__}"
                )
            found[name] = [int(i) for i in split.index]
        return found

    @classmethod
    def from_indices(
        cls,
        name: str,
        images: ImageSet,
        indices: Mapping[str, Sequence[int]],
        test: ImageSet | None = None,
    ) -> Task:
        """Rebuild a task from the output of `Task.indices`.

        Args:
            name: Name of the task.
            images: All images, as given to `cut`.
            indices: `{split: indices}`, as returned by `Task.indices`.
            test: Separate test images, as given to `cut`.

        Raises:
            DataError: The indices do not fit the images: an unknown or missing split, an index
                that is out of range, or a class without images.
        """
        if not isinstance(indices, Mapping):
            raise DataError(
                f"indices of task {name!r} must be a mapping, got {type(indices).__name__}"
            )
        unknown = [split for split in indices if split not in SPLITS]
        missing = [split for split in ("fit", "test") if split not in indices]
        if unknown or missing:
            raise DataError(
                f"indices of task {name!r} must have 'fit' and 'test', and may have 'prune' and "
                f"'tune', got {list(indices)}"
            )
        splits = {
            split: pick(
                f"split {split!r} of task {name!r}",
                test if split == "test" and test is not None else images,
                places,
            )
            for split, places in indices.items()
        }
        return cls(name, splits["fit"], splits["test"], splits.get("prune"), splits.get("tune"))


def as_tasks(tasks: Task | Iterable[Task]) -> list[Task]:
    """Return one or more tasks as a list.

    Raises:
        InvalidArgument: There is no task, something is not a task, or two tasks have one name.
    """
    found = [tasks] if isinstance(tasks, Task) else list(tasks)
    if not found or not all(isinstance(task, Task) for task in found):
        raise InvalidArgument("tasks must be one or more fastsal.Task")
    names = [task.name for task in found]
    if len(set(names)) != len(names):
        raise InvalidArgument(f"tasks must have distinct names, got {names}")
    return found


def batches_of(
    split: Split, spec: InputSpec, batch_size: int, batch: BatchRule | None = None
) -> Iterable[tuple[Tensor, Tensor]]:
    """Return the batches of a split, preprocessed by `spec` if it is an `ImageSet`.

    Those of other splits are unpacked by `batch`.
    """
    if isinstance(split, ImageSet):
        return split.batches(spec, batch_size)
    return unpacked(ruled(split, batch))


def is_iterator(split: object) -> bool:
    """Whether `split` is an iterator, which is exhausted by its first pass."""
    return not isinstance(split, ImageSet) and hasattr(split, "__next__")
