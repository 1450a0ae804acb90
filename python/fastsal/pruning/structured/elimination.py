"""Greedy elimination of units: Optimal Brain Surgeon for columns of a matrix.

A layer `y = W h` loses units, columns of `W`. The kept columns follow in the way that is best on
average over the inputs, so that without the set P the error of the outputs is
`tr(W_P [(A⁻¹)_PP]⁻¹ W_Pᵀ G)`, where `A` is the second moment of `h` with its damping and `G` the
curvature of the outputs. One unit at a time is eliminated, the one with the least such cost.

For several outputs that share `A` this is the elimination of Hassibi and Stork (1993). `W` is only
needed in `S = Wᵀ G W`: without unit p, and with `a = A⁻¹e_p / (A⁻¹)_pp`, it is
`S - s aᵀ - a sᵀ + s_p a aᵀ`, where `s = S e_p`.

Axes: D columns, m units of c columns each (D = m c), O outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Updates that are held back and then done by one product of matrices.
_HELD = 128
# Matrices are made smaller once this fraction of their units is left.
_COMPACTS_AT = 0.65
# A cost below zero is a rounding error, as is a pivot of this fraction of its first value.
_LEAST_PIVOT = 1e-14


def eliminate(inverse: Tensor, quadratic: Tensor, units: int, least: int = 1) -> tuple[
    Tensor, Tensor
]:  # fmt: skip
    """Eliminate units one at a time, the one of least cost first.

    Args:
        inverse: `A⁻¹` `[D, D]`, float64, symmetric positive definite. Used as working memory.
        quadratic: `S = Wᵀ G W` `[D, D]`, float64, symmetric. Used as working memory.
        units: Number m of units; unit j has the columns `j c` to `(j + 1) c`.
        least: Number of units to keep.

    Returns:
        The eliminated units in order `[m - least]`, int64, and the cost of each elimination, at
        least 0, float64. The sum of the first r costs is the cost of the first r units together.
    """
    state = _State(inverse, quadratic, units)
    count = max(0, units - least)
    order = torch.empty(count, dtype=torch.int64, device="cpu")
    costs = torch.empty(count, dtype=torch.float64, device="cpu")
    for step in range(count):
        order[step], costs[step] = state.remove_cheapest()
    return order, costs


class _State:
    """The matrices of an elimination, with updates that are held back.

    Attributes:
        names: Unit to its number at the start, `[m]`.
    """

    def __init__(self, inverse: Tensor, quadratic: Tensor, units: int) -> None:
        self._inverse, self._quadratic = inverse, quadratic
        self._c = len(inverse) // units
        self.names = torch.arange(units, device="cpu")
        self._alive = torch.ones(units, dtype=torch.bool, device="cpu")
        self._least = _LEAST_PIVOT * inverse.diagonal().abs().max()
        self._refresh()

    def remove_cheapest(self) -> tuple[int, float]:
        """Remove a unit; return its number at the start and its cost."""
        costs = self._costs()
        unit = int(costs.argmin())
        cost = max(0.0, float(costs[unit]))
        name = int(self.names[unit])
        self._remove(unit)
        return name, cost

    def _costs(self) -> Tensor:
        if self._c == 1:
            costs = self._s[:, 0, 0] / self._a[:, 0, 0].clamp_min(self._least)
        else:
            solved = torch.linalg.solve(self._a, self._s)
            costs = solved.diagonal(dim1=1, dim2=2).sum(dim=1)
        return costs.masked_fill_(~self._alive, torch.inf)

    def _remove(self, unit: int) -> None:
        c, held = self._c, self._held
        rows = slice(unit * c, (unit + 1) * c)
        past = slice(0, held * c)
        # Rows of A⁻¹ and of S as they are now.
        inverse = self._inverse[rows] - self._b[past, rows].T @ self._p[past]
        s = self._quadratic[rows] - (
            self._u[past, rows].T @ self._p[past] + self._p[past, rows].T @ self._u[past]
        )
        pivot = inverse[:, rows]
        is_one = c == 1
        a = inverse / pivot.clamp_min(self._least) if is_one else torch.linalg.solve(pivot, inverse)
        u = s - 0.5 * (s[:, rows] @ a)
        now = slice(held * c, (held + 1) * c)
        self._b[now], self._p[now], self._u[now] = inverse, a, u
        m = len(self.names)
        if c == 1:
            self._a[:, 0, 0] -= inverse[0] * a[0]
            self._s[:, 0, 0] -= 2 * (u[0] * a[0])
        else:
            a3, u3 = a.view(c, m, c).transpose(0, 1), u.view(c, m, c).transpose(0, 1)
            cross = u3.mT @ a3
            self._a -= inverse.view(c, m, c).permute(1, 2, 0) @ a3
            self._s -= cross + cross.mT
            self._a[unit] = torch.eye(c, dtype=self._a.dtype, device="cpu")
        self._alive[unit] = False
        self._held += 1
        if self._held == self._room:
            self._flush()

    def _flush(self) -> None:
        """Apply the updates that were held back, and drop units that are gone."""
        past = slice(0, self._held * self._c)
        b, p, u = self._b[past], self._p[past], self._u[past]
        if int(self._alive.sum()) <= _COMPACTS_AT * len(self._alive):
            kept = self._alive.nonzero()[:, 0]
            columns = (kept[:, None] * self._c + torch.arange(self._c, device="cpu")).flatten()
            self._inverse = self._inverse.index_select(0, columns).index_select(1, columns)
            self._quadratic = self._quadratic.index_select(0, columns).index_select(1, columns)
            b, p, u = b[:, columns], p[:, columns], u[:, columns]
            self.names, self._alive = self.names[kept], self._alive[kept]
        if len(self.names):
            self._inverse.addmm_(b.T, p, alpha=-1)
            self._quadratic.addmm_(torch.cat([u, p]).T, torch.cat([p, u]), alpha=-1)
        self._refresh()

    def _refresh(self) -> None:
        """Start with no update held back."""
        m, c, d = len(self.names), self._c, len(self._inverse)
        self._room = max(1, min(_HELD // c, m))
        self._held = 0
        self._b, self._p, self._u = (
            torch.empty(self._room * c, d, dtype=torch.float64, device="cpu") for _ in range(3)
        )
        blocks = torch.arange(m, device="cpu")
        self._a = self._inverse.view(m, c, m, c)[blocks, :, blocks].clone()
        self._s = self._quadratic.view(m, c, m, c)[blocks, :, blocks].clone()
        self._a[~self._alive] = torch.eye(c, dtype=self._a.dtype, device="cpu")
