"""Arrays in a file that has no name: memory that can be given back without losing what is in it."""

from __future__ import annotations

import contextlib
import errno
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

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


def aligned(nbytes: int) -> int:
    """Bytes that an array takes in a file, where the next one begins."""
    return -(-nbytes // 64) * 64


class Shelf:
    """Where copies of tensors are put: in memory, or in files of a scratch folder.

    A file has a purpose, and what is put there next for the same purpose replaces it.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self._folder = folder
        self._files: dict[str, tuple[FileArrays, dict[str, Tensor]]] = {}

    def room(
        self, purpose: str, shapes: Mapping[str, Sequence[int]], dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Tensors to be filled, on the CPU."""
        if self._folder is None:
            return {name: torch.empty(tuple(shape), dtype=dtype) for name, shape in shapes.items()}
        key = f"{purpose} {dtype} {[tuple(s) for s in shapes.values()]}"
        if key not in self._files:
            sizes = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
            file = FileArrays(self._folder, sum(map(aligned, sizes.values())))
            places = {
                n: torch.from_numpy(file.take((size,), np.uint8)) for n, size in sizes.items()
            }
            self._files[key] = file, {n: p.view(dtype).view(shapes[n]) for n, p in places.items()}
        return dict(self._files[key][1])

    def put(self, purpose: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies: on their own devices in memory, or in a file."""
        if self._folder is None:
            return {name: p.detach().clone() for name, p in tensors.items()}
        kept = {}
        for dtype in {p.dtype for p in tensors.values()}:
            some = {name: p for name, p in tensors.items() if p.dtype == dtype}
            places = self.room(purpose, {n: p.shape for n, p in some.items()}, dtype)
            for name, place in places.items():
                kept[name] = place.copy_(some[name].detach())
                self.release()
        return {name: kept[name] for name in tensors}

    def release(self) -> None:
        """Give back the memory of what lies in files."""
        for file, _ in self._files.values():
            file.release()


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


def trim_heap() -> None:
    """Give free memory of the C library's heap back to the system, where that can be asked for."""
    import ctypes

    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
