"""Paths as a user gives them."""

from __future__ import annotations

import os
from pathlib import Path


def user_path(path: str | os.PathLike[str]) -> Path:
    """Return a path in which a leading `~` is the home folder, as a shell replaces it.

    What names no home folder, such as `~nobody`, is left as it is.
    """
    return Path(os.path.expanduser(path))
