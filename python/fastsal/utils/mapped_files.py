"""Arrays in a file that has no name: memory that can be given back without losing what is in it."""

from __future__ import annotations

import errno
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastsal.errors import InvalidArgument
from fastsal.utils.sizes import gib

_PAGE = mmap.ALLOCATIONGRANULARITY


class FileArrays:
    """Arrays in a memory-mapped scratch file.

    The file is deleted at once where the system allows it, and lives as long as this: a process
    that is killed leaves nothing behind. What was touched counts as the process's memory until
    `release`.

    Args:
        folder: Where; it must exist.
        nbytes: Of all arrays; the disk is asked for them at once.

    Raises:
        InvalidArgument: The folder is none, or has no room.
    """

    def __init__(self, folder: str | os.PathLike[str], nbytes: int) -> None:
        self._size = max(_PAGE, -(-nbytes // _PAGE) * _PAGE)
        check_folder(folder, self._size)
        with tempfile.TemporaryFile(dir=folder, prefix="fastsal-") as file:
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, self._size)
                else:
                    file.truncate(self._size)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise no_room(folder, self._size) from error
                file.truncate(self._size)
            self._map = mmap.mmap(file.fileno(), self._size)
        self._used = 0

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self._size

    def take(self, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """An array of zeros in the file."""
        kind = np.dtype(dtype)
        count = math.prod(shape)
        array = np.frombuffer(self._map, kind, count, self._used).reshape(tuple(shape))
        self._used += aligned(count * kind.itemsize)
        return array

    def release(self) -> None:
        """Give back the memory of what was touched; it is read from the file when it is used."""
        give_back(self._map)


def give_back(memory: mmap.mmap) -> None:
    """Give back the memory of a mapped file; it is read again when it is used."""
    if hasattr(mmap, "MADV_DONTNEED"):
        memory.madvise(mmap.MADV_DONTNEED)


def forget(arrays: Iterable[NDArray[Any]]) -> None:
    """Release cached pages of the mapped files that arrays are stored in; they are read on use."""
    maps = {id(base): base for array in arrays if (base := mapped_base(array)) is not None}
    for base in maps.values():
        give_back(base)


def mapped_base(array: NDArray[Any]) -> mmap.mmap | None:
    """Return the mapped file that an array is stored in, or None."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    if isinstance(base, memoryview):
        base = base.obj
    return base if isinstance(base, mmap.mmap) else None


def aligned(nbytes: int) -> int:
    """Bytes that an array takes in a file, where the next one begins."""
    return -(-nbytes // 64) * 64


def check_folder(folder: str | os.PathLike[str], nbytes: int) -> None:
    """Raise InvalidArgument unless `folder` is a folder whose disk has `nbytes` left."""
    if not Path(folder).is_dir():
        raise InvalidArgument(f"scratch: there is no folder {os.fspath(folder)!r}")
    if not os.access(folder, os.W_OK):
        raise InvalidArgument(f"scratch: {os.fspath(folder)!r} cannot be written")
    if shutil.disk_usage(folder).free < nbytes:
        raise no_room(folder, nbytes)


def no_room(folder: str | os.PathLike[str], nbytes: int) -> InvalidArgument:
    """What to raise where the disk is too small."""
    free = shutil.disk_usage(folder).free
    return InvalidArgument(
        f"scratch: needs {gib(nbytes)} in {os.fspath(folder)!r}, which has {gib(free)} left"
    )
