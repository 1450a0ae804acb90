"""Labeled images, and batches of them for a model.

Axes: n images (or images of a batch), h and w pixels, c channels (1 grayscale, 3 RGB).
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import InitVar, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastsal.data.cached_reading import parse_cache, read_cached
from fastsal.data.class_map import MOST_OUTPUTS, NATURAL, ClassMap, apply_class_map
from fastsal.data.class_order import class_order_note, in_class_order
from fastsal.data.pixels import fit_arrays, normalize
from fastsal.data.places import Place
from fastsal.data.reading import Reader, Transform
from fastsal.errors import DataError, InvalidArgument
from fastsal.models.inputs import InputSpec
from fastsal.utils.numbers import as_integer, real, whole
from fastsal.utils.suggestions import did_you_mean, listed
from fastsal.utils.warn import warn_user

_counter = itertools.count()

# Where the numbers of the classes come from: the data, the sorted names of the classes, the same in
# natural order, a selection of classes, or a class map.
Numbering = Literal["data", "sorted", "natural", "selection", "map"]


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labeled images, in memory or as files that are read when a batch needs them.

    Attributes:
        x: Pixels, uint8 `[n, h, w, c]`, or n image files: paths, or places in tar archives.
        y: Class numbers, int64 `[n]`, in `0 .. len(classes) - 1`.
        classes: Names of the classes.
        source: Name of the source of the images; with `index` it identifies every image.
        index: Position of each image in its source, int64 `[n]`.
        transform: Function of the pixels and the `index` of a file, applied whenever it is read.
        numbering: Where the numbers of the classes come from: "data", "sorted" (the order of the
            names), "natural" (that order with class2 before class10), "selection" (see
            `select_classes`) or "map".
        class_map: Relabels `y` with the index of each class, see `load_images`; not stored.
    """

    x: npt.NDArray[np.uint8] | tuple[Place, ...]
    y: npt.NDArray[np.int64]
    classes: tuple[str, ...] = ()
    source: str = ""
    index: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    transform: Transform | None = None
    numbering: Numbering = "data"
    class_map: InitVar[ClassMap | None] = None

    def __post_init__(self, class_map: ClassMap | None) -> None:
        source = self.source or f"array {next(_counter)}"
        x = self.x if isinstance(self.x, tuple) else _check_images(self.x, source)
        if self.transform is not None and not isinstance(x, tuple):
            raise InvalidArgument(
                f"transform must be None for images in memory ({source}); use ImageSet.transformed"
            )
        y = _check_labels(self.y, len(x), source)
        classes = tuple(str(name) for name in self.classes)
        if not classes:
            classes = tuple(str(k) for k in range(int(y.max()) + 1))
        if int(y.max()) >= len(classes):
            raise DataError(
                f"y must be less than the number of classes, {len(classes)}, got {int(y.max())} in "
                f"{source}"
            )
        if len(set(classes)) != len(classes):
            raise DataError(f"classes must be distinct, got a duplicate in {source}")
        numbering = self.numbering
        if class_map is not None:
            y, classes = apply_class_map(class_map, y, classes, source)
            numbering = "natural" if class_map == NATURAL else "map"
        index = self.index if len(self.index) else np.arange(len(x), dtype=np.int64)
        for name, value in (
            ("x", x), ("y", y), ("classes", classes), ("source", source), ("index", index),
            ("numbering", numbering),
        ):  # fmt: skip
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.y)

    def __repr__(self) -> str:
        return f"ImageSet({len(self)} images, {len(self.classes)} classes, {self.source})"

    def subset(self, indices: Sequence[int] | npt.NDArray[Any]) -> ImageSet:
        """Return the images at `indices`, in that order.

        Raises:
            InvalidArgument: `indices` is empty, or an index is out of range.
        """
        chosen = np.asarray(indices)
        if chosen.ndim != 1 or not len(chosen) or not np.issubdtype(chosen.dtype, np.integer):
            raise InvalidArgument(
                f"indices must be one or more integers [k], got {chosen.dtype} {list(chosen.shape)}"
            )
        if chosen.min() < 0 or chosen.max() >= len(self):
            raise InvalidArgument(
                f"indices must be in [0, {len(self) - 1}], got {int(chosen.min())} to "
                f"{int(chosen.max())}"
            )
        x = tuple(self.x[i] for i in chosen) if isinstance(self.x, tuple) else self.x[chosen]
        return replace(self, x=x, y=self.y[chosen], index=self.index[chosen])

    def select_classes(self, classes: Sequence[str | int]) -> ImageSet:
        """Return the images of some classes, relabeled `0 .. k - 1`.

        Args:
            classes: Two or more names or numbers of classes, in the order of the new labels. Digits
                in a string are a number if no class has that name.

        Raises:
            InvalidArgument: A class is unknown or duplicated, or there are fewer than two.
        """
        numbers = [self._class_number(name) for name in classes]
        if len(set(numbers)) != len(numbers) or len(numbers) < 2:
            raise InvalidArgument(
                f"classes must be at least 2 distinct classes, got {list(classes)}"
            )
        relabel = np.full(len(self.classes), -1, np.int64)
        relabel[numbers] = np.arange(len(numbers))
        y = relabel[self.y]
        chosen = np.flatnonzero(y >= 0)
        if not len(chosen):
            raise InvalidArgument(f"classes: {self.source} contains no image of {list(classes)}")
        x = tuple(self.x[i] for i in chosen) if isinstance(self.x, tuple) else self.x[chosen]
        names = tuple(self.classes[k] for k in numbers)
        return replace(
            self,
            x=x,
            y=y[chosen],
            classes=names,
            index=self.index[chosen],
            numbering="selection",
        )

    def map_classes(self, class_map: ClassMap) -> ImageSet:
        """Return the images with the indices of a class map as labels.

        Args:
            class_map: "imagenet", "natural", a file, `{name: index}`, or names in the order of the
                outputs; see `load_images`.

        Raises:
            InvalidArgument: The map is invalid, lacks a class that has images, or has one index for
                two of them.
            FileFormatError: The file of the map cannot be read.
        """
        return replace(self, class_map=class_map)

    def transformed(self, transform: Transform) -> ImageSet:
        """Apply a transform to every image: now to images in memory, on reading to files.

        Args:
            transform: Function of the pixels, uint8 `[h, w, c]`, and the `index` of an image. It
                returns pixels with the same number of channels and, in memory, of the same size.
                An existing transform is applied first.

        Returns:
            The transformed images, with the same source and index.
        """
        if isinstance(self.x, tuple):
            before = self.transform
            chain = transform if before is None else _Both(before, transform)
            return replace(self, transform=chain)
        changed = [transform(x, int(i)) for x, i in zip(self.x, self.index, strict=True)]
        return replace(self, x=np.stack(changed))

    def split(self, *fractions: float, seed: int = 0) -> tuple[ImageSet, ...]:
        """Split into disjoint sets, stratified by class.

        Args:
            fractions: Positive fractions of the images, one per set; their sum is 1.
            seed: Seed of the shuffle within each class.

        Returns:
            One set per fraction, with images in the order of this set.

        Raises:
            InvalidArgument: A fraction is not positive, or their sum is not 1.
            DataError: A class is too small to be in every set.
        """
        fractions = tuple(real("fractions", fraction, above=0) for fraction in fractions)
        if not fractions or abs(sum(fractions) - 1) > 1e-9:
            raise InvalidArgument(f"fractions must sum to 1, got {fractions}")
        rng = np.random.default_rng(whole("seed", seed))
        parts: list[list[npt.NDArray[np.int64]]] = [[] for _ in fractions]
        for k, name in enumerate(self.classes):
            members = rng.permutation(np.flatnonzero(self.y == k))
            if not len(members):  # an output of the model without images, by a class map
                continue
            cuts = np.rint(np.cumsum(fractions) * len(members)).astype(int)[:-1]
            for part, piece in zip(parts, np.split(members, cuts), strict=True):
                if not len(piece):
                    raise DataError(
                        f"fractions: class {name!r} of {self.source} has too few images, "
                        f"{len(members)}, for fractions {fractions}"
                    )
                part.append(piece)
        return tuple(self.subset(np.sort(np.concatenate(part))) for part in parts)

    @property
    def is_sorted_by_class(self) -> bool:
        """Whether the images of each class are together, as those of class folders are."""
        changes = int((np.diff(self.y) != 0).sum())
        return changes == len(np.unique(self.y)) - 1

    def batches(
        self,
        spec: InputSpec,
        batch_size: int = 64,
        samples: int | None = None,
        start: int = 0,
        shuffle_seed: int | None = None,
        *,
        workers: int | None = None,
        pin_memory: bool = False,
        cache: int | str | None = None,
    ) -> ImageBatches:
        """Return batches of preprocessed images; every pass yields the same batches.

        Args:
            spec: Channels, size, crop and normalization, see `InputSpec`. Grayscale is converted to
                RGB by repetition, RGB to grayscale by luminance (ITU-R BT.601). Images of another
                size are resized (antialiased) and cropped.
            batch_size: Images per batch; the last batch may be smaller.
            samples: Number of images; None for all images from `start` on.
            start: Number of images to skip.
            shuffle_seed: Seed of a fixed shuffle, before `start` and `samples` are applied; None
                keeps the order.
            workers: Number of processes that decode image files ahead of the passes; 0 decodes them
                in this process, as those in memory. None uses the processors, at most 4, if there
                are several batches and the system is Linux. Batches do not depend on it.
            pin_memory: Whether batches are in pinned memory, for a model on a GPU.
            cache: Bytes of decoded image files to keep in memory for later passes, or a text such
                as "8GiB"; 0 for none, None for at most a quarter of the free memory.

        Returns:
            An iterable of `(images, labels)`, float32 `[n, c, h, w]` and int64 `[n]`. A warning is
            issued if they are in the order of their classes and do not have all classes.

        Raises:
            DataError: There are fewer than `samples` images after `start`.
            InvalidArgument: A number is out of range.
        """
        batch_size, start = whole("batch_size", batch_size, 1), whole("start", start)
        samples = None if samples is None else whole("samples", samples, 1)
        count = len(self)
        if start >= count:
            raise DataError(
                f"start must be less than {count}, the number of images of {self.source}, "
                f"got {start}"
            )
        if samples is not None and samples > count - start:
            after = f" after the first {start}" if start else ""
            raise DataError(
                f"samples must be at most {count - start}, the number of images of {self.source}"
                f"{after}, got {samples}"
            )
        order = np.arange(count)
        if shuffle_seed is not None:
            rng = np.random.default_rng(whole("shuffle_seed", shuffle_seed))
            order = rng.permutation(order)
        end = count if samples is None else start + samples
        chosen = order[start:end]
        if len(chosen) < count and in_class_order(self.y[chosen]):
            found = len(np.unique(self.y[chosen]))
            if found < len(np.unique(self.y)):
                some = f"samples: the {len(chosen):,} of {count:,} images of {self.source}"
                warn_user(class_order_note(some, found))
        workers = None if workers is None else whole("workers", workers)
        limit = parse_cache(cache)
        return ImageBatches(self, spec, chosen, batch_size, workers, pin_memory, limit)

    def _class_number(self, name: str | int) -> int:
        if isinstance(name, str) and name in self.classes:
            return self.classes.index(name)
        is_number = isinstance(name, str) and name.isdecimal()  # as a command line has it
        number = int(name) if is_number else as_integer(name)
        if number is not None and 0 <= number < len(self.classes):
            return number
        raise InvalidArgument(
            f"classes: {self.source} has no class {name!r}, only {listed(self.classes, 10)}"
            f"{did_you_mean(name, self.classes)}"
        )


@dataclass(frozen=True)
class _Both:
    """Composition of two transforms."""

    first: Transform
    second: Transform

    def __call__(self, pixels: npt.NDArray[np.uint8], index: int) -> npt.NDArray[np.uint8]:
        return self.second(self.first(pixels, index), index)


@dataclass(frozen=True, eq=False)
class ImageBatches:
    """Batches of an `ImageSet`, read and normalized during iteration, see `ImageSet.batches`."""

    images: ImageSet
    spec: InputSpec
    order: npt.NDArray[np.int64]
    batch_size: int
    workers: int | None = None
    pin_memory: bool = False
    cache: int | None = None

    @property
    def samples(self) -> int:
        """Number of images of a pass."""
        return len(self.order)

    def __len__(self) -> int:
        return math.ceil(len(self.order) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self._batches(self._chosen(), self.workers)

    def first_batch(self) -> tuple[Tensor, Tensor]:
        """Return the first batch, read without other processes."""
        return next(self._batches(self._chosen()[:1], 0))

    def _chosen(self) -> list[npt.NDArray[np.int64]]:
        starts = range(0, len(self.order), self.batch_size)
        return [self.order[start : start + self.batch_size] for start in starts]

    def _batches(
        self, parts: list[npt.NDArray[np.int64]], workers: int | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        x = self.images.x
        if isinstance(x, tuple):
            reader = Reader(x, self.images.index, self.images.transform, self.spec)
            pixels = read_cached(reader, self.images, parts, workers, self.cache)
        else:
            pixels = (fit_arrays(x[chosen], self.spec, self.images.source) for chosen in parts)
        with contextlib.closing(pixels):
            for chosen, found in zip(parts, pixels, strict=True):
                batch = normalize(found, self.spec, pin_memory=self.pin_memory)
                yield batch, torch.from_numpy(self.images.y[chosen])


def _check_images(x: npt.NDArray[Any], source: str) -> npt.NDArray[np.uint8]:
    if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.ndim not in (3, 4):
        came = f"{x.dtype} {list(x.shape)}" if isinstance(x, np.ndarray) else type(x).__name__
        raise DataError(f"x must be uint8 [n, h, w] or [n, h, w, c], got {came} in {source}")
    if 0 in x.shape:
        raise DataError(f"x must not be empty, got {list(x.shape)} in {source}")
    if x.ndim == 3:
        return x[..., None]
    if x.shape[3] > 16:
        hint = "; channels must be last" if x.shape[1] in (1, 3) else ""
        raise DataError(
            f"x must be [n, h, w, c], with at most 16 channels, got {list(x.shape)} in "
            f"{source}{hint}"
        )
    return x


def _check_labels(y: npt.NDArray[Any], n: int, source: str) -> npt.NDArray[np.int64]:
    if not isinstance(y, np.ndarray) or y.dtype.kind not in "iu" or y.shape != (n,):
        came = f"{y.dtype} {list(y.shape)}" if isinstance(y, np.ndarray) else type(y).__name__
        raise DataError(f"y must be integers [{n}], one label per image, got {came} in {source}")
    if not n:
        raise DataError(f"data: {source} contains no image")
    if int(y.min()) < 0:
        raise DataError(f"y must be at least 0, got {int(y.min())} in {source}")
    if int(y.max()) >= MOST_OUTPUTS:  # every class up to it has a name
        raise DataError(f"y must be less than {MOST_OUTPUTS}, got {int(y.max())} in {source}")
    return y.astype(np.int64)
