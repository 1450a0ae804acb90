"""Cells of a table of results: one file, to which a later run adds what is missing."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastsal._core as _core
from fastsal.utils.machine import processor

KEYS = ("subject", "method", "samples", "seed", "sparsity")
Measures = dict[str, float]


class Cells:
    """The cells of a file, each with the names of `KEYS`, its measures and the machine.

    Args:
        path: JSON file; it is written anew after each cell.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.rows: list[dict[str, Any]] = []
        if path.is_file():
            self.rows = json.loads(path.read_text())
        self._done = {tuple(row[key] for key in KEYS) for row in self.rows}

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return key in self._done

    def add(self, key: tuple[Any, ...], work: Callable[[], Callable[[], Measures]]) -> None:
        """Run a cell unless the file has it.

        Args:
            key: Values of `KEYS`.
            work: What is timed; it returns the function that measures its result.
        """
        if key in self:
            return
        start = time.perf_counter()
        measure = work()
        seconds = time.perf_counter() - start
        found = measure()
        version, instructions, _ = _core.build_info()
        facts = {
            "seconds": round(seconds, 1),
            "machine": f"{processor()}, {instructions}",
            "fastsal": version,
        }
        self.rows.append(dict(zip(KEYS, key, strict=True)) | {"measures": found} | facts)
        self._done.add(key)
        whole = self._path.with_suffix(".part")
        whole.write_text(json.dumps(self.rows, indent=1) + "\n")
        os.replace(whole, self._path)
        print(f"{seconds:6.0f} s  {', '.join(map(str, key))}: {found}", flush=True)
