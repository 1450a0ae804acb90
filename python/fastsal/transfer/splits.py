"""Disjoint splits of an image set, drawn class by class with a hash.

The split of an image depends only on the seed, the name of its class and the images of that class.
Two tasks on overlapping classes of one file therefore assign each shared image to the same split.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastsal.data.image_set import ImageSet
from fastsal.errors import DataError, InvalidArgument
from fastsal.utils.numbers import as_integer, real, whole

SPLITS = ("prune", "fit", "tune", "test")
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Shares:
    """The share of every class in each split.

    The test split is drawn first; `prune`, `fit` and `tune` divide the remaining images.

    Attributes:
        prune: Share of the remaining images for the statistics of pruning, 0 to 1.
        fit: Share of the remaining images for fitting heads, above 0, at most 1.
        tune: Share of the remaining images for fine-tuning, 0 to 1. `prune + fit + tune` is 1.
        test: Share of all images for testing, at least 0, below 1; 0 where the task has separate
            test images.

    Raises:
        InvalidArgument: A share is out of range, `fit` is 0, or `prune + fit + tune` is not 1.
    """

    prune: float = 0.3
    fit: float = 0.3
    tune: float = 0.4
    test: float = 0.25

    def __post_init__(self) -> None:
        for name in SPLITS:
            share = real(f"shares.{name}", getattr(self, name), least=0, most=1)
            object.__setattr__(self, name, share)  # the dataclass is frozen
        total = self.prune + self.fit + self.tune
        if abs(total - 1) > 1e-9:
            raise InvalidArgument(
                f"prune + fit + tune of shares must be 1, got {total:g} (test is drawn first and "
                "does not count)"
            )
        if not self.fit > 0:
            raise InvalidArgument(f"shares.fit must be above 0, got {self.fit:g}")
        if not self.test < 1:
            raise InvalidArgument(f"shares.test must be below 1, got {self.test:g}")


def cut(images: ImageSet, shares: Shares, seed: int) -> dict[str, ImageSet]:
    """Divide `images` into disjoint splits, class by class.

    Args:
        images: Image set without duplicates.
        shares: Share of each split.
        seed: Seed of the order in which the images of a class are assigned.

    Returns:
        `{split: images}` for the splits whose share is above 0, in the order of `images`.

    Raises:
        DataError: An image is duplicated, or a class has too few images for the splits.
        InvalidArgument: `seed` is not an integer.
    """
    seed = whole("seed", seed, least=-(2**63))
    places, counts = np.unique(images.index, return_counts=True)
    if (counts > 1).any():
        raise DataError(
            f"images must be distinct: image {int(places[counts > 1][0])} of {images.source} is "
            "duplicated"
        )
    found: dict[str, list[Indices]] = {name: [] for name in SPLITS if getattr(shares, name) > 0}
    for k, name in enumerate(images.classes):
        members = np.flatnonzero(images.y == k)
        ends = _ends(len(members), shares)
        members = members[_order(images.index[members], name, seed)]
        # Test images come first, so that they do not depend on the other shares.
        starts = {"test": 0, "prune": ends["test"], "fit": ends["prune"], "tune": ends["fit"]}
        for split, chosen in found.items():
            piece = members[starts[split] : ends[split]]
            if not len(piece):
                raise DataError(
                    f"shares: class {name!r} of {images.source} has {len(members)} images, too few "
                    f"for split {split!r} with a share of {getattr(shares, split):g}"
                )
            chosen.append(piece)
    return {
        split: images.subset(np.sort(np.concatenate(pieces))) for split, pieces in found.items()
    }


def _ends(n: int, shares: Shares) -> dict[str, int]:
    """Return where each split of n images ends, in the order test, prune, fit, tune."""
    tested = _rounded(shares.test * n)
    rest = n - tested
    return {
        "test": tested,
        "prune": tested + _rounded(shares.prune * rest),
        "fit": tested + _rounded((shares.prune + shares.fit) * rest),
        "tune": n,
    }


def _rounded(value: float) -> int:
    """Round half up, independently of the last bits of the float."""
    return math.floor(round(value, 9) + 0.5)


def _order(index: Indices, name: str, seed: int) -> Indices:
    """Return a permutation of the images of one class that is the same on every machine.

    Images are sorted by a hash of seed, class name and index in the source. The result does not
    depend on their order, nor on the random number generator of a library.
    """
    stem = hashlib.sha256(f"{seed}\0{name}\0".encode())
    keys = []
    for place in index.tolist():
        digest = stem.copy()
        digest.update(str(place).encode())
        keys.append(digest.digest())
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)


def pick(what: str, images: ImageSet, places: Sequence[int]) -> ImageSet:
    """Select the images at `places` of their source, as stored in a file of splits.

    Args:
        what: Task and split, for error messages.
        images: Image set to select from.
        places: Indices as in `ImageSet.index`.

    Raises:
        DataError: An index is not an integer, is duplicated or is not in `images`, or a class has
            no image.
    """
    if isinstance(places, np.ndarray):
        places = places.tolist()
    if not isinstance(places, Sequence) or not len(places):
        raise DataError(f"indices: {what} must be a non-empty list of integers, got {places!r:.60}")
    for place in places:
        if as_integer(place) is None:
            raise DataError(f"indices: {what} must hold integers, got {place!r}")
    places = [int(place) for place in places]
    position = {place: i for i, place in enumerate(images.index.tolist())}
    absent = [p for p in places if p not in position]
    if absent:
        raise DataError(
            f"indices: {what} has image {absent[0]}, one of {len(absent)} that are not among the "
            f"{len(images)} images of {images.source}; the splits belong to other images"
        )
    if len(set(places)) != len(places):
        raise DataError(f"indices: {what} has a duplicate image")
    found = images.subset([position[p] for p in places])
    check_classes("indices", what, found)
    return found


def check_classes(argument: str, what: str, images: ImageSet) -> None:
    """Raise DataError where a class has no image."""
    counts = np.bincount(images.y, minlength=len(images.classes))
    if int(counts.min()) == 0:
        empty = images.classes[int(counts.argmin())]
        raise DataError(
            f"{argument}: {what} has no image of class {empty!r} ({len(images)} images, "
            f"{int((counts > 0).sum())} of {len(images.classes)} classes)"
        )


def check_disjoint(task: str, splits: Mapping[str, object]) -> None:
    """Check that the image sets of a task have the same classes and share no image.

    Raises:
        DataError: Two splits have different classes or share an image.
    """
    sets = [(name, split) for name, split in splits.items() if isinstance(split, ImageSet)]
    for i, (name, split) in enumerate(sets):
        for other, before in sets[:i]:
            if split.classes != before.classes:
                raise DataError(
                    f"{name}: the splits of task {task!r} must have the same classes, got "
                    f"{_few(split.classes)} in {name!r} and {_few(before.classes)} in {other!r}"
                )
            if split.source != before.source:
                continue
            shared = np.intersect1d(split.index, before.index)
            if len(shared):
                raise DataError(
                    f"{name}: the splits of task {task!r} must be disjoint, but {name!r} and "
                    f"{other!r} share {len(shared)} images (image {int(shared[0])} of "
                    f"{split.source})"
                )


def _few(names: Sequence[str]) -> str:
    rest = len(names) - 10
    return ", ".join(names[:10]) + (f" and {rest} more" if rest > 0 else "")
