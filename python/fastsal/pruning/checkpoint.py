"""The state between two rounds of pruning, so that a killed run goes on where it was."""

from __future__ import annotations

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
from fastsal.utils.digests import tensors_digest
from fastsal.utils.resuming import as_asked, check_origin
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

        self._start = tensors_digest(parameters)
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
