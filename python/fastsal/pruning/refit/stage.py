"""Refitting as a stage of `prune`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fastsal.data.batches import Pair
from fastsal.errors import InvalidArgument
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.refit.refit import refit_on
from fastsal.pruning.refit.settings import Refit
from fastsal.pruning.refit_result import RefitResult
from fastsal.pruning.shelf import weight_bytes
from fastsal.utils.sizes import gib

# Copies of all weights while a model is refitted: dense, before the step, best, gradients, and two
# moments of Adam.
_COPIES = 6


@dataclass(frozen=True)
class RefitStage:
    """How `prune` refits its model, and to what.

    Attributes:
        settings: Checked settings.
        dense: A copy of the dense model.
        autocast: dtype of the passes under `torch.autocast`, or None.
        progress: As for `prune`.
        seed: Seed of all draws.
        room: Bytes for images and activations within a memory budget; None without one.
    """

    settings: Refit
    dense: nn.Module
    autocast: torch.dtype | None
    progress: bool | Callable[[int, int | None], None]
    seed: int
    room: int | None

    @classmethod
    def of(
        cls,
        given: str | Sequence[str] | Refit,
        model: nn.Module,
        *,
        autocast: torch.dtype | None,
        progress: bool | Callable[[int, int | None], None],
        seed: int,
        budget: int | None,
        kept: int,
    ) -> RefitStage:
        """Copy the model, which is dense now.

        Args:
            given: Settings, or windows.
            model: The dense model.
            autocast: As for `prune`.
            progress: As for `prune`.
            seed: As for `prune`.
            budget: Bytes of the memory budget; None for no limit.
            kept: Bytes of scores, masks and copies that are kept while the model is refitted.

        Raises:
            InvalidArgument: A setting is invalid, the model cannot be copied, or the budget does
                not leave room for the copies of the weights.
        """
        settings = Refit.of(given)
        room = None
        if budget is not None:
            copies = _COPIES * weight_bytes(model) + kept
            room = budget - copies
            if room <= 0:
                raise InvalidArgument(
                    f"memory_budget must be more than {gib(copies)} with refit, which keeps "
                    f"{_COPIES} copies of the weights, got {gib(budget)}"
                )
        try:
            dense = copy.deepcopy(model)
        except Exception as error:
            raise InvalidArgument(
                f"model must be one that copy.deepcopy can copy for refit, which matches a dense "
                f"copy; it raises {type(error).__name__}: {error}"
            ) from error
        return cls(settings, dense, autocast, progress, seed, room)

    def run(
        self,
        model: nn.Module,
        source: Iterable[Pair],
        held: Iterable[Pair],
        masks: Masks,
        checkpoint: Path | None = None,
    ) -> RefitResult:
        """Refit a pruned model in place.

        Args:
            model: The pruned model.
            source: Training images, iterable again.
            held: Held-out images, iterable again.
            masks: Masks to hold.
            checkpoint: As for `fastsal.refit`.
        """
        return refit_on(
            model,
            self.dense,
            source,
            held,
            masks,
            self.settings,
            autocast=self.autocast,
            progress=self.progress,
            seed=self.seed,
            room=self.room,
            checkpoint=checkpoint,
        )
