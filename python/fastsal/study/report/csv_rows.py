"""Read CSV files into typed rows, with line and column in every error."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fastsal.errors import FileFormatError

Record = TypeVar("Record")

# Keys of the metadata of a dataclass field: checks of the value beyond its type.
FRACTION = "fraction"
CHOICES = "choices"


def column(*, fraction: bool = False, choices: tuple[str, ...] = (), optional: bool = False) -> Any:
    """Return a dataclass field that describes a column of a table.

    Args:
        fraction: Whether values must be in [0, 1].
        choices: Valid strings; empty for any.
        optional: Whether the column may be absent, as in tables of other versions.
    """
    metadata = {FRACTION: fraction, CHOICES: choices}
    if optional:
        return dataclasses.field(default=None, metadata=metadata)
    return dataclasses.field(metadata=metadata)


def read_rows(
    path: Path, kind: type[Record], skip: Callable[[dict[str, str]], bool] = lambda _: False
) -> list[Record]:
    """Read a table; columns that are not fields of `kind` are ignored.

    Args:
        path: Path of the CSV file.
        kind: Dataclass with one field per column, of type `str`, `int` or `float`, with `| None`
            if the value may be empty.
        skip: Function of a record that returns whether to ignore it.

    Raises:
        FileFormatError: A column is missing or a value is invalid; the message names the line and
            the column.
    """
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    rows = []
    for line, record in read_records(path, [f.name for f in fields if _required(f)]):
        if not skip(record):
            values = {f.name: _value(f, record.get(f.name, ""), path, line) for f in fields}
            rows.append(kind(**values))
    return rows


def read_records(path: Path, required: list[str]) -> list[tuple[int, dict[str, str]]]:
    """Read the records of a CSV file with a header as `(line number, {column: text})`.

    Raises:
        FileFormatError: A required column is missing, or a row has another number of fields.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            absent = [name for name in required if name not in header]
            if absent:
                raise FileFormatError(f"{path}: column {absent[0]!r} is missing")
            records = []
            for fields in reader:
                if len(fields) != len(header):
                    raise FileFormatError(
                        f"{path}, line {reader.line_num}: must have {len(header)} fields, got "
                        f"{len(fields)}"
                    )
                records.append((reader.line_num, dict(zip(header, fields, strict=True))))
    except (csv.Error, UnicodeDecodeError) as error:
        raise FileFormatError(f"{path}: not a CSV file ({error})") from None
    return records


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING


def _value(field: dataclasses.Field[Any], text: str, path: Path, line: int) -> Any:
    """Convert the text of a field to its type."""
    name = str(field.type)
    where = f"{path}, line {line}: {field.name} must be"
    if text == "" and "None" in name:
        return None
    if name.startswith("str"):
        choices = field.metadata.get(CHOICES)
        if choices and text not in choices:
            raise FileFormatError(f"{where} {' or '.join(choices)}, got {text!r}")
        return text
    whole = name.startswith("int")
    try:
        number = int(text) if whole else float(text)
    except ValueError:
        raise FileFormatError(
            f"{where} {'an integer' if whole else 'a number'}, got {text!r}"
        ) from None
    if not math.isfinite(number):
        if "None" in name:  # an overflowed loss counts as missing
            return None
        raise FileFormatError(f"{where} finite, got {text!r}")
    if field.metadata.get(FRACTION) and not 0 <= number <= 1:
        raise FileFormatError(f"{where} in [0, 1], got {text!r}")
    return number
