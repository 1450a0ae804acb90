"""A checkpoint of the state between two rounds of pruning, from which a rerun resumes.

A refit, which may take longer than all else, has a file beside it for its own state.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsal.data.batches import Pair
from fastsal.data.content import SeenImages
from fastsal.errors import FileFormatError
from fastsal.pruning.history import Round
from fastsal.pruning.masks.masks import Masks
from fastsal.utils import safetensors_files as streamed_files
from fastsal.utils.digests import Digest, tensors_digest
from fastsal.utils.paths import user_path
from fastsal.utils.resuming import as_asked, check_origin, check_path, remove_finished
from fastsal.utils.safetensors_files import Entry, header_of

_FORMAT = "fastsal.round"


class Checkpoint:
    """A file with the weights, masks and history after the last complete round.

    Args:
        path: The file. It is written atomically, and removed when all rounds are complete.
        asked: Arguments of the run, as JSON values; the file of a run with others is rejected.
        rest: Digest of what the model has besides the weights that are pruned.
        seen: The images, as passes over them see them.
        writes: Whether this process writes the file.

    Raises:
        InvalidArgument: The file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        asked: Mapping[str, Any],
        rest: str = "",
        seen: SeenImages | None = None,
        *,
        writes: bool = True,
    ) -> None:
        self._path = user_path(path)
        self._asked = as_asked(asked)
        self._rest = rest
        self._seen = seen or SeenImages()
        if writes:
            check_path(self._path)

    @property
    def of_refit(self) -> Path:
        """The file for the state of a refit."""
        return self._path.with_name(f"{self._path.name}.refit")

    def save(self, weights: Mapping[str, Tensor], state: RoundState) -> None:
        """Write the state after a round, or before its refit."""
        masks, scores = state.masks, state.scores
        assert masks is not None  # there is one after a round
        entries = [Entry.of(f"weight:{n}", p) for n, p in weights.items()]
        entries += [Entry.of(f"mask:{n}", mask) for n, mask in masks.items()]
        entries += [Entry.of(f"score:{n}", score) for n, score in (scores or {}).items()]
        header = {
            "format": _FORMAT,
            "asked": self._asked,
            "start": self._start,
            "history": [entry.as_dict() for entry in state.history],
            "recipe": masks.recipe,
            "data": self._seen.recorded(),
            "before_refit": scores is not None,
        }
        streamed_files.write(self._path, header, entries)

    def resume(
        self,
        tensors: Mapping[str, Tensor],
        passes: Callable[[], Iterable[Pair]] = tuple,
        masked: Iterable[str] | None = None,
    ) -> RoundState:
        """Restore the state of the file, if it exists.

        Args:
            tensors: Name to parameter or buffer, with the values that the run started from. They
                are changed in place, some of them possibly also where this raises.
            passes: Starts a pass over the images, which are compared with those of the file.
            masked: Names of those that have a mask; None for all.

        Raises:
            FileFormatError: The file is damaged, or of another run, model or data.
        """
        self._start = Digest().text(self._rest).text(tensors_digest(tensors)).hexdigest()
        if not self._path.exists():
            return RoundState()
        with self._opened() as file:
            header = header_of(file.metadata())
            check_origin(self._path, "prune", header, _FORMAT, self._start, self._asked)
            data = dict(header["data"])
        self._seen.check(data, passes)  # errors of the images are not those of the file
        with self._opened() as file, torch.no_grad():
            for name, p in tensors.items():
                p.copy_(file.get_tensor(f"weight:{name}"))
            masks = {n: file.get_tensor(f"mask:{n}").bool() for n in masked or tensors}
            history = [Round.from_dict(entry) for entry in header["history"]]
            scores = None
            if header.get("before_refit"):
                scores = {n: file.get_tensor(f"score:{n}") for n in masks}
            return RoundState(Masks(masks, header["recipe"], copy=False), history, scores)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        """Open the file; errors in the block are those of a damaged file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(os.fspath(self._path), framework="pt") as file:
                yield file
        except FileFormatError:
            raise
        except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise FileFormatError(
                f"checkpoint: {self._path} is truncated or damaged: {error}"
            ) from error

    def remove(self) -> None:
        """Remove the file, after all rounds are complete."""
        remove_finished(self._path)


@dataclass(frozen=True)
class RoundState:
    """The state after a round, besides the weights.

    Attributes:
        masks: Masks after the last round; None before the first one.
        history: The rounds.
        scores: Scores of the last round if it is still to be refitted, else None.
    """

    masks: Masks | None = None
    history: list[Round] = field(default_factory=list)
    scores: Mapping[str, Tensor] | None = None
