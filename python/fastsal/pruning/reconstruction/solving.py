"""Least squares with a mask: one matrix of moments serves every row of a weight.

Axes: G groups, O output rows of a group, d inputs of a row, K kept inputs, m rows of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsal.utils.float64 import in_float64

# Every step lowers the objective, so that it is safe to stop early. Most of the gain comes first.
_STEPS = 24
_TOLERANCE = 1e-5
_CHUNK_BYTES = 2**27


def solve_rows(moments: Tensor, residuals: Tensor, kept: Tensor, damping: Tensor) -> Tensor:
    """Return the moves `δ` of the kept weights that minimize `½ δ(H + λI)δᵀ − δrᵀ` for every row.

    `δ_K = (H_KK + λI)⁻¹ r_K`, by one Cholesky factorization for all rows of a group that keep the
    same inputs, by one for each row or, where many inputs of many are kept, by at most 24 steps of
    conjugate gradients for all rows at once, in float32.

    Args:
        moments: `H`, `[G, d, d]`, positive semidefinite, float64.
        residuals: `r`, `[G, O, d]`, float64.
        kept: `[G, O, d]`, True where `δ` may differ from zero.
        damping: `λ` of each group, `[G]`, above zero where `H` is singular.

    Returns:
        `δ`, `[G, O, d]`; zero where weights are not kept. A row whose matrix is not positive
        definite is NaN.
    """
    union = kept.any(1)  # [G, d]
    if bool(((kept == union[:, None]).all(2) | ~kept.any(2)).all()) and len(kept) < kept.shape[1]:
        return _by_columns(moments, residuals, kept, damping, union)
    counts = kept.sum(2)
    direct = sum(count**3 for count in counts.reshape(-1).tolist()) / 3
    iterative = 2.0 * _STEPS * kept.numel() * kept.shape[2]
    if direct <= iterative:
        return _by_factorization(moments, residuals, kept, damping, counts)
    return _by_conjugate_gradients(moments, residuals, kept, damping)


def _by_columns(
    moments: Tensor, residuals: Tensor, kept: Tensor, damping: Tensor, union: Tensor
) -> Tensor:
    """Solve the rows of each group, which keep the inputs of `union` `[G, d]` or none."""
    moves = torch.zeros_like(residuals)
    for group, columns in enumerate(union):
        places = columns.nonzero()[:, 0]
        matrix = moments[group].index_select(0, places).index_select(1, places)
        matrix.diagonal().add_(damping[group])
        factor, failed = torch.linalg.cholesky_ex(matrix)
        found = torch.cholesky_solve(residuals[group].index_select(1, places).T, factor).T
        moves[group].index_copy_(1, places, found if not failed else found.fill_(torch.nan))
    return torch.where(kept, moves, 0.0)


def _by_factorization(
    moments: Tensor, residuals: Tensor, kept: Tensor, damping: Tensor, counts: Tensor
) -> Tensor:
    width = kept.shape[2]
    moves = torch.zeros_like(residuals).reshape(-1, width)
    flat, wanted = kept.reshape(-1, width), residuals.reshape(-1, width)
    groups = torch.arange(len(kept), device=kept.device).repeat_interleave(kept.shape[1])
    # Rows of a chunk have about the same number of kept inputs.
    order = counts.reshape(-1).argsort()
    sizes = counts.reshape(-1)[order].tolist()
    start = 0
    while start < len(order):
        stop = start + 1
        while stop < len(order) and (stop + 1 - start) * sizes[stop] ** 2 * 16 <= _CHUNK_BYTES:
            stop += 1
        rows, most = order[start:stop], sizes[stop - 1]
        start = stop
        if not most:
            continue
        # Positions of the kept inputs first, in their order.
        places = flat[rows].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
        absent = ~flat[rows].gather(1, places)
        group = groups[rows]
        matrix = moments[group[:, None, None], places[:, :, None], places[:, None, :]]
        # Rows with fewer kept inputs end with the identity.
        matrix.masked_fill_(absent[:, :, None] | absent[:, None, :], 0.0)
        matrix.diagonal(dim1=1, dim2=2).add_(
            torch.where(absent, 1.0, damping[group][:, None].expand_as(absent))
        )
        right = wanted[rows].gather(1, places).masked_fill(absent, 0.0)
        factor, failed = torch.linalg.cholesky_ex(matrix)
        found = torch.cholesky_solve(right[:, :, None], factor)[:, :, 0]
        found[failed > 0] = torch.nan
        moves[rows] = moves[rows].scatter(1, places, found.masked_fill(absent, 0.0))
    return moves.reshape(residuals.shape)


def _by_conjugate_gradients(
    moments: Tensor, residuals: Tensor, kept: Tensor, damping: Tensor
) -> Tensor:
    """Solve all rows at once, with a diagonal preconditioner; a step is one matrix product."""
    moments, residuals, damping = moments.float(), residuals.float(), damping.float()
    damping = damping[:, None, None]
    scale = moments.diagonal(dim1=1, dim2=2)[:, None] + damping
    inverse = torch.where(scale > 0, 1 / scale, 0.0) * kept
    moves = torch.zeros_like(residuals)
    rest = residuals * kept
    step = inverse * rest
    error = (rest * step).sum(2, keepdim=True)
    goal = error * _TOLERANCE**2
    for _ in range(_STEPS):
        active = error > goal
        if not bool(active.any()):
            break
        image = (torch.bmm(step, moments) + damping * step) * kept
        curvature = (step * image).sum(2, keepdim=True)
        length = torch.where(active & (curvature > 0), error / curvature, 0.0)
        moves += length * step
        rest -= length * image
        ahead = inverse * rest
        found = (rest * ahead).sum(2, keepdim=True)
        step = ahead + torch.where(error > 0, found / error, 0.0) * step
        error = torch.where(active, found, 0.0)
    return in_float64(moves)
