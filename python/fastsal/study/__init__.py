"""Studies: prune on sources, evaluate on all tasks, fine-tune and evaluate again, over a grid."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastsal.utils.lazy import lazy_names

if TYPE_CHECKING:
    from fastsal.study.runner import Summary, run_study
    from fastsal.study.settings.reading import load_study
    from fastsal.study.settings.schema import Study

__all__ = ["Study", "Summary", "load_study", "run_study"]

__getattr__ = lazy_names(
    __name__,
    {
        "Study": "settings.schema",
        "Summary": "runner",
        "load_study": "settings.reading",
        "run_study": "runner",
    },
)
