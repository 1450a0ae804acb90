"""Joint compensation: move the kept weights so as to make up for the pruned ones.

The exact minimiser of `δᵀAδ / 2` under `θ_P = 0` for any mask, block by block:
`θ_K ← θ_K + A_KK⁻¹ A_KP θ_P`.
(The update of WoodFisher, oBERT and M-FAC treats each pruned weight as if it were the only one.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastsal import _core
from fastsal.criteria.block_fisher import raise_failed
from fastsal.criteria.scoring import check_mask_shapes, model_parameters
from fastsal.errors import MaskError
from fastsal.fisher import BlockFisher, check_damping, flat_mask
from fastsal.masks import Masks


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
    fisher: BlockFisher,
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
    check_damping(damping)
    owned = model_parameters(model, fisher.shapes)
    for name in masks:
        if name not in owned:
            raise MaskError(f"masks: {name!r} has no statistics; takes {', '.join(owned)}")
    check_mask_shapes("masks", masks, owned)
    check_mask_shapes("before", before or {}, owned)
    full = Masks({n: masks[n] if n in masks else torch.ones(p.shape) for n, p in owned.items()})
    parameters, block_size = fisher._borrow_all(before)
    weights = [p.detach().cpu().reshape(-1).float().contiguous().numpy() for p in owned.values()]
    flat = [m for m in (flat_mask(full, name) for name in owned) if m is not None]
    results = _core.compensate(parameters, weights, flat, block_size, damping)
    for name, (*_, failed) in zip(owned, results, strict=True):
        raise_failed(name, failed, damping)
    increase, uncompensated = {}, {}
    with torch.no_grad():
        for (name, p), (moved, after, bare, _) in zip(owned.items(), results, strict=True):
            if name in masks:
                p.copy_(torch.from_numpy(moved).reshape(p.shape))
            increase[name], uncompensated[name] = float(after.sum()), float(bare.sum())
    return CompensationReport(increase, uncompensated)
