"""Damping `λ`: how it is given, and how it is chosen on held-out images.

One set of statistics serves every `λ`. A candidate costs one scoring, one mask, one compensation
and one forward pass over the held-out images. Of seven candidates three or four are measured.

At high sparsity the result is a rough function of `λ` and of the samples: the same `λ` with a few
more samples can give a much worse model. Therefore the pruned model that was measured is kept, not
only its `λ`. The loss of an image counts at most what guessing costs, as a few images that are
misclassified with high confidence would otherwise decide the choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fastsal.errors import DataError, FactorizationError, InvalidArgument, PrecisionWarning
from fastsal.fisher.block_fisher import BlockFisher
from fastsal.fisher.checks import LEAST_DAMPING
from fastsal.fisher.statistics import Statistics, squared_gradients, statistics_of
from fastsal.utils.numbers import as_real
from fastsal.utils.warn import warn_user

# Multiples of the mean squared gradient, which has the unit of `λ`. Half decades, because the loss
# is flat around its best λ.
_MULTIPLES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 10.0)
# The least λ, so that a model whose gradients are all zero has a valid one.
_LEAST = 1e-30


@dataclass(frozen=True)
class Multiple:
    """A damping relative to the curvature: `λ = factor · mean_j F_jj`.

    It has the same effect on every model, also when the loss or the inputs are scaled.

    Attributes:
        factor: Multiple of the mean diagonal of F, above zero.
    """

    factor: float

    def __str__(self) -> str:
        return f"{self.factor!r}x"

    def of(self, mean: float) -> float:
        """Return `λ` for a mean diagonal of F."""
        return max(self.factor * mean, _LEAST)


Auto = Literal["auto"]
Damping = float | Multiple | Auto


def parse_damping(damping: object, *, auto: bool = False) -> Damping:
    """Return a damping in its parsed form.

    Args:
        damping: A positive number (of Python, NumPy or PyTorch), a multiple of the mean diagonal of
            F such as `"0.1x"`, or `"auto"`.
        auto: Whether `"auto"` is valid.

    Raises:
        InvalidArgument: It is none of these.
    """
    if isinstance(damping, Multiple):
        return damping
    if isinstance(damping, str):
        text = damping.strip()
        if auto and text == "auto":
            return "auto"
        if text[-1:] in ("x", "X", "×"):
            try:
                factor = float(text[:-1])
            except ValueError:
                factor = math.nan
            if 0 < factor < math.inf:
                return Multiple(factor)
    else:
        number = as_real(damping)
        if number is not None and number >= LEAST_DAMPING:
            return number
        if number is not None and number > 0:
            raise InvalidArgument(f"damping must be at least {LEAST_DAMPING}, got {number}")
    choice = ", 'auto'" if auto else ""
    raise InvalidArgument(
        f"damping must be a positive number{choice} or a multiple such as '0.1x', got "
        f"{damping!r:.80}"
    )


def resolve_damping(damping: object, fisher: BlockFisher | Statistics) -> float:
    """Return the absolute `λ` of a damping.

    Args:
        damping: A positive number, or a multiple such as `"0.1x"`.
        fisher: The statistics whose mean diagonal is multiplied.

    Raises:
        InvalidArgument: `damping` is neither.
    """
    parsed = parse_damping(damping)
    if isinstance(parsed, Multiple):
        return parsed.of(mean_diagonal(fisher))
    assert not isinstance(parsed, str)
    return parsed


def mean_diagonal(fisher: BlockFisher | Statistics) -> float:
    """Return the mean diagonal of F: the mean squared gradient over all weights.

    Warns:
        PrecisionWarning: It is zero although gradients are not: all squares underflow.
    """
    statistics = statistics_of(fisher)
    total, count = squared_gradients(statistics)
    if total == 0 and _has_gradients(statistics):
        warn_user(
            f"the squares of all gradients underflow {statistics.precision}, so that scores depend "
            "on weights alone; scale the loss up, or collect with precision='float64'",
            PrecisionWarning,
        )
    return total / count


def _has_gradients(statistics: Statistics) -> bool:
    """Tell whether any mean gradient is above or below zero."""
    means = (m for some, _ in statistics.groups() for m in some.mean_gradient().values())
    return any(bool(mean.any()) for mean in means)


@dataclass(frozen=True)
class DampingChoice:
    """A `λ` and the measurements it was chosen by.

    Attributes:
        damping: The `λ` with the least held-out loss.
        evidence: Pairs `(λ, held-out loss)` in rising order of `λ`; NaN where a block could not be
            factored.
    """

    damping: float
    evidence: list[tuple[float, float]]


def candidates(mean: float) -> list[float]:
    """Return the values of `λ` to try, in rising order, for a mean diagonal of F."""
    return [float(f"{max(m * mean, _LEAST):.2g}") for m in _MULTIPLES]


def choose_damping(
    grid: Sequence[float], prune_with: Callable[[float], None], loss: Callable[[], float]
) -> DampingChoice:
    """Choose a damping whose neighbors in the grid have no lower held-out loss.

    The search begins in the middle and measures neighbors of the best damping until it has both.
    So it measures three of seven dampings where the middle is best.

    Args:
        grid: Values of `λ`, in rising order.
        prune_with: Prunes the model with a damping, from the same weights each time.
        loss: Measures the held-out loss of the pruned model.

    Raises:
        FactorizationError: No damping of the grid can be factored.
        DataError: The held-out loss is NaN with every damping.
    """
    losses: dict[int, float] = {}
    failure: FactorizationError | None = None
    following: int | None = len(grid) // 2
    while following is not None:
        try:
            prune_with(grid[following])
            losses[following] = loss()
        except FactorizationError as error:
            failure = error
            losses[following] = math.nan
        following = _next_to_measure(losses, len(grid))
    usable = [(value, grid[i]) for i, value in losses.items() if not math.isnan(value)]
    if not usable:
        raise failure or DataError(
            "the loss of the held-out images is NaN with every damping; check the images and the "
            "precision of the model, or set damping to a number"
        )
    return DampingChoice(min(usable)[1], [(grid[i], losses[i]) for i in sorted(losses)])


def _next_to_measure(losses: Mapping[int, float], count: int) -> int | None:
    """Return the place of the next damping to measure; None if the best has both neighbors.

    While nothing can be used, the largest dampings come first: blocks can be factored with them.
    """
    usable = [(value, i) for i, value in losses.items() if not math.isnan(value)]
    if not usable:
        return next(
            (i for i in (*range(count // 2, count), *range(count)) if i not in losses), None
        )
    _, best = min(usable)
    return next((i for i in (best - 1, best + 1) if 0 <= i < count and i not in losses), None)
