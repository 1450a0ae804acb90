"""Image files in tar archives: one archive with class folders or with an archive per class.

Images are read at their positions, so that archives must not be compressed; image files hardly get
smaller by it. ImageNet's `ILSVRC2012_img_train.tar` is an archive of archives.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

from fastsal.data.places import TarImage
from fastsal.errors import DataError, FileFormatError

SUFFIX = ".tar"
COMPRESSED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")


def tar_images(path: Path, suffixes: Collection[str]) -> list[tuple[str, TarImage]]:
    """Return the class and the place of each image of an archive, sorted by their names.

    The class is the name of the archive in the archive, or of the outermost folder that not all
    images are in.

    Args:
        path: The archive.
        suffixes: Suffixes of image files, in lower case.

    Raises:
        FileFormatError: The archive is damaged or compressed.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            found = sorted(_members(path, archive, suffixes))
    except tarfile.TarError as error:
        raise FileFormatError(
            f"data: {path} cannot be read as a tar archive without compression ({error})"
        ) from None
    if not found:
        return []
    folders = [PurePosixPath(name).parent for name, _ in found]
    shared = len(PurePosixPath(os.path.commonpath(folders)).parts)
    classes = [folder.parts[shared] if len(folder.parts) > shared else "" for folder in folders]
    return [(each, place) for each, (_, place) in zip(classes, found, strict=True)]


def folder_of_tars(path: Path, suffixes: Collection[str]) -> list[tuple[str, TarImage]]:
    """Return the class and the place of each image of a folder that has one archive per class.

    Raises:
        DataError: An archive has no image.
        FileFormatError: An archive is damaged or compressed.
    """
    found: list[tuple[str, TarImage]] = []
    for archive in sorted(path.glob(f"*{SUFFIX}")):
        images = tar_images(archive, suffixes)
        if not images:
            raise DataError(f"data: {archive} contains no image file ({', '.join(suffixes)})")
        found += [(archive.stem, place) for _, place in images]
    return found


def _members(
    path: Path, archive: tarfile.TarFile, suffixes: Collection[str]
) -> Iterator[tuple[str, TarImage]]:
    """Yield the names of images, with an archive in the archive as a folder, and their places."""
    for member in archive:
        name = PurePosixPath(member.name)
        if not member.isreg() or member.issparse() or name.name.startswith("."):
            continue
        if name.suffix == SUFFIX:
            inner = archive.extractfile(member)
            assert inner is not None  # a regular file
            with tarfile.open(fileobj=inner, mode="r:") as inside:
                for each, place in _members(path, inside, suffixes):
                    whole = f"{name.with_suffix('')}/{each}"
                    start = member.offset_data + place.offset
                    yield whole, TarImage(path, f"{name}/{each}", start, place.size)
        elif name.suffix.lower() in suffixes:
            yield str(name), TarImage(path, str(name), member.offset_data, member.size)
