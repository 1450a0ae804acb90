"""What ranks do together besides statistics: they measure models, and keep one checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any

from torch import Tensor, nn

from fastsal.data.batches import Pair, in_micro_batches
from fastsal.distributed.ranks import Ranks
from fastsal.errors import InvalidArgument
from fastsal.pruning.checkpoint import Checkpoint
from fastsal.pruning.limits.examination import Examination
from fastsal.pruning.limits.limit import Limit
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.measured import Measured


def own_pieces(images: list[Pair], ranks: Ranks, most: int | None = None) -> list[Pair]:
    """This rank's part of some images: every so many-th piece, of up to `most` of them."""
    total = sum(len(x) for x, _ in images)
    size = max(1, min(total // ranks.size, most or total))
    return list(in_micro_batches(images, size, size))[ranks.rank :: ranks.size]


@dataclass(frozen=True)
class SharedMeasure:
    """Held-out images of which every rank measures some; all learn the same mean."""

    mine: Measured | None
    ranks: Ranks

    @property
    def samples(self) -> int:
        """Number of images, of this rank."""
        return self.mine.samples if self.mine is not None else 0

    def mean_loss(self, model: nn.Module) -> float:
        """Mean loss over the images of all ranks."""
        total = self.mine.mean_loss(model) * self.samples if self.mine is not None else 0.0
        found = self.ranks.every((total, self.samples))
        return float(sum(t for t, _ in found) / sum(n for _, n in found))


class SharedExamination(Examination):
    """The test of a limit, each rank on some of the images; all come to the same verdict.

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
                f"held_out: {count} images are left to test the limit on; takes one for each of "
                f"{ranks.size} ranks or more"
            )
        self._ranks = ranks
        super().__init__(model, own_pieces(images, ranks, micro_batch), limit, loss)
        self._count = count

    @property
    def images(self) -> int:
        """Images of the test, on all ranks."""
        return self._count

    def measured(self, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        """Of all ranks, in the order of the images."""
        found = self._ranks.every(super().measured(model))
        return [pair for pair in chain.from_iterable(zip_longest(*found)) if pair is not None]


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
