"""Collect statistics by several ranks, each the sums of its own parts."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from fastsal.data.batches import Batches, Pair
from fastsal.distributed.exchange import add_sharded_pass, add_summed_pass
from fastsal.distributed.ranks import Ranks
from fastsal.distributed.whole_weights import whole_weights
from fastsal.errors import InvalidArgument
from fastsal.fisher.block_fisher import BlockFisher
from fastsal.fisher.collection.budget import sums_nbytes
from fastsal.fisher.collection.groups import add_in_groups, joining, placed
from fastsal.fisher.collection.prepare import prepare
from fastsal.fisher.collection.recollected import Recollected
from fastsal.fisher.collection.traffic import costs
from fastsal.fisher.collection.work import GroupPass, Work
from fastsal.fisher.files import write_index
from fastsal.fisher.memory_plan import PassMemory, Share
from fastsal.fisher.parts import Part, Parts, by_key, rows
from fastsal.fisher.shares import regrouped, shares
from fastsal.utils.choices import EXCHANGES, Exchange
from fastsal.utils.progress import Report, reporter
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
              those of one process.
            - `"sums"`: every process sums the whole model over its samples first, which takes the
              memory of all statistics in each.
            - `"auto"`: the one of fewer bytes, if `samples` is given: sums from more than
              `(block_size + 1) / 2` samples per process on. The choice is logged.
        progress: Whether rank 0 shows a progress bar, or a function `(done, total)`.
        options: Other arguments of `fastsal.collect`. A memory budget is that of each process, and
            a scratch folder may be on a disk of its own machine.

    Returns:
        The statistics of this process's parts. A part is a parameter, or its weights from `start`
        to `stop`, with the key `name[start:stop]`.

    Raises:
        LostRankError: Another process ended.
        InvalidArgument: `torch.distributed` is not initialized, or as `fastsal.collect`.
    """
    ranks = Ranks(group)
    with whole_weights(model) as inner:
        return collected(ranks, inner, batches, progress=progress, exchange=exchange, **options)


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
        InvalidArgument: `torch.distributed` is not initialized.
    """
    ranks = Ranks(group)
    target = Path(path)
    names = [
        f"{target.stem}-{n + 1:05d}-of-{ranks.size:05d}.safetensors" for n in range(ranks.size)
    ]
    fisher.save(target.parent / names[ranks.rank])
    ranks.all_gather(None)
    if ranks.rank == 0:
        write_index(target, names, list(fisher._whole or fisher.shapes))
    ranks.all_gather(None)


def collected(
    ranks: Ranks,
    model: nn.Module,
    batches: Batches,
    *,
    progress: bool | Report = False,
    exchange: str = "rows",
    by_rows: bool = False,
    **options: Any,
) -> BlockFisher:
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
    whole, plan = work.fisher, work.plan
    most = share.longest(work.how.micro_batch, whole.block_size, plan.budget)
    unit = rows(whole.shapes, whole.block_size) if by_rows else None
    groups = [
        shares(group, whole.block_size, ranks.size, unit=unit, most=most) for group in plan.groups
    ]
    all_shares = [[p for group in groups for p in group[rank]] for rank in range(ranks.size)]
    if min(map(len, all_shares)) == 0:
        raise InvalidArgument(
            f"group must have at most one process for each block of the model, got {ranks.size}"
        )
    fisher = whole._empty(by_key(all_shares[ranks.rank]))
    fisher._shares, fisher._whole, fisher._plan = all_shares, whole.shapes, whole._plan
    shown = progress if ranks.rank == 0 else False
    own = [_own(group[ranks.rank]) for group in groups]
    return placed(replace(work, fisher=fisher), own, _together(groups, ranks, way), shown)


def add_samples(
    ranks: Ranks,
    fisher: BlockFisher,
    model: nn.Module,
    batches: list[Pair],
    *,
    progress: bool | Report = False,
    exchange: str = "rows",
    **options: Any,
) -> None:
    """Add samples to statistics that were collected within a memory budget, in place."""
    work, plan = joining(fisher, model, batches, **options)
    assert fisher._shares is not None
    if isinstance(fisher, Recollected):
        fisher._join(work)
        return
    if work.how.curvature != "empirical":
        exchange = "rows"
    way = exchange if exchange != "auto" else _fewer_bytes(work, ranks)
    samples = work.how.samples
    groups = regrouped(fisher._shares, lambda p: sums_nbytes(fisher, p, samples), plan.spare)
    own = [_own(group[ranks.rank]) for group in groups]
    with reporter(progress if ranks.rank == 0 else False, "statistics") as report:
        add_in_groups(work, own, _together(groups, ranks, way), report)


def _together(groups: Sequence[list[list[Part]]], ranks: Ranks, way: str) -> GroupPass:
    """Return the passes of all ranks, each for one group of parts."""
    add_shared = add_summed_pass if way == "sums" else add_sharded_pass

    def add(work: Work, some: BlockFisher, number: int, report: Report) -> None:
        add_shared(work.how, some, groups[number], ranks, work.source(), report)

    return add


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
        block_size=work.fisher.block_size,
        micro_batch=how.micro_batch,
        step=how.step,
    )
    way = "sums" if paper.partial_sums < max(paper.rows) else "rows"
    _LOG.info(
        "exchange: %s (per rank: %s of rows, %s of partial sums)",
        *(way, gib(max(paper.rows)), gib(paper.partial_sums)),
    )
    return way
