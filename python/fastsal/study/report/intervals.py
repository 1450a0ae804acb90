"""Means over seeds and their t-intervals.

Seeds are independent draws of the calibration images and of the order of fine-tuning, so the mean
over n seeds has a Student t-interval with n - 1 degrees of freedom. Differences are taken within a
seed first, with the same test images, heads and calibration images on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval.

    Attributes:
        mean: Mean of the values.
        low: Lower bound; None for a single value.
        high: Upper bound; None for a single value.
        n: Number of values.
    """

    mean: float
    low: float | None
    high: float | None
    n: int

    def scaled(self, factor: float) -> Interval:
        """Return the interval times a factor above 0."""
        low = None if self.low is None else self.low * factor
        high = None if self.high is None else self.high * factor
        return Interval(self.mean * factor, low, high, self.n)


def mean(values: Sequence[float]) -> float:
    """Return the mean, independent of the order of the values."""
    return math.fsum(values) / len(values)


def median(values: Sequence[float]) -> float:
    """Return the median, the mean of the middle two for an even number of values."""
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2


def t_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Return the mean of `values` with its two-sided Student t-interval.

    Args:
        values: One value per seed, at least one.
        confidence: Probability that the interval covers the mean of the distribution.
    """
    n, middle = len(values), mean(values)
    if n < 2:
        return Interval(middle, None, None, n)
    deviation = math.sqrt(math.fsum((v - middle) ** 2 for v in values) / (n - 1))
    half = t_quantile((1 + confidence) / 2, n - 1) * deviation / math.sqrt(n)
    return Interval(middle, middle - half, middle + half, n)


def band(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Return the interval to draw: the t-interval, or the range of two values.

    With one degree of freedom the t-interval extends 12.7 standard errors to each side, too wide
    for a figure.
    """
    if len(values) == 2:
        return Interval(mean(values), min(values), max(values), 2)
    return t_interval(values, confidence)


def t_quantile(probability: float, freedom: int) -> float:
    """Return the quantile of Student's t with an integer number of degrees of freedom.

    Args:
        probability: Probability, in (0.5, 1).
        freedom: Degrees of freedom, at least 1.

    The central probability `P(|T| <= t)` is a finite sum in `θ = atan(t / √ν)` (Abramowitz and
    Stegun, 26.7.3 and 26.7.4) that increases with θ, so θ is found by bisection.
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
