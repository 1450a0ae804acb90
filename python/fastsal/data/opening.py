"""Labeled images by name: a folder, an `.npz` file, or a data set of another library."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from fastsal.data.class_map import ClassMap
from fastsal.data.folders import check_class_arguments, load_images
from fastsal.data.image_set import ImageSet
from fastsal.data.names import DataName, missing
from fastsal.data.npz_files import SUFFIX, split_of_name, splits_of
from fastsal.errors import DataError, InvalidArgument
from fastsal.utils.paths import user_path

_VALID = (
    "a folder of class folders, an .npz file, a .tar archive, 'sklearn:digits', "
    "'torchvision:NAME?root=FOLDER&split=train' or 'hf:NAME?split=train&image=img&label=label'"
)


# timm's readers of indexed data sets, and those that stream.
_READERS = {"hfds": "hf", "torch": "torchvision"}
_STREAMED = ("hfids", "tfds", "wds")
_LIBRARY = re.compile(r"([A-Za-z][A-Za-z-]+):")


def open_images(
    spec: str | os.PathLike[str],
    *,
    classes: Sequence[str | int] | None = None,
    root: str | os.PathLike[str] | None = None,
    train: bool | None = None,
    class_map: ClassMap | None = None,
) -> ImageSet:
    """Open labeled images by path or by the name of a data set.

    Args:
        spec: One of

            - a folder with one subfolder of images per class, an `.npz` file or a tar archive, as
              for `load_images`;
            - `sklearn:digits`: scikit-learn's 1,797 digits of 8x8 pixels, with 16 gray levels
              scaled to 0 to 255 and rounded;
            - `torchvision:CIFAR10?root=/data&train=true`: any class of `torchvision.datasets` whose
              items are `(image, label)`, with its arguments after the question mark;
            - `hf:cifar10?split=train&image=img&label=label`: a data set of Hugging Face's
              `datasets`, or `hf:/a/folder` for one saved to disk. Keys are `split`, `config`,
              `revision`, and the columns `image` and `label`, which are optional if unambiguous;
            - timm's names `torch/cifar10` and `hfds/cifar10`, with the same arguments.

            Nothing is downloaded without `download=true`.
        classes: Names or numbers of the classes to keep, relabeled in this order. None keeps all
            classes that have an image.
        root: Folder that relative paths refer to; None for the current folder.
        train: Whether to open the training split (True) or the test split (False) of a data set
            whose `spec` names no split; None for the default of the library.
        class_map: Which output of the model each class belongs to, as for `load_images`; not with
            `classes`.

    Returns:
        The images. Images stored as files are read when a batch needs them.

    Raises:
        DataError: The images cannot be opened, an item is not an image with a label, or images
            that are not stored as files differ in size.
        InvalidArgument: The library, a key or a class is unknown.
        FastsalError: The library is not installed.
    """
    check_class_arguments(classes, class_map)
    text = os.fspath(spec)
    base = user_path(root) if root is not None else Path()
    text = _own_name(text, base) if isinstance(spec, str) else text
    found = _LIBRARY.match(text)
    if isinstance(spec, str) and found:
        library = found[1]
        if library not in _LIBRARIES:
            if not (base / text).exists():
                raise InvalidArgument(f"data must be {_VALID}, got {text!r}")
        else:
            name = _parse(text, library, base)
            images = _LIBRARIES[library](name, train)
            if class_map is not None:
                return images.map_classes(class_map)
            return _select(images, classes)
    path = base / user_path(text)
    if train is not None:
        splits = splits_of(path) if path.suffix == SUFFIX and path.is_file() else []
        wanted = "train" if train else "test"
        if wanted not in splits:
            raise InvalidArgument(
                f"train must be None for {text}, which has no splits, got {train}"
            )
        path = path.with_name(f"{path.name}?split={wanted}")
    return load_images(path, classes=classes, class_map=class_map)


def is_name(text: str) -> bool:
    """Whether a text names a data set of a library, rather than a path."""
    library = _own_name(text, Path()).partition(":")[0]
    return library in _LIBRARIES and not Path(text).exists()


def file_of(text: str, root: Path) -> Path | None:
    """Return the file or folder that is read, which may not exist; None for a name of a library.

    Args:
        text: As the `spec` of `open_images`.
        root: Folder that relative paths refer to.
    """
    path = root / user_path(text)
    if path.exists():
        return path
    is_named = _LIBRARY.match(_own_name(text, root)) is not None
    return None if is_named else Path(split_of_name(str(path))[0])


def _own_name(text: str, base: Path) -> str:
    """Return a name of timm's readers as `library:name`; other texts as they are.

    Raises:
        InvalidArgument: The reader only streams images, which have no positions.
    """
    reader, slash, rest = text.partition("/")
    if not slash or not rest or (base / text).exists():
        return text
    if reader in _STREAMED:
        raise InvalidArgument(
            f"data: {text!r} is streamed, which is not supported; pass a folder of its tar "
            "archives, or hfds/NAME"
        )
    return f"{_READERS[reader]}:{rest}" if reader in _READERS else text


def _parse(text: str, library: str, root: Path) -> DataName:
    name, mark, rest = text[len(library) + 1 :].partition("?")
    if not name:
        raise InvalidArgument(f"data must be {_VALID}, got {text!r} without a name")
    query: dict[str, str] = {}
    for piece in rest.split("&") if mark else []:
        key, equals, value = piece.partition("=")
        if not key or not equals or key in query:
            raise InvalidArgument(
                f"data: the arguments of {text!r} must be key=value, separated by &, with distinct "
                f"keys, got {piece!r}"
            )
        query[key] = unquote(value)
    return DataName(text, library, unquote(name), query, root)


def _select(images: ImageSet, classes: Sequence[str | int] | None) -> ImageSet:
    if classes is not None:
        images = images.select_classes(classes)
    counts = np.bincount(images.y, minlength=len(images.classes))
    if counts.min() == 0 and classes is not None:
        empty = images.classes[int(counts.argmin())]
        raise DataError(f"classes: {images.source} contains no image of class {empty!r}")
    there = [int(k) for k in np.flatnonzero(counts)]
    if len(there) < 2:
        raise DataError(
            f"data: {images.source} must have at least 2 classes, got {images.classes[there[0]]} "
            "only"
        )
    return images if len(there) == len(counts) else images.select_classes(there)


def _open_sklearn(name: DataName, train: bool | None) -> ImageSet:
    if name.name != "digits" or name.query:
        raise InvalidArgument(f"data must be 'sklearn:digits', got {name.spec!r}")
    if train is not None:
        raise InvalidArgument(
            f"train must be None for {name.spec}, which has no splits, got {train}"
        )
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
