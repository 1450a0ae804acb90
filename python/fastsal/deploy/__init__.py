"""Deployment: folders of runs, packed and ONNX files, and measurements of size and speed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastsal.utils.lazy import lazy_names

if TYPE_CHECKING:
    from fastsal.deploy.export import ExportResult
    from fastsal.deploy.meter import Measurement, measure_against
    from fastsal.deploy.runs import load_run, save_run

__all__ = ["ExportResult", "Measurement", "load_run", "measure_against", "save_run"]

__getattr__ = lazy_names(
    __name__,
    {
        "ExportResult": "export",
        "Measurement": "meter",
        "load_run": "runs",
        "measure_against": "meter",
        "save_run": "runs",
    },
)
