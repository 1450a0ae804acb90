"""A limit on the loss or the accuracy, and the report of its test."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastsal.errors import InvalidArgument
from fastsal.pruning.measured import loss_of_guessing
from fastsal.utils.float64 import in_float64
from fastsal.utils.numbers import real


@dataclass(frozen=True)
class Limit:
    """A limit on the damage by pruning.

    Attributes:
        kind: `"accuracy"` (drop of top-1 accuracy) or `"loss"` (increase of the mean loss).
        most: The largest drop or increase.
        confidence: Confidence of the guarantee, in (0, 1).
    """

    kind: str
    most: float
    confidence: float = 0.95

    @classmethod
    def of(
        cls, max_loss_increase: float | None, max_accuracy_drop: float | None, confidence: float
    ) -> Limit | None:
        """Return the limit that is given, or None.

        Raises:
            InvalidArgument: Both limits are given, or a number is out of range.
        """
        if max_loss_increase is not None and max_accuracy_drop is not None:
            raise InvalidArgument(
                "max_loss_increase and max_accuracy_drop exclude each other, got both"
            )
        if max_loss_increase is not None:
            kind, most = "loss", real("max_loss_increase", max_loss_increase, above=0)
        elif max_accuracy_drop is not None:
            kind, most = "accuracy", real("max_accuracy_drop", max_accuracy_drop, above=0, below=1)
        else:
            return None
        return cls(kind, most, real("confidence", confidence, above=0, below=1))


@dataclass(frozen=True)
class SafetyReport:
    """The result of pruning within a limit on the loss or the accuracy.

    Attributes:
        limit: The limit and its confidence.
        sparsity: The highest sparsity that is within the limit; 0 if none was shown to be.
        images: Number of test images.
        capped_at: Upper cap of the loss of an image; None for accuracy.
        curve: One entry for each tested sparsity: `sparsity`, `increase` (mean), `upper` (its upper
            bound at the confidence), `keeps` (whether it is within the limit), `predicted` (loss
            increase by the quadratic model; None without compensation), `loss_increase` (mean,
            without a cap) and `loss_error` (its standard error).
        trusted_until: The highest sparsity up to which measured and predicted loss increase agree
            within a factor of two or two standard errors; None without a prediction.
    """

    limit: Limit
    sparsity: float
    images: int
    capped_at: float | None
    curve: list[dict[str, Any]] = field(default_factory=list)
    trusted_until: float | None = None

    def __repr__(self) -> str:
        return (
            f"SafetyReport(sparsity={self.sparsity:g}, {self.limit.kind} within "
            f"{self.limit.most:g}, confidence={self.limit.confidence:g}, images={self.images}, "
            f"{len(self.curve)} sparsities tested, trusted_until={self.trusted_until})"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**vars(self), "limit": vars(self.limit)}


def differences(
    limit: Limit, dense: Tensor, pruned: Tensor, losses: tuple[Tensor, Tensor], labels: Tensor
) -> Tensor:
    """Return the increase of each image `[n]`.

    Values are in [-1, 1] for accuracy, and within plus and minus the loss of guessing for losses.

    Args:
        limit: The limit, whose kind decides what increases.
        dense: Outputs of the dense model `[n, classes]`.
        pruned: Outputs of the pruned model `[n, classes]`.
        losses: Losses of both models, each `[n]`.
        labels: `[n]`.
    """
    if limit.kind == "accuracy":
        right = [in_float64(out.argmax(1) == labels) for out in (dense, pruned)]
        return right[0] - right[1]
    cap = loss_of_guessing(dense)
    before, after = (in_float64(values).clamp(max=cap) for values in losses)
    return after - before


def trusted_until(curve: list[dict[str, Any]]) -> float | None:
    """Return the highest sparsity up to which predicted and measured loss increase agree."""
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
    """Return the guarantee in one line."""
    limit = report.limit
    what = "top-1 accuracy drops" if limit.kind == "accuracy" else "mean loss rises"
    if report.sparsity == 0:
        return (
            f"no sparsity was shown to be within the limit of {limit.most:g} on {report.images} "
            "images; use more images or a wider limit"
        )
    return (
        f"at sparsity {report.sparsity:g} {what} by at most {limit.most:g}, with confidence "
        f"{limit.confidence:g} ({report.images} held-out images)"
    )


def losses_of(loss: Any, outputs: Tensor, labels: Tensor) -> Tensor:
    """Return the losses `[n]`, without a graph."""
    with torch.no_grad():
        result: Tensor = loss(outputs, labels)
    return result
