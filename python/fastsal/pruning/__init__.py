"""Pruning: score, rank, mask and compensate, in one step, in rounds, or up to a limit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastsal.utils.lazy import lazy_names

if TYPE_CHECKING:
    from fastsal.pruning.limits.limit import SafetyReport
    from fastsal.pruning.masks.masks import Masks
    from fastsal.pruning.prune import PruneResult

__all__ = ["Masks", "PruneResult", "SafetyReport"]

__getattr__ = lazy_names(
    __name__, {"Masks": "masks.masks", "PruneResult": "prune", "SafetyReport": "limits.limit"}
)
