"""Measurements and checkpoints that ranks share."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

from torch import Tensor, nn

from fastsal.data.batches import Pair, in_micro_batches
from fastsal.distributed.ranks import Ranks
from fastsal.errors import InvalidArgument
from fastsal.pruning.checkpoint import Checkpoint
from fastsal.pruning.history import Round
from fastsal.pruning.limits.examination import Examination
from fastsal.pruning.limits.limit import Limit
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.measured import Measured


def own_pieces(images: list[Pair], ranks: Ranks, most: int | None = None) -> list[Pair]:
    """Return this rank's part of images, in pieces of at most `most`."""
    total = sum(len(x) for x, _ in images)
    size = max(1, min(total // ranks.size, most or total))
    return list(in_micro_batches(images, size, size))[ranks.rank :: ranks.size]


@dataclass(frozen=True)
class SharedMeasure:
    """Held-out images of which every rank measures a part; all get the same mean loss.

    Attributes:
        mine: The images of this rank; None if it has none.
        ranks: The processes.
    """

    mine: Measured | None
    ranks: Ranks

    @property
    def samples(self) -> int:
        """Number of images of this rank."""
        return self.mine.samples if self.mine is not None else 0

    def mean_loss(self, model: nn.Module) -> float:
        """Return the mean loss over the images of all ranks."""
        total = self.mine.mean_loss(model) * self.samples if self.mine is not None else 0.0
        found = self.ranks.all_gather((total, self.samples))
        return float(sum(t for t, _ in found) / sum(n for _, n in found))


class SharedExamination(Examination):
    """The test of a limit, in which every rank measures a part; all get the same result.

    Raises:
        InvalidArgument: There are fewer images than ranks.
    """

    def __init__(
        self,
        model: nn.Module,
        images: list[Pair],
        limit: Limit,
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        ranks: Ranks,
        micro_batch: int | None,
    ) -> None:
        count = sum(len(x) for x, _ in images)
        if count < ranks.size:
            raise InvalidArgument(
                f"held_out must have at least one image for each of {ranks.size} ranks, got {count}"
            )
        self._ranks = ranks
        super().__init__(model, own_pieces(images, ranks, micro_batch), limit, loss)
        self._count = count

    @property
    def images(self) -> int:
        """Number of test images, of all ranks."""
        return self._count

    def measured(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Return the increases of all images, in their order."""
        found = self._ranks.all_gather(super().measured(model))
        return [pair for pair in chain.from_iterable(zip_longest(*found)) if pair is not None]


class SharedCheckpoint(Checkpoint):
    """A checkpoint that rank 0 writes and all ranks read.

    Args:
        path: The file, which all ranks must share.
        asked: Arguments of the run, as JSON values.
        ranks: The processes.
    """

    def __init__(
        self, path: str | os.PathLike[str], asked: Mapping[str, Any], *, ranks: Ranks
    ) -> None:
        super().__init__(path, asked)
        self._ranks = ranks

    def save(self, weights: Mapping[str, Tensor], masks: Masks, history: list[Round]) -> None:
        """Write the state after a round."""
        if self._ranks.rank == 0:
            super().save(weights, masks, history)
        self._ranks.all_gather(None)

    def resume(self, parameters: Mapping[str, nn.Parameter]) -> tuple[Masks | None, list[Round]]:
        """Restore the state of the file, if it exists.

        Raises:
            InvalidArgument: Not all ranks can read it.
        """
        masks, history = super().resume(parameters)
        seen = self._ranks.all_gather(len(history))
        if len(set(seen)) > 1:
            raise InvalidArgument(
                f"checkpoint must be a file that all ranks can read, got {seen} complete rounds"
            )
        return masks, history

    def remove(self) -> None:
        """Remove the file, after all rounds are complete."""
        if self._ranks.rank == 0:
            super().remove()
