"""The operations of a pruning that differ between one process and a distributed job."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from fastsal.data.batches import Pair, in_micro_batches
from fastsal.fisher.block_fisher import BlockFisher
from fastsal.fisher.collection.groups import add_samples, collected
from fastsal.fisher.memory_plan import Use
from fastsal.models.selection import model_parameters
from fastsal.pruning.checkpoint import Checkpoint
from fastsal.pruning.compensation import moves
from fastsal.pruning.criteria import score
from fastsal.pruning.damping import mean_diagonal
from fastsal.pruning.limits.examination import Examination, LossFunction
from fastsal.pruning.limits.limit import Limit
from fastsal.pruning.masks.joint import rank_pattern
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.masks.ranking import rank
from fastsal.pruning.measured import Measured
from fastsal.pruning.memory_use import use_by_pruning
from fastsal.pruning.recipe import Recipe
from fastsal.pruning.shelf import Shelf, restore


class Process:
    """A process that prunes alone, with the statistics and weights of the whole model.

    `fastsal.distributed` has a subclass for one of several processes. It computes a part of each
    result and exchanges it with the others; all processes get the same masks and weights.
    """

    def collect(self, model: nn.Module, batches: Iterable[Pair], **options: Any) -> BlockFisher:
        """Collect statistics, with the options of `fastsal.collect`."""
        return collected(model, batches, **options)

    def add_samples(
        self, fisher: BlockFisher, model: nn.Module, batches: list[Pair], **options: Any
    ) -> None:
        """Add samples to statistics that were collected within a memory budget, in place."""
        add_samples(fisher, model, batches, **options)

    def mean_diagonal(self, fisher: BlockFisher) -> float:
        """Return the mean diagonal of F over the whole model."""
        return mean_diagonal(fisher)

    def score(
        self,
        model: nn.Module,
        fisher: BlockFisher | None,
        recipe: Recipe,
        masks: Masks | None,
        damping: float,
    ) -> dict[str, Tensor]:
        """Return the scores of the weights that this process has statistics of."""
        named: dict[str, Any] = {} if fisher is not None else {"parameters": recipe.parameters}
        criterion: Any = recipe.criterion
        return score(model, fisher, criterion, damping, masks=masks, seed=recipe.seed, **named)

    def choose_masks(
        self,
        model: nn.Module,
        fisher: BlockFisher | None,
        recipe: Recipe,
        scores: Mapping[str, Tensor],
        goal: float | None,
        damping: float,
    ) -> Masks:
        """Return the masks of the whole model: by scores or, for a pattern, by joint costs.

        Args:
            model: The model.
            fisher: Its statistics.
            recipe: How to prune.
            scores: What `score` returned.
            goal: Sparsity; None where a pattern fixes it.
            damping: Absolute `λ`.
        """
        if fisher is not None and recipe.joins_groups:
            return rank_pattern(model, fisher, sparsity=goal, damping=damping, **recipe.ranking)
        return rank(scores, goal, **recipe.ranking)

    def compensate(
        self,
        model: nn.Module,
        fisher: BlockFisher,
        masks: Masks,
        damping: float,
        *,
        before: Masks | None,
        shelf: Shelf,
    ) -> float:
        """Update the kept weights in place; returns the predicted increase of the loss."""
        owned = model_parameters(model, fisher.shapes)
        moved, report = moves(owned, fisher, masks, damping, before=before, shelf=shelf)
        restore(owned, moved, shelf)
        return report.total

    def held_out(self, images: list[Pair], prepare: Callable[[list[Pair]], Measured]) -> Measured:
        """Return held-out images that models are measured on; `prepare` computes their targets."""
        return prepare(images)

    def examination(
        self,
        model: nn.Module,
        images: list[Pair],
        limit: Limit,
        loss: LossFunction,
        micro_batch: int | None,
    ) -> Examination:
        """Return the test of a limit, in batches of at most `micro_batch` images."""
        if micro_batch is not None:
            images = list(in_micro_batches(images, micro_batch, micro_batch))
        return Examination(model, images, limit, loss)

    def checkpoint(self, path: str | os.PathLike[str], asked: Mapping[str, Any]) -> Checkpoint:
        """Return the checkpoint of a run."""
        return Checkpoint(path, asked)

    def memory_use(self, chosen: Mapping[str, nn.Parameter], **how: Any) -> Use:
        """Return the memory that pruning uses in addition to the statistics."""
        return use_by_pruning(chosen, **how)
