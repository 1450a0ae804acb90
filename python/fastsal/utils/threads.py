"""Threads of the compiled core; those of PyTorch are set by `torch.set_num_threads`."""

from __future__ import annotations

import fastsal._core as _core
from fastsal.utils.numbers import whole


def set_num_threads(n: int) -> None:
    """Set the number of threads of the compiled core.

    Results do not depend on the number of threads.

    Args:
        n: Number of threads from the next call on; 0 for all available processors.

    Raises:
        InvalidArgument: `n` is not an integer of at least 0.
    """
    _core.set_num_threads(whole("n", n))


def get_num_threads() -> int:
    """Return the number of threads of the compiled core."""
    return _core.num_threads()
