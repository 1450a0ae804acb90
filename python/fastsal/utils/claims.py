"""Claims on names in a folder, so that processes and machines share work: each name to one of them.

A claim is a file that is created exclusively, which any shared file system supports, and that has
the token of the presence of its process. If that process is gone, the next claim on the name has
the next number. A file of a claim is removed only once the work is stored. Numbers therefore only
rise until then, and of several processes that find the same process gone, one creates the next.

Who has claimed a name must look once more whether its work is stored: it may have been stored, and
its claim removed, after the last look. Files of claims lie in the folder of the results, so that
creating one also brings the view of this folder up to date on network file systems.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from fastsal.utils.atomic import write_new, write_text
from fastsal.utils.presence import SILENCE, Presence, Watch, path_of, tokens_in

_FILE = re.compile(r"\.(.+)\.(\d+)\.claim")


@dataclass(frozen=True)
class Claim:
    """The last claim on a name.

    Attributes:
        number: Its number, from 1; that of a name whose processes were killed rises.
        owner: Token of its process; "" if it was released.
        is_held: Whether its process is there.
    """

    number: int
    owner: str
    is_held: bool


class Claims:
    """Claims of this process on names in a folder, beside those of other processes.

    Use it in a `with` block; at the end unfinished claims are released.

    Args:
        folder: Existing folder, also on a file system that machines share.
        clock: Seconds of a clock that only advances.

    Raises:
        OSError: The folder cannot be written.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._presence = Presence(folder)
        self._watch = Watch(folder, clock)
        self._mine: dict[str, int] = {}

    def __enter__(self) -> Claims:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            for name in list(self._mine):
                with contextlib.suppress(OSError):
                    self.release(name)
        finally:
            self._presence.close()

    def all(self) -> dict[str, Claim]:
        """Return the last claim on each name that has one."""
        numbers = self._numbers()
        found = {name: self._claim(name, number) for name, number in numbers.items()}
        return {name: claim for name, claim in found.items() if claim is not None}

    def take(self, name: str) -> bool:
        """Claim a name; False if another process has it, or has just finished or taken it.

        After True the caller must look again whether the work is stored, and then call `finish`.
        """
        number = self._numbers().get(name, 0)
        if number:
            last = self._claim(name, number)
            if last is None or last.is_held:
                return False
        if not write_new(self._path(name, number + 1), self._text(self._presence.token)):
            return False
        self._mine[name] = number + 1
        return True

    def is_mine(self, name: str) -> bool:
        """Whether this process still has a claim that it took.

        It has lost it if it did not run for a long time and another process took its place.
        """
        number = self._mine.get(name)
        if number is None or self._numbers().get(name) != number:
            return False
        return self._owner(name, number) == self._presence.token

    def finish(self, name: str) -> None:
        """Remove the claim on a name whose work is stored."""
        if self.is_mine(name):
            for number in range(1, self._mine[name] + 1):
                self._path(name, number).unlink(missing_ok=True)
        self._mine.pop(name, None)

    def release(self, name: str) -> None:
        """Give up the claim on a name whose work is not stored, so that any process can take it."""
        if self.is_mine(name):
            write_text(self._path(name, self._mine[name]), self._text(""))
        self._mine.pop(name, None)

    def describe(self, claim: Claim) -> str:
        """Return who holds a claim, for a message."""
        return self._watch.described(claim.owner)

    def clear(self, names: Collection[str]) -> None:
        """Remove what killed processes left: presences, and claims on names with stored work."""
        for path in self._folder.glob(".*.claim"):
            match = _FILE.fullmatch(path.name)
            if match and match[1] in names and match[1] not in self._mine:
                path.unlink(missing_ok=True)
        for token in tokens_in(self._folder):
            if token != self._presence.token and not self._watch.is_alive(token):
                path_of(self._folder, token).unlink(missing_ok=True)

    def _numbers(self) -> dict[str, int]:
        """Return the highest number of each name."""
        found: dict[str, int] = {}
        for path in self._folder.glob(".*.claim"):
            if match := _FILE.fullmatch(path.name):
                found[match[1]] = max(found.get(match[1], 0), int(match[2]))
        return found

    def _claim(self, name: str, number: int) -> Claim | None:
        """Return a claim; None if it was removed meanwhile, as its work is stored."""
        owner = self._owner(name, number)
        if owner is None:
            return None
        if owner == "?":
            is_held = self._watch.silent(f"{name}.{number}", b"") < SILENCE
        else:
            is_held = owner == self._presence.token or (owner != "" and self._watch.is_alive(owner))
        return Claim(number, owner, is_held)

    def _owner(self, name: str, number: int) -> str | None:
        """Return the token in a claim; None if there is no file, "?" if it is not written yet."""
        try:
            return str(json.loads(self._path(name, number).read_bytes())["worker"])
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, LookupError):
            return "?"

    def _path(self, name: str, number: int) -> Path:
        return self._folder / f".{name}.{number}.claim"

    @staticmethod
    def _text(token: str) -> str:
        return json.dumps({"worker": token})
