"""Locks of open files, which the system releases when the process ends in any way."""

from __future__ import annotations

import os
import sys

_FAR = 1 << 30  # a position beyond the content, which remains readable for others on Windows


def lock(place: int) -> bool | None:
    """Lock an open file for this process.

    Args:
        place: File descriptor, open for writing.

    Returns:
        Whether this process has the lock; None on a file system without locks.
    """
    return _lock(place, shared=False)


def is_locked(place: int) -> bool | None:
    """Whether another process, or another open file of this one, holds the lock of a file.

    Args:
        place: File descriptor, open for reading.

    Returns:
        None on a file system without locks. False may also mean that the locks of this file system
        do not cross machines.
    """
    found = _lock(place, shared=True)
    if found is None:
        return None
    if found:
        _unlock(place)
    return not found


if sys.platform == "win32":
    import msvcrt

    def _lock(place: int, *, shared: bool) -> bool | None:  # noqa: ARG001 - there is one kind
        before = os.lseek(place, 0, os.SEEK_CUR)
        os.lseek(place, _FAR, os.SEEK_SET)
        try:
            msvcrt.locking(place, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(place, before, os.SEEK_SET)
        return True

    def _unlock(place: int) -> None:
        before = os.lseek(place, 0, os.SEEK_CUR)
        os.lseek(place, _FAR, os.SEEK_SET)
        msvcrt.locking(place, msvcrt.LK_UNLCK, 1)
        os.lseek(place, before, os.SEEK_SET)

else:
    import fcntl

    def _lock(place: int, *, shared: bool) -> bool | None:
        try:
            fcntl.flock(place, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return None
        return True

    def _unlock(place: int) -> None:
        fcntl.flock(place, fcntl.LOCK_UN)
