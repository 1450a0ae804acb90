"""The peers of `benches.quality` do what their papers say, on small problems."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    return pytest.importorskip("benches.quality.peers", reason="needs the repository")


@pytest.fixture
def problem():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(200, 24, generator=draw, dtype=torch.float64)
    x[:, 5] = x[:, 4] + 0.1 * x[:, 5]
    weight = torch.randn(6, 24, generator=draw, dtype=torch.float64)
    return weight, x.T @ x / len(x)


@pytest.mark.parametrize("goal", [0.25, 0.5, 0.75])
def test_obc_removes_one_weight_at_a_time(peers, problem, goal):
    weight, moments = problem
    outputs, d = weight.shape
    damped = moments + peers.PERCENT_DAMPING * moments.diagonal().mean() * torch.eye(d)
    costs, orders = torch.zeros(outputs, d, dtype=torch.float64), []
    for o in range(outputs):
        w, kept, order = weight[o].clone(), list(range(d)), []
        for step in range(d):
            inverse = torch.linalg.inv(damped[kept][:, kept])
            scores = w[kept] ** 2 / inverse.diagonal()
            j = int(scores.argmin())
            costs[o, step] = scores[j]
            w[kept] -= inverse[:, j] * w[kept][j] / inverse[j, j]
            order.append(kept.pop(j))
        orders.append(order)
    running = costs.cummax(1).values
    cut = running.flatten().sort().values[round(goal * running.numel()) - 1]
    wanted = torch.zeros_like(weight)
    for o in range(outputs):
        at = sorted(orders[o][int((running[o] <= cut).sum()) :])
        wanted[o, at] = torch.linalg.solve(damped[at][:, at], damped[at] @ weight[o])
    torch.testing.assert_close(peers.obc(weight, moments, goal), wanted)


@pytest.mark.parametrize("name", ["wanda", "sparse_gpt"])
def test_patterns_and_fractions(peers, problem, name):
    weight, moments = problem
    rule = getattr(peers, name)
    kept = rule(weight, moments, (2, 4)) != 0
    assert (kept.reshape(6, 6, 4).sum(2) == 2).all()
    kept = rule(weight, moments, 0.5) != 0
    assert int(kept.sum()) == 72


def test_sparse_gpt_without_correlations_is_magnitude(peers):
    weight = torch.randn(5, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = peers.sparse_gpt(weight, torch.eye(16, dtype=torch.float64), 0.5)
    cut = weight.abs().flatten().sort().values[39]
    torch.testing.assert_close(found, torch.where(weight.abs() > cut, weight, 0.0))
