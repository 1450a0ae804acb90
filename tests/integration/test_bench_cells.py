"""Tables of results hold cells of one model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
KEY = ("small", "dense", 0, 0, 0.0)


@pytest.fixture
def cells(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    module = pytest.importorskip("benches.cells", reason="needs the repository")
    return lambda: module.Cells(tmp_path / "cells.json", torch.device("cpu"))


def test_cells_of_another_model_are_refused(cells):
    cells().add_dense(KEY, lambda: {"accuracy": 0.967, "error": 0.0})
    again = cells()
    again.add_dense(KEY, lambda: {"accuracy": 0.9665, "error": 0.0})
    assert [row["measures"]["accuracy"] for row in again.rows] == [0.967]
    with pytest.raises(SystemExit, match=r"small are of another model \(accuracy 0.9670, now 0.96"):
        again.add_dense(KEY, lambda: {"accuracy": 0.9627, "error": 0.0})


def test_a_cell_that_is_there_is_not_run_again(cells):
    key = ("small", "magnitude", 8, 0, 0.5)
    cells().add(key, lambda: lambda: {"accuracy": 0.5})
    cells().add(key, lambda: pytest.fail("ran again"))
