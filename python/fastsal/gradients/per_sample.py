"""Per-sample gradients as a plain function."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastsal.gradients import losses as checks
from fastsal.gradients.engine import GradientEngine
from fastsal.gradients.losses import LossFunction
from fastsal.gradients.precision import row_dtype
from fastsal.models.selection import select_parameters
from fastsal.utils.choices import Curvature


def per_sample_gradients(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None,
    *,
    parameters: str | Sequence[str] | None = None,
    loss: str | LossFunction = "cross-entropy",
    curvature: Curvature = "empirical",
    seed: int = 0,
    autocast: torch.dtype | None = None,
    micro_batch: int | None = None,
    loss_scale: float | None = None,
) -> dict[str, Tensor]:
    """Return the gradient of each sample's loss, name to `[n, *shape]`, float32 or float64.

    Convenient where everything fits into memory; `GradientEngine` hands rows over one parameter
    at a time. The arguments are those of `GradientEngine` and of
    `select_parameters`.
    """
    selected = select_parameters(model, parameters)
    checks.check_images(images)
    with torch.inference_mode(False):
        result = {
            name: torch.empty(
                (images.shape[0], *value.shape), dtype=row_dtype(value), device=value.device
            )
            for name, value in selected.items()
        }
    filled = dict.fromkeys(selected, 0)

    def keep(name: str, rows: Tensor) -> None:
        start = filled[name]
        filled[name] = start + rows.shape[0]
        result[name][start : filled[name]].copy_(rows)

    with GradientEngine(
        model,
        selected,
        loss=loss,
        curvature=curvature,
        seed=seed,
        autocast=autocast,
        micro_batch=micro_batch,
        loss_scale=loss_scale,
    ) as engine:
        engine.run(images, labels, keep)
    return result
