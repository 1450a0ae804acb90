"""Cutting an image set in parts, class by class, so that every task over one file cuts it alike.

In which part an image falls depends on the seed, the name of its class and the images of that class
alone. Two tasks over classes of one file, however they overlap, put an image in the same part.
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

PARTS = ("prune", "fit", "tune", "test")
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Shares:
    """What share of every class goes to which part.

    The test part is cut off first, so that the others, whatever they are, share out the same rest.

    Attributes:
        prune: of what is not tested on, for the statistics of pruning.
        fit: of what is not tested on, for heads.
        tune: of what is not tested on, for fine-tuning. `prune`, `fit` and `tune` sum to 1.
        test: of all images; 0 where others test.

    Raises:
        InvalidArgument: a share out of range, no share to fit on, or another sum.
    """

    prune: float = 0.3
    fit: float = 0.3
    tune: float = 0.4
    test: float = 0.25

    def __post_init__(self) -> None:
        for name in PARTS:
            share = getattr(self, name)
            if (
                isinstance(share, bool)
                or not isinstance(share, (int, float))
                or not 0 <= share <= 1
            ):
                raise InvalidArgument(f"shares: {name} is {share!r}; takes a share from 0 to 1")
        total = self.prune + self.fit + self.tune
        if abs(total - 1) > 1e-9:
            raise InvalidArgument(
                f"shares: prune + fit + tune is {total:g}; takes a sum of 1 (test comes off first)"
            )
        if not self.fit > 0 or not self.test < 1:
            raise InvalidArgument(
                f"shares: fit is {self.fit:g} and test {self.test:g}; takes a fit above 0 and a "
                "test below 1"
            )


def cut(images: ImageSet, shares: Shares, seed: int) -> dict[str, ImageSet]:
    """Cut `images` class by class; see the module.

    Args:
        images: each image once.
        shares: of the parts.
        seed: of the order in which the images of a class are dealt out.

    Returns:
        `{part: images}` of the parts whose share is above 0, in the order of `images`.

    Raises:
        DataError: an image stands twice, or a class has too few images for the parts.
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise InvalidArgument(f"seed: got {seed!r}; takes a whole number")
    places, counts = np.unique(images.index, return_counts=True)
    if (counts > 1).any():
        raise DataError(
            f"images: image {int(places[counts > 1][0])} of {images.source} stands twice; takes "
            "each once"
        )
    found: dict[str, list[Indices]] = {name: [] for name in PARTS if getattr(shares, name) > 0}
    for k, name in enumerate(images.classes):
        members = np.flatnonzero(images.y == k)
        ends = _ends(len(members), shares)
        members = members[_order(images.index[members], name, seed)]
        # Test images lie at the start: where they begin does not depend on the other shares.
        starts = {"test": 0, "prune": ends["test"], "fit": ends["prune"], "tune": ends["fit"]}
        for part, chosen in found.items():
            piece = members[starts[part] : ends[part]]
            if not len(piece):
                raise DataError(
                    f"shares: class {name!r} of {images.source} has {len(members)} images, which "
                    f"leaves none for part {part!r} with a share of {getattr(shares, part):g}"
                )
            chosen.append(piece)
    return {part: images.subset(np.sort(np.concatenate(pieces))) for part, pieces in found.items()}


def _ends(n: int, shares: Shares) -> dict[str, int]:
    """Return where each part of n images ends; the order is test, prune, fit, tune."""
    tested = _rounded(shares.test * n)
    rest = n - tested
    return {
        "test": tested,
        "prune": tested + _rounded(shares.prune * rest),
        "fit": tested + _rounded((shares.prune + shares.fit) * rest),
        "tune": n,
    }


def _rounded(value: float) -> int:
    """Round to the nearest integer, a half up, whatever the last bits of the float are."""
    return math.floor(round(value, 9) + 0.5)


def _order(index: Indices, name: str, seed: int) -> Indices:
    """Return a permutation of one class's images that is the same on every machine.

    It sorts by a hash of seed, class and place in the source, so it does not depend on the order in
    which they come, nor on the version of a library's random numbers.
    """
    stem = hashlib.sha256(f"{int(seed)}\0{name}\0".encode())
    keys = []
    for place in index.tolist():
        digest = stem.copy()
        digest.update(str(place).encode())
        keys.append(digest.digest())
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)


def pick(what: str, images: ImageSet, places: Sequence[int]) -> ImageSet:
    """Give the images at `places` of their source, as a stored split names them.

    Args:
        what: the task and the part, for messages.
        images: all that may be named.
        places: as in `ImageSet.index`.

    Raises:
        DataError: a place is no whole number, is named twice or not among the images, or a class
            has none.
    """
    if isinstance(places, np.ndarray):
        places = places.tolist()
    if not isinstance(places, Sequence) or not len(places):
        raise DataError(f"indices: {what} holds {places!r:.60}; takes one or more whole numbers")
    bad = [p for p in places if isinstance(p, bool) or not isinstance(p, (int, np.integer))]
    if bad:
        raise DataError(f"indices: {what} holds {bad[0]!r}; takes whole numbers")
    position = {place: i for i, place in enumerate(images.index.tolist())}
    absent = [p for p in places if p not in position]
    if absent:
        raise DataError(
            f"indices: {what} holds image {absent[0]}, one of {len(absent)} that are not among the "
            f"{len(images)} images of {images.source}; the split is of other images"
        )
    if len(set(places)) != len(places):
        raise DataError(f"indices: {what} holds an image twice; takes each once")
    found = images.subset([position[p] for p in places])
    check_classes("indices", what, found)
    return found


def check_classes(argument: str, what: str, part: ImageSet) -> None:
    """Raise DataError where a part has no image of one of its classes."""
    counts = np.bincount(part.y, minlength=len(part.classes))
    if int(counts.min()) == 0:
        empty = part.classes[int(counts.argmin())]
        raise DataError(
            f"{argument}: {what} has no image of class {empty!r} ({len(part)} images, "
            f"{int((counts > 0).sum())} of {len(part.classes)} classes)"
        )


def check_parts(task: str, parts: Mapping[str, object]) -> None:
    """Check that the image sets among the parts of a task have the same classes and share no image.

    Raises:
        DataError: names the part, the other, and an image or the classes.
    """
    sets = [(name, part) for name, part in parts.items() if isinstance(part, ImageSet)]
    for i, (name, part) in enumerate(sets):
        for other, before in sets[:i]:
            if part.classes != before.classes:
                raise DataError(
                    f"{name}: task {task!r} has classes {_few(part.classes)} in part {name!r} and "
                    f"{_few(before.classes)} in part {other!r}"
                )
            if part.source != before.source:
                continue
            shared = np.intersect1d(part.index, before.index)
            if len(shared):
                raise DataError(
                    f"{name}: task {task!r} has {len(shared)} images in part {name!r} that are in "
                    f"part {other!r} as well (image {int(shared[0])} of {part.source})"
                )


def _few(names: Sequence[str]) -> str:
    rest = len(names) - 10
    return ", ".join(names[:10]) + (f" and {rest} more" if rest > 0 else "")
