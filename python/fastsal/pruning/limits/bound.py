"""How far can a model be pruned, with a promise about images that nobody has seen?

Sparsities are tested in rising order on images that neither the statistics nor the damping saw; the
first that cannot be shown to keep within the limit ends the search. Testing in a fixed order needs
no correction for the number of tests (Angelopoulos et al. 2021, "Learn then Test", section 2.2), so
that with the stated confidence the sparsity returned keeps the limit on images of the same
distribution. The test of one sparsity bets against "the increase is above the limit" (Waudby-Smith
and Ramdas 2024, "Estimating means of bounded random variables by betting", section 4): it holds for
any finite number of images and any distribution in the stated range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from fastsal.errors import InvalidArgument
from fastsal.pruning.damping import loss_of_guessing

# Coarse where nothing is at stake, fine where it is. Fixed beforehand: the order may not depend on
# the images.
GRID = tuple(
    round(s, 3) for s in (*np.arange(0.1, 0.5, 0.1), *np.arange(0.5, 0.96, 0.025), 0.97, 0.98, 0.99)
)
# Measured past the first failure, for the curve only.
LOOK_AHEAD = 4
_PRECISION = 1e-4


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


def upper_bound(values: ArrayLike, low: float, high: float, confidence: float) -> float:
    """Bound the mean of a distribution on `[low, high]` from above, at this confidence.

    Args:
        values: Independent draws `[n]`, in any order that does not depend on them.
        low: Least value possible.
        high: Largest value possible.
        confidence: In (0, 1).

    Raises:
        InvalidArgument: A value is outside of the range.
    """
    x = np.asarray(values, np.float64)
    if x.size and (x.min() < low or x.max() > high or np.isnan(x).any()):
        raise InvalidArgument(f"values: reach from {x.min()} to {x.max()}; takes [{low}, {high}]")
    least, most = low, high
    while most - least > _PRECISION * (high - low):
        middle = (least + most) / 2
        if is_below(x, middle, low, high, confidence):
            most = middle
        else:
            least = middle
    return most


def is_below(values: ArrayLike, mean: float, low: float, high: float, confidence: float) -> bool:
    """Say whether "the mean is `mean` or more" is refuted at this confidence.

    Wealth starts at one and is multiplied by `1 + λ_t (mean - x_t)`; if the mean is that high no
    strategy makes it grow on average, so it passes `1 / (1 - confidence)` with a probability of at
    most `1 - confidence` (Ville's inequality). `λ_t` depends on earlier values only.
    """
    x = np.asarray(values, np.float64)
    if x.size == 0 or mean >= high:
        return mean >= high
    n, needed = x.size, math.log(1 / (1 - confidence))
    width = high - low
    t = np.arange(1, n + 1)
    # Plug-in mean and variance of the values before, started with one draw in the middle of the
    # range: a quarter of its square is the largest variance that there is.
    before = (width / 2 + low + np.concatenate([[0.0], np.cumsum(x)[:-1]])) / t
    squares = np.concatenate([[0.0], np.cumsum((x - before) ** 2)[:-1]])
    variance = (width**2 / 4 + squares) / t
    stake = np.sqrt(2 * needed / (n * variance))
    # Below ruin, whatever comes.
    stake = np.minimum(stake, 0.9 / (high - mean))
    wealth = np.cumsum(np.log1p(stake * (mean - x)))
    return bool(wealth.max() >= needed)


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
