"""The state between two epochs of fine-tuning, so that a killed run goes on where it was."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsal.errors import FileFormatError
from fastsal.models.weights import read_pickle
from fastsal.utils.atomic import atomic_path
from fastsal.utils.resuming import as_asked, check_origin, digest

_FORMAT = "fastsal.epoch"


class TrainingCheckpoint:
    """A file that holds the state after the last whole epoch.

    Args:
        path: The file; written whole or not at all, removed when all epochs are done.
        asked: What the run was asked for, JSON values; another run's file is refused.
        start: Name to tensor that the run began from; so is one of another start.
    """

    def __init__(
        self, path: str | os.PathLike[str], asked: Mapping[str, Any], start: Mapping[str, Tensor]
    ) -> None:
        self._path = Path(path)
        self._asked = as_asked(asked)
        self._start = digest(start)

    def save(self, state: Mapping[str, Any]) -> None:
        """Write tensors, numbers and containers of them."""
        header = {"format": _FORMAT, "asked": self._asked, "start": self._start}
        with atomic_path(self._path) as temporary:
            torch.save({**header, "state": dict(state)}, temporary)

    def load(self) -> dict[str, Any] | None:
        """Return what was saved, on the CPU; None if there is no file.

        Raises:
            FileFormatError: The file is damaged, or of another run or model.
        """
        if not self._path.exists():
            return None
        found = read_pickle(self._path, "checkpoint", "pass another path")
        if not isinstance(found, dict):
            raise FileFormatError(f"checkpoint: {self._path} is no checkpoint of finetune")
        check_origin(self._path, "finetune", found, _FORMAT, self._start, self._asked)
        return dict(found["state"])

    def remove(self) -> None:
        """All epochs are done."""
        self._path.unlink(missing_ok=True)
