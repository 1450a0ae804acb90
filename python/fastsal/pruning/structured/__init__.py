"""Removal of whole hidden units, attention heads and channels: a model that is really smaller."""

from fastsal.utils.lazy import lazy_names

_HOME = {
    "StructureResult": "pruning.structured.result",
    "prune_structure": "pruning.structured.prune_structure",
}

__all__ = ["StructureResult", "prune_structure"]

__getattr__ = lazy_names(__name__, _HOME)
