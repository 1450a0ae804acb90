"""Labelled images by name: a folder, an `.npz` file, or a data set of another library."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from fastsal.data.folders import load_images
from fastsal.data.image_set import ImageSet
from fastsal.data.names import DataName, missing
from fastsal.errors import DataError, InvalidArgument

_TAKES = (
    "a folder of class folders, an .npz file, 'sklearn:digits', "
    "'torchvision:NAME?root=FOLDER&split=train' or 'hf:NAME?split=train&image=img&label=label'"
)


def open_images(
    spec: str | os.PathLike[str],
    *,
    classes: Sequence[str | int] | None = None,
    root: str | os.PathLike[str] | None = None,
    train: bool | None = None,
) -> ImageSet:
    """Open labelled images, however they are named.

    Args:
        spec: one of

            - a folder with one folder of images per class, or an `.npz` file: see `load_images`;
            - `sklearn:digits`, scikit-learn's 1,797 digits of 8x8 pixels, 16 shades of grey spread
              over 0 to 255 and rounded;
            - `torchvision:CIFAR10?root=/data&train=true`, any class of `torchvision.datasets` whose
              items are (image, label), its arguments after the question mark;
            - `hf:cifar10?split=train&image=img&label=label`, a data set of Hugging Face's
              `datasets`; `hf:/a/folder` is one that was saved to disk. `config` and `revision` are
              taken too; `image` and `label` name columns and may be left out if they are clear.

            Nothing is downloaded unless it says `download=true`.
        classes: names or numbers of the classes to keep, relabelled in this order. With None,
            classes of a library's data set that have no image are left out.
        root: the folder that relative paths start from; None takes the current one.
        train: which part of a library's data set is opened where `spec` names none: true the
            training part, false the test part.

    Returns:
        The images. Those in files of their own are read only when a batch asks for them.

    Raises:
        DataError: no such images; items that are no images with labels; images of several sizes
            that do not lie in files of their own.
        InvalidArgument: an unknown library, key or class.
        FastsalError: a library is not installed; the message says how to install it.
    """
    text = os.fspath(spec)
    base = Path(root) if root is not None else Path()
    found = re.match(r"([A-Za-z][A-Za-z-]+):", text)
    if isinstance(spec, str) and found:
        library = found[1]
        if library not in _LIBRARIES:
            if not (base / text).exists():
                raise InvalidArgument(f"data: got {text!r}; takes {_TAKES}")
        else:
            name = _parse(text, library, base)
            return _select(_LIBRARIES[library](name, train), classes)
    if train is not None:
        raise InvalidArgument(f"train: got {train}; {text} has no parts of its own: leave it out")
    return load_images(base / Path(text).expanduser(), classes=classes)


def _parse(text: str, library: str, root: Path) -> DataName:
    name, mark, rest = text[len(library) + 1 :].partition("?")
    if not name:
        raise InvalidArgument(f"data: {text!r} names no data set; takes {_TAKES}")
    query: dict[str, str] = {}
    for piece in rest.split("&") if mark else []:
        key, equals, value = piece.partition("=")
        if not key or not equals or key in query:
            raise InvalidArgument(
                f"data: {text!r} has {piece!r} after the question mark; takes key=value, each key "
                "once, with & between"
            )
        query[key] = unquote(value)
    return DataName(text, library, unquote(name), query, root)


def _select(images: ImageSet, classes: Sequence[str | int] | None) -> ImageSet:
    if classes is not None:
        images = images.select_classes(classes)
    counts = np.bincount(images.y, minlength=len(images.classes))
    if counts.min() == 0 and classes is not None:
        empty = images.classes[int(counts.argmin())]
        raise DataError(f"classes: {images.source} has no image of class {empty!r}")
    there = [int(k) for k in np.flatnonzero(counts)]
    if len(there) < 2:
        raise DataError(
            f"data: {images.source} has one class only ({images.classes[there[0]]}); takes two or "
            "more"
        )
    return images if len(there) == len(counts) else images.select_classes(there)


def _open_sklearn(name: DataName, train: bool | None) -> ImageSet:
    if name.name != "digits" or name.query:
        raise InvalidArgument(f"data: got {name.spec!r}; takes 'sklearn:digits'")
    if train is not None:
        raise InvalidArgument(f"train: got {train}; {name.spec} has one part: leave it out")
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise missing(name.spec, "scikit-learn") from None
    found = load_digits()
    x = np.rint(found.images * (255 / 16)).astype(np.uint8)
    return ImageSet(x, found.target.astype(np.int64), source=name.spec)


def _open_torchvision(name: DataName, train: bool | None) -> ImageSet:
    from fastsal.data.torchvision_images import open_torchvision

    return open_torchvision(name, train)


def _open_hugging_face(name: DataName, train: bool | None) -> ImageSet:
    from fastsal.data.huggingface_images import open_hugging_face

    return open_hugging_face(name, train)


_LIBRARIES: dict[str, Callable[[DataName, bool | None], ImageSet]] = {
    "sklearn": _open_sklearn,
    "torchvision": _open_torchvision,
    "hf": _open_hugging_face,
}
