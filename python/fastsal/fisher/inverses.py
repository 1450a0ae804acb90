"""Diagonals of inverse blocks, with a bound of their error."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fastsal.errors import InvalidArgument


@dataclass(frozen=True)
class InverseDiagonal:
    """`diag(A⁻¹)` of one parameter.

    Attributes:
        values: `[d]` float64.
        failed: Blocks that are not positive definite in double precision; NaN in `values`.
        errors: `[n_blocks]` bound of the relative error of `values` in each block.
    """

    values: NDArray[np.float64]
    failed: list[int]
    errors: NDArray[np.float64]


def check_damping(damping: float) -> None:
    """Raise InvalidArgument unless `damping` is a finite number above zero."""
    is_number = isinstance(damping, (int, float)) and not isinstance(damping, bool)
    if not (is_number and damping > 0 and math.isfinite(damping)):
        raise InvalidArgument(f"damping: got {damping!r}; takes a finite number above zero")
