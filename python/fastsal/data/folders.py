"""Labeled images from a folder, an `.npz` file or a tar archive."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastsal.data.class_map import ClassMap
from fastsal.data.image_set import ImageSet, Numbering
from fastsal.data.npz_files import open_npz, split_of_name
from fastsal.data.places import Place, TarImage
from fastsal.data.tars import COMPRESSED, folder_of_tars, tar_images
from fastsal.errors import DataError, InvalidArgument
from fastsal.utils.paths import user_path
from fastsal.utils.suggestions import listed
from fastsal.utils.warn import warn_user

IMAGE_SUFFIXES = frozenset(
    {
        *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
        *(".ppm", ".pgm", ".pbm"),
    }
)


def load_images(
    path: str | os.PathLike[str],
    *,
    classes: Sequence[str | int] | None = None,
    labeled: bool = True,
    class_map: ClassMap | None = None,
) -> ImageSet:
    """Open labeled images from a folder, an `.npz` file or a tar archive.

    Args:
        path: One of

            - an `.npz` file with `x` uint8 `[n, h, w]` or `[n, h, w, c]`, integers `y` `[n]` and,
              optionally, names `classes` `[k]`;
            - an `.npz` file with `train_images`, `train_labels`, `val_images` and so on, as
              MedMNIST has it, as `file.npz?split=train`;
            - a folder with one subfolder of images per class, or one tar archive per class;
            - a tar archive, not compressed, with one folder or one tar archive per class.

            Classes and images of folders and archives are sorted by name.
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
        The images. Image files are read when a batch needs them.

    Raises:
        DataError: There are no images, a class is empty, there is only one class, or shapes, types
            or labels are invalid.
        FileFormatError: The `.npz` file, the archive or the file of the class map is damaged.
        InvalidArgument: The class map lacks a class, or has one index for two; there is no such
            split, or there are several and none is chosen.
    """
    check_class_arguments(classes, class_map)
    split = None
    path = user_path(path)
    if not path.exists():
        text, split = split_of_name(os.fspath(path))
        path = Path(text)
    if path.is_dir():
        images = _open_folder(path) if labeled or _has_classes(path) else _open_flat(path)
    elif not path.exists():
        raise DataError(f"data: there is no file or folder {path}")
    elif path.suffix == ".npz":
        images = open_npz(path, labeled=labeled, split=split)
    elif path.suffix == ".tar":
        images = _of_tars(tar_images(path, IMAGE_SUFFIXES), path, labeled=labeled)
    elif path.name.endswith(COMPRESSED):
        raise DataError(f"data must be a tar archive without compression, got {path}; unpack it")
    else:
        raise DataError(
            f"data must be a folder of class folders, an .npz file or a .tar archive, got {path}"
        )
    if len(images.classes) < 2 and labeled:
        raise DataError(f"data: {path} must have at least 2 classes, got {images.classes[0]} only")
    if class_map is not None and labeled:
        images = images.map_classes(class_map)
    return images if classes is None else images.select_classes(classes)


def lacks_labels(path: str | os.PathLike[str]) -> bool:
    """Tell whether a folder has images and no folder of a class, or an `.npz` has `x` and no `y`.

    Nothing else is read. Other paths, and damaged files, are not said to lack labels.
    """
    path = user_path(path)
    if path.is_dir():
        visible = [p for p in path.iterdir() if not p.name.startswith(".")]
        has_classes = any(p.is_dir() or p.suffix == ".tar" for p in visible)
        return not has_classes and any(_is_image(p) for p in visible)
    if path.suffix != ".npz":
        return False
    try:
        with zipfile.ZipFile(path) as file:
            names = set(file.namelist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return False
    return "x.npy" in names and "y.npy" not in names


def check_class_arguments(classes: object, class_map: object) -> None:
    """Raise InvalidArgument if both `classes` and `class_map` are given."""
    if classes is not None and class_map is not None:
        raise InvalidArgument(
            "class_map must be None with classes, which are numbered in their order; for both call "
            "images.select_classes(...).map_classes(...)"
        )


def _open_folder(path: Path) -> ImageSet:
    folders = sorted(
        (p for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")),
        key=lambda p: p.name,
    )
    if not folders and any(path.glob("*.tar")):
        return _of_tars(folder_of_tars(path, IMAGE_SUFFIXES), path)
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
    _warn_of_loose(path)
    names = tuple(folder.name for folder in folders)
    y = np.array(labels, np.int64)
    return ImageSet(tuple(files), y, names, str(path.resolve()), numbering="sorted")


def _warn_of_loose(path: Path) -> None:
    """Warn of archives and images beside class folders."""
    visible = sorted(p for p in path.iterdir() if not p.name.startswith("."))
    for kind, loose, advice in (
        ("archives", [p for p in visible if p.suffix == ".tar"], "unpack those that are"),
        ("images", [p for p in visible if _is_image(p)], "move those with a class into its folder"),
    ):
        if loose:
            verb = "are" if len(loose) > 1 else "is"
            warn_user(
                f"data: {listed([p.name for p in loose], 3)} in {path} {verb} not read: beside "
                f"class folders, {kind} are not classes; {advice}"
            )


def _of_tars(found: list[tuple[str, TarImage]], path: Path, *, labeled: bool = True) -> ImageSet:
    """Return the images of archives, given with their classes."""
    if not found:
        raise DataError(f"data: {path} contains no image file ({', '.join(_suffixes())})")
    names = sorted({name for name, _ in found}) if labeled else [""]
    if labeled and "" in names:
        loose = next(place for name, place in found if not name)
        raise DataError(
            f"data: the images of {path} must be in one folder or archive per class, got {loose}"
        )
    numbers = {name: k for k, name in enumerate(names)}
    y = np.array([numbers[name] if labeled else 0 for name, _ in found], np.int64)
    places: tuple[Place, ...] = tuple(place for _, place in found)
    numbering: Numbering = "sorted" if labeled else "data"
    classes = tuple(names) if labeled else ()
    return ImageSet(places, y, classes, str(path.resolve()), numbering=numbering)


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
    """Return the image files of a folder and its subfolders, sorted by their names.

    Raises:
        DataError: There is a link to a file or folder that is missing, as on a disk that is not
            mounted.
    """
    every = _below(folder)
    found = [p for p in every if _is_image(p)]
    # A name without a suffix may be that of a folder.
    named = (p for p in every if _has_image_name(p) or not p.suffix)
    missing = [p for p in named if p.is_symlink() and not p.exists()]
    if missing:
        what = "file" if missing[0].suffix else "file or folder"
        raise DataError(
            f"data: {missing[0]} is a link to a {what} that does not exist"
            + (f", one of {len(missing)} such links" if len(missing) > 1 else "")
        )
    return sorted(found, key=lambda p: p.relative_to(folder).as_posix())


def _below(top: Path) -> list[Path]:
    """Return the files of a folder and its visible subfolders, also those that are linked.

    Each folder is read once, where it is rather than where a link to it is: links may form a loop.
    """
    real = top.resolve()
    seen = {real, *real.parents}
    found: list[Path] = []
    waiting = [top]
    while waiting:
        links: list[Path] = []
        for start in waiting:
            for place, folders, files in os.walk(start):
                inside = [Path(place) / name for name in folders if not name.startswith(".")]
                links += [each for each in inside if each.is_symlink()]
                found += [Path(place) / name for name in files]
                own = {each.name: each.resolve() for each in inside if not each.is_symlink()}
                folders[:] = [name for name in folders if name in own and own[name] not in seen]
                seen.update(own.values())
        waiting = []
        for link in sorted(links):
            if link.resolve() not in seen:
                seen.add(link.resolve())
                waiting.append(link)
    return found


def _is_image(path: Path) -> bool:
    return _has_image_name(path) and path.is_file()


def _has_image_name(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")


def _suffixes() -> list[str]:
    return sorted(IMAGE_SUFFIXES)
