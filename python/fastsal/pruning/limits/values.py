"""What a limit is about: the capped loss of an image, or whether it is classified correctly.

Axes: n images, C classes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastsal.errors import DataError, InvalidArgument
from fastsal.gradients.losses import (
    LossFunction,
    check_classes,
    check_logits,
    check_losses,
    cross_entropy,
)
from fastsal.models.outputs import described, output_tensor
from fastsal.pruning.limits.limit import Limit
from fastsal.pruning.measured import loss_of_guessing
from fastsal.utils.float64 import in_float64


def losses_of(loss: LossFunction, outputs: Any, labels: Tensor) -> Tensor:
    """Return the losses `[n]`, without a graph."""
    with torch.no_grad():
        result = loss(outputs, labels)
    check_losses(result, len(labels))
    return result


def capped(losses: Tensor, cap: float) -> Tensor:
    """Return losses `[n]` in [0, cap], float64; NaN counts as the cap."""
    each = torch.nan_to_num(in_float64(losses), nan=cap, posinf=cap, neginf=cap)
    return each.clamp(min=0.0, max=cap)


def is_right(outputs: Any, labels: Tensor) -> Tensor:
    """Return whether each image is classified correctly, `[n]`; with NaN outputs it is not."""
    logits = output_tensor(outputs)
    return (logits.argmax(dim=1) == labels) & ~logits.isnan().any(dim=1)


def settled(limit: Limit, loss: LossFunction, outputs: Any, labels: Tensor) -> Limit:
    """Return a limit with its cap, after checking that it has a meaning for these outputs.

    The cap of the cross-entropy is by default the loss of guessing, `log C`.

    Args:
        limit: The limit.
        loss: `(outputs, labels)` to losses `[n]`.
        outputs: Outputs of the dense model for a few images.
        labels: Their labels.

    Raises:
        InvalidArgument: The loss has no cap, or the model returns no logits for a limit that needs
            them, or the limit is not below the cap.
        DataError: Labels are not classes of the model, or a loss is NaN or infinite.
    """
    if limit.kind == "loss" and limit.cap is None and loss is cross_entropy:
        _check_classified(limit, outputs, labels)
        limit = replace(limit, cap=loss_of_guessing(outputs))
    limit.check_cap()
    check_measurable(limit, loss, outputs, labels)
    return limit


def check_measurable(limit: Limit, loss: LossFunction, outputs: Any, labels: Tensor) -> None:
    """Raise an error unless a limit has a meaning for outputs of the dense model.

    The arguments and errors are those of `settled`.
    """
    if limit.kind == "accuracy" or loss is cross_entropy:
        _check_classified(limit, outputs, labels)
        if output_tensor(outputs).isnan().any():
            raise DataError("model must not return NaN for held-out images; check them")
    losses = losses_of(loss, outputs, labels)
    if limit.kind == "accuracy":
        return
    if not bool(torch.isfinite(losses).all()):
        raise DataError(
            "loss of the dense model must be finite for held-out images, got nan or inf"
        )
    if float(losses.min()) < 0:
        raise InvalidArgument(
            f"loss must be at least 0 with max_loss_increase, got {float(losses.min()):g}; add a "
            "constant to it"
        )


def _check_classified(limit: Limit, outputs: Any, labels: Tensor) -> None:
    """Raise an error unless outputs are logits `[n, C]` and labels are classes `[n]`."""
    n = len(labels)
    if limit.kind == "accuracy":
        try:
            logits = output_tensor(outputs)
        except InvalidArgument:
            logits = None
        if logits is None or logits.dim() != 2 or logits.shape[1] < 2:
            came = described(outputs) if logits is None else list(logits.shape)
            raise InvalidArgument(
                "max_accuracy_drop must be None unless the model returns logits [n, C] of two or "
                f"more classes, got {came}; limit the loss instead: max_loss_increase, with loss= "
                "and loss_cap="
            )
        classes = int(logits.shape[1])
    else:
        classes = check_logits(outputs, n, "max_loss_increase with the cross-entropy")
    check_classes(labels, classes, 0)
