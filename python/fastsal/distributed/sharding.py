"""The weights that each rank owns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fastsal.distributed.ranks import Ranks
from fastsal.fisher.block_fisher import BlockFisher
from fastsal.fisher.parts import (
    Part,
    Parts,
    by_key,
    slices,
)


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
    def of(cls, model: nn.Module, fisher: BlockFisher, ranks: Ranks) -> Mine:
        """Return the parts of a model by the statistics of this rank."""
        assert fisher._shares is not None
        assert fisher._whole is not None
        found = dict(model.named_parameters(remove_duplicate=False))
        parameters = {name: found[name] for name in fisher._whole}
        parts = by_key(fisher._shares[ranks.rank])
        return cls(parameters, fisher._shares, parts, slices(parameters, parts))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameter name to shape."""
        return {name: tuple(p.shape) for name, p in self.parameters.items()}
