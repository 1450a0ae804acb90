"""Threads of the compiled core. PyTorch's own are set by `torch.set_num_threads`."""

from __future__ import annotations

import fastsal._core as _core
from fastsal.errors import InvalidArgument


def set_num_threads(n: int) -> None:
    """Use `n` threads from the next call on; 0 means every processor available.

    Results do not depend on it.

    Raises:
        InvalidArgument: `n` is negative.
    """
    if n < 0:
        raise InvalidArgument(f"n: got {n}; takes 0 or more threads")
    _core.set_num_threads(n)


def get_num_threads() -> int:
    """Return the number of threads that the next call uses."""
    return _core.num_threads()
