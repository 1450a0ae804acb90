"""Reconstruction as a stage of `prune`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastsal.data.batches import Pair
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.reconstruction.passes import DAMPING, reconstruct_on
from fastsal.pruning.reconstruction_result import Reconstruction
from fastsal.pruning.shelf import Shelf, all_or_nothing, restore


@dataclass(frozen=True)
class ReconstructionStage:
    """How `prune` reconstructs its model.

    Attributes:
        autocast: dtype of the passes under `torch.autocast`, or None.
        seed: Seed of the places that are compared.
        room: Bytes for images, activations and sums within a memory budget; None without one.
        damping: Penalty on the move of a weight, a multiple of the mean second moment of the
            inputs of its layer.
    """

    autocast: torch.dtype | None
    seed: int
    room: int | None
    damping: float = DAMPING

    def run(
        self,
        model: nn.Module,
        tensors: Mapping[str, Tensor],
        dense: Mapping[str, Tensor],
        masks: Masks,
        source: Iterable[Pair],
        loss: Callable[[], float],
        shelf: Shelf,
    ) -> Reconstruction:
        """Reconstruct a pruned model in place; undo it unless `loss` is lower.

        Args:
            model: The pruned model.
            tensors: Its parameters and buffers that may change.
            dense: Values of these in the dense model.
            masks: Masks to hold.
            source: Images.
            loss: Measures the model on held-out images.
            shelf: Where copies of the weights are stored.
        """
        before = loss()
        with all_or_nothing(tensors, shelf) as pruned:
            solved, images = reconstruct_on(
                model,
                dense,
                masks,
                source,
                autocast=self.autocast,
                damping=self.damping,
                seed=self.seed,
                room=self.room,
            )
            after = loss()
            kept = after < before  # False for NaN
            if not kept:
                restore(tensors, pruned, shelf)
        return Reconstruction(before, after, kept, len(solved), images)
