"""A limit on the loss or the accuracy, and the report of its test."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastsal.errors import InvalidArgument
from fastsal.pruning.measured import loss_of_guessing


@dataclass(frozen=True)
class Limit:
    """What must not be passed.

    Attributes:
        kind: `"accuracy"` (drop of top-1) or `"loss"` (increase of the mean loss).
        most: The limit.
        confidence: How sure the promise is, in (0, 1).
    """

    kind: str
    most: float
    confidence: float = 0.95

    @classmethod
    def of(
        cls, max_loss_increase: float | None, max_accuracy_drop: float | None, confidence: float
    ) -> Limit | None:
        """Return the limit that was asked for, or None.

        Raises:
            InvalidArgument: Both were, or a number is not taken.
        """
        if max_loss_increase is not None and max_accuracy_drop is not None:
            raise InvalidArgument(
                "max_loss_increase, max_accuracy_drop: got both; takes one of them"
            )
        for name, kind, value in (
            ("max_loss_increase", "loss", max_loss_increase),
            ("max_accuracy_drop", "accuracy", max_accuracy_drop),
        ):
            if value is None:
                continue
            if not 0 < value < (1 if kind == "accuracy" else math.inf):
                raise InvalidArgument(f"{name}: got {value!r}; takes a number above zero")
            if not 0 < confidence < 1:
                raise InvalidArgument(f"confidence: got {confidence!r}; takes a number in (0, 1)")
            return cls(kind, float(value), float(confidence))
        return None


@dataclass(frozen=True)
class SafetyReport:
    """What was tested.

    Attributes:
        limit: The limit and its confidence.
        sparsity: The highest sparsity that was shown to keep it; 0 if none was.
        images: Images of the test.
        capped_at: Loss of an image above which it counts as this much; None for accuracy.
        curve: One entry a sparsity: `sparsity`, `increase` (mean), `upper` (its bound at the
            stated confidence), `predicted` (the quadratic model's loss increase, None without
            compensation), `loss_increase` (mean, uncapped) and `loss_error` (its standard error).
        trusted_until: The highest sparsity up to which measured and predicted loss increase agree
            within a factor of two or two standard errors; None without a prediction.
    """

    limit: Limit
    sparsity: float
    images: int
    capped_at: float | None
    curve: list[dict[str, Any]] = field(default_factory=list)
    trusted_until: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for a report."""
        return {**vars(self), "limit": vars(self.limit)}


def differences(
    limit: Limit, dense: Tensor, pruned: Tensor, losses: tuple[Tensor, Tensor], labels: Tensor
) -> Tensor:
    """Return what each image adds to the increase `[n]`.

    It lies in [-1, 1] for accuracy, and between the loss of guessing and its negative for losses.

    Args:
        limit: What is limited.
        dense: Outputs of the dense model `[n, classes]`.
        pruned: Outputs of the pruned one.
        losses: Losses of both `[n]`.
        labels: `[n]`.
    """
    if limit.kind == "accuracy":
        right = [(out.argmax(1) == labels).double() for out in (dense, pruned)]
        return right[0] - right[1]
    cap = loss_of_guessing(dense)
    before, after = (values.double().clamp(max=cap) for values in losses)
    return after - before


def trusted_until(curve: list[dict[str, Any]]) -> float | None:
    """Return the highest sparsity up to which prediction and measurement agree."""
    if not curve or curve[0]["predicted"] is None:
        return None
    until = 0.0
    for point in curve:
        measured, predicted = point["loss_increase"], point["predicted"]
        near = abs(measured - predicted) <= 2 * point["loss_error"]
        if not (near or predicted / 2 <= measured <= 2 * predicted):
            break
        until = point["sparsity"]
    return until


def summary(report: SafetyReport) -> str:
    """Say in one line what is promised."""
    limit = report.limit
    what = "top-1 accuracy drops" if limit.kind == "accuracy" else "mean loss rises"
    if report.sparsity == 0:
        return (
            f"no sparsity could be shown to keep the limit of {limit.most:g} on {report.images} "
            "images; takes more images or a wider limit"
        )
    return (
        f"at sparsity {report.sparsity:g} {what} by at most {limit.most:g}, with confidence "
        f"{limit.confidence:g} ({report.images} held-out images)"
    )


def losses_of(loss: Any, outputs: Tensor, labels: Tensor) -> Tensor:
    """Losses `[n]`, without a graph."""
    with torch.no_grad():
        result: Tensor = loss(outputs, labels)
    return result
