"""The weights that each rank owns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fastsal.distributed.ranks import Ranks
from fastsal.fisher.block_fisher import BlockFisher
from fastsal.fisher.memory_plan import MemoryPlan
from fastsal.fisher.parts import Part, Parts, by_key, slices
from fastsal.fisher.statistics import Statistics


@dataclass(frozen=True)
class ShardedStatistics:
    """Statistics of one rank's parts of a model, and the division of the model among ranks.

    Attributes:
        own: Statistics of this rank's parts, by their keys.
        shares: Parts of every rank.
        model_shapes: Name to shape, of the whole model.
    """

    own: Statistics
    shares: Sequence[Sequence[Part]]
    model_shapes: Mapping[str, tuple[int, ...]]

    @property
    def samples(self) -> int | float:
        """Number of samples."""
        return self.own.samples

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key of a part of this rank to its shape."""
        return self.own.shapes

    @property
    def precision(self) -> str:
        """Type of the sums, `"float32"` or `"float64"`."""
        return self.own.precision

    @property
    def plan(self) -> MemoryPlan | None:
        """How they were collected within a memory budget; None without a budget."""
        return self.own.plan

    def groups(self, *, cuts: bool = True) -> Iterator[tuple[BlockFisher, Parts]]:
        """Yield the statistics of groups of this rank's parts."""
        return self.own.groups(cuts=cuts)

    def merge(self, other: ShardedStatistics) -> None:
        """Add more samples, collected in the same way at the same weights."""
        self.own.merge(other.own)


@dataclass(frozen=True)
class Mine:
    """The parts of a model that this rank has statistics of.

    Attributes:
        parameters: Name to parameter, all with statistics on some rank, in the model's order.
        shares: Parts of every rank.
        parts: This rank's, by their keys.
        weights: Key to this rank's weights.
    """

    parameters: Mapping[str, nn.Parameter]
    shares: Sequence[Sequence[Part]]
    parts: Parts
    weights: Mapping[str, Tensor]

    @classmethod
    def of(cls, model: nn.Module, statistics: Statistics, ranks: Ranks) -> Mine:
        """Return the parts of a model that this rank has statistics of."""
        assert isinstance(statistics, ShardedStatistics)
        found = dict(model.named_parameters(remove_duplicate=False))
        parameters = {name: found[name] for name in statistics.model_shapes}
        parts = by_key(statistics.shares[ranks.rank])
        return cls(parameters, statistics.shares, parts, slices(parameters, parts))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name to shape."""
        return {name: tuple(p.shape) for name, p in self.parameters.items()}
