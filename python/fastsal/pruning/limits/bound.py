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

import numpy as np
from numpy.typing import ArrayLike

from fastsal.errors import InvalidArgument

_PRECISION = 1e-4


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
