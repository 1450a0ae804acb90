"""The folder of a study's results: which study it is of, and each cell as soon as it is done."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastsal.errors import FileFormatError, InvalidArgument
from fastsal.utils.atomic import write_text

FORMAT = 1
IDENTITY = "study.json"


class Store:
    """Cells in files of their own, each whole or absent, so that a run may end at any moment.

    Args:
        folder: of the results; made if it is not there.
        identity: what every cell depends on; the folder is of one identity only.

    Raises:
        InvalidArgument: the folder is a file, holds something else, or the results of a study with
            other settings; says which differ.
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.cells = folder / "cells"
        self.heads = folder / "heads"
        if folder.exists() and not folder.is_dir():
            raise InvalidArgument(f"out: {folder} is a file; takes a folder")
        known = self._identity()
        if known is None and folder.is_dir() and any(folder.iterdir()):
            raise InvalidArgument(
                f"out: {folder} holds something, but no results of a study; takes a new folder, or "
                "that of the same study"
            )
        if known is not None:
            differing = differences(known, _json(identity))
            if differing:
                raise InvalidArgument(
                    f"out: {folder} holds the results of another study (it differs in "
                    f"{', '.join(differing[:4])}{', ...' if len(differing) > 4 else ''}); takes "
                    "another folder, or the study as it was; models, sources, criteria, rounds, "
                    "sparsities and seeds may be added"
                )
        else:
            self._write(IDENTITY, {"format": FORMAT, "identity": identity})
        self.cells.mkdir(parents=True, exist_ok=True)

    def read(self, key: str) -> dict[str, Any] | None:
        """Return what a cell came to; None if it is not done, or its file is damaged."""
        try:
            found = json.loads((self.cells / f"{key}.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) and found.get("key") == key else None

    def write(self, key: str, result: Mapping[str, Any]) -> None:
        """Keep what a cell came to, whole or not at all."""
        self._write(f"cells/{key}.json", {**result, "key": key})

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Write `study.json` anew, with more about the study than what it is known by."""
        identity = self._identity()
        self._write(IDENTITY, {"format": FORMAT, **facts, "identity": identity})

    def _identity(self) -> dict[str, Any] | None:
        path = self.folder / IDENTITY
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["format"] != FORMAT:
                raise FileFormatError(f"out: {path} has format {found['format']}; takes {FORMAT}")
            identity: dict[str, Any] = found["identity"]
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, FileFormatError):
                raise
            raise FileFormatError(f"out: {path} is damaged ({error})") from None
        return identity

    def _write(self, name: str, value: Mapping[str, Any]) -> None:
        text = json.dumps(_json(value), indent=1, allow_nan=False)
        write_text(self.folder / name, text + "\n")


def differences(known: Any, asked: Any, name: str = "") -> list[str]:
    """Name the settings in which two trees of plain values differ."""
    if isinstance(known, Mapping) and isinstance(asked, Mapping):
        found = []
        for key in sorted({*known, *asked}):
            inner = f"{name}.{key}".lstrip(".")
            found += differences(known.get(key), asked.get(key), inner)
        return found
    if isinstance(known, list) and isinstance(asked, list) and len(known) == len(asked):
        pairs = enumerate(zip(known, asked, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{name}[{i}]")]
    return [] if known == asked else [name or "study"]


def _json(value: Any) -> Any:
    """Plain JSON values; NaN and infinity, which JSON lacks, become None."""
    if isinstance(value, Mapping):
        return {str(k): _json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
