"""Diagonals of inverse blocks, with a bound of their relative error.

Axes: d weights of a parameter.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

import fastsal._core as _core
from fastsal.errors import FactorizationError
from fastsal.fisher.model_sums import ModelSums
from fastsal.fisher.parts import flat_mask


@dataclass(frozen=True)
class InverseDiagonal:
    """`diag(A⁻¹)` of one parameter.

    Attributes:
        values: `[d]` float64.
        failed: Blocks that are not positive definite in double precision; their `values` are NaN.
        errors: `[n_blocks]` bound of the relative error of `values` in each block.
    """

    values: NDArray[np.float64]
    failed: list[int]
    errors: NDArray[np.float64]


def inverse_diagonals(
    sums: ModelSums, damping: float, kept: Mapping[str, Tensor] | None
) -> dict[str, InverseDiagonal]:
    """Compute `diag((F_b + λI)⁻¹)` of every parameter; see `BlockFisher.inverse_diagonals`.

    Args:
        sums: Sums of at least one sample.
        damping: `λ`.
        kept: Name to mask, True = takes part; None for all.
    """
    result: dict[str, InverseDiagonal] = {}
    primal: list[str] = []
    for name, p in sums.parameters.items():
        if p.packed is not None:
            primal.append(name)
            continue
        rows = p.gradients()
        values, failed, sensitivity = _core.dual_inverse_diagonal(
            rows,
            sums.precision,
            p.block_size,
            sums.samples,
            flat_mask(kept, name),
            damping,
        )
        result[name] = InverseDiagonal(values, failed, sensitivity * (len(rows) * 2.0**-53))
    if primal:
        longest = max(sums.parameters[n].d for n in primal)
        size = min(sums.block_size or longest, longest)
        given = [sums.for_core(sums.parameters[n], flat_mask(kept, n)) for n in primal]
        inverses = _core.inverse_diagonal(given, size, damping)
        for name, (values, failed, sensitivity) in zip(primal, inverses, strict=True):
            result[name] = InverseDiagonal(values, failed, error_bound(sums, name, sensitivity))
    return {name: result[name] for name in sums.parameters}


def error_bound(
    sums: ModelSums, name: str, sensitivity: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Bound the relative error of a parameter's inverses (see `BlockFisher.inverse_diagonals`).

    Args:
        sums: The sums of the parameter.
        name: The parameter.
        sensitivity: `max_i F_ii ‖A⁻¹‖` of each block.
    """
    double = sums.parameters[name].block_size * 2.0**-53
    return sensitivity * (rounding(sums) + double)


def rounding(sums: ModelSums) -> float:
    """Bound the relative error of sums: `ε` of `BlockFisher.inverse_diagonals`."""
    unit = 2.0**-24 if sums.precision == "float32" else 2.0**-53
    summed = unit * (math.sqrt(_core.ROWS_PER_STEP) + math.sqrt(sums.steps))
    return summed + sums.stored_error


def raise_failed(name: str, failed: list[int], damping: float) -> None:
    """Raise FactorizationError if blocks of a parameter failed.

    Args:
        name: The parameter.
        failed: Its blocks that are not positive definite.
        damping: `λ`.
    """
    if failed:
        some = ", ".join(map(str, failed[:5])) + (", ..." if len(failed) > 5 else "")
        raise FactorizationError(
            f"damping must be larger, got λ = {damping:g}: {len(failed)} blocks of {name!r} "
            f"({some}) are not positive definite (if gradients are near the float32 range, collect "
            "with precision='float64')"
        )
