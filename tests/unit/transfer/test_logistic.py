from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fastsal.errors import DataError
from fastsal.transfer.logistic import L2_GRID, solve_probe

pytestmark = pytest.mark.usefixtures("one_thread")


def clouds(counts, features=5, seed=0, spread=1.5):
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(len(counts)), counts)
    centres = rng.normal(size=(len(counts), features))
    x = (centres[y] + spread * rng.normal(size=(len(y), features))) * [1, 10, 0.1, 1, 1] + 3
    return torch.from_numpy(x).float(), torch.from_numpy(y)


def standardised(x, v):
    mean = np.average(x, axis=0, weights=v)
    deviation = np.sqrt(np.average((x - mean) ** 2, axis=0, weights=v))
    return (x - mean) / deviation


@pytest.mark.parametrize("counts", [[30, 30, 30], [60, 25, 10, 8], [70, 20]])
@pytest.mark.parametrize("l2", [1.0, 0.01, 1e-4])
def test_probe_equals_the_logistic_regression_of_scikit_learn(counts, l2):
    linear_model = pytest.importorskip("sklearn.linear_model", reason="needs scikit-learn")
    x, y = clouds(counts)
    k, n = len(counts), len(y)
    weight, bias, kept = solve_probe("t", x, y, torch.bincount(y), l2, 0)
    assert kept == l2
    v = n / (k * np.bincount(y))[y.numpy()]
    z = standardised(x.double().numpy(), v)
    # Of two classes it has one row, w = W_1 − W_0, of which the penalty is half as large.
    strength = 1 / (l2 * n) if k > 2 else 2 / (l2 * n)
    reference = linear_model.LogisticRegression(C=strength, tol=1e-10, max_iter=10_000)
    reference.fit(z, y.numpy(), sample_weight=v)
    found = torch.softmax(x.double() @ weight.T + bias, dim=1)
    np.testing.assert_allclose(found.numpy(), reference.predict_proba(z), atol=2e-5)


def test_the_gradient_of_the_objective_is_zero():
    x, y = clouds([40, 20, 10])
    weight, bias, l2 = solve_probe("t", x, y, torch.bincount(y), 0.03, 0)
    x = x.double()
    v = (70 / (3 * torch.bincount(y).double()))[y]
    mean = (v @ x) / v.sum()
    deviation = ((v @ (x - mean) ** 2) / v.sum()).sqrt()
    z = (x - mean) / deviation
    w = (weight * deviation).requires_grad_()
    b = (bias + weight @ mean).requires_grad_()
    loss = (v * F.cross_entropy(z @ w.T + b, y, reduction="none")).mean()
    (loss + l2 / 2 * w.square().sum()).backward()
    assert float(w.grad.abs().max()) < 1e-7
    assert float(b.grad.abs().max()) < 1e-7


def test_features_that_do_not_vary_count_for_nothing():
    x, y = clouds([30, 30])
    dead = torch.cat([x, torch.zeros(60, 1), torch.full((60, 1), 7.3)], dim=1)
    weight, bias, _ = solve_probe("t", dead, y, torch.bincount(y), 0.01, 0)
    expected, expected_bias, _ = solve_probe("t", x, y, torch.bincount(y), 0.01, 0)
    torch.testing.assert_close(weight[:, :5], expected)
    torch.testing.assert_close(bias, expected_bias)
    assert (weight[:, 5:] == 0).all()


def test_the_penalty_is_chosen_for_images_held_out():
    noisy, y = clouds([12, 12, 12], spread=8.0)
    clear, _ = clouds([12, 12, 12], spread=0.02)
    counts = torch.bincount(y)
    strong = solve_probe("t", noisy, y, counts, None, 0)[2]
    weak = solve_probe("t", clear, y, counts, None, 0)[2]
    assert strong > weak
    assert {strong, weak} <= set(L2_GRID)


def test_the_same_seed_gives_the_same_probe():
    x, y = clouds([30, 30, 30])
    counts = torch.bincount(y)
    a, b = (solve_probe("t", x, y, counts, None, 5) for _ in range(2))
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])


def test_a_class_of_one_image_leaves_nothing_to_hold_out():
    x, y = clouds([30, 1])
    with pytest.raises(
        DataError, match="l2 must be given for task 't': a class has only 1 fit image"
    ):
        solve_probe("t", x, y, torch.bincount(y), None, 0)
    assert solve_probe("t", x, y, torch.bincount(y), 0.1, 0)[0].isfinite().all()
