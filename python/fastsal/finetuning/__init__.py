"""Fine-tuning of pruned models, with their mask held."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastsal.utils.lazy import lazy_names

if TYPE_CHECKING:
    from fastsal.finetuning.finetune import FinetuneResult

__all__ = ["FinetuneResult"]

__getattr__ = lazy_names(__name__, {"FinetuneResult": "finetune"})
