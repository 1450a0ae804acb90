"""The operations of a pruning that differ between one process and a distributed job."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from fastsal.data.batches import Pair
from fastsal.data.content import SeenImages
from fastsal.fisher.collection.groups import add_samples, collected
from fastsal.fisher.memory_plan import Use
from fastsal.fisher.statistics import Statistics
from fastsal.gradients.losses import LossFunction
from fastsal.models.selection import model_parameters
from fastsal.pruning.checkpoint import Checkpoint
from fastsal.pruning.compensation import moves
from fastsal.pruning.criteria import score
from fastsal.pruning.damping import mean_diagonal
from fastsal.pruning.limits.examination import Examination
from fastsal.pruning.limits.limit import Limit
from fastsal.pruning.masks.joint import rank_pattern
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.masks.ranking import rank
from fastsal.pruning.masks.shares import Sparsity
from fastsal.pruning.measured import InMicroBatches, Measured
from fastsal.pruning.memory_use import use_by_pruning
from fastsal.pruning.recipe import Recipe
from fastsal.pruning.shelf import Shelf, restore


class Process:
    """A process that prunes alone, with the statistics and weights of the whole model.

    `fastsal.distributed` has a subclass for one of several processes. It computes a part of each
    result and exchanges it with the others; all processes get the same masks and weights.
    """

    def collect(self, model: nn.Module, batches: Iterable[Pair], **options: Any) -> Statistics:
        """Collect statistics, with the options of `fastsal.collect`."""
        return collected(model, batches, **options)

    def add_samples(
        self, fisher: Statistics, model: nn.Module, batches: Iterable[Pair], **options: Any
    ) -> None:
        """Add samples to statistics that were collected within a memory budget, in place."""
        add_samples(fisher, model, batches, **options)

    def mean_diagonal(self, fisher: Statistics) -> float:
        """Return the mean diagonal of F over the whole model."""
        return mean_diagonal(fisher)

    def score(
        self,
        model: nn.Module,
        fisher: Statistics | None,
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
        fisher: Statistics | None,
        recipe: Recipe,
        scores: Mapping[str, Tensor],
        goal: Sparsity | None,
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
        return rank(scores, goal, model=model, **recipe.ranking)

    def compensate(
        self,
        model: nn.Module,
        fisher: Statistics,
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

    def held_out(
        self, batches: Iterable[Pair], prepare: Callable[[Iterable[Pair]], InMicroBatches]
    ) -> Measured:
        """Return held-out micro-batches that models are measured on.

        Args:
            batches: Micro-batches of the whole job, the same in every iteration.
            prepare: Computes the targets of the micro-batches that this process measures.
        """
        return prepare(batches)

    def all_features(self, features: list[Tensor]) -> list[Tensor]:
        """Return the features of all micro-batches, from those that this process measures."""
        return features

    def examination(
        self,
        model: nn.Module,
        batches: Iterable[Pair],
        limit: Limit,
        loss: LossFunction,
        *,
        seed: int,
    ) -> Examination:
        """Return the test of a limit."""
        return Examination(model, batches, limit, loss, seed=seed)

    def checkpoint(
        self, path: str | os.PathLike[str], asked: Mapping[str, Any], rest: str, seen: SeenImages
    ) -> Checkpoint:
        """Return the checkpoint of a run, with the arguments of `Checkpoint`."""
        return Checkpoint(path, asked, rest, seen)

    def memory_use(self, chosen: Mapping[str, nn.Parameter], **how: Any) -> Use:
        """Return the memory that pruning uses in addition to the statistics."""
        return use_by_pruning(chosen, **how)
