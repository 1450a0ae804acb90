"""Greedy elimination of units, and the fold, against plain float64."""

from __future__ import annotations

import pytest
import torch

from fastsal.pruning.structured.activations import Moments
from fastsal.pruning.structured.elimination import eliminate
from fastsal.pruning.structured.folding import Damped, fold, joint_costs


def problem(m, c, outputs, seed, rank=None):
    """A covariance with damping, and weights, float64."""
    draw = torch.Generator().manual_seed(seed)
    d = m * c
    x = torch.randn(rank or 3 * d, d, generator=draw, dtype=torch.float64)
    x = x @ torch.randn(d, d, generator=draw, dtype=torch.float64) / d**0.5
    a = x.T @ x / len(x)
    a += 1e-3 * a.diagonal().mean() * torch.eye(d, dtype=torch.float64)
    return a, torch.randn(outputs, d, generator=draw, dtype=torch.float64)


def plain(a, w, g, m, least):
    """One unit at a time: solve from scratch for every set that might be next."""
    c = len(a) // m
    gone, order, costs, before = [], [], [], 0.0
    for _ in range(m - least):
        found = {}
        for j in set(range(m)) - set(gone):
            p = [i for unit in sorted([*gone, j]) for i in range(unit * c, (unit + 1) * c)]
            block = torch.linalg.inv(torch.linalg.inv(a)[p][:, p])
            found[j] = float(torch.trace(w[:, p] @ block @ w[:, p].T @ g))
        best = min(found, key=found.get)
        gone.append(best)
        order.append(best)
        costs.append(found[best] - before)
        before = found[best]
    return order, costs


@pytest.mark.parametrize(
    ("m", "c", "outputs", "least"), [(12, 1, 5, 1), (9, 3, 7, 2), (5, 4, 2, 1), (3, 1, 4, 3)]
)
def test_greedy_equals_a_plain_loop(m, c, outputs, least):
    a, w = problem(m, c, outputs, m)
    half = torch.randn(outputs, outputs, generator=torch.Generator().manual_seed(5)).double()
    g = half @ half.T + torch.eye(outputs)
    wanted, sums = plain(a, w, g, m, least)
    order, costs = eliminate(torch.linalg.inv(a), w.T @ g @ w, m, least)
    assert order.tolist() == wanted
    torch.testing.assert_close(costs, torch.tensor(sums, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("m", "c"), [(150, 1), (70, 2)])
def test_held_back_updates_change_nothing(m, c):
    """Against a loop that updates the inverse and the weights after every unit."""
    a, w = problem(m, c, 20, 3)
    inverse, left, wanted, sums = torch.linalg.inv(a), list(range(m)), [], []
    start, moved = inverse.clone(), w.clone()
    for _ in range(m - 1):
        costs = []
        for j in left:
            p = slice(j * c, (j + 1) * c)
            block = torch.linalg.inv(inverse[p, p])
            costs.append(float(torch.trace(moved[:, p] @ block @ moved[:, p].T)))
        k = min(range(len(left)), key=costs.__getitem__)
        j = left.pop(k)
        p = slice(j * c, (j + 1) * c)
        a_row = torch.linalg.solve(inverse[p, p], inverse[p])
        moved = moved - moved[:, p] @ a_row
        inverse = inverse - inverse[:, p] @ a_row
        wanted.append(j)
        sums.append(costs[k])
    order, costs = eliminate(start, w.T @ w, m)
    assert order.tolist() == wanted
    torch.testing.assert_close(costs, torch.tensor(sums, dtype=torch.float64), rtol=1e-8, atol=0)


@pytest.mark.parametrize("has_bias", [True, False])
def test_the_fold_is_least_squares(has_bias):
    draw = torch.Generator().manual_seed(0)
    n, d, outputs, lam = 200, 15, 6, 1e-3
    h = (
        torch.randn(n, d, generator=draw, dtype=torch.float64)
        @ torch.randn(d, d, generator=draw).double()
    )
    h += 3 * torch.randn(d, generator=draw, dtype=torch.float64)
    w, b = (
        torch.randn(outputs, d, generator=draw).double(),
        torch.randn(outputs, generator=draw).double(),
    )
    kept = torch.tensor([0, 2, 3, 7, 8, 11, 14])
    moments = Moments(d)
    for rows in h.split(61):
        moments.add(rows)
    damped = Damped.of(moments, lam, has_bias=has_bias)
    folded, shift = fold(w, damped, kept)
    # Rows of zeros with one entry are the damping on the change of the kept weights.
    centered = h - h.mean(dim=0) if has_bias else h
    size = (lam * (centered.square().sum() / n) / d * n) ** 0.5
    x = torch.cat([h[:, kept], size * torch.eye(len(kept))])
    y = torch.cat([h @ w.T + (b if has_bias else 0), size * w[:, kept].T])
    if has_bias:
        x = torch.cat([x, torch.cat([torch.ones(n, 1), torch.zeros(len(kept), 1)])], dim=1)
    found = torch.linalg.lstsq(x, y).solution
    torch.testing.assert_close(folded[:, kept], found[: len(kept)].T, rtol=1e-8, atol=1e-8)
    gone = torch.ones(d, dtype=torch.bool)
    gone[kept] = False
    assert not folded[:, gone].any()
    if has_bias:
        torch.testing.assert_close(b + shift, found[-1], rtol=1e-8, atol=1e-8)
    else:
        assert shift is None


@pytest.mark.parametrize("has_bias", [True, False])
def test_costs_are_the_errors_that_the_fold_leaves(has_bias):
    draw = torch.Generator().manual_seed(1)
    h = (
        torch.randn(400, 10, generator=draw).double() @ torch.randn(10, 10, generator=draw).double()
        + 1
    )
    w = torch.randn(4, 10, generator=draw).double()
    g = torch.diag(torch.tensor([1.0, 4.0, 0.5, 2.0], dtype=torch.float64))
    moments = Moments(10)
    moments.add(h)
    damped = Damped.of(moments, 1e-12, has_bias=has_bias)
    order, costs = joint_costs(w, damped, g, 10, 4)
    for r in (1, 3, 6):
        kept = torch.tensor(sorted(set(range(10)) - set(order[:r].tolist())))
        folded, shift = fold(w, damped, kept)
        error = h @ (folded - w).T + (shift if has_bias else 0)
        wanted = (error @ g * error).sum(dim=1).mean()
        torch.testing.assert_close(costs[:r].sum(), wanted, rtol=1e-6, atol=1e-9)
    _, relative = joint_costs(w, damped, None, 10, 0)
    assert relative.sum() == pytest.approx(1)  # nothing is left but the mean


def test_units_that_are_never_active_go_first_and_cost_nothing():
    draw = torch.Generator().manual_seed(2)
    h = torch.randn(100, 8, generator=draw).relu()
    h[:, [2, 5]] = 0
    moments = Moments(8)
    moments.add(h)
    damped = Damped.of(moments, 1e-3, has_bias=True)
    order, costs = joint_costs(torch.randn(3, 8, generator=draw).double(), damped, None, 8, 1)
    assert set(order[:2].tolist()) == {2, 5}
    assert costs[:2].max() < 1e-2 * costs[2:].min()


def test_moments_do_not_lose_what_is_small_beside_the_mean():
    draw = torch.Generator().manual_seed(3)
    h = torch.randn(5000, 6, generator=draw) * 1e-3 + 1000
    moments = Moments(6)
    for rows in h.split(1234):
        moments.add(rows)
    wanted = torch.cov(h.double().T, correction=0)
    torch.testing.assert_close(moments.covariance(), wanted, rtol=1e-4, atol=1e-11)
    torch.testing.assert_close(moments.mean, h.double().mean(dim=0), rtol=1e-9, atol=0)
    assert moments.count == 5000
