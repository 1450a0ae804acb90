"""The choice of `λ`: by the loss that candidates leave on images that the statistics never saw.

One set of statistics serves all candidates; each costs a score, a mask, a compensation and a
forward pass over the held-out images, together less than one more round of statistics.

Where much is pruned at once the outcome is rough in `λ` and in the samples: the same `λ` with a few
more samples may come out far worse. So it is the pruned model that was measured which is kept, not
the `λ` alone. And an image that is worse than guessed counts as guessed: there a few images that
are wrong with great confidence would decide by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastsal.errors import DataError, FactorizationError
from fastsal.fisher.statistics import Statistics, squared_gradients

# Multiples of the mean squared gradient, which has the unit of `λ`. Half decades, because the loss
# is flat around its best λ.
_MULTIPLES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 10.0)


@dataclass(frozen=True)
class DampingChoice:
    """A chosen `λ` and why.

    Attributes:
        damping: The `λ` with the least held-out loss.
        evidence: Pairs `(λ, held-out loss)`, rising in `λ`; NaN where blocks could not be factored.
    """

    damping: float
    evidence: list[tuple[float, float]]


def candidates(statistics: Statistics) -> list[float]:
    """Return dampings to try, rising: multiples of the mean squared gradient."""
    total, count = squared_gradients(statistics)
    return candidates_of(total / count)


def candidates_of(mean: float) -> list[float]:
    """Return dampings to try, rising, for a mean squared gradient."""
    smallest = 1e-30  # a model whose gradients are all zero still gets a damping
    return [float(f"{max(m * mean, smallest):.2g}") for m in _MULTIPLES]


def choose_damping(
    grid: Sequence[float], prune_with: Callable[[float], None], loss: Callable[[], float]
) -> DampingChoice:
    """Return the damping with the least held-out loss.

    Args:
        grid: Dampings, rising.
        prune_with: Prunes the model with a damping, from the same start each time.
        loss: The pruned model's held-out loss.

    Raises:
        FactorizationError: No damping of the grid can be factored.
        DataError: The held-out loss is NaN with all of them.
    """
    evidence: list[tuple[float, float]] = []
    failure: FactorizationError | None = None
    for damping in grid:
        try:
            prune_with(damping)
            evidence.append((damping, loss()))
        except FactorizationError as error:
            failure = error
            evidence.append((damping, float("nan")))
    usable = [(value, damping) for damping, value in evidence if not math.isnan(value)]
    if not usable:
        raise failure or DataError(
            "batches: the loss of the held-out images is NaN with every damping; look at the "
            "images and at the model's precision, or give a damping"
        )
    return DampingChoice(min(usable)[1], evidence)
