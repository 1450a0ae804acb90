"""Per-sample gradients as a function."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastsal.gradients import losses as checks
from fastsal.gradients.engine import GradientEngine
from fastsal.gradients.feature_parameters import without_classifier
from fastsal.gradients.losses import LossFunction
from fastsal.gradients.precision import row_dtype
from fastsal.models.selection import select_parameters
from fastsal.models.wrappers import unwrapped
from fastsal.utils.choices import CURVATURES, Curvature
from fastsal.utils.suggestions import check_choice


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
    """Return the gradient of the loss of every sample.

    All gradients must fit in memory; `GradientEngine` passes them on one parameter at a time.

    Args:
        model: Module whose inputs are images `[n, ...]` or token ids `[n, L]`. Its modes, flags
            and `.grad` are restored.
        images: `[n, C, H, W]`, normalized floating point; or token ids `[n, L]`, int64 or int32.
        labels: `[n]`, or the labels that `loss` expects. Optional for "sampled", ignored for
            "features".
        parameters: Names or patterns, see `select_parameters`. With "features" the weights of the
            classifier are excluded unless they are named exactly.
        loss: "cross-entropy", or a function `(outputs, labels)` that returns losses `[n]`.
        curvature: "empirical" uses the given labels, "sampled" labels drawn from the model,
            "features" the loss of matching noisy features; see `GradientEngine`.
        seed: Seed of the drawn labels or noise.
        autocast: dtype for `torch.autocast`: `torch.bfloat16`, `torch.float16`, or None.
        micro_batch: Samples per forward and backward pass; None chooses by memory.
        loss_scale: A power of two, or None to choose it; see `GradientEngine`.

    Returns:
        Name to gradients `[n, *shape]`, float32, or float64 for float64 parameters.

    Raises:
        DataError: Images or labels are invalid.
        InvalidArgument: Another argument is invalid.
        NonFiniteGradient: A loss is NaN or infinite.
        UnsupportedLayer: A per-sample gradient cannot be computed.
    """
    check_choice("curvature", curvature, CURVATURES)
    selected = select_parameters(model, parameters)
    checks.check_images(images)
    if curvature == "features":
        selected = without_classifier(unwrapped(model), selected, parameters, images)
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
