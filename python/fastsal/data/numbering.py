"""Signs that the labels of images are not indices of the outputs of a model.

A folder says which images belong together, not which output of a model they belong to. Labels are
right only if the folders, in the order of their names, are the model's classes in the order of its
outputs. Whether they are cannot be known; these signs are cheap and give a note with the cure.
"""

from __future__ import annotations

import math
import re
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from fastsal.data.class_map import imagenet_subset, indices_of, natural_key
from fastsal.data.image_set import ImageBatches, ImageSet
from fastsal.data.shuffled import Shuffled
from fastsal.errors import DataError
from fastsal.models.classifier import class_count
from fastsal.utils.suggestions import listed
from fastsal.utils.warn import warn_user

# Names of the parts of a data set. One of them alone may be a class ("train" is one of CIFAR-100).
_PARTS = frozenset(
    {"train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval", "holdout"}
)
_WORDNET = re.compile(r"n\d{8}")
# A mean loss is worse than guessing if it exceeds that of guessing by this many nats, and by so
# many standard errors. Untrained models are slightly worse than guessing.
_WORSE = 1.0
_ERRORS = 3.0

_CURE = "give a class map (class_map=, --class-map): {}"
_FILE = "a file with the name and the index of each class"

_noted: weakref.WeakKeyDictionary[ImageSet, set[str]] = weakref.WeakKeyDictionary()


def image_set_of(batches: object) -> ImageSet | None:
    """Return the image set that batches are made of; None for batches of another kind."""
    if isinstance(batches, Shuffled):
        batches = batches.batches
    return batches.images if isinstance(batches, ImageBatches) else None


def check_labels_of(batches: object, model: nn.Module) -> None:
    """Warn if batches are of an image set whose labels do not look like the model's outputs.

    Args:
        batches: Batches of any kind; only those of an image set are checked.
        model: The model, whose classifier tells the number of outputs.

    Raises:
        DataError: A class map has an index that the model has no output for.
    """
    images = image_set_of(batches)
    if images is not None:
        some: Any = batches.batches if isinstance(batches, Shuffled) else batches
        check_numbering(images, class_count(model, some.first_batch()[0]))


def check_numbering(images: ImageSet, outputs: int | None) -> None:
    """Warn if the labels of an image set do not look like the outputs of a model, once for each.

    Args:
        images: Images whose labels are compared with the outputs of a model.
        outputs: Number of outputs of the model; None if unknown.

    Raises:
        DataError: A class map has an index that the model has no output for.
    """
    if images.numbering == "map" and outputs is not None and len(images.classes) > outputs:
        last = images.classes[-1]
        raise DataError(
            f"class_map must have indices of 0 to {outputs - 1} for a model of {outputs} outputs, "
            f"got {len(images.classes) - 1} for {last!r}"
        )
    doubt = numbering_doubt(images, outputs)
    if doubt is not None and doubt not in _noted.setdefault(images, set()):
        _noted[images].add(doubt)
        warn_user(doubt)


def numbering_doubt(images: ImageSet, outputs: int | None) -> str | None:
    """Return why the labels of an image set may be wrong for a model, with the cure, or None.

    Args:
        images: The image set.
        outputs: Number of outputs of the model; None if unknown.
    """
    names = images.classes
    there = [names[k] for k in np.unique(images.y)]
    parts = [name for name in there if name.lower() in _PARTS]
    if len(parts) > 1 and images.numbering != "map":
        return (
            f"data: the folders {listed(parts)} of {images.source} look like parts of a data set, "
            f"but are used as classes; give one part, such as {images.source}/{parts[0]}"
        )
    if outputs is None:
        return _order_doubt(images, there)
    if all(_WORDNET.fullmatch(name) for name in there):
        subset = imagenet_subset(outputs)
        index = {} if subset is None else indices_of(subset, names)
        if index and any(index.get(names[k]) != k for k in np.unique(images.y)):
            return (
                f"data: the classes of {images.source} have WordNet ids, but their labels are not "
                f"the indices of {subset}, as a model of {outputs} outputs may expect; "
                + _CURE.format(f"imagenet, or {_FILE}")
            )
        if index:
            return None
    if images.numbering not in ("data", "map") and len(names) != outputs:
        return (
            f"data: the {len(names)} classes of {images.source} are numbered 0 to "
            f"{len(names) - 1} in their own order, but the model has {outputs} outputs; unless "
            "they are its first outputs, " + _CURE.format(_FILE)
        )
    return _order_doubt(images, there)


def _order_doubt(images: ImageSet, there: Sequence[str]) -> str | None:
    """Return why the order of the class names is doubtful, or None."""
    names = list(images.classes)
    if images.numbering != "sorted" or names != sorted(names):
        return None
    if names != sorted(names, key=natural_key):
        at = next(i for i, name in enumerate(sorted(names, key=natural_key)) if name != names[i])
        return (
            f"data: the classes of {images.source} are numbered in the order of their names, "
            f"{listed(names[: at + 2], at + 2)}; if the model counts as people do, "
            + _CURE.format(f"natural, or {_FILE}")
        )
    if all(name.isdecimal() for name in there) and any(int(n) != i for i, n in enumerate(names)):
        first = next((i, n) for i, n in enumerate(names) if int(n) != i)
        return (
            f"data: the folder {first[1]!r} of {images.source} has the label {first[0]}, its place "
            "among the folders; if names are indices of outputs, " + _CURE.format(_FILE)
        )
    return None


class LossSign:
    """Compares a mean cross-entropy with that of guessing.

    The sum is kept while batches are measured; nothing is stored of the images.
    """

    def __init__(self) -> None:
        self._count = 0
        self._total = 0.0
        self._squares = 0.0
        self._outputs = 0

    def add(self, losses: Sequence[float], outputs: int) -> None:
        """Add the losses of a batch, in nats, from logits of `outputs` classes."""
        each = np.asarray(losses, np.float64)
        self._count += len(each)
        self._total += float(each.sum())
        self._squares += float(np.square(each).sum())
        self._outputs = outputs

    def doubt(self) -> str | None:
        """Return why labels may be wrong, or None: their mean loss is worse than guessing."""
        if self._count < 2 or self._outputs < 2:
            return None
        mean, guessing = self._total / self._count, math.log(self._outputs)
        variance = max(self._squares / self._count - mean**2, 0.0)
        error = math.sqrt(variance / (self._count - 1))
        if not mean - guessing > max(_WORSE, _ERRORS * error):
            return None
        return (
            f"labels: the mean loss of {mean:.1f} nats is worse than guessing ({guessing:.1f} nats "
            f"for {self._outputs} outputs): the labels may not be the model's classes, "
            + _CURE.format(_FILE)
            + "; or the model may be untrained, or prepared for other inputs"
        )

    def warn(self) -> None:
        """Warn if the mean loss is worse than guessing."""
        doubt = self.doubt()
        if doubt is not None:
            warn_user(doubt)
