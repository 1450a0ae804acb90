"""Collection of statistics from images, group by group within a memory plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import nn

from fastsal.data.batches import Batches, Pair, check_again
from fastsal.errors import InvalidArgument
from fastsal.fisher.block_fisher import fisher_of
from fastsal.fisher.collection.budget import groups_within, sums_nbytes
from fastsal.fisher.collection.passes import add_pass
from fastsal.fisher.collection.prepare import prepare
from fastsal.fisher.collection.recollected import Recollected
from fastsal.fisher.collection.work import Passes, Work
from fastsal.fisher.model_sums import ModelSums
from fastsal.fisher.parts import Part, by_key, uncut
from fastsal.fisher.statistics import Collected, Statistics
from fastsal.utils.live_memory import trim_heap
from fastsal.utils.mapped_files import FileArrays
from fastsal.utils.progress import Report, reporter


def collected(
    model: nn.Module,
    batches: Batches,
    *,
    progress: bool | Report = False,
    **options: Any,
) -> Statistics:
    """Collect statistics, with the options of `prepare`.

    If `use` allows it, the result may be recomputed on each use (`recollected.py`).
    """
    work = prepare(model, batches, **options)
    return run(work, local_passes(work.plan.groups), progress)


def run(work: Work, passes: Passes, progress: bool | Report) -> Statistics:
    """Run a collection, and store the sums where it was planned.

    Args:
        work: The collection.
        passes: Runs it for one group of parts at a time.
        progress: How to report progress.
    """
    if work.plan.place == "recomputed":
        return Recollected(work, passes, progress)
    with reporter(progress, "statistics") as report:
        if work.plan.place == "memory":
            passes.add(work, work.sums, 0, report)
        else:
            _move_to_scratch(work)
            add_in_groups(work, passes, report)
    plan = None if work.plan.budget is None else work.plan
    return Collected(fisher_of(work.sums), plan)


def add_samples(
    statistics: Statistics,
    model: nn.Module,
    batches: Iterable[Pair],
    *,
    progress: bool | Report = False,
    **options: Any,
) -> None:
    """Add more samples to statistics that were collected within a memory budget.

    The sums equal those of `statistics.merge(collected(...))`. They are accumulated in groups, in
    the memory that the plan leaves for them.
    """

    def passes(work: Work) -> Passes:
        return local_passes(groups_within(work.plan.spare, work.how, work.sums))

    join(statistics, model, batches, passes, progress, **options)


def join(
    statistics: Statistics,
    model: nn.Module,
    batches: Iterable[Pair],
    passes: Callable[[Work], Passes],
    progress: bool | Report,
    **options: Any,
) -> None:
    """Add more samples to statistics that were collected within a memory budget.

    Args:
        statistics: They are changed in place.
        model: The model, with the same weights.
        batches: The samples, the same in every iteration.
        passes: Divides the collection into passes that fit in `work.plan.spare` bytes.
        progress: How to report progress.
        options: Those of `prepare`; the memory budget is that of the statistics.
    """
    plan = statistics.plan
    if plan is None:
        raise InvalidArgument("statistics must be collected within a budget")  # an internal error
    budgets = ("memory_budget", "scratch", "scratch_budget", "use")
    rest = {k: v for k, v in options.items() if k not in budgets}
    work = prepare(model, batches, **{**rest, "warns": False})
    samples = sum(len(images) for images, _ in batches)
    how = replace(work.how, micro_batch=plan.micro_batch, samples=samples)
    work = replace(work, how=how, plan=plan)
    if isinstance(statistics, Recollected):
        statistics.add(work)
    else:
        assert isinstance(statistics, Collected)
        work = replace(work, sums=statistics.sums)
        with reporter(progress, "statistics") as report:
            add_in_groups(work, passes(work), report)


def local_passes(groups: list[list[Part]]) -> Passes:
    """Return passes that this process runs alone, each for one group of parts of the model."""
    by_keys = list(map(by_key, groups))

    def add(work: Work, sums: ModelSums, number: int, report: Report) -> None:
        add_pass(work.how, sums, by_keys[number], work.source(), report)

    return Passes(by_keys, add)


def add_in_groups(work: Work, passes: Passes, report: Report) -> None:
    """Run all passes of a collection, and add the sums of each group to those of the model.

    Args:
        work: The collection; its sums are added to.
        passes: Runs it for one group of parts at a time.
        report: Called with the number of samples done.
    """
    counted: ModelSums | None = None
    total = None if work.how.samples is None else work.how.samples * len(passes.groups)
    for number, parts in enumerate(passes.groups):
        some = work.sums.like(parts)
        before = 0 if counted is None else counted.rows_seen * number

        def so_far(done: int, _: int | None, before: int = before) -> None:
            report(before + done, total)

        passes.add(work, some, number, so_far)
        if counted is not None:
            check_again(counted.rows_seen, some.rows_seen)
        trim_heap()
        work.sums.merge_parts(some, parts)
        some.parameters.clear()  # frees the sums; counts are compared with those of the next group
        counted = some
        trim_heap()
    if counted is not None:
        work.sums.count_parts(counted)


def _move_to_scratch(work: Work) -> None:
    """Allocate the sums, which have no samples yet, in a file of the scratch folder."""
    sums, samples = work.sums, work.how.samples
    nbytes = sum(sums_nbytes(sums, part, samples) for part in uncut(sums.shapes))
    room = nbytes + 128 * len(sums.parameters)  # arrays begin at multiples of 64 bytes
    sums.move_to_file(FileArrays(work.plan.scratch or ".", room), samples)
