"""Hooks of modules for the length of a block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Protocol

from fastsal.utils.interrupts import uninterrupted


class Handle(Protocol):
    """What PyTorch returns for a hook."""

    def remove(self) -> None:
        """Remove the hook."""


@contextlib.contextmanager
def hooked(handles: Iterable[Handle]) -> Iterator[None]:
    """Register hooks for the block and remove them at its end; Ctrl-C leaves none behind.

    Args:
        handles: A generator that registers a hook for each handle that it yields.
    """
    made: list[Handle] = []
    try:
        with uninterrupted():
            made.extend(handles)
        yield
    finally:
        with uninterrupted():
            for handle in made:
                handle.remove()
