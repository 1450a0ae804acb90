"""Presence of a process in a folder that processes and machines share.

A process shows its presence by a file that it locks and rewrites every few seconds with a higher
number, its heartbeat. Another process tells by these two that it is gone:

- The system releases the lock when a process ends in any way. On the same machine and file system a
  file that is not locked is therefore that of a process that is gone, at once.
- Locks may not cross machines. There the heartbeat counts: a process is gone if its number has not
  changed while the observer looked for `SILENCE` seconds. Only the observer's own clock is used, so
  that clocks of machines may differ, and only time in which it looked counts, so that a machine
  that slept for hours does not take the others for gone.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import secrets
import threading
import time
import uuid
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastsal.utils.locks import is_locked, lock

BEAT = 5.0  # seconds between two heartbeats
SILENCE = 120.0  # seconds without a heartbeat after which a process on another machine is gone
_LONGEST_GAP = 10.0  # seconds between two looks that count at most
_SUFFIX = ".worker"


class Presence:
    """Presence of this process in a folder, until it is closed or the process ends.

    Args:
        folder: Existing folder.

    Attributes:
        token: Name of this presence, unique among processes and machines.

    Raises:
        OSError: The folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.token = secrets.token_hex(8)
        self._pid = os.getpid()
        self._path = path_of(folder, self.token)
        self._beats = 0
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        self._place: int | None = os.open(self._path, flags, 0o644)
        _open.add(self)
        try:
            lock(self._place)  # before any other process can know the token
            self.beat()
        except BaseException as error:
            self.leave()
            self._path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise OSError(error.errno, error.strerror, str(folder)) from None
            raise
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="fastsal presence", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """Write the next heartbeat."""
        assert self._place is not None
        facts = {
            "beat": f"{self._beats:09d}",
            "pid": self._pid,
            "host": platform.node(),
            "kernel": kernel(),
            "device": os.fstat(self._place).st_dev,
        }
        self._beats += 1
        os.lseek(self._place, 0, os.SEEK_SET)
        os.write(self._place, json.dumps(facts).encode())
        os.fsync(self._place)

    def close(self) -> None:
        """Remove the file; not in a process that was forked from the one that made it."""
        if self._place is None or os.getpid() != self._pid:
            return
        self._stopped.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            self._path.unlink()
        self.leave()

    def leave(self) -> None:
        """Close the file, which releases the lock if this process is the only one that has it."""
        if self._place is not None:
            os.close(self._place)
            self._place = None

    def _keep(self) -> None:
        while not self._stopped.wait(BEAT):
            with contextlib.suppress(OSError):  # a full disk may be mended before others give up
                self.beat()


_open: weakref.WeakSet[Presence] = weakref.WeakSet()


def _left_by_child() -> None:
    """Close the files in a forked child, which would hold the locks of a parent that is killed."""
    for presence in list(_open):
        presence.leave()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_left_by_child)


@dataclass
class _Seen:
    content: bytes
    at: float
    silent: float = 0.0


class Watch:
    """Observation of the presence of other processes in a folder.

    Args:
        folder: The folder.
        clock: Seconds of a clock that only advances.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._clock = clock
        self._seen: dict[str, _Seen] = {}

    def is_alive(self, token: str) -> bool:
        """Whether the process with a token is there, as far as this process can tell."""
        try:
            file = open(path_of(self._folder, token), "rb")  # noqa: SIM115 - closed below
        except FileNotFoundError:
            return False  # it has left
        with file:
            held = is_locked(file.fileno())
            content = file.read()
            device = os.fstat(file.fileno()).st_dev
        silent = self.silent(token, content)
        if held:
            return True
        facts = _facts(content)
        # The lock says the truth only within one kernel and one mounted file system.
        is_here = facts.get("kernel") == kernel() and facts.get("device") == device
        if held is not None and is_here:
            return False
        return silent < SILENCE

    def silent(self, name: str, content: bytes) -> float:
        """Return for how many seconds of observation a content has not changed."""
        now = self._clock()
        seen = self._seen.get(name)
        if seen is None or seen.content != content:
            self._seen[name] = _Seen(content, now)
            return 0.0
        seen.silent += min(now - seen.at, _LONGEST_GAP)
        seen.at = now
        return seen.silent

    def described(self, token: str) -> str:
        """Return what is known about a process, for a message."""
        try:
            facts = _facts(path_of(self._folder, token).read_bytes())
        except OSError:
            facts = {}
        if not facts:
            return "an unknown process"
        text = f"process {facts.get('pid')} on {facts.get('host')}"
        seen = self._seen.get(token)
        if seen is not None and seen.silent > 3 * BEAT:
            text += f", no sign of life for {seen.silent:.0f} s"
        return text


def path_of(folder: Path, token: str) -> Path:
    """Return the file of a presence."""
    return folder / f".{token}{_SUFFIX}"


def tokens_in(folder: Path) -> list[str]:
    """Return the tokens of all presences in a folder, also of processes that are gone."""
    return [p.name[1 : -len(_SUFFIX)] for p in folder.glob(f".*{_SUFFIX}")]


@functools.cache
def kernel() -> str:
    """Return a name of the running kernel; containers of one kernel have the same."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return f"{platform.node()} {uuid.getnode():x}"


def _facts(content: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(content))
    except (ValueError, TypeError):
        return {}
