"""Statistics from images: what is to be done, within what memory, and doing it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from fastsal.data.batches import Batches, Pair, check_again
from fastsal.errors import InvalidArgument
from fastsal.fisher.block_fisher import BlockFisher
from fastsal.fisher.collection.budget import groups_within, sums_nbytes
from fastsal.fisher.collection.passes import add_pass
from fastsal.fisher.collection.prepare import prepare
from fastsal.fisher.collection.recollected import Recollected
from fastsal.fisher.collection.work import GroupPass, Work
from fastsal.fisher.memory_plan import MemoryPlan
from fastsal.fisher.parts import Parts, by_key, whole
from fastsal.utils.live_memory import trim_heap
from fastsal.utils.mapped_files import FileArrays
from fastsal.utils.progress import Report, reporter


def collected(
    model: nn.Module,
    batches: Batches,
    *,
    progress: bool | Report = False,
    **options: Any,
) -> BlockFisher:
    """What `collect` returns; the options are those of `prepare`.

    With a `use` that allows it, statistics may be nowhere (`recollected.py`).
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
