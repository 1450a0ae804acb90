"""Joint compensation: move the kept weights so as to make up for the pruned ones.

The exact minimiser of `δᵀAδ / 2` under `θ_P = 0` for any mask, block by block:
`θ_K ← θ_K + A_KK⁻¹ A_KP θ_P`.
(The update of WoodFisher, oBERT and M-FAC treats each pruned weight as if it were the only one.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

import fastsal._core as _core
from fastsal.errors import MaskError
from fastsal.fisher.block_fisher import BlockFisher, sums_of
from fastsal.fisher.checks import check_damping
from fastsal.fisher.inverses import raise_failed
from fastsal.fisher.parts import flat, slices
from fastsal.fisher.statistics import Statistics, statistics_of
from fastsal.models.selection import check_mask_shapes, model_parameters
from fastsal.pruning.shelf import Shelf


@dataclass(frozen=True)
class CompensationReport:
    """Predicted loss increase, `δᵀAδ / 2`, in the units of the loss.

    Attributes:
        increase: Name to the increase after compensation.
        uncompensated: Name to the increase of the mask alone.
    """

    increase: dict[str, float]
    uncompensated: dict[str, float]

    @property
    def total(self) -> float:
        """The increase over all parameters, after compensation."""
        return sum(self.increase.values())

    @property
    def total_uncompensated(self) -> float:
        """The increase over all parameters of the mask alone."""
        return sum(self.uncompensated.values())


def compensate(
    model: nn.Module,
    fisher: BlockFisher | Statistics,
    masks: Mapping[str, Tensor],
    damping: float = 1e-5,
    *,
    before: Mapping[str, Tensor] | None = None,
) -> CompensationReport:
    """Prune a model to masks and move its kept weights to make up for it, in place.

    Args:
        model: With the weights that the statistics were collected at (the pruned ones too).
        fisher: Statistics from `collect`.
        masks: True = kept; from `rank` or by hand. Parameters without a mask stay as they are.
        damping: `λ`, above zero.
        before: Masks under which the statistics were collected; those weights take no part.

    Returns:
        The predicted loss increase, per parameter.

    Raises:
        InvalidArgument: Bad damping, no samples.
        MaskError: A mask has no statistics or another shape.
        FactorizationError: A damped block is not positive definite. The model is as it was.
    """
    damping = check_damping(damping)
    owned = model_parameters(model, fisher.shapes)
    for name in masks:
        if name not in owned:
            raise MaskError(f"masks: {name!r} has no statistics; takes {', '.join(owned)}")
    check_mask_shapes("masks", masks, owned)
    check_mask_shapes("before", before or {}, owned)
    moved, report = moves(owned, statistics_of(fisher), masks, damping, before=before)
    with torch.no_grad():
        for name, weights in moved.items():
            owned[name].copy_(weights)
    return report


def moves(
    tensors: Mapping[str, Tensor],
    statistics: Statistics,
    masks: Mapping[str, Tensor],
    damping: float,
    *,
    before: Mapping[str, Tensor] | None = None,
    shelf: Shelf | None = None,
) -> tuple[dict[str, Tensor], CompensationReport]:
    """What `compensate` does to weights by the names of the statistics, without doing it.

    Returns name to the weights afterwards, float32, on the shelf or in memory.
    """
    shelf = shelf or Shelf()
    moved = shelf.room("moved", {name: p.shape for name, p in tensors.items() if name in masks})
    increase, uncompensated = dict.fromkeys(tensors, 0.0), dict.fromkeys(tensors, 0.0)
    for fisher, parts in statistics.groups():
        others = slices(before or {}, parts) or None
        parameters, block_size = sums_of(fisher).all_for_core(others)
        weights = [flat(w).float().numpy() for w in slices(tensors, parts).values()]
        kept = slices(masks, parts)
        kept_flat = [
            flat(kept[key]).bool().numpy() if key in kept else np.ones(len(part), bool)
            for key, part in parts.items()
        ]
        results = _core.compensate(parameters, weights, kept_flat, block_size, damping)
        for (key, part), (values, after, bare, failed) in zip(parts.items(), results, strict=True):
            raise_failed(key, failed, damping)
            if part.name in moved:
                part.of(moved[part.name]).copy_(torch.from_numpy(values))
            increase[part.name] += float(after.sum())
            uncompensated[part.name] += float(bare.sum())
        shelf.release()
        del fisher, parameters, weights, results  # before sums of the next parts are made
    return moved, CompensationReport(increase, uncompensated)
