"""Write the tables of a study in CSV and in Parquet."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastsal.errors import FastsalError
from fastsal.study.cells import Cell
from fastsal.study.folder_format import TABLES, Columns
from fastsal.utils.atomic import atomic_path


def require_tables() -> None:
    """Raise FastsalError if pyarrow is not installed."""
    if find_spec("pyarrow") is None:
        raise FastsalError("the tables of a study require pyarrow: pip install 'fastsal[study]'")


Rows = list[dict[str, Any]]


def tables_of(study: str, done: Iterable[tuple[Cell, Mapping[str, Any]]]) -> dict[str, Rows]:
    """Return the rows of `results`, `layers`, `loss_line` and `overlap`.

    Args:
        study: Name of the study.
        done: Cells in the order of the grid, with their results.
    """
    results: Rows = []
    layers: Rows = []
    loss_line: Rows = []
    overlap: dict[tuple[Any, ...], dict[str, Any]] = {}
    for cell, result in done:
        facts = cell.facts()
        common = {"study": study, **facts, **result["facts"], "status": result["status"]}
        results += [{**common, **row} for row in result["tasks"]]
        layers += [
            {**facts, "position": i, **row} for i, row in enumerate(result.get("layers", []))
        ]
        loss_line += [{**facts, **row} for row in result.get("loss_line", [])]
        for row in result.get("overlap", []):
            whole = {**{k: facts[k] for k in ("model", "source", "seed")}, **row}
            overlap[tuple(whole[k] for k in ("model", "source", "seed", "task", "layer"))] = whole
    return {
        "results": results, "layers": layers, "loss_line": loss_line,
        "overlap": list(overlap.values()),
    }  # fmt: skip


def write_tables(folder: Path, tables: Mapping[str, Rows]) -> None:
    """Write `results` and `layers`, and `loss_line` and `overlap` if they have rows.

    Args:
        folder: Results folder.
        tables: Rows of all tables, from `tables_of`.

    Raises:
        OSError: A file cannot be written; its previous content is kept.
    """
    for name, rows in tables.items():
        if rows or name in ("results", "layers"):
            write_table(folder, name, TABLES[name], rows)


def write_table(
    folder: Path, name: str, schema: Columns, rows: Sequence[Mapping[str, Any]]
) -> None:
    """Write one table as `name.csv` and `name.parquet`, each atomically."""
    columns = {
        column: [_typed(row.get(column), kind) for row in rows] for column, kind in schema.items()
    }
    with (
        atomic_path(folder / f"{name}.csv") as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(schema)
        for i in range(len(rows)):
            values = [columns[column][i] for column in schema]
            writer.writerow(["" if v is None else repr(v) if isinstance(v, float) else v
                             for v in values])  # fmt: skip
    import pyarrow
    from pyarrow import parquet

    types = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64()}
    table = pyarrow.table(
        {column: pyarrow.array(columns[column], types[kind]) for column, kind in schema.items()}
    )
    with atomic_path(folder / f"{name}.parquet") as temporary:
        parquet.write_table(table, temporary, compression="zstd")


def _typed(value: Any, kind: type) -> Any:
    return None if value is None else kind(value)
