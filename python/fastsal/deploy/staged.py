"""Files that appear beside each other once all of them are whole."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Yield `path` in a temporary folder, whose files are moved beside `path` without an error.

    Files or folders of the same names are replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        yield Path(folder) / path.name
        for part in sorted(Path(folder).iterdir()):
            target = path.parent / part.name
            if target.is_dir() and part.is_dir():  # which would be moved into it
                os.replace(target, Path(folder) / f"{part.name}.old")
            os.replace(part, target)


def bytes_beside(path: Path) -> int:
    """Return the size of all files in the folder of a staged path."""
    return sum(part.stat().st_size for part in path.parent.iterdir())
