"""Pruning: score, rank, mask and compensate, in one step, in rounds, or within a limit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import fastsal.utils.core_arrays as _  # noqa: F401 - before the first call
from fastsal.utils.lazy import lazy_names

if TYPE_CHECKING:
    from fastsal.pruning.compensation import CompensationReport
    from fastsal.pruning.history import Round
    from fastsal.pruning.limits.limit import SafetyReport
    from fastsal.pruning.masks.masks import Masks
    from fastsal.pruning.prune_result import PruneResult

__all__ = ["CompensationReport", "Masks", "PruneResult", "Round", "SafetyReport"]

__getattr__ = lazy_names(
    __name__,
    {
        "CompensationReport": "compensation",
        "Masks": "masks.masks",
        "PruneResult": "prune_result",
        "Round": "history",
        "SafetyReport": "limits.limit",
    },
)
