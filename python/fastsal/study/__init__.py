"""Studies: prune on sources, measure on every task, fine-tune, measure again, over a grid."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsal.study.runner import Summary, run_study
    from fastsal.study.settings.schema import Study, load_study

__all__ = ["Study", "Summary", "load_study", "run_study"]

_HOME = {"Study": "settings", "Summary": "runner", "load_study": "settings", "run_study": "runner"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastsal.study' has no attribute {name!r}")
    return getattr(importlib.import_module(f"fastsal.study.{_HOME[name]}"), name)
