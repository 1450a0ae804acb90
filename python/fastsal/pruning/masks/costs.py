"""Prune a fraction of what weights cost, such as multiply-accumulates, instead of their number.

A weight of a convolution with many outputs is used more often than one of a late layer. The least
total score for a total cost is found, up to one weight, by pruning in the order of score per cost:
the linear relaxation of the knapsack problem (Dantzig 1957), as in FLOPs-aware pruning (Singh and
Alistarh 2020, WoodFisher, section 5.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

import fastsal._core as _core
from fastsal.errors import InvalidArgument
from fastsal.utils.numbers import real

Counts = dict[str, int]
# A target that differs from a sum of costs by rounding alone is met by it.
_ROUNDING = 1e-12


def cost_of(counts: Mapping[str, int], costs: Mapping[str, float]) -> float:
    """Return the cost of numbers of weights of parameters."""
    return sum(costs[name] * count for name, count in counts.items())


def checked_costs(
    costs: Mapping[str, float], names: Sequence[str], scope: str, pattern: str | None
) -> dict[str, float]:
    """Return the costs of one weight of each parameter as plain numbers.

    Raises:
        InvalidArgument: A cost is missing, negative or not finite, all are zero, weights do not
            compete over the whole model, or they have a pattern.
    """
    if not isinstance(costs, Mapping):
        raise InvalidArgument(
            "costs must be a mapping from names of parameters to numbers, got "
            f"{type(costs).__name__}"
        )
    if scope != "global":
        raise InvalidArgument(f"scope must be 'global' with costs, got {scope!r}")
    if pattern is not None:
        raise InvalidArgument(f"pattern must be None with costs, got {pattern!r}")
    missing = [name for name in names if name not in costs]
    if missing:
        raise InvalidArgument(f"costs must have every parameter of the scores, not {missing[0]!r}")
    found = {name: real(f"costs[{name!r}]", costs[name], least=0) for name in names}
    if not any(found.values()):
        raise InvalidArgument("costs must not all be zero")
    return found


def check_floors(
    shapes: Mapping[str, Sequence[int]],
    costs: Mapping[str, float],
    sparsity: float,
    floors: Mapping[str, int],
) -> None:
    """Raise InvalidArgument if the floors keep more of the cost than the sparsity leaves."""
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = cost_of(sizes, costs)
    most = total - cost_of(floors, costs)
    if most < sparsity * total * (1 - _ROUNDING):
        raise InvalidArgument(
            f"sparsity must be at most {most / total:.4g} of the costs, which is what the floor "
            f"allows to prune, got {sparsity:g}"
        )


def priced(scores: NDArray[np.float32], price: np.float32) -> NDArray[np.float32]:
    """Return scores per cost."""
    found: NDArray[np.float32] = np.divide(scores, price, dtype=np.float32)
    return found


def counts_by_cost(
    shapes: Mapping[str, Sequence[int]],
    costs: Mapping[str, float],
    sparsity: float,
    floors: Mapping[str, int],
    count_keys: Callable[[str, np.float32, int | None], NDArray[np.uint64]],
) -> tuple[Counts, float | None]:
    """Return how many weights of each parameter are pruned, lowest scores per cost first.

    Their cost is `sparsity` of all, up to half the cost of the last one. Among equal scores per
    cost the order is that of the parameters. Weights without a cost are kept.

    Args:
        shapes: Name to shape.
        costs: Name to the cost of one weight.
        sparsity: Fraction of the total cost to prune.
        floors: Name to the least number of weights to keep.
        count_keys: Returns the counts `[65536]` of the halves of keys, as `_core.count_keys` does,
            of the scores of a parameter divided by a price.

    Returns:
        The counts, and the highest score per cost that is pruned; None if nothing is.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    total = cost_of(sizes, costs)
    target = sparsity * total * (1 - _ROUNDING)
    if target <= 0:
        return dict.fromkeys(sizes, 0), None
    # Relative to the mean, so that the unit of the costs does not matter.
    mean = total / sum(sizes.values())
    prices = {name: np.float32(costs[name] / mean) for name in sizes if costs[name]}
    caps = {name: sizes[name] - floors[name] for name in prices}

    def reached(below: Mapping[str, int], upper: int | None) -> tuple[int, Counts, Counts]:
        """Return the half of a key that reaches the target, and counts below it and in it."""
        found = {
            name: count_keys(name, price, upper).astype(np.int64) for name, price in prices.items()
        }
        until = {name: below[name] + np.cumsum(each) for name, each in found.items()}
        spent = np.zeros(len(next(iter(until.values()))))
        for name, each in until.items():
            spent += costs[name] * np.minimum(each, caps[name])
        half = min(int(np.searchsorted(spent, target)), len(spent) - 1)
        inside = {name: int(each[half]) for name, each in found.items()}
        return half, {name: int(until[name][half]) - inside[name] for name in prices}, inside

    upper, below, _ = reached(dict.fromkeys(prices, 0), None)
    lower, below, equal = reached(below, upper)
    counts = dict.fromkeys(sizes, 0) | {name: min(below[name], caps[name]) for name in prices}
    for name in prices:
        left = round((target - cost_of(counts, costs)) / costs[name])
        counts[name] += max(0, min(left, equal[name], caps[name] - counts[name]))
    if not any(counts.values()):
        return counts, None
    return counts, _core.score_of_key(upper << 16 | lower) / mean
