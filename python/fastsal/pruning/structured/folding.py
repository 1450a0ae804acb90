"""The exact fold of removed units into the kept columns of the layer that consumes them.

Over `W_K` and the bias `b` the mean squared error `E‖W_K h_K + b - (W h + b_0)‖²`, with a damping λ
on the change of `W_K`, is least for `W_K + W_P A_PK (A_KK + λI)⁻¹`, where `A` is the covariance of
the inputs `h`, and for the bias that keeps the mean output. A layer without a bias has the second
moment in place of the covariance.

Axes: O outputs, D inputs; K kept and P removed columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastsal.pruning.structured.activations import Moments
from fastsal.pruning.structured.elimination import eliminate

# A λ for inputs that are all zero.
_LEAST = 1e-30


@dataclass(frozen=True)
class Damped:
    """The matrix `A + λI` of a layer.

    Attributes:
        matrix: `[D, D]`, float64.
        mean: Mean input `[D]`; None without a bias, which it would go to.
    """

    matrix: Tensor
    mean: Tensor | None

    @classmethod
    def of(cls, moments: Moments, damping: float, *, has_bias: bool) -> Damped:
        """Return the matrix of a layer, for `λ = damping · mean_j A_jj`."""
        matrix = moments.covariance() if has_bias else moments.second_moment()
        diagonal = matrix.diagonal()
        diagonal += max(damping * float(diagonal.mean()), _LEAST)
        return cls(matrix, moments.mean if has_bias else None)


def fold(weight: Tensor, damped: Damped, kept: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return a weight whose kept columns make up for the removed ones, and the change of the bias.

    Args:
        weight: `[O, D]`, float64.
        damped: The matrix of the layer.
        kept: Columns K, sorted.

    Returns:
        `[O, D]` with zeros in the removed columns, and `[O]` or None.
    """
    is_gone = torch.ones(weight.shape[1], dtype=torch.bool, device="cpu")
    is_gone[kept] = False
    gone = is_gone.nonzero()[:, 0]
    rows = damped.matrix.index_select(0, kept)
    factor = torch.linalg.cholesky(rows.index_select(1, kept))
    moves = torch.cholesky_solve(rows.index_select(1, gone), factor)  # [K, P]
    change = weight.index_select(1, gone) @ moves.T
    folded = torch.zeros_like(weight)
    folded[:, kept] = weight.index_select(1, kept) + change
    if damped.mean is None:
        return folded, None
    mean = damped.mean
    return folded, weight.index_select(1, gone) @ mean[gone] - change @ mean[kept]


def joint_costs(
    weight: Tensor, damped: Damped, curvature: Tensor | None, units: int, least: int
) -> tuple[Tensor, Tensor]:
    """Return the order in which units are eliminated, and the cost of each.

    Args:
        weight: `[O, D]`, float64.
        damped: The matrix of the layer.
        curvature: Curvature of the outputs `[O, O]`; None compares outputs by the identity, and
            costs are then relative to the mean squared output.
        units: Number of units.
        least: Units to keep.
    """
    quadratic = weight.T @ (weight if curvature is None else curvature @ weight)
    scale = 1.0
    if curvature is None:
        scale = float((quadratic * damped.matrix).sum()) or 1.0
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped.matrix))
    order, costs = eliminate(inverse, quadratic, units, least)
    return order, costs / scale
