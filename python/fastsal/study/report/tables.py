"""CSV files into typed rows, with the line and the column in every complaint."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fastsal.errors import FileFormatError

Row = TypeVar("Row")

# Of a dataclass field: how a value is checked, beyond its type.
SHARE = "share"
CHOICES = "choices"


def column(*, share: bool = False, choices: tuple[str, ...] = (), optional: bool = False) -> Any:
    """Describe a column of a table as the field of a dataclass.

    Args:
        share: the number lies between 0 and 1.
        choices: the texts that are taken.
        optional: the column may be absent, as it is in tables of other versions.
    """
    metadata = {SHARE: share, CHOICES: choices}
    if optional:
        return dataclasses.field(default=None, metadata=metadata)
    return dataclasses.field(metadata=metadata)


def read_rows(
    path: Path, kind: type[Row], skip: Callable[[dict[str, str]], bool] = lambda _: False
) -> list[Row]:
    """Read a table; columns that `kind` does not name are passed over.

    Args:
        path: the CSV file.
        kind: a dataclass, one field a column; its types are `str`, `int`, `float`, with `| None`
            where an empty field is taken.
        skip: rows to leave out.

    Raises:
        FileFormatError: it is no such table; names the line and the column.
    """
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    rows = []
    for line, record in read_records(path, [f.name for f in fields if _required(f)]):
        if not skip(record):
            values = {f.name: _value(f, record.get(f.name, ""), path, line) for f in fields}
            rows.append(kind(**values))
    return rows


def read_records(path: Path, required: list[str]) -> list[tuple[int, dict[str, str]]]:
    """Read `(line, {column: text})` of a CSV file with a header.

    Raises:
        FileFormatError: a required column is absent, or a row has another number of fields.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            absent = [name for name in required if name not in header]
            if absent:
                raise FileFormatError(f"{path}: lacks the column {absent[0]!r}")
            records = []
            for fields in reader:
                if len(fields) != len(header):
                    raise FileFormatError(
                        f"{path}, line {reader.line_num}: {len(fields)} fields; takes {len(header)}"
                    )
                records.append((reader.line_num, dict(zip(header, fields, strict=True))))
    except (csv.Error, UnicodeDecodeError) as error:
        raise FileFormatError(f"{path}: is no CSV file ({error})") from None
    return records


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING


def _value(field: dataclasses.Field[Any], text: str, path: Path, line: int) -> Any:
    """Turn one field of the file into a value of the field's type."""
    name = str(field.type)
    where = f"{path}, line {line}, {field.name}: got {text!r}"
    if text == "" and "None" in name:
        return None
    if name.startswith("str"):
        choices = field.metadata.get(CHOICES)
        if choices and text not in choices:
            raise FileFormatError(f"{where}; takes {' or '.join(choices)}")
        return text
    whole = name.startswith("int")
    try:
        number = int(text) if whole else float(text)
    except ValueError:
        raise FileFormatError(f"{where}; takes a {'whole ' if whole else ''}number") from None
    if not math.isfinite(number):
        if "None" in name:  # a loss that overflowed: as good as missing
            return None
        raise FileFormatError(f"{where}; takes a finite number")
    if field.metadata.get(SHARE) and not 0 <= number <= 1:
        raise FileFormatError(f"{where}; takes 0 to 1")
    return number
