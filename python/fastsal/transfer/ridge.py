"""Ridge regression from features to one-hot labels, in closed form.

Axes: n images, f features, k classes. With balanced weights `v_n = n / (k · n_class)`, the head
minimizes `sum_n v_n ‖y_n − W x_n − b‖² + α ‖W‖²`. Centering at the weighted means eliminates the
bias: `W = Y_cᵀ V X_c (X_cᵀ V X_c + α I)⁻¹`, `b = ȳ − W x̄`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastsal.errors import FactorizationError

_CHUNK = 1024  # images whose float64 features are in memory at once
_MOST_MARGIN = 10.0  # upper bound of the mean margin, in nats; binding for separable data


def solve_ridge(
    x: Tensor, y: Tensor, counts: Tensor, ridge: float
) -> tuple[Tensor, Tensor, float, Tensor]:
    """Solve the weighted normal equations in float64.

    Args:
        x: Features `[n, f]`, finite.
        y: Labels, int64 `[n]`.
        counts: Number of images of every class `[k]`, at least 1.
        ridge: α divided by the mean eigenvalue of `X_cᵀ V X_c`, at least 0.

    Returns:
        W `[k, f]`, b `[k]`, α, and the leave-one-out outputs `[n, k]`:
        `y_n − (y_n − W x_n − b) / (1 − h_n)` with the leverage
        `h_n = v_n (x_cn (X_cᵀ V X_c + α I)⁻¹ x_cnᵀ + 1 / sum v)`.

    Raises:
        FactorizationError: The normal equations are singular.
    """
    n, k = len(x), len(counts)
    v = n / (k * counts.double())[y]
    target = torch.nn.functional.one_hot(y, k).double()
    pieces = [slice(i, i + _CHUNK) for i in range(0, n, _CHUNK)]
    x_mean = (
        sum(
            (v[i] @ x[i].double() for i in pieces),
            torch.zeros((), dtype=torch.float64, device="cpu"),
        )
        / v.sum()
    )
    y_mean = (v @ target) / v.sum()
    gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device="cpu")
    cross = torch.zeros(x.shape[1], k, dtype=torch.float64, device="cpu")
    for i in pieces:
        centered = x[i].double() - x_mean
        weighted = (centered * v[i, None]).T
        gram += weighted @ centered
        cross += weighted @ (target[i] - y_mean)
    alpha = ridge * float(gram.trace()) / len(gram)
    gram.diagonal().add_(alpha)
    factor, info = torch.linalg.cholesky_ex(gram)
    if int(info):
        raise FactorizationError(
            f"ridge must be larger, got {ridge}: the normal equations of {n} images and "
            f"{len(gram)} features are singular"
        )
    weight = torch.cholesky_solve(cross, factor).T.contiguous()
    left_out = []
    for i in pieces:
        centered = x[i].double() - x_mean
        half = torch.linalg.solve_triangular(factor, centered.T, upper=False)
        leverage = v[i] * (half.square().sum(dim=0) + 1 / v.sum())
        error = target[i] - y_mean - centered @ weight.T
        left_out.append(target[i] - error / (1 - leverage).clamp_min(1e-6)[:, None])
    return weight, y_mean - weight @ x_mean, alpha, torch.cat(left_out)


def best_scale(logits: Tensor, y: Tensor, counts: Tensor) -> float:
    """Return the factor on `logits [n, k]` of least balanced cross-entropy, by bisection.

    The cross-entropy is convex in the factor.
    """
    v = 1 / counts.double()[y]
    own = logits.gather(1, y[:, None])[:, 0]
    others = logits.scatter(1, y[:, None], -torch.inf).amax(dim=1)
    low, high = 0.0, _MOST_MARGIN / max(float((own - others).abs().mean()), 1e-9)
    for _ in range(60):
        scale = (low + high) / 2
        expected = (torch.softmax(scale * logits, dim=1) * logits).sum(dim=1)
        if float(v @ (expected - own)) > 0:  # derivative of the cross-entropy
            high = scale
        else:
            low = scale
    return scale
