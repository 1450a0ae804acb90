"""Warnings with the location of the calling code outside of fastsal."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from types import FrameType

_silenced: ContextVar[tuple[type[Warning], ...]] = ContextVar("silenced", default=())


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning whose location is the innermost frame outside of fastsal."""
    if issubclass(category, _silenced.get()):
        return
    level = 1
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] == "fastsal":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


@contextlib.contextmanager
def without_warnings(category: type[Warning]) -> Iterator[None]:
    """Drop warnings of a category that `warn_user` issues in the block, in this thread only.

    `warnings.catch_warnings` would change the filters of the whole process.
    """
    token = _silenced.set((*_silenced.get(), category))
    try:
        yield
    finally:
        _silenced.reset(token)
