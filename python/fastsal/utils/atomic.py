"""Atomic writes: a file is written under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`, and rename it if the block succeeds.

    Args:
        path: The file to write; missing parent folders are created.

    Yields:
        The path to write to, with the suffix of `path`.

    Raises:
        OSError: The folder is not writable, or the disk is full. The error names `path`, and an
            existing file is not changed.
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
        # Name the file of the caller instead of the temporary one.
        raise OSError(error.errno, os.strerror(error.errno), str(target)) from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` as UTF-8 to `path`, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
