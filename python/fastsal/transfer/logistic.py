"""Multinomial logistic regression on frozen, standardized features (linear probe).

Axes: n images, f features, k classes. With features z of mean 0 and standard deviation 1 and
balanced weights `v_n = n / (k · n_class)`, the probe minimizes the convex objective

    (1/n) sum_n v_n CE(W z_n + b, y_n) + (l2/2) ‖W‖²

with L-BFGS (Liu and Nocedal, 1989) on all images in float64. The bias is not penalized. By default
`l2` is selected by the loss on held-out images, as in Kornblith et al. (2019), arXiv 1805.08974.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsal.errors import DataError

# In decreasing order: each fit starts from the solution of the previous one.
L2_GRID = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
HELD_OUT_EVERY = 5
_STEPS = 1000


def solve_probe(
    task: str, x: Tensor, y: Tensor, counts: Tensor, l2: float | None, seed: int
) -> tuple[Tensor, Tensor, float]:
    """Train a linear probe.

    Args:
        task: Name of the task, for error messages.
        x: Features `[n, f]`, finite.
        y: Labels, int64 `[n]`.
        counts: Number of images of every class `[k]`, at least 1.
        l2: Penalty; None selects one of `L2_GRID`.
        seed: Seed of the fifth of every class that is held out for the selection.

    Returns:
        W float64 `[k, f]` and b `[k]` for features that are not standardized, and the penalty.

    Raises:
        DataError: A class has too few images to hold one out.
    """
    k = len(counts)
    x = x.double()
    v = (len(y) / (k * counts.double()))[y]
    mean = (v @ x) / v.sum()
    deviation = ((v @ (x - mean).square()) / v.sum()).sqrt()
    # A constant feature carries no information; its deviation is rounding error.
    flat = deviation <= 1e-7 * (deviation.max() + mean.abs())
    deviation = torch.where(flat, torch.ones_like(deviation), deviation)
    z = ((x - mean) / deviation).masked_fill(flat, 0.0)
    start = torch.zeros(k, x.shape[1] + 1, dtype=torch.float64, device="cpu")
    if l2 is None:
        l2 = _choose(task, z, y, v, counts, seed)
    found = _minimize(z, y, v, l2, start, _STEPS)
    weight = found[:, :-1] / deviation
    return weight.contiguous(), found[:, -1] - weight @ mean, l2


def _choose(task: str, z: Tensor, y: Tensor, v: Tensor, counts: Tensor, seed: int) -> float:
    """Return the penalty of `L2_GRID` with the lowest balanced cross-entropy on held-out images."""
    if int(counts.min()) < 2:
        raise DataError(
            f"l2 must be given for task {task!r}: a class has only 1 fit image, so none can be "
            "held out to select it"
        )
    held = torch.zeros(len(y), dtype=torch.bool, device="cpu")
    order = torch.Generator().manual_seed(seed)
    for label in range(len(counts)):
        members = (y == label).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=order, device="cpu")]
        held[members[: max(1, len(members) // HELD_OUT_EVERY)]] = True
    w = torch.zeros(len(counts), z.shape[1] + 1, dtype=torch.float64, device="cpu")
    losses = []
    for l2 in L2_GRID:
        w = _minimize(z[~held], y[~held], v[~held], l2, w, _STEPS // 10)
        losses.append(float(_loss(z[held], y[held], v[held], w)))
    return L2_GRID[min(range(len(losses)), key=losses.__getitem__)]


def _loss(z: Tensor, y: Tensor, v: Tensor, w: Tensor) -> Tensor:
    logits = torch.addmm(w[:, -1], z, w[:, :-1].T)
    return (v * F.cross_entropy(logits, y, reduction="none")).sum() / len(y)


def _minimize(z: Tensor, y: Tensor, v: Tensor, l2: float, start: Tensor, steps: int) -> Tensor:
    """Return the minimizer `[k, f + 1]`; the last column is the bias."""
    w = start.clone().requires_grad_(True)
    optimizer = torch.optim.LBFGS(
        [w],
        max_iter=steps,
        history_size=20,
        tolerance_grad=1e-9,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _loss(z, y, v, w) + l2 / 2 * w[:, :-1].square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return w.detach()
