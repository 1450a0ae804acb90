"""Pairs of an image and a label, from any library, as one `ImageSet`.

Axes: n images, h and w pixels, c channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fastsal.data.image_set import ImageSet
from fastsal.errors import DataError

Pixels = npt.NDArray[np.uint8]


def stack_items(
    items: Iterable[tuple[Any, Any]], n: int, classes: Sequence[str], source: str
) -> ImageSet:
    """Read all images into one array.

    Args:
        items: `(image, label)`; an image as for `pixels_of`, a label a whole number, or a text,
            whose class is then its place among all the texts in order.
        n: how many there are.
        classes: names of the classes; empty names them by number.
        source: of the images.

    Raises:
        DataError: no images, images of several sizes, or labels of another kind.
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
                f"data: image {i} of {source} has {_size(pixels)} pixels and those before it "
                f"{_size(x[0])}; takes one size (images of several sizes lie in a folder per class)"
            )
        if pixels.shape[2] == 3 and x.shape[3] == 1:
            x = np.repeat(x, 3, axis=3)  # the first colour among grey images
        x[i] = pixels
    if x is None or len(labels) != n:
        raise DataError(f"data: {source} gave {len(labels)} images; takes {max(n, 1)}")
    y, names = numbered(labels, classes, source)
    return ImageSet(x, y, tuple(names), source)


def numbered(
    labels: Sequence[int | str], classes: Sequence[str], source: str
) -> tuple[npt.NDArray[np.int64], list[str]]:
    """Return labels as numbers `[n]`, and the names of the classes."""
    texts = {label for label in labels if isinstance(label, str)}
    if texts and len(texts) < len(set(labels)):
        raise DataError(f"data: {source} has labels that are texts and labels that are numbers")
    if texts:
        names = sorted(texts)
        place = {name: i for i, name in enumerate(names)}
        return np.array([place[str(label)] for label in labels], np.int64), names
    return np.array(labels, np.int64), [str(name) for name in classes]


def pixels_of(image: Any, what: str) -> Pixels:
    """Return uint8 `[h, w, 1]` (grey) or `[h, w, 3]`.

    Args:
        image: one of Pillow, an array uint8 `[h, w]` or `[h, w, c]`, or a tensor uint8 `[c, h, w]`.
        what: for messages.

    Raises:
        DataError: something else, or more than 8 bits.
    """
    import torch
    from PIL import Image

    if isinstance(image, Image.Image):
        if image.mode.startswith(("I", "F")):
            raise DataError(f"data: {what} has pixels of mode {image.mode}; takes 8 bits")
        grey = image.mode in ("1", "L", "LA")
        image = np.array(image.convert("L" if grey else "RGB"), np.uint8)
    elif isinstance(image, torch.Tensor):
        image = image.numpy() if image.ndim == 2 else image.movedim(0, -1).numpy()
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim not in (2, 3):
        came = (
            f"{image.dtype} {list(image.shape)}"
            if isinstance(image, np.ndarray)
            else type(image).__name__
        )
        raise DataError(f"data: {what} is {came}; takes an image of 8 bits")
    pixels: Pixels = image[..., None] if image.ndim == 2 else image
    if pixels.shape[2] not in (1, 3):
        raise DataError(f"data: {what} has {pixels.shape[2]} channels; takes 1 or 3")
    return pixels


def _label_of(label: Any, what: str) -> int | str:
    if isinstance(label, str):
        return label
    if hasattr(label, "item") and getattr(label, "ndim", 0) == 0:
        label = label.item()  # a number of numpy or torch
    if isinstance(label, bool) or not isinstance(label, int):
        raise DataError(f"data: {what} has label {label!r:.60}; takes a whole number or a text")
    return label


def _size(pixels: npt.NDArray[Any]) -> str:
    return f"{pixels.shape[0]}x{pixels.shape[1]}"
