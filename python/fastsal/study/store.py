"""Results folder of a study: its identity, and the result of each finished cell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastsal.errors import FileFormatError, InvalidArgument
from fastsal.study.folder_format import FORMAT, STUDY_FILE
from fastsal.utils.atomic import check_writable, write_new
from fastsal.utils.claims import Claims
from fastsal.utils.digests import Digest
from fastsal.utils.json_files import plain, read_json, to_json, write_json
from fastsal.utils.suggestions import listed


class Store:
    """A folder with one file per cell, written atomically so that a run can stop at any time.

    Args:
        folder: Results folder; created if it does not exist.
        identity: Settings that every cell depends on; a folder has one identity.

    Raises:
        InvalidArgument: The folder is a file, holds other files, or the results of a study with
            other settings; the message names those that differ.
        FileFormatError: `study.json` is damaged, or has another format.
        OSError: The folder cannot be written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self.cells = folder / "cells"
        self.heads = folder / "heads"
        if not check_store(folder, identity):
            folder.mkdir(parents=True, exist_ok=True)
            text = to_json({"format": FORMAT, "identity": identity}, indent=1) + "\n"
            if not write_new(folder / STUDY_FILE, text):
                check_store(folder, identity)
        self.cells.mkdir(parents=True, exist_ok=True)

    def claims(self) -> Claims:
        """Return the claims of this process on cells, for a `with` block."""
        return Claims(self.cells)

    def keys(self) -> set[str]:
        """Return the keys of the cells that have a result."""
        return {path.stem for path in self.cells.glob("[!.]*.json")}

    def read(self, key: str) -> dict[str, Any] | None:
        """Return the result of a cell; None if it is not finished, or its file is damaged."""
        try:
            found = read_json(self.cells / f"{key}.json")
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) and found.get("key") == key else None

    def write(self, key: str, result: Mapping[str, Any]) -> dict[str, Any]:
        """Store the result of a cell atomically, and return it as `read` does."""
        found: dict[str, Any] = plain({**result, "key": key})
        self._write(f"cells/{key}.json", found)
        return found

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Rewrite `study.json` with facts about the study beside its identity."""
        identity = _identity(self.folder)
        self._write(STUDY_FILE, {"format": FORMAT, **facts, "identity": identity})

    def describes(self, results: str) -> bool:
        """Whether the tables are those of the results with this digest, see `digest_of_results`."""
        found = _study(self.folder)
        return found is not None and found.get("results") == results

    def _write(self, name: str, value: Mapping[str, Any]) -> None:
        write_json(self.folder / name, value)


def check_store(folder: Path, identity: Mapping[str, Any]) -> bool:
    """Check that a folder can be the results folder of a study; return whether it is one already.

    Raises:
        InvalidArgument: As `Store`, or the folder cannot be written.
        FileFormatError: `study.json` is damaged, or has another format.
    """
    if folder.exists() and not folder.is_dir():
        raise InvalidArgument(f"out must be a folder, got the file {folder}")
    known = _identity(folder)
    if known is None and folder.is_dir() and _others(folder):
        # Of several processes that start at once another one may have been faster.
        known = _identity(folder)
        if known is None:
            raise InvalidArgument(
                "out must be an empty folder or the results folder of this study, got "
                f"{folder} with other files"
            )
    differing = [] if known is None else differences(known, plain(identity))
    if differing:
        raise InvalidArgument(
            f"out: {folder} holds the results of another study (different settings: "
            f"{listed(differing, 4)}); use another folder or the same settings. Models, "
            "sources, criteria, rounds, sparsities and seeds may be added"
        )
    check_writable(folder, "out")
    return known is not None


def _identity(folder: Path) -> dict[str, Any] | None:
    found = _study(folder)
    if found is None:
        return None
    identity: dict[str, Any] = found["identity"]
    return identity


def _study(folder: Path) -> dict[str, Any] | None:
    """Return the content of `study.json`; None if there is none."""
    path = folder / STUDY_FILE
    try:
        found: dict[str, Any] = read_json(path, "out")
        if found["format"] != FORMAT:
            raise FileFormatError(f"out: format of {path} must be {FORMAT}, got {found['format']}")
        found["identity"]  # it must be there
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, FileFormatError):
            raise
        raise FileFormatError(f"out: {path} is damaged ({error})") from None
    return found


def _others(folder: Path) -> bool:
    """Whether a folder has files besides those of a process that is creating `study.json`."""
    return any(not path.name.startswith(".study.") for path in folder.iterdir())


def digest_of_results(results: Mapping[str, Mapping[str, Any] | None]) -> str:
    """Return a digest of the results of cells, `{key: result}`."""
    return Digest().json(plain(results)).hexdigest()[:16]


def differences(known: Any, asked: Any, name: str = "") -> list[str]:
    """Return the paths at which two trees of plain values differ."""
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
