"""Wait for cells that other processes compute, and say so."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping

POLL = 0.5  # seconds between two looks at the results folder
_LINE_EVERY = 60.0  # seconds between two lines about the same cells
_SHOWN = 3  # cells that a line names


class Waiting:
    """Pauses between looks at the cells of other processes, and lines about them on stderr.

    Args:
        is_shown: Whether lines are written.
    """

    def __init__(self, is_shown: bool) -> None:
        self._is_shown = is_shown
        self._said: frozenset[str] | None = None
        self._at = 0.0

    def on(self, others: Mapping[str, str]) -> None:
        """Wait for a moment.

        Args:
            others: `{key: process}` of the cells that other processes work on.
        """
        now = time.monotonic()
        is_news = self._said is None or not self._said >= others.keys()
        if self._is_shown and others and (is_news or now - self._at >= _LINE_EVERY):
            print(said(others), file=sys.stderr, flush=True)
            self._said, self._at = frozenset(others), now
        time.sleep(POLL)


def said(others: Mapping[str, str]) -> str:
    """Return a line about the cells of other processes."""
    cells = f"{len(others)} cells" if len(others) > 1 else "1 cell"
    named = [f"{key} ({process})" for key, process in list(others.items())[:_SHOWN]]
    more = ", ..." if len(others) > _SHOWN else ""
    return f"waiting for {cells} of other processes: {', '.join(named)}{more}"
