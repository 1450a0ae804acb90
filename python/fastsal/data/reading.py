"""Read batches of image files, in this process or ahead of it in the workers of a `DataLoader`.

A batch has the same pixels for any number of workers. Workers return pixels without normalization,
uint8 where Pillow resizes, and errors as values, so that they are raised here in one line.

Axes: n images of a batch, h and w pixels, c channels.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastsal.data.pixels import Fit, Pixels, as_image, decode, fit_arrays, size_text, uses_pillow
from fastsal.data.places import Place
from fastsal.errors import DataError, FastsalError, InvalidArgument
from fastsal.models.inputs import InputSpec
from fastsal.utils.plain_text import first_line

# transform(pixels uint8 [h, w, c], index of the image in its source) -> pixels uint8 [h, w, c]
Transform = Callable[[Pixels, int], Pixels]
Indices = npt.NDArray[np.int64]

MOST_WORKERS = 4  # by default
START_METHOD = None  # that of the system, where processes are not forked
_AHEAD = 2  # batches that each worker reads ahead
_SHARED_MEMORY = Path("/dev/shm")
# Iterators whose workers run. One that is collected as part of a reference cycle, such as that of
# an exception, cannot tell its workers to end, and waits for each of them.
_running: set[Any] = set()


@dataclass(frozen=True)
class _Failure:
    """An error of a worker."""

    error: FastsalError


class Reader:
    """Reads image files by their positions in a list.

    Attributes:
        spec: Size, crop and channels.
        uses_pipe: Whether workers send their pixels through a pipe, not through shared memory.

    Args:
        places: The files.
        index: The `index` of each image, for `transform`; int64 `[n]`.
        transform: Applied to the pixels as they are in the file; None for none.
        spec: Size, crop and channels.
    """

    def __init__(
        self,
        places: Sequence[Place],
        index: Indices,
        transform: Transform | None,
        spec: InputSpec,
    ) -> None:
        self._places = places
        self._index = index
        self._transform = transform
        self.spec = spec
        self._fit = Fit(spec, of_files=True) if uses_pillow(spec, of_files=True) else None
        self.uses_pipe = False

    def read(self, chosen: Sequence[int]) -> Tensor:
        """Return the pixels of some images, uint8 or float32 `[n, c, h, w]`, in 0 to 255.

        Raises:
            DataError: A file is damaged, or images without a common size differ in size.
        """
        out: Tensor | None = None
        for k, i in enumerate(chosen):
            pixels = self._pixels(i)
            if out is None:
                kind = torch.uint8 if self._fit is not None else torch.float32
                out = torch.empty((len(chosen), *pixels.shape), dtype=kind, device="cpu")
            self.check_size((i, pixels.shape[1:]), (chosen[0], tuple(out.shape[2:])))
            out.numpy()[k] = pixels
        assert out is not None
        return out

    def _pixels(self, i: int) -> npt.NDArray[Any]:
        place = self._places[i]
        image = decode(place)
        if self._transform is not None:
            pixels = np.asarray(image)
            pixels = pixels[..., None] if pixels.ndim == 2 else pixels
            pixels = self._transform(pixels, int(self._index[i]))
            if self._fit is not None:
                return self._fit(as_image(pixels), str(place))
            return fit_arrays(pixels[None], self.spec, str(place))[0].numpy()
        if self._fit is not None:
            return self._fit(image, str(place))
        pixels = np.array(image)
        pixels = pixels[..., None] if pixels.ndim == 2 else pixels
        return fit_arrays(pixels[None], self.spec, str(place))[0].numpy()

    def check_size(
        self, one: tuple[int, tuple[int, ...]], first: tuple[int, tuple[int, ...]]
    ) -> None:
        """Raise DataError if two images, given by position and size, differ in size."""
        if one[1] != first[1]:
            raise DataError(
                f"size must be given for images of different sizes, got {size_text(first[1])} "
                f"({self._places[first[0]]}) and {size_text(one[1])} ({self._places[one[0]]})"
            )

    def __getitems__(self, chosen: Sequence[int]) -> Tensor | Pixels | _Failure:
        """Return what `read` returns, or its error; called by the workers."""
        try:
            found = self.read(chosen)
        except FastsalError as error:
            return _Failure(error)
        return found.numpy() if self.uses_pipe else found

    def __len__(self) -> int:
        return len(self._places)


def read_batches(reader: Reader, parts: Sequence[Indices], workers: int) -> Generator[Tensor]:
    """Yield the pixels of each part, read ahead by `workers` processes; 0 reads in this one.

    Args:
        reader: Reads the images.
        parts: Positions of the images of each batch, not empty.
        workers: Number of processes.

    Raises:
        DataError: A file is damaged, or images without a common size differ in size.
        FastsalError: A process ended, for example for lack of memory.
    """
    first: tuple[int, tuple[int, ...]] | None = None
    found = _in_processes(reader, parts, workers) if workers else _here(reader, parts)
    with contextlib.closing(found):
        for part, pixels in zip(parts, found, strict=True):
            size = tuple(pixels.shape[2:])
            first = first or (int(part[0]), size)
            reader.check_size((int(part[0]), size), first)
            yield pixels


def _here(reader: Reader, parts: Sequence[Indices]) -> Generator[Tensor]:
    for part in parts:
        yield reader.read(part.tolist())


def _in_processes(reader: Reader, parts: Sequence[Indices], workers: int) -> Generator[Tensor]:
    from torch.utils.data import DataLoader

    largest = max(map(len, parts)) * _bytes_of_image(reader, int(parts[0][0]))
    # Containers often have little shared memory, and end a process that fills it.
    reader.uses_pipe = largest * workers * _AHEAD > _free_shared_memory() / 2
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "This DataLoader will create")  # as the user asked
        # Workers call neither OpenMP nor the core, whose threads do not survive a fork.
        warnings.filterwarnings("ignore", ".*fork", DeprecationWarning)
        loader: Any = DataLoader(
            reader,  # type: ignore[arg-type]
            batch_sampler=[part.tolist() for part in parts],
            collate_fn=_as_is,
            num_workers=workers,
            prefetch_factor=_AHEAD,
            worker_init_fn=_begin_worker,
            # Its own random numbers: those of the process do not depend on the number of workers.
            generator=torch.Generator(),
            multiprocessing_context="fork" if _can_fork() else START_METHOD,
        )
        batches = iter(loader)
    _running.add(batches)
    try:
        while True:
            try:
                found = next(batches, None)
            except RuntimeError as error:
                if not str(error).startswith("DataLoader worker"):
                    raise
                raise FastsalError(
                    f"workers: a process that reads images ended ({first_line(error)}); use fewer "
                    "workers, or 0"
                ) from error.with_traceback(None)
            if found is None:
                return
            if isinstance(found, _Failure):
                raise found.error
            yield torch.from_numpy(found) if isinstance(found, np.ndarray) else found
    finally:
        _running.discard(batches)
        del batches  # which ends the workers


def _as_is(batch: Any) -> Any:
    return batch


def _begin_worker(_: int) -> None:
    # Ctrl-C reaches all processes of a terminal; this one ends when the main process ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _bytes_of_image(reader: Reader, i: int) -> int:
    """Return the bytes of the pixels of an image as workers return them."""
    return reader.read([i]).nbytes


def _free_shared_memory() -> float:
    """Return the bytes that are free for tensors of workers."""
    try:
        status = os.statvfs(_SHARED_MEMORY)
    except (OSError, AttributeError):  # only Linux has it as a file system
        return float("inf")
    return status.f_bavail * status.f_frsize


def _can_fork() -> bool:
    return sys.platform == "linux"


def worker_count(workers: int | None, batches: int) -> int:
    """Return the number of processes that read image files.

    Args:
        workers: The number given; None reads it from the variable FASTSAL_NUM_WORKERS, or chooses
            it by the processors of this process, at most `MOST_WORKERS`, where processes start
            without a new import of the main module.
        batches: Number of batches; one batch is read by one process only.
    """
    variable = os.environ.get("FASTSAL_NUM_WORKERS")
    if workers is None and variable:
        if not variable.isdecimal():
            raise InvalidArgument(
                f"FASTSAL_NUM_WORKERS must be an integer of at least 0, got {variable!r}"
            )
        workers = int(variable)
    if workers is None:
        import multiprocessing

        if batches < 2 or not _can_fork() or multiprocessing.current_process().daemon:
            return 0
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # of torchrun
        workers = min(MOST_WORKERS, max(1, len(os.sched_getaffinity(0)) // ranks))
    return min(workers, batches)
