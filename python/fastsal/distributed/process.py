"""One process of a pruning job: it computes its share and exchanges results with the others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastsal.data.batches import Pair
from fastsal.data.content import SeenImages
from fastsal.data.held_out import Repeated
from fastsal.distributed.collecting import add_samples, collected
from fastsal.distributed.pattern_masks import pattern_masks_of_shards
from fastsal.distributed.ranks import Ranks
from fastsal.distributed.sharding import Mine
from fastsal.distributed.sharing import (
    SharedCheckpoint,
    SharedExamination,
    SharedMeasure,
    in_order,
)
from fastsal.distributed.thresholds import masks_of_shards
from fastsal.fisher.memory_plan import Use
from fastsal.fisher.parts import slices
from fastsal.fisher.statistics import Statistics, squared_gradients
from fastsal.gradients.losses import LossFunction
from fastsal.gradients.precision import row_dtype
from fastsal.models.input_axis import layer_axes
from fastsal.pruning.checkpoint import Checkpoint
from fastsal.pruning.compensation import moves
from fastsal.pruning.criteria import CRITERIA
from fastsal.pruning.criteria.scoring import score_tensors
from fastsal.pruning.limits.examination import Examination
from fastsal.pruning.limits.limit import Limit
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.masks.shares import Sparsity
from fastsal.pruning.measured import InMicroBatches, Measured
from fastsal.pruning.memory_use import use_by_pruning
from fastsal.pruning.process import Process
from fastsal.pruning.recipe import Recipe
from fastsal.pruning.shelf import Shelf
from fastsal.utils.choices import Exchange


class RankProcess(Process):
    """One of several processes that prune a model together.

    Where no statistics are needed, every process scores and prunes the whole model by itself, with
    the same result.

    Args:
        ranks: The processes.
        exchange: What they send each other, see `fastsal.distributed.collect`.
        gathered: Bytes of sharded weights that are gathered while the model is pruned.
    """

    def __init__(self, ranks: Ranks, exchange: Exchange = "rows", gathered: int = 0) -> None:
        self._ranks = ranks
        self._exchange = exchange
        self._gathered = gathered

    def collect(self, model: nn.Module, batches: Iterable[Pair], **options: Any) -> Statistics:
        """Collect the statistics of this process's parts."""
        return collected(self._ranks, model, batches, exchange=self._exchange, **options)

    def add_samples(
        self, fisher: Statistics, model: nn.Module, batches: Iterable[Pair], **options: Any
    ) -> None:
        """Add samples to the statistics of this process's parts, in place."""
        add_samples(self._ranks, fisher, model, batches, exchange=self._exchange, **options)

    def mean_diagonal(self, fisher: Statistics) -> float:
        """Return the mean diagonal of F over the whole model."""
        totals = self._ranks.all_gather(squared_gradients(fisher))
        return float(sum(t for t, _ in totals) / sum(n for _, n in totals))

    def score(
        self,
        model: nn.Module,
        fisher: Statistics | None,
        recipe: Recipe,
        masks: Masks | None,
        damping: float,
    ) -> dict[str, Tensor]:
        """Return the scores of this process's parts, by their keys."""
        if fisher is None:
            return super().score(model, fisher, recipe, masks, damping)
        mine = Mine.of(model, fisher, self._ranks)
        entry = CRITERIA[recipe.criterion]
        if entry.needs_fisher:
            before = slices(masks or {}, mine.parts)
            with self._ranks.together("scores"):
                return score_tensors(mine.weights, fisher, entry, damping, before, recipe.seed)
        kept = {name: masks[name] for name in mine.shapes if name in masks} if masks else {}
        every = score_tensors(mine.parameters, None, entry, damping, kept, recipe.seed)
        return slices(every, mine.parts)

    def choose_masks(
        self,
        model: nn.Module,
        fisher: Statistics | None,
        recipe: Recipe,
        scores: Mapping[str, Tensor],
        goal: Sparsity | None,
        damping: float,
    ) -> Masks:
        """Return the masks of the whole model, the same in every process."""
        if fisher is None:
            return super().choose_masks(model, fisher, recipe, scores, goal, damping)
        mine = Mine.of(model, fisher, self._ranks)
        if recipe.ranking["pattern"] is None:
            how = {name: value for name, value in recipe.ranking.items() if name != "pattern"}
            return masks_of_shards(scores, mine.shares, mine.shapes, self._ranks, goal, **how)
        return pattern_masks_of_shards(
            mine,
            fisher,
            scores,
            goal,
            damping,
            self._ranks,
            axes=layer_axes(model, mine.shapes),
            joint=recipe.joins_groups,
            **recipe.ranking,
        )

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
        """Update the kept weights of this process's parts, and copy those of the others."""
        mine = Mine.of(model, fisher, self._ranks)
        with self._ranks.together("compensation"):
            moved, report = moves(
                mine.weights,
                fisher,
                slices(masks, mine.parts),
                damping,
                before=slices(before or {}, mine.parts),
                shelf=shelf,
            )
        for owner, share in enumerate(mine.shares):
            for part in share:
                whole = mine.parameters[part.name]
                is_own = owner == self._ranks.rank
                there = torch.empty(
                    0 if is_own else len(part), dtype=row_dtype(whole), device="cpu"
                )
                values = moved[part.key].reshape(-1) if is_own else there
                values = self._ranks.broadcast(values, owner, "weights")
                with torch.no_grad():
                    part.of(whole).copy_(values)
                shelf.release()
        return float(sum(self._ranks.all_gather(report.total)))

    def held_out(
        self, batches: Iterable[Pair], prepare: Callable[[Iterable[Pair]], InMicroBatches]
    ) -> Measured:
        """Return held-out micro-batches, of which each process measures some."""
        return SharedMeasure(prepare(Repeated(lambda: self._ranks.dealt(batches))), self._ranks)

    def all_features(self, features: list[Tensor]) -> list[Tensor]:
        """Return the features of the micro-batches of all processes, in order."""
        return in_order(self._ranks.all_gather([f.cpu() for f in features]))

    def examination(
        self,
        model: nn.Module,
        batches: Iterable[Pair],
        limit: Limit,
        loss: LossFunction,
        *,
        seed: int,
    ) -> Examination:
        """Return the test of a limit, in which each process measures some batches."""
        return SharedExamination(model, batches, limit, loss, seed=seed, ranks=self._ranks)

    def checkpoint(
        self, path: str | os.PathLike[str], asked: Mapping[str, Any], rest: str, seen: SeenImages
    ) -> Checkpoint:
        """Return the checkpoint of the job, which rank 0 writes."""
        return SharedCheckpoint(path, asked, rest, seen, ranks=self._ranks)

    def memory_use(self, chosen: Mapping[str, nn.Parameter], **how: Any) -> Use:
        """Return the memory that this process uses in addition to the statistics."""
        return use_by_pruning(chosen, ranks=self._ranks.size, gathered=self._gathered, **how)
