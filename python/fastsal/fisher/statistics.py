"""Statistics as pruning uses them: sums that are read group by group, stored or recomputed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fastsal.fisher.block_fisher import BlockFisher, fisher_of, sums_of
from fastsal.fisher.memory_plan import MemoryPlan
from fastsal.fisher.model_sums import ModelSums
from fastsal.fisher.parts import Parts

if TYPE_CHECKING:
    from typing_extensions import Self


class Statistics(Protocol):
    """Statistics of a model, which are read as groups of parts."""

    @property
    def samples(self) -> int | float:
        """Number of samples."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name to shape."""

    @property
    def precision(self) -> str:
        """Type of the sums, `"float32"` or `"float64"`."""

    @property
    def plan(self) -> MemoryPlan | None:
        """How they were collected within a memory budget; None without a budget."""

    def groups(self, *, cuts: bool = True) -> Iterator[tuple[BlockFisher, Parts]]:
        """Yield the statistics of groups of parts, in order, each with its parts by their keys.

        The caller must drop a group before the next one, which may take its memory.

        Args:
            cuts: Whether parameters that alone take more memory than a group may be cut between any
                two blocks.
        """

    def merge(self, other: Self) -> None:
        """Add more samples, collected in the same way at the same weights."""


@dataclass(frozen=True)
class Collected:
    """Statistics whose sums are stored, in memory or in a file.

    Attributes:
        fisher: The sums.
        plan: How they were collected within a memory budget; None without a budget.
    """

    fisher: BlockFisher
    plan: MemoryPlan | None = None

    @property
    def sums(self) -> ModelSums:
        """The sums of the statistics, without a copy."""
        return sums_of(self.fisher)

    @property
    def samples(self) -> int | float:
        """Number of samples."""
        return self.fisher.samples

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name to shape."""
        return self.fisher.shapes

    @property
    def precision(self) -> str:
        """Type of the sums, `"float32"` or `"float64"`."""
        return self.fisher.precision

    def groups(self, *, cuts: bool = True) -> Iterator[tuple[BlockFisher, Parts]]:
        """Yield the statistics of groups of parts; they share memory with the sums."""
        # `map` keeps no reference to a group that the caller has dropped.
        yield from map(_as_fisher, self.sums.views(cuts=cuts))

    def merge(self, other: Collected) -> None:
        """Add the sums of more samples."""
        self.fisher.merge(other.fisher)


def statistics_of(fisher: BlockFisher | Statistics) -> Statistics:
    """Return statistics, from what users or the package pass as `fisher`."""
    return Collected(fisher) if isinstance(fisher, BlockFisher) else fisher


def squared_gradients(statistics: Statistics) -> tuple[float, int]:
    """Return the sum of the mean squared gradients of all weights, and the number of weights."""
    total, count = 0.0, 0
    for fisher, _ in statistics.groups():
        for squares in fisher.diagonal().values():
            total, count = total + float(squares.sum()), count + squares.numel()
        del fisher  # before the sums of the next group are computed
    return total, count


def _as_fisher(view: tuple[ModelSums, Parts]) -> tuple[BlockFisher, Parts]:
    sums, parts = view
    return fisher_of(sums), parts
