"""Deployment: folders of runs, packed and ONNX files, and measurements of size and speed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastsal.utils.lazy import lazy_names

if TYPE_CHECKING:
    from fastsal.deploy.runs import load_run, save_run

__all__ = ["load_run", "save_run"]

__getattr__ = lazy_names(__name__, {"load_run": "runs", "save_run": "runs"})
