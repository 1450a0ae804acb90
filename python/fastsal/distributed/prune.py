"""`prune` by several processes: as by one, each with its share of the weights."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import nn

from fastsal.data.batches import Batches
from fastsal.distributed.collecting import same_arguments
from fastsal.distributed.process import RankProcess
from fastsal.distributed.ranks import Ranks
from fastsal.distributed.whole_weights import gathered_bytes, whole_weights
from fastsal.errors import InvalidArgument
from fastsal.pruning.arguments import Arguments
from fastsal.pruning.history import RankTraffic
from fastsal.pruning.masks.shares import Sparsity
from fastsal.pruning.prune import prune as prune_alone
from fastsal.pruning.prune import prune_with
from fastsal.pruning.prune_result import PruneResult
from fastsal.utils.choices import EXCHANGES, Exchange
from fastsal.utils.suggestions import check_choice


def prune(
    model: nn.Module,
    batches: Batches | None,
    sparsity: Sparsity | None = None,
    *,
    group: dist.ProcessGroup | None = None,
    exchange: Exchange = "rows",
    **options: Any,
) -> PruneResult:
    """Prune a model in place by several processes, all of which get the same masks and weights.

    Every process must call it with the same arguments, after
    `torch.distributed.init_process_group`.

    Args:
        model: The model, with the same weights in every process. It may be wrapped in
            `DistributedDataParallel`, or sharded by FSDP2 (`fully_shard`) or tensor parallelism.
        batches: Pairs `(images, labels)`, the same in every process; each works on its part of
            them. See `fastsal.prune`.
        sparsity: Fraction of the weights to prune, in `[0, 1]`, or patterns and fractions.
        group: Process group of `torch.distributed`; None is all processes.
        exchange: What processes send each other: `"rows"`, `"sums"` or `"auto"`, see `collect`.
            With sums, masks may differ from those of one process where scores differ by rounding
            only.
        options: Other arguments of `fastsal.prune`. A memory budget is that of each process, and a
            scratch folder may be on a disk of its own machine. The checkpoint is written by rank 0
            and must be readable by all.

    Returns:
        As `fastsal.prune` returns; scores are those of this process's parts: a parameter, or its
        weights from `start` to `stop`, with the key `name[start:stop]`. The last round of the
        history has `ranks`, the traffic of this process.

    Raises:
        LostRankError: Another process ended; rerun the same call with a checkpoint to resume.
        FailedRankError: Another process failed; if its error is one of fastsal, all raise that. The
            model has its original weights in every process.
        InvalidArgument: `torch.distributed` is not initialized, an argument is not the same in
            every process, or as `fastsal.prune`.
    """
    check_choice("exchange", exchange, EXCHANGES)
    ranks = Ranks(group)
    if ranks.rank:
        options["progress"] = False
    process = RankProcess(ranks, exchange, gathered_bytes(model))
    with whole_weights(model) as inner, ranks.together("prune"):
        if ranks.size > 1:
            _check_alone(options, ranks.size)
        ranks.check_same(same_arguments(sparsity=sparsity, exchange=exchange, **options))
        call = inspect.signature(prune_alone).bind(inner, batches, sparsity, **options)
        call.apply_defaults()
        result = prune_with(process, Arguments(**call.arguments))
    traffic = RankTraffic(ranks.size, dict(ranks.sent), ranks.in_flight)
    result.history[-1] = replace(result.history[-1], ranks=traffic)
    return result


def _check_alone(options: dict[str, Any], size: int) -> None:
    """Disable what runs in one process only; raise InvalidArgument if it is asked for."""
    for name in ("refit", "reconstruct"):
        if options.get(name):
            raise InvalidArgument(
                f"{name} must be None with {size} processes, got {options[name]!r}; use "
                f"fastsal.{name} on the pruned model in one process"
            )
    options["reconstruct"] = False
