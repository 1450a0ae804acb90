"""Passes over image files, whose pixels are kept in memory for later passes as long as they fit.

Axes: n images of a batch, c channels, h and w pixels.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Generator, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsal.data.reading import Indices, Reader, read_batches, worker_count
from fastsal.models.inputs import InputSpec
from fastsal.utils.machine import available_memory
from fastsal.utils.numbers import as_integer
from fastsal.utils.sizes import parse_bytes

_SHARE = 4  # all caches use at most the fourth part of the memory that is free without them
_caches: weakref.WeakKeyDictionary[Any, dict[InputSpec, PixelCache]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


class PixelCache:
    """Pixels of images by their position in an image set."""

    def __init__(self) -> None:
        self._images: dict[int, Tensor] = {}
        self.nbytes = 0

    def has(self, i: int) -> bool:
        """Whether the image at position `i` is there."""
        return i in self._images

    def add(self, chosen: Iterable[int], pixels: Tensor, limit: int | None) -> None:
        """Keep a copy of the pixels `[n, c, h, w]` of some images, if there is room for it.

        Args:
            chosen: Positions of the images.
            pixels: Their pixels.
            limit: Bytes that this cache may have; None for a share of the free memory.
        """
        with _lock:
            new = [(k, i) for k, i in enumerate(map(int, chosen)) if i not in self._images]
            size = pixels[0].nbytes * len(new)
            if not new or not self._fits(size, limit):
                return
            # One piece of memory, which does not belong to a worker. Copies by NumPy, as threads of
            # PyTorch wait long for each other where the workers use all processors.
            copies = torch.from_numpy(pixels.numpy()[[k for k, _ in new]])
            for (_, i), image in zip(new, copies, strict=True):
                self._images[i] = image
            self.nbytes += size

    def _fits(self, size: int, limit: int | None) -> bool:
        if limit is not None:
            return self.nbytes + size <= limit
        free = available_memory()
        used = sum(cache.nbytes for of_set in _caches.values() for cache in of_set.values())
        return free is not None and used + size <= (free + used) // _SHARE

    def batch(self, chosen: Iterable[int], others: dict[int, Tensor] | None = None) -> Tensor:
        """Return the pixels of images, `[n, c, h, w]`.

        Args:
            chosen: Positions of the images.
            others: Pixels of those that are not in the cache.
        """
        others = others or {}
        images = [others[i] if i in others else self._images[i] for i in chosen]
        return torch.from_numpy(np.stack([image.numpy() for image in images]))


def read_cached(
    reader: Reader,
    images: object,
    parts: Sequence[Indices],
    workers: int | None,
    limit: int | None,
) -> Generator[Tensor]:
    """Yield the pixels of each part; those that an earlier pass kept are not read again.

    Args:
        reader: Reads the images.
        images: Their image set, with which the kept pixels are forgotten.
        parts: Positions of the images of each batch.
        workers: Number of processes, see `worker_count`.
        limit: Bytes to keep; 0 for none, None for a share of the free memory.
    """
    cache = PixelCache() if limit == 0 else _cache_of(images, reader.spec)
    missing = [chosen[[not cache.has(i) for i in chosen.tolist()]] for chosen in parts]
    unread = [some for some in missing if len(some)]
    read = read_batches(reader, unread, worker_count(workers, len(unread)))
    with contextlib.closing(read):
        for chosen, some in zip(parts, missing, strict=True):
            if not len(some):
                yield cache.batch(chosen.tolist())
                continue
            pixels = next(read)
            cache.add(some.tolist(), pixels, limit)
            if len(some) == len(chosen):
                yield pixels
            else:
                yield cache.batch(chosen.tolist(), dict(zip(some.tolist(), pixels, strict=True)))


def parse_cache(cache: int | str | None) -> int | None:
    """Return a number of bytes, which may be 0; None for None.

    Raises:
        InvalidArgument: `cache` is neither, nor a text such as "8GiB".
    """
    is_zero = as_integer(cache) == 0 or cache == "0"
    return None if cache is None else 0 if is_zero else parse_bytes(cache, "cache")


def _cache_of(images: Any, spec: InputSpec) -> PixelCache:
    with _lock:
        return _caches.setdefault(images, {}).setdefault(spec, PixelCache())
