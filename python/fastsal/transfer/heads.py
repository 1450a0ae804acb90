"""Closed-form heads: ridge regression from features to one-hot labels.

Axes: n images, f features, k classes. With balanced weights `v_n = n / (k · n_class)`, the head
minimises `sum_n v_n ‖y_n − W x_n − b‖² + α ‖W‖²`. Centred at the weighted means, the bias drops out
and `W = Y_cᵀ V X_c (X_cᵀ V X_c + α I)⁻¹`, `b = ȳ − W x̄`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastsal.data import ImageSet
from fastsal.errors import DataError, FactorizationError, InvalidArgument
from fastsal.models import InputSpec, input_spec
from fastsal.transfer.features import evaluating, features
from fastsal.transfer.tasks import Part, Task, as_tasks, batches_of

_CHUNK = 1024  # images whose features are held in float64 at a time
_MOST_MARGIN = 10.0  # mean margin, in nats, that a scale may give where more would never hurt


@dataclass(frozen=True, eq=False)
class Head:
    """A frozen linear head `x ↦ W x + b` for one task.

    Attributes:
        task: the task's name.
        weight: W, float64 `[k, f]`.
        bias: b, float64 `[k]`.
        classes: the names of the classes.
        alpha: the absolute ridge α.
        spec: how the images were prepared; evaluation prepares them the same way.
        scale: what logits are multiplied by, at equal argmax, where a softmax follows: the value
            of least leave-one-out cross-entropy on the images that the head was fitted on.
    """

    task: str
    weight: Tensor
    bias: Tensor
    classes: tuple[str, ...]
    alpha: float
    spec: InputSpec
    scale: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        """Map features `[n, f]` to the regression's own outputs, float64 `[n, k]`."""
        return x.double() @ self.weight.to(x.device).T + self.bias.to(x.device)

    def linear(self) -> nn.Linear:
        """Return `scale · (W x + b)` as a float32 layer whose parameters need no gradient."""
        layer = nn.Linear(self.weight.shape[1], self.weight.shape[0])
        with torch.no_grad():
            layer.weight.copy_(self.scale * self.weight)
            layer.bias.copy_(self.scale * self.bias)
        return layer.requires_grad_(False)


def fit_heads(
    model: nn.Module,
    tasks: Task | Iterable[Task],
    *,
    ridge: float = 0.1,
    spec: InputSpec | None = None,
    batch_size: int = 64,
) -> dict[str, Head]:
    """Fit one head a task on the features of the dense backbone.

    Args:
        model: the dense backbone; left as found.
        tasks: one or more tasks.
        ridge: α over the mean eigenvalue of `X_cᵀ V X_c`, so that the scale of the features does
            not matter.
        spec: how images are prepared; None asks `fastsal.input_spec`.
        batch_size: images a forward pass.

    Returns:
        `{task name: head}`.

    Raises:
        InvalidArgument: `ridge` is negative, or tasks share a name.
        DataError: a class without images to fit on, or features that are not finite.
        FactorizationError: the normal equations are singular (`ridge` of 0).
    """
    if not ridge >= 0:
        raise InvalidArgument(f"ridge: got {ridge}; takes 0 or more")
    spec = spec or input_spec(model)
    heads = {}
    for task in as_tasks(tasks):
        x, y = _collect(model, task.fit, spec, batch_size)
        classes = (
            task.fit.classes
            if isinstance(task.fit, ImageSet)
            else tuple(str(k) for k in range(int(y.max()) + 1))
        )
        counts = torch.bincount(y, minlength=len(classes))
        if int(counts.min()) == 0:
            empty = classes[int(counts.argmin())]
            raise DataError(f"fit: task {task.name!r} has no image of class {empty!r} to fit on")
        if not bool(torch.isfinite(x).all()):
            raise DataError(f"fit: task {task.name!r} gives features that are not finite")
        weight, bias, alpha, left_out = _solve(x, y, counts, ridge)
        scale = _best_scale(left_out, y, counts)
        heads[task.name] = Head(task.name, weight, bias, classes, alpha, spec, scale)
    return heads


def _collect(
    model: nn.Module, part: Part, spec: InputSpec, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Return features float32 `[n, f]` and labels int64 `[n]`, on the CPU."""
    rows, labels = [], []
    with evaluating(model) as device:
        for images, y in batches_of(part, spec, batch_size):
            rows.append(features(model, images.to(device)).float().cpu())
            labels.append(y.long().cpu())
    if not rows:
        raise DataError("fit: no images to fit a head on")
    return torch.cat(rows), torch.cat(labels)


def _solve(
    x: Tensor, y: Tensor, counts: Tensor, ridge: float
) -> tuple[Tensor, Tensor, float, Tensor]:
    """Solve the weighted normal equations in float64.

    Returns:
        W `[k, f]`, b `[k]`, α, and what the head fitted without image n puts out for it, `[n, k]`:
        `y_n − (y_n − W x_n − b) / (1 − h_n)` with the leverage
        `h_n = v_n (x_cn (X_cᵀ V X_c + α I)⁻¹ x_cnᵀ + 1 / sum v)`.
    """
    n, k = len(x), len(counts)
    v = n / (k * counts.double())[y]
    target = torch.nn.functional.one_hot(y, k).double()
    pieces = [slice(i, i + _CHUNK) for i in range(0, n, _CHUNK)]
    x_mean = sum((v[i] @ x[i].double() for i in pieces), torch.zeros(())) / v.sum()
    y_mean = (v @ target) / v.sum()
    gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    cross = torch.zeros(x.shape[1], k, dtype=torch.float64)
    for i in pieces:
        centred = x[i].double() - x_mean
        weighted = (centred * v[i, None]).T
        gram += weighted @ centred
        cross += weighted @ (target[i] - y_mean)
    alpha = ridge * float(gram.trace()) / len(gram)
    gram.diagonal().add_(alpha)
    factor, info = torch.linalg.cholesky_ex(gram)
    if int(info):
        raise FactorizationError(
            f"ridge: {ridge} leaves the normal equations of {n} images and {len(gram)} features "
            "singular; give a larger ridge"
        )
    weight = torch.cholesky_solve(cross, factor).T.contiguous()
    left_out = []
    for i in pieces:
        centred = x[i].double() - x_mean
        half = torch.linalg.solve_triangular(factor, centred.T, upper=False)
        leverage = v[i] * (half.square().sum(dim=0) + 1 / v.sum())
        error = target[i] - y_mean - centred @ weight.T
        left_out.append(target[i] - error / (1 - leverage).clamp_min(1e-6)[:, None])
    return weight, y_mean - weight @ x_mean, alpha, torch.cat(left_out)


def _best_scale(logits: Tensor, y: Tensor, counts: Tensor) -> float:
    """Minimise the balanced cross-entropy over one factor on `logits [n, k]`: convex, bisection."""
    v = 1 / counts.double()[y]
    own = logits.gather(1, y[:, None])[:, 0]
    others = logits.scatter(1, y[:, None], -torch.inf).amax(dim=1)
    low, high = 0.0, _MOST_MARGIN / max(float((own - others).abs().mean()), 1e-9)
    for _ in range(60):
        scale = (low + high) / 2
        expected = (torch.softmax(scale * logits, dim=1) * logits).sum(dim=1)
        if float(v @ (expected - own)) > 0:  # the slope of the cross-entropy
            high = scale
        else:
            low = scale
    return scale
