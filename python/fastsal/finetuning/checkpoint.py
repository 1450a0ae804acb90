"""Checkpoints of fine-tuning, from which an interrupted run resumes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsal.errors import FileFormatError
from fastsal.models.pickles import read_pickle
from fastsal.utils.atomic import atomic_path
from fastsal.utils.digests import tensors_digest
from fastsal.utils.resuming import as_asked, check_origin

_FORMAT = "fastsal.epoch"


class TrainingCheckpoint:
    """A file with the state after the last complete epoch.

    Args:
        path: The file. It is written atomically.
        asked: Arguments of the run, JSON values. A file of a run with other arguments is rejected.
        start: Name to tensor at the start of the run. A file with another start is rejected.
    """

    def __init__(
        self, path: str | os.PathLike[str], asked: Mapping[str, Any], start: Mapping[str, Tensor]
    ) -> None:
        self._path = Path(path)
        self._asked = as_asked(asked)
        self._start = tensors_digest(start)

    def save(self, state: Mapping[str, Any]) -> None:
        """Write a state of tensors, numbers and containers of them."""
        header = {"format": _FORMAT, "asked": self._asked, "start": self._start}
        with atomic_path(self._path) as temporary:
            torch.save({**header, "state": dict(state)}, temporary)

    def load(self) -> dict[str, Any] | None:
        """Return the saved state, on the CPU, or None if there is no file.

        Raises:
            FileFormatError: The file is damaged, or belongs to another run or model.
        """
        if not self._path.exists():
            return None
        found = read_pickle(self._path, "checkpoint", "pass another path")
        if not isinstance(found, dict):
            raise FileFormatError(f"checkpoint: {self._path} is not a checkpoint of finetune")
        check_origin(self._path, "finetune", found, _FORMAT, self._start, self._asked)
        return dict(found["state"])

    def remove(self) -> None:
        """Delete the file."""
        self._path.unlink(missing_ok=True)
