"""Wall-clock seconds of named steps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Clock:
    """Wall-clock seconds of named steps; the times of steps of one name are added up.

    Attributes:
        seconds: Name of a step to its seconds, in the order of the first use.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End a step that began at the previous lap, or when the clock was made."""
        now = time.perf_counter()
        self._add(name, now - self._last)
        self._last = now

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time the block as one step."""
        start = time.perf_counter()
        yield
        self._add(name, time.perf_counter() - start)

    def rounded(self, digits: int) -> dict[str, float]:
        """Return `seconds`, rounded to so many decimal digits."""
        return {name: round(taken, digits) for name, taken in self.seconds.items()}

    def _add(self, name: str, taken: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + taken
