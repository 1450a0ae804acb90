"""What ranks do together besides statistics: they measure models, and keep one checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any, TypeVar

from torch import Tensor, nn

from fastsal.data.batches import Pair
from fastsal.distributed.ranks import Ranks
from fastsal.errors import InvalidArgument
from fastsal.pruning.checkpoint import Checkpoint
from fastsal.pruning.limits.examination import Examination
from fastsal.pruning.limits.limit import Limit
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.measured import InMicroBatches, mean_of

_Item = TypeVar("_Item")


def in_order(dealt: Sequence[Sequence[_Item]]) -> list[_Item]:
    """All items, in the order from which they were dealt out to the ranks."""
    nothing = object()
    turns = chain.from_iterable(zip_longest(*dealt, fillvalue=nothing))
    return [item for item in turns if item is not nothing]  # type: ignore[misc]


@dataclass(frozen=True)
class SharedMeasure:
    """Held-out images of which every rank measures some micro-batches; all learn the same mean."""

    mine: InMicroBatches
    ranks: Ranks

    @property
    def samples(self) -> int:
        """Number of images, of this rank."""
        return self.mine.samples

    def losses(self, model: nn.Module) -> list[float]:
        """Loss of a model on each micro-batch of all ranks, in order."""
        return in_order(self.ranks.every(self.mine.losses(model)))

    def mean_loss(self, model: nn.Module) -> float:
        """Mean loss over the images of all ranks."""
        return mean_of(self.losses(model), sum(self.ranks.every(self.samples)))


class SharedExamination(Examination):
    """The test of a limit, each rank on some of the batches; all come to the same verdict."""

    def __init__(
        self,
        model: nn.Module,
        images: list[Pair],
        limit: Limit,
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        ranks: Ranks,
    ) -> None:
        self._ranks = ranks
        super().__init__(model, images, limit, loss)
        self._count = sum(len(x) for x, _ in images)
        self.cap = ranks.every(self.cap)[0]  # rank 0 has the first batch

    def _own(self, batches: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        return self._ranks.dealt(batches)

    @property
    def images(self) -> int:
        """Images of the test, on all ranks."""
        return self._count

    def measured(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Of all ranks, in the order of the images."""
        return in_order(self._ranks.every(super().measured(model)))


class SharedCheckpoint(Checkpoint):
    """A checkpoint that rank 0 writes and all ranks read."""

    def __init__(self, *given: Any, ranks: Ranks) -> None:
        super().__init__(*given)
        self._ranks = ranks

    def save(self, *state: Any) -> None:
        """Write the state after a round."""
        if self._ranks.rank == 0:
            super().save(*state)
        self._ranks.every(None)

    def resume(self, *given: Any) -> tuple[Masks | None, list[dict[str, Any]]]:
        """Bring parameters to the state of the file, if there is one.

        Raises:
            InvalidArgument: Not all ranks see it.
        """
        masks, history = super().resume(*given)
        seen = self._ranks.every(len(history))
        if len(set(seen)) > 1:
            raise InvalidArgument(
                f"checkpoint: ranks see {seen} rounds done; takes a file that all of them see"
            )
        return masks, history

    def remove(self) -> None:
        """All rounds are done."""
        if self._ranks.rank == 0:
            super().remove()
