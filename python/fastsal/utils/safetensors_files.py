"""Safetensors files that are written piece by piece: nothing is in memory twice."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsal.utils.atomic import atomic_path

Array = NDArray[Any]

# Name and bytes of the types that safetensors has.
DTYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "U8": ("uint8", 1),
}
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.bool: "U8",
}
_NO_DIGEST = "0" * 64


@dataclass(frozen=True)
class Entry:
    """An array that is to be written.

    Attributes:
        key: Its name in the file.
        code: Type, as safetensors has it.
        shape: Of the array.
        pieces: Gives its elements in order, in flat arrays.
    """

    key: str
    code: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Array]]

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return DTYPES[self.code][1]

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.itemsize

    @classmethod
    def of(cls, key: str, tensor: Tensor) -> Entry:
        """A tensor, in one piece; booleans are bytes."""

        def pieces() -> Iterator[Array]:
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            yield flat.view(torch.uint8).numpy()

        return cls(key, _CODES[tensor.dtype], tuple(tensor.shape), pieces)


def write(
    path: str | os.PathLike[str],
    header: Mapping[str, Any],
    entries: Sequence[Entry],
    digest: Any = None,
) -> None:
    """Write a file, whole or not at all.

    Args:
        path: The file.
        header: JSON values, for the metadata.
        entries: In any order; they are written by width and key.
        digest: Of `hashlib`, begun with the header; what it comes to with the keys, types and
            elements of all entries is written into the header, as `digest`.
    """
    told = header if digest is None else {**header, "digest": _NO_DIGEST}
    # Wide types first, so that every array begins at a multiple of its own.
    entries = sorted(entries, key=lambda entry: (-entry.itemsize, entry.key))
    start = 0
    tensors: dict[str, Any] = {"__metadata__": {"fastsal": json.dumps(told)}}
    for entry in entries:
        stop = start + entry.nbytes
        tensors[entry.key] = {
            "dtype": entry.code,
            "shape": list(entry.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(tensors).encode()
    text += b" " * (-len(text) % 8)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        for entry in entries:
            if digest is not None:
                digest.update(f"{entry.key}\0{DTYPES[entry.code][0]}\0".encode())
            for piece in entry.pieces():
                data = np.ascontiguousarray(piece).view(np.uint8).data
                if digest is not None:
                    digest.update(data)
                file.write(data)
        if digest is not None:
            # It is known now, and as long as what stands in its place.
            file.seek(8)
            file.write(text.replace(_NO_DIGEST.encode(), digest.hexdigest().encode(), 1))
