"""Arrays in an unlinked scratch file, whose memory can be released without losing their content."""

from __future__ import annotations

import errno
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fastsal.errors import InvalidArgument
from fastsal.utils.paths import user_path
from fastsal.utils.sizes import gib

_PAGE = mmap.ALLOCATIONGRANULARITY


class FileArrays:
    """Arrays in a memory-mapped scratch file.

    The file is unlinked after it is opened, if the system supports it, so that no file remains if
    the process is killed. Accessed pages count as memory of the process until `release`.

    Args:
        folder: Existing folder for the file.
        nbytes: Size of all arrays in bytes; disk space is allocated immediately.

    Raises:
        InvalidArgument: The folder does not exist, is not writable, or has too little free space.
    """

    def __init__(self, folder: str | os.PathLike[str], nbytes: int) -> None:
        self._size = max(_PAGE, -(-nbytes // _PAGE) * _PAGE)
        folder = user_path(folder)
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
        """Size of the file in bytes."""
        return self._size

    def take(self, shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
        """Return a new array of zeros in the file."""
        kind = np.dtype(dtype)
        count = math.prod(shape)
        array = np.frombuffer(self._map, kind, count, self._used).reshape(tuple(shape))
        self._used += aligned(count * kind.itemsize)
        return array

    def release(self) -> None:
        """Release the memory of accessed pages; they are read from the file on the next access."""
        give_back(self._map)


def give_back(memory: mmap.mmap) -> None:
    """Release the memory of a mapped file; its pages are read again on the next access."""
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
    """Return the size of an array in a file, rounded up to the alignment of 64 bytes."""
    return -(-nbytes // 64) * 64


def check_folder(folder: str | os.PathLike[str], nbytes: int) -> None:
    """Raise InvalidArgument unless `folder` is writable and has `nbytes` of free disk space."""
    folder = user_path(folder)
    if not folder.is_dir():
        raise InvalidArgument(f"scratch must be an existing folder, got {os.fspath(folder)!r}")
    if not os.access(folder, os.W_OK):
        raise InvalidArgument(f"scratch must be a writable folder, got {os.fspath(folder)!r}")
    if shutil.disk_usage(folder).free < nbytes:
        raise no_room(folder, nbytes)


def no_room(folder: str | os.PathLike[str], nbytes: int) -> InvalidArgument:
    """Return the error to raise if a folder has too little free disk space."""
    free = shutil.disk_usage(folder).free
    return InvalidArgument(
        f"scratch must have {gib(nbytes)} of free disk space, got {gib(free)} in "
        f"{os.fspath(folder)!r}"
    )
