"""SHA-256 digests of texts, JSON values, arrays, tensors and files."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_PIECE = 1 << 20  # bytes of a file that are read at a time
_SETTLED = 3 * 10**9  # nanoseconds; times of files are at most 2 seconds coarse
_remembered: dict[tuple[str | int, ...], str] = {}


class Digest:
    """A SHA-256 that is fed value by value; the order matters. Every method returns the digest."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def update(self, data: Any) -> Digest:
        """Add bytes, or any object with a contiguous buffer."""
        self._sha.update(data)
        return self

    def text(self, text: str) -> Digest:
        """Add a text, as UTF-8."""
        return self.update(text.encode())

    def json(self, value: Any) -> Digest:
        """Add a JSON value; the order of its keys does not matter."""
        return self.text(json.dumps(value, sort_keys=True))

    def array(self, values: Any) -> Digest:
        """Add the elements of an array, without its shape and type."""
        import numpy as np

        return self.update(np.ascontiguousarray(values).data)

    def tensor(self, name: str, tensor: Tensor) -> Digest:
        """Add a tensor: its name, type, shape and elements."""
        import torch

        values = tensor.detach().cpu().contiguous()
        self.text(f"{name}\0{values.dtype}\0{list(values.shape)}\0")
        return self.update(values.reshape(-1).view(torch.uint8).numpy().data)

    def file(self, path: Path) -> Digest:
        """Add the content of a file."""
        with path.open("rb") as file:
            for piece in iter(lambda: file.read(_PIECE), b""):
                self.update(piece)
        return self

    def hexdigest(self) -> str:
        """Return the SHA-256 of everything added so far, in hexadecimal."""
        return self._sha.hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256, in hexadecimal, of names, types, shapes and elements, in order."""
    digest = Digest()
    for name, tensor in tensors.items():
        digest.tensor(name, tensor)
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of the content of a file, in hexadecimal.

    It is remembered in this process for as long as the file has the same identity, size and times.
    A file that changed a moment ago is read again: it may change once more at the same time.
    """
    status = path.stat()
    key = (
        str(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns,
        status.st_ctime_ns,
    )  # fmt: skip
    found = _remembered.get(key)
    if found is None:
        found = Digest().file(path).hexdigest()
        if time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) > _SETTLED:
            _remembered[key] = found
    return found
