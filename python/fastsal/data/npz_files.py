"""Labeled images of an `.npz` file, with one set of images or, as MedMNIST has it, with splits.

Axes: n images, h and w pixels, c channels, k classes.
"""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastsal.data.image_set import ImageSet
from fastsal.errors import DataError, FileFormatError, InvalidArgument
from fastsal.utils.suggestions import did_you_mean

SUFFIX = ".npz"
_QUERY = "?split="


def split_of_name(text: str) -> tuple[str, str | None]:
    """Split `file.npz?split=NAME` into the path and the name; None for a path alone."""
    path, mark, split = text.partition(_QUERY)
    return (path, split) if mark and path.endswith(SUFFIX) else (text, None)


def splits_of(path: Path) -> list[str]:
    """Return the names of the splits of a file: of each there are NAME_images and NAME_labels.

    Raises:
        FileFormatError: The file is damaged.
    """
    with _opened(path) as file:
        names = list(file.files)
    found = [n.removesuffix("_images") for n in names if n.endswith("_images")]
    splits = [name for name in found if f"{name}_labels" in names]
    return [] if "x" in names else splits


def open_npz(path: Path, *, labeled: bool, split: str | None = None) -> ImageSet:
    """Open the images of an `.npz` file, see `fastsal.load_images`.

    Raises:
        DataError: Arrays are missing, or their shapes or types are invalid.
        FileFormatError: The file is damaged.
        InvalidArgument: The file has no such split, or has several and none is given.
    """
    splits = splits_of(path)
    if splits and split is None:
        raise InvalidArgument(
            f"data: {path} has the splits {', '.join(splits)}; choose one, for example "
            f"{path.name}{_QUERY}{splits[0]}"
        )
    if split is not None and split not in splits:
        raise InvalidArgument(
            f"data: {path} has no split {split!r}, only {', '.join(splits) or 'one set of images'}"
            f"{did_you_mean(split, splits)}"
        )
    images, labels = ("x", "y") if split is None else (f"{split}_images", f"{split}_labels")
    with _opened(path) as file:
        needed = (images, labels) if labeled else (images,)
        absent = [name for name in needed if name not in file.files]
        if absent:
            raise DataError(
                f"data: {path} must contain the arrays {' and '.join(needed)}, got "
                f"{', '.join(file.files) or 'none'} (of splits: train_images and train_labels)"
            )
        x = _array(file, images)
        n = len(x) if x.ndim else 0
        y = _array(file, labels) if labels in file.files else np.zeros(n, np.int64)
        named = labels in file.files and "classes" in file.files
        names = _array(file, "classes") if named else np.empty(0, "U1")
    if split is not None:
        y = _one_label(y, f"{labels} of {path}") if labeled else np.zeros(n, np.int64)
    if names.ndim != 1 or names.dtype.kind not in "USiu":
        raise DataError(
            f"classes in {path} must be names [k], got {names.dtype} {list(names.shape)}"
        )
    classes = [_text(name, path) for name in names.tolist()]
    # The images of another split have the same indices, so that the split is part of the source.
    source = str(path.resolve()) + (f"{_QUERY}{split}" if split else "")
    return ImageSet(x, y, tuple(classes), source)


def _one_label(y: Any, what: str) -> Any:
    """Return labels `[n]`, of which MedMNIST stores `[n, 1]`."""
    if y.ndim == 2 and y.shape[1] == 1:
        return y[:, 0]
    if y.ndim == 2:
        raise DataError(
            f"data: {what} must have one label per image, [n] or [n, 1], got {list(y.shape)}; "
            "several labels per image are not supported"
        )
    return y


def _text(name: object, path: Path) -> str:
    """Return the name of a class as text; bytes are those of UTF-8."""
    try:
        return name.decode() if isinstance(name, bytes) else str(name)
    except UnicodeDecodeError:
        raise DataError(f"classes in {path} must be names in UTF-8, got {name!r}") from None


def _array(file: np.lib.npyio.NpzFile, name: str) -> npt.NDArray[Any]:
    found = file[name]
    if not isinstance(found, np.ndarray):  # NumPy returns the bytes of what has another format
        raise ValueError(f"{name} is not stored as an array")
    return found


# Also of headers that ask for more than there can be, and of archives that are encrypted.
_DAMAGED = (
    *(zipfile.BadZipFile, zlib.error, ValueError, OSError, EOFError, KeyError),
    *(MemoryError, OverflowError, RuntimeError),
)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    """Open a file; an error of NumPy in the block is a FileFormatError."""
    try:
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it has a single array, as .npy files have")
        with file:
            yield file
    except DataError:
        raise
    except _DAMAGED as error:
        raise FileFormatError(f"data: {path} cannot be read as .npz ({error})") from None
