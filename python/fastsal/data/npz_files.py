"""Labeled images of an `.npz` file, with one set of images or, as MedMNIST has it, with splits.

Axes: n images, h and w pixels, c channels, k classes.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

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
    try:
        with np.load(path, allow_pickle=False) as file:
            names = list(file.files)
    except _DAMAGED as error:
        raise _unreadable(path, error) from None
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
    try:
        with np.load(path, allow_pickle=False) as file:
            needed = (images, labels) if labeled else (images,)
            absent = [name for name in needed if name not in file.files]
            if absent:
                raise DataError(
                    f"data: {path} must contain the arrays {' and '.join(needed)}, got "
                    f"{', '.join(file.files) or 'none'} (of splits: train_images and train_labels)"
                )
            x = file[images]
            y = file[labels] if labels in file.files else np.zeros(len(x), np.int64)
            named = labels in file.files and "classes" in file.files
            names = file["classes"] if named else np.empty(0, "U1")
    except DataError:
        raise
    except _DAMAGED as error:
        raise _unreadable(path, error) from None
    if split is not None:
        y = _one_label(y, f"{labels} of {path}") if labeled else np.zeros(len(x), np.int64)
    if names.ndim != 1 or names.dtype.kind not in "USiu":
        raise DataError(
            f"classes in {path} must be names [k], got {names.dtype} {list(names.shape)}"
        )
    classes = [n.decode() if isinstance(n, bytes) else str(n) for n in names.tolist()]
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


_DAMAGED = (zipfile.BadZipFile, ValueError, OSError, EOFError, KeyError)


def _unreadable(path: Path, error: Exception) -> FileFormatError:
    return FileFormatError(f"data: {path} cannot be read as .npz ({error})")
