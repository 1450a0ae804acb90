"""Labelled images from a folder or an `.npz` file."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastsal.data.image_set import Batches, ImageSet
from fastsal.errors import DataError, FileFormatError

__all__ = ["IMAGE_SUFFIXES", "Batches", "ImageSet", "load_images"]

IMAGE_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
)


def load_images(
    path: str | os.PathLike[str],
    *,
    classes: Sequence[str | int] | None = None,
    labelled: bool = True,
) -> ImageSet:
    """Open labelled images.

    Args:
        path: an `.npz` file with `x` uint8 `[n, h, w]` or `[n, h, w, c]`, `y` integers `[n]` and,
            if they have names, `classes`; or a folder with one folder of images per class.
            Classes and images of a folder are in the order of their names.
        classes: names or numbers of the classes to keep, relabelled in this order.
        labelled: False takes images without labels too, all as one class: an `.npz` without `y`, or
            a folder that holds images itself or has one folder only.

    Returns:
        The images. Those of a folder are read only when a batch asks for them.

    Raises:
        DataError: no images, one class only, an empty class, wrong shapes, types or labels.
        FileFormatError: the `.npz` file is damaged.
    """
    path = Path(path)
    if path.is_dir():
        images = _open_folder(path) if labelled or _has_classes(path) else _open_flat(path)
    elif not path.exists():
        raise DataError(f"data: there is no file or folder {path}")
    elif path.suffix == ".npz":
        images = _open_npz(path, labelled=labelled)
    else:
        raise DataError(f"data: got {path}; takes a folder of class folders, or an .npz file")
    if len(images.classes) < 2 and labelled:
        raise DataError(f"data: {path} has one class only ({images.classes[0]}); takes two or more")
    return images if classes is None else images.select_classes(classes)


def _open_npz(path: Path, *, labelled: bool) -> ImageSet:
    try:
        with np.load(path, allow_pickle=False) as file:
            needed = ("x", "y") if labelled else ("x",)
            absent = [name for name in needed if name not in file.files]
            if absent:
                raise DataError(
                    f"data: {path} has no array {' and no array '.join(absent)}; "
                    f"it has {', '.join(file.files) or 'none'}"
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
        found = _images_below(folder)
        if not found:
            raise DataError(
                f"data: class folder {folder} holds no image; takes {', '.join(_suffixes())}"
            )
        files.extend(found)
        labels.extend([label] * len(found))
    names = tuple(folder.name for folder in folders)
    return ImageSet(tuple(files), np.array(labels, np.int64), names, str(path.resolve()))


def _open_flat(path: Path) -> ImageSet:
    found = _images_below(path)
    if not found:
        raise DataError(f"data: folder {path} holds no image; takes {', '.join(_suffixes())}")
    return ImageSet(tuple(found), np.zeros(len(found), np.int64), source=str(path.resolve()))


def _has_classes(path: Path) -> bool:
    """Whether a folder has two folders or more, and no images beside them."""
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
