"""Labelled images from a folder or an `.npz` file, and batches of them for a model.

Axes: n images (or images of a batch), h and w pixels, c channels (1 grey, 3 RGB).
"""

from __future__ import annotations

import difflib
import itertools
import math
import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsal.errors import DataError, FileFormatError, InvalidArgument
from fastsal.models import InputSpec

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
)
LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's mode "L"
_counter = itertools.count()


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images, in memory or as a list of files that are read when a batch asks for them.

    Attributes:
        x: uint8 `[n, h, w, c]`, or n paths of image files.
        y: int64 `[n]`, each in `0 .. len(classes) - 1`.
        classes: the names of the classes.
        source: where the images come from; two sets of one source can be told apart by `index`.
        index: int64 `[n]`, the position of each image in its source.
    """

    x: npt.NDArray[np.uint8] | tuple[Path, ...]
    y: npt.NDArray[np.int64]
    classes: tuple[str, ...] = ()
    source: str = ""
    index: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))

    def __post_init__(self) -> None:
        source = self.source or f"array {next(_counter)}"
        x = self.x if isinstance(self.x, tuple) else _check_images(self.x, source)
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
        return ImageSet(x, self.y[chosen], self.classes, self.source, self.index[chosen])

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
        return ImageSet(x, y[chosen], names, self.source, self.index[chosen])

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
                yield _prepare(x[chosen], self.spec, self.images.source), labels
                continue
            tensors = []
            for i in chosen:
                pixels = _decode(x[i])
                first = first or (x[i], pixels.shape[:2])
                if self.spec.size is None and pixels.shape[:2] != first[1]:
                    raise DataError(
                        f"size: {x[i]} has {_pixels(pixels.shape[:2])} and {first[0]} has "
                        f"{_pixels(first[1])}; a model of native size takes one size: give size"
                    )
                tensors.append(_prepare(pixels[None], self.spec, str(x[i])))
            yield torch.cat(tensors), labels


def load_images(
    path: str | os.PathLike[str], *, classes: Sequence[str | int] | None = None
) -> ImageSet:
    """Open labelled images.

    Args:
        path: an `.npz` file with `x` uint8 `[n, h, w]` or `[n, h, w, c]`, `y` integers `[n]` and,
            if they have names, `classes`; or a folder with one folder of images per class.
            Classes and images of a folder are in the order of their names.
        classes: names or numbers of the classes to keep, relabelled in this order.

    Returns:
        The images. Those of a folder are read only when a batch asks for them.

    Raises:
        DataError: no images, one class only, an empty class, wrong shapes, types or labels.
        FileFormatError: the `.npz` file is damaged.
    """
    path = Path(path)
    if path.is_dir():
        images = _open_folder(path)
    elif not path.exists():
        raise DataError(f"data: there is no file or folder {path}")
    elif path.suffix == ".npz":
        images = _open_npz(path)
    else:
        raise DataError(f"data: got {path}; takes a folder of class folders, or an .npz file")
    if len(images.classes) < 2:
        raise DataError(f"data: {path} has one class only ({images.classes[0]}); takes two or more")
    return images if classes is None else images.select_classes(classes)


# ----------------------------------------------------------------------------------- opening


def _open_npz(path: Path) -> ImageSet:
    try:
        with np.load(path, allow_pickle=False) as file:
            absent = [name for name in ("x", "y") if name not in file.files]
            if absent:
                raise DataError(
                    f"data: {path} has no array {' and no array '.join(absent)}; "
                    f"it has {', '.join(file.files) or 'none'}"
                )
            x, y = file["x"], file["y"]
            names = file["classes"] if "classes" in file.files else np.empty(0, "U1")
    except DataError:
        raise
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, KeyError) as error:
        raise FileFormatError(f"data: {path} cannot be read as .npz ({error})") from None
    if names.ndim != 1 or names.dtype.kind not in "USiu":
        raise DataError(f"classes: {path} holds {names.dtype} {list(names.shape)}; takes names [k]")
    classes = [n.decode() if isinstance(n, bytes) else str(n) for n in names.tolist()]
    return ImageSet(x, y, tuple(classes), str(path.resolve()))


def _open_folder(path: Path) -> ImageSet:
    folders = sorted(
        (p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")),
        key=lambda p: p.name,
    )
    if not folders:
        raise DataError(f"data: {path} has no folders; takes one folder of images per class")
    if len(folders) == 1:
        raise DataError(
            f"data: {path} has one class only ({folders[0].name}); takes two or more folders"
        )
    files: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        found = sorted(
            (
                p
                for p in folder.rglob("*")
                if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".") and p.is_file()
            ),
            key=lambda p: p.relative_to(folder).as_posix(),
        )
        if not found:
            raise DataError(
                f"data: class folder {folder} holds no image; takes {', '.join(_suffixes())}"
            )
        files.extend(found)
        labels.extend([label] * len(found))
    names = tuple(folder.name for folder in folders)
    return ImageSet(tuple(files), np.array(labels, np.int64), names, str(path.resolve()))


def _suffixes() -> list[str]:
    return sorted(IMAGE_SUFFIXES)


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


# ----------------------------------------------------------------------------------- pixels


def _decode(path: Path) -> npt.NDArray[np.uint8]:
    """Read one image file as uint8 `[h, w, 1]` (grey) or `[h, w, 3]`."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise DataError(f"data: {path} has pixels of mode {image.mode}; takes 8 bits")
            grey = image.mode in ("1", "L", "LA")
            pixels = np.array(image.convert("L" if grey else "RGB"), np.uint8)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"data: {path} cannot be read as an image ({error})") from None
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _prepare(x: npt.NDArray[np.uint8], spec: InputSpec, source: str) -> Tensor:
    """Turn uint8 `[n, h, w, c]` into normalised float32 `[n, spec.channels, *spec.size]`."""
    images = torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2).float()
    channels = images.shape[1]
    if channels == 3 and spec.channels == 1:
        images = (images * torch.tensor(LUMINANCE).view(1, 3, 1, 1)).sum(1, keepdim=True)
    elif channels == 1 and spec.channels > 1:
        images = images.expand(-1, spec.channels, -1, -1)
    elif channels != spec.channels:
        raise DataError(f"x: {source} has {channels} channels; the model takes {spec.channels}")
    if spec.size is not None and tuple(images.shape[2:]) != spec.size:
        images = _resize(images, spec.size, spec.interpolation)
    mean = torch.tensor(spec.mean).view(1, -1, 1, 1) * 255
    std = torch.tensor(spec.std).view(1, -1, 1, 1) * 255
    return ((images - mean) / std).contiguous()


def _resize(images: Tensor, size: tuple[int, int], interpolation: str) -> Tensor:
    """Fit the shorter side of `[n, c, h, w]` to `size`, then crop about the centre."""
    height, width = images.shape[2:]
    scale = max(size[0] / height, size[1] / width)
    fitted = (max(size[0], round(height * scale)), max(size[1], round(width * scale)))
    if interpolation == "nearest":
        images = F.interpolate(images, fitted, mode="nearest-exact")
    else:
        images = F.interpolate(
            images, fitted, mode=interpolation, align_corners=False, antialias=True
        ).clamp_(0, 255)
    top, left = (fitted[0] - size[0]) // 2, (fitted[1] - size[1]) // 2
    return images[:, :, top : top + size[0], left : left + size[1]]


def _pixels(size: tuple[int, ...]) -> str:
    return f"{size[0]}x{size[1]} pixels"
