"""Statistics from images: what is to be done, within what memory, and doing it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fastsal.data.batches import Batches, Source, check_again, check_samples
from fastsal.data.held_out import Pair
from fastsal.errors import InvalidArgument
from fastsal.fisher.block_fisher import BlockFisher
from fastsal.fisher.collection.budget import (
    MemoryPlan,
    Share,
    Use,
    groups_within,
    plan_within,
    sums_nbytes,
    unlimited,
)
from fastsal.fisher.collection.passes import Gradients, add_pass
from fastsal.fisher.collection.recollected import GroupPass, Recollected
from fastsal.fisher.parts import Parts, by_key, rows, whole
from fastsal.fisher.sinks.gathering import step_rows
from fastsal.gradients import choose_micro_batch, select_parameters
from fastsal.gradients.losses import LossFunction
from fastsal.pruning.measured import without_classifier
from fastsal.utils.mapped_files import FileArrays, trim_heap
from fastsal.utils.progress import Report, reporter
from fastsal.utils.sizes import parse_bytes


@dataclass(frozen=True)
class Work:
    """Statistics that are to be collected.

    Attributes:
        how: How gradients are formed and summed.
        plan: How memory is used.
        fisher: Empty statistics, in their place.
        source: The images.
    """

    how: Gradients
    plan: MemoryPlan
    fisher: BlockFisher
    source: Source


def prepare(
    model: nn.Module,
    batches: Batches,
    *,
    block_size: int | None = 64,
    samples: int | None = None,
    loss: str | LossFunction = "cross-entropy",
    labels: str = "true",
    parameters: str | Sequence[str] | None = None,
    memory_budget: int | str | None = None,
    scratch: str | os.PathLike[str] | None = None,
    scratch_budget: int | str | None = None,
    seed: int = 0,
    precision: str = "float32",
    micro_batch: int | None = None,
    autocast: torch.dtype | None = None,
    loss_scale: float | None = None,
    use: Use | None = None,
    by_rows: bool = False,
    is_dry: bool = False,
    share: Share | None = None,
) -> Work:
    """Check what `collect` was given and plan it.

    `use` and `share` are as for `plan_within`; `by_rows` says that parts are to end with rows of
    axis 0, `is_dry` that the work is not to be done.
    """
    check_samples(samples)
    if micro_batch is not None and micro_batch < 1:
        raise InvalidArgument(f"micro_batch: takes 1 or more, got {micro_batch}")
    chosen = select_parameters(model, parameters)
    source = Source(batches, samples, labels)
    if labels == "features":
        chosen = without_classifier(model, chosen, parameters, source.first()[0])
    fisher = BlockFisher(
        {name: tuple(p.shape) for name, p in chosen.items()},
        block_size=block_size,
        precision=precision,
    )
    share = share or Share()
    if by_rows:
        share = replace(share, unit=rows(fisher.shapes, block_size))
    size = micro_batch or choose_micro_batch(chosen)
    step = step_rows(chosen, fisher.final_nbytes, size, samples)
    how = Gradients(model, chosen, loss, labels, seed, autocast, loss_scale, size, step, samples)
    if memory_budget is None:
        if scratch is not None or scratch_budget is not None:
            raise InvalidArgument("scratch: is for statistics within memory_budget; give that too")
        return Work(how, unlimited(how, fisher, share), fisher, source)
    plan = plan_within(
        parse_bytes(memory_budget),
        how,
        fisher,
        *source.first(),
        scratch=scratch,
        scratch_budget=None
        if scratch_budget is None
        else parse_bytes(scratch_budget, "scratch_budget"),
        use=use or Use(),
        repeats=source.repeats,
        is_dry=is_dry,
        share=share,
    )
    fisher._view_bytes = plan.view
    fisher._plan = plan
    return Work(replace(how, micro_batch=plan.micro_batch), plan, fisher, source)


def collected(
    model: nn.Module,
    batches: Batches,
    *,
    progress: bool | Report = False,
    **options: Any,
) -> BlockFisher:
    """What `collect` returns; the options are those of `prepare`.

    With a `use` that allows it, statistics may be nowhere (`fastsal.fisher.collection.recollected`).
    """
    work = prepare(model, batches, **options)
    groups = list(map(by_key, work.plan.groups))
    return placed(work, groups, passes_of(groups), progress)


def add_samples(
    fisher: BlockFisher,
    model: nn.Module,
    batches: list[Pair],
    *,
    progress: bool | Report = False,
    **options: Any,
) -> None:
    """Add more samples to statistics that were collected within a memory budget.

    The sums are those of `fisher.merge(collect(...))`; they are made in groups, in the memory that
    the statistics leave.
    """
    work, plan = joining(fisher, model, batches, **options)
    if isinstance(fisher, Recollected):
        fisher._join(work)
        return
    groups = list(map(by_key, groups_within(plan.spare, work.how, fisher)))
    with reporter(progress, "statistics") as report:
        add_in_groups(work, groups, passes_of(groups), report)


def joining(
    fisher: BlockFisher, model: nn.Module, batches: list[Pair], **options: Any
) -> tuple[Work, MemoryPlan]:
    """What `add_samples` is to do, and the plan by which the statistics were collected."""
    plan = fisher._plan
    if plan is None or plan.budget is None:
        raise InvalidArgument("fisher: was collected without a budget")  # a defect of ours
    budgets = ("memory_budget", "scratch", "scratch_budget", "use")
    work = prepare(model, batches, **{k: v for k, v in options.items() if k not in budgets})
    samples = sum(len(images) for images, _ in batches)
    how = replace(work.how, micro_batch=plan.micro_batch, samples=samples)
    return replace(work, how=how, fisher=fisher), plan


def placed(
    work: Work, groups: Sequence[Parts], add: GroupPass, progress: bool | Report
) -> BlockFisher:
    """Collect what was prepared, in the place that was planned.

    Args:
        work: What is done.
        groups: Parts of its statistics, by their keys, one group a pass.
        add: Does it for one group.
        progress: Where to report.
    """
    if work.plan.place == "nowhere":
        return Recollected(work, groups, add, progress)
    with reporter(progress, "statistics") as report:
        if work.plan.place == "memory":
            add(work, work.fisher, 0, report)
        else:
            _move_to_scratch(work)
            add_in_groups(work, groups, add, report)
    return work.fisher


def _move_to_scratch(work: Work) -> None:
    """Keep the statistics, of no samples yet, in a file of the scratch folder."""
    fisher, plan = work.fisher, work.plan
    nbytes = sum(sums_nbytes(fisher, part, work.how.samples) for part in whole(fisher.shapes))
    room = nbytes + 128 * len(fisher.names)  # arrays begin at multiples of 64 bytes
    fisher._move_to(FileArrays(plan.scratch or ".", room), work.how.samples)


def passes_of(groups: Sequence[Parts]) -> GroupPass:
    """Passes that are run here, each for one group of parts of the model."""

    def add(work: Work, some: BlockFisher, number: int, report: Report) -> None:
        add_pass(work.how, some, groups[number], work.source(), report)

    return add


def add_in_groups(work: Work, groups: Sequence[Parts], add: GroupPass, report: Report) -> None:
    """Go over the images once for each group of parts, and add its statistics to those there.

    Args:
        work: What is done; its statistics are added to.
        groups: Parts of them, by their keys.
        add: Does it for one group.
        report: Is told of samples as they are done.
    """
    fisher = work.fisher
    counted: BlockFisher | None = None
    total = None if work.how.samples is None else work.how.samples * len(groups)
    for number, parts in enumerate(groups):
        some = fisher._empty(parts)
        before = 0 if counted is None else counted._rows_seen * number

        def so_far(done: int, _: int | None, before: int = before) -> None:
            report(before + done, total)

        add(work, some, number, so_far)
        if counted is not None:
            check_again(counted._rows_seen, some._rows_seen)
        trim_heap()
        fisher._merge_parts(some, parts)
        some._parameters.clear()  # the sums; counts are compared with those of the next group
        counted = some
        trim_heap()
    if counted is not None:
        fisher._count_of(counted)
