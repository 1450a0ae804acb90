"""`collect` and `prune` by several ranks: the ways of one process, with the sums shared out."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastsal.pruning
from fastsal.batches import Batches
from fastsal.checkpoint import Checkpoint
from fastsal.collection_work import Work, prepare
from fastsal.compensation import moves
from fastsal.criteria import CRITERIA, score
from fastsal.criteria.scoring import score_tensors
from fastsal.damping import candidates_of
from fastsal.distributed.costs import costs
from fastsal.distributed.exchange import add_sharded_pass, add_summed_pass
from fastsal.distributed.ranks import Ranks
from fastsal.distributed.sharding import shares
from fastsal.distributed.thresholds import rank_shards
from fastsal.distributed.whole_weights import whole_weights
from fastsal.errors import InvalidArgument
from fastsal.fisher import BlockFisher
from fastsal.holdout import Measured, Pair
from fastsal.masks import Masks
from fastsal.parts import Part, by_key, slices
from fastsal.passes import in_micro_batches
from fastsal.plan import Job, Outcome, Plan
from fastsal.progress import Report, reporter
from fastsal.pruning import Makers, PruneResult
from fastsal.sizes import gib
from fastsal.statistics_files import write_index

_LOG = logging.getLogger(__name__)


def collect(
    model: nn.Module,
    batches: Batches,
    *,
    group: dist.ProcessGroup | None = None,
    exchange: str = "rows",
    progress: bool | Report = False,
    **options: Any,
) -> BlockFisher:
    """Collect the statistics of a model, each rank the sums of its share of the weights.

    Args:
        model: The same on every rank; one in `DistributedDataParallel`, or sharded by FSDP2
            (`fully_shard`), is taken as it is.
        batches: As for `fastsal.collect`; all ranks give the same, and each works on its part.
        group: Of `torch.distributed`; None is all processes.
        exchange: `"rows"`: gradients go to the owners of sums; those are the sums of one process.
            `"sums"`: every rank sums the whole model over its samples first, which takes the
            memory of all statistics on each. `"auto"`: the fewer bytes, where `samples` is given
            (sums from more than `(block_size + 1) / 2` samples a rank on); the choice is logged.
        progress: On rank 0.
        options: Of `fastsal.collect`, but for a memory budget.

    Returns:
        Statistics of this rank's parts, by their keys: a name, or `name[start:stop]`.

    Raises:
        LostRankError: Another rank ended.
        InvalidArgument: `torch.distributed` is not set up; or as `fastsal.collect`.
    """
    ranks = Ranks(group)
    with whole_weights(model) as inner:
        return _collected(ranks, inner, batches, progress=progress, exchange=exchange, **options)


def save(
    fisher: BlockFisher, path: str | os.PathLike[str], *, group: dist.ProcessGroup | None = None
) -> None:
    """Write the statistics of all ranks, each its own shard, and an index.

    `fastsal.BlockFisher.load` reads the index, in one process.

    Args:
        fisher: From `collect`.
        path: The index; shards lie beside it, in a folder that all ranks see.
        group: As for `collect`.
    """
    ranks = Ranks(group)
    target = Path(path)
    names = [
        f"{target.stem}-{n + 1:05d}-of-{ranks.size:05d}.safetensors" for n in range(ranks.size)
    ]
    fisher.save(target.parent / names[ranks.rank])
    ranks.every(None)
    if ranks.rank == 0:
        write_index(target, names, list(fisher._whole or fisher.shapes))
    ranks.every(None)


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
        options: Of `fastsal.prune`, but for patterns, limits and a memory budget. A checkpoint is
            written by rank 0 and must be seen by all.

    Returns:
        As `fastsal.prune`; scores are those of this rank's parts, by their keys. The last entry of
        the history has `ranks`: how many, and the bytes that this one sent, by what they were.

    Raises:
        LostRankError: Another rank ended; from a checkpoint the same call goes on.
        InvalidArgument: An option is not taken; or as `fastsal.prune`.
    """
    for name in ("pattern", "max_loss_increase", "max_accuracy_drop", "memory_budget", "scratch"):
        if options.get(name) is not None:
            raise InvalidArgument(f"{name}: is not taken with several ranks yet; leave it out")
    ranks = Ranks(group)
    if ranks.rank:
        options["progress"] = False
    makers = Makers(
        partial(ShardedPlan, ranks=ranks),
        partial(ShardedJob, ranks=ranks, exchange=exchange),
        partial(SharedCheckpoint, ranks=ranks),
    )
    with whole_weights(model) as inner:
        result = fastsal.pruning.prune(inner, batches, sparsity, _makers=makers, **options)
    result.history[-1]["ranks"] = {"size": ranks.size, "sent_bytes": dict(ranks.sent)}
    return result


@dataclass(frozen=True)
class ShardedPlan(Plan):
    """A step of which each rank does its part.

    Attributes:
        ranks: The processes.
    """

    ranks: Ranks | None = None

    def step(
        self,
        model: nn.Module,
        fisher: BlockFisher | None,
        masks: Masks | None,
        goal: float | None,
        damping: float,
    ) -> Outcome:
        """Score this rank's parts, find one threshold, prune in place."""
        if fisher is None or fisher._shares is None or self.ranks is None:
            # Weights alone: every rank does it all, with the same result.
            return super().step(model, fisher, masks, goal, damping)
        ranks, all_shares = self.ranks, fisher._shares
        parts = by_key(all_shares[ranks.rank])
        owned = _owned(model, all_shares)
        shapes = {name: tuple(p.shape) for name, p in owned.items()}
        mine = slices(owned, parts)
        before = slices(masks, parts) if masks is not None else {}
        entry = CRITERIA[self.criterion]
        if entry.needs_fisher:
            scores = score_tensors(mine, fisher, entry, damping, before, self.seed)
        else:
            every = score(
                model, None, self.criterion, masks=masks, parameters=list(shapes), seed=self.seed
            )
            scores = slices(every, parts)
        ranking = {k: v for k, v in self.ranking.items() if k != "pattern"}
        new = rank_shards(scores, all_shares, shapes, ranks, goal, **ranking)
        increase = None
        if self.compensate:
            moved, report = moves(mine, fisher, slices(new, parts), damping, before=before)
            _exchange(ranks, all_shares, owned, moved)
            increase = sum(ranks.every(report.total))
        new.apply(model)
        return Outcome(scores, new, increase)

    def grid(self, fisher: BlockFisher) -> list[float]:
        """Dampings to try, from the mean squared gradient of all ranks' parts."""
        if self.ranks is None:
            return super().grid(fisher)
        totals = self.ranks.every(fisher._squares())
        return candidates_of(sum(t for t, _ in totals) / sum(n for _, n in totals))


def _owned(model: nn.Module, all_shares: Sequence[Sequence[Part]]) -> dict[str, nn.Parameter]:
    """The parameters that there are parts of, in order."""
    found = dict(model.named_parameters(remove_duplicate=False))
    names = dict.fromkeys(part.name for share in all_shares for part in share)
    return {name: found[name] for name in names}


def _exchange(
    ranks: Ranks,
    all_shares: Sequence[Sequence[Part]],
    owned: Mapping[str, nn.Parameter],
    moved: Mapping[str, Tensor],
) -> None:
    """Bring the moved weights of every rank into the model."""
    for owner, share in enumerate(all_shares):
        for part in share:
            values = moved[part.key] if owner == ranks.rank else torch.empty(len(part))
            values = ranks.give(values.reshape(-1), owner, "weights")
            with torch.no_grad():
                part.of(owned[part.name]).copy_(values)


@dataclass(frozen=True)
class ShardedJob(Job):
    """A job of which each rank does its part.

    Attributes:
        ranks: The processes.
        exchange: What they send each other.
    """

    ranks: Ranks | None = None
    exchange: str = "rows"

    def collect(self, source: Iterable[Pair], seed: int, *, quiet: bool = False) -> BlockFisher:
        """Statistics of this rank's share of the weights."""
        assert self.ranks is not None
        options = self.options(seed, quiet=quiet)
        return _collected(self.ranks, self.model, source, exchange=self.exchange, **options)

    def held_out(self, images: list[Pair], fisher: BlockFisher | None = None) -> Measured:
        """Images to measure a model on, each rank its part of them."""
        assert self.ranks is not None
        size = max(1, sum(len(x) for x, _ in images) // self.ranks.size)
        pieces = list(in_micro_batches(images, size, size))[self.ranks.rank :: self.ranks.size]
        mine = super().held_out(pieces, fisher) if pieces else None
        return SharedMeasure(mine, self.ranks)


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


def _collected(
    ranks: Ranks,
    model: nn.Module,
    batches: Batches,
    *,
    progress: bool | Report = False,
    exchange: str = "rows",
    **options: Any,
) -> BlockFisher:
    if exchange not in ("rows", "sums", "auto"):
        raise InvalidArgument(f"exchange: got {exchange!r}; takes 'rows', 'sums' or 'auto'")
    work = prepare(model, batches, **options)
    whole = work.fisher
    all_shares = shares(whole.shapes, whole.block_size, ranks.size)
    if min(map(len, all_shares)) == 0:
        raise InvalidArgument(
            f"group: {ranks.size} ranks are more than the model has blocks for; takes fewer"
        )
    parts = by_key(all_shares[ranks.rank])
    fisher = BlockFisher(
        {key: whole.shapes[p.name] if p.is_whole else (len(p),) for key, p in parts.items()},
        block_size=whole.block_size,
        precision=whole.precision,
    )
    fisher._shares, fisher._whole = all_shares, whole.shapes
    shown = progress if ranks.rank == 0 else False
    way = exchange if exchange != "auto" else _fewer_bytes(work, ranks)
    if way == "sums" and work.how.labels != "true":
        raise InvalidArgument("exchange: 'sums' takes labels='true'; drawn labels need 'rows'")
    add = add_summed_pass if way == "sums" else add_sharded_pass
    with reporter(shown, "statistics") as report:
        add(work.how, fisher, all_shares, ranks, work.source(), report)
    return fisher


def _fewer_bytes(work: Work, ranks: Ranks) -> str:
    """What to send: rows, or sums; the choice and its reason go into the log."""
    how = work.how
    if how.samples is None or how.labels != "true":
        return "rows"
    shapes = {name: tuple(p.shape) for name, p in how.chosen.items()}
    paper = costs(
        shapes,
        how.samples,
        ranks.size,
        block_size=work.fisher.block_size,
        micro_batch=how.micro_batch,
        step=how.step,
    )
    way = "sums" if paper.partial_sums < max(paper.rows) else "rows"
    _LOG.info(
        "exchange: %s, %s of rows or %s of partial sums a rank",
        *(way, gib(max(paper.rows)), gib(paper.partial_sums)),
    )
    return way
