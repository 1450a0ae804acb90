"""Warnings with the location of the calling code outside of fastsal."""

from __future__ import annotations

import sys
import warnings
from types import FrameType


def warn_user(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning whose location is the innermost frame outside of fastsal."""
    level = 1
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] == "fastsal":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)
