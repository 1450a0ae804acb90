"""Files that appear whole or not at all: written beside their place, then moved into it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path in the folder of `path`; move it to `path` if the block succeeds.

    Args:
        path: the file to write; missing parent folders are made.

    Yields:
        The path to write to. It has the suffix of `path`.

    Raises:
        OSError: the folder cannot be written, or the disk is full; names `path`, which keeps what
            it held.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.stem}.{os.getpid()}.part{target.suffix}")
    try:
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        if error.filename not in (None, str(temporary)) or not error.errno:
            raise
        # The name of the temporary file, or none, would say nothing to a reader.
        raise OSError(error.errno, os.strerror(error.errno), str(target)) from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
