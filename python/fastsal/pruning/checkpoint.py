"""A checkpoint of the state between two rounds of pruning, from which a rerun resumes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.errors import FileFormatError
from fastsal.pruning.history import Round
from fastsal.pruning.masks.masks import Masks
from fastsal.utils import safetensors_files as streamed_files
from fastsal.utils.digests import tensors_digest
from fastsal.utils.resuming import as_asked, check_origin
from fastsal.utils.safetensors_files import Entry, header_of

_FORMAT = "fastsal.round"


class Checkpoint:
    """A file with the weights, masks and history after the last complete round.

    Args:
        path: The file. It is written atomically, and removed when all rounds are complete.
        asked: Arguments of the run, as JSON values; the file of a run with others is rejected.
    """

    def __init__(self, path: str | os.PathLike[str], asked: Mapping[str, Any]) -> None:
        self._path = Path(path)
        self._asked = as_asked(asked)

    def save(self, weights: Mapping[str, Tensor], masks: Masks, history: list[Round]) -> None:
        """Write the state after a round."""
        entries = [Entry.of(f"weight:{n}", p) for n, p in weights.items()]
        entries += [Entry.of(f"mask:{n}", mask) for n, mask in masks.items()]
        header = {
            "format": _FORMAT,
            "asked": self._asked,
            "start": self._start,
            "history": [entry.as_dict() for entry in history],
            "recipe": masks.recipe,
        }
        streamed_files.write(self._path, header, entries)

    def resume(self, parameters: Mapping[str, nn.Parameter]) -> tuple[Masks | None, list[Round]]:
        """Restore the state of the file, if it exists.

        Args:
            parameters: Name to parameter, with the weights that the run started from. They are
                changed in place, some of them possibly also where this raises.

        Returns:
            Masks and history; None and an empty list if there is no file.

        Raises:
            FileFormatError: The file is damaged, or of another run or model.
        """
        from safetensors import SafetensorError, safe_open

        self._start = tensors_digest(parameters)
        if not self._path.exists():
            return None, []
        try:
            with safe_open(os.fspath(self._path), framework="pt") as file:
                header = header_of(file.metadata())
                check_origin(self._path, "prune", header, _FORMAT, self._start, self._asked)
                with torch.no_grad():
                    for name, p in parameters.items():
                        p.copy_(file.get_tensor(f"weight:{name}"))
                masks = {n: file.get_tensor(f"mask:{n}").bool() for n in parameters}
                history = [Round.from_dict(entry) for entry in header["history"]]
        except FileFormatError:
            raise
        except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise FileFormatError(
                f"checkpoint: {self._path} is truncated or damaged: {error}"
            ) from error
        return Masks(masks, header["recipe"]), history

    def remove(self) -> None:
        """Remove the file, after all rounds are complete."""
        self._path.unlink(missing_ok=True)
