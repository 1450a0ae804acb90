"""Read TOML files with the line number of each key, for error messages."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastsal.errors import FileFormatError, InvalidArgument

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

Place = tuple[str | int, ...]

_HEADER = re.compile(r"^\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(?:#.*)?$")
_KEY = re.compile(r"""^\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*[A-Za-z0-9_-]+)*)\s*=""")


def read_toml(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[Place, int]]:
    """Read a TOML file.

    Args:
        path: Path of the file.

    Returns:
        Its content, and `{place of a key: line number, from 1}`; a place is a path of keys such as
        `("models", 0, "weights")`. Keys of an inline table have the line of the table.

    Raises:
        InvalidArgument: The file does not exist.
        FileFormatError: The file is not valid TOML; the message names the line.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors of Windows write a byte order mark
    except FileNotFoundError:
        raise InvalidArgument(f"study: {path} does not exist") from None
    except (IsADirectoryError, UnicodeDecodeError) as error:
        raise FileFormatError(f"study: {path} is not a text file ({error})") from None
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise FileFormatError(f"study: {path} is not valid TOML: {error}") from None
    return found, _lines(text)


def line_of(lines: Mapping[Place, int], place: Place) -> int | None:
    """Return the line of a key, or of the innermost table that contains it."""
    for end in range(len(place), 0, -1):
        if place[:end] in lines:
            return lines[place[:end]]
    return None


def _lines(text: str) -> dict[Place, int]:
    """Find the lines of headers and keys, ignoring the content of multi-line strings.

    An error of this heuristic only affects the line number in a message.
    """
    found: dict[Place, int] = {}
    table: Place = ()
    counts: dict[Place, int] = {}
    quotes = ""
    depth = 0
    for number, line in enumerate(text.splitlines(), start=1):
        if not quotes and depth == 0:
            if header := _HEADER.match(line):
                table = _open(header[2], header[1] == "[[", counts)
                found.setdefault(table, number)
                continue
            if key := _KEY.match(line):
                found.setdefault((*table, *_parts(key[1])), number)
        quotes, depth = _state(line, quotes, depth)
    return found


def _open(header: str, is_array: bool, counts: dict[Place, int]) -> Place:
    """Return the place of the table that a header opens; elements of arrays are counted."""
    place: Place = ()
    parts = _parts(header)
    for i, part in enumerate(parts):
        place = (*place, part)
        if is_array and i == len(parts) - 1:
            counts[place] = counts.get(place, -1) + 1
        if place in counts:
            place = (*place, counts[place])
    return place


def _parts(dotted: str) -> list[str]:
    return [part.strip().strip("\"'") for part in dotted.split(".")]


def _state(line: str, quotes: str, depth: int) -> tuple[str, int]:
    """Return the multi-line string delimiter and the bracket depth open after a line."""
    i = 0
    while i < len(line):
        if quotes:
            if line.startswith(quotes, i):
                i, quotes = i + len(quotes), ""
                continue
            i += 2 if line[i] == "\\" and quotes[0] == '"' else 1
            continue
        three = line[i : i + 3]
        if three in ('"""', "'''"):
            quotes, i = three, i + 3
        elif line[i] in "\"'":
            quotes, i = line[i], i + 1
        elif line[i] == "#":
            break
        else:
            depth += line[i] in "[{"
            depth -= line[i] in "]}"
            i += 1
    return (quotes if len(quotes) == 3 else ""), max(depth, 0)
