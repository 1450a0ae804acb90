"""Safetensors files that are written in pieces and memory-mapped, without copies in memory."""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsal.errors import FileFormatError
from fastsal.utils.atomic import atomic_path
from fastsal.utils.digests import Digest

Array = NDArray[Any]

# Code of a safetensors dtype to its name and its size in bytes.
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
    """An array to write.

    Attributes:
        key: Name of the array in the file.
        code: dtype code of safetensors.
        shape: Shape of the array.
        pieces: Returns an iterator over the elements in order, as flat arrays.
    """

    key: str
    code: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[Array]]

    @property
    def itemsize(self) -> int:
        """Size of an element in bytes."""
        return DTYPES[self.code][1]

    @property
    def nbytes(self) -> int:
        """Size of the array in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.itemsize

    @classmethod
    def of(cls, key: str, tensor: Tensor) -> Entry:
        """Return the entry of a tensor, in one piece; Booleans are stored as bytes."""

        def pieces() -> Iterator[Array]:
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            yield flat.view(torch.uint8).numpy()

        return cls(key, _CODES[tensor.dtype], tuple(tensor.shape), pieces)


def metadata_of(header: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata of a safetensors file with a header of JSON values."""
    return {"fastsal": json.dumps(header)}


def header_of(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """Return the header in the metadata of a safetensors file; empty without one.

    Raises:
        ValueError: The header is not valid JSON.
        TypeError: The header is not a JSON object.
    """
    return dict(json.loads((metadata or {}).get("fastsal", "{}")))


def write(
    path: str | os.PathLike[str],
    header: Mapping[str, Any],
    entries: Sequence[Entry],
    digest: Digest | None = None,
) -> None:
    """Write a file atomically.

    Args:
        path: The file.
        header: JSON values for the metadata.
        entries: Arrays in any order; they are sorted by the size of an element and by key.
        digest: Digest of the header. The keys, types and elements of all entries are added to it,
            and the result is written to the header as `digest`. None writes no digest.
    """
    header = header if digest is None else {**header, "digest": _NO_DIGEST}
    # Large elements first, so that every array is aligned to the size of its elements.
    entries = sorted(entries, key=lambda entry: (-entry.itemsize, entry.key))
    start = 0
    tensors: dict[str, Any] = {"__metadata__": metadata_of(header)}
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
            # The digest is as long as its placeholder.
            file.seek(8)
            file.write(text.replace(_NO_DIGEST.encode(), digest.hexdigest().encode(), 1))


def read_mapped(
    path: str | os.PathLike[str], kind: str, version: int
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Open a file that `write` wrote; its arrays are memory-mapped and read-only.

    Arrays of bfloat16 are of type uint16.

    Args:
        path: The file.
        kind: `"format"` that its header must have.
        version: `"version"` that its header must have.

    Returns:
        The header, and key to array.

    Raises:
        FileFormatError: The file is truncated, or of another format or version.
        KeyError, ValueError, TypeError, AttributeError, struct.error: The file is not a
            safetensors file.
    """
    shown, size = repr(os.fspath(path)), Path(path).stat().st_size
    with open(path, "rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        if length > size - 8:
            raise FileFormatError(f"path: {shown} is truncated or not a safetensors file")
        tensors = json.loads(file.read(length))
        header = header_of(tensors.pop("__metadata__", None))
        if header.get("format") != kind or header.get("version") != version:
            raise FileFormatError(f"path: {shown} is not a file of {kind}, version {version}")
        data = 8 + length
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size > data else b""
    end = 0
    arrays: dict[str, Array] = {}
    for key, info in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = info["data_offsets"]
        dtype = np.dtype("uint16" if info["dtype"] == "BF16" else DTYPES[info["dtype"]][0])
        count = int(np.prod(info["shape"], dtype=np.int64))
        if start != end or stop - start != count * dtype.itemsize or data + stop > size:
            raise FileFormatError(f"path: {shown} is truncated, or its header is damaged")
        array: Array = (
            np.frombuffer(memory, dtype, count, data + start) if count else np.empty(0, dtype)
        )
        arrays[key] = array.reshape(info["shape"])
        end = stop
    if data + end != size:
        raise FileFormatError(f"path: {shown} is longer than its header says")
    return header, arrays
