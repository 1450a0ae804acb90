"""The state between two rounds of pruning, so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.errors import FileFormatError
from fastsal.pruning.masks.masks import Masks
from fastsal.utils import safetensors_files as streamed_files
from fastsal.utils.safetensors_files import Entry

_FORMAT = "fastsal.round"


class Checkpoint:
    """A file that holds weights, masks and history after the last whole round.

    Args:
        path: The file; written whole or not at all, removed when all rounds are done.
        asked: What the run was asked for, JSON values; another run's file is refused.
    """

    def __init__(self, path: str | os.PathLike[str], asked: Mapping[str, Any]) -> None:
        self._path = Path(path)
        self._asked = as_asked(asked)

    def save(
        self, weights: Mapping[str, Tensor], masks: Masks, history: list[dict[str, Any]]
    ) -> None:
        """Write the state after a round, one tensor at a time."""
        entries = [Entry.of(f"weight:{n}", p) for n, p in weights.items()]
        entries += [Entry.of(f"mask:{n}", mask) for n, mask in masks.items()]
        header = {
            "format": _FORMAT,
            "asked": self._asked,
            "start": self._start,
            "history": history,
            "recipe": masks.recipe,
        }
        streamed_files.write(self._path, header, entries)

    def resume(
        self, parameters: Mapping[str, nn.Parameter]
    ) -> tuple[Masks | None, list[dict[str, Any]]]:
        """Bring parameters, as the run began with them, to the state of the file if there is one.

        Where this fails some may be changed.

        Returns:
            Masks and history; None and nothing if there is no file.

        Raises:
            FileFormatError: The file is damaged, or of another run or model.
        """
        from safetensors import SafetensorError, safe_open

        self._start = digest(parameters)
        if not self._path.exists():
            return None, []
        try:
            with safe_open(os.fspath(self._path), framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("fastsal", "{}"))
                check_origin(self._path, "prune", header, _FORMAT, self._start, self._asked)
                with torch.no_grad():
                    for name, p in parameters.items():
                        p.copy_(file.get_tensor(f"weight:{name}"))
                masks = {n: file.get_tensor(f"mask:{n}").bool() for n in parameters}
        except FileFormatError:
            raise
        except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise FileFormatError(f"checkpoint: {self._path} cannot be read: {error}") from error
        return Masks(masks, header["recipe"]), header["history"]

    def remove(self) -> None:
        """All rounds are done."""
        self._path.unlink(missing_ok=True)


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
