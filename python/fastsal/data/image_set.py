"""Labelled images, and batches of them for a model.

Axes: n images (or images of a batch), h and w pixels, c channels (1 grey, 3 RGB).
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastsal.data.pixels import decode, prepare, size_text
from fastsal.errors import DataError, InvalidArgument
from fastsal.models.inputs import InputSpec

_counter = itertools.count()

# transform(pixels uint8 [h, w, c], index of the image in its source) -> pixels uint8 [h, w, c]
Transform = Callable[[npt.NDArray[np.uint8], int], npt.NDArray[np.uint8]]


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images, in memory or as a list of files that are read when a batch asks for them.

    Attributes:
        x: uint8 `[n, h, w, c]`, or n paths of image files.
        y: int64 `[n]`, each in `0 .. len(classes) - 1`.
        classes: the names of the classes.
        source: where the images come from; two sets of one source can be told apart by `index`.
        index: int64 `[n]`, the position of each image in its source.
        transform: done to the pixels of a file, with its `index`, each time that they are read.
    """

    x: npt.NDArray[np.uint8] | tuple[Path, ...]
    y: npt.NDArray[np.int64]
    classes: tuple[str, ...] = ()
    source: str = ""
    index: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    transform: Transform | None = None

    def __post_init__(self) -> None:
        source = self.source or f"array {next(_counter)}"
        x = self.x if isinstance(self.x, tuple) else _check_images(self.x, source)
        if self.transform is not None and not isinstance(x, tuple):
            raise InvalidArgument(
                f"transform: {source} is in memory; takes files, or use ImageSet.transformed"
            )
        y = _check_labels(self.y, len(x), source)
        classes = tuple(str(name) for name in self.classes)
        if not classes:
            classes = tuple(str(k) for k in range(int(y.max()) + 1))
        if int(y.max()) >= len(classes):
            raise DataError(
                f"y: label {int(y.max())} in {source} has no class; there are {len(classes)}"
            )
        if len(set(classes)) != len(classes):
            raise DataError(f"classes: {source} names a class twice")
        index = self.index if len(self.index) else np.arange(len(x), dtype=np.int64)
        for name, value in (
            ("x", x), ("y", y), ("classes", classes), ("source", source), ("index", index)
        ):  # fmt: skip
            object.__setattr__(self, name, value)

    def __len__(self) -> int:
        return len(self.y)

    def __repr__(self) -> str:
        return f"ImageSet({len(self)} images, {len(self.classes)} classes, {self.source})"

    def subset(self, indices: Sequence[int] | npt.NDArray[Any]) -> ImageSet:
        """Keep the images at `indices`, in that order.

        Raises:
            InvalidArgument: an index is out of range, or there is none.
        """
        chosen = np.asarray(indices)
        if chosen.ndim != 1 or not len(chosen) or not np.issubdtype(chosen.dtype, np.integer):
            raise InvalidArgument(
                f"indices: got {chosen.dtype} {list(chosen.shape)}; takes one or more integers"
            )
        if chosen.min() < 0 or chosen.max() >= len(self):
            raise InvalidArgument(
                f"indices: {int(chosen.min())} to {int(chosen.max())}; takes 0 to {len(self) - 1}"
            )
        x = tuple(self.x[i] for i in chosen) if isinstance(self.x, tuple) else self.x[chosen]
        return replace(self, x=x, y=self.y[chosen], index=self.index[chosen])

    def select_classes(self, classes: Sequence[str | int]) -> ImageSet:
        """Keep some classes, by name or number, and relabel them `0 .. k - 1` in the order given.

        Raises:
            InvalidArgument: a class is unknown or named twice, or fewer than two are named.
        """
        numbers = [self._class_number(name) for name in classes]
        if len(set(numbers)) != len(numbers) or len(numbers) < 2:
            raise InvalidArgument(f"classes: got {list(classes)}; takes two or more, each once")
        relabel = np.full(len(self.classes), -1, np.int64)
        relabel[numbers] = np.arange(len(numbers))
        y = relabel[self.y]
        chosen = np.flatnonzero(y >= 0)
        if not len(chosen):
            raise InvalidArgument(f"classes: {self.source} has no image of {list(classes)}")
        x = tuple(self.x[i] for i in chosen) if isinstance(self.x, tuple) else self.x[chosen]
        names = tuple(self.classes[k] for k in numbers)
        return replace(self, x=x, y=y[chosen], classes=names, index=self.index[chosen])

    def transformed(self, transform: Transform) -> ImageSet:
        """Change every image, at once in memory and when they are read for files.

        Args:
            transform: takes pixels uint8 `[h, w, c]` and the image's `index`, returns the same
                number of channels; of the same size in memory. Done after any that is there.

        Returns:
            The changed images, of the same source and index as those that they come from.
        """
        if isinstance(self.x, tuple):
            before = self.transform
            chain = transform if before is None else _Both(before, transform)
            return replace(self, transform=chain)
        changed = [transform(x, int(i)) for x, i in zip(self.x, self.index, strict=True)]
        return replace(self, x=np.stack(changed))

    def split(self, *fractions: float, seed: int = 0) -> tuple[ImageSet, ...]:
        """Cut into disjoint parts, each with its share of every class.

        Args:
            fractions: the share of each part; they sum to 1.
            seed: of the shuffle within each class.

        Returns:
            One set a fraction, images in the order of this set.

        Raises:
            InvalidArgument: fractions that are not positive or do not sum to 1.
            DataError: a class too small to be in every part.
        """
        if not fractions or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
            raise InvalidArgument(f"fractions: got {fractions}; takes positive shares of sum 1")
        rng = np.random.default_rng(seed)
        parts: list[list[npt.NDArray[np.int64]]] = [[] for _ in fractions]
        for k, name in enumerate(self.classes):
            members = rng.permutation(np.flatnonzero(self.y == k))
            cuts = np.rint(np.cumsum(fractions) * len(members)).astype(int)[:-1]
            for part, piece in zip(parts, np.split(members, cuts), strict=True):
                if not len(piece):
                    raise DataError(
                        f"fractions: class {name!r} of {self.source} has {len(members)} images, "
                        f"too few for parts of {fractions}"
                    )
                part.append(piece)
        return tuple(self.subset(np.sort(np.concatenate(part))) for part in parts)

    @property
    def is_sorted_by_class(self) -> bool:
        """Whether the first images are all of the first class, as in a folder per class."""
        return bool((np.diff(self.y) >= 0).all())

    def batches(
        self,
        spec: InputSpec,
        batch_size: int = 64,
        samples: int | None = None,
        start: int = 0,
        shuffle_seed: int | None = None,
    ) -> Batches:
        """Give batches that a model takes; every pass over them is the same.

        Args:
            spec: channels, size and normalisation. Grey becomes RGB by repetition, RGB becomes
                grey by luminance (ITU-R BT.601). If the size differs, the shorter side is fitted
                (antialiased) and the longer is cropped about its centre.
            batch_size: images a batch; the last may be smaller.
            samples: images in all; None takes all from `start` on.
            start: images to pass over.
            shuffle_seed: of a fixed shuffle before `start` and `samples` count; None keeps the
                order.

        Returns:
            An iterable of `(images float32 [n, c, h, w], labels int64 [n])`.

        Raises:
            DataError: fewer images than `samples` after `start`.
            InvalidArgument: a number out of range.
        """
        if batch_size < 1:
            raise InvalidArgument(f"batch_size: got {batch_size}; takes 1 or more")
        if start < 0:
            raise InvalidArgument(f"start: got {start}; takes 0 or more")
        if samples is not None and samples < 1:
            raise InvalidArgument(f"samples: got {samples}; takes 1 or more, or None")
        left = len(self) - start
        if left < (samples or 1):
            after = f" after the first {start}" if start else ""
            raise DataError(
                f"samples: asked for {samples or 'all'}, but {self.source} has {max(left, 0)} "
                f"images{after}"
            )
        order = np.arange(len(self))
        if shuffle_seed is not None:
            order = np.random.default_rng(shuffle_seed).permutation(order)
        end = len(self) if samples is None else start + samples
        return Batches(self, spec, order[start:end], batch_size)

    def _class_number(self, name: str | int) -> int:
        if isinstance(name, str) and name in self.classes:
            return self.classes.index(name)
        if isinstance(name, (int, np.integer)) and 0 <= name < len(self.classes):
            return int(name)
        near = difflib.get_close_matches(str(name), self.classes, n=3)
        hint = f" (close: {', '.join(near)})" if near else ""
        raise InvalidArgument(
            f"classes: {self.source} has no class {name!r}{hint}; it has "
            f"{', '.join(self.classes[:10])}{', ...' if len(self.classes) > 10 else ''}"
        )


@dataclass(frozen=True)
class _Both:
    """Two transforms, one after the other."""

    first: Transform
    second: Transform

    def __call__(self, pixels: npt.NDArray[np.uint8], index: int) -> npt.NDArray[np.uint8]:
        return self.second(self.first(pixels, index), index)


@dataclass(frozen=True, eq=False)
class Batches:
    """Batches of an `ImageSet`, read and normalised as they are asked for; see `batches`."""

    images: ImageSet
    spec: InputSpec
    order: npt.NDArray[np.int64]
    batch_size: int

    @property
    def samples(self) -> int:
        """Images in all."""
        return len(self.order)

    def __len__(self) -> int:
        return math.ceil(len(self.order) / self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        first: tuple[Path, tuple[int, int]] | None = None
        x = self.images.x
        for begin in range(0, len(self.order), self.batch_size):
            chosen = self.order[begin : begin + self.batch_size]
            labels = torch.from_numpy(self.images.y[chosen])
            if not isinstance(x, tuple):
                yield prepare(x[chosen], self.spec, self.images.source), labels
                continue
            tensors = []
            for i in chosen:
                pixels = decode(x[i])
                if self.images.transform is not None:
                    pixels = self.images.transform(pixels, int(self.images.index[i]))
                first = first or (x[i], pixels.shape[:2])
                if self.spec.size is None and pixels.shape[:2] != first[1]:
                    raise DataError(
                        f"size: {x[i]} has {size_text(pixels.shape[:2])} and {first[0]} has "
                        f"{size_text(first[1])}; a model of native size takes one size: give size"
                    )
                tensors.append(prepare(pixels[None], self.spec, str(x[i])))
            yield torch.cat(tensors), labels


def _check_images(x: npt.NDArray[Any], source: str) -> npt.NDArray[np.uint8]:
    if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.ndim not in (3, 4):
        came = f"{x.dtype} {list(x.shape)}" if isinstance(x, np.ndarray) else type(x).__name__
        raise DataError(f"x: {source} holds {came}; takes uint8 [n, h, w] or [n, h, w, c]")
    if 0 in x.shape:
        raise DataError(f"x: {source} holds no pixels, {list(x.shape)}")
    if x.ndim == 3:
        return x[..., None]
    if x.shape[3] > 16:
        hint = "; channels come last" if x.shape[1] in (1, 3) else ""
        raise DataError(f"x: {source} holds {list(x.shape)}; takes uint8 [n, h, w, c]{hint}")
    return x


def _check_labels(y: npt.NDArray[Any], n: int, source: str) -> npt.NDArray[np.int64]:
    if not isinstance(y, np.ndarray) or y.dtype.kind not in "iu" or y.shape != (n,):
        came = f"{y.dtype} {list(y.shape)}" if isinstance(y, np.ndarray) else type(y).__name__
        raise DataError(f"y: {source} holds {came}; takes integers [{n}], one label an image")
    if not n:
        raise DataError(f"data: {source} holds no image")
    if int(y.min()) < 0:
        raise DataError(f"y: {source} holds label {int(y.min())}; takes 0 or more")
    return y.astype(np.int64)
