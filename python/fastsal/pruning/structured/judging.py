"""Judge cuts of a model by the features of images that are held out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastsal.data.batches import Pair
from fastsal.models.selection import select_parameters
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.measured import HeldOutFeatures
from fastsal.pruning.reconstruction.passes import moment_bytes, reconstruct_on
from fastsal.pruning.reconstruction_result import Reconstruction
from fastsal.pruning.shelf import tensors_of
from fastsal.pruning.structured.groups import Group, cut, restored
from fastsal.pruning.structured.work import Change, Work, applied

Cuts = Sequence[tuple[Group, Tensor]]


@dataclass(frozen=True)
class Choice:
    """Widths, and the held-out loss of the model that has them.

    Attributes:
        widths: Name of a group to the units that it keeps.
        changes: Weights that make up for the units that go.
        loss: Held-out loss; None if it was not measured.
    """

    widths: dict[str, int]
    changes: list[Change]
    loss: float | None


class Judge:
    """Held-out images, and the features of the model with all units.

    Args:
        model: The model with all units; it is unchanged at the end of each call but `reconstruct`.
        held: Held-out images.
    """

    def __init__(self, model: nn.Module, held: Iterable[Pair]) -> None:
        self._model = model
        self._features = HeldOutFeatures.of(model, held)

    def best(self, work: Work, candidates: Sequence[dict[str, int]]) -> Choice:
        """Return the widths of the lowest loss, the first of equal ones."""
        found: Choice | None = None
        for widths in candidates:
            changes = work.fold(widths)
            with restored(self._model):
                applied(changes)
                loss = self._loss(work.cuts(widths))
            loss = math.inf if math.isnan(loss) else loss
            if found is None or found.loss is None or loss < found.loss:
                found = Choice(widths, changes, loss)
        assert found is not None
        return found

    def reconstruct(
        self, cuts: Cuts, choice: Choice, source: Iterable[Pair], seed: int, room: int | None
    ) -> Reconstruction:
        """Solve for the weights of all layers without the units that go; undo it if that is worse.

        The weights of these units are zero then, for `cut` to remove. Tensors get new memory, as in
        `cut`, so that `groups.restored` can give the model its values back.

        Args:
            cuts: Groups and the units that they keep.
            choice: The fold to start from, and its held-out loss.
            source: Images.
            seed: Seed of the places that are compared.
            room: Bytes for images and activations; None without a budget.
        """
        assert choice.loss is not None
        before = choice.loss
        masks = masks_of(self._model, cuts)
        tensors = tensors_of(self._model)
        dense = {name: tensor.data for name, tensor in tensors.items()}
        applied((tensor, tensor.data.clone()) for tensor in tensors.values())
        with torch.no_grad():
            for tensor, value in choice.changes:
                tensor.copy_(value)
        masks.apply(self._model)
        solved, images = reconstruct_on(self._model, dense, masks, source, seed=seed, room=room)
        with restored(self._model):
            after = self._loss(cuts)
        kept = after < before  # False for NaN
        if not kept:
            applied((tensor, dense[name]) for name, tensor in tensors.items())
        return Reconstruction(before, after, kept, len(solved), images)

    def _loss(self, cuts: Cuts) -> float:
        cut(self._model, cuts)
        return self._features.mean_loss(self._model)


def masks_of(model: nn.Module, cuts: Cuts) -> Masks:
    """Return masks of all weights of a model, False for those of units that go."""
    masks = {
        name: torch.ones(p.shape, dtype=torch.bool, device="cpu")
        for name, p in select_parameters(model).items()
    }
    for group, kept in cuts:
        gone = torch.ones(group.units, dtype=torch.bool, device="cpu")
        gone[kept] = False
        for part in group.slices:
            if part.name in masks:
                masks[part.name].index_fill_(part.axis, part.index[gone].flatten(), False)
    return Masks(masks, copy=False)


def room_for(model: nn.Module, budget: int) -> int | None:
    """Return the bytes that a budget leaves for a reconstruction; None if that is too little.

    Besides the model there are a copy of it, folded weights and masks.
    """
    weights: Mapping[str, Tensor] = select_parameters(model)
    copies = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    room = budget - 2 * copies - sum(p.numel() for p in weights.values())
    return room if room > moment_bytes(weights.values()) else None
