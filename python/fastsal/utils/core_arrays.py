"""Let the core find NumPy before its first call, where Ctrl-C cannot interrupt it.

The core looks up NumPy's C interface, which runs Python code, when it gets its first array. An
interrupt there would be a panic of Rust instead of a `KeyboardInterrupt`. Rooms that pass arrays to
the core import this module.
"""

from __future__ import annotations

import numpy as np

import fastsal._core as _core
from fastsal.utils.interrupts import uninterrupted

with uninterrupted():
    _core.count_keys(np.zeros(1, np.float32))
