"""Checks of what users give to `BlockFisher`."""

from __future__ import annotations

from collections.abc import Iterable


def _listed(names: Iterable[str], most: int = 5) -> str:
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(repr(n) for n in names[:most]) + more
