"""Storage of sums: in memory, in a scratch file, or in the mapped files that were loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from fastsal.utils.mapped_files import FileArrays, forget

# Sums worked on at a time; what is computed from them takes about as much memory again.
VIEW_BYTES = 2**28


@dataclass
class Storage:
    """Memory or files that hold sums.

    Attributes:
        scratch: The unlinked scratch file that holds the sums, or None.
        mapped: Arrays that are read from mapped files on use, one for each file.
        view_bytes: Bytes of packed sums to work on at a time.
    """

    scratch: FileArrays | None = None
    mapped: Sequence[NDArray[Any]] = field(default_factory=list)
    view_bytes: int = VIEW_BYTES

    def release(self) -> None:
        """Release cached pages of files; they are read again on use."""
        if self.scratch is not None:
            self.scratch.release()
        if self.mapped:
            forget(self.mapped)
