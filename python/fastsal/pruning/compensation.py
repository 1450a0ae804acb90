"""Joint compensation: update the kept weights to compensate for the pruned ones.

The exact minimizer of `δᵀAδ / 2` with `θ_P = 0` for any mask, block by block:
`θ_K ← θ_K + A_KK⁻¹ A_KP θ_P`.
(The update of WoodFisher, oBERT and M-FAC treats each pruned weight as if it were the only one.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import fastsal._core as _core
from fastsal.errors import MaskError
from fastsal.fisher.block_fisher import BlockFisher, sums_of
from fastsal.fisher.inverses import raise_failed
from fastsal.fisher.model_sums import CoreParameter
from fastsal.fisher.parts import flat, slices
from fastsal.fisher.statistics import Statistics, statistics_of
from fastsal.gradients.precision import row_dtype
from fastsal.models.selection import check_finite_weights, check_mask_shapes, model_parameters
from fastsal.pruning.damping import resolve_damping
from fastsal.pruning.shelf import Shelf
from fastsal.utils.booleans import boolean
from fastsal.utils.interrupts import uninterrupted
from fastsal.utils.suggestions import listed


@dataclass(frozen=True)
class CompensationReport:
    """The predicted loss increase of pruning, `δᵀAδ / 2`, in the units of the loss.

    Attributes:
        increase: Parameter name to the increase with compensation.
        uncompensated: Parameter name to the increase without compensation.
        damping: Absolute `λ` that was used.
    """

    increase: dict[str, float]
    uncompensated: dict[str, float]
    damping: float

    @property
    def total(self) -> float:
        """The increase over all parameters, with compensation."""
        return sum(self.increase.values())

    @property
    def total_uncompensated(self) -> float:
        """The increase over all parameters, without compensation."""
        return sum(self.uncompensated.values())

    def __repr__(self) -> str:
        return (
            f"CompensationReport(total={self.total:.4g}, total_uncompensated="
            f"{self.total_uncompensated:.4g}, damping={self.damping:.3g}, "
            f"{len(self.increase)} parameters)"
        )


def compensate(
    model: nn.Module,
    fisher: BlockFisher | Statistics,
    masks: Mapping[str, Tensor],
    damping: float | str = "0.1x",
    *,
    before: Mapping[str, Tensor] | None = None,
) -> CompensationReport:
    """Prune a model to masks and update its kept weights to compensate, in place.

    Computes the exact minimizer of `δᵀAδ / 2` with `θ_P = 0`, `A = F + λI`, in each block:
    `θ_K ← θ_K + A_KK⁻¹ A_KP θ_P`, where `K` are the kept and `P` the pruned weights.

    Args:
        model: The model with the weights that the statistics were collected at, pruned ones
            included.
        fisher: Statistics from `fastsal.collect`.
        masks: Name to mask, True = kept: from `fastsal.rank`, or any others. Parameters without a
            mask are unchanged.
        damping: `λ`: a positive number, or a multiple of the mean diagonal of F such as `"0.1x"`.
        before: Name to mask of weights that were already pruned when the statistics were collected;
            they are excluded.

    Returns:
        The predicted loss increase of each parameter.

    Raises:
        InvalidArgument: `damping` is invalid, the statistics hold no samples, or a weight is NaN or
            infinite.
        UnknownParameter: The model lacks a parameter of the statistics, or has it in another shape.
        MaskError: A mask has no statistics, or another shape than its parameter.
        FactorizationError: A damped block is not positive definite. The model is unchanged.
    """
    damping = resolve_damping(damping, fisher)
    owned = model_parameters(model, fisher.shapes)
    for name in masks:
        if name not in owned:
            raise MaskError(
                f"masks must be of parameters with statistics ({listed(list(owned))}), got {name!r}"
            )
    check_mask_shapes("masks", masks, owned)
    check_mask_shapes("before", before or {}, owned)
    check_finite_weights(owned)
    moved, report = moves(owned, statistics_of(fisher), masks, damping, before=before)
    with torch.no_grad(), uninterrupted():
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
    """Compute the result of `compensate` without changing the weights.

    Args:
        tensors: Name to weights, named as in the statistics.
        statistics: Statistics of these.
        masks: Name to mask, True = kept.
        damping: Absolute `λ`.
        before: Name to mask of weights that were already pruned.
        shelf: Where the result is stored; None for memory.

    Returns:
        Name to the new weights, float32 or, for float64 weights, float64, and the predicted loss
        increase.
    """
    moved = _room(shelf := shelf or Shelf(), {n: p for n, p in tensors.items() if n in masks})
    increase, uncompensated = dict.fromkeys(tensors, 0.0), dict.fromkeys(tensors, 0.0)
    for fisher, parts in statistics.groups():
        others = slices(before or {}, parts) or None
        parameters, block_size = sums_of(fisher).all_for_core(others)
        weights = [flat(w) for w in slices(tensors, parts).values()]
        kept = slices(masks, parts)
        kept_flat = [
            flat(boolean(kept[key])).numpy() if key in kept else np.ones(len(part), bool)
            for key, part in parts.items()
        ]
        single = [w.float().numpy() for w in weights]
        results = _core.compensate(parameters, single, kept_flat, block_size, damping)
        in_full = _in_float64(parameters, weights, kept_flat, block_size, damping)
        for n, (key, part) in enumerate(parts.items()):
            values, after, bare, failed = results[n]
            raise_failed(key, failed, damping)
            if part.name in moved:
                new = torch.from_numpy(in_full.get(n, values))
                part.of(moved[part.name]).copy_(new)
            increase[part.name] += float(after.sum())
            uncompensated[part.name] += float(bare.sum())
        shelf.release()
        # Before sums of the next parts are made.
        del fisher, parameters, weights, single, results, in_full
    return moved, CompensationReport(increase, uncompensated, damping)


def _room(shelf: Shelf, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return where new weights are stored, in float32 or, for float64 weights, in float64."""
    found: dict[str, Tensor] = {}
    for dtype in sorted({row_dtype(p) for p in tensors.values()}, key=str):
        shapes = {name: p.shape for name, p in tensors.items() if row_dtype(p) == dtype}
        found |= shelf.room("moved", shapes, dtype)
    return {name: found[name] for name in tensors}


def _in_float64(
    parameters: Sequence[CoreParameter],
    weights: Sequence[Tensor],
    kept: Sequence[NDArray[np.bool_]],
    block_size: int,
    damping: float,
) -> dict[int, NDArray[np.float64]]:
    """Compute the new weights of the float64 parameters among `parameters`, by their positions.

    The core solves in float64, but takes and returns float32. The step `A_KK⁻¹ A_KP θ_P` is linear
    in the pruned weights, so it is computed from their leading and trailing halves; a second call,
    with minus the first result as the kept weights, returns what rounding left out of that.
    """
    at = [n for n, w in enumerate(weights) if w.dtype == torch.float64]
    if not at:
        return {}
    some, masks = [parameters[n] for n in at], [kept[n] for n in at]
    full = [weights[n].numpy() for n in at]
    leading = [w.astype(np.float32) for w in full]
    trailing = [(w - h).astype(np.float32) for w, h in zip(full, leading, strict=True)]

    def step(
        pruned: Sequence[NDArray[np.float32]], start: Sequence[NDArray[np.float32]]
    ) -> list[NDArray[np.float32]]:
        given = [np.where(m, k, p) for m, k, p in zip(masks, start, pruned, strict=True)]
        return [found[0] for found in _core.compensate(some, given, masks, block_size, damping)]

    nothing = [np.zeros_like(h) for h in leading]
    first = step(leading, nothing)
    rest = step(leading, [-values for values in first])
    last = step(trailing, nothing)
    return {
        n: np.where(masks[i], full[i] + (last[i].astype(np.float64) + rest[i] + first[i]), 0.0)
        for i, n in enumerate(at)
    }
