"""A limit on the loss or the accuracy, and the report of its test."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fastsal.errors import InvalidArgument
from fastsal.utils.numbers import real

# Without images of its own, a limit is tested on one sample of so many.
TESTED_EVERY = 4


@dataclass(frozen=True)
class Limit:
    """A limit on the damage by pruning.

    Attributes:
        kind: `"accuracy"` (drop of top-1 accuracy) or `"loss"` (increase of the mean loss).
        most: The largest drop or increase.
        confidence: Confidence of the guarantee, in (0, 1).
        cap: Upper cap of the loss of an image; None for accuracy, and where the cross-entropy has
            not got its own yet.
    """

    kind: str
    most: float
    confidence: float = 0.95
    cap: float | None = None

    @classmethod
    def of(
        cls,
        max_loss_increase: float | None,
        max_accuracy_drop: float | None,
        confidence: float,
        loss_cap: float | None = None,
        *,
        needs_cap: bool = False,
    ) -> Limit | None:
        """Return the limit that is given, or None.

        Args:
            max_loss_increase: Largest increase of the mean loss, or None.
            max_accuracy_drop: Largest drop of the accuracy, or None.
            confidence: Confidence of the guarantee.
            loss_cap: Upper cap of the loss of an image; None where the loss has one of its own.
            needs_cap: Whether the loss has no cap of its own.

        Raises:
            InvalidArgument: Both limits are given, a number is out of range, or a cap is missing.
        """
        if loss_cap is not None and max_loss_increase is None:
            raise InvalidArgument(
                f"loss_cap must be None without max_loss_increase, got {loss_cap!r:.80}"
            )
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
        cap = None if loss_cap is None else real("loss_cap", loss_cap, above=0)
        if kind == "loss" and needs_cap and cap is None:
            raise InvalidArgument(
                "loss_cap must be given for max_loss_increase with a loss function: the mean of "
                "losses without an upper bound has no guarantee; the loss of an image then counts "
                "at most loss_cap"
            )
        limit = cls(kind, most, real("confidence", confidence, above=0, below=1), cap)
        limit.check_cap()
        return limit

    def check_cap(self) -> None:
        """Raise InvalidArgument unless the limit is below the cap, which would keep any model."""
        if self.cap is not None and self.most >= self.cap:
            raise InvalidArgument(
                f"max_loss_increase must be less than {self.cap:g}, the cap of the loss of an "
                f"image, got {self.most:g}"
            )

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; `capped_at` only for a limit on the loss."""
        found: dict[str, Any] = {
            "kind": self.kind, "most": self.most, "confidence": self.confidence
        }  # fmt: skip
        return found if self.cap is None else {**found, "capped_at": self.cap}

    @property
    def what(self) -> str:
        """What is limited, as the subject of a sentence."""
        if self.kind == "accuracy":
            return "top-1 accuracy"
        return "mean loss" if self.cap is None else f"mean loss (capped at {self.cap:.4g})"


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
        seed: Seed of the order in which the test takes the images,
            `numpy.random.default_rng(seed).permutation(images)`. It is derived from the seed of the
            run and from the images.
    """

    limit: Limit
    sparsity: float
    images: int
    capped_at: float | None
    curve: list[dict[str, Any]] = field(default_factory=list)
    trusted_until: float | None = None
    seed: int | None = None

    def __repr__(self) -> str:
        return (
            f"SafetyReport(sparsity={self.sparsity:g}, {self.limit.what} within "
            f"{self.limit.most:g}, confidence={self.limit.confidence:g}, images={self.images}, "
            f"{len(self.curve)} sparsities tested, trusted_until={self.trusted_until})"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**vars(self), "limit": self.limit.as_dict()}


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
    moves = "drops" if limit.kind == "accuracy" else "rises"
    if report.sparsity == 0:
        return (
            f"no sparsity was shown to be within the limit of {limit.most:g} on the {limit.what} "
            f"on {report.images} images; use more images or a wider limit"
        )
    return (
        f"at sparsity {report.sparsity:g} the {limit.what} {moves} by at most {limit.most:g}, "
        f"with confidence {limit.confidence:g} ({report.images} held-out images)"
    )
