"""Names in messages: the closest match to a misspelled one, and short lists."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

_NAMED = 5  # keys that a message names before it counts the rest


def _few(names: Sequence[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _close(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return f" (close to {name!r}: {', '.join(near)})" if near else ""
