"""Measurements and checkpoints that ranks share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any, TypeVar

from torch import Tensor, nn

from fastsal.data.batches import Pair
from fastsal.data.content import SeenImages
from fastsal.distributed.ranks import Ranks
from fastsal.errors import InvalidArgument
from fastsal.gradients.losses import LossFunction
from fastsal.pruning.checkpoint import Checkpoint, RoundState
from fastsal.pruning.limits.examination import Examination
from fastsal.pruning.limits.limit import Limit
from fastsal.pruning.measured import InMicroBatches, mean_of

_Item = TypeVar("_Item")


def in_order(dealt: Sequence[Sequence[_Item]]) -> list[_Item]:
    """Return the items of all ranks in their original order, before they were `dealt`."""
    nothing = object()
    turns = chain.from_iterable(zip_longest(*dealt, fillvalue=nothing))
    return [item for item in turns if item is not nothing]  # type: ignore[misc]


@dataclass(frozen=True)
class SharedMeasure:
    """Held-out images of which every rank measures some micro-batches; all get the same mean.

    Attributes:
        mine: The micro-batches of this rank.
        ranks: The processes.
    """

    mine: InMicroBatches
    ranks: Ranks

    @property
    def samples(self) -> int:
        """Number of images of this rank."""
        return self.mine.samples

    def losses(self, model: nn.Module) -> list[float]:
        """Return the loss of a model on each micro-batch of all ranks, in order."""
        return in_order(self.ranks.all_gather(self.mine.losses(model)))

    def mean_loss(self, model: nn.Module) -> float:
        """Return the mean loss over the images of all ranks."""
        return mean_of(self.losses(model), sum(self.ranks.all_gather(self.samples)))


class SharedExamination(Examination):
    """The test of a limit, in which every rank measures some batches; all get the same result."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Pair],
        limit: Limit,
        loss: LossFunction,
        *,
        seed: int,
        ranks: Ranks,
    ) -> None:
        self._ranks = ranks
        super().__init__(model, batches, limit, loss, seed=seed)

    def _own(self, batches: Iterable[Pair]) -> Iterable[Pair]:
        return self._ranks.dealt(batches)

    def measured(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Return the increases of all images, in their order."""
        return in_order(self._ranks.all_gather(super().measured(model)))


class SharedCheckpoint(Checkpoint):
    """A checkpoint that rank 0 writes and all ranks read.

    Args:
        path: The file, which all ranks must share.
        asked: Arguments of the run, as JSON values.
        rest: Digest of what the model has besides the weights that are pruned.
        seen: The images, as passes over them see them.
        ranks: The processes.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        asked: Mapping[str, Any],
        rest: str,
        seen: SeenImages,
        *,
        ranks: Ranks,
    ) -> None:
        super().__init__(path, asked, rest, seen, writes=ranks.rank == 0)
        self._ranks = ranks

    def save(self, weights: Mapping[str, Tensor], state: RoundState) -> None:
        """Write the state after a round, or before its refit."""
        if self._ranks.rank == 0:
            super().save(weights, state)
        self._ranks.all_gather(None)

    def resume(
        self,
        tensors: Mapping[str, Tensor],
        passes: Callable[[], Iterable[Pair]] = tuple,
        masked: Iterable[str] | None = None,
    ) -> RoundState:
        """Restore the state of the file, if it exists.

        Raises:
            InvalidArgument: Not all ranks can read it.
        """
        found = super().resume(tensors, passes, masked)
        seen = self._ranks.all_gather(len(found.history))
        if len(set(seen)) > 1:
            raise InvalidArgument(
                f"checkpoint must be a file that all ranks can read, got {seen} complete rounds"
            )
        return found

    def remove(self) -> None:
        """Remove the file, after all rounds are complete."""
        if self._ranks.rank == 0:
            super().remove()
