"""Planning of a collection within a memory budget: micro-batch, passes, and where sums are stored.

First the micro-batch is reduced as far as necessary. Then the sums are kept in memory if they fit.
Otherwise several passes are made over the images, each for a group of parameters. The sums are
stored in a file of the scratch folder if one is given; else nothing is stored, and they are
recomputed on each use.

Axes: d weights, B weights of a block, n samples of a micro-batch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from torch import Tensor

from fastsal.errors import InvalidArgument
from fastsal.fisher.collection.pass_memory import measure
from fastsal.fisher.collection.passes import PassSettings
from fastsal.fisher.memory_plan import (
    OVERHEAD_BYTES,
    VIEW_COPIES,
    MemoryPlan,
    PassMemory,
    Share,
    Use,
)
from fastsal.fisher.model_sums import ModelSums
from fastsal.fisher.parts import Part, block_unit, cut, packed_bytes, uncut
from fastsal.fisher.storage import VIEW_BYTES
from fastsal.gradients.precision import row_dtype
from fastsal.utils.mapped_files import check_folder
from fastsal.utils.sizes import gib

# Fraction of the budget to plan with; the rest is for memory that no plan covers.
_PLANNED = 0.94
# Fraction of the planned memory that activations may take before the micro-batch is halved.
_ACTIVATIONS = 0.4
# A larger fraction for small micro-batches: below four samples PyTorch chooses other kernels, which
# change the last bits of gradients.
_SMALL, _ACTIVATIONS_OF_SMALL = 4, 0.8
# Fraction of the remaining memory for sums, if more samples are added later.
_JOINED = 0.85


def unlimited(how: PassSettings, sums: ModelSums, share: Share, images: int = 0) -> MemoryPlan:
    """Return the plan without a budget: all sums in memory, in one pass; nothing is measured."""
    parts = uncut(sums.shapes)
    costs = _Costs(how, sums, how.micro_batch, share)
    statistics = sum(map(costs.kept, parts)) if share.ranks > 1 else sums.final_nbytes
    return MemoryPlan(
        budget=None,
        micro_batch=how.micro_batch,
        step=how.step,
        groups=[parts],
        place="memory",
        statistics=statistics,
        group=statistics,
        rows=sum(map(costs.rows, parts)),
        activations=0,
        kept=0,
        kept_collecting=0,
        view=VIEW_BYTES,
        images=images,
        ranks=costs.share.ranks,
    )


def plan_within(
    budget: int,
    how: PassSettings,
    sums: ModelSums,
    images: Tensor,
    labels: Tensor | None,
    *,
    use: Use,
    share: Share,
    scratch: str | os.PathLike[str] | None = None,
    scratch_budget: int | None = None,
    repeats: bool = True,
    is_dry: bool = False,
) -> MemoryPlan:
    """Plan a collection within a budget; passes of one and two samples are run to measure memory.

    Args:
        budget: Most bytes that may be added to the process.
        how: How gradients are formed, with the micro-batch of a run without a budget.
        sums: Sums of no samples.
        images: A few samples.
        labels: Their labels.
        use: Memory requirements of what the statistics are for.
        share: How the statistics are divided among processes.
        scratch: Folder for sums that do not fit in memory.
        scratch_budget: Most bytes of the scratch file.
        repeats: Whether the images can be iterated several times.
        is_dry: Whether only a plan is required; the scratch folder may be missing.

    Raises:
        InvalidArgument: The budget is too small, or requires a scratch folder, or more space in it.
    """
    total = round(_PLANNED * budget) - use.images
    view = min(VIEW_BYTES, budget // 16)
    # Stored sums remain in memory while weights are scored; recomputed sums are accumulated then.
    scoring = use.kept + VIEW_COPIES * view
    has_file = scratch is not None or not use.again
    kept_collecting = use.kept_collecting if has_file else max(use.kept, use.kept_collecting)
    planned = total - kept_collecting - share.sent(budget)
    costs = _Costs(how, sums, how.micro_batch, share)
    trial = costs.groups(max(planned // 2, 2**20)) or [uncut(sums.shapes)]
    memory = share.agree(measure(how, {part.name for part in trial[0]}, images, labels))
    size = _micro_batch(memory, how.micro_batch, planned)
    costs = replace(costs, micro_batch=size)
    activations = memory.of(size) + share.sent(budget)
    joined = _JOINED if use.joins else 1.0
    room = total - use.kept_collecting - activations
    inside = round(joined * min(room, total - scoring))
    groups = costs.groups(inside) if inside > 0 else None
    place = "memory"
    if groups is None or len(groups) > 1:
        place = "file" if has_file else "recomputed"
        room = total - kept_collecting - activations
        if place == "recomputed":
            # The sums of added samples are accumulated beside the first ones.
            joined = 0.5 if use.joins else 1.0
            room = min(room, total - scoring)
        groups = costs.groups(round(joined * room)) if room > 0 else None
    if groups is None or scoring > total:
        block = costs.of(costs.first_unit())
        least = (use.images + max(kept_collecting + activations + block, scoring)) / _PLANNED
        hint = "; scratch=FOLDER (--scratch) requires less" if place == "recomputed" else ""
        raise InvalidArgument(
            f"memory_budget must be at least {gib(least)}, got {gib(budget)}: "
            f"{gib(activations)} for a pass of {max(size, 2)} samples, {gib(block)} for one block"
            + _and(use.kept, "scores, masks and copies of weights")
            + _and(use.images, "held-out images, as batches is an iterator")
            + hint
        )
    plan = MemoryPlan(
        budget=budget,
        micro_batch=size,
        step=how.step,
        groups=groups,
        place=place,
        statistics=sum(map(costs.kept, uncut(sums.shapes))),
        group=max(sum(map(costs.sums, group)) for group in groups),
        rows=max(sum(map(costs.rows, group)) for group in groups),
        activations=activations,
        kept=use.kept,
        kept_collecting=use.kept_collecting if place == "memory" else kept_collecting,
        view=view,
        images=use.images,
        ranks=share.ranks,
    )
    if place == "memory":
        return replace(plan, spare=max(0, room - plan.statistics))
    if place == "file":
        plan = _in_file(replace(plan, spare=room), room, scratch, scratch_budget, is_dry=is_dry)
    if not repeats and not is_dry:
        raise InvalidArgument(
            "batches must be a list, a DataLoader or another iterable that can be iterated several "
            f"times, got an iterator; memory_budget requires {plan.passes} passes over the images"
        )
    return plan


def _in_file(
    plan: MemoryPlan,
    room: int,
    scratch: str | os.PathLike[str] | None,
    most: int | None,
    *,
    is_dry: bool,
) -> MemoryPlan:
    """Return the plan with its scratch folder, after checking the space in it."""
    if scratch is None and not is_dry:
        raise InvalidArgument(
            f"memory_budget of {gib(plan.budget or 0)} leaves {gib(room)} for statistics of "
            f"{gib(plan.statistics)}; pass scratch=FOLDER (--scratch) to store them in a file, or "
            "choose fewer parameters or a smaller block_size"
        )
    if most is not None and plan.disk > most:
        raise InvalidArgument(
            f"scratch_budget must be at least {gib(plan.disk)}, the size of the statistics, got "
            f"{gib(most)}"
        )
    if scratch is not None and not is_dry:
        check_folder(scratch, plan.disk)
    return replace(plan, scratch=None if scratch is None else os.fspath(scratch))


@dataclass(frozen=True)
class _Costs:
    """Memory of parts on one process, in bytes.

    Attributes:
        how: How gradients are formed.
        model: Sums of no samples, of the whole model.
        micro_batch: Samples of a pass.
        share: How the statistics are divided among processes.
    """

    how: PassSettings
    model: ModelSums
    micro_batch: int
    share: Share

    def groups(self, room: int) -> list[list[Part]] | None:
        """Cut the model into the fewest groups of `room` bytes; None if a unit does not fit."""
        size = self.model.block_size
        return cut(self.model.shapes, size, self.of, room, unit=self.share.unit)

    def of(self, part: Part) -> int:
        """Return the memory of sums and gathered rows."""
        return self.sums(part) + self.rows(part)

    def sums(self, part: Part) -> int:
        """Return the memory of sums while they are accumulated."""
        first = sums_nbytes(self.model, part, self.how.samples) if self.share.sums_first else 0
        return self.kept(part) + first

    def kept(self, part: Part) -> int:
        """Return the memory of sums after the collection."""
        nbytes = sums_nbytes(self.model, part, self.how.samples)
        return self.share.of(nbytes, part, self.model.block_size)

    def rows(self, part: Part) -> int:
        """Return the memory of gathered rows."""
        if self.share.sums_first or self.share.ranks == 1:
            return 0 if self.micro_batch >= self.how.step else rows_nbytes(self.how, part)
        if self.share.rows(self.micro_batch) % self.how.step == 0:
            return 0
        return self.share.of(rows_nbytes(self.how, part), part, self.model.block_size)

    def first_unit(self) -> Part:
        """Return a part that is the largest unit of the model."""
        unit = self.share.unit or block_unit(self.model.block_size)
        part = max(uncut(self.model.shapes), key=unit)
        return Part(part.name, 0, unit(part), part.size)


def sums_nbytes(model: ModelSums, part: Part, samples: int | None) -> int:
    """Return the bytes of the sums of a part of a model while they are accumulated.

    Args:
        model: Sums of the whole model, or of the share of one process.
        part: The part.
        samples: Total number of samples, if known.
    """
    size = model.itemsize
    limit = (min(model.block_size or part.size, part.size) + 1) // 2
    if samples is not None and samples <= limit:
        return size * len(part) * (samples + 1)  # the gradients themselves are kept
    return packed_bytes(part, model.block_size, size)


def rows_nbytes(how: PassSettings, part: Part) -> int:
    """Return the bytes of the rows of a part that are gathered for a step."""
    return how.step * len(part) * row_dtype(how.chosen[part.name]).itemsize


def groups_within(room: int, how: PassSettings, sums: ModelSums) -> list[list[Part]]:
    """Cut a model into groups whose sums and rows fit in `room` bytes.

    If even one unit does not fit, each parameter is a group.
    """
    found = _Costs(how, sums, how.micro_batch, Share()).groups(room)
    return found or [[part] for part in uncut(sums.shapes)]


def _micro_batch(memory: PassMemory, most: int, planned: int) -> int:
    """Return the largest of `most`, `most / 2`, ... whose tensors fit in a fraction of the plan."""
    size = most
    usable = planned - OVERHEAD_BYTES
    while size > 2:  # two samples are always used to test the model
        tensors = memory.of(size) - OVERHEAD_BYTES
        share = _ACTIVATIONS_OF_SMALL if size <= _SMALL else _ACTIVATIONS
        if tensors <= share * usable:
            break
        size //= 2
    return size


def _and(nbytes: int, what: str) -> str:
    return f", {gib(nbytes)} for {what}" if nbytes else ""
