"""Tests with a finite-sample guarantee: is the mean of bounded values below a limit?

Sparsities are tested in rising order on images that neither the statistics nor the choice of the
damping used; the first that is not shown to be within the limit ends the search. Testing in a fixed
order needs no correction for the number of tests (Angelopoulos et al. 2021, "Learn then Test",
section 2.2). So with the given confidence, the returned sparsity is within the limit on images of
the same distribution. The test of one sparsity bets against "the increase is above the limit"
(Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting", section
4): it is valid for any number of images and any distribution in the given range.

A bet uses earlier values only, so their order must not depend on them; that of image folders does,
since damage differs by class. The values are therefore permuted at random before the test, and the
result holds for any order in which they come.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastsal.errors import InvalidArgument

_PRECISION = 1e-4


def upper_bound(
    values: ArrayLike, low: float, high: float, confidence: float, seed: int | None = None
) -> float:
    """Return an upper confidence bound of the mean of a distribution on `[low, high]`.

    Args:
        values: Independent draws `[n]`, in any order.
        low: Smallest possible value.
        high: Largest possible value.
        confidence: Probability that the bound holds, in (0, 1).
        seed: Seed of the permutation, see `permuted`.

    Raises:
        InvalidArgument: A value is outside of the range.
    """
    x = permuted(values, seed)
    if x.size and (x.min() < low or x.max() > high or np.isnan(x).any()):
        raise InvalidArgument(f"values must be in [{low:g}, {high:g}], got {x.min()} to {x.max()}")
    least, most = low, high
    while most - least > _PRECISION * (high - low):
        middle = (least + most) / 2
        if _is_rejected(x, middle, low, high, confidence):
            most = middle
        else:
            least = middle
    return most


def is_below(
    values: ArrayLike,
    mean: float,
    low: float,
    high: float,
    confidence: float,
    seed: int | None = None,
) -> bool:
    """Return whether "the mean is `mean` or more" is rejected at this confidence.

    The arguments are those of `upper_bound`.
    """
    return _is_rejected(permuted(values, seed), mean, low, high, confidence)


def permuted(values: ArrayLike, seed: int | None = None) -> NDArray[np.float64]:
    """Return values `[n]` in a random order, `numpy.random.default_rng(seed).permutation(n)`.

    Independent draws that were sorted are exchangeable again after it. One permutation for all data
    could happen to suit their order, so the seed should differ between data sets: None derives it
    from the values.
    """
    x = np.ascontiguousarray(values, np.float64)
    if seed is None:
        seed = int.from_bytes(hashlib.blake2b(x.tobytes(), digest_size=8).digest(), "little")
    order: NDArray[np.int64] = np.random.default_rng(seed).permutation(len(x))
    return x[order]


def _is_rejected(
    x: NDArray[np.float64], mean: float, low: float, high: float, confidence: float
) -> bool:
    """Return whether "the mean is `mean` or more" is rejected, by values in a random order.

    Wealth starts at one and is multiplied by `1 + s_t (mean - x_t)`, where the stake `s_t` depends
    on earlier values only. If the hypothesis is true, wealth does not grow in expectation, so it
    exceeds `1 / (1 - confidence)` with a probability of at most `1 - confidence` (Ville's
    inequality).
    """
    if x.size == 0 or mean >= high:
        return mean >= high
    n, needed = x.size, math.log(1 / (1 - confidence))
    width = high - low
    t = np.arange(1, n + 1)
    # Plug-in mean and variance of the earlier values, starting with one draw at the middle of the
    # range, whose square over four is the largest possible variance.
    before = (width / 2 + low + np.concatenate([[0.0], np.cumsum(x)[:-1]])) / t
    squares = np.concatenate([[0.0], np.cumsum((x - before) ** 2)[:-1]])
    variance = (width**2 / 4 + squares) / t
    stake = np.sqrt(2 * needed / (n * variance))
    # Wealth remains positive for any value.
    stake = np.minimum(stake, 0.9 / (high - mean))
    wealth = np.cumsum(np.log1p(stake * (mean - x)))
    return bool(wealth.max() >= needed)
