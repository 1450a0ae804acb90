"""Image sets from the `(image, label)` pairs of other libraries.

Axes: n images, h and w pixels, c channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastsal.data.image_set import ImageSet
from fastsal.errors import DataError
from fastsal.utils.numbers import as_integer

Pixels = npt.NDArray[np.uint8]


def stack_items(
    items: Iterable[tuple[Any, Any]], n: int, classes: Sequence[str], source: str
) -> ImageSet:
    """Read images into one array.

    Args:
        items: Pairs of an image (see `pixels_of`) and a label, an integer or a string. Strings are
            numbered in sorted order.
        n: Number of items.
        classes: Names of the classes; empty for their numbers.
        source: Where the images come from.

    Raises:
        DataError: There are no images, they differ in size, or a label has another type.
    """
    x: Pixels | None = None
    labels: list[int | str] = []
    for i, (image, label) in enumerate(items):
        pixels = pixels_of(image, f"image {i} of {source}")
        labels.append(_label_of(label, f"image {i} of {source}"))
        if x is None:
            x = np.empty((n, *pixels.shape), np.uint8)
        if pixels.shape[:2] != x.shape[1:3]:
            raise DataError(
                f"data: the images of {source} must have one size, got {_size(x[0])} and "
                f"{_size(pixels)} (image {i}); store images of several sizes in class folders"
            )
        if pixels.shape[2] == 3 and x.shape[3] == 1:
            x = np.repeat(x, 3, axis=3)  # the first RGB image
        x[i] = pixels
    if x is None or len(labels) != n:
        raise DataError(f"data: {source} must have {max(n, 1)} images, got {len(labels)}")
    y, names = numbered(labels, classes, source)
    is_sorted = isinstance(labels[0], str)
    return ImageSet(x, y, tuple(names), source, numbering="sorted" if is_sorted else "data")


def numbered(
    labels: Sequence[int | str], classes: Sequence[str], source: str
) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Return labels as class numbers `[n]`, and the names of the classes."""
    texts = {label for label in labels if isinstance(label, str)}
    if texts and len(texts) < len(set(labels)):
        raise DataError(f"data: the labels of {source} must be integers or strings, got both")
    if texts:
        names = sorted(texts)
        place = {name: i for i, name in enumerate(names)}
        return np.array([place[str(label)] for label in labels], np.int64), names
    return np.array(labels, np.int64), [str(name) for name in classes]


def pixels_of(image: Any, what: str) -> Pixels:
    """Return the pixels of an image, uint8 `[h, w, 1]` (grayscale) or `[h, w, 3]` (RGB).

    Args:
        image: A Pillow image, an array uint8 `[h, w]` or `[h, w, c]`, or a tensor uint8
            `[h, w]` or `[c, h, w]`.
        what: Name of the image, for messages.

    Raises:
        DataError: The object is no image, or has more than 8 bits per channel.
    """
    import torch
    from PIL import Image

    if isinstance(image, Image.Image):
        if image.mode.startswith(("I", "F")):
            raise DataError(f"data: {what} must have 8 bits per channel, got mode {image.mode}")
        is_gray = image.mode in ("1", "L", "LA")
        image = np.array(image.convert("L" if is_gray else "RGB"), np.uint8)
    elif isinstance(image, torch.Tensor):
        image = image.numpy() if image.ndim == 2 else image.movedim(0, -1).numpy()
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim not in (2, 3):
        came = (
            f"{image.dtype} {list(image.shape)}"
            if isinstance(image, np.ndarray)
            else type(image).__name__
        )
        raise DataError(f"data: {what} must be an image with 8 bits per channel, got {came}")
    pixels: Pixels = image[..., None] if image.ndim == 2 else image
    if pixels.shape[2] not in (1, 3):
        raise DataError(f"data: {what} must have 1 or 3 channels, got {pixels.shape[2]}")
    return pixels


def _label_of(label: Any, what: str) -> int | str:
    if isinstance(label, str):
        return label
    number = as_integer(label)
    if number is None:
        raise DataError(
            f"data: the label of {what} must be an integer or a string, got {label!r:.60}"
        )
    return number


def _size(pixels: npt.NDArray[Any]) -> str:
    return f"{pixels.shape[0]}x{pixels.shape[1]}"
