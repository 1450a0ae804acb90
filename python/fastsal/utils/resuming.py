"""Check that a saved state belongs to the run that resumes it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsal.errors import FileFormatError


def check_origin(
    path: Path,
    call: str,
    found: Mapping[str, Any],
    kind: str,
    start: str,
    asked: Mapping[str, Any],
) -> None:
    """Raise FileFormatError unless what a checkpoint says of itself is what this run is.

    Args:
        path: The checkpoint.
        call: The function that goes on from it.
        found: Its `format`, `start` and `asked`.
        kind: The format that it is to have.
        start: Digest of what the run began from.
        asked: What the run is asked for.
    """
    if found.get("format") != kind:
        raise FileFormatError(f"checkpoint: {path} is no checkpoint of {call}")
    if found["start"] != start:
        raise FileFormatError(f"checkpoint: {path} began from other weights; give another file")
    if found["asked"] != asked:
        other = sorted(k for k, v in asked.items() if found["asked"].get(k) != v)
        raise FileFormatError(
            f"checkpoint: {path} is of a run with other {', '.join(other)}; "
            "give the same arguments, or another file"
        )


def as_asked(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments as JSON gives them back, which can be compared with a file's."""
    return dict(json.loads(json.dumps(dict(arguments), default=str)))


def digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, shapes, types and values."""
    sha = hashlib.sha256()
    for name, w in tensors.items():
        sha.update(f"{name} {tuple(w.shape)} {w.dtype}".encode())
        flat = w.detach().cpu().contiguous().reshape(-1)  # a single number has no bytes to view
        sha.update(flat.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
