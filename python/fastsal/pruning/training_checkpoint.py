"""Checkpoints of fine-tuning and of refitting, from which an interrupted run resumes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastsal.data.batches import Pair
from fastsal.data.content import SeenImages
from fastsal.errors import FileFormatError
from fastsal.models.pickles import read_pickle
from fastsal.utils.atomic import atomic_path
from fastsal.utils.digests import Digest, tensors_digest
from fastsal.utils.paths import user_path
from fastsal.utils.resuming import as_asked, check_origin, check_path, remove_finished

_FORMATS = {"finetune": "fastsal.epoch", "refit": "fastsal.refit"}


class TrainingCheckpoint:
    """A file with the state of a training that is not over.

    Args:
        path: The file. It is written atomically.
        asked: Arguments of the run, JSON values. A file of a run with other arguments is rejected.
        start: Name to tensor at the start of the run. A file with another start is rejected.
        call: The function that trains: `"finetune"` or `"refit"`.
        structure: Digest of the architecture of the model.
        seen: Name to the images of that name, as passes over them see them.

    Raises:
        InvalidArgument: The file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        asked: Mapping[str, Any],
        start: Mapping[str, Tensor],
        call: str,
        structure: str = "",
        seen: Mapping[str, SeenImages] | None = None,
    ) -> None:
        self._path, self._call = user_path(path), call
        self._asked = as_asked(asked)
        self._start = Digest().text(structure).text(tensors_digest(start)).hexdigest()
        self._seen = dict(seen or {})
        check_path(self._path)

    def save(self, state: Mapping[str, Any]) -> None:
        """Write a state of tensors, numbers and containers of them."""
        data = {name: seen.recorded() for name, seen in self._seen.items()}
        header = {
            "format": _FORMATS[self._call],
            "asked": self._asked,
            "start": self._start,
            "data": data,
        }
        # To an open file, as errors of the system are lost where PyTorch opens it.
        with atomic_path(self._path) as temporary, open(temporary, "wb") as file:
            torch.save({**header, "state": dict(state)}, file)

    def load(
        self, passes: Mapping[str, Callable[[], Iterable[Pair]]] | None = None
    ) -> dict[str, Any] | None:
        """Return the saved state, on the CPU, or None if there is no file.

        Args:
            passes: Name to a function that starts a pass over the images of that name, which are
                compared with those of the file.

        Raises:
            FileFormatError: The file is damaged, or belongs to another run, model or data.
        """
        if not self._path.exists():
            return None
        found = read_pickle(self._path, "checkpoint", "pass another path")
        if not isinstance(found, dict):
            raise FileFormatError(f"checkpoint: {self._path} is not a checkpoint of {self._call}")
        kind = _FORMATS[self._call]
        check_origin(self._path, self._call, found, kind, self._start, self._asked)
        for name, start_pass in (passes or {}).items():
            self._seen[name].check(found.get("data", {}).get(name), start_pass)
        return dict(found["state"])

    def remove(self) -> None:
        """Remove the file, after all steps or epochs are complete."""
        # The state of a refit within `prune` belongs to one round.
        remove_finished(self._path, at_once=self._call == "refit")
