"""Cells of a table of results: one file, to which a later run adds what is missing."""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import fastsal._core as _core
from benches.quality.subjects import DATA, DATA_HELP
from fastsal.utils.devices import device_facts, resolve_device
from fastsal.utils.machine import processor

KEYS = ("subject", "method", "samples", "seed", "sparsity")
Measures = dict[str, float]
SAME = 2e-3  # largest relative difference of measures of one model on two machines


class Cells:
    """The cells of a file, each with the names of `KEYS`, its measures and the machine.

    Args:
        path: JSON file; it is written anew after each cell.
        device: Where the models run.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        self._path = path
        self._machine = f"{processor()}, {_core.build_info()[1]}"
        if device.type != "cpu":
            self._machine += f", {device_facts(device).get('gpu', device)}"
        self.rows: list[dict[str, Any]] = []
        if path.is_file():
            self.rows = json.loads(path.read_text())
        self._done = {tuple(row[key] for key in KEYS) for row in self.rows}

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return key in self._done

    def measures(self, key: tuple[Any, ...]) -> Measures:
        """Return the measures of a cell that is there."""
        found: Measures = next(
            row["measures"] for row in self.rows if tuple(row[each] for each in KEYS) == key
        )
        return found

    def add_dense(self, key: tuple[Any, ...], measure: Callable[[], Measures]) -> None:
        """Add the cell of the model that is pruned, or check that it is that of the other cells.

        A model that is trained where the table is made, as the small ViT, is another one elsewhere.

        Args:
            key: Values of `KEYS`.
            measure: Measures the model.
        """
        if key not in self:
            self.add(key, lambda: measure)
            return
        before, now = self.measures(key), measure()
        for name, value in before.items():
            if abs(now[name] - value) > SAME * abs(value):
                raise SystemExit(
                    f"{self._path}: the cells of {key[0]} are of another model ({name} "
                    f"{value:.4f}, now {now[name]:.4f}); remove them, or pass another --out"
                )

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
        facts = {
            "seconds": round(seconds, 1),
            "machine": self._machine,
            "fastsal": _core.build_info()[0],
        }
        self.rows.append(dict(zip(KEYS, key, strict=True)) | {"measures": found} | facts)
        self._done.add(key)
        whole = self._path.with_suffix(".part")
        whole.write_text(json.dumps(self.rows, indent=1) + "\n")
        os.replace(whole, self._path)
        print(f"{seconds:6.0f} s  {', '.join(map(str, key))}: {found}", flush=True)


def table_parser(
    prog: str, doc: str | None, subjects: Collection[str], results: Path
) -> argparse.ArgumentParser:
    """Return the options of a table: subjects, rows, draws, threads and the file of cells."""
    parser = argparse.ArgumentParser(prog=prog, description=doc)
    parser.add_argument("--data", type=Path, default=DATA, help=DATA_HELP)
    parser.add_argument("--subjects", nargs="+", choices=subjects, default=list(subjects))
    parser.add_argument("--methods", nargs="+", default=["*"], help="patterns of names of rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="draws")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch")
    parser.add_argument("--device", default="cpu", help="where the models run, for example cuda")
    parser.add_argument("--out", type=Path, default=results, help="JSON file of all cells")
    parser.add_argument("--show", action="store_true", help="print the tables only")
    return parser


def fill(
    given: argparse.Namespace, run: Callable[[str, argparse.Namespace, Cells], None]
) -> list[dict[str, Any]]:
    """Run the missing cells of all subjects, unless only the tables are shown; return all cells."""
    torch.set_num_threads(given.threads)
    torch.backends.cudnn.allow_tf32 = False  # convolutions in float32, as on the CPU
    given.device = resolve_device(given.device)
    cells = Cells(given.out, given.device)
    if not given.show:
        for name in given.subjects:
            run(name, given, cells)
    return cells.rows


def matching(methods: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Return the names of the methods that a pattern matches."""
    return [m for m in methods if any(fnmatch.fnmatch(m, p) for p in patterns)]
