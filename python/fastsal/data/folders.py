"""Labeled images from a folder or an `.npz` file."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastsal.data.class_map import ClassMap
from fastsal.data.image_set import ImageSet
from fastsal.errors import DataError, FileFormatError, InvalidArgument

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
)


def load_images(
    path: str | os.PathLike[str],
    *,
    classes: Sequence[str | int] | None = None,
    labeled: bool = True,
    class_map: ClassMap | None = None,
) -> ImageSet:
    """Open labeled images from a folder or an `.npz` file.

    Args:
        path: An `.npz` file with `x` uint8 `[n, h, w]` or `[n, h, w, c]`, integers `y` `[n]` and,
            optionally, names `classes` `[k]`; or a folder with one subfolder of images per class.
            Classes and images of a folder are sorted by name.
        classes: Names or numbers of the classes to keep, relabeled in this order.
        labeled: False also accepts images without labels, as one class: an `.npz` without `y`, or
            a folder that contains images itself or has one subfolder only.
        class_map: Which output of the model each class belongs to; labels are then indices of
            outputs. None numbers the folders in the order of their names. "imagenet" numbers
            WordNet ids as ImageNet's 1,000 classes are ("imagenet-22k" and so on: timm's larger
            sets), "natural" sorts numbers in names by value (class2 before class10). Otherwise
            `{name: index}`, names in the order of the outputs, or a file of either: JSON, or text
            with a name and an index, or a name, on each line.

    Returns:
        The images. Image files of a folder are read when a batch needs them.

    Raises:
        DataError: There are no images, a class is empty, there is only one class, or shapes, types
            or labels are invalid.
        FileFormatError: The `.npz` file or the file of the class map is damaged.
        InvalidArgument: The class map lacks a class, or has one index for two.
    """
    check_class_arguments(classes, class_map)
    path = Path(path)
    if path.is_dir():
        images = _open_folder(path) if labeled or _has_classes(path) else _open_flat(path)
    elif not path.exists():
        raise DataError(f"data: there is no file or folder {path}")
    elif path.suffix == ".npz":
        images = _open_npz(path, labeled=labeled)
    else:
        raise DataError(f"data must be a folder of class folders or an .npz file, got {path}")
    if len(images.classes) < 2 and labeled:
        raise DataError(f"data: {path} must have at least 2 classes, got {images.classes[0]} only")
    if class_map is not None and labeled:
        images = images.map_classes(class_map)
    return images if classes is None else images.select_classes(classes)


def check_class_arguments(classes: object, class_map: object) -> None:
    """Raise InvalidArgument if both `classes` and `class_map` are given."""
    if classes is not None and class_map is not None:
        raise InvalidArgument(
            "class_map must be None with classes, which are numbered in their order; for both call "
            "images.select_classes(...).map_classes(...)"
        )


def _open_npz(path: Path, *, labeled: bool) -> ImageSet:
    try:
        with np.load(path, allow_pickle=False) as file:
            needed = ("x", "y") if labeled else ("x",)
            absent = [name for name in needed if name not in file.files]
            if absent:
                raise DataError(
                    f"data: {path} must contain the arrays {' and '.join(needed)}, got "
                    f"{', '.join(file.files) or 'none'}"
                )
            x = file["x"]
            y = file["y"] if "y" in file.files else np.zeros(len(x), np.int64)
            named = "y" in file.files and "classes" in file.files
            names = file["classes"] if named else np.empty(0, "U1")
    except DataError:
        raise
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, KeyError) as error:
        raise FileFormatError(f"data: {path} cannot be read as .npz ({error})") from None
    if names.ndim != 1 or names.dtype.kind not in "USiu":
        raise DataError(
            f"classes in {path} must be names [k], got {names.dtype} {list(names.shape)}"
        )
    classes = [n.decode() if isinstance(n, bytes) else str(n) for n in names.tolist()]
    return ImageSet(x, y, tuple(classes), str(path.resolve()))


def _open_folder(path: Path) -> ImageSet:
    folders = sorted(
        (p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")),
        key=lambda p: p.name,
    )
    if not folders:
        raise DataError(f"data: {path} must contain one folder of images per class, got no folder")
    if len(folders) == 1:
        raise DataError(
            f"data: {path} must contain at least 2 class folders, got {folders[0].name} only"
        )
    files: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        found = _images_below(folder)
        if not found:
            raise DataError(
                f"data: class folder {folder} contains no image file ({', '.join(_suffixes())})"
            )
        files.extend(found)
        labels.extend([label] * len(found))
    names = tuple(folder.name for folder in folders)
    y = np.array(labels, np.int64)
    return ImageSet(tuple(files), y, names, str(path.resolve()), numbering="sorted")


def _open_flat(path: Path) -> ImageSet:
    found = _images_below(path)
    if not found:
        raise DataError(f"data: folder {path} contains no image file ({', '.join(_suffixes())})")
    return ImageSet(tuple(found), np.zeros(len(found), np.int64), source=str(path.resolve()))


def _has_classes(path: Path) -> bool:
    """Whether a folder has at least two subfolders and no images beside them."""
    visible = [p for p in path.iterdir() if not p.name.startswith(".")]
    return sum(p.is_dir() for p in visible) > 1 and not any(_is_image(p) for p in visible)


def _images_below(folder: Path) -> list[Path]:
    found = (p for p in folder.rglob("*") if _is_image(p))
    return sorted(found, key=lambda p: p.relative_to(folder).as_posix())


def _is_image(path: Path) -> bool:
    name = path.name
    return path.suffix.lower() in IMAGE_SUFFIXES and not name.startswith(".") and path.is_file()


def _suffixes() -> list[str]:
    return sorted(IMAGE_SUFFIXES)
