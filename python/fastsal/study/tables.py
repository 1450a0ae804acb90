"""The tidy tables of a study: one row a cell and task, in CSV and in Parquet."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastsal.errors import FastsalError
from fastsal.study.cells import Cell
from fastsal.utils.atomic import atomic_path

# Name to type. Empty fields of a CSV file stand for what is missing.
RESULTS: dict[str, type] = {
    "study": str, "cell": str, "model": str, "source": str, "criterion": str, "rounds": int,
    "sparsity": float, "seed": int, "samples": int, "damping": float, "sparsity_reached": float,
    "predicted_increase": float, "measured_increase": float,
    "task": str, "role": str, "head": str, "classes": int, "test_images": int,
    "dense": float, "pruned": float, "tuned": float,
    "status": str, "error": str,
    "fastsal": str, "torch": str, "timm": str, "threads": int, "statistics_bytes": int,
    "seconds_statistics": float, "seconds_prune": float, "seconds_evaluate": float,
    "seconds_finetune": float,
}  # fmt: skip
_CELL: dict[str, type] = {
    "cell": str, "model": str, "source": str, "criterion": str, "rounds": int, "sparsity": float,
    "seed": int,
}  # fmt: skip
LAYERS: dict[str, type] = {**_CELL, "position": int, "layer": str, "weights": int, "pruned": int}
LANDSCAPE: dict[str, type] = {
    **_CELL, "task": str, "role": str, "path": str, "t": float, "loss": float, "accuracy": float,
}  # fmt: skip
OVERLAP: dict[str, type] = {
    "model": str, "source": str, "seed": int, "task": str, "position": int, "layer": str,
    "diagonal": float, "eigenspace": float,
}  # fmt: skip

Row = Mapping[str, Any]


def require_tables() -> None:
    """Raise FastsalError where tables cannot be written."""
    if find_spec("pyarrow") is None:
        raise FastsalError("a study needs pyarrow for its tables: pip install 'fastsal[study]'")


def write_tables(
    folder: Path, study: str, done: Iterable[tuple[Cell, Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """Write `results`, `layers` and, where there are any, `landscape` and `overlap`.

    Args:
        folder: of the results.
        study: its name.
        done: cells, in the order of the grid, and what they came to.

    Returns:
        The rows of `results`.

    Raises:
        OSError: a file cannot be written; what it held before stays.
    """
    results: list[dict[str, Any]] = []
    layers: list[dict[str, Any]] = []
    landscape: list[dict[str, Any]] = []
    overlap: dict[tuple[Any, ...], dict[str, Any]] = {}
    for cell, result in done:
        facts = cell.facts()
        common = {"study": study, **facts, **result["facts"], "status": result["status"]}
        results += [{**common, **row} for row in result["tasks"]]
        layers += [
            {**facts, "position": i, **row} for i, row in enumerate(result.get("layers", []))
        ]
        landscape += [{**facts, **row} for row in result.get("landscape", [])]
        for row in result.get("overlap", []):
            whole = {**{k: facts[k] for k in ("model", "source", "seed")}, **row}
            overlap[tuple(whole[k] for k in ("model", "source", "seed", "task", "layer"))] = whole
    write_table(folder, "results", RESULTS, results)
    write_table(folder, "layers", LAYERS, layers)
    for name, schema, rows in (
        ("landscape", LANDSCAPE, landscape), ("overlap", OVERLAP, list(overlap.values()))
    ):  # fmt: skip
        if rows:
            write_table(folder, name, schema, rows)
    return results


def write_table(folder: Path, name: str, schema: Mapping[str, type], rows: Sequence[Row]) -> None:
    """Write one table as `name.csv` and `name.parquet`, each whole or not at all."""
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
