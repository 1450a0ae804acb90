"""Threads of the compiled core; those of PyTorch are set by `torch.set_num_threads`."""

from __future__ import annotations

import fastsal._core as _core
from fastsal.utils.numbers import whole


def set_num_threads(n: int) -> None:
    """Set the number of threads of the compiled core.

    Results do not depend on the number of threads.

    Args:
        n: Number of threads from the next call on. 0 is the default: the first of the environment
            variables `FASTSAL_NUM_THREADS`, `RAYON_NUM_THREADS` and `OMP_NUM_THREADS` that is a
            number above zero (`torchrun` sets the last one), otherwise the number of processors
            that this process may use by its affinity and its quota.

    Raises:
        InvalidArgument: `n` is not an integer of at least 0.
    """
    _core.set_num_threads(whole("n", n))


def get_num_threads() -> int:
    """Return the number of threads of the compiled core.

    Fewer run where the system does not start as many; the calling thread then works alone if it
    starts none.
    """
    return _core.num_threads()
