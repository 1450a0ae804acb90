"""A lock on a folder, so that two processes do not write to it at the same time."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastsal.errors import InvalidArgument

LOCK_FILE = ".fastsal.lock"
_FAR = 1 << 30  # a position beyond the content


@contextlib.contextmanager
def locked(folder: Path, argument: str = "out") -> Iterator[None]:
    """Hold the lock of an existing folder for the block.

    The system releases the lock when the process ends in any way, so that the file of a killed
    process does not count. On file systems without locks, the process that the file names is
    looked up: on this machine it must be alive to count.

    Args:
        folder: Existing folder; a file in it holds the lock and is removed at the end.
        argument: Name of the argument that gave the folder, for the message.

    Raises:
        InvalidArgument: Another process, or another thread, holds the lock.
    """
    path = folder / LOCK_FILE
    place = _acquired(path)
    if place is None:
        raise InvalidArgument(
            f"{argument}: {folder} is in use by another run{_owner(path)}; wait for its end, or "
            "use another folder"
        )
    try:
        os.truncate(place, 0)
        os.write(place, json.dumps({"pid": os.getpid(), "host": platform.node()}).encode())
        yield
    finally:
        # Removed before it is released: whoever waits for it then sees that it is gone.
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(place)


def _acquired(path: Path) -> int | None:
    """Return the open lock file, or None if another process holds it."""
    while True:
        place = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            is_mine = _lock(place, path)
        except BaseException:
            os.close(place)
            raise
        if not is_mine:
            os.close(place)
            return None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(place), os.stat(path)):
                return place
        os.close(place)  # it was removed by the run that held it


def _lock(place: int, path: Path) -> bool:
    """Lock an open file; False if another process holds it."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(place, _FAR, os.SEEK_SET)  # the content remains readable for others
        try:
            msvcrt.locking(place, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        os.lseek(place, 0, os.SEEK_SET)
        return True
    import fcntl

    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return not _is_held(path)
    return True


def _is_held(path: Path) -> bool:
    """Whether the process that a lock file names may still be running."""
    owner = _read(path)
    if not owner:
        return False
    if owner.get("host") != platform.node():
        return True
    try:
        os.kill(int(owner["pid"]), 0)
    except ProcessLookupError:
        return False
    except (OSError, KeyError, ValueError, TypeError):
        return True
    return True


def _owner(path: Path) -> str:
    """Return what a lock file says about its process, for a message."""
    owner = _read(path)
    return f" (process {owner.get('pid')} on {owner.get('host')})" if owner else ""


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}
