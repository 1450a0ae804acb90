"""Collect statistics by several ranks, each the sums of its own parts."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import nn

from fastsal.data.batches import Batches, Pair, Source
from fastsal.data.unpacking import BatchRule, ruled
from fastsal.distributed.exchange import add_sharded_pass, add_summed_pass
from fastsal.distributed.ranks import Ranks
from fastsal.distributed.sharding import ShardedStatistics
from fastsal.distributed.whole_weights import whole_weights
from fastsal.errors import DataError, InvalidArgument
from fastsal.fisher.block_fisher import BlockFisher, sums_of
from fastsal.fisher.collection.budget import sums_nbytes
from fastsal.fisher.collection.groups import join, run
from fastsal.fisher.collection.prepare import prepare
from fastsal.fisher.collection.traffic import costs
from fastsal.fisher.collection.work import Passes, Work
from fastsal.fisher.files import shard_name, write_index
from fastsal.fisher.memory_plan import PassMemory, Share
from fastsal.fisher.model_sums import ModelSums, Origin
from fastsal.fisher.parts import Part, Parts, by_key, row_unit
from fastsal.fisher.shares import regrouped, shares
from fastsal.fisher.statistics import Collected, Statistics
from fastsal.models.classifier import using_head
from fastsal.models.input_axis import layer_axes
from fastsal.utils.choices import EXCHANGES, Exchange
from fastsal.utils.paths import user_path
from fastsal.utils.progress import Report
from fastsal.utils.sizes import gib
from fastsal.utils.suggestions import check_choice

_LOG = logging.getLogger(__name__)


def collect(
    model: nn.Module,
    batches: Batches,
    *,
    group: dist.ProcessGroup | None = None,
    exchange: Exchange = "rows",
    progress: bool | Report = False,
    batch: BatchRule | None = None,
    **options: Any,
) -> BlockFisher:
    """Collect the statistics of a model by several processes, each those of its own parts.

    Every process must call it with the same arguments, after
    `torch.distributed.init_process_group`.

    Args:
        model: The model, with the same weights in every process. It may be wrapped in
            `DistributedDataParallel`, or sharded by FSDP2 (`fully_shard`) or tensor parallelism.
        batches: Pairs `(images, labels)`, the same in every process; each works on its part of
            them. See `fastsal.collect`.
        group: Process group of `torch.distributed`; None is all processes.
        exchange: What processes send each other:

            - `"rows"`: the gradients of single samples, to the owner of their sums. The sums are
              those of one process that runs PyTorch with as many threads as each of these.
            - `"sums"`: every process sums the whole model over its samples first, which needs the
              memory of all statistics in each.
            - `"auto"`: the one of fewer bytes, if `samples` is given: sums from more than
              `(block_size + 1) / 2` samples per process on. The choice is logged.
        progress: Whether rank 0 shows a progress bar, or a function `(done, total)`.
        batch: Function from a batch to `(images, labels)`, for batches of another form.
        options: Other arguments of `fastsal.collect`. A memory budget is that of each process, and
            a scratch folder may be on a disk of its own machine.

    Returns:
        The statistics of this process's parts. A part is a parameter, or its weights from `start`
        to `stop`, with the key `name[start:stop]`.

    Raises:
        LostRankError: Another process ended.
        FailedRankError: Another process failed; if its error is one of fastsal, all raise that.
        InvalidArgument: `torch.distributed` is not initialized, an argument is not the same in
            every process, or as `fastsal.collect`.
    """
    ranks = Ranks(group)
    batches = ruled(batches, batch)
    head = options.pop("head", None)
    with (
        whole_weights(model) as inner,
        using_head(inner, head),
        ranks.together("collect"),
    ):
        ranks.check_same(same_arguments(exchange=exchange, head=head, **options))
        found = collected(ranks, inner, batches, progress=progress, exchange=exchange, **options)
    assert isinstance(found.own, Collected)  # without a `use`, the sums are always stored
    return found.own.fisher


def save(
    fisher: BlockFisher, path: str | os.PathLike[str], *, group: dist.ProcessGroup | None = None
) -> None:
    """Write the statistics of all processes: a shard from each, and an index.

    `fastsal.BlockFisher.load` reads the index in a single process.

    Args:
        fisher: The statistics that `collect` returned in this process.
        path: The index file. Shards are written to the same folder, which all processes must share.
        group: Process group of `torch.distributed`; None is all processes.

    Raises:
        LostRankError: Another process ended.
        FailedRankError: Another process could not write its file.
        InvalidArgument: `torch.distributed` is not initialized.
    """
    ranks = Ranks(group)
    target = user_path(path)
    names = [shard_name(target, n + 1, ranks.size) for n in range(ranks.size)]
    with ranks.together("save"):
        fisher.save(target.parent / names[ranks.rank])
    with ranks.together("save of the index"):
        if ranks.rank == 0:
            origin = sums_of(fisher).origin
            write_index(target, names, list(origin.shapes if origin else fisher.shapes))


def same_arguments(**options: Any) -> dict[str, Any]:
    """Return the arguments that must be the same in every process."""
    # Only rank 0 shows progress, and folders may have another path on another machine.
    own = ("progress", "scratch", "checkpoint")
    return {name: value for name, value in options.items() if name not in own}


def collected(
    ranks: Ranks,
    model: nn.Module,
    batches: Batches,
    *,
    progress: bool | Report = False,
    exchange: str = "rows",
    by_rows: bool = False,
    **options: Any,
) -> ShardedStatistics:
    """Collect as `collect` does, from a plain model.

    Args:
        ranks: The processes.
        model: The model, neither wrapped nor sharded.
        batches: Images and labels.
        progress: Whether rank 0 shows a progress bar, or a function `(done, total)`.
        exchange: What ranks send each other.
        by_rows: Whether parts are cut between rows of axis 0, so that groups of patterns are whole.
        options: Other arguments of `fastsal.collect`.
    """
    check_choice("exchange", exchange, EXCHANGES)
    if options.get("curvature", "empirical") != "empirical":
        if exchange == "sums":
            raise InvalidArgument(
                "exchange must be 'rows' with curvature='sampled' or 'features', got 'sums'"
            )
        exchange = "rows"
    share = Share(ranks.size, sums_first=exchange != "rows", agree=partial(_most, ranks))
    work = prepare(model, batches, share=share, by_rows=by_rows, **options)
    way = exchange if exchange != "auto" else _fewer_bytes(work, ranks)
    whole, plan = work.sums, work.plan
    most = share.longest(work.how.micro_batch, whole.block_size, plan.budget)
    unit = None
    if by_rows:
        unit = row_unit(whole.shapes, whole.block_size, layer_axes(model, whole.shapes))
    groups = [
        shares(group, whole.block_size, ranks.size, unit=unit, most=most) for group in plan.groups
    ]
    all_shares = [[p for group in groups for p in group[rank]] for rank in range(ranks.size)]
    if min(map(len, all_shares)) == 0:
        raise InvalidArgument(
            f"group must have at most one process for each block of the model, got {ranks.size}"
        )
    parts = by_key(all_shares[ranks.rank])
    sums = whole.like(parts)
    sums.origin = Origin(parts, whole.shapes)
    shown = progress if ranks.rank == 0 else False
    own = run(replace(work, sums=sums), _together(groups, ranks, way), shown)
    return ShardedStatistics(own, all_shares, whole.shapes)


def add_samples(
    ranks: Ranks,
    statistics: Statistics,
    model: nn.Module,
    batches: Iterable[Pair],
    *,
    progress: bool | Report = False,
    exchange: str = "rows",
    **options: Any,
) -> None:
    """Add samples to statistics that were collected within a memory budget, in place."""
    assert isinstance(statistics, ShardedStatistics)
    shares = statistics.shares

    def passes(work: Work) -> Passes:
        samples = work.how.samples
        groups = regrouped(shares, lambda p: sums_nbytes(work.sums, p, samples), work.plan.spare)
        chosen = exchange if work.how.curvature == "empirical" else "rows"
        way = chosen if chosen != "auto" else _fewer_bytes(work, ranks)
        return _together(groups, ranks, way)

    shown = progress if ranks.rank == 0 else False
    join(statistics.own, model, batches, passes, shown, **options)


def _together(groups: Sequence[list[list[Part]]], ranks: Ranks, way: str) -> Passes:
    """Return the passes of all ranks, each for one group of parts."""
    add_shared = add_summed_pass if way == "sums" else add_sharded_pass

    def add(work: Work, sums: ModelSums, number: int, report: Report) -> None:
        add_shared(work.how, sums, groups[number], ranks, work.source(), report)
        _check_images(ranks, work.source)

    return Passes([_own(group[ranks.rank]) for group in groups], add)


def _check_images(ranks: Ranks, source: Source) -> None:
    """Raise DataError unless all ranks iterated over the same images."""
    seen = ranks.all_gather(None if source.seen is None else source.seen.value())
    if len(set(seen)) > 1:
        raise DataError(
            "batches must be the same on every rank, got other images or another order; shuffle "
            "with the same seed on every rank"
        )


def _own(parts: Sequence[Part]) -> Parts:
    # In the statistics of this rank, every part is a whole parameter.
    return {p.key: Part(p.key, 0, len(p), len(p)) for p in parts}


def _most(ranks: Ranks, memory: PassMemory) -> PassMemory:
    """Return the largest measurement of all ranks, so that all make the same plan."""
    found = ranks.all_gather((memory.fixed, memory.sample))
    return PassMemory(max(fixed for fixed, _ in found), max(sample for _, sample in found))


def _fewer_bytes(work: Work, ranks: Ranks) -> str:
    """Return which of rows and sums is fewer bytes, and log the reason."""
    how = work.how
    if how.samples is None:
        return "rows"
    shapes = {name: tuple(p.shape) for name, p in how.chosen.items()}
    paper = costs(
        shapes,
        how.samples,
        ranks.size,
        block_size=work.sums.block_size,
        micro_batch=how.micro_batch,
        step=how.step,
    )
    way = "sums" if paper.partial_sums < max(paper.rows) else "rows"
    _LOG.info(
        "exchange: %s (per rank: %s of rows, %s of partial sums)",
        *(way, gib(max(paper.rows)), gib(paper.partial_sums)),
    )
    return way
