"""Means over seeds and their t-intervals.

Seeds of one cell are independent draws (of calibration images, of the order of fine-tuning), so the
mean over n seeds has a Student t-interval with n - 1 degrees of freedom. Differences are taken
within a seed first: both sides have the same test images, heads and calibration images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and the interval of its confidence.

    Attributes:
        mean: of the values.
        low: lower bound; None for one value, which says nothing about its spread.
        high: upper bound; None for one value.
        n: how many values.
    """

    mean: float
    low: float | None
    high: float | None
    n: int

    def scaled(self, factor: float) -> Interval:
        """Return the interval in another unit; `factor` is above 0."""
        low = None if self.low is None else self.low * factor
        high = None if self.high is None else self.high * factor
        return Interval(self.mean * factor, low, high, self.n)


def mean(values: Sequence[float]) -> float:
    """Return the mean; the order of the values does not matter."""
    return math.fsum(values) / len(values)


def median(values: Sequence[float]) -> float:
    """Return the median; the mean of the middle two for an even number."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Return the mean of `values` with its two-sided Student t-interval.

    Args:
        values: one a seed, at least one.
        confidence: probability that the interval covers the mean of the distribution.
    """
    n, middle = len(values), mean(values)
    if n < 2:
        return Interval(middle, None, None, n)
    deviation = math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (n - 1))
    half = t_quantile((1 + confidence) / 2, n - 1) * deviation / math.sqrt(n)
    return Interval(middle, middle - half, middle + half, n)


def band(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Return what a figure draws: the t-interval, for two values the lesser and the greater.

    With one degree of freedom the t-interval is 12.7 standard errors wide, so wide that a figure
    shows nothing else.
    """
    if len(values) == 2:
        return Interval(mean(values), min(values), max(values), 2)
    return t_interval(values, confidence)


def t_quantile(probability: float, freedom: int) -> float:
    """Return the quantile of Student's t with a whole number of degrees of freedom.

    Args:
        probability: above 0.5, below 1.
        freedom: degrees of freedom, 1 or more.

    The central probability `P(|T| <= t)` is a finite sum in `θ = atan(t / √ν)` (Abramowitz and
    Stegun, 26.7.3 and 26.7.4); it rises with θ, so that bisection finds θ.
    """
    target = 2 * probability - 1
    low, high = 0.0, math.pi / 2
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return math.sqrt(freedom) * math.tan(middle)
        if _central(middle, freedom) < target:
            low = middle
        else:
            high = middle


def _central(theta: float, freedom: int) -> float:
    """Return `P(|T| <= √ν tan θ)`."""
    sine, square = math.sin(theta), math.cos(theta) ** 2
    odd = freedom % 2
    term = math.cos(theta) if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= square * (k - 1) / k
        total += term
    return 2 / math.pi * (theta + sine * total) if odd else sine * total
