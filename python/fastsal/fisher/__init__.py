"""Block-diagonal empirical Fisher statistics: accumulation, storage, merging and collection."""

from __future__ import annotations

from typing import TYPE_CHECKING

import fastsal.utils.core_arrays as _  # noqa: F401 - before the first call
from fastsal.utils.lazy import lazy_names

if TYPE_CHECKING:
    from fastsal.fisher.block_fisher import BlockFisher
    from fastsal.fisher.memory_plan import MemoryPlan
    from fastsal.fisher.merging import merge_files

__all__ = ["BlockFisher", "MemoryPlan", "merge_files"]

__getattr__ = lazy_names(
    __name__, {"BlockFisher": "block_fisher", "MemoryPlan": "memory_plan", "merge_files": "merging"}
)
