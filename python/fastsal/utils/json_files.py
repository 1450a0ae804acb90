"""Strict JSON: texts and files that any parser reads."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastsal.errors import FileFormatError
from fastsal.utils.atomic import write_text


def to_json(value: Any, indent: int | None = None) -> str:
    """Return a value as strict JSON, see `plain`."""
    return json.dumps(plain(value), indent=indent, allow_nan=False)


def write_json(path: str | os.PathLike[str], value: Any, indent: int | None = 1) -> None:
    """Write a value as a JSON file, see `plain`. The file appears whole or not at all."""
    write_text(path, to_json(value, indent) + "\n")


def read_json(path: str | os.PathLike[str], argument: str = "path") -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        argument: Name of the argument that led to the file, for the message.

    Raises:
        FileNotFoundError: There is no such file.
        FileFormatError: The file is not JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileFormatError(
            f"{argument}: {os.fspath(path)} is not valid JSON ({error})"
        ) from None


def plain(value: Any) -> Any:
    """Return a value as JSON has it.

    Mappings, lists and tuples are converted recursively, NumPy and PyTorch scalars become Python
    numbers, NaN and infinity become None, and any other object becomes its `str`.
    """
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if callable(getattr(value, "item", None)) and getattr(value, "ndim", 0) == 0:
        return plain(value.item())
    return str(value)
