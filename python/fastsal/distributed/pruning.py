"""`prune` by several ranks: the way of one process, each rank with its share of the weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastsal.pruning.prune
from fastsal.data.batches import Batches, Pair
from fastsal.distributed.collecting import add_samples, collected
from fastsal.distributed.patterns import rank_pattern_shards
from fastsal.distributed.ranks import Ranks
from fastsal.distributed.sharding import Mine
from fastsal.distributed.sharing import (
    SharedCheckpoint,
    SharedExamination,
    SharedMeasure,
    in_order,
)
from fastsal.distributed.thresholds import rank_shards
from fastsal.distributed.whole_weights import gathered_bytes, whole_weights
from fastsal.fisher.parts import slices
from fastsal.fisher.statistics import Statistics, squared_gradients
from fastsal.pruning.compensation import moves
from fastsal.pruning.criteria import CRITERIA, score
from fastsal.pruning.criteria.scoring import score_tensors
from fastsal.pruning.damping import candidates_of
from fastsal.pruning.job import Job
from fastsal.pruning.limits.examination import Examination
from fastsal.pruning.limits.limit import Limit
from fastsal.pruning.masks.masks import Masks
from fastsal.pruning.measured import InMicroBatches
from fastsal.pruning.memory_use import use_by_pruning
from fastsal.pruning.prune import Makers, PruneResult
from fastsal.pruning.step import Plan


def prune(
    model: nn.Module,
    batches: Batches | None,
    sparsity: float | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    exchange: str = "rows",
    **options: Any,
) -> PruneResult:
    """Prune a model by several ranks; all of them end with the same masks and weights.

    Args:
        model: The same on every rank; one in `DistributedDataParallel`, or sharded by FSDP2
            (`fully_shard`), is taken as it is.
        batches: As for `fastsal.prune`; all ranks give the same, and each works on its part.
        sparsity: Fraction of the weights that goes.
        group: Of `torch.distributed`; None is all processes.
        exchange: As for `collect`; with sums masks may differ from those of one process where
            scores are equal but for rounding.
        options: Of `fastsal.prune`. A memory budget is that of each process, and a scratch folder
            may be a disk of its own machine. A checkpoint is written by rank 0 and must be seen by
            all.

    Returns:
        As `fastsal.prune`; scores are those of this rank's parts, by their keys. The last entry of
        the history has `ranks`: how many, the bytes that this one sent, by what they were, and the
        most that came to it at once.

    Raises:
        LostRankError: Another rank ended; from a checkpoint the same call goes on.
        InvalidArgument: An option is not taken; or as `fastsal.prune`.
    """
    ranks = Ranks(group)
    if ranks.rank:
        options["progress"] = False
    makers = Makers(
        partial(ShardedPlan, ranks=ranks),
        partial(ShardedJob, ranks=ranks, exchange=exchange),
        partial(SharedCheckpoint, ranks=ranks),
        partial(use_by_pruning, ranks=ranks.size, gathered=gathered_bytes(model)),
    )
    with whole_weights(model) as inner:
        result = fastsal.pruning.prune.prune(inner, batches, sparsity, _makers=makers, **options)
    result.history[-1]["ranks"] = {
        "size": ranks.size,
        "sent_bytes": dict(ranks.sent),
        "in_flight_bytes": ranks.in_flight,
    }
    return result


@dataclass(frozen=True)
class ShardedPlan(Plan):
    """A step of which each rank does its part.

    Weights alone, without statistics, every rank scores and prunes by itself, with the same result.

    Attributes:
        ranks: The processes.
    """

    ranks: Ranks | None = None

    def score(
        self, model: nn.Module, fisher: Statistics | None, masks: Masks | None, damping: float
    ) -> dict[str, Tensor]:
        """Scores of this rank's parts, by their keys."""
        if fisher is None or self.ranks is None:
            return super().score(model, fisher, masks, damping)
        mine = Mine.of(model, fisher, self.ranks)
        entry = CRITERIA[self.criterion]
        if entry.needs_fisher:
            before = slices(masks or {}, mine.parts)
            with self.ranks.failing_together(fisher):
                return score_tensors(mine.weights, fisher, entry, damping, before, self.seed)
        named = list(mine.shapes)
        every = score(model, None, self.criterion, masks=masks, parameters=named, seed=self.seed)
        return slices(every, mine.parts)

    def rank(
        self,
        model: nn.Module,
        fisher: Statistics | None,
        scores: Mapping[str, Tensor],
        goal: float | None,
        damping: float,
    ) -> Masks:
        """Masks of the whole model, the same on every rank."""
        if fisher is None or self.ranks is None:
            return super().rank(model, fisher, scores, goal, damping)
        mine = Mine.of(model, fisher, self.ranks)
        if self.ranking["pattern"] is None:
            how = {name: self.ranking[name] for name in ("scope", "floor")}
            return rank_shards(scores, mine.shares, mine.shapes, self.ranks, goal, **how)
        joint = self.joins_groups
        return rank_pattern_shards(
            mine, fisher, scores, goal, damping, self.ranks, joint=joint, **self.ranking
        )

    def move(
        self,
        model: nn.Module,
        fisher: Statistics | None,
        masks: Masks,
        damping: float,
        *,
        before: Masks | None = None,
    ) -> float | None:
        """Compensate this rank's parts and bring what all ranks found into the model."""
        if fisher is None or self.ranks is None or not self.compensate:
            return super().move(model, fisher, masks, damping, before=before)
        mine = Mine.of(model, fisher, self.ranks)
        with self.ranks.failing_together(fisher):
            moved, report = moves(
                mine.weights,
                fisher,
                slices(masks, mine.parts),
                damping,
                before=slices(before or {}, mine.parts),
                shelf=self.shelf,
            )
        for owner, share in enumerate(mine.shares):
            for part in share:
                is_own = owner == self.ranks.rank
                values = moved[part.key].reshape(-1) if is_own else torch.empty(len(part))
                values = self.ranks.give(values, owner, "weights")
                with torch.no_grad():
                    part.of(mine.parameters[part.name]).copy_(values)
                self.shelf.release()
        return float(sum(self.ranks.every(report.total)))

    def grid(self, fisher: Statistics) -> list[float]:
        """Dampings to try, from the mean squared gradient of all ranks' parts."""
        if self.ranks is None:
            return super().grid(fisher)
        totals = self.ranks.every(squared_gradients(fisher))
        return candidates_of(sum(t for t, _ in totals) / sum(n for _, n in totals))


@dataclass(frozen=True)
class ShardedJob(Job):
    """A job of which each rank does its part.

    Attributes:
        ranks: The processes.
        exchange: What they send each other.
    """

    ranks: Ranks | None = None
    exchange: str = "rows"

    def _measured(self, images: list[Pair]) -> InMicroBatches:
        """Micro-batches to measure a model on, dealt out to the ranks."""
        assert self.ranks is not None
        return SharedMeasure(super()._measured(self.ranks.dealt(images)), self.ranks)

    def _of_all(self, features: list[Tensor]) -> list[Tensor]:
        """Features of the micro-batches of all ranks."""
        assert self.ranks is not None
        return in_order(self.ranks.every([f.cpu() for f in features]))

    def _examination(self, images: list[Pair], limit: Limit) -> Examination:
        """The test of a limit, each rank on some batches."""
        assert self.ranks is not None
        return SharedExamination(self.model, images, limit, self.loss, ranks=self.ranks)

    def _collected(self, source: Iterable[Pair], options: dict[str, Any]) -> Statistics:
        assert self.ranks is not None
        return collected(self.ranks, self.model, source, exchange=self.exchange, **options)

    def _add(self, fisher: Statistics, images: list[Pair], options: dict[str, Any]) -> None:
        assert self.ranks is not None
        add_samples(self.ranks, fisher, self.model, images, exchange=self.exchange, **options)
